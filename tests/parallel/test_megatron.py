"""Private names of megatron-core, and changes to its modules, stay in mrlhf/parallel/megatron.py."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator

import pytest
from conftest import ROOT

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import)

OWNER = ROOT / "mrlhf/parallel/megatron.py"


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def megatron_names(tree: ast.AST) -> Iterator[tuple[str, str, str]]:
    """(name in this file, module of megatron, name there or "") of every import, at any depth of the file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.partition(".")[0] == "megatron":
                    yield alias.asname or "megatron", alias.name, ""
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "megatron":
            for alias in node.names:
                yield alias.asname or alias.name, str(node.module), alias.name


def root_name(node: ast.expr) -> str:
    """`a` of `a.b.c`."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


def assigned(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, ast.Assign):
        return [
            part for target in node.targets for part in (target.elts if isinstance(target, ast.Tuple) else [target])
        ]
    return [node.target] if isinstance(node, (ast.AugAssign, ast.AnnAssign)) else []


def violations(source: str) -> list[str]:
    tree = ast.parse(source)
    imports = list(megatron_names(tree))
    local = {name for name, _, _ in imports}
    problems = [
        f"imports {module}.{name}"
        for _, module, name in imports
        if is_private(name) or any(map(is_private, module.split(".")))
    ]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and is_private(node.attr) and root_name(node) in local:
            problems.append(f"{node.lineno}: reads {ast.unparse(node)}")
        problems += [
            f"{target.lineno}: assigns {ast.unparse(target)}"
            for target in assigned(node)
            if isinstance(target, ast.Attribute) and root_name(target) in local
        ]
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("setattr", "delattr", "vars")
        ):
            problems += [
                f"{node.lineno}: {ast.unparse(node)}" for argument in node.args[:1] if root_name(argument) in local
            ]
        if isinstance(node, ast.ClassDef):
            problems += [f"{node.name} overrides {name}" for name in overridden(node, imports)]
    return problems


def overridden(node: ast.ClassDef, imports: list[tuple[str, str, str]]) -> Iterator[str]:
    """Private methods of a subclass that its base from Megatron, and not torch's Module, has too."""
    import torch

    where = {name: (module, there) for name, module, there in imports if there}
    for base in (b.id for b in node.bases if isinstance(b, ast.Name) and b.id in where):
        module, there = where[base]
        methods = [part.name for part in node.body if isinstance(part, ast.FunctionDef) and is_private(part.name)]
        cls = getattr(importlib.import_module(module), there)
        yield from (name for name in methods if hasattr(cls, name) and not hasattr(torch.nn.Module, name))


def test_only_one_file_knows_private_names() -> None:
    files = [file for file in ROOT.glob("mrlhf/**/*.py") if file != OWNER]
    problems = {str(file.relative_to(ROOT)): violations(file.read_text()) for file in files}
    assert not {file: texts for file, texts in problems.items() if texts}


@pytest.mark.parametrize(
    "line",
    [
        "from megatron.core.optimizer import _get_param_groups",
        "from megatron.core import parallel_state as p\np._TENSOR_MODEL_PARALLEL_GROUP",
        "from megatron.core import optimizer\noptimizer.Adam, x = object, 1",
        "from megatron.core import optimizer\nsetattr(optimizer, 'Adam', object)",
        "from megatron.core import parallel_state\nvars(parallel_state).update({})",
        "import megatron.core.jit\nmegatron.core.jit.jit_fuser = None",
        "from megatron.core.models.gpt import GPTModel\nclass A(GPTModel):\n    def _postprocess(self): pass",
    ],
)
def test_the_rule_sees_each_way(line: str) -> None:
    assert violations(line)


def test_megatrons_globals_stay_empty() -> None:
    """Models take their groups as an argument (parallel/state.py): what reads the globals must fail, not take another
    model's groups.
    """
    for file in ROOT.glob("mrlhf/**/*.py"):
        assert "parallel_state." not in file.read_text() or file == OWNER, file
