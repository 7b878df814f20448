"""Private names of megatron-core, and changes to its modules, stay in mrlhf/parallel/megatron.py."""

from __future__ import annotations

import ast
import dis
import importlib
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, python

import mrlhf.parallel  # noqa: F401  (adapts megatron.core before its first import)

# isort: split
import torch

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


def asked_for(source: str) -> set[str]:
    """Globals that the functions compare with None, so that they should exist. After `HAVE_... and` they need not."""
    tree = ast.parse(source)
    behind_a_flag = {
        part
        for node in ast.walk(tree)
        if isinstance(node, ast.BoolOp) and any(name.id.startswith("HAVE_") for name in names_in(node))
        for part in ast.walk(node)
    }
    compared = {
        node.left.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.Is, ast.IsNot)) and node not in behind_a_flag
        if isinstance(node.left, ast.Name)
    }
    codes = [code for code in compile(tree, "", "exec").co_consts if isinstance(code, types.CodeType)]
    return compared & {name for code in codes for name in global_names(code)}


def names_in(node: ast.AST) -> Iterator[ast.Name]:
    yield from (part for part in ast.walk(node) if isinstance(part, ast.Name))


def global_names(code: types.CodeType) -> Iterator[str]:
    yield from (i.argval for i in dis.get_instructions(code) if i.opname == "LOAD_GLOBAL")
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from global_names(inner)


def test_megatron_has_the_names_that_it_asks_for(tmp_path: Path) -> None:
    """On CUDA without Transformer Engine: te_general_gemm ended the first forward pass of an expert."""
    program = """
import sys
from pathlib import Path
import mrlhf.training.trainer, mrlhf.checkpoint.manager
from parallel.test_megatron import asked_for
ours = lambda name: name.startswith("megatron.core.") and not name.startswith("megatron.core.distributed.fsdp.")
modules = [m for name, m in sys.modules.items() if ours(name) and m.__file__]
modules = {m: asked_for(Path(m.__file__).read_text()) for m in modules if m.__file__.endswith(".py")}
print("asked", sum(map(len, modules.values())))
print("missing", {m.__name__: sorted(names - vars(m).keys()) for m, names in modules.items() if names - vars(m).keys()})
"""
    (tmp_path / "program.py").write_text(program)
    lines = python(tmp_path / "program.py", device="rehearsal").stdout.splitlines()
    assert int(next(line for line in lines if line.startswith("asked"))[5:]) > 10
    assert "missing {}" in lines


def test_experts_get_their_tokens_in_megatrons_order() -> None:
    """Without its mask, for whose count the host of a GPU waits."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    ours = moe_utils.permute
    assert token_dispatcher.permute is ours
    (real,) = (cell.cell_contents for cell in ours.__closure__)
    generator = torch.Generator().manual_seed(0)
    tokens, weights = torch.randn(9, 4, generator=generator), torch.rand(9, 5, generator=generator)
    routing_map = torch.zeros(9, 5, dtype=torch.bool).scatter(1, weights.topk(2).indices, True)
    for one, other in zip(ours(tokens, routing_map, weights, 18), real(tokens, routing_map, weights, 18), strict=True):
        assert torch.equal(one, other)


def test_megatrons_globals_stay_empty() -> None:
    """Models take their groups as an argument (parallel/state.py): what reads the globals must fail, not take another
    model's groups.
    """
    for file in ROOT.glob("mrlhf/**/*.py"):
        assert "parallel_state." not in file.read_text() or file == OWNER, file
