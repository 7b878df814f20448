from __future__ import annotations

import bz2
import gzip
import io
import json
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mrlhf.data.prepare import sources
from mrlhf.data.prepare.sources import Sources, read_chunks
from mrlhf.errors import DataError, SeveralErrors

ROWS: list[dict[str, Any]] = [
    {"text": f"row {i} é\u2028 " + "x" * (i % 50), "n": i, "list": [{"role": "user", "content": "a]}"}]}
    for i in range(700)
]
LINES = [json.dumps(row, ensure_ascii=bool(row["n"] % 2)) for row in ROWS]
PLAIN = "\n".join(LINES).encode()


def zst(data: bytes) -> bytes:
    import zstandard

    half = len(data) // 2  # two frames, as parallel compressors write them
    return zstandard.ZstdCompressor().compress(data[:half]) + zstandard.ZstdCompressor().compress(data[half:])


def rows_of(*arguments: Any, block_bytes: int | None = None) -> list[tuple[str, int, Any]]:
    """(path, line, record) of all inputs."""
    if block_bytes is None:
        return [
            (c.path, n, c.record(i)) for c in read_chunks(tuple(map(str, arguments))) for i, n in enumerate(c.numbers)
        ]
    found, lines = [], 0
    every = Sources(tuple(map(str, arguments)))
    every.block_bytes = block_bytes
    for block in every.blocks():
        content = block.content()
        for c in block.chunks(content, rows=7):
            found += [(c.path, lines + n, c.record(i)) for i, n in enumerate(c.numbers)]
        lines += block.count(content)
    return found


FORMATS: dict[str, Callable[[], bytes]] = {
    "a.jsonl": lambda: PLAIN,
    "b.jsonl": lambda: b"\xef\xbb\xbf" + PLAIN.replace(b"\n", b"\r\n") + b"\n",
    "c.jsonl.gz": lambda: gzip.compress(PLAIN),
    "d.jsonl.bz2": lambda: bz2.compress(PLAIN),
    "e.jsonl.zst": lambda: zst(PLAIN),
    "f.json": lambda: json.dumps(ROWS).encode(),
    "g.json": lambda: b"\xef\xbb\xbf" + json.dumps(ROWS, indent=2, ensure_ascii=False).encode() + b"\n",
    "h.json.gz": lambda: gzip.compress(json.dumps(ROWS, indent=1).encode()),
    "i.json": lambda: PLAIN,
    "j.txt": lambda: PLAIN,
}


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("block_bytes", [None, 1, 300, 5000])
def test_every_format_gives_the_same_rows(name: str, block_bytes: int | None, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(FORMATS[name]())
    assert rows_of(path, block_bytes=block_bytes) == [(str(path), i + 1, row) for i, row in enumerate(ROWS)]


def test_parquet_and_datasets(tmp_path: Path) -> None:
    import datasets

    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": table, "test": table.select(range(3))}).save_to_disk(str(tmp_path / "two"))
    wanted = [(i + 1, row) for i, row in enumerate(ROWS)]
    for argument in ("x.parquet", "one", "two:train"):
        for block_bytes in (None, 900):
            assert [(n, r) for _, n, r in rows_of(tmp_path / argument, block_bytes=block_bytes)] == wanted
    assert len(rows_of(tmp_path / "two:test")) == 3
    assert Sources((str(tmp_path / "one"),)).inputs[0].kind == "dataset"
    with pytest.raises(DataError, match="has several splits") as caught:
        rows_of(tmp_path / "two")
    assert caught.value.expected == "test, train" and "two:train" in (caught.value.fix or "")
    with pytest.raises(DataError, match="no split 'valid'"):
        rows_of(tmp_path / "two:valid")


def test_a_hub_id_that_cannot_be_had_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    import huggingface_hub

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # no tries over the network, whose time-outs add up
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match="not a HF dataset that can be loaded"):
        rows_of("no-such-owner/no-such-dataset:train")


def test_globs_directories_and_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl.gz"):
        data = json.dumps({"text": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    (tmp_path / "notes.md").write_text("not data")
    names = [r["text"] for _, _, r in rows_of(f"{tmp_path}/*.jsonl*")]
    assert names == ["a.jsonl", "b.jsonl", "c.jsonl.gz"] == [r["text"] for _, _, r in rows_of(tmp_path)]
    both = Sources((f"{tmp_path}/b*", str(tmp_path / "a.jsonl")))
    assert [(i.source, Path(i.path).name) for i in both.inputs] == [(0, "b.jsonl"), (1, "a.jsonl")]
    (tmp_path / "none").mkdir()
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(SeveralErrors) as caught:
        Sources((f"{tmp_path}/*.parquet", f"{tmp_path}/none", f"{tmp_path}/empty.jsonl", f"{tmp_path}/away.jsonl"))
    text = str(caught.value)
    for part in ("no file matches", "directory without data files", "input file is empty", "input file does not exist"):
        assert part in text


def test_standard_input_is_hashed_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    import hashlib

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(PLAIN)))
    piped = Sources(("-",))
    content = b"".join(block.content() for block in piped.blocks())
    assert content == PLAIN
    assert piped.provenance() == [{"path": "-", "bytes": len(PLAIN), "sha256": hashlib.sha256(PLAIN).hexdigest()}]


@pytest.mark.parametrize("name", ["c.jsonl.gz", "d.jsonl.bz2", "e.jsonl.zst", "h.json.gz"])
def test_a_cut_file_is_an_error(name: str, tmp_path: Path) -> None:
    data = FORMATS[name]()
    for size in (len(data) * 2 // 3, len(data) - 3):
        (tmp_path / name).write_bytes(data[:size])
        with pytest.raises(DataError, match="cannot be read"):
            rows_of(tmp_path / name)
    (tmp_path / name).write_bytes(b"not compressed at all")
    with pytest.raises(DataError, match="cannot be read"):
        rows_of(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('[{"a": 1}', "not closed"),
        ('[{"a": 1}, {"a"', "Expecting"),
        ('[{"a": 1},]', "Expecting value"),
        ('[{"a": 1} {"a": 2}]', "',' or"),
        ('[{"a": 1}] tail', "behind the array"),
        ("[1, 2", "not closed"),
        ('["unclosed', "Unterminated"),
    ],
)
def test_broken_arrays(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(DataError, match="not a JSON array") as caught:
        rows_of(tmp_path / "x.json")
    assert what in caught.value.what and "x.json (element" in (caught.value.where or "")


def test_an_endless_line_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    for name, data in (
        ("a.jsonl", b"x" * 5000),
        ("b.jsonl.gz", gzip.compress(b"x" * 5000)),
        ("c.json", b'["' + b"x" * 300_000),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match="a line is longer|not a JSON array"):
            rows_of(tmp_path / name, block_bytes=100)


def test_the_long_line_is_where_the_error_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_LINE", 1000)
    data = b'{"a": 1}\n' * 700 + b"x" * 5000 + b"\n" + b'{"a": 1}\n' * 500
    for name, packed in (("a.jsonl.gz", gzip.compress(data)), ("b.jsonl.bz2", bz2.compress(data))):
        (tmp_path / name).write_bytes(packed)
        for block_bytes in (1, 100, 450):
            with pytest.raises(DataError, match="near byte 6,300"):
                rows_of(tmp_path / name, block_bytes=block_bytes)


@pytest.mark.parametrize(("ending", "blank"), [("gz", b" \r\n"), ("bz2", b"\n"), ("zst", b"\n"), ("zst", b" \r\n")])
def test_a_flood_of_blank_lines_takes_little_memory(ending: str, blank: bytes, tmp_path: Path) -> None:
    """96 MiB of them in a file of some kilobytes, between two records whose line numbers stay right."""
    import zstandard

    lines = (96 << 20) // len(blank)
    pack = {"gz": gzip.compress, "bz2": bz2.compress, "zst": zstandard.ZstdCompressor().compress}[ending]
    path = tmp_path / f"x.jsonl.{ending}"
    path.write_bytes(pack(b'{"a": 1}\n' + blank * lines + b'{"a": 2}\n\n'))
    blocks = []
    tracemalloc.start()
    try:
        blocks = list(Sources((str(path),)).blocks())
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 48 << 20 and sum(len(block.content()) for block in blocks) < 24 << 20
    assert rows_of(path) == [(str(path), 1, {"a": 1}), (str(path), 2 + lines, {"a": 2})]


def test_an_array_between_much_white_space(tmp_path: Path) -> None:
    blank = " \n" * 200_000
    (tmp_path / "x.json").write_text(f"{blank}[{blank}1{blank},{blank}2{blank}]{blank}")
    with open(tmp_path / "x.json") as file:
        assert list(sources._JsonArray("x", io.BytesIO(file.read().encode()))) == ["1", "2"]
    for tail in ("3", "]", "{}"):
        with pytest.raises(DataError, match="behind the array"):
            list(sources._JsonArray("x", io.BytesIO(f"[1]{blank}{tail}".encode())))


def test_a_file_that_changes_meanwhile(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(PLAIN)
    found = Sources((str(path),))
    assert found.provenance()[0]["bytes"] == len(PLAIN)
    path.write_bytes(PLAIN + b"\n{}")
    with pytest.raises(DataError, match="changed while it was read"):
        found.provenance()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(
    values=st.lists(json_values, max_size=8),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    block_bytes=st.integers(1, 80),
)
def test_arrays_of_anything(
    values: list[Any], indent: int | None, ascii_only: bool, block_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "property.json"
    path.write_bytes(json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError:
        return
    found = rows_of(path, block_bytes=block_bytes) if _msgspec_reads(values) else None
    if found is not None:
        assert [n for _, n, _ in found] == list(range(1, len(values) + 1))
        assert json.dumps([r for _, _, r in found]) == json.dumps(values)


def _msgspec_reads(values: list[Any]) -> bool:
    """Rows that the JSON decoder refuses (lone surrogates) are a matter of the rows, not of the array."""
    import msgspec

    try:
        return json.dumps([msgspec.json.decode(json.dumps(v)) for v in values]) == json.dumps(values)
    except msgspec.DecodeError:
        return False
