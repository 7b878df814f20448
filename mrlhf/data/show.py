"""What a data set holds: its summary, samples with the trained part marked, and a check of every byte.

The command `mrlhf data` prints what these functions return. They need neither torch nor Megatron.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mrlhf.data.indexed import IndexedReader, PackedDataset, file_problems, read_meta
from mrlhf.data.writer import OutputSet
from mrlhf.errors import DataError, MrlhfError

_LENGTHS = 1 << 20  # lengths read at once
_TOKENS = 1 << 22  # tokens that a check reads at once
_BARS, _BAR_WIDTH = 12, 40
_MAX_CHARACTERS = 1200  # shown of one part of a sample
BRACKETS = ("[[", "]]")

# ---- summary -------------------------------------------------------------------------------------


def length_histogram(lengths: np.ndarray) -> list[str]:
    """Lines `from-to count bar`; all bars span the same number of tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = np.zeros((high - low) // width + 1, np.int64)
    for at in range(0, len(lengths), _LENGTHS):
        counts += np.bincount((lengths[at : at + _LENGTHS].astype(np.int64) - low) // width, minlength=len(counts))
    digits, wide = len(str(high)), len(f"{counts.max():,}")
    lines = []
    for i, count in enumerate(counts.tolist()):
        first, last = low + i * width, min(low + (i + 1) * width - 1, high)
        bar = "#" * -(-count * _BAR_WIDTH // int(counts.max()))
        lines.append(f"  {first:>{digits}}-{last:<{digits}} {count:>{wide},} {bar}".rstrip())
    return lines


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def dataset_summary(data: PackedDataset) -> list[str]:
    """Metadata, drops by cause, sources, files, and the histogram of the sample lengths."""
    meta, name = data.meta, Path(data.prefix).name
    fields = [(key, _value(value)) for key, value in meta.items() if key not in ("drops", "sources", "files")]
    fields.append(("drops", ", ".join(f"{cause} {n:,}" for cause, n in meta.get("drops", {}).items()) or "none"))
    fields += [("source", _value(source)) for source in meta.get("sources", [])]
    fields += [("file", f"{name}{suffix}, {entry['bytes']:,} bytes") for suffix, entry in meta["files"].items()]
    sizes = f"{data.num_samples:,} samples in {data.num_packs:,} packs, {data.num_tokens:,} tokens"
    return [f"{data.prefix}: {data.task} data, {sizes}", *(f"  {key:<22} {text}" for key, text in fields),
            "tokens a sample:", *length_histogram(data.lengths)]


# ---- samples -------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """`text` with its control characters spelled out, so that data cannot steer the terminal."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in text)


def marked(tokenizer: Any | None, ids: np.ndarray, mask: np.ndarray, marks: tuple[str, str] = BRACKETS) -> str:
    """A sample's text with the trained parts between `marks`; the middle of a long part is left out.

    ids [T], mask [T] (1: trained). Without a tokenizer, token ids stand for the text.
    """
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    parts = []
    for start, end in pairwise(cuts):
        piece = ids[start:end].tolist()
        text = " ".join(map(str, piece)) + " "
        if tokenizer is not None:
            text = printable(tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if (more := len(text) - _MAX_CHARACTERS) > 0:
            half = _MAX_CHARACTERS // 2
            text = f"{text[:half]} ... ({more:,} characters) ... {text[-half:]}"
        parts.append(f"{marks[0]}{text}{marks[1]}" if mask[start] else text)
    return "".join(parts)


def spread_over(total: int, count: int) -> list[int]:
    """At most `count` of the numbers 0 .. total - 1, evenly spread, in order."""
    return np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist()


def sample_lines(data: PackedDataset, tokenizer: Any | None, count: int, marks: tuple[str, str]) -> Iterator[str]:
    """`count` samples (pairs) spread over the set: a header and the marked text of each."""
    names = ("chosen", "rejected") if data.task == "preference" else ("sample",)
    for unit in spread_over(data.num_samples // len(names), count):
        for i, name in enumerate(names, unit * len(names)):
            _, ids, mask = data.sample(i)
            margin = data.margin(unit) if data.task == "preference" else None
            label = data.label(i) if data.task == "prompts" else None
            extra = "" if margin is None else f", margin {margin:g}"
            extra += "" if label is None else f", label {printable(_value(label))}"
            yield f"--- {name} {unit} ({len(ids):,} tokens, {int(mask.sum()):,} trained{extra})"
            yield marked(tokenizer, ids, mask, marks)


# ---- check ---------------------------------------------------------------------------------------

_Rule = tuple[str, str, np.ndarray]  # "sample" or "pack", what is wrong, bool for each of them


def check_dataset(prefix: str) -> list[MrlhfError]:
    """Everything wrong with a set: PREFIX.json, size and SHA-256 of all files, then the indices, then the content."""
    try:
        meta = read_meta(prefix)
    except DataError as error:
        return [error]
    problems: list[MrlhfError] = list(file_problems(prefix, meta, verify=True))
    for path in (prefix + s for s in OutputSet.suffixes if s != ".json" and s not in meta["files"]):
        if Path(path).exists():
            problems.append(DataError("file is not part of the set in PREFIX.json", where=path,
                                      fix="move it to another directory"))
    if problems:
        return problems
    try:
        return [*check_content(PackedDataset.open(prefix))]
    except DataError as error:
        return [error]


def check_content(data: PackedDataset) -> list[DataError]:
    """Everything in ids, masks and counts that a sound set cannot hold. Reads the whole set once, in blocks."""
    trained = 0
    broken_rules: dict[tuple[str, str], list[int]] = {}  # (unit, what is wrong) -> [number of the first, count]
    packs = max(1, _TOKENS * data.num_packs // data.num_tokens)
    for first_pack in range(0, data.num_packs, packs):
        end_pack = min(first_pack + packs, data.num_packs)
        first = {"pack": first_pack, "sample": int(data.doc_index[first_pack])}
        _, mask, _ = data.block(first_pack, end_pack)
        trained += 0 if mask is None else int(mask.sum(dtype=np.int64))
        for unit, what, broken in chain(_id_rules(data, first_pack, end_pack), _mask_rules(data, first_pack, end_pack)):
            if broken.any():
                number = first[unit] + int(np.flatnonzero(broken)[0])
                broken_rules.setdefault((unit, what), [number, 0])[1] += int(broken.sum())
    problems = [DataError(f"{count:,} {unit}s {what}; the first is {unit} {first:,}", where=data.prefix)
                for (unit, what), (first, count) in broken_rules.items()]
    return [*problems, *_wrong_totals(data, trained), *_wrong_siblings(data)]


def _id_rules(data: PackedDataset, first_pack: int, end_pack: int) -> Iterator[_Rule]:
    ids, _, lengths = data.block(first_pack, end_pack)
    vocab_size, seq_length = data.meta["vocab_size"], data.meta["seq_length"]
    ends = np.cumsum(lengths, dtype=np.int64)
    lowest, highest = np.minimum.reduceat(ids, ends - lengths), np.maximum.reduceat(ids, ends - lengths)
    yield "sample", f"with ids outside the vocabulary of {vocab_size:,}", (lowest < 0) | (highest >= vocab_size)
    unit, totals = "sample", lengths
    if data.meta.get("packed"):
        bounds = data.doc_index[first_pack : end_pack + 1] - int(data.doc_index[first_pack])
        unit, totals = "pack", np.diff(np.concatenate([[0], ends])[bounds])
    yield unit, f"longer than seq_length = {seq_length:,}", totals > seq_length


def _mask_rules(data: PackedDataset, first_pack: int, end_pack: int) -> Iterator[_Rule]:
    ids, mask, lengths = data.block(first_pack, end_pack)
    if mask is None:
        return
    ends = np.cumsum(lengths, dtype=np.int64)
    starts = ends - lengths
    sums = np.add.reduceat(mask, starts, dtype=np.int64)
    yield "sample", "with mask values other than 0 and 1", np.maximum.reduceat(mask, starts) > 1
    yield "sample", "with a trained first token, which nothing predicts", mask[starts] != 0
    if data.task == "pretrain":
        yield "sample", "with an untrained token behind the first", sums != lengths - 1
        return
    yield "sample", "with no trained token", sums == 0
    yield "sample", "with an untrained last token", mask[ends - 1] == 0
    end_token = data.meta.get("end_token_id")
    if end_token is not None and not data.meta.get("num_truncated"):
        yield "sample", f"with a last token that is not the end token {end_token}", ids[ends - 1] != end_token


def _wrong_totals(data: PackedDataset, trained: int) -> Iterator[DataError]:
    counted = {"num_tokens": data.num_tokens, "num_trained_tokens": trained, "num_samples": data.num_samples,
               "num_packs": data.num_packs}
    for key, value in counted.items():
        if (stated := data.meta.get(key, value)) != value:
            yield DataError(f"{key} is {value:,}, {data.prefix}.json says {stated:,}", where=data.prefix)


def _wrong_siblings(data: PackedDataset) -> Iterator[DataError]:
    """Problems in the margins and the labels."""
    if data.margins is not None and not np.isfinite(data.margins).all():
        yield DataError("a margin is not a finite number", where=f"{data.prefix}_margin.bin")
    if data.task == "prompts":
        try:
            data.label(0)
        except (DataError, ValueError) as error:
            yield DataError(f"the labels cannot be read: {error}", where=f"{data.prefix}_labels.jsonl")


def check_ids(reader: IndexedReader, where: str, vocab_size: int | None) -> None:
    """Raises DataError for an id that is negative, or not below `vocab_size` where that is known."""
    limit = 1 << 62 if vocab_size is None else vocab_size
    for at in range(0, reader.num_tokens, _TOKENS):
        ids = reader.span(at, at + _TOKENS)
        wrong = np.flatnonzero((ids < 0) | (ids >= limit))
        if len(wrong):
            expected = "0 or more" if vocab_size is None else f"0 to {limit - 1:,}"
            raise DataError(f"id {ids[wrong[0]]} at token {at + int(wrong[0]):,}", where=where, expected=expected)
