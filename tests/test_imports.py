"""Imports go one way, and each outside package that is hard to have stays in one adapter.
Read from the sources, nothing is imported.
"""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# Folders in order: a module may import its own folder's and those of folders before it. Each folder stands here alone,
# so no two folders can import each other. "root" is what everyone may use, "stages" and "entry" are the other modules
# of mrlhf/ itself.
ORDER = (
    "root",
    "observe",
    "config",
    "parallel",
    "data.tokenizers",
    "data",
    "data.prepare",
    "models.families",
    "models.layers",
    "models",
    "memory",
    "checkpoint",
    "training",
    "rl.rollout",
    "rl.rewards",
    "rl",
    "stages",
    "convert",
    "commands",
    "entry",
    "tools",
)
ROOT_MODULES = {
    "root": ("mrlhf", "mrlhf.errors", "mrlhf.losses"),
    "stages": ("mrlhf.pretrain", "mrlhf.sft", "mrlhf.rm", "mrlhf.dpo"),
    "entry": ("mrlhf.cli", "mrlhf.__main__", "mrlhf.export"),
}


def sources() -> dict[str, Path]:
    """Module name -> file."""
    files = [*ROOT.glob("mrlhf/**/*.py"), *ROOT.glob("tools/**/*.py")]
    return {".".join(f.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): f for f in files}


@cache
def imports(file: Path) -> frozenset[str]:
    """Every module that a file imports at any place, with the names of `from x import name` as candidates x.name."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            found |= {node.module or ""} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


def uses(file: Path, package: str) -> bool:
    return any(name == package or name.startswith(package + ".") for name in imports(file))


def folder(module: str) -> str:
    for name, modules in ROOT_MODULES.items():
        if module in modules:
            return name
    if module.startswith("tools."):
        return "tools"
    file = sources()[module]
    return ".".join((file.parent / "__init__").relative_to(ROOT / "mrlhf").parts[:-1])


def own_imports(module: str) -> set[str]:
    """Modules of this repository that `module` imports;
    `from package import submodule` counts as the submodule alone.
    """
    known, found = sources(), imports(sources()[module])
    wanted = {name for name in found if name in known}
    return {name for name in wanted if not any(other.startswith(name + ".") for other in wanted)} - {module}


def test_the_list_names_what_exists_and_nothing_else() -> None:
    assert {folder(module) for module in sources()} == set(ORDER)
    assert len([m for m in sources() if m.count(".") == 1 and sources()[m].name != "__init__.py"]) <= 10
    assert set(sum(ROOT_MODULES.values(), ())) <= set(sources())


def test_imports_go_one_way() -> None:
    place = {name: i for i, name in enumerate(ORDER)}
    wrong = [
        f"{module} imports {other}"
        for module in sources()
        for other in own_imports(module)
        if place[folder(other)] > place[folder(module)]
    ]
    assert not wrong, "; ".join(sorted(wrong))


def test_no_cycles() -> None:
    """graphlib raises CycleError with the cycle. rollout names engine for a type only."""
    graph = {module: own_imports(module) for module in sources()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("package", "files"),
    [
        (
            "vllm",
            "mrlhf/rl/rollout/vllm_engine.py mrlhf/rl/rollout/vllm_first_write.py mrlhf/rl/rollout/vllm_sampler.py "
            "mrlhf/rl/rollout/vllm_weights.py",
        ),
        ("tensorboard", "mrlhf/observe/tracker.py"),
        ("torch.utils.tensorboard", "mrlhf/observe/tracker.py"),
        ("wandb", "mrlhf/observe/tracker.py"),
        ("mlflow", "mrlhf/observe/tracker.py"),
        ("httpx", "mrlhf/rl/rewards/http.py"),
        ("starlette", "mrlhf/rl/rewards/server.py"),
        ("uvicorn", "mrlhf/rl/rewards/server.py"),
    ],
)
def test_one_adapter_imports_it(package: str, files: str) -> None:
    assert {str(f.relative_to(ROOT)) for f in sources().values() if uses(f, package)} <= set(files.split())


def test_data_runs_without_the_training_stack() -> None:
    """Preprocessing is for machines without torch, Megatron or a GPU; the loader alone hands out tensors."""
    for file in (ROOT / "mrlhf/data").rglob("*.py"):
        assert not uses(file, "megatron") and not uses(file, "torch.distributed"), file
        assert file.name == "loader.py" or not uses(file, "torch"), file


@pytest.mark.parametrize("module", ["losses", "rl/advantages", "rl/kl", "rl/policy_loss", "models/layers/logprobs"])
def test_maths_needs_torch_alone(module: str) -> None:
    outside = {name.partition(".")[0] for name in imports(ROOT / f"mrlhf/{module}.py")}
    assert outside <= {"__future__", "collections", "dataclasses", "math", "mrlhf", "torch", "typing"}
