"""`mrlhf data PREFIX`: what a data set holds, samples with the trained part marked, and a check of every byte.

Needs neither torch nor Megatron; transformers only to decode samples.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

import numpy as np

from mrlhf.data import show
from mrlhf.data.indexed import IndexedReader, PackedDataset
from mrlhf.data.megatron_text import is_megatron
from mrlhf.data.tokenizers.vocabulary import load_tokenizer, tokenizer_fingerprint, vocab_size
from mrlhf.errors import DataError, MrlhfError, Problems

_COLOUR = ("\x1b[1;32m", "\x1b[0m")


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
    marks = _COLOUR if sys.stdout.isatty() and "NO_COLOR" not in os.environ else show.BRACKETS
    show_set = _show_megatron_text if is_megatron(args.prefix) else _show_dataset
    show_set(args, marks)
    return 0


def _show_dataset(args: argparse.Namespace, marks: tuple[str, str]) -> None:
    if args.check:
        problems = Problems()
        problems.extend(show.check_dataset(args.prefix))
        problems.raise_if_any()
    data = PackedDataset.open(args.prefix)
    print("\n".join(show.dataset_summary(data)))
    if args.samples:
        for line in show.sample_lines(data, _tokenizer_of(data, args.tokenizer), args.samples, marks):
            print(line)
    if args.check:
        print("nothing wrong was found")


def _tokenizer_of(data: PackedDataset, given: str | None) -> Any | None:
    """The tokenizer in directory `given`, else the one that made the data; None where that is gone or was changed."""
    path = given or data.meta.get("tokenizer")
    try:
        tokenizer = load_tokenizer(str(path))
    except MrlhfError as error:
        if given:
            raise
        print(f"note: its tokenizer cannot be loaded ({error.what}): token ids are shown; --tokenizer DIR decodes them")
        return None
    if tokenizer_fingerprint(tokenizer) == data.meta.get("tokenizer_fingerprint"):
        return tokenizer
    if given:
        raise DataError("this is not the tokenizer that the data was made with", where=str(path),
                        expected=str(data.meta.get("tokenizer")))
    print(f"note: the tokenizer in {path} was changed since the data was made: token ids are shown")
    return None


def _show_megatron_text(args: argparse.Namespace, marks: tuple[str, str]) -> None:
    """Data of Megatron-LM's own preprocessing: it has no metadata, no mask and no checksums."""
    reader = IndexedReader(args.prefix, empty=True)
    starts = reader.starts(reader.doc_index)
    lengths = np.diff(starts)
    full = np.flatnonzero(lengths)
    documents = f"{len(lengths):,} documents ({len(lengths) - len(full):,} empty)"
    print(f"{args.prefix}: Megatron-LM's own text, {documents}, {reader.num_tokens:,} tokens")
    print(f"  {'data type':<22} {reader.dtype.name}")
    print(f"  {'checksums':<22} none: a changed token cannot be found; the index is sound")
    if not len(full):
        return
    print("\n".join(["tokens a document:", *show.length_histogram(lengths[full])]))
    tokenizer = load_tokenizer(args.tokenizer) if args.tokenizer else None
    if args.check:
        show.check_ids(reader, f"{args.prefix}.bin", None if tokenizer is None else vocab_size(tokenizer))
        print("nothing wrong was found")
    for document in full[show.spread_over(len(full), args.samples)].tolist() if args.samples else []:
        ids = reader.span(int(starts[document]), int(starts[document + 1]))
        print(f"--- document {document} ({len(ids):,} tokens)")
        print(show.marked(tokenizer, ids, (np.arange(len(ids)) > 0).astype(np.uint8), marks))
