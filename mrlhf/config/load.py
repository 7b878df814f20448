"""Reads a configuration: strict YAML and `--section.key VALUE`, through one checker.

Every value keeps its place, so that each problem names a file and line or a flag, and all problems are raised
together. The option's type decides how a text is read: PyYAML alone makes `1e-5` a string and `010` an eight.
"""

from __future__ import annotations

import contextlib
import difflib
import math
import re
import typing
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from mrlhf.config import names
from mrlhf.config.check import contradictions
from mrlhf.config.options import STAGES, DataSource, TrainingConfig
from mrlhf.config.schema import Option, beyond_machine, options_of
from mrlhf.errors import ConfigError, Problems

_NULL = ("null", "none", "~", "")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")
_COMMAND_LINE = "command line"

Scalar = bool | int | float | str | None
Value = Scalar | tuple[str, ...] | tuple[int, ...] | tuple[float, ...] | tuple[DataSource, ...]


@dataclass(frozen=True)
class Written:
    """What the user wrote for a key: a text, a list, or a mapping, and its place.

    `quoted`: a text in quotes or in a YAML block is a string; it is never read as null or as a number.
    """

    value: str | list[Written] | dict[str, Written]
    where: str
    quoted: bool = False

    @property
    def is_null(self) -> bool:
        return isinstance(self.value, str) and not self.quoted and is_null(self.value)

    @property
    def summary(self) -> str:
        if isinstance(self.value, str):
            return f"'{self.value}'"
        return f"a list of {len(self.value)}" if isinstance(self.value, list) else "a mapping"


@dataclass
class _ConfigInput:
    """The input so far: values and sections with their places, the keys without a usable value, and all problems."""

    options: dict[str, Option]
    path: str | None
    written: dict[str, Written] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    unusable: set[str] = field(default_factory=set)
    problems: Problems = field(default_factory=Problems)

    def add(self, what: str, where: str, expected: str | None = None, fix: str | None = None) -> None:
        self.problems.add(ConfigError(what, where=where, expected=expected, fix=fix))

    def place(self, key: str) -> str:
        if key in self.written:
            return self.written[key].where
        return self.sections.get(key.rpartition(".")[0], self.path or _COMMAND_LINE)


class _Unreadable(ValueError):
    """A text that does not fit the option's type or range: the message says what it is, `meant` what may be meant."""

    def __init__(self, what: str, *, meant: str | None = None):
        self.meant = meant
        super().__init__(what)


def load_config(stage_cls: type, path: str | None, overrides: list[str]) -> Any:
    """The stage's configuration from a YAML file (optional) and command-line overrides, which win.

    Raises one `ConfigError`, or `SeveralErrors` with every problem of file, flags and check.py.
    """
    given = _ConfigInput(options_of(stage_cls), path)
    if path is not None and (root := _read_yaml(path, given)) is not None:
        _sort_into_options(root, "", given)
    _read_flags(overrides, given)
    values = {key: _value(option, given) for key, option in given.options.items()}
    config = _build(stage_cls, values)
    for problem in contradictions(config):
        if not _concerns(problem, given.unusable):
            given.add(problem.what, given.place(problem.where or ""), problem.expected, problem.fix)
    given.problems.raise_if_any()
    return config


def saved_values(path: Path) -> dict[str, Value]:
    """The options in a training run's config.yaml by dotted key, read as the run read them; {} without a file.

    For whatever shows a saved configuration: it has what this version can read, whichever version wrote the file.
    Raises ConfigError where it is not YAML.
    """
    given = _ConfigInput({k: o for cls in STAGES.values() if issubclass(cls, TrainingConfig)
                          for k, o in options_of(cls).items()}, str(path))
    if not path.is_file() or (root := _read_yaml(str(path), given)) is None:
        return {}
    _sort_into_options(root, "", given)
    given.unusable.clear()  # it has the neighbours of unknown keys, such as those of an earlier version
    values = {key: _value(given.options[key], given) for key in given.written}
    return {key: value for key, value in values.items() if key not in given.unusable}


def _value(option: Option, given: _ConfigInput) -> Value:
    """The option's value. Where the input gives none that is usable, a default that lets the checks go on."""
    key = option.key
    if key in given.written:
        try:
            return _convert_sections(option, given) if option.of_sections else _convert(option, given.written[key])
        except _Unreadable as e:
            given.add(f"{key} = {e}", given.place(key), option.type_name, e.meant and f"--{key} {e.meant}")
            given.unusable.add(key)
    if not option.required:
        return option.default
    if key not in given.unusable:
        given.add(f"{key} is missing", given.place(key), f"{option.type_name}: {option.help}", f"--{key} VALUE")
    given.unusable.add(key)
    return () if option.several else {int: 1, float: 1.0, bool: False}.get(option.kind, "?")


def _build(cls: Any, values: dict[str, Value], prefix: str = "") -> Any:
    """The dataclass with its sections, from the values by dotted key."""
    hints = typing.get_type_hints(cls)
    parts = {}
    for name in (f.name for f in fields(cls)):
        is_section = is_dataclass(hints[name])
        parts[name] = _build(hints[name], values, f"{prefix}{name}.") if is_section else values[prefix + name]
    return cls(**parts)


def _concerns(problem: ConfigError, unusable: set[str]) -> bool:
    """Whether a contradiction speaks of a key without a usable value, and may thus be untrue."""
    names = (key.rpartition(".")[2] for key in unusable)
    return problem.where in unusable or any(re.search(rf"\b{name}\b(?!\.)", problem.what) for name in names)


# ---------------------------------------------------------------- YAML


def _read_yaml(path: str, given: _ConfigInput) -> Written | None:
    """The file as a tree with the place of every key; None if it is empty. Raises ConfigError if it is not YAML."""
    file = Path(path)
    if not file.is_file():
        names = [p.name for p in file.parent.iterdir() if p.suffix in (".yaml", ".yml")] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.5)
        fix = f"--config {file.parent / near[0]}" if near else None
        what = "is a directory" if file.is_dir() else "no such file"
        raise ConfigError(what, where=path, expected="a YAML file", fix=fix)
    try:
        root = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        place = lambda node: f"{path}:{node.start_mark.line + 1}"  # noqa: E731
        return None if root is None else _from_node(root, "", place, given)
    except RecursionError:
        raise ConfigError("is nested too deeply, or an alias refers to itself", where=path) from None
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        where = f"{path}:{mark.line + 1}" if mark else path
        raise ConfigError(f"not valid YAML: {e.problem or e.context}", where=where) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot be read: {' '.join(str(e).split())}", where=path) from None


def _from_node(node: yaml.Node, key: str, place: Callable[[yaml.Node], str], given: _ConfigInput) -> Written:
    """A value in a mapping has the place of its key. A key that is given twice is a problem; its first value counts."""
    if isinstance(node, yaml.ScalarNode):
        return Written(node.value, place(node), quoted=bool(node.style))
    if isinstance(node, yaml.SequenceNode):
        return Written([_from_node(item, key, place, given) for item in node.value], place(node))
    mapping: dict[str, Written] = {}
    for key_node, value_node in node.value:
        name = str(key_node.value)
        inner = f"{key}.{name}" if key else name
        if name in mapping:
            what = f"{inner} is given twice; first at {mapping[name].where}"
            given.add(what, place(key_node), fix="remove one of them")
        else:
            mapping[name] = replace(_from_node(value_node, inner, place, given), where=place(key_node))
    return Written(mapping, place(node))


def _sort_into_options(section: Written, prefix: str, given: _ConfigInput) -> None:
    """Records every key of a section, and of the sections inside, with its place."""
    if section.is_null:
        return
    if not isinstance(section.value, dict):
        given.add(f"{prefix[:-1] or 'the file'} holds {section.summary}", section.where, "`key: value` lines")
        given.unusable.update(k for k in given.options if k.startswith(prefix))
        return
    for name, written in section.value.items():
        key = prefix + name
        if key in given.written:  # once in its section, once as `section.key:`
            what = f"{key} is given twice; first at {given.written[key].where}"
            given.add(what, written.where, fix="remove one of them")
        elif key in given.options:
            given.written[key] = written
        elif any(k.startswith(key + ".") for k in given.options):
            given.sections[key] = written.where
            _sort_into_options(written, key + ".", given)
        else:
            _add_unknown(key, written.where, given, flag=False)


# ---------------------------------------------------------------- the command line


def _read_flags(args: list[str], given: _ConfigInput) -> None:
    """`--key VALUE`, `--key=VALUE`, `--bool`; a tuple takes several values, repeated or separated by commas."""
    flags: dict[str, Written] = {}
    rest = list(reversed(args))
    while rest:
        arg = rest.pop()
        if not arg.startswith("--") or arg == "--":
            fix = f"--config {arg}" if arg.endswith((".yaml", ".yml")) else f"--{arg}" if "=" in arg else None
            given.add(f"unexpected argument '{arg}'", _COMMAND_LINE, "--section.key VALUE", fix)
            continue
        name, equals, text = arg.partition("=")
        key = name[2:].replace("-", "_")
        where = f"--{key} on the command line"
        option = given.options.get(key)
        takes_several = option is not None and option.several and not option.of_sections
        texts = [text] if equals else []
        while not equals and rest and not rest[-1].startswith("--") and (not texts or takes_several):
            texts.append(rest.pop())
        if option is None:
            inside = [f"--{k}" for k in given.options if k.startswith(key + ".")]
            if inside:
                given.add(f"{key} is a section", where, ", ".join(inside))
            else:
                _add_unknown(key, where, given, flag=True)
        elif not texts and option.kind is not bool:
            given.add(f"{key} has no value", where, option.type_name, f"--{key} VALUE")
            given.unusable.add(key)
        elif takes_several and not (len(texts) == 1 and is_null(texts[0])):
            before = flags[key].value if key in flags else []
            items = [item for text in _join_brackets(texts) for item in _list_items(Written(text, where))]
            flags[key] = Written([*before, *items] if isinstance(before, list) else items, where)
        else:
            flags[key] = Written(texts[0] if texts else "true", where)
    given.written.update(flags)


def _join_brackets(texts: list[str]) -> list[str]:
    """The shell cuts `[a, b]` in two."""
    is_cut = len(texts) > 1 and texts[0].startswith("[") and not texts[0].endswith("]")
    return [" ".join(texts)] if is_cut and texts[-1].endswith("]") else texts


def _list_items(written: Written) -> list[Written]:
    """The items of a text: between commas, with or without brackets round them; or a list of YAML or JSON with quotes.

    Between commas, a URL that follows a URL stays with it: it is one more endpoint of the same source.
    """
    text = str(written.value).strip()
    if text.startswith("[") and text.endswith("]"):
        with contextlib.suppress(yaml.YAMLError, RecursionError):
            items = yaml.compose(text, Loader=yaml.SafeLoader).value
            if any(item.style for item in items) and all(isinstance(item, yaml.ScalarNode) for item in items):
                return [replace(written, value=item.value, quoted=bool(item.style)) for item in items]
        text = text[1:-1]
    parts: list[str] = []
    for piece in text.split(","):
        piece = piece.strip()
        if parts and re.match(r"https?://", piece) and re.match(r"https?://", parts[-1]):
            parts[-1] += "," + piece
        elif piece:
            parts.append(piece)
    return [replace(written, value=part, quoted=False) for part in parts]


def _add_unknown(key: str, where: str, given: _ConfigInput, *, flag: bool) -> None:
    """Names the nearest valid keys: misspelt in its section, or right in another one, or misspelt anywhere."""
    keys = list(given.options)
    section, _, leaf = key.rpartition(".")
    leaves = {k: k.rpartition(".")[2] for k in keys}
    siblings = [k for k in keys if k.rpartition(".")[0] == section]
    tops = list(dict.fromkeys(k.partition(".")[0] for k in keys))
    inside = {leaves[k]: k for k in siblings} if section else {top: top for top in tops}
    near = [inside[word] for word in difflib.get_close_matches(leaf, inside, n=2, cutoff=0.7)]
    near += [k for k in keys if leaves[k] == leaf and k not in near]
    near = near or difflib.get_close_matches(key, keys, n=1, cutoff=0.75)
    if not near:
        near = [k for k in keys if leaves[k] in difflib.get_close_matches(leaf, list(leaves.values()), n=1, cutoff=0.8)]
    theirs = [k for k in names.OPTIONS.get(leaf, ()) if k in given.options]
    near = [*theirs[:1], *(k for k in near if k not in theirs)]
    dtype = next((k for k in ("model.dtype", "dtype") if k in given.options and leaf in names.SWITCHES), None)
    if dtype is not None:
        near = [f"{dtype} {names.SWITCHES[leaf]}" if flag else f"{dtype}: {names.SWITCHES[leaf]}"]
    given.unusable.update(k for n in near for k in keys if k == n or k.startswith(n + "."))
    hint = "; did you mean " + " or ".join(f"'{'--' if flag else ''}{n}'" for n in near[:3]) + "?" if near else ""
    in_section = f"{section}: {', '.join(leaves[k] for k in siblings)}" if section and siblings else None
    given.add(f"unknown key '{key}'{hint}", where, in_section or f"one of {', '.join(tops)}")


# ---------------------------------------------------------------- from texts to values


def _convert(option: Option, written: Written) -> Any:
    """The value of an option that is no list of sections. Raises _Unreadable."""
    if written.is_null and (option.optional or option.several):
        return None if option.optional else ()
    if not option.several:
        return _convert_scalar(option, written)
    items = written.value
    if isinstance(items, str):
        items = _list_items(written)
    if not isinstance(items, list):
        raise _Unreadable(written.summary)
    return tuple(_convert_scalar(option, item) for item in items)


def _convert_sections(option: Option, given: _ConfigInput) -> tuple[Any, ...]:
    """A list of dataclasses, from a text (one item, its first field), a mapping (one item) or a list of both.

    On the command line a text that begins with [ or { is YAML. Every problem inside goes to `given`.
    """
    written, cls, key = given.written[option.key], option.kind, option.key
    if isinstance(written.value, str) and written.value.lstrip()[:1] in ("[", "{") and not written.quoted:
        where = written.where
        try:
            written = _from_node(yaml.compose(written.value, Loader=yaml.SafeLoader), key, lambda _: where, given)
        except (yaml.YAMLError, RecursionError):
            raise _Unreadable(f"{written.value} (not valid YAML)") from None
    inside = options_of(cls)
    first = next(iter(inside))

    def add(what: str, where: str, expected: str) -> None:
        given.add(f"{key}: {what}", where, expected)
        given.unusable.add(key)

    converted = []
    for item in written.value if isinstance(written.value, list) else [written]:
        texts = item.value if isinstance(item.value, dict) else {first: item}
        values = {}
        for name, text in texts.items():
            if name not in inside:
                near = difflib.get_close_matches(name, inside, n=1, cutoff=0.6)
                hint = f"; did you mean '{near[0]}'?" if near else ""
                add(f"unknown key '{name}'{hint}", text.where, ", ".join(inside))
                continue
            try:
                values[name] = _convert(inside[name], text)
            except _Unreadable as e:
                of = f" of {texts[first].value}" if name != first and first in texts else ""
                add(f"{name} = {e}{of}", text.where, inside[name].type_name)
        if first in values:
            converted.append(cls(**values))
        elif first not in texts:
            add(f"an item without {first}", item.where, option.type_name)
    return tuple(converted)


def _convert_scalar(option: Option, written: Written) -> Scalar:
    text, kind = written.value, option.kind
    if not isinstance(text, str):
        raise _Unreadable(written.summary)
    if option.choices:
        return _convert_choice(option.choices, text)
    if not written.quoted and text.lower() in ("", "~", "null"):
        raise _Unreadable("null" if text else "nothing")
    if kind is str:
        if not written.quoted and text.lower() in ("true", "false"):
            raise _Unreadable(f"{text} (a boolean)")
        return text
    if written.quoted:
        raise _Unreadable(f"'{text}' (a quoted string)")
    if kind is bool:
        if text.lower() not in _TRUE + _FALSE:
            raise _Unreadable(written.summary)
        return text.lower() in _TRUE
    try:
        number = float(re.sub(r"^([+-]?)\.inf$", r"\1inf", text.lower()))
    except ValueError:
        raise _Unreadable(written.summary) from None
    if kind is int and not number.is_integer():
        raise _Unreadable(f"{text} (not a whole number)")
    if math.isnan(number) or not option.accepts(number):
        raise _Unreadable(text)
    if why := beyond_machine(kind, number):
        raise _Unreadable(f"{text} ({why})")
    return int(number) if kind is int else number


def _convert_choice(choices: tuple[str, ...], text: str) -> str:
    if text in choices:
        return text
    by_lower = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(text.lower(), by_lower, n=1)
    meant = by_lower[near[0]] if near else None
    hint = f"; did you mean {meant}?" if meant else ""
    raise _Unreadable(f"{text or 'null'} is not a choice{hint}", meant=meant)


def is_null(text: str) -> bool:
    """Whether YAML and flags read the text, without quotes, as null."""
    return text.lower() in _NULL
