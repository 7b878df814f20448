"""Configurations in and out: strict YAML and `--section.key VALUE`, through one checker.

Every value keeps the place it was written at, so that each problem names a file and line or a flag, and
all problems are raised together. Numbers are read from their text by the option's type: PyYAML alone
would make `1e-5` a string and `010` an eight.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
import shutil
import textwrap
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from mrlhf import __version__
from mrlhf.config.check import check
from mrlhf.config.options import STAGES, OneOf, StageConfig
from mrlhf.errors import ConfigError, Problems

_NULL = ("null", "none", "~", "")
_TRUE, _FALSE = ("true", "yes", "on"), ("false", "no", "off")


@dataclass(frozen=True)
class Option:
    """One leaf of a stage's configuration; `default` is `dataclasses.MISSING` where the user must give it."""

    key: str
    type: Any
    default: Any
    help: str

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def optional(self) -> bool:
        return types.NoneType in typing.get_args(self.type)

    @property
    def base(self) -> Any:
        """The type without `| None`."""
        return typing.get_args(self.type)[0] if self.optional else self.type

    @property
    def is_tuple(self) -> bool:
        """Several scalars."""
        return typing.get_origin(self.base) is tuple and not self.is_list

    @property
    def is_list(self) -> bool:
        """A list of mappings, each one dataclass; a text stands for one of them with only its first field."""
        return typing.get_origin(self.base) is tuple and dataclasses.is_dataclass(typing.get_args(self.base)[0])

    @property
    def type_name(self) -> str:
        return _type_name(self.base) + (" or null" if self.optional else "")

    @property
    def fix(self) -> str | None:
        return None if self.required else f"--{self.key} {_show(self.default)}"


@dataclass(frozen=True)
class Written:
    """Something the user wrote for a key: a text, a list of texts, or a nested mapping, and its place.

    `quoted` texts are strings in YAML's eyes too, and are never read as null or as a number.
    """

    value: str | list[Written] | dict[str, Written]
    where: str
    quoted: bool = False


@dataclass
class _Found:
    """What has been read so far: values and sections with their places, and the keys whose value cannot be trusted."""

    known: dict[str, Option]
    path: str | None
    written: dict[str, Written] = field(default_factory=dict)
    sections: dict[str, str] = field(default_factory=dict)
    suspect: set[str] = field(default_factory=set)
    problems: Problems = field(default_factory=Problems)

    def place(self, key: str) -> str:
        if key in self.written:
            return self.written[key].where
        return self.sections.get(key.rpartition(".")[0], self.path or "command line")


class Bad(ValueError):
    """A text that is not of the option's type; the message says what it is."""


def options(stage_cls: Any, prefix: str = "") -> dict[str, Option]:
    """Dotted key -> Option, in the order of the dataclasses."""
    hints = typing.get_type_hints(stage_cls, include_extras=True)
    found: dict[str, Option] = {}
    for f in dataclasses.fields(stage_cls):
        kind, key = hints[f.name], prefix + f.name
        leaf = {key: Option(key, kind, f.default, f.metadata.get("help", ""))}
        found.update(options(kind, key + ".") if dataclasses.is_dataclass(kind) else leaf)
    return found


def load_config(stage_cls: type, path: str | None, overrides: list[str]) -> Any:
    """The stage's configuration from a YAML file (optional) and command-line overrides, which win.

    Raises one `ConfigError`, or `SeveralErrors` with every problem of file, flags and `config_check.check`.
    """
    found = _Found(options(stage_cls), path)
    if path is not None and (root := _compose(path)) is not None:
        _flatten(root, path, "", found)
    _parse_overrides(overrides, found)

    values: dict[str, Any] = {}
    for key, opt in found.known.items():
        values[key] = _placeholder(opt) if opt.required else opt.default
        if key in found.written:
            try:
                values[key] = _convert_list(opt, found) if opt.is_list else _convert(opt, found.written[key])
            except Bad as e:
                found.problems.add(ConfigError(f"{key} = {e}", where=found.place(key), expected=opt.type_name, fix=opt.fix))
                found.suspect.add(key)
        elif opt.required:
            if key not in found.suspect:
                expected = f"{opt.type_name}: {opt.help}"
                found.problems.add(ConfigError(f"{key} is missing", where=found.place(key), expected=expected, fix=f"--{key} VALUE"))
            found.suspect.add(key)

    config = _build(stage_cls, values)
    for problem in check(config):
        if not _touches(problem, found.suspect):
            where = found.place(problem.where or "")
            found.problems.add(ConfigError(problem.what, where=where, expected=problem.expected, fix=problem.fix))
    found.problems.raise_if_any()
    return config


def dump_yaml(config: StageConfig) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    stage = next((name for name, cls in STAGES.items() if cls is type(config)), type(config).__name__)
    return f"# mrlhf {__version__}, {stage}\n" + yaml.dump(_plain(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)


def _plain(value: Any) -> Any:
    """As YAML has it: a dataclass is a mapping; one in a list is what the user writes there, without what is unset."""
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, tuple) and value and dataclasses.is_dataclass(value[0]):
        items = [{k: v for k, v in _plain(item).items() if v is not None} for item in value]
        return next(iter(items[0].values())) if len(items) == 1 and len(items[0]) == 1 else items
    return list(value) if isinstance(value, tuple) else value


def diff(before: Any, after: Any) -> list[str]:
    """What differs between two configurations: `train.seed: 1 -> 2`, in the order of the options."""
    a, b = _leaves(before), _leaves(after)
    pairs = {key: (a.get(key, "(absent)"), b.get(key, "(absent)")) for key in {**a, **b}}
    return [f"{key}: {_show(old)} -> {_show(new)}" for key, (old, new) in pairs.items() if old != new]


def help_text(stage_name: str) -> str:
    """Every option of a stage, grouped by section: `--section.key TYPE (default)  help`."""
    width = max(80, min(160, shutil.get_terminal_size((120, 40)).columns))
    config = "[--config FILE]" if stage_name in ("score", "generate", "serve-reward") else "--config FILE"
    lines = [f"usage: mrlhf {stage_name} {config} [--dry-run] [--section.key VALUE ...]", ""]
    lines += ["  --config FILE    YAML with the options below; flags win over it"]
    lines += ["  --dry-run        check everything without a GPU and stop"]
    section = None
    for key, opt in options(STAGES[stage_name]).items():
        if key.rpartition(".")[0] != section:
            section = key.rpartition(".")[0]
            lines += ["", section or "options"]
        default = "required" if opt.required else _show(opt.default)
        left = f"  --{key} {opt.type_name} ({default})"
        wrapped = textwrap.wrap(opt.help, width - 62, break_long_words=False) or [""]
        lines, left = ([*lines, left], "") if len(left) > 60 else (lines, left)
        lines += [f"{left:<61} {wrapped[0]}"] + [f"{'':<61} {line}" for line in wrapped[1:]]
    return "\n".join(line.rstrip() for line in lines) + "\n"


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_convert` would otherwise read as null."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if _is_null(text) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def _compose(path: str) -> yaml.Node | None:
    file = Path(path)
    if not file.is_file():
        names = [p.name for p in file.parent.iterdir() if p.suffix in (".yaml", ".yml")] if file.parent.is_dir() else []
        near = difflib.get_close_matches(file.name, names, n=1, cutoff=0.5)
        raise ConfigError(
            "is a directory" if file.is_dir() else "no such file",
            where=path,
            expected="a YAML file",
            fix=f"--config {file.parent / near[0]}" if near else None,
        )
    try:
        return yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as e:
        mark = e.problem_mark or e.context_mark
        raise ConfigError(f"not valid YAML: {e.problem or e.context}", where=f"{path}:{mark.line + 1}" if mark else path) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as e:
        raise ConfigError(f"cannot be read: {' '.join(str(e).split())}", where=path) from None


def _flatten(node: yaml.Node, path: str, prefix: str, found: _Found) -> None:
    """Records every key below a mapping node with its file:line."""
    if isinstance(node, yaml.ScalarNode) and _is_null(node.value) and not node.style:
        return
    if not isinstance(node, yaml.MappingNode):
        what = f"{prefix[:-1] or 'the file'} holds {_describe(_from_node(node, path))}"
        found.problems.add(ConfigError(what, where=f"{path}:{node.start_mark.line + 1}", expected="`key: value` lines"))
        found.suspect.update(k for k in found.known if k.startswith(prefix))
        return
    seen: dict[str, str] = {}
    for key_node, value_node in node.value:
        key, where = f"{prefix}{key_node.value}", f"{path}:{key_node.start_mark.line + 1}"
        first = seen.get(key) or (found.written[key].where if key in found.written else None)
        if first:
            found.problems.add(ConfigError(f"{key} is given twice; first at {first}", where=where, fix="remove one of them"))
            continue
        seen[key] = where
        if key in found.known:
            found.written[key] = dataclasses.replace(_from_node(value_node, path), where=where)
        elif any(k.startswith(key + ".") for k in found.known):
            found.sections[key] = where
            _flatten(value_node, path, key + ".", found)
        else:
            found.problems.add(_unknown(key, where, found, flag=False))


def _from_node(node: yaml.Node, path: str) -> Written:
    where = f"{path}:{node.start_mark.line + 1}"
    if isinstance(node, yaml.ScalarNode):
        return Written(node.value, where, quoted=bool(node.style))
    if isinstance(node, yaml.SequenceNode):
        return Written([_from_node(n, path) for n in node.value], where)
    mapping: dict[str, Written] = {}
    for key, value in node.value:
        if str(key.value) in mapping:
            raise ConfigError(f"{key.value} is given twice", where=f"{path}:{key.start_mark.line + 1}", fix="remove one of them")
        mapping[str(key.value)] = _from_node(value, path)
    return Written(mapping, where)


def _parse_overrides(args: list[str], found: _Found) -> None:
    """`--key VALUE`, `--key=VALUE`, `--bool`; a tuple takes several values, repeated or separated by commas."""
    known, problems = found.known, found.problems
    flags: dict[str, Written] = {}
    at = 0
    while at < len(args):
        arg = args[at]
        at += 1
        if not arg.startswith("--") or arg == "--":
            fix = f"--config {arg}" if arg.endswith((".yaml", ".yml")) else f"--{arg}" if "=" in arg else None
            problems.add(ConfigError(f"unexpected argument '{arg}'", where="command line", expected="--section.key VALUE", fix=fix))
            continue
        name, equals, text = arg.partition("=")
        key = name[2:].replace("-", "_")
        where = f"--{key} on the command line"
        opt = known.get(key)
        values = [text] if equals else []
        while not equals and at < len(args) and not args[at].startswith("--") and (not values or (opt is not None and opt.is_tuple)):
            values.append(args[at])
            at += 1
        if opt is None:
            inside = [f"--{k}" for k in known if k.startswith(key + ".")]
            section = ConfigError(f"{key} is a section", where=where, expected=", ".join(inside))
            problems.add(section if inside else _unknown(key, where, found, flag=True))
        elif not values and opt.base is not bool:
            problems.add(ConfigError(f"{key} has no value", where=where, expected=opt.type_name, fix=opt.fix))
            found.suspect.add(key)
        elif opt.is_tuple and not (len(values) == 1 and _is_null(values[0])):
            parts = [Written(part, where) for value in values for part in _split(value)]
            before = flags[key].value if key in flags and isinstance(flags[key].value, list) else []
            flags[key] = Written([*before, *parts], where)
        else:
            flags[key] = Written(values[0] if values else "true", where)
    found.written.update(flags)


def _split(text: str) -> list[str]:
    """At commas; but a URL that follows a URL stays with it, being one more endpoint of the same source."""
    parts: list[str] = []
    for piece in text.strip().removeprefix("[").removesuffix("]").split(","):
        piece = piece.strip()
        if parts and re.match(r"https?://", piece) and re.match(r"https?://", parts[-1]):
            parts[-1] += "," + piece
        elif piece:
            parts.append(piece)
    return parts


def _convert(opt: Option, written: Written) -> Any:
    null = isinstance(written.value, str) and not written.quoted and _is_null(written.value)
    if null and (opt.optional or opt.is_tuple):
        return None if opt.optional else ()
    if opt.is_tuple:
        items = written.value
        if isinstance(items, str):
            items = [dataclasses.replace(written, value=part) for part in _split(items)]
        if not isinstance(items, list):
            raise Bad(_describe(written))
        return tuple(_convert_scalar(typing.get_args(opt.base)[0], item) for item in items)
    return _convert_scalar(opt.base, written)


def _convert_list(opt: Option, found: _Found) -> tuple[Any, ...]:
    """A list of dataclasses, from a text (one item, its first field), a mapping (one item) or a list of both. On the command line a
    text that begins with [ or { is YAML. What is wrong in it goes to `found`, all of it."""
    written, cls = found.written[opt.key], typing.get_args(opt.base)[0]
    if isinstance(written.value, str) and written.value.lstrip()[:1] in ("[", "{") and not written.quoted:
        try:
            node = yaml.compose(written.value, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            raise Bad(f"{written.value} (not valid YAML)") from None
        written = _placed(_from_node(node, ""), written.where)
    items = written.value if isinstance(written.value, list) else [written]
    known = options(cls)
    first = next(iter(known))
    converted = []

    def wrong(what: str, item: Written, expected: str) -> None:
        found.problems.add(ConfigError(f"{opt.key}: {what}", where=item.where, expected=expected))
        found.suspect.add(opt.key)

    for item in items:
        given = item.value if isinstance(item.value, dict) else {first: item}
        values = {}
        for name, value in given.items():
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
                wrong(f"unknown key '{name}'" + (f"; did you mean '{near[0]}'?" if near else ""), value, ", ".join(known))
                continue
            try:
                values[name] = _convert(known[name], value)
            except Bad as e:
                wrong(f"{name} = {e}", value, known[name].type_name)
        if first in values:
            converted.append(cls(**values))
        elif first not in given:
            wrong(f"an item without {first}", item, opt.type_name)
    return tuple(converted)


def _placed(written: Written, where: str) -> Written:
    """The same, with everything in it standing at `where`."""
    value = written.value
    if isinstance(value, list):
        value = [_placed(item, where) for item in value]
    elif isinstance(value, dict):
        value = {name: _placed(item, where) for name, item in value.items()}
    return dataclasses.replace(written, value=value, where=where)


def _convert_scalar(kind: Any, written: Written) -> Any:
    text = written.value
    if not isinstance(text, str):
        raise Bad(_describe(written))
    if choices := _choices(kind):
        if text in choices:
            return text
        by_lower = {c.lower(): c for c in choices}
        near = difflib.get_close_matches(text.lower(), by_lower, n=1)
        raise Bad(f"{text or 'null'} is not a choice" + (f"; did you mean {by_lower[near[0]]}?" if near else ""))
    if not written.quoted and text.lower() in ("", "~", "null"):
        raise Bad("null" if text else "nothing")
    if kind is str:
        if not written.quoted and text.lower() in ("true", "false"):
            raise Bad(f"{text} (a boolean)")
        return text
    if written.quoted:
        raise Bad(f"'{text}' (a quoted string)")
    if kind is bool and text.lower() in _TRUE + _FALSE:
        return text.lower() in _TRUE
    if kind is bool:
        raise Bad(_describe(written))
    try:
        number = float(re.sub(r"^([+-]?)\.inf$", r"\1inf", text.lower()))
    except ValueError:
        raise Bad(_describe(written)) from None
    if math.isnan(number) or (kind is int and not number.is_integer()):
        raise Bad(f"{text} (not a whole number)" if kind is int else text)
    return int(number) if kind is int else number


def _unknown(key: str, where: str, found: _Found, *, flag: bool) -> ConfigError:
    """Names the nearest valid keys: misspelt in its section, or right in another one, or misspelt anywhere."""
    known = list(found.known)
    section, _, leaf = key.rpartition(".")
    leaves = {k: k.rpartition(".")[2] for k in known}
    siblings = [k for k in known if k.rpartition(".")[0] == section]
    tops = list(dict.fromkeys(k.partition(".")[0] for k in known))
    inside = {leaves[k]: k for k in siblings} if section else {top: top for top in tops}
    near = [inside[word] for word in difflib.get_close_matches(leaf, inside, n=2, cutoff=0.7)]
    near += [k for k in known if leaves[k] == leaf and k not in near]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    if not near:
        near = [k for k in known if leaves[k] in difflib.get_close_matches(leaf, list(leaves.values()), n=1, cutoff=0.8)]
    found.suspect.update(k for n in near for k in known if k == n or k.startswith(n + "."))
    hint = "; did you mean " + " or ".join(f"'{'--' if flag else ''}{n}'" for n in near[:3]) + "?" if near else ""
    valid = f"{section}: {', '.join(leaves[k] for k in siblings)}" if section and siblings else f"one of {', '.join(tops)}"
    return ConfigError(f"unknown key '{key}'{hint}", where=where, expected=valid)


def _touches(problem: ConfigError, suspect: set[str]) -> bool:
    """Whether a contradiction speaks of a key whose value could not be read, and may thus be untrue."""
    return problem.where in suspect or any(re.search(rf"\b{key.rpartition('.')[2]}\b(?!\.)", problem.what) for key in suspect)


def _build(cls: Any, values: dict[str, Any], prefix: str = "") -> Any:
    types = typing.get_type_hints(cls)
    hints = {f.name: types[f.name] for f in dataclasses.fields(cls)}
    sections = {name: _build(kind, values, f"{prefix}{name}.") for name, kind in hints.items() if dataclasses.is_dataclass(kind)}
    return cls(**sections, **{name: values[prefix + name] for name in hints if name not in sections})


def _placeholder(opt: Option) -> Any:
    return () if opt.is_tuple or opt.is_list else {int: 1, float: 1.0, bool: False}.get(opt.base, "?")


def _is_null(text: str) -> bool:
    return text.lower() in _NULL


def _describe(written: Written) -> str:
    if isinstance(written.value, str):
        return f"'{written.value}'"
    return f"a list of {len(written.value)}" if isinstance(written.value, list) else "a mapping"


def _choices(kind: Any) -> tuple[str, ...]:
    """Of a Literal, or of a text marked with OneOf; empty for other types."""
    tables = [mark.rows for mark in getattr(kind, "__metadata__", ()) if isinstance(mark, OneOf)]
    return tuple(tables[0]) if tables else typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


def _type_name(kind: Any) -> str:
    if choices := _choices(kind):
        return "{" + ",".join(choices) + "}"
    if typing.get_origin(kind) is tuple and dataclasses.is_dataclass(item := typing.get_args(kind)[0]):
        names = [f.name for f in dataclasses.fields(item)]
        return f"{names[0]} or [{{{', '.join(names)}}}, ...]"
    if typing.get_origin(kind) is tuple:
        return f"{_type_name(typing.get_args(kind)[0])} ..."
    return {bool: "true|false", str: "text"}.get(kind, kind.__name__)


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        found.update(_leaves(value, f"{prefix}{f.name}.") if dataclasses.is_dataclass(value) else {prefix + f.name: value})
    return found


def _show(value: Any) -> str:
    if dataclasses.is_dataclass(value):
        parts = {k: v for k, v in vars(value).items() if v is not None}
        return "{" + ", ".join(f"{k}: {_show(v)}" for k, v in parts.items()) + "}" if len(parts) > 1 else _show(*parts.values())
    if isinstance(value, tuple):
        return ",".join(_show(v) for v in value) or "none"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
