"""The options of a configuration class, read from its dataclasses: type, range, choices, default and help of each."""

from __future__ import annotations

import dataclasses
import math
import operator
import shutil
import textwrap
import types
import typing
from dataclasses import dataclass
from typing import Any, Literal

from msgspec import Meta

from mrlhf.config.options import OTHERWISE, STAGES, OneOf

FLOAT32 = (1.2e-38, 3.4e38)  # the smallest and the largest size that tensors hold
LARGEST_INT = 1 << 40


@dataclass(frozen=True)
class Option:
    """One leaf of a configuration; `default` is `dataclasses.MISSING` where the user must give it.

    kind: int, float, bool, str or a dataclass, of the value or, with `several`, of each item of a tuple.
    limits: the range of a number. choices: the valid texts; empty: any.
    """

    key: str
    kind: type
    default: Any
    help: str
    optional: bool = False
    several: bool = False
    limits: Meta | None = None
    choices: tuple[str, ...] = ()

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def of_sections(self) -> bool:
        """A list of mappings, each one dataclass; a text stands for one of them with only its first field."""
        return dataclasses.is_dataclass(self.kind)

    @property
    def type_name(self) -> str:
        """As `--help` and errors show it: `float in [0, 1)`, `int >= 1 or null`, `text ...`, `{a,b}`."""
        if dataclasses.is_dataclass(self.kind):
            names = [f.name for f in dataclasses.fields(self.kind)]
            return f"{names[0]} or [{{{', '.join(names)}}}, ...]"
        name = {bool: "true|false", str: "text"}.get(self.kind, self.kind.__name__)
        if self.choices:
            name = "{" + ",".join(self.choices) + "}"
        elif self.limits is not None:
            name = f"{name} {range_text(self.limits)}".rstrip()
        return name + " ..." * self.several + " or null" * self.optional

    def accepts(self, number: float) -> bool:
        """Whether the number is in the option's range."""
        return self.limits is None or in_range(number, self.limits)


def options_of(cls: Any, prefix: str = "") -> dict[str, Option]:
    """Dotted key -> Option, in the order of the dataclasses."""
    hints = typing.get_type_hints(cls, include_extras=True)
    options: dict[str, Option] = {}
    for f in dataclasses.fields(cls):
        hint, key = hints[f.name], prefix + f.name
        if dataclasses.is_dataclass(hint):
            options.update(options_of(hint, key + "."))
        else:
            options[key] = _option(key, hint, f.default, f.metadata.get("help", ""))
    return options


def _option(key: str, hint: Any, default: Any, help: str) -> Option:
    """Takes the type apart: X | None, tuple[X, ...], Annotated[X, mark], Literal[...]."""
    optional, several = types.NoneType in typing.get_args(hint), False
    if optional:
        hint = next(arg for arg in typing.get_args(hint) if arg is not types.NoneType)
    if typing.get_origin(hint) is tuple:
        hint, several = typing.get_args(hint)[0], True
    marks = getattr(hint, "__metadata__", ())
    choices = next((tuple(mark.rows) for mark in marks if isinstance(mark, OneOf)), ())
    limits = next((mark for mark in marks if isinstance(mark, Meta)), None)
    kind = typing.get_args(hint)[0] if marks else hint
    if typing.get_origin(kind) is Literal:
        kind, choices = str, typing.get_args(kind)
    return Option(key, kind, default, help, optional, several, limits, choices)


def range_text(limits: Meta) -> str:
    """`>= 0`, `in [0, 1)` or `>= 1 or -1`; empty if every finite number is valid."""
    low = limits.gt if limits.ge is None else limits.ge
    high = limits.lt if limits.le is None else limits.le
    if low is not None and high is not None:
        text = f"in {'(' if limits.ge is None else '['}{low}, {high}{')' if limits.le is None else ']'}"
    else:
        signs = {">=": limits.ge, ">": limits.gt, "<=": limits.le, "<": limits.lt}
        text = " ".join(f"{sign} {bound}" for sign, bound in signs.items() if bound is not None)
    return f"{text} or {limits.extra[OTHERWISE]}" if limits.extra else text


def in_range(number: float, limits: Meta) -> bool:
    if limits.extra and number == limits.extra[OTHERWISE]:
        return True
    bounds = ((operator.ge, limits.ge), (operator.gt, limits.gt), (operator.le, limits.le), (operator.lt, limits.lt))
    return math.isfinite(number) and all(bound is None or compare(number, bound) for compare, bound in bounds)


def beyond_machine(kind: type, number: float) -> str | None:
    """Why a finite number of an option's range cannot be computed with: as a tensor it is 0 or infinite, or a counter
    overflows.
    """
    size = abs(number)
    if kind is float and size and math.isfinite(size) and not FLOAT32[0] <= size <= FLOAT32[1]:
        return "float32 holds {} to {}".format(*FLOAT32)
    return f"more than {LARGEST_INT}" if kind is int and LARGEST_INT < size < math.inf else None


def help_text(stage_name: str) -> str:
    """Every option of a stage, grouped by section: `--section.key TYPE (default)  help`."""
    width = max(80, min(160, shutil.get_terminal_size((120, 40)).columns))
    config = "[--config FILE]" if stage_name in ("score", "generate", "serve-reward") else "--config FILE"
    lines = [f"usage: mrlhf {stage_name} {config} [--dry-run] [--section.key VALUE ...]", ""]
    lines += ["  --config FILE    YAML with the options below; flags override it"]
    lines += ["  --dry-run        check everything without a GPU and stop"]
    section = None
    for key, option in options_of(STAGES[stage_name]).items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += ["", section or "options"]
        default = "required" if option.required else show_value(option.default)
        left = f"  --{key} {option.type_name} ({default})"
        wrapped = textwrap.wrap(option.help, width - 62, break_long_words=False) or [""]
        lines, left = ([*lines, left], "") if len(left) > 60 else (lines, left)
        lines += [f"{left:<61} {wrapped[0]}"] + [f"{'':<61} {line}" for line in wrapped[1:]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


def show_value(value: Any) -> str:
    """A value as the user would write it on the command line."""
    if dataclasses.is_dataclass(value):
        parts = {k: v for k, v in vars(value).items() if v is not None}
        if len(parts) == 1:
            return show_value(*parts.values())
        return "{" + ", ".join(f"{k}: {show_value(v)}" for k, v in parts.items()) + "}"
    if isinstance(value, tuple):
        return ",".join(map(show_value, value)) or "none"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
