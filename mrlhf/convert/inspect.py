"""What stands in a checkpoint or a HF directory, from headers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mrlhf.checkpoint.manifest import MANIFEST
from mrlhf.checkpoint.safe_pickle import read_metadata
from mrlhf.checkpoint.source import open_source
from mrlhf.models.hf_files import open_files

Row = tuple[str, tuple[int, ...], str]  # name, shape, dtype
_BYTES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "float64": 8,
    "int64": 8,
    "int32": 4,
    "F8_E4M3": 1,
    "uint8": 1,
    "bool": 1,
    "F64": 8,
    "I64": 8,
}


def checkpoint_tensors(directory: Path) -> list[Row]:
    """Of a torch_dist directory; layers of one kind are stacked, layer first. Raises CheckpointError."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = read_metadata(directory).state_dict_metadata
    found = {name: e for name, e in entries.items() if isinstance(e, TensorStorageMetadata)}
    return [(name, tuple(e.size), str(e.properties.dtype).removeprefix("torch.")) for name, e in sorted(found.items())]


def hf_tensors(directory: Path) -> list[Row]:
    """Of the safetensors files, as they are stored."""
    files, headers = open_files(directory)
    found = []
    for name, file in sorted(files.items()):
        kind, shape, _, _ = headers[file].tensors[name]
        found.append((name, shape, {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(kind, kind)))
    return found


def _size(row: Row) -> int:
    return math.prod(row[1]) * _BYTES.get(row[2], 1)


def _human(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} TiB"


def _table(title: str, rows: list[Row], *, tensors: bool) -> list[str]:
    width = max((len(name) for name, _, _ in rows), default=0)
    total = sum(math.prod(shape) for _, shape, _ in rows)
    lines = [f"{title}: {len(rows)} tensors, {total:,} values, {_human(sum(map(_size, rows)))}"]
    if tensors:
        lines += [
            f"  {row[0]:<{width}}  {'x'.join(map(str, row[1])) or 'scalar':>16}  {row[2]:<9} {_human(_size(row)):>12}" for row in rows
        ]
    return lines


def _values(manifest: dict[str, Any]) -> list[str]:
    """The manifest without its long lists."""
    found = []
    for key, value in manifest.items():
        if isinstance(value, (dict, list)):
            value = f"{len(value)} entries" if len(value) > 4 else json.dumps(value)
        found.append(f"  {key:<16} {value}")
    return found


def describe(path: str, *, tensors: bool) -> list[str]:
    """Lines: kind, metadata, and every tensor's name, shape, dtype and size unless `tensors` is false."""
    source = open_source(path)
    lines = [
        f"{source.path}: {'mrlhf checkpoint' if source.is_checkpoint else 'HF directory'}",
        f"  {'model':<16} {source.spec.family}, {source.spec.num_parameters:,} parameters, head {source.head}",
    ]
    if not source.is_checkpoint:
        return lines + _table("safetensors", hf_tensors(source.path), tensors=tensors)
    lines += _values(source.manifest)
    parts = [source.path, *sorted(p.parent for p in source.path.glob(f"*/{MANIFEST}"))]
    for part in parts:
        rows = checkpoint_tensors(part / "dist")
        label = "" if part == source.path else f"{part.name} "
        lines += _table(f"{label}weights", [r for r in rows if not r[0].startswith("optimizer.")], tensors=tensors)
        optimizer = [r for r in rows if r[0].startswith("optimizer.")]
        lines += _table(f"{label}optimizer state", optimizer, tensors=tensors) if optimizer else []
    return lines
