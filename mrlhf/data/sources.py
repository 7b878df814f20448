"""Reading input files: JSON lines (plain or .gz), a JSON array, parquet. Parsing itself happens in the workers."""

from __future__ import annotations

import gzip
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from mrlhf.errors import DataError, Problems

_BOM = b"\xef\xbb\xbf"
_FORMATS = "JSON lines (.jsonl, .jsonl.gz), a JSON array (.json) or parquet (.parquet)"


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file. `rows` holds undecoded JSON lines (bytes) or ready records; `numbers` their 1-based lines (or rows)."""

    path: str
    numbers: list[int]
    rows: list[Any]

    def record(self, i: int) -> Any:
        """Row i decoded. Raises ValueError with the decoder's text where it is not JSON."""
        row = self.rows[i]
        return msgspec.json.decode(row) if isinstance(row, bytes) else row


def check_files(paths: tuple[str, ...]) -> list[DataError]:
    """What is wrong with the input paths, all at once."""
    found = []
    for path in paths:
        if not Path(path).exists():
            found.append(DataError("input file does not exist", where=path, fix="check the path given to --input"))
        elif Path(path).is_dir():
            found.append(DataError("is a directory", where=path, expected=_FORMATS, fix=f"--input {path}/*.jsonl"))
        elif Path(path).stat().st_size == 0:
            found.append(DataError("input file is empty", where=path, expected=_FORMATS, fix="leave it out of --input"))
        elif path.endswith(".parquet"):
            try:
                import pyarrow.parquet  # noqa: F401
            except ImportError:
                found.append(
                    DataError("reading parquet needs pyarrow, which is not installed", where=path, fix="pip install 'mrlhf[data]'")
                )
    return found


def read_chunks(paths: tuple[str, ...], *, rows: int = 256) -> Iterator[Chunk]:
    """The rows of all files in order, at most `rows` a chunk. Raises DataError where a file as a whole cannot be read."""
    problems = Problems()
    for error in check_files(paths):
        problems.add(error)
    problems.raise_if_any()
    for path in paths:
        if path.endswith(".parquet"):
            yield from _parquet(path, rows)
            continue
        with _open(path) as file:
            try:
                head = file.read(4096)
                file.seek(0)
                if head.removeprefix(_BOM).lstrip()[:1] == b"[":
                    yield from _array(path, file.read().removeprefix(_BOM), rows)
                else:
                    yield from _lines(path, file, rows)
            except (OSError, EOFError) as error:
                raise DataError(f"cannot be read: {error}", where=path, expected=_FORMATS) from error


def describe(paths: tuple[str, ...]) -> list[dict[str, Any]]:
    """[{path, bytes, sha256}] of the input files."""
    found = []
    for path in paths:
        with open(path, "rb") as file:
            found.append({"path": path, "bytes": Path(path).stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()})
    return found


def _open(path: str) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path, "rb") if path.endswith(".gz") else open(path, "rb"))


def _lines(path: str, file: IO[bytes], size: int) -> Iterator[Chunk]:
    numbers: list[int] = []
    rows: list[Any] = []
    for number, line in enumerate(file, 1):
        line = (line.removeprefix(_BOM) if number == 1 else line).strip()
        if not line:
            continue
        numbers.append(number)
        rows.append(line)
        if len(rows) == size:
            yield Chunk(path, numbers, rows)
            numbers, rows = [], []
    if rows:
        yield Chunk(path, numbers, rows)


def _array(path: str, data: bytes, size: int) -> Iterator[Chunk]:
    try:
        records = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise DataError(
            f"not a JSON array: {error}", where=path, expected=_FORMATS, fix="one JSON object a line is the safer form"
        ) from error
    yield from _slices(path, records, 1, size)


def _parquet(path: str, size: int) -> Iterator[Chunk]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(path)
        first = 1
        for batch in table.iter_batches(batch_size=16 * size):
            records = batch.to_pylist()
            yield from _slices(path, records, first, size)
            first += len(records)
    except pyarrow.ArrowException as error:
        raise DataError(f"not readable as parquet: {error}", where=path) from error


def _slices(path: str, records: list[Any], first: int, size: int) -> Iterator[Chunk]:
    for start in range(0, len(records), size):
        part = records[start : start + size]
        yield Chunk(path, list(range(first + start, first + start + len(part))), part)
