"""Lists the contents of a checkpoint or a HF directory, from headers alone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from mrlhf.checkpoint.manifest import MANIFEST
from mrlhf.checkpoint.names import second_names
from mrlhf.checkpoint.safe_pickle import read_metadata
from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.models.hf_files import open_files

OPTIMIZER = "optimizer."  # prefix of the optimizer's tensors in a checkpoint
Row = tuple[str, tuple[int, ...], str]  # name, shape, dtype
# other types count as one byte
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8, "int64": 8, "int32": 4, "F64": 8, "I64": 8}


def checkpoint_tensors(directory: Path) -> list[Row]:
    """The tensors of a torch_dist directory; layers of one kind are stacked, layer first. Raises CheckpointError."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    entries = read_metadata(directory).state_dict_metadata
    tensors = {name: entry for name, entry in sorted(entries.items()) if isinstance(entry, TensorStorageMetadata)}
    tensors = {name: tensors[name] for name in sorted(tensors.keys() - second_names(tensors).keys())}
    return [(name, tuple(t.size), str(t.properties.dtype).removeprefix("torch.")) for name, t in tensors.items()]


def _safetensors_rows(directory: Path) -> list[Row]:
    """The tensors of the safetensors files, as stored."""
    files, headers = open_files(directory)
    entries = [(name, headers[file].tensors[name]) for name, file in sorted(files.items())]
    dtypes = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
    return [(name, entry.shape, dtypes.get(entry.type, entry.type)) for name, entry in entries]


def _size(row: Row) -> int:
    return math.prod(row[1]) * _BYTES.get(row[2], 1)


def _with_unit(n: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 1024:
            return f"{n:,.0f} {unit}" if unit == "B" else f"{n:,.1f} {unit}"
        n /= 1024
    return f"{n:,.1f} TiB"


def _table(title: str, rows: list[Row], *, tensors: bool) -> list[str]:
    width = max((len(name) for name, _, _ in rows), default=0)
    total = sum(math.prod(shape) for _, shape, _ in rows)
    lines = [f"{title}: {len(rows)} tensors, {total:,} values, {_with_unit(sum(map(_size, rows)))}"]
    for row in rows if tensors else ():
        name, shape, dtype = row
        size = _with_unit(_size(row))
        lines.append(f"  {name:<{width}}  {'x'.join(map(str, shape)) or 'scalar':>16}  {dtype:<9} {size:>12}")
    return lines


def _manifest_lines(manifest: dict[str, Any]) -> list[str]:
    """The manifest; of a long list only its length."""
    lines = []
    for key, value in manifest.items():
        if isinstance(value, (dict, list)):
            value = f"{len(value)} entries" if len(value) > 4 else json.dumps(value)
        lines.append(f"  {key:<16} {value}")
    return lines


def _kind(source: ModelSource) -> str:
    own = "files" in source.manifest
    return "mrlhf checkpoint" if own else "checkpoint of Megatron-LM" if source.is_checkpoint else "HF directory"


def list_contents(path: str, *, tensors: bool) -> list[str]:
    """Lines with kind and metadata and, if `tensors`, name, shape, dtype and size of every tensor."""
    source = open_source(path)
    lines = [
        f"{source.path}: {_kind(source)}",
        f"  {'model':<16} {source.spec.family}, {source.spec.num_parameters:,} parameters, head {source.head}",
    ]
    if not source.is_checkpoint:
        return lines + _table("safetensors", _safetensors_rows(source.path), tensors=tensors)
    lines += _manifest_lines(source.manifest)
    assert source.dist is not None
    parts = {"": source.dist} | {f"{p.parent.name} ": p.parent / "dist"
                                 for p in sorted(source.path.glob(f"*/{MANIFEST}"))}
    for label, directory in parts.items():
        rows = checkpoint_tensors(directory)
        optimizer = [row for row in rows if row[0].startswith(OPTIMIZER)]
        lines += _table(f"{label}weights", [row for row in rows if not row[0].startswith(OPTIMIZER)], tensors=tensors)
        lines += _table(f"{label}optimizer state", optimizer, tensors=tensors) if optimizer else []
    return lines
