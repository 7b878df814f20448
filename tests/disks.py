"""A small disk that is really full (ENOSPC): a tmpfs of its own, and what a `Saver` does on it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mrlhf.checkpoint.manifest import check_manifest, file_entry, remove


@contextmanager
def small_disk(folder: Path, mib: int) -> Iterator[Path]:
    """Raises OSError where this process may not mount."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={mib}m", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise OSError(f"mount: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill(disk: Path) -> None:
    """As another program would: not a byte is left. `empty` takes it back."""
    with (disk / "of another program").open("ab", buffering=0) as file:
        while free := os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize:
            with suppress(OSError):  # a run that writes was faster
                os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), free)


def empty(disk: Path) -> None:
    (disk / "of another program").unlink()


def _names(directory: Path) -> list[str]:
    return sorted(p.name for p in directory.iterdir())


def saves_on_a_full_disk(trainer: Any, disk: Path) -> dict[str, Any]:
    """The disk is filled before or after the check of free space:
    before the first file, amid the tensors, before the index, before `latest`.
    """
    from mrlhf.checkpoint import manager
    from mrlhf.checkpoint import save as saving
    from mrlhf.checkpoint.manager import Saver
    from mrlhf.config.options import CheckpointConfig
    from mrlhf.errors import CheckpointError

    content, run = {"stage": "sft", "dtype": "float32"}, disk / "run"
    Saver(run, CheckpointConfig()).save(1, [trainer.part()], content)
    first = run / "checkpoints/step_1"
    bytes_of_first = {p: file_entry(p) for p in first.rglob("*") if p.is_file()}
    moments = {
        "side files": ("copy_side_files", 1),
        "tensors": ("save_tensor", 5),
        "index": ("write_metadata", 1),
        "pointer": ("retain", 1),
    }

    def full_at(name: str, calls: int, call: Callable[..., Any]) -> Callable[..., Any]:
        left = calls

        def filling(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if not left:
                fill(disk)
            return call(*args, **kwargs)

        return filling

    def one(name: str, calls: int, *, background: bool, policy: Any) -> dict[str, Any]:
        module = manager if name == "retain" else saving  # where it is called
        saver, error, call = (
            Saver(run, CheckpointConfig(async_save=background, on_save_error=policy)),
            "none",
            getattr(module, name),
        )
        setattr(module, name, full_at(name, calls, call))
        try:
            saver.save(2, [trainer.part()], content)
            if background and saver._under_way is not None:
                saver._under_way.writer.join()
                saver.poll()  # the step after
        except CheckpointError as caught:
            error = str(caught)
        finally:
            setattr(module, name, call)
        found = {"error": error, "left": _names(run / "checkpoints"), "last step": saver.last_step}
        empty(disk)
        Saver(run, CheckpointConfig())  # the next start
        check_manifest(first, verify="hash")
        same = {p: file_entry(p) for p in first.rglob("*") if p.is_file()} == bytes_of_first
        found |= {
            "untouched": same,
            "next start": _names(run / "checkpoints"),
            "latest": (run / "checkpoints/latest").read_text(),
        }
        remove(run / "checkpoints/step_2")
        return found

    found: dict[str, Any] = {
        f"{moment}, {'background' if background else 'front'}, {policy}": one(
            *how, background=background, policy=policy
        )
        for moment, how in moments.items()
        for background in (False, True)
        for policy in ("stop", "continue")
    }
    trainer.resume(first, 0, 1)
    Saver(run, CheckpointConfig()).save(3, [trainer.part()], content)
    return {"saves": found, "mended": _names(run / "checkpoints")}
