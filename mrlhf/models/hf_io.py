"""HF directories: safetensors read slice by slice, written shard by shard; config and tokenizer travel unchanged."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mrlhf.errors import CheckpointError
from mrlhf.models.spec import ModelSpec
from mrlhf.models.weights import hf_shapes
from mrlhf.models.weights.blocks import Block

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_HARMLESS = (".rotary_emb.inv_freq",)
_DTYPE_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


def resolve_hf(path: str) -> Path:
    """A local directory as it is; anything else is taken for a hub id. Raises CheckpointError."""
    if Path(path).is_dir():
        return Path(path)
    if path.count("/") > 1 or path.startswith((".", "/")) or not path:
        raise CheckpointError(f"no such directory: {path!r}", expected="a HF directory, a mrlhf checkpoint or a hub id")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]))
    except Exception as error:  # the hub client has no common base class for network and not-found errors
        raise CheckpointError(
            f"no such directory, and the hub does not give it: {path!r} ({type(error).__name__})",
            expected="a HF directory, a mrlhf checkpoint or a hub id",
        ) from error


class HFReader:
    """Reads blocks of the tensors of a HF directory; nothing but the block comes into memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        index = directory / INDEX
        if index.is_file():
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
            outside = [f for f in self.files.values() if Path(f).name != f]
            if outside:
                raise CheckpointError(f"the index names a file outside the directory: {outside[0]!r}", where=str(index))
        elif (directory / SINGLE).is_file():
            with safe_open(directory / SINGLE, "pt") as f:
                self.files = dict.fromkeys(f.keys(), SINGLE)
        else:
            raise CheckpointError(
                "no safetensors weights", where=str(directory), expected=f"{SINGLE} or {INDEX}", fix="save the model with safetensors"
            )
        self._open: dict[str, Any] = {}

    def _slice(self, name: str) -> Any:
        file = self.files[name]
        if file not in self._open:
            try:
                self._open[file] = safe_open(self.directory / file, "pt")
            except Exception as error:  # safetensors raises its own, undocumented classes
                raise CheckpointError(f"cannot be read: {error}", where=str(self.directory / file)) from error
        return self._open[file].get_slice(name)

    def read(self, block: Block) -> torch.Tensor:
        tensor, end = self._slice(block.hf), block.start + block.length
        return tensor[block.start : end] if block.dim == 0 else tensor[:, block.start : end]

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slice(name).get_shape())

    def dtype_name(self, name: str) -> str:
        """float32, bfloat16 or float16; safetensors' own word for others."""
        found = self._slice(name).get_dtype()
        return _DTYPE_NAMES.get(found, found)

    def check(self, spec: ModelSpec, *, head: str) -> None:
        """Every expected tensor is there with its shape, and no other. Raises CheckpointError naming both sides."""
        expected = hf_shapes(spec, head=head)
        missing = sorted(set(expected) - set(self.files))
        unknown = sorted(
            n for n in set(self.files) - set(expected) if not n.endswith(_HARMLESS) and not (spec.tied and n == "lm_head.weight")
        )
        wrong = [
            f"{n} {self.shape(n)} instead of {shape}" for n, shape in expected.items() if n in self.files and self.shape(n) != shape
        ]
        found = [f"{what}: {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}" for what, names in
                 (("missing", missing), ("not known", unknown), ("of another shape", wrong)) if names]  # fmt: skip
        if found:
            raise CheckpointError("tensors do not fit config.json: " + "; ".join(found), where=str(self.directory))


def copy_side_files(source: Path, target: Path) -> None:
    """config, tokenizer, generation config, chat template: every small file that holds no weights (nor an index of them), byte for byte."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and file.suffix in (".json", ".txt", ".model", ".jinja", ".tiktoken") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, target / file.name)


def write_safetensors(directory: Path, tensors: Iterable[tuple[str, torch.Tensor]], *, shard_bytes: int = 5 << 30) -> None:
    """One file, or shards of at most `shard_bytes` and their index; only a shard is in memory."""
    shards: list[list[str]] = []
    pending: dict[str, torch.Tensor] = {}
    size = total = 0

    def flush() -> None:
        save_file(pending, directory / f"part-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        nbytes = tensor.numel() * tensor.element_size()
        if pending and size + nbytes > shard_bytes:
            flush()
            size = 0
        pending[name] = tensor.contiguous()
        size, total = size + nbytes, total + nbytes
    flush()
    if len(shards) == 1:
        os.rename(directory / "part-0", directory / SINGLE)
        return
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for i, file in enumerate(names):
        os.rename(directory / f"part-{i}", directory / file)
    weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
    (directory / INDEX).write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}, indent=2) + "\n"
    )
