"""`mrlhf data PREFIX`: what a data set holds, some of its samples with the trained part marked, and whether it is whole.

Needs neither torch nor Megatron; transformers only to decode samples.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from mrlhf.data.indexed import IndexedReader, PackedDataset, file_problems, read_meta
from mrlhf.data.megatron_text import is_megatron
from mrlhf.data.tokenizers.vocabulary import load_tokenizer, tokenizer_fingerprint, vocab_size
from mrlhf.data.writer import OutputSet
from mrlhf.errors import DataError, MrlhfError, Problems

_CHUNK = 1 << 20  # lengths looked at together
_BLOCK = 1 << 22  # tokens looked at together by the check
_BARS, _WIDTH = 12, 40
_COLOUR, BRACKETS = ("\x1b[1;32m", "\x1b[0m"), ("[[", "]]")
_LIMIT = 1200  # characters shown of a sample

# ---- description ---------------------------------------------------------------------------------------------------------------


def histogram(lengths: np.ndarray) -> list[str]:
    """Lines `from-to count bar`, bars of equal width in tokens."""
    low, high = int(lengths.min()), int(lengths.max())
    width = max(1, -(-(high - low + 1) // _BARS))
    counts = np.zeros((high - low) // width + 1, np.int64)
    for at in range(0, len(lengths), _CHUNK):
        counts += np.bincount((lengths[at : at + _CHUNK].astype(np.int64) - low) // width, minlength=len(counts))
    digits, wide = len(str(high)), len(f"{counts.max():,}")
    lines = []
    for i, count in enumerate(counts.tolist()):
        first, last = low + i * width, min(low + (i + 1) * width - 1, high)
        bar = "#" * -(-count * _WIDTH // int(counts.max()))
        lines.append(f"  {first:>{digits}}-{last:<{digits}} {count:>{wide},} {bar}".rstrip())
    return lines


def _value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def describe(data: PackedDataset) -> list[str]:
    """Metadata, drops by cause, sources, files, and the histogram of the samples' lengths."""
    meta = data.meta
    lines = [f"{data.prefix}: {data.task} data, {data.num_samples:,} samples in {data.num_packs:,} packs, {data.num_tokens:,} tokens"]
    lines += [f"  {key:<22} {_value(value)}" for key, value in meta.items() if key not in ("drops", "sources", "files")]
    causes = ", ".join(f"{cause} {n:,}" for cause, n in meta.get("drops", {}).items())
    lines.append(f"  {'drops':<22} {causes or 'none'}")
    lines += [f"  {'source':<22} {_value(source)}" for source in meta.get("sources", [])]
    lines += [f"  {'file':<22} {Path(data.prefix).name}{suffix}, {digest['bytes']:,} bytes"
              for suffix, digest in meta["files"].items()]
    return [*lines, "tokens a sample:", *histogram(data.lengths)]


# ---- samples -------------------------------------------------------------------------------------------------------------------


def printable(text: str) -> str:
    """Control characters spelled out, so that data cannot steer the terminal."""
    return "".join(c if c in "\n\t" or not (ord(c) < 32 or 127 <= ord(c) < 160) else f"\\x{ord(c):02x}" for c in text)


def marked(tokenizer: Any | None, ids: np.ndarray, mask: np.ndarray, marks: tuple[str, str] = BRACKETS) -> str:
    """The sample with its trained parts between `marks`, its middle left out where it is long; ids where there is no tokenizer."""
    cuts = [0, *(np.flatnonzero(np.diff(mask)) + 1).tolist(), len(ids)]
    parts = []
    for start, end in pairwise(cuts):
        piece = ids[start:end].tolist()
        text = " ".join(map(str, piece)) + " "
        if tokenizer is not None:
            text = printable(tokenizer.decode(piece, skip_special_tokens=False, clean_up_tokenization_spaces=False))
        if len(text) > _LIMIT:
            text = f"{text[: _LIMIT // 2]} ... ({len(text) - _LIMIT:,} characters) ... {text[-(_LIMIT // 2) :]}"
        parts.append(f"{marks[0]}{text}{marks[1]}" if mask[start] else text)
    return "".join(parts)


def show_samples(data: PackedDataset, tokenizer: Any | None, count: int, marks: tuple[str, str]) -> Iterator[str]:
    """`count` samples (pairs) spread over the set."""
    step = 2 if data.task == "preference" else 1
    total = data.num_samples // step
    for unit in np.unique(np.linspace(0, total - 1, min(count, total)).astype(int)).tolist():
        for i, name in zip(range(unit * step, (unit + 1) * step), ("chosen", "rejected") if step == 2 else ("sample",),
                           strict=True):
            _, ids, mask = data.sample(i)
            margin = data.margin(unit) if step == 2 else None
            label = data.label(i) if data.task == "prompts" else None
            extra = f", margin {margin:g}" if margin is not None else f", label {printable(_value(label))}" if label is not None else ""
            yield f"--- {name} {unit} ({len(ids):,} tokens, {int(mask.sum()):,} trained{extra})"
            yield marked(tokenizer, ids, mask, marks)


def _tokenizer(data: PackedDataset, given: str | None) -> Any | None:
    """The one asked for, else the one the data names if it is still there."""
    path = given or data.meta.get("tokenizer")
    try:
        tokenizer = load_tokenizer(str(path))
    except MrlhfError as error:
        if given:
            raise
        print(f"note: its tokenizer cannot be loaded ({error.what}): token ids are shown; --tokenizer DIR decodes them")
        return None
    if tokenizer_fingerprint(tokenizer) != data.meta.get("tokenizer_fingerprint"):
        if given:
            raise DataError("this is not the tokenizer that the data was made with", where=str(path),
                            expected=str(data.meta.get("tokenizer")))
        print(f"note: the tokenizer in {path} was changed since the data was made: token ids are shown")
        return None
    return tokenizer


# ---- check ---------------------------------------------------------------------------------------------------------------------


def _blocks(data: PackedDataset) -> Iterator[tuple[int, int]]:
    """First and end pack of parts of about _BLOCK tokens."""
    packs = max(1, _BLOCK * data.num_packs // data.num_tokens)
    for first in range(0, data.num_packs, packs):
        yield first, min(first + packs, data.num_packs)


def check_content(data: PackedDataset) -> list[DataError]:
    """Everything in ids, masks and counts that a sound set cannot hold. Reads all of it once, in blocks."""
    meta, trained = data.meta, 0
    broken_rules: dict[tuple[str, str], list[int]] = {}  # (unit, rule) -> [number of the first, count]
    packed = bool(meta.get("packed"))
    ends_on = meta.get("end_token_id") if not meta.get("num_truncated") else None

    def rule(unit: str, what: str, broken: np.ndarray, first: int) -> None:
        if broken.any():
            broken_rules.setdefault((unit, what), [first + int(np.flatnonzero(broken)[0]), 0])[1] += int(broken.sum())

    for first_pack, end_pack in _blocks(data):
        ids, mask, lengths = data.block(first_pack, end_pack)
        first = int(data.doc_index[first_pack])
        ends = np.cumsum(lengths, dtype=np.int64)
        starts = ends - lengths
        lowest, highest = np.minimum.reduceat(ids, starts), np.maximum.reduceat(ids, starts)
        rule("sample", f"with ids outside the vocabulary of {meta['vocab_size']:,}",
             (lowest < 0) | (highest >= meta["vocab_size"]), first)
        bounds = data.doc_index[first_pack : end_pack + 1] - first
        totals = np.diff(np.concatenate([[0], ends])[bounds])
        if packed:
            rule("pack", f"longer than seq_length = {meta['seq_length']:,}", totals > meta["seq_length"], first_pack)
        else:
            rule("sample", f"longer than seq_length = {meta['seq_length']:,}", lengths > meta["seq_length"], first)
        if mask is None:
            continue
        sums = np.add.reduceat(mask, starts, dtype=np.int64)
        trained += int(sums.sum())
        rule("sample", "with mask values other than 0 and 1", np.maximum.reduceat(mask, starts) > 1, first)
        rule("sample", "with a trained first token, which nothing predicts", mask[starts] != 0, first)
        if data.task == "pretrain":
            rule("sample", "with an untrained token behind the first", sums != lengths - 1, first)
        else:
            rule("sample", "with no trained token", sums == 0, first)
            rule("sample", "with an untrained last token", mask[ends - 1] == 0, first)
            if ends_on is not None:
                rule(
                    "sample", f"with a last token that is not the end token {ends_on}", ids[ends - 1] != ends_on, first
                )
    found = [
        DataError(f"{count:,} {unit}s {what}; the first is {unit} {first:,}", where=data.prefix)
        for (unit, what), (first, count) in broken_rules.items()
    ]
    counted = {"num_tokens": data.num_tokens, "num_trained_tokens": trained, "num_samples": data.num_samples,
               "num_packs": data.num_packs}
    for key, value in counted.items():
        if meta.get(key, value) != value:
            found.append(DataError(f"{key} is {value:,}, {data.prefix}.json says {meta[key]:,}", where=data.prefix))
    if data.margins is not None and not np.isfinite(data.margins).all():
        found.append(DataError("a margin is not a finite number", where=f"{data.prefix}_margin.bin"))
    if data.task == "prompts":
        try:
            data.label(0)
        except (DataError, ValueError) as error:
            found.append(DataError(f"the labels cannot be read: {error}", where=f"{data.prefix}_labels.jsonl"))
    return found


def check(prefix: str) -> list[MrlhfError]:
    """Everything that is wrong with a set: PREFIX.json, sizes and SHA-256 of all files, then indices, then content."""
    try:
        meta = read_meta(prefix)
    except DataError as error:
        return [error]
    found: list[MrlhfError] = list(file_problems(prefix, meta, verify=True))
    strange = [s for s in OutputSet.suffixes if s != ".json" and s not in meta["files"] and Path(prefix + s).exists()]
    found += [DataError("file is not part of the set in PREFIX.json", where=prefix + s, fix="remove it")
              for s in strange]
    if found:
        return found
    try:
        return [*check_content(PackedDataset.open(prefix))]
    except DataError as error:
        return [error]


# ---- Megatron-LM's own text ----------------------------------------------------------------------------------------------------


def _megatron(prefix: str, args: argparse.Namespace, marks: tuple[str, str]) -> None:
    reader = IndexedReader(prefix, empty=True)
    starts = reader.starts(reader.doc_index)
    lengths = np.diff(starts)
    full = np.flatnonzero(lengths)
    print(
        f"{prefix}: Megatron-LM's own text, {len(lengths):,} documents ({len(lengths) - len(full):,} empty), {reader.num_tokens:,} tokens"
    )
    print(f"  {'data type':<22} {reader.dtype.name}")
    print(f"  {'checksums':<22} none: a changed token cannot be found; the index is sound")
    if not len(full):
        return
    print("tokens a document:")
    for line in histogram(lengths[full]):
        print(line)
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.check:
        most = vocab_size(tokenizer) if tokenizer is not None else 1 << 62
        for at in range(0, reader.num_tokens, _BLOCK):
            ids = reader.span(at, at + _BLOCK)
            wrong = np.flatnonzero((ids < 0) | (ids >= most))
            if len(wrong):
                expected = f"0 to {most - 1:,}" if tokenizer is not None else "0 or more"
                raise DataError(f"id {ids[wrong[0]]} at token {at + int(wrong[0]):,}", where=f"{prefix}.bin",
                                expected=expected)
        print("nothing wrong was found")
    for d in full[np.unique(np.linspace(0, len(full) - 1, min(args.samples, len(full))).astype(int))].tolist() if args.samples else []:
        ids = reader.span(int(starts[d]), int(starts[d + 1]))
        print(f"--- document {d} ({len(ids):,} tokens)")
        print(marked(tokenizer, ids, (np.arange(len(ids)) > 0).astype(np.uint8), marks))


# ---- the command ---------------------------------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Exit status 0, or a raised MrlhfError (2)."""
    parser = argparse.ArgumentParser(prog="mrlhf data", description="What a data set holds, and whether it is whole.")
    parser.add_argument("prefix", metavar="PREFIX",
                        help="as given to tools/preprocess_data.py, or a Megatron-LM ..._text_document")
    parser.add_argument("--samples", type=int, default=0, metavar="N",
                        help="show N samples (pairs, documents) spread over the set")
    parser.add_argument("--check", action="store_true",
                        help="read every byte: checksums, indices, masks, ids, counts; status 2 if wrong")
    parser.add_argument("--tokenizer", metavar="DIR",
                        help="decode with this tokenizer (default: the one that made the data)")
    args = parser.parse_args(argv)
    if args.samples < 0:
        parser.error(f"--samples {args.samples}: 0 or more")
    try:
        _show(args, _COLOUR if sys.stdout.isatty() and "NO_COLOR" not in os.environ else BRACKETS)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has seen enough; what is still buffered goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _show(args: argparse.Namespace, marks: tuple[str, str]) -> None:
    if is_megatron(args.prefix):
        return _megatron(args.prefix, args, marks)
    if args.check:
        problems = Problems()
        problems.extend(check(args.prefix))
        problems.raise_if_any()
    data = PackedDataset.open(args.prefix)
    for line in describe(data):
        print(line)
    if args.samples:
        for line in show_samples(data, _tokenizer(data, args.tokenizer), args.samples, marks):
            print(line)
    if args.check:
        print("nothing wrong was found")
