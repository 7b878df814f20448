"""Raw files -> tokenised, masked, packed datasets. What tools/preprocess_data.py runs.

    read rows -> normalise (formats) -> render and tokenise (template) -> fit to --seq-length -> pack -> shuffle packs -> write (indexed)

Rows go to the workers in chunks and come back in order, so the output does not depend on how many there are. Every row ends as
samples, as a counted drop, or as a problem; if there is any problem, all of them are shown together and nothing is written.
Memory: 20 bytes a sample; tokens wait in a temporary file beside the output until the packs are known.
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from mrlhf import __version__
from mrlhf.config import REQUIRED, option
from mrlhf.data.formats import Columns
from mrlhf.data.indexed import FORMAT_VERSION, OutputSet, PackedDataset, token_dtype
from mrlhf.data.pack import pack
from mrlhf.data.ready_made import TEMPLATE_NAMES, ready_made
from mrlhf.data.sources import Chunk, check_files, describe, read_chunks
from mrlhf.data.template import Template, load_tokenizer, show_trained, tokenizer_fingerprint, vocab_size
from mrlhf.data.tokenise import Batch, Problem, Tokenise
from mrlhf.errors import ConfigError, DataError, EnvironmentProblem, MrlhfError, Problems


@dataclass(frozen=True)
class PreprocessConfig:
    task: Literal["pretrain", "sft", "preference", "prompts"] = option(
        REQUIRED, "what the data is for (rm and dpo: preference, ppo: prompts)"
    )
    input: tuple[str, ...] = option(REQUIRED, "JSON lines (.jsonl, .jsonl.gz), JSON arrays or parquet files")
    tokenizer: str = option(REQUIRED, "directory (or hub id) of the HF tokenizer")
    output_prefix: str = option(REQUIRED, "the files written are PREFIX.bin, PREFIX.idx, ..., PREFIX.json")
    seq_length: int = option(REQUIRED, "most tokens in a pack, and so in a sample; prompts: in a prompt")
    pack: bool = option(True, "several samples a pack; otherwise one sample (one pair) a pack")
    workers: int = option(1, "processes that tokenise; the output does not depend on it")
    loss_on: Literal["last", "all"] = option("last", "train the assistant's last turn, or every one")
    truncate: Literal["error", "drop", "left", "right"] | None = option(
        None,
        "too long: stop, drop, keep the tail (left) or the head (right). Default: drop; pretrain: right, which splits and loses nothing",
    )
    on_empty: Literal["error", "drop"] = option("error", "rows with an empty text or turn: stop, or drop and count")
    chat_template: str | None = option(
        None, f"instead of the tokenizer's: a file with a Jinja chat template, or one of {', '.join(TEMPLATE_NAMES)}"
    )
    input_template: str | None = option(None, 'plain text with {} for the prompt instead of a chat template, like "User: {}\\nAssistant: "')
    input_key: str | None = option(None, "column of the input (default: input; stands for the main column of any task)")
    output_key: str | None = option(None, "column of the answer (default: output)")
    prompt_key: str | None = option(None, "column of the prompt (default: prompt)")
    chosen_key: str | None = option(None, "column of the better answer (default: chosen)")
    rejected_key: str | None = option(None, "column of the worse answer (default: rejected)")
    label_key: str | None = option(None, "column handed to the reward function with a prompt (default: label)")
    margin_key: str | None = option(None, "column of a pair's margin (default: margin)")
    text_key: str | None = option(None, "column of a pretraining text (default: text)")
    messages_key: str | None = option(None, "column of a conversation (default: messages)")
    append_eos: bool = option(True, "end texts, and chats whose template has no end token, with the tokenizer's eos")
    seed: int = option(1, "order of the packs")
    overwrite: bool = option(False, "replace existing output")
    tools_key: str | None = option(None, "column of the tools a conversation may call (default: tools)")
    tokenizer_backend: Literal["auto", "hf", "gigatoken"] = option(
        "auto", "what encodes: gigatoken where it gives the tokenizer's own ids on a sample of the input, else hf"
    )
    verify_tokens: int = option(2000, "texts of the input on which gigatoken must agree with hf before it is used; 0: none")
    parse_special_in_text: bool = option(False, "read special tokens in the texts as special tokens instead of as text (prompt injection)")

    @property
    def columns(self) -> Columns:
        return Columns(**{f.name: getattr(self, f"{f.name}_key") for f in fields(Columns)})

    @property
    def how_to_truncate(self) -> str:
        return self.truncate or ("right" if self.task == "pretrain" else "drop")


def check(config: PreprocessConfig) -> list[MrlhfError]:
    """Everything wrong that can be seen without reading the data."""
    found: list[MrlhfError] = list(check_files(config.input))
    if not config.input:
        found.append(ConfigError("no input files", fix="--input FILE"))
    if config.seq_length < 2:
        found.append(ConfigError(f"--seq-length {config.seq_length}", expected="2 or more: a token is trained given the ones before it"))
    if config.workers < 1:
        found.append(ConfigError(f"--workers {config.workers}", expected="1 or more"))
    if config.task == "prompts" and config.truncate == "right":
        found.append(
            ConfigError("--truncate right would cut off the end of a prompt, where the answer begins", expected="error, drop or left")
        )
    if config.chat_template is not None and config.input_template is not None:
        found.append(ConfigError("--chat-template and --input-template exclude each other", fix="leave one out"))
    if config.chat_template is not None and config.chat_template not in TEMPLATE_NAMES and not Path(config.chat_template).is_file():
        names = ", ".join(TEMPLATE_NAMES)
        found.append(
            DataError("file does not exist", where=config.chat_template, expected=f"a Jinja file, or one of {names}", fix="--chat-template FILE")
        )
    if config.verify_tokens < 0:
        found.append(ConfigError(f"--verify-tokens {config.verify_tokens}", expected="0 or more"))
    if not config.overwrite:
        try:
            OutputSet.refuse_existing(Path(config.output_prefix))
        except DataError as error:
            found.append(error)
    return found


def preprocess(config: PreprocessConfig, *, report: Callable[[str], None] | None = None) -> dict[str, Any]:
    """Make the dataset and return its metadata (the content of PREFIX.json). `report` receives a summary for people.

    Raises ConfigError/DataError (several at once as SeveralErrors) and then leaves no output behind.
    """
    problems = Problems()
    for error in check(config):
        problems.add(error)
    try:
        template = _template(config)
    except MrlhfError as error:
        problems.add(error)
    problems.raise_if_any()

    with OutputSet(config.output_prefix, overwrite=config.overwrite) as output:
        spool = _Spool(output, token_dtype(vocab_size(template.tokenizer)), has_mask=config.task != "prompts")
        try:
            for batch in _batches(config, _tokenise(config, template)):
                spool.add(batch)
            spool.finish(config)
            meta = output.commit(_write(config, template, spool, output))
        finally:
            spool.close()
    if report is not None:
        report(summary(config.output_prefix, template.tokenizer))
    return meta


def _tokenise(config: PreprocessConfig, template: Template) -> Tokenise:
    return Tokenise(
        template,
        task=config.task,
        seq_length=config.seq_length,
        truncate=config.how_to_truncate,
        on_empty=config.on_empty,
        columns=config.columns,
        pair_in_one_pack=config.pack,
    )


def _template(config: PreprocessConfig) -> Template:
    tokenizer = load_tokenizer(config.tokenizer)
    if config.task == "pretrain":
        return Template(tokenizer, input_template="{}", append_eos=config.append_eos, parse_special=config.parse_special_in_text)
    chat_template = None
    if config.chat_template in TEMPLATE_NAMES:
        chat_template = ready_made(config.chat_template, tokenizer)
    elif config.chat_template is not None and Path(config.chat_template).is_file():
        chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return Template(
        tokenizer,
        chat_template=chat_template,
        input_template=config.input_template,
        loss_on=config.loss_on,
        append_eos=config.append_eos,
        parse_special=config.parse_special_in_text,
    )


_worker: Tokenise


def _start_worker(tokenise: Tokenise) -> None:
    global _worker
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread a process; also silences the warning about forking
    _worker = tokenise


def _work(chunk: Chunk) -> Batch:
    return _worker(chunk)


def _batches(config: PreprocessConfig, tokenise: Tokenise) -> Iterator[Batch]:
    """Batches in the order of the rows; a few chunks a worker in flight, so that memory stays bounded."""
    bar = tqdm(desc="tokenise", unit=" rows", disable=None)
    chunks = read_chunks(config.input)
    if config.workers == 1:
        for chunk in chunks:
            batch = tokenise(chunk)
            bar.update(batch.rows)
            yield batch
        bar.close()
        return
    # fork shares the loaded tokenizer; elsewhere it is pickled once a worker
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(config.workers, mp_context=context, initializer=_start_worker, initargs=(tokenise,)) as pool:
            pending: deque[Future[Batch]] = deque()
            for chunk in chunks:
                pending.append(pool.submit(_work, chunk))
                if len(pending) >= 4 * config.workers:
                    batch = pending.popleft().result()
                    bar.update(batch.rows)
                    yield batch
            while pending:
                batch = pending.popleft().result()
                bar.update(batch.rows)
                yield batch
    except BrokenProcessPool as error:
        raise EnvironmentProblem(
            "a worker process died, most likely for want of memory", fix=f"fewer than --workers {config.workers}"
        ) from error
    finally:
        bar.close()


class _Spool:
    """Samples in the order of the rows, in temporary files, with their counts; what the packs are gathered from."""

    def __init__(self, output: OutputSet, dtype: np.dtype, *, has_mask: bool):
        self.dtype = dtype
        self._paths = {"ids": output.temporary(".spool_ids")} | ({"mask": output.temporary(".spool_mask")} if has_mask else {})
        self._files = {name: open(path, "wb", buffering=1 << 20) for name, path in self._paths.items()}  # noqa: SIM115
        self._lengths: list[np.ndarray] = []
        self.rows = self.kept = self.truncated = self.trained = 0
        self.drops: Counter[str] = Counter()
        self.margins: list[float | None] = []
        self.labels: list[bytes] = []
        self._kinds: dict[str, list[Problem]] = {}
        self._counts: Counter[str] = Counter()

    def add(self, batch: Batch) -> None:
        self.rows += batch.rows
        for problem in batch.problems:
            self._counts[problem.kind] += 1
            if self._counts[problem.kind] <= 3:
                self._kinds.setdefault(problem.kind, []).append(problem)
        if self._counts or not batch.rows:
            return  # nothing will be written; only count on
        self.kept += batch.kept
        self.truncated += batch.truncated
        self.drops += batch.drops
        self.margins += batch.margins
        self.labels += batch.labels
        if batch.ids:
            self._lengths.append(np.asarray([len(ids) for ids in batch.ids], dtype=np.int32))
            self._files["ids"].write(np.concatenate(batch.ids).astype(self.dtype).tobytes())
        if batch.masks:
            mask = np.concatenate(batch.masks)
            self.trained += int(mask.sum())
            self._files["mask"].write(mask.tobytes())

    def finish(self, config: PreprocessConfig) -> None:
        """Raise for everything that was wrong with the rows, all kinds at once."""
        problems = Problems()
        for kind, first in self._kinds.items():
            head, count = first[0], self._counts[kind]
            shown = ", ".join(str(p.line) if p.path == head.path else f"{p.path}:{p.line}" for p in first)
            tally = f"({count:,} of {self.rows:,} rows have this problem; first: {shown})"
            problems.add(
                DataError(
                    head.what, where=f"{head.path}:{head.line}", expected=head.expected, fix=f"{head.fix or 'mend the data'}     {tally}"
                )
            )
        with_margin = sum(m is not None for m in self.margins)
        if not problems.errors and 0 < with_margin < len(self.margins):
            what = f"{with_margin:,} of {len(self.margins):,} pairs have a margin and the others have none"
            problems.add(DataError(what, where=config.input[0], expected="a margin in every row or in none", fix="--margin-key COLUMN"))
        if not problems.errors and not self.kept:
            causes = ", ".join(f"{cause} {n:,}" for cause, n in sorted(self.drops.items())) or "no rows"
            fix = "a larger --seq-length" if self.drops["too_long"] or self.drops["answer_too_long"] else "check --input"
            problems.add(DataError(f"nothing is left of {self.rows:,} rows ({causes})", where=config.input[0], fix=fix))
        problems.raise_if_any()
        self.close()
        self.lengths = np.concatenate(self._lengths)
        self.starts = np.concatenate([[0], np.cumsum(self.lengths, dtype=np.int64)])
        self.ids = np.memmap(self._paths["ids"], dtype=self.dtype, mode="r")
        self.masks = np.memmap(self._paths["mask"], dtype=np.uint8, mode="r") if "mask" in self._paths else None

    def close(self) -> None:
        for file in self._files.values():
            file.close()


def _write(config: PreprocessConfig, template: Template, spool: _Spool, output: OutputSet) -> dict[str, Any]:
    """Pack, shuffle and write; returns the metadata."""
    each = 2 if config.task == "preference" else 1  # samples that must stay together
    units = spool.lengths.reshape(-1, each).sum(axis=1, dtype=np.int64)
    packed = config.pack and config.task != "prompts"
    if packed:
        packs = pack(units, capacity=config.seq_length)
        packs = [packs[i] for i in np.random.default_rng(config.seed).permutation(len(packs))]
    else:
        packs = [[unit] for unit in range(len(units))]

    masks = spool.masks
    ids_out = output.indexed("", spool.dtype)
    mask_out = output.indexed("_loss_mask", np.dtype("uint8")) if masks is not None else None
    has_margins = bool(spool.margins) and spool.margins[0] is not None
    margin_out = output.indexed("_margin", np.dtype("float32")) if has_margins else None
    for members in tqdm(packs, desc="write", unit=" packs", disable=None):
        lengths = np.concatenate([spool.lengths[each * u : each * (u + 1)] for u in members])
        spans = [slice(spool.starts[each * u], spool.starts[each * (u + 1)]) for u in members]
        ids_out.add_document(np.concatenate([spool.ids[s] for s in spans]), lengths)
        if mask_out is not None and masks is not None:
            mask_out.add_document(np.concatenate([masks[s] for s in spans]), lengths)
        if margin_out is not None:
            margin_out.add_document(np.asarray([spool.margins[u] for u in members], dtype=np.float32), [1] * len(members))
    if any(label != b"null" for label in spool.labels):
        output.write("_labels.jsonl", b"".join(label + b"\n" for label in spool.labels))

    total = int(spool.lengths.sum(dtype=np.int64))
    tokenizer = template.tokenizer
    return {
        "format": FORMAT_VERSION,
        "version": f"mrlhf {__version__}",
        "task": config.task,
        "seq_length": config.seq_length,
        "packed": packed,
        "num_rows": spool.rows,
        "num_kept": spool.kept,
        "num_samples": len(spool.lengths),
        "num_packs": len(packs),
        "num_pairs": len(units) if each == 2 else None,
        "drops": dict(sorted(spool.drops.items())),
        "num_truncated": spool.truncated,
        "num_tokens": total,
        "num_trained_tokens": spool.trained,
        "trained_share": round(spool.trained / total, 6),
        "fill_rate": round(total / (len(packs) * config.seq_length), 6),
        "lengths": _percentiles(spool.lengths),
        "pack_lengths_max": max(int(units[members].sum()) for members in packs),
        "samples_per_pack": round(len(spool.lengths) / len(packs), 3),
        "tokenizer": config.tokenizer,
        "tokenizer_fingerprint": tokenizer_fingerprint(tokenizer),
        "vocab_size": vocab_size(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "end_token": template.end_token,
        "end_token_id": template.end_token_id,
        "chat_template_sha256": None if template.chat_template is None else hashlib.sha256(template.chat_template.encode()).hexdigest(),
        "input_template": config.input_template,
        "loss_on": config.loss_on if config.task in ("sft", "preference") else None,
        "truncate": config.how_to_truncate,
        "append_eos": config.append_eos,
        "seed": config.seed,
        "sources": describe(config.input),
    }


def _percentiles(lengths: np.ndarray) -> dict[str, float]:
    points = (5, 25, 50, 75, 90, 95, 99)
    values = np.percentile(lengths, points, method="inverted_cdf")
    found = {f"p{p}": int(v) for p, v in zip(points, values, strict=True)}
    return {"min": int(lengths.min()), **found, "max": int(lengths.max()), "mean": round(float(lengths.mean()), 2)}


def summary(prefix: str, tokenizer: Any) -> str:
    """What was written, read back from the disk: counts, drops by cause, and the first sample with its trained part in [[brackets]]."""
    data = PackedDataset.open(prefix)
    meta = data.meta
    dropped = sum(meta["drops"].values())
    causes = ", ".join(f"{cause} {n:,}" for cause, n in meta["drops"].items())
    lengths = meta["lengths"]
    lines = [
        f"{meta['task']} data written to {prefix}.json and {len(meta['files'])} files",
        f"  rows     {meta['num_rows']:,} read, {meta['num_kept']:,} kept, {dropped:,} dropped" + (f" ({causes})" if causes else ""),
        f"  samples  {meta['num_samples']:,} in {meta['num_packs']:,} packs of at most {meta['seq_length']:,} tokens, "
        f"fill rate {meta['fill_rate']:.2%}",
        f"  tokens   {meta['num_tokens']:,}, of them trained {meta['num_trained_tokens']:,} ({meta['trained_share']:.1%})",
        f"  lengths  min {lengths['min']}, median {lengths['p50']}, p95 {lengths['p95']}, max {lengths['max']}, mean {lengths['mean']}",
    ]
    if meta["num_truncated"]:
        lines.append(
            f"  cut      {meta['num_truncated']:,} rows were longer than {meta['seq_length']:,} tokens (--truncate {meta['truncate']})"
        )
    lines.append("first sample:")
    for i in range(2 if meta["task"] == "preference" else 1):
        lines.append(show_trained(tokenizer, data.tokens(i), data.mask(i) if data.has_mask else None))
    return "\n".join(lines)
