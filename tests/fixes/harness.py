"""Printed fixes are followed to the letter: where they are printed, how a scenario prints one, and what comes of it.

A *site* is a place in mrlhf/ or tools/ that makes a fix: a call with `fix=`, or one of a function with a parameter
`fix`. What only hands an error's fix on is none. A scenario runs a wrong command, takes the printed text, changes the
command as it says, and runs it again.
"""

from __future__ import annotations

import ast
import re
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT

from mrlhf.errors import MrlhfError, SeveralErrors

Place = tuple[str, int, int]  # file, line and column of the call


@dataclass(frozen=True)
class Site:
    file: str
    function: str
    text: str  # the constant parts of the fix

    def __str__(self) -> str:
        return f"{self.file}::{self.function} {self.text!r}"


def _constants(node: ast.AST, scopes: list[Iterable[ast.AST]]) -> str:
    """The constant parts of an expression, and of what function and module assign to the names in it."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    parts = [node]
    for inner in (n for scope in scopes for n in scope):
        if isinstance(inner, ast.Assign):
            targets = {n.id for t in inner.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            parts += [inner.value] if targets & names else []
    texts = [n.value for part in parts for n in ast.walk(part) if isinstance(n, ast.Constant)]
    return " ".join(text.strip() for text in texts if isinstance(text, str) and text.strip())


def _parameters(node: ast.AST) -> list[str]:
    if not isinstance(node, ast.FunctionDef):
        return []
    return [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]


def sites_of(file: Path, root: Path = ROOT) -> dict[Place, Site]:
    tree = ast.parse(file.read_text())
    parents = {child: node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    takes_fix = {
        n.name: [p for p in _parameters(n) if p != "self"].index("fix")
        for n in ast.walk(tree)
        if "fix" in _parameters(n)
    }
    name, found = file.relative_to(root).as_posix(), {}
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        given: ast.AST | None = next((k.value for k in call.keywords if k.arg == "fix"), None)
        called = call.func.id if isinstance(call.func, ast.Name) else getattr(call.func, "attr", "")
        if given is None and called in takes_fix and len(call.args) > takes_fix[called]:
            given = call.args[takes_fix[called]]
        around, node = [], call
        while node in parents:
            node = parents[node]
            around += [node] if isinstance(node, ast.FunctionDef) else []
        if given is None or (isinstance(given, ast.Constant) and given.value is None):
            continue
        if any(isinstance(n, ast.Attribute) and n.attr in ("fix", "_fix") for n in ast.walk(given)):
            continue  # of another error
        if isinstance(given, ast.Name) and any(given.id in _parameters(f) for f in around):
            continue  # its caller's
        function = around[0] if around else None
        text = _constants(given, [ast.walk(function) if function is not None else (), tree.body])
        found[name, call.lineno, call.col_offset] = Site(name, function.name if function else "", text)
    return found


def all_sites() -> dict[Place, Site]:
    files = [*ROOT.glob("mrlhf/**/*.py"), *ROOT.glob("tools/**/*.py")]
    return {place: site for file in sorted(files) for place, site in sites_of(file).items()}


@contextmanager
def recording(sites: dict[Place, Site], reached: set[Place]) -> Iterator[None]:
    """Adds to `reached` the innermost site of every error that is made."""
    plain = MrlhfError.__init__

    def init(self: MrlhfError, *args: Any, **more: Any) -> None:
        plain(self, *args, **more)
        frame = sys._getframe(1) if self.fix else None
        while frame is not None:
            file = Path(frame.f_code.co_filename)
            if file.is_relative_to(ROOT):
                line, _, column, _ = list(frame.f_code.co_positions())[frame.f_lasti // 2]
                place = file.relative_to(ROOT).as_posix(), line or 0, column or 0
                if place in sites:
                    reached.add(place)
                    return
            frame = frame.f_back

    MrlhfError.__init__ = init  # type: ignore[method-assign]
    try:
        yield
    finally:
        MrlhfError.__init__ = plain  # type: ignore[method-assign]


# ---------------------------------------------------------------- scenarios


@dataclass
class Command:
    """What the user gives: a runner, flags, the number of ranks, environment variables."""

    run: Callable[[Command], Any]
    flags: list[str] = field(default_factory=list)
    ranks: int = 1
    env: dict[str, str] = field(default_factory=dict)

    def set(self, flag: str, *values: str) -> None:
        """Puts the flag in place of an earlier one of this name."""
        flag = flag.replace("_", "-")
        kept, skipping = [], False
        for part in self.flags:
            if part.startswith("--"):
                skipping = part.replace("_", "-") == flag
            kept += [] if skipping else [part]
        self.flags = [*kept, flag, *values]


@dataclass(frozen=True)
class Scenario:
    """name      unique
    command   made from the bench
    fix       the printed text: a regular expression for all of it, without the count of rows
    take      the part of it that is followed, for texts with alternatives or reasons; default: all
    fill      values of the placeholders (COLUMN, FILE, ...) in it, in order
    by        follows it instead, for prose: by(bench, command, fix)
    next      the next true problem (regular expression); None: success
    right     called with the bench and the result of the mended command
    """

    name: str
    command: Callable[[Any], Command]
    fix: str
    take: str | None = None
    fill: tuple[Any, ...] = ()
    by: Callable[[Any, Command, str], None] | None = None
    next: str | None = None
    right: Callable[[Any, Any], None] | None = None


By = Callable[[SimpleNamespace, Command, str], None]


def call(
    function: Callable[..., Any], prepared: Callable[[SimpleNamespace], Any] | None = None
) -> Callable[[SimpleNamespace], Command]:
    """A call with the bench; `prepared` runs once before it."""

    def make(bench: SimpleNamespace) -> Command:
        if prepared is not None:
            prepared(bench)
        return Command(lambda command: function(bench))

    return make


def state(function: Callable[[Any], Any], wrong: Any, fix: str, right: Any, name: str, **more: Any) -> Scenario:
    """A call with one argument, which is wrong at first."""

    def make(bench: SimpleNamespace) -> Command:
        bench.value_now = wrong
        return Command(lambda command: function(bench.value_now))

    def by(bench: SimpleNamespace, command: Command, fix: str) -> None:
        bench.value_now = right

    return Scenario(name, make, fix, by=by, **more)


PLACEHOLDER = re.compile(r"\b(COLUMN|FILE|NAME|DIR|VALUE|STEPS|SECONDS|SPLIT|N|HF|OUTPUT)\b")


def follow(command: Command, text: str) -> None:
    """Changes the command as the text says. It fails for a text that is no flags, no command and no export."""
    words = shlex.split(text)
    if words[0] == "export":
        name, _, value = words[1].partition("=")
        command.env[name] = "a" if value == "..." else value
        return
    if words[0].startswith("WORLD_SIZE="):
        command.ranks = int(words[0].partition("=")[2])
        return
    if words[0] == "torchrun":
        counts = dict(zip(words[1::2], words[2::2], strict=False))
        command.ranks = int(counts["--nproc-per-node"]) * int(counts.get("--nnodes", 1))
        return
    if words[0] == "python" and words[1] == "tools/preprocess_data.py" and words[-1] == "...":
        words = words[2:-1]  # of the command that made the data
    at = 0
    assert words, text
    while at < len(words):
        assert re.fullmatch(r"--[\w.-]+", words[at]), f"no flag: {words[at]!r} of {text!r}"
        end = next((i for i in range(at + 1, len(words)) if words[i].startswith("--")), len(words))
        assert end <= at + 2, f"several values: {words[at:end]}"
        command.set(*words[at:end])
        at = end


def attempt(command: Command) -> tuple[list[MrlhfError], Any]:
    """The errors of the command, and its result."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
            patch.delenv(name, raising=False)
        for name, value in command.env.items():
            patch.setenv(name, value)
        try:
            return [], command.run(command)
        except SeveralErrors as several:
            return several.errors, None
        except MrlhfError as error:
            return [error], None


def play(scenario: Scenario, bench: SimpleNamespace) -> None:
    """Runs the scenario to its end. Raises AssertionError where the fix is not what it says, or leads elsewhere."""
    command = scenario.command(bench)
    before, _ = attempt(command)
    fixes = [(e, (e.fix or "").split("     (")[0]) for e in before]
    chosen = [(e, text) for e, text in fixes if re.fullmatch(scenario.fix, text)]
    assert chosen, f"no such fix; printed: {[text for _, text in fixes]} of {[e.what for e in before]}"
    error, text = chosen[0]
    if scenario.by is not None:
        scenario.by(bench, command, text)
    else:
        text = text if scenario.take is None else scenario.take
        assert text in chosen[0][1], f"{text!r} is no part of {chosen[0][1]!r}"
        values = iter(scenario.fill)
        follow(command, PLACEHOLDER.sub(lambda _: shlex.quote(str(next(values))), text))
    after, result = attempt(command)
    assert all(e.what != error.what for e in after), f"the same problem again: {error}"
    if scenario.next is None:
        assert not after, f"another problem: {[str(e) for e in after]}"
    else:
        assert any(re.search(scenario.next, str(e)) for e in after), [str(e) for e in after]
    if scenario.right is not None:
        scenario.right(bench, result)
