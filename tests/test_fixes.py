"""Every printed fix leads to success or to the next true problem (tests/fixes/)."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import sys
from functools import cached_property
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from conftest import ROOT, make_tokenizer
from fixes import columns, inputs, machine, models, options, remedies, rl, sets, templates, tokenizers
from fixes.harness import Place, Scenario, all_sites, play, recording
from fixes.not_followed import NOT_FOLLOWED

ROOMS = (options, columns, templates, inputs, sets, tokenizers, models, rl, machine)
SCENARIOS = [scenario for room in ROOMS for scenario in room.SCENARIOS]


class Bench:
    """What scenarios share, read only, and `tmp`, a new directory for each."""

    def __init__(self, world: Path, root: Path) -> None:
        self.world, self.root, self.tmp = world, root, root

    def _model(self, name: str, **changes: object) -> Path:
        """The world's model with another config.json; weights are a link."""
        made = self.root / name
        shutil.copytree(self.world / "qwen2", made, copy_function=os.link)
        config = made / "config.json"
        content = json.loads(config.read_text()) | changes
        config.unlink()
        config.write_text(json.dumps(content))
        return made

    @cached_property
    def value(self) -> Path:
        return self._model("value", architectures=["Qwen2ForSequenceClassification"])

    @cached_property
    def short_model(self) -> Path:
        return self._model("short", max_position_embeddings=64)

    @cached_property
    def no_template(self) -> Path:
        made = self._model("bare")
        (made / "chat_template.jinja").unlink()
        return made

    @cached_property
    def other_data(self) -> str:
        make_tokenizer(self.root / "other", ["an entirely other text, with other merges"] * 4, vocab_size=300)
        prefix = str(self.root / "other_data")
        argv = [
            "--task",
            "sft",
            "--input",
            str(self.world / "sft.jsonl"),
            "--tokenizer",
            str(self.root / "other"),
            "--output-prefix",
            prefix,
            "--seq-length",
            "160",
            "--workers",
            "1",
        ]
        assert self.load("tools/preprocess_data.py").main(argv) == 0
        return prefix

    @staticmethod
    def load(script: str) -> ModuleType:
        name = f"script_{Path(script).stem}"
        if name not in sys.modules:
            spec = importlib.util.spec_from_file_location(name, ROOT / script)
            assert spec is not None and spec.loader is not None
            sys.modules[name] = module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        return sys.modules[name]


@pytest.fixture(scope="module")
def played(world: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Every scenario, once: name -> what went wrong in it, and the places that were reached."""
    sites, reached, failures = all_sites(), set[Place](), dict[str, Exception]()
    bench = Bench(world, tmp_path_factory.mktemp("bench"))
    for number, scenario in enumerate(SCENARIOS):
        bench.tmp = bench.root / str(number)
        bench.tmp.mkdir()
        try:
            with recording(sites, reached):
                play(scenario, bench)
        except Exception as error:
            failures[scenario.name] = error
    return SimpleNamespace(sites=sites, reached=reached, failures=failures)


def test_names_are_unique() -> None:
    names = [scenario.name for scenario in SCENARIOS]
    assert not [name for name in names if names.count(name) > 1]


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_a_fix_leads_on(scenario: Scenario, played: SimpleNamespace) -> None:
    if scenario.name in played.failures:
        raise played.failures[scenario.name]


def test_every_fix_is_followed_or_says_why_not(played: SimpleNamespace) -> None:
    """A new fix needs a scenario in tests/fixes/, or a line in its NOT_FOLLOWED."""
    left, unused = [], set(NOT_FOLLOWED)
    for place, site in played.sites.items():
        named = [key for key in NOT_FOLLOWED if key[:2] == (site.file, site.function)]
        reasons = [key for key in named if (key[2] in site.text if key[2] else not site.text)]
        unused -= set(reasons)
        if place not in played.reached and not reasons:
            left.append(f"{place[0]}:{place[1]} {site.function} {site.text!r}")
    assert not left, "no scenario prints the fix of\n" + "\n".join(left)
    assert not unused, f"there is no such fix any more: {unused}"


def test_each_remedy_for_memory_passes_the_checks_and_needs_no_permission(
    world: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    bench = Bench(world, tmp_path_factory.mktemp("remedies"))
    assert not (wrong := remedies.problems(bench)), "\n".join(wrong)


def test_no_text_says_fix_by_itself() -> None:
    """A fix is an error's, and then a site; beside errors.py only the watch writes one itself."""
    texts = {f: f.read_text() for f in (*ROOT.glob("mrlhf/**/*.py"), *ROOT.glob("tools/**/*.py"))}
    files = [f for f, text in texts.items() if re.search(r'["n]  fix:      ', text)]
    assert {f.relative_to(ROOT).as_posix() for f in files} == {"mrlhf/errors.py", "mrlhf/parallel/watch.py"}
