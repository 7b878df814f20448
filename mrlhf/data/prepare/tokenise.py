"""A chunk of rows -> samples, counted drops and problems. The part of preprocessing that runs in the workers."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from mrlhf.data.prepare.formats import Columns, NormalRecord, normalise
from mrlhf.data.prepare.sources import Chunk
from mrlhf.data.prepare.template import Rendered, Template
from mrlhf.errors import DataError, RowProblem

SHOWN = 3  # problems of a kind that are kept with their lines


@dataclass(frozen=True)
class RowFault:
    """A row that cannot be used, in a form that travels between processes."""

    kind: str
    path: str
    line: int
    what: str
    expected: str | None
    fix: str | None


def fault_error(first: list[RowFault], *, count: int, rows: int) -> DataError:
    """One error for the `count` of `rows` rows that have the same kind of problem, with the lines of the first."""
    example = first[0]
    shown = ", ".join(str(p.line) if p.path == example.path else f"{p.path}:{p.line}" for p in first)
    tally = f"({count:,} of {rows:,} rows have this problem; first: {shown})"
    return DataError(example.what, where=f"{example.path}:{example.line}", expected=example.expected,
                     fix=f"{example.fix or 'mend the data'}     {tally}")


@dataclass
class Batch:
    """Samples of rows, and counts. `row_samples`: samples of each kept row (pretrain pieces, the two of a pair)."""

    rows: int = 0
    kept: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    row_samples: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    split_keys: list[bytes] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    problems: list[RowFault] = field(default_factory=list)
    problem_counts: Counter[str] = field(default_factory=Counter)
    quarantine: list[dict[str, Any]] = field(default_factory=list)


class _Drop(Exception):
    """A row that is left out and counted under `args[0]`."""


class Tokenise:
    """Chunk -> Batch. Built once and handed to the workers.

    on_bad    a row that cannot be used: "error" notes a problem, "drop" counts it, "quarantine" also keeps it
    identify  compute keys of the rows' content (for --dedup, --split)
    """

    def __init__(self, template: Template, *, task: str, seq_length: int, truncate: str, on_empty: str,
                 columns: Columns, pair_in_one_pack: bool, on_bad: str = "error", identify: bool = False):
        self.template, self.task, self.limit, self.mode = template, task, seq_length, truncate
        self.on_empty, self.columns, self.pair_in_one_pack = on_empty, columns, pair_in_one_pack
        self.on_bad, self.identify = on_bad, identify

    def __call__(self, chunk: Chunk, batch: Batch | None = None) -> Batch:
        """Adds the rows of `chunk` to `batch`."""
        batch = Batch() if batch is None else batch
        batch.rows += len(chunk.rows)
        ready = []
        for i in range(len(chunk.rows)):
            with _Outcome(self, batch, chunk, i):
                ready.append((i, *self._render(chunk, i)))
        if self.task == "pretrain":
            texts = self.template.encode_text([sample.text or "" for _, sample, _ in ready]) if ready else []
            for (i, sample, _), ids in zip(ready, texts, strict=True):
                with _Outcome(self, batch, chunk, i):
                    self._add_text(batch, ids)
                    self._identify(batch, sample)
            return batch
        for i, sample, encoded in self._encode(batch, chunk, ready):
            with _Outcome(self, batch, chunk, i):
                for ids, mask in encoded:
                    self._check_ends(ids, mask)
                if _equal_pair(encoded):
                    raise _Drop("equal_pair")
                fitted = self._fit(batch, encoded)
                batch.kept += 1
                batch.ids += [ids for ids, _ in fitted]
                batch.row_samples.append(len(fitted))
                self._identify(batch, sample)
                if self.task == "prompts":
                    batch.labels.append(msgspec.json.encode(sample.label))
                    continue
                batch.masks += [mask for _, mask in fitted]
                if self.task == "preference":
                    batch.margins.append(sample.margin)
        return batch

    def _render(self, chunk: Chunk, i: int) -> tuple[NormalRecord, list[Rendered]]:
        """Row i and its texts to tokenise (none for pretraining, whose text is in the sample). Raises RowProblem."""
        sample = normalise(read_record(chunk, i), self.task, self.columns, plain=self.template.plain)
        if sample.prompt is not None:
            return sample, [self.template.prompt(sample.prompt, tools=sample.tools)]
        return sample, [self.template.conversation(c, tools=sample.tools) for c in sample.conversations]

    def texts(self, chunk: Chunk) -> list[str]:
        """The texts that the rows of `chunk` would be tokenised from; rows that cannot be used are left out."""
        texts, ignored = [], Batch()
        for i in range(len(chunk.rows)):
            with _Outcome(self, ignored, chunk, i):
                sample, rendered = self._render(chunk, i)
                texts += [sample.text] if sample.text is not None else [item.text for item in rendered]
        return texts

    def _identify(self, batch: Batch, sample: NormalRecord) -> None:
        if self.identify:
            whole, prompt = row_content(sample)
            batch.keys.append(hashlib.blake2b(whole, digest_size=16).digest())
            batch.split_keys.append(hashlib.blake2b(prompt, digest_size=8).digest())

    def _encode(self, batch: Batch, chunk: Chunk, ready: list[Any]) -> Iterator[tuple[int, Any, list[Any]]]:
        """Tokenise all texts of the chunk in one call; row by row where one of them cannot be encoded."""
        flat: list[Rendered] = [item for _, _, rendered in ready for item in rendered]
        try:
            encoded = iter(self.template.encode(flat))
        except RowProblem:
            for i, sample, rendered in ready:
                alone = None
                with _Outcome(self, batch, chunk, i):
                    alone = self.template.encode(rendered)
                if alone is not None:
                    yield i, sample, alone
            return
        for i, sample, rendered in ready:
            yield i, sample, [next(encoded) for _ in rendered]

    def _check_ends(self, ids: np.ndarray, mask: np.ndarray) -> None:
        if not len(ids):
            raise RowProblem("empty", "the text gives no token", fix="--on-empty drop, or another --tokenizer")
        if self.task == "prompts":
            return
        end = self.template.end_token_id
        if not mask.any():
            raise RowProblem("mask_zeros", "no token of the answer is trained: the tokenizer has none for its text",
                             fix="--on-bad-row drop, or another --tokenizer")
        if mask[0]:
            fix = "--input-template with text behind {}, or --on-bad-row drop" if self.template.plain else None
            raise RowProblem("mask_ones", "the sample begins with a trained token: there is no prompt",
                             fix=fix or "--chat-template FILE")
        if end is not None and (ids[-1] != end or not mask[-1]):
            what = f"the sample does not end on a trained {self.template.end_token!r}"
            raise RowProblem("mask_end", f"{what}: the tokenizer reads it as other tokens",
                             fix="another --tokenizer, or --chat-template FILE with another end token")

    def _add_text(self, batch: Batch, ids: np.ndarray) -> None:
        """Add a pretraining text: whole, cut, or in consecutive pieces. Nothing predicts the first token of a piece."""
        if len(ids) < 2:
            raise RowProblem("empty", "the text has fewer than two tokens", fix="--on-empty drop")
        pieces = [ids]
        if len(ids) > self.limit:
            self._refuse_long(len(ids))
            batch.truncated += 1
            starts = list(range(0, len(ids), self.limit))
            if len(ids) - starts[-1] == 1 and self.limit > 2:
                starts[-1] -= 1  # a piece of one token would train nothing
            pieces = [ids[-self.limit :]] if self.mode == "left" else np.split(ids, starts[1:])
        batch.kept += 1
        batch.row_samples.append(len(pieces))
        for piece in pieces:
            batch.ids.append(piece)
            batch.masks.append(np.concatenate([np.zeros(1, np.uint8), np.ones(len(piece) - 1, np.uint8)]))

    def _refuse_long(self, tokens: int) -> None:
        if self.mode == "error":
            raise RowProblem("too_long", f"{tokens:,} tokens", expected=f"at most --seq-length {self.limit}",
                             fix="--truncate drop, or a larger --seq-length")
        if self.mode == "drop":
            raise _Drop("too_long")

    def _fit(self, batch: Batch, encoded: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """A conversation or a pair, cut to the limit: a pair together where both stand in one pack, else each alone."""
        sizes = [len(ids) for ids, _ in encoded]
        together = len(sizes) == 2 and self.pair_in_one_pack
        total = sum(sizes) if together else max(sizes)
        if total <= self.limit:
            return encoded
        self._refuse_long(total)
        if self.mode == "left":  # the same number from both, so that a pair keeps its common prompt
            excess = -(-(total - self.limit) // 2) if together else total - self.limit
            cut = [(ids[excess:], mask[excess:]) for ids, mask in encoded]
            if any(not len(mask) or mask[0] for _, mask in cut):
                raise _Drop("answer_too_long")
        else:
            most = max(self.limit // 2, self.limit - min(sizes)) if together else self.limit
            cut = [(ids[:most], mask[:most]) for ids, mask in encoded]
            if self.task != "prompts" and not all(mask.any() for _, mask in cut):
                raise _Drop("nothing_left_to_train")
        if _equal_pair(cut):
            raise _Drop("equal_after_the_cut")
        batch.truncated += 1
        return cut


def _equal_pair(encoded: list[tuple[np.ndarray, np.ndarray]]) -> bool:
    return len(encoded) == 2 and all(np.array_equal(a, b) for a, b in zip(*encoded, strict=True))


class _Outcome:
    """Turns an exception of a row into a counted drop or a noted problem, so that the next row continues."""

    def __init__(self, to: Tokenise, batch: Batch, chunk: Chunk, i: int):
        self.to, self.batch, self.chunk, self.i = to, batch, chunk, i

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        batch = self.batch
        if isinstance(error, _Drop):
            batch.drops[error.args[0]] += 1
        elif isinstance(error, RowProblem) and error.kind == "empty" and self.to.on_empty == "drop":
            batch.drops["empty"] += 1
        elif isinstance(error, RowProblem) and error.kind == "special_in_text":
            batch.drops["special_in_text"] += 1  # rare, and no option would help
        elif isinstance(error, RowProblem) and self.to.on_bad == "error":
            batch.problem_counts[error.kind] += 1
            if batch.problem_counts[error.kind] <= SHOWN:
                line = self.chunk.numbers[self.i]
                batch.problems.append(
                    RowFault(error.kind, self.chunk.path, line, error.what, error.expected, error.fix)
                )
        elif isinstance(error, RowProblem):
            batch.drops[f"bad row ({error.kind})"] += 1
            if self.to.on_bad == "quarantine":
                row = self.chunk.rows[self.i]
                is_line = isinstance(row, bytes)
                text = row.decode("utf-8", "backslashreplace") if is_line else json.dumps(row, default=str)
                batch.quarantine.append({"line": self.chunk.numbers[self.i], "problem": error.what, "row": text})
        else:
            return False
        return True


def row_content(sample: NormalRecord) -> tuple[bytes, bytes]:
    """(content that two equal rows share, the part that must stay in one split: the prompt, or a pretraining text)."""
    if sample.text is not None:
        text = sample.text.encode("utf-8", "surrogatepass")
        return text, text
    if sample.prompt is not None:
        prompt = msgspec.json.encode(sample.prompt)
        return prompt, prompt
    first = sample.conversations[0]
    return msgspec.json.encode(sample.conversations), msgspec.json.encode(
        first[0] if isinstance(first, tuple) else first[:-1]
    )


def read_record(chunk: Chunk, i: int) -> Any:
    """Row i of the chunk. Raises RowProblem where it is not JSON or names a column twice."""
    try:
        record = chunk.record(i)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise RowProblem("json", f"not valid JSON: {error}", expected="one JSON object a line",
                         fix="mend or remove the line") from error
    row = chunk.rows[i]
    if isinstance(row, bytes) and isinstance(record, dict):
        repeated = _repeated_key(row, record)
        if repeated is not None:
            raise RowProblem("repeated", f"column '{repeated}' stands twice in the row", expected="each column once",
                             fix="mend or remove the line")
    return record


def _repeated_key(row: bytes, record: dict[str, Any]) -> str | None:
    """A key that an object of the row has twice, of which JSON parsers silently keep one value."""
    objects = [record, *(m for v in record.values() if isinstance(v, list) for m in v if isinstance(m, dict))]
    counts = Counter(key for o in objects for key in o)
    if all(row.count(b'"%s"' % key.encode("utf-8", "replace")) == n for key, n in counts.items()):
        return None

    def refuse_repeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [k for k, _ in pairs]
        if len(set(keys)) < len(keys):
            raise KeyError(next(k for k in keys if keys.count(k) > 1))
        return dict(pairs)

    try:
        json.loads(row, object_pairs_hook=refuse_repeated)
    except KeyError as error:
        return str(error.args[0])
    return None
