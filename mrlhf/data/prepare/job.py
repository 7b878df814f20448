"""The preprocessing job of tools/preprocess_data.py: raw files -> tokenised, masked, packed data sets.

    blocks of rows (sources)
        -> workers: parse, normalise (formats), render and tokenise (template), fit to --seq-length (tokenise)
        -> one shard a block (shards) -> rows that stay, and their split (select) -> packs in windows (assemble)
        -> files (writer)

Blocks come back in order, and the result does not depend on the number of workers. Every row ends as samples, as a
counted drop, or as a problem; with any problem, all of them are shown together and nothing is written. Until a rename
makes the output appear, everything lies in a work directory beside it, from which --resume continues.
Memory: a block a worker, and a window of tokens (assemble). --dedup, --limits and --weights add 3 bytes a row.
Disk: the work directory takes about as much as the output.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from tqdm import tqdm

from mrlhf import __version__
from mrlhf.data.indexed import FORMAT_VERSION, PackedDataset, token_dtype
from mrlhf.data.prepare.assemble import Assembler, merged
from mrlhf.data.prepare.options import PreprocessConfig, check_options
from mrlhf.data.prepare.ready_made import TEMPLATE_NAMES, ready_made
from mrlhf.data.prepare.select import first_of_each, split_of, within_limits
from mrlhf.data.prepare.shards import WorkDirectory, load_shard, read_shard
from mrlhf.data.prepare.sources import RowBlock, Sources
from mrlhf.data.prepare.template import Template, load_tokenizer, tokenizer_fingerprint, vocab_size
from mrlhf.data.prepare.tokenise import SHOWN, RowFault, Tokenise, fault_error
from mrlhf.data.prepare.workers import Work, run_workers, usable_cores
from mrlhf.data.show import marked
from mrlhf.data.tokenizers.encoder import MOST_CHARACTERS, choose_encoder
from mrlhf.data.writer import OutputSet
from mrlhf.errors import DataError, EnvironmentProblem, MrlhfError, Problems, SeveralErrors

_ROWS_AFTER_PROBLEM = 100_000  # read in search of further problems before the command stops
_PROBED_BYTES = 64 << 20  # of the input, most, read and kept in search of texts to compare backends on


def preprocess(config: PreprocessConfig, *, report: Callable[[str], None] | None = None) -> dict[str, dict[str, Any]]:
    """Make the data set of every split; returns {prefix: content of PREFIX.json}. `report` receives a summary of each.

    Raises ConfigError/DataError (several at once as SeveralErrors) and then leaves no output behind.
    """
    sources, template = _open_inputs(config)
    fingerprint = tokenizer_fingerprint(template.tokenizer)
    job = _job(config, sources, template, fingerprint)
    metas = _finished(config, job) if config.resume else None
    if metas is None:
        try:
            metas = _make(config, sources, template, fingerprint, job)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            what = f"the disk is full ({error.strerror}): the work directory and the output need about 12 bytes a token"
            raise EnvironmentProblem(what, where=str(Path(config.output_prefix).parent),
                                     fix="make room, then the same command with --resume") from error
    if report is not None:
        for prefix in metas:
            report(summary(prefix, template.tokenizer))
    return metas


def _open_inputs(config: PreprocessConfig) -> tuple[Sources, Template]:
    """The inputs and the template. Raises all problems of options, inputs and tokenizer at once."""
    problems = Problems()
    problems.extend(check_options(config))
    opened: list[Any] = []
    for open_part in (lambda: Sources(config.input), lambda: _template(config)):
        try:
            opened.append(open_part())
        except MrlhfError as error:
            problems.add(error)
    problems.raise_if_any()
    sources, template = opened
    outputs = {os.path.realpath(f"{prefix}{s}") for prefix in config.prefixes for s in OutputSet.suffixes}
    for path in (item.path for item in sources.inputs if os.path.realpath(item.path) in outputs):
        problems.add(DataError("this input would be replaced by the output", where=path, fix="another --output-prefix"))
    problems.raise_if_any()
    return sources, template


def _make(
    config: PreprocessConfig, sources: Sources, template: Template, fingerprint: str, job: str
) -> dict[str, dict[str, Any]]:
    """Tokenise and write everything; {prefix: metadata}."""
    prefix, resume, overwrite = Path(config.output_prefix), config.resume, config.overwrite
    with WorkDirectory(prefix, job=job, resume=resume, discard=overwrite) as work:
        if resume and not overwrite and not work.shards_found:
            for output in config.prefixes:
                OutputSet.refuse_existing(Path(output))
        try:
            heads, backend = _tokenise(config, sources, template, work)
            _raise_problems(config, heads)
            made = {"tokenizer_fingerprint": fingerprint, "tokenizer_backend": backend, "job": job,
                    "sources": sources.provenance()}
        except (DataError, SeveralErrors):  # mended data gives other blocks, so these shards are of no more use
            work.finish()
            raise
        metas = _assemble(config, template, heads, work, made)
        work.finish()
    return metas


def _template(config: PreprocessConfig) -> Template:
    tokenizer = load_tokenizer(config.tokenizer)
    if config.task == "pretrain":
        return Template(tokenizer, input_template="{}", append_eos=config.append_eos,
                        parse_special=config.parse_special_in_text)
    chat_template = None
    if config.chat_template in TEMPLATE_NAMES:
        chat_template = ready_made(config.chat_template, tokenizer)
    elif config.chat_template is not None and Path(config.chat_template).is_file():
        chat_template = Path(config.chat_template).read_text(encoding="utf-8")
    return Template(tokenizer, chat_template=chat_template, input_template=config.input_template,
                    loss_on=config.loss_on, append_eos=config.append_eos, parse_special=config.parse_special_in_text)


def _job(config: PreprocessConfig, sources: Sources, template: Template, fingerprint: str) -> str:
    """Hash of all that decides the output, the content of the inputs apart (their blocks have digests of their own)."""
    options = {k: v for k, v in asdict(config).items() if k not in ("output_prefix", "workers", "resume", "overwrite")}
    inputs = [(item.path, item.before and item.before[0]) for item in sources.inputs]
    parts = [options, inputs, fingerprint, template.chat_template, __version__, version("tokenizers")]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _finished(config: PreprocessConfig, job: str) -> dict[str, dict[str, Any]] | None:
    """The metadata of a finished output of this job, else None. Raises DataError where another job took the prefix."""
    metas = {}
    for prefix in config.prefixes:
        if Path(f"{prefix}.json").is_file():
            metas[prefix] = PackedDataset.open(prefix).meta
            if metas[prefix].get("job") != job and not config.overwrite:
                OutputSet.refuse_existing(Path(prefix))
    whole = len(metas) == len(config.prefixes) and all(meta.get("job") == job for meta in metas.values())
    return metas if whole else None


def _tokenise(
    config: PreprocessConfig, sources: Sources, template: Template, directory: WorkDirectory
) -> tuple[list[dict[str, Any]], str]:
    """The heads of all shards in order (`first_line`: lines of the file before it), and the note on the backend."""
    tokenise = Tokenise(template, task=config.task, seq_length=config.seq_length, truncate=config.how_to_truncate,
                        on_empty=config.on_empty, columns=config.columns, pair_in_one_pack=config.pack,
                        on_bad=config.on_bad_row, identify=config.dedup or config.split is not None)
    blocks = sources.blocks()
    first, note = _choose_backend(config, tokenise, blocks)
    work = Work(tokenise, directory, token_dtype(vocab_size(template.tokenizer)))
    heads: list[dict[str, Any]] = []
    lines: Counter[tuple[int, str]] = Counter()
    rows_left: float = float("inf")
    with tqdm(desc="tokenise", unit=" rows", disable=None) as bar:
        for head in run_workers(work, chain(first, blocks), workers=config.workers or usable_cores()):
            where = (head["source"], head["path"])
            heads.append({**head, "first_line": lines[where]})
            lines[where] += head["lines"]
            bar.update(head["rows"])
            if head["problem_counts"]:
                rows_left = min(rows_left, _ROWS_AFTER_PROBLEM)
            rows_left -= head["rows"]
            if rows_left <= 0:
                break
    return heads, note


def _choose_backend(
    config: PreprocessConfig, tokenise: Tokenise, blocks: Iterator[RowBlock]
) -> tuple[list[RowBlock], str]:
    """Set the template's encoder after comparing gigatoken with HF on the first rows of the input.

    Returns the blocks read for it, and a line that says why the encoder was chosen.
    """
    read: list[RowBlock] = []
    texts: list[str] = []
    characters = size = 0
    while (config.tokenizer_backend != "hf" and len(texts) < config.verify_tokens and characters < MOST_CHARACTERS
           and size < _PROBED_BYTES):
        block = next(blocks, None)
        if block is None:
            break
        read.append(block)
        content = block.content()
        size += len(content)
        for chunk in block.chunks(content):
            new = tokenise.texts(chunk)
            texts += new
            characters += sum(map(len, new))
    template = tokenise.template
    template.encoder, note = choose_encoder(template.tokenizer, config.tokenizer_backend, texts,
                                            verify=config.verify_tokens, masks=config.task != "pretrain")
    return read, note


def _raise_problems(config: PreprocessConfig, heads: list[dict[str, Any]]) -> None:
    """Raise everything wrong with the rows, all kinds at once."""
    rows, kept = sum(head["rows"] for head in heads), sum(head["kept"] for head in heads)
    problems = Problems()
    problems.extend(_row_errors(heads, rows))
    with_margin = sum(head["with_margin"] for head in heads)
    if not problems.errors and config.task == "preference" and 0 < with_margin < kept:
        what = f"{with_margin:,} of {kept:,} pairs have a margin and the others have none"
        problems.add(DataError(what, where=config.input[0], expected="a margin in every row or in none",
                               fix="give the other pairs a margin too, or remove the column"))
    if not problems.errors and not kept:
        drops = merged([head["drops"] for head in heads])
        causes = ", ".join(f"{cause} {n:,}" for cause, n in drops.items()) or "no rows"
        fix = "a larger --seq-length" if drops.get("too_long") or drops.get("answer_too_long") else "check --input"
        problems.add(DataError(f"nothing is left of {rows:,} rows ({causes})", where=config.input[0], fix=fix))
    problems.raise_if_any()


def _row_errors(heads: list[dict[str, Any]], rows: int) -> list[DataError]:
    """One error for each kind of problem, with its first lines and how many of the `rows` have it."""
    counts: Counter[str] = Counter()
    first: dict[str, list[RowFault]] = {}
    for head in heads:
        counts.update(head["problem_counts"])
        for fields in head["problems"]:
            problem = RowFault(**{**fields, "line": fields["line"] + head["first_line"]})
            if len(first.setdefault(problem.kind, [])) < SHOWN:
                first[problem.kind].append(problem)
    return [fault_error(examples, count=counts[kind], rows=rows) for kind, examples in first.items()]


# ---- from shards to files ------------------------------------------------------------------------


def _select(
    config: PreprocessConfig, heads: list[dict[str, Any]], work: WorkDirectory
) -> tuple[np.ndarray, Counter[str]]:
    """(bool for every kept row of all shards, drops by cause) by --dedup, --limits and --weights."""
    kept = [head["kept"] for head in heads]
    keep, drops = np.ones(sum(kept), dtype=bool), Counter()  # type: tuple[np.ndarray, Counter[str]]
    if config.dedup:
        keep = first_of_each(lambda: (read_shard(work.shard(i), "keys")["keys"] for i in range(len(heads))), len(keep))
        drops["duplicate"] = int((~keep).sum())
    if config.limits is not None or config.weights is not None:
        sources = np.repeat(np.asarray([head["source"] for head in heads], np.int16), kept)
        drops += within_limits(keep, sources, limits=config.limits, weights=config.weights, seed=config.seed)
    return keep, +drops


def _assemble(config: PreprocessConfig, template: Template, heads: list[dict[str, Any]], work: WorkDirectory,
              more: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Pack and write every split; {prefix: metadata}."""
    keep, drops = _select(config, heads, work)
    packed = config.pack and config.task != "prompts"
    order = config.pack_order if packed else "shuffled" if config.shuffle else "input"
    has_margins = any(head["with_margin"] for head in heads)
    with ExitStack() as stack:
        outputs = [stack.enter_context(OutputSet(prefix, overwrite=True, directory=work.path))
                   for prefix in config.prefixes]
        dtype = token_dtype(vocab_size(template.tokenizer))
        assemblers = [Assembler(output, task=config.task, seq_length=config.seq_length, dtype=dtype, packed=packed,
                                order=order, seed=config.seed, margins=has_margins) for output in outputs]
        _fill(config, assemblers, [work.shard(i) for i in range(len(heads))], keep)
        empty = [p for p, assembler in zip(config.prefixes, assemblers, strict=True) if not assembler.num_rows]
        if empty:
            work.finish()  # other options or rows make other shards
            rows = f"{len(keep):,} rows, {int(keep.sum()):,} of them selected"
            raise DataError(f"no row falls into {', '.join(empty)} ({rows})", where=f"--split {config.split}",
                            fix="a larger fraction, or more data")
        quarantined = _write_quarantine(config, heads, work)
        common = _metadata(config, template, heads, drops) | more
        metas = [{**common, **assembler.finish()} for assembler in assemblers]
        if quarantined is not None:
            os.replace(quarantined, f"{config.output_prefix}_bad.jsonl")
        # the training set last: where it exists, the others do
        for prefix, output, meta in reversed(list(zip(config.prefixes, outputs, metas, strict=True))):
            metas[config.prefixes.index(prefix)] = output.commit(meta)
    return dict(zip(config.prefixes, metas, strict=True))


def _fill(config: PreprocessConfig, assemblers: list[Assembler], shards: list[Path], keep: np.ndarray) -> None:
    """Hand the rows that stay (`keep`, bool [R]) to the assembler of their split."""
    start = 0
    for path in tqdm(shards, desc="pack and write", unit=" blocks", disable=None):
        shard = load_shard(path)
        rows = keep[start : start + len(shard.row_samples)]
        start += len(rows)
        split = split_of(shard.split_keys, config.fractions) if len(assemblers) > 1 else None
        for i, assembler in enumerate(assemblers):
            assembler.add(shard, rows if split is None else rows & (split == i))


def _write_quarantine(config: PreprocessConfig, heads: list[dict[str, Any]], work: WorkDirectory) -> Path | None:
    """The rows that could not be used, one JSON object a line: file, line, problem, row."""
    if config.on_bad_row != "quarantine":
        return None
    path = work.path / "quarantine.tmp"
    with open(path, "wb") as file:
        for number, head in enumerate(heads):
            if any(cause.startswith("bad row") for cause in head["drops"]):
                for row in load_shard(work.shard(number)).quarantine:
                    file.write(msgspec.json.encode({"file": head["path"], **row,
                                                    "line": row["line"] + head["first_line"]})
                               + b"\n")
    return path


def _metadata(
    config: PreprocessConfig, template: Template, heads: list[dict[str, Any]], drops: Counter[str]
) -> dict[str, Any]:
    """The metadata that all splits share."""
    tokenizer, chat_template = template.tokenizer, template.chat_template
    return {
        "format": FORMAT_VERSION,
        "version": f"mrlhf {__version__}",
        "task": config.task,
        "seq_length": config.seq_length,
        "num_rows": sum(head["rows"] for head in heads),
        "drops": merged([*(head["drops"] for head in heads), drops]),
        "num_truncated": sum(head["truncated"] for head in heads),
        "tokenizer": config.tokenizer,
        "vocab_size": vocab_size(tokenizer),
        "eos_token_id": tokenizer.eos_token_id,
        "end_token": template.end_token,
        "end_token_id": template.end_token_id,
        "chat_template_sha256": chat_template and hashlib.sha256(chat_template.encode()).hexdigest(),
        "input_template": config.input_template,
        "loss_on": config.loss_on if config.task in ("sft", "preference") else None,
        "truncate": config.how_to_truncate,
        "append_eos": config.append_eos,
        "split": config.split,
        "weights": config.weights,
        "limits": config.limits,
        "dedup": config.dedup,
        "seed": config.seed,
    }


def summary(prefix: str, tokenizer: Any) -> str:
    """The written set, read from disk: counts, drops by cause, the first sample with its trained part marked."""
    data = PackedDataset.open(prefix)
    meta = data.meta
    dropped = sum(meta["drops"].values())
    causes = ", ".join(f"{cause} {n:,}" for cause, n in meta["drops"].items())
    causes = f" ({causes})" if causes else ""
    lengths, seq_length, trained = meta["lengths"], meta["seq_length"], meta["num_trained_tokens"]
    lines = [
        f"{meta['task']} data in {prefix}.json and {len(meta['files'])} files",
        f"  rows     {meta['num_rows']:,} read, {meta['num_kept']:,} kept, {dropped:,} dropped{causes}",
        f"  samples  {meta['num_samples']:,} in {meta['num_packs']:,} packs of at most {meta['seq_length']:,} tokens, "
        f"fill rate {meta['fill_rate']:.2%}",
        f"  tokens   {meta['num_tokens']:,}, of them trained {trained:,} ({meta['trained_share']:.1%})",
        f"  lengths  min {lengths['min']}, median {lengths['p50']}, p95 {lengths['p95']}, max {lengths['max']}, "
        f"mean {lengths['mean']}",
        f"  encoded  {meta['tokenizer_backend']}",
    ]
    if meta["num_truncated"]:
        rule = f"{seq_length:,} tokens (--truncate {meta['truncate']})"
        lines.append(f"  cut      {meta['num_truncated']:,} rows were longer than {rule}")
    lines.append("first sample:")
    for i in range(2 if meta["task"] == "preference" else 1):
        _, ids, mask = data.sample(i)
        lines.append(marked(tokenizer, ids, mask))
    return "\n".join(lines)
