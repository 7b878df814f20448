"""Inputs -> blocks of rows: JSON lines (also .gz, .bz2, .zst or a pipe), JSON arrays, parquet, Hugging Face datasets.

The parent process only locates the blocks and decompresses; the workers parse the rows that they tokenise. Blocks
depend on the inputs alone, so --resume can reuse the work on one. Memory: one block, or one line of at most MAX_LINE
bytes where that is longer.
"""

from __future__ import annotations

import bz2
import codecs
import difflib
import glob
import gzip
import hashlib
import io
import json
import os
import re
import shlex
import sys
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, cast

import msgspec

from mrlhf.data.indexed import read_meta
from mrlhf.errors import DataError, Problems

MAX_LINE = 64 << 20
_ARRAY_BYTES = 1 << 16  # read at once from a JSON array
_ZST_BYTES = 1 << 8  # of a .zst, inflated at once: four of its bytes may stand for 128 KiB
_BLANK = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_FORMATS = "JSON lines (.jsonl, also .gz, .bz2, .zst), a JSON array (.json), parquet, or a HF dataset"
_ENDINGS = tuple(
    f".{kind}{packed}" for kind in ("jsonl", "ndjson", "json") for packed in ("", ".gz", ".bz2", ".zst")
) + (".parquet",)
_UNREADABLE = (OSError, EOFError, zlib.error, UnicodeDecodeError)


@dataclass(frozen=True)
class Chunk:
    """Consecutive rows of one file: undecoded JSON lines (bytes) or records, and their line (row) numbers from 1."""

    path: str
    numbers: list[int]
    rows: list[Any]

    def record(self, i: int) -> Any:
        """Row i decoded. Raises ValueError with the decoder's text where it is not JSON."""
        row = self.rows[i]
        return msgspec.json.decode(row) if isinstance(row, bytes) else row


@dataclass(frozen=True)
class RowBlock:
    """Some consecutive rows of `path`, which belongs to the input argument number `source`.

    `data` holds them (JSON lines, or an Arrow stream); without it they are the bytes from `offset` on of a plain file.
    `skipped`: blank lines before it that no block holds.
    """

    source: int
    path: str
    offset: int = 0
    length: int = 0
    data: bytes | None = None
    arrow: bool = False
    skipped: int = 0

    def content(self) -> bytes:
        if self.data is not None:
            return self.data
        with open(self.path, "rb") as file:
            file.seek(self.offset)
            return file.read(self.length)

    def chunks(self, content: bytes, *, rows: int = 256) -> Iterator[Chunk]:
        """The rows in `content`, numbered from 1 in this block, blank lines counted but left out."""
        if self.arrow:
            import pyarrow

            first = 1
            for batch in pyarrow.ipc.open_stream(content).read_all().to_batches(max_chunksize=rows):
                yield Chunk(self.path, list(range(first, first + batch.num_rows)), batch.to_pylist())
                first += batch.num_rows
            return
        numbers: list[int] = []
        lines: list[Any] = []
        if content.isspace():
            return
        for number, line in enumerate(io.BytesIO(content), self.skipped + 1):
            line = line.strip()
            if not line:
                continue
            numbers.append(number)
            lines.append(line)
            if len(lines) == rows:
                yield Chunk(self.path, numbers, lines)
                numbers, lines = [], []
        if lines:
            yield Chunk(self.path, numbers, lines)

    def count(self, content: bytes) -> int:
        """Lines (rows of an Arrow stream) in this block and skipped before it, blank ones included."""
        if self.arrow:
            import pyarrow

            return pyarrow.ipc.open_stream(content).read_all().num_rows
        return self.skipped + content.count(b"\n") + (not content.endswith(b"\n") and content != b"")


@dataclass
class _Input:
    """One input. `kind`: lines, parquet or dataset; `before`: (size, mtime) of the file when the command started."""

    source: int
    path: str
    kind: str
    before: tuple[int, int] | None = None
    described: dict[str, Any] = field(default_factory=dict)


class Sources:
    """The inputs that the arguments of --input name. Raises DataError (several as SeveralErrors).

    An argument is a file, a glob pattern, a directory of files, `-` (standard input), a directory that `datasets`
    saved, or a hub id. For the last two, `NAME:SPLIT` picks a split and `NAME@CONFIG` a configuration of a hub id.
    `total_bytes` is 0 where it is unknown. `flag`: what the user gave the arguments to, for the errors.
    """

    def __init__(self, arguments: tuple[str, ...], *, flag: str = "--input"):
        problems = Problems()
        self.flag = flag
        self.inputs: list[_Input] = []
        for source, argument in enumerate(arguments):
            try:
                self.inputs += _resolve(source, argument, flag)
            except DataError as error:
                problems.add(error)
        for item in self.inputs:
            if item.kind == "lines" and item.path != "-" or item.kind == "parquet":
                stat = os.stat(item.path)
                item.before = (stat.st_size, stat.st_mtime_ns)
                if stat.st_size == 0:
                    problems.add(DataError("input file is empty", where=item.path, expected=_FORMATS,
                                           fix=f"leave it out of {flag}"))
            problems.extend(_missing_package(item))
        problems.raise_if_any()
        sizes = [item.before[0] if item.before else 0 for item in self.inputs]
        self.total_bytes = sum(sizes) if all(sizes) else 0
        self.block_bytes = min(max(self.total_bytes // 64, 1 << 16), 8 << 20) if self.total_bytes else 1 << 20

    def blocks(self) -> Iterator[RowBlock]:
        """All blocks, in the order of the arguments, sorted files and rows. Raises DataError for an unreadable file."""
        for item in self.inputs:
            try:
                yield from {"lines": self._lines, "parquet": self._parquet, "dataset": self._dataset}[item.kind](item)
            except _UNREADABLE as error:
                raise DataError(f"cannot be read: {error}", where=item.path, expected=_FORMATS) from error

    def provenance(self) -> list[dict[str, Any]]:
        """[{path, bytes, sha256}] (datasets: path, rows, fingerprint). Raises DataError where a file changed since."""
        entries = []
        for item in self.inputs:
            if item.before is None:
                entries.append({"path": item.path, **item.described})
                continue
            stat = os.stat(item.path)
            if (stat.st_size, stat.st_mtime_ns) != item.before:
                raise DataError("the file changed while it was read", where=item.path, fix="the same command again")
            with open(item.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries.append({"path": item.path, "bytes": stat.st_size, "sha256": digest})
        return entries

    def _lines(self, item: _Input) -> Iterator[RowBlock]:
        if item.path == "-":
            hashing = _HashingReader(sys.stdin.buffer)
            yield from self._piped(item, cast(IO[bytes], hashing))
            item.described = {"bytes": hashing.count, "sha256": hashing.digest.hexdigest()}
            return
        with _open(item.path) as file:
            head = file.read(4096)
        with _open(item.path) as file:
            is_lines = bool({".jsonl", ".ndjson"} & set(Path(item.path).suffixes))
            if not is_lines and head.removeprefix(_BOM).lstrip()[:1] == b"[":
                yield from self._array(item, file)
            elif item.path.endswith((".gz", ".bz2", ".zst")):
                yield from self._piped(item, file)
            else:
                yield from self._plain(item, file, start=len(_BOM) if head.startswith(_BOM) else 0)

    def _plain(self, item: _Input, file: IO[bytes], *, start: int) -> Iterator[RowBlock]:
        """Byte ranges that end with a line; what is in them is read by the worker."""
        size = os.fstat(file.fileno()).st_size
        while start < size:
            end = min(start + self.block_bytes, size)
            file.seek(end - 1)
            rest = file.readline(MAX_LINE)
            if len(rest) == MAX_LINE and not rest.endswith(b"\n"):
                raise _long_line(item.path, end)
            end = end - 1 + len(rest)
            yield RowBlock(item.source, item.path, start, end - start)
            start = end

    def _piped(self, item: _Input, file: IO[bytes]) -> Iterator[RowBlock]:
        """Blocks that end with a line. Blank ones are left out: a small file may inflate to gigabytes of line ends."""
        parts: list[bytes] = []  # of a line whose end has not come yet
        size = skipped = at = 0
        first = True
        while data := file.read(self.block_bytes):
            if first:
                data, first = data.removeprefix(_BOM), False
            cut = data.rfind(b"\n") + 1
            if cut:
                block = b"".join((*parts, data[:cut]))
                if block.isspace():
                    skipped += block.count(b"\n")
                else:
                    yield RowBlock(item.source, item.path, data=block, skipped=skipped)
                    skipped = 0
                at, parts, size = at + len(block), [], 0
            parts.append(data[cut:])
            size += len(parts[-1])
            if size > MAX_LINE:
                raise _long_line(item.path, at)
        if rest := b"".join(parts):
            yield RowBlock(item.source, item.path, data=rest, skipped=skipped)

    def _array(self, item: _Input, file: IO[bytes]) -> Iterator[RowBlock]:
        """The elements of a JSON array as lines."""
        lines, size = [], 0
        for element in _JsonArray(item.path, file):
            lines.append(element.encode("utf-8", "surrogatepass") + b"\n")
            size += len(element)
            if size >= self.block_bytes:
                yield RowBlock(item.source, item.path, data=b"".join(lines))
                lines, size = [], 0
        if lines:
            yield RowBlock(item.source, item.path, data=b"".join(lines))

    def _parquet(self, item: _Input) -> Iterator[RowBlock]:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.ParquetFile(item.path)
            yield from self._arrow(item, table.iter_batches(batch_size=1024))
        except pyarrow.ArrowException as error:
            raise DataError(f"not readable as parquet: {error}", where=item.path) from error

    def _dataset(self, item: _Input) -> Iterator[RowBlock]:
        dataset = open_dataset(item.path, flag=self.flag)
        item.described = {"rows": len(dataset), "fingerprint": dataset._fingerprint}
        arrow = dataset.with_format("arrow")
        yield from self._arrow(item, (batch for table in arrow.iter(batch_size=1024) for batch in table.to_batches()))

    def _arrow(self, item: _Input, batches: Iterator[Any]) -> Iterator[RowBlock]:
        import pyarrow

        waiting: list[Any] = []

        def block() -> RowBlock:
            sink = pyarrow.BufferOutputStream()
            with pyarrow.ipc.new_stream(sink, waiting[0].schema) as stream:
                for batch in waiting:
                    stream.write_batch(batch)
            waiting.clear()
            return RowBlock(item.source, item.path, data=sink.getvalue().to_pybytes(), arrow=True)

        for batch in batches:
            if batch.num_rows:
                waiting.append(batch)
            if sum(b.nbytes for b in waiting) >= self.block_bytes:
                yield block()
        if waiting:
            yield block()


def read_chunks(arguments: tuple[str, ...], *, flag: str = "--input") -> Iterator[Chunk]:
    """The rows of all inputs in order, in this process, numbered by their files. Raises DataError."""
    lines: Counter[tuple[int, str]] = Counter()
    for block in Sources(arguments, flag=flag).blocks():
        content, where = block.content(), (block.source, block.path)
        for chunk in block.chunks(content):
            yield Chunk(chunk.path, [lines[where] + n for n in chunk.numbers], chunk.rows)
        lines[where] += block.count(content)


class _JsonArray:
    """Iterates over the elements of a JSON array, each as text without line breaks. Holds one element in memory.

    Raises DataError where the file is no JSON array.
    """

    def __init__(self, path: str, file: IO[bytes]):
        self._path, self._file = path, file
        self._decoder, self._text = json.JSONDecoder(), codecs.getincrementaldecoder("utf-8")()
        self._buffer, self._at, self._count = "", 0, 0

    def __iter__(self) -> Iterator[str]:
        more = self._skip("[") and self._buffer[self._at : self._at + 1] != "]"
        while more:
            end = self._element_end()
            # JSON allows a raw line break between its words only, so it can become a blank
            yield self._buffer[self._at : end].replace("\n", " ").replace("\r", " ")
            self._at, self._count = end, self._count + 1
            more = self._skip(",")
        behind = self._buffer[self._at + 1 :]
        while not behind.strip() and (data := self._file.read(_ARRAY_BYTES)):
            behind = self._text.decode(data)
        if behind.strip():
            raise self._error("something stands behind the array")

    def _skip(self, delimiter: str) -> bool:
        """Move over white space and one `delimiter`, reading on if needed; false at the end of the array."""
        seen = False
        while True:
            self._at = _blank_end(self._buffer, self._at)
            if not seen and self._buffer.startswith(delimiter, self._at):
                seen, self._at = True, _blank_end(self._buffer, self._at + 1)
            if self._at < len(self._buffer):
                break
            data = self._file.read(_ARRAY_BYTES)
            self._buffer, self._at = self._text.decode(data, final=not data).removeprefix("\ufeff"), 0
            if not data:
                break
        if not seen and (behind := self._buffer[self._at : self._at + 20])[:1] != "]":
            raise self._error(f"{delimiter!r} or ']' expected, {behind!r} found")
        return seen

    def _element_end(self) -> int:
        """The end of the element that begins at `_at`, reading on until it is whole."""
        while True:
            try:
                _, end = self._decoder.raw_decode(self._buffer, self._at)
                if end < len(self._buffer):  # a number or literal may continue behind the buffer
                    return end
                problem = "the array is not closed"
            except (json.JSONDecodeError, RecursionError) as error:
                problem = str(error)
            size = len(self._buffer) - self._at
            data = b"" if size > MAX_LINE else self._file.read(max(_ARRAY_BYTES, size))
            if not data:
                raise self._error(problem)
            self._buffer, self._at = self._buffer[self._at :] + self._text.decode(data), 0

    def _error(self, what: str) -> DataError:
        return DataError(f"not a JSON array: {what}", where=f"{self._path} (element {self._count + 1})",
                         expected=_FORMATS, fix="one JSON object a line")


class _HashingReader:
    """Standard input, hashed and counted on its way."""

    def __init__(self, file: Any):
        self.file, self.digest, self.count = file, hashlib.sha256(), 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.digest.update(data)
        self.count += len(data)
        return data


def _resolve(source: int, argument: str, flag: str) -> list[_Input]:
    if argument == "-":
        return [_Input(source, "-", "lines")]
    _refuse_made_data(argument, flag)
    if os.path.isfile(argument):
        return [_file(source, argument)]
    if glob.has_magic(argument):
        matches = sorted(f for f in glob.glob(argument, recursive=True) if os.path.isfile(f))
        if not matches:
            raise DataError("no file matches", where=argument,
                            fix=f"check the pattern given to {flag} (quoted, so that the shell leaves it alone)")
        return [_file(source, f) for f in matches]
    directory, _, split = argument.rpartition(":") if ":" in argument else (argument, "", "")
    if os.path.isdir(argument) or os.path.isdir(directory):
        return _resolve_directory(source, argument, directory if split else argument, flag)
    is_path = argument.startswith((".", "/", "~")) or argument.endswith(_ENDINGS)
    if argument.partition(":")[0].count("/") == 1 and not is_path:
        return [_Input(source, argument, "dataset")]
    raise DataError("input file does not exist", where=argument, fix=f"check the path given to {flag}")


def _refuse_made_data(argument: str, flag: str) -> None:
    """Refuses the prefix (or a file) of a data set that is made already, and names the file it was made from."""
    prefix = re.sub(r"\.(bin|idx|json)$", "", argument)
    if not all(os.path.isfile(f"{prefix}.{ending}") for ending in ("bin", "idx", "json")):
        return
    path = next((source.get("path") for source in read_meta(prefix).get("sources", ())), None)
    raise DataError("this is a data set made by tools/preprocess_data.py", where=argument,
                    expected=f"the records that it was made from: {_FORMATS}",
                    fix=f"{flag} {shlex.quote(path)}" if path else f"{flag} FILE")


def _resolve_directory(source: int, argument: str, directory: str, flag: str) -> list[_Input]:
    """A data set that `datasets` saved in `directory` (`argument` may name a split), or a directory of data files."""
    if any((Path(directory) / name).is_file() for name in ("state.json", "dataset_dict.json")):
        return [_Input(source, argument, "dataset")]
    files = sorted(Path(argument).iterdir()) if os.path.isdir(argument) else []
    inputs = [_file(source, str(f)) for f in files if f.name.endswith(_ENDINGS)]
    if not inputs:
        below = next((f.name for f in Path(directory).rglob("*") if f.name.endswith(_ENDINGS)), None)
        ending = next((e for e in _ENDINGS if below is not None and below.endswith(e)), None)
        raise DataError("is a directory without data files", where=argument, expected=_FORMATS,
                        fix=f"{flag} {shlex.quote(f'{argument}/**/*{ending}')}" if ending else f"{flag} FILE")
    return inputs


def _file(source: int, path: str) -> _Input:
    return _Input(source, path, "parquet" if path.endswith(".parquet") else "lines")


def _missing_package(item: _Input) -> list[DataError]:
    needed = {"parquet": "pyarrow.parquet", "dataset": "datasets"}.get(item.kind)
    if needed is None and item.path.endswith(".zst"):
        needed = "zstandard"
    if needed is None:
        return []
    try:
        __import__(needed)
    except ImportError:
        name = needed.partition(".")[0]
        return [DataError(f"reading it needs {name}, which is not installed", where=item.path,
                          fix="pip install 'mrlhf[data]'")]
    return []


def open_dataset(argument: str, *, flag: str = "--input") -> Any:
    """The `datasets.Dataset` of DIR[:SPLIT] or ID[@CONFIG][:SPLIT]. Runs no code from it. Raises DataError."""
    import datasets

    name, _, split = argument.partition(":") if not os.path.isdir(argument) else (argument, "", "")
    try:
        if os.path.isdir(name):
            loaded = datasets.load_from_disk(name)
        else:
            hub_id, _, config = name.partition("@")
            loaded = datasets.load_dataset(hub_id, config or None)
    except Exception as error:  # the library and the hub's client have no common base class
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataError(f"no such file, and not a HF dataset that can be loaded: {reason}", where=argument,
                        expected=_FORMATS, fix=f"{flag} FILE") from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    splits = sorted(map(str, loaded))
    if not split and len(splits) == 1:
        split = splits[0]
    if split not in splits:
        meant = f"{name}:{_likely_split(splits, split)}"
        raise DataError(f"has no split '{split}'" if split else "has several splits", where=argument,
                        expected=", ".join(splits), fix=f"{flag} {shlex.quote(meant)}")
    return loaded[split]


def _likely_split(splits: list[str], given: str) -> str:
    """The split that a misspelt name means; `train` where none was given. Any other guess could make wrong data."""
    near = difflib.get_close_matches(given, splits, n=1)
    return near[0] if near else "train" if "train" in splits and not given else "SPLIT"


def _open(path: str) -> IO[bytes]:
    if path.endswith(".gz"):
        return cast(IO[bytes], gzip.open(path, "rb"))
    if path.endswith(".bz2"):
        return cast(IO[bytes], bz2.open(path, "rb"))
    if path.endswith(".zst"):
        return cast(IO[bytes], _Zst(path))
    return open(path, "rb")


class _Zst:
    """Reads a .zst file of one or several frames. (zstandard's own reader takes a cut file for a shorter one.)

    `read` returns at most 8 MiB more than asked for.
    """

    def __init__(self, path: str):
        import zstandard

        self._module = zstandard
        self._file = open(path, "rb")  # noqa: SIM115  closed by __exit__
        self._frame: Any = None
        self._rest = b""

    def read(self, size: int) -> bytes:
        parts: list[bytes] = []
        length = 0
        while length < size:
            data = self._rest or self._file.read(_ZST_BYTES)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a compressed frame")
                break
            self._frame = self._frame or self._module.ZstdDecompressor().decompressobj()
            try:
                parts.append(self._frame.decompress(data))
                length += len(parts[-1])
            except self._module.ZstdError as error:
                raise OSError(str(error)) from error
            self._rest = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        return b"".join(parts)

    def __enter__(self) -> _Zst:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _blank_end(text: str, at: int) -> int:
    """The end of the white space that begins at `at`."""
    match = _BLANK.match(text, at)
    return at if match is None else match.end()


def _long_line(path: str, offset: int) -> DataError:
    return DataError(f"a line is longer than {MAX_LINE >> 20} MiB (near byte {offset:,})", where=path,
                     expected=_FORMATS, fix="one JSON object a line")
