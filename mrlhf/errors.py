"""Errors that a user can cause. Each says what is wrong, where, what was expected and how to fix it.

    ConfigError: sft.yaml:14: parallel.tensor_model_parallel_size = 3 does not divide model.num_attention_heads = 32
      expected: 1, 2, 4 or 8
      fix:      --parallel.tensor_model_parallel_size 4

`Problems` collects errors, so that one run shows all of them. The command line prints an `MrlhfError` once (rank 0)
without a traceback and exits with status 2; any other exception is a bug and keeps its traceback.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable


class MrlhfError(ValueError):
    """Base of all errors that the user's input causes.

    `where` is `file:line` or a config key; `expected` and `fix` are one-line texts or None. `ends_a_run`: it ends a run
    under way, and the command line adds what is kept. `on_all_ranks`: every rank raises it, after the same collectives.
    """

    ends_a_run = on_all_ranks = False

    def __init__(self, what: str, *, where: str | None = None, expected: str | None = None, fix: str | None = None):
        self.what, self.where, self.expected, self.fix = what, where, expected, fix
        super().__init__(self.render())

    def render(self) -> str:
        lines = [f"{self.where}: {self.what}" if self.where else self.what]
        if self.expected:
            lines.append(f"  expected: {self.expected}")
        if self.fix:
            lines.append(f"  fix:      {self.fix}")
        return "\n".join(lines)


class ConfigError(MrlhfError):
    """A wrong configuration, in the file or on the command line."""


class DataError(MrlhfError):
    """A data file, record, template or tokenizer is missing or malformed, or does not fit the model."""


class RowProblem(DataError):
    """A row is unusable. Rows of the same `kind` are counted and shown together. `fix` names a flag."""

    def __init__(self, kind: str, what: str, *, expected: str | None = None, fix: str | None = None):
        self.kind = kind
        super().__init__(what, expected=expected, fix=fix)


class CheckpointError(MrlhfError):
    """A checkpoint or HF directory is missing or damaged, or has the wrong kind."""


class RewardError(MrlhfError):
    """A reward source failed, or a score is missing or not finite."""

    ends_a_run = on_all_ranks = True


class ToolError(MrlhfError):
    """An environment (rollout.environment) raised an error, timed out or returned a wrong type."""

    ends_a_run = on_all_ranks = True


class NotFinite(MrlhfError, FloatingPointError):
    """A loss or gradient norm is NaN or infinite, or passes over the same tokens disagree."""

    ends_a_run = on_all_ranks = True


class EnvironmentProblem(MrlhfError):
    """The machine or an installed package does not fit (version, missing extra, device)."""


class OutOfMemory(MrlhfError):
    """A rank ran out of memory in a phase.

    peaks: GiB of every phase so far, including this one. remedies: one line for each possible change.
    """

    ends_a_run = True

    def __init__(self, what: str, *, peaks: dict[str, float], remedies: list[str]):
        self.peaks, self.remedies = peaks, remedies
        super().__init__(what)

    def render(self) -> str:
        lines = [self.what, "  peaks:    " + ", ".join(f"{phase} {gib:.2f} GiB" for phase, gib in self.peaks.items())]
        lines += [f"  fix:      {remedy}" for remedy in self.remedies]
        return "\n".join(lines)


class SeveralErrors(MrlhfError):
    """Several errors, shown together."""

    def __init__(self, errors: list[MrlhfError]):
        self.errors = errors
        super().__init__("\n".join(f"{type(e).__name__}: {e.render()}" for e in errors))


def error_text(error: MrlhfError) -> str:
    """The error as a user sees it: with its kind, which each of several errors has in its own text."""
    return str(error) if isinstance(error, SeveralErrors) else f"{type(error).__name__}: {error}"


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG,
                errno.ENOTDIR, errno.EISDIR, errno.EEXIST)


def disk_problem(error: OSError) -> EnvironmentProblem | None:
    """The error as the user's: a full or read-only disk, no permission, a wrong kind of path. None for other causes."""
    if error.errno not in _DISK_ERRORS:
        return None
    name = "a disk" if error.filename is None else str(error.filename)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    fix = "make room, then the same command again" if full else "another path, or mend this one"
    return EnvironmentProblem(str(error.strerror), where=name, fix=fix)


class Problems:
    """Collects errors; `raise_if_any` raises a single one, or several as `SeveralErrors`."""

    def __init__(self) -> None:
        self.errors: list[MrlhfError] = []

    def add(self, error: MrlhfError) -> None:
        self.errors.append(error)

    def extend(self, errors: Iterable[MrlhfError]) -> None:
        self.errors.extend(errors)

    def raise_if_any(self) -> None:
        self.errors = list({e.render(): e for e in self.errors}.values())  # one cause may appear in several places
        if len(self.errors) == 1:
            raise self.errors[0]
        if self.errors:
            raise SeveralErrors(self.errors)
