"""Every number among the options has a range in its type, and YAML, `--key` and the errors know it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from mrlhf.config.load import load_config
from mrlhf.config.options import OTHERWISE, STAGES, DataSource
from mrlhf.config.schema import Option, help_text, options_of, range_text
from mrlhf.data.prepare.options import PreprocessConfig, check_options
from mrlhf.errors import MrlhfError

NUMBERS = {
    (stage, key): option
    for stage, cls in STAGES.items()
    for key, option in options_of(cls).items()
    if option.kind in (int, float)
}
CASES = [pytest.param(stage, option, id=f"{stage} {key}") for (stage, key), option in NUMBERS.items()]
SOURCE = {key: option for key, option in options_of(DataSource).items() if option.kind in (int, float)}
PREPROCESS = {key: option for key, option in options_of(PreprocessConfig).items() if option.kind in (int, float)}


def outside(option: Option) -> list[float]:
    """Numbers just outside of the bounds; never one that is valid beside them."""
    limits = option.limits
    assert limits is not None
    step = 1 if option.kind is int else 1e-9
    numbers = [bound for bound in (limits.gt, limits.lt) if bound is not None]
    numbers += [limits.ge - step] if limits.ge is not None else []
    numbers += [limits.le + step] if limits.le is not None else []
    return [n for n in numbers if not (limits.extra and n == limits.extra[OTHERWISE])]


def at_the_bounds(option: Option) -> list[float]:
    limits = option.limits
    assert limits is not None
    numbers = [bound for bound in (limits.ge, limits.le) if bound is not None]
    return numbers + ([limits.extra[OTHERWISE]] if limits.extra else [])


def message(stage: str, config_file: Path | None, flags: list[str]) -> str:
    try:
        load_config(STAGES[stage], config_file and str(config_file), flags)
    except MrlhfError as error:
        return str(error)
    return ""


def by_flag(stage: str, key: str, number: float, _: Path) -> str:
    return message(stage, None, [f"--{key}", str(number)])


def by_yaml(stage: str, key: str, number: float, directory: Path) -> str:
    file, names = directory / "c.yaml", key.split(".")
    lines = [f"{'  ' * depth}{name}:" for depth, name in enumerate(names)]
    file.write_text("\n".join(lines) + f" {number}\n")
    return message(stage, file, [])


def test_every_number_has_a_range_or_says_why_not() -> None:
    assert len(NUMBERS) > 91 and len(SOURCE) == 3 and len(PREPROCESS) == 6
    for key, option in {**{f"{s} {k}": o for (s, k), o in NUMBERS.items()}, **SOURCE, **PREPROCESS}.items():
        assert option.limits is not None, f"{key}: give it a range, Annotated[{option.kind.__name__}, Meta(...)]"
        assert range_text(option.limits) or option.limits.description, f"{key}: why is every number valid?"


@pytest.mark.parametrize(("stage", "option"), CASES)
def test_outside_is_refused_with_the_range_and_the_bound_is_taken(stage: str, option: Option, tmp_path: Path) -> None:
    wanted = f"{option.key} = "
    for how in (by_flag, by_yaml):
        for number in outside(option):
            text = how(stage, option.key, number, tmp_path)
            assert wanted in text and f"expected: {option.type_name}" in text, (how.__name__, number, text)
        for number in at_the_bounds(option):
            text = how(stage, option.key, number, tmp_path)
            assert f"expected: {option.type_name}" not in text.partition(wanted)[2].partition("ConfigError")[0], text
        for number in (math.nan, math.inf):
            if not (option.limits and option.limits.extra and option.limits.extra[OTHERWISE] == number):
                assert wanted in how(stage, option.key, number, tmp_path), (how.__name__, number)
    if range_text(option.limits):  # type: ignore[arg-type]
        assert f"--{option.key} {option.type_name}" in help_text(stage)


@pytest.mark.parametrize(("stage", "option"), CASES)
def test_a_number_that_no_tensor_or_counter_holds_is_refused(stage: str, option: Option) -> None:
    """Such ones ended in tracebacks of torch and NumPy, or as NaN."""
    for number in (2e38 * 2, 1e-39) if option.kind is float else (2**41, 10**20):
        assert f"{option.key} = {number}" in message(stage, None, [f"--{option.key}", str(number)])


def test_the_numbers_of_a_source() -> None:
    for name in SOURCE:
        for number in (0, -1, ".nan", ".inf"):
            text = message("sft", None, ["--data.train", f"[{{prefix: a, {name}: {number}}}]"])
            assert f"data.train: {name} = " in text and "float > 0" in text, text


def test_the_numbers_of_preprocessing(tmp_path: Path) -> None:
    given = {
        "task": "sft",
        "input": ("a", "b"),
        "tokenizer": "t",
        "output_prefix": str(tmp_path / "p"),
        "seq_length": 8,
    }
    for name, option in PREPROCESS.items():
        for number in outside(option):
            value = (number, number) if option.several else number
            errors = check_options(PreprocessConfig(**{**given, name: value}))  # type: ignore[arg-type]
            assert [e for e in errors if range_text(option.limits) in str(e.expected)], (name, number)  # type: ignore[arg-type]
        for number in at_the_bounds(option):
            value = (number, 1) if option.several else number
            assert not check_options(PreprocessConfig(**{**given, name: value})), (name, number)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("stage", "flags", "expected"),
    [
        ("ppo", ["--ppo.lam", "-2"], "float in [0, 1]"),
        ("ppo", ["--ppo.gamma", "3"], "float in [0, 1]"),
        ("sft", ["--optim.adam_beta1", "1.5"], "float in [0, 1)"),
        ("ppo", ["--rollout.top_p", "7"], "float in (0, 1]"),
        ("ppo", ["--kl.target", "-1"], "float > 0 or null"),
        ("sft", ["--optim.lr", "1e-5", "--optim.min_lr", "1e-4"], "float in [0, 1e-05]"),
    ],
)
def test_what_used_to_be_accepted(stage: str, flags: list[str], expected: str) -> None:
    text = message(stage, None, flags)
    assert f"{flags[-2][2:]} = " in text and f"expected: {expected}" in text
