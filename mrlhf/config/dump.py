"""Configurations out: as YAML that load.py reads back, and the differences between two of them."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import yaml

from mrlhf import __version__
from mrlhf.config.load import Value, is_null
from mrlhf.config.options import STAGES, StageConfig
from mrlhf.config.schema import show_value


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that `_convert` would otherwise read as null."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style="'" if is_null(text) else None)


_Dumper.add_representer(str, _Dumper.represent_str)


def dump_yaml(config: StageConfig) -> str:
    """YAML that `load_config` reads back to an equal configuration."""
    stage = next((name for name, cls in STAGES.items() if cls is type(config)), type(config).__name__)
    text = yaml.dump(_mapping(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=1000)
    return f"# mrlhf {__version__}, {stage}\n{text}"


def stage_of(text: str) -> str | None:
    """The stage in the first line of what `dump_yaml` wrote; None for another text."""
    name = text.partition("\n")[0].rpartition(", ")[2]
    return name if name in STAGES else None


def _mapping(section: Any) -> dict[str, object]:
    """A dataclass as YAML has it: sections are mappings, tuples are lists."""
    return {f.name: _yaml_value(getattr(section, f.name)) for f in fields(section)}


def _yaml_value(value: object) -> object:
    if is_dataclass(value):
        return _mapping(value)
    if isinstance(value, tuple) and value and is_dataclass(value[0]):  # as the user writes it, without unset fields
        items = [{k: v for k, v in _mapping(item).items() if v is not None} for item in value]
        return next(iter(items[0].values())) if len(items) == 1 and len(items[0]) == 1 else items
    return list(value) if isinstance(value, tuple) else value


def diff(before: StageConfig, after: StageConfig, *, same: Callable[[Any, Any], bool] = operator.eq) -> list[str]:
    """What differs between two configurations: `train.seed: 1 -> 2`, in the order of the options."""
    a, b = _leaves(before), _leaves(after)
    pairs = {key: (a.get(key, "(absent)"), b.get(key, "(absent)")) for key in {**a, **b}}
    return [f"{key}: {show_value(old)} -> {show_value(new)}" for key, (old, new) in pairs.items() if not same(old, new)]


def _leaves(node: Any, prefix: str = "") -> dict[str, Value]:
    """Dotted key -> value."""
    leaves: dict[str, Value] = {}
    for f in fields(node):
        value = getattr(node, f.name)
        leaves |= _leaves(value, f"{prefix}{f.name}.") if is_dataclass(value) else {prefix + f.name: value}
    return leaves
