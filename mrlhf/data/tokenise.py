"""A chunk of rows -> samples, counted drops and problems. The part of preprocessing that runs in the workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from mrlhf.data.formats import Columns, RowProblem, normalise
from mrlhf.data.sources import Chunk
from mrlhf.data.template import Rendered, Template


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used, in a form that travels between processes."""

    kind: str
    path: str
    line: int
    what: str
    expected: str | None
    fix: str | None


@dataclass
class Batch:
    """What a chunk of rows became: samples one after another, and counts."""

    rows: int = 0
    kept: int = 0
    ids: list[np.ndarray] = field(default_factory=list)
    masks: list[np.ndarray] = field(default_factory=list)
    margins: list[float | None] = field(default_factory=list)
    labels: list[bytes] = field(default_factory=list)
    drops: Counter[str] = field(default_factory=Counter)
    truncated: int = 0
    problems: list[Problem] = field(default_factory=list)


class _Drop(Exception):
    """A row that is left out and counted under `args[0]`."""


class Tokenise:
    """Chunk -> Batch. Built once and handed to the workers."""

    def __init__(
        self, template: Template, *, task: str, seq_length: int, truncate: str, on_empty: str, columns: Columns, pair_in_one_pack: bool
    ):
        self.template, self.task, self.limit, self.mode = template, task, seq_length, truncate
        self.on_empty, self.columns, self.pair_in_one_pack = on_empty, columns, pair_in_one_pack

    def __call__(self, chunk: Chunk) -> Batch:
        batch = Batch(rows=len(chunk.rows))
        ready = []
        for i, number in enumerate(chunk.numbers):
            with _Outcome(batch, chunk.path, number, self.on_empty):
                try:
                    record = chunk.record(i)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    raise RowProblem(
                        "json", f"not valid JSON: {error}", expected="one JSON object a line", fix="mend or remove the line"
                    ) from error
                sample = normalise(record, self.task, self.columns, plain=self.template.plain)
                rendered = [self.template.conversation(c, tools=sample.tools) for c in sample.conversations]
                if sample.prompt is not None:
                    rendered = [self.template.prompt(sample.prompt, tools=sample.tools)]
                ready.append((number, sample, rendered))
        if self.task == "pretrain":
            texts = self.template.encode_text([sample.text or "" for _, sample, _ in ready]) if ready else []
            for (number, _, _), ids in zip(ready, texts, strict=True):
                with _Outcome(batch, chunk.path, number, self.on_empty):
                    self._add_text(batch, ids)
            return batch
        for number, sample, encoded in self._encode(batch, chunk.path, ready):
            with _Outcome(batch, chunk.path, number, self.on_empty):
                for ids, mask in encoded:
                    self._check_ends(ids, mask)
                fitted = self._fit(batch, encoded)
                batch.kept += 1
                batch.ids += [ids for ids, _ in fitted]
                if self.task == "prompts":
                    batch.labels.append(msgspec.json.encode(sample.label))
                    continue
                batch.masks += [mask for _, mask in fitted]
                if self.task == "preference":
                    batch.margins.append(sample.margin)
        return batch

    def _encode(self, batch: Batch, path: str, ready: list[Any]) -> Iterator[tuple[int, Any, list[Any]]]:
        """Tokenise all texts of the chunk in one call; one by one where a text that cannot be encoded stands among them."""
        flat: list[Rendered] = [item for _, _, rendered in ready for item in rendered]
        try:
            encoded = iter(self.template.encode(flat))
        except RowProblem:
            for number, sample, rendered in ready:
                alone = None
                with _Outcome(batch, path, number, self.on_empty):
                    alone = self.template.encode(rendered)
                if alone is not None:
                    yield number, sample, alone
            return
        for number, sample, rendered in ready:
            yield number, sample, [next(encoded) for _ in rendered]

    def _check_ends(self, ids: np.ndarray, mask: np.ndarray) -> None:
        if self.task == "prompts":
            return
        end = self.template.end_token_id
        if not mask.any():
            raise RowProblem("mask_zeros", "no token of the answer is trained", fix="--chat-template FILE")
        if mask[0]:
            raise RowProblem(
                "mask_ones", "the sample begins with a trained token: there is no prompt", fix="--chat-template FILE, or --input-template"
            )
        if end is not None and (ids[-1] != end or not mask[-1]):
            raise RowProblem("mask_end", f"the sample does not end on a trained {self.template.end_token!r}", fix="--chat-template FILE")

    def _add_text(self, batch: Batch, ids: np.ndarray) -> None:
        """A pretraining text: whole, cut, or in consecutive pieces. The first token of each has nothing to be predicted from."""
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
        for piece in pieces:
            batch.ids.append(piece)
            batch.masks.append(np.concatenate([np.zeros(1, np.uint8), np.ones(len(piece) - 1, np.uint8)]))

    def _refuse_long(self, tokens: int) -> None:
        if self.mode == "error":
            raise RowProblem(
                "too_long",
                f"{tokens:,} tokens",
                expected=f"at most --seq-length {self.limit}",
                fix="--truncate drop, or a larger --seq-length",
            )
        if self.mode == "drop":
            raise _Drop("too_long")

    def _fit(self, batch: Batch, encoded: list[tuple[np.ndarray, np.ndarray]]) -> list[tuple[np.ndarray, np.ndarray]]:
        """One conversation, or a pair: together within the limit where both stand in one pack, else each."""
        sizes = [len(ids) for ids, _ in encoded]
        together = len(sizes) == 2 and self.pair_in_one_pack
        total = sum(sizes) if together else max(sizes)
        if total <= self.limit:
            return encoded
        self._refuse_long(total)
        if self.mode == "left":  # the same number from both, so that a pair keeps its common prompt
            excess = total - self.limit
            excess = -(-excess // 2) if together else excess
            cut = [(ids[excess:], mask[excess:]) for ids, mask in encoded]
            lost = any(not len(mask) or mask[0] for _, mask in cut)
        else:
            most = max(self.limit // 2, self.limit - min(sizes)) if together else self.limit
            cut = [(ids[:most], mask[:most]) for ids, mask in encoded]
            lost = self.task != "prompts" and any(not mask.any() for _, mask in cut)
        if lost:
            raise _Drop("answer_too_long" if self.mode == "left" else "nothing_left_to_train")
        batch.truncated += 1
        return cut


class _Outcome:
    """Turns what a row raises into a counted drop or a noted problem, and lets the next row go on."""

    def __init__(self, batch: Batch, path: str, number: int, on_empty: str):
        self.batch, self.path, self.number, self.on_empty = batch, path, number, on_empty

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, _Drop):
            self.batch.drops[error.args[0]] += 1
        elif isinstance(error, RowProblem) and error.kind == "empty" and self.on_empty == "drop":
            self.batch.drops["empty"] += 1
        elif isinstance(error, RowProblem) and error.kind == "special_in_text":
            self.batch.drops["special_in_text"] += 1  # rare, and nothing the user could set would help
        elif isinstance(error, RowProblem):
            self.batch.problems.append(Problem(error.kind, self.path, self.number, error.what, error.expected, error.fix))
        else:
            return False
        return True
