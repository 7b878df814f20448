"""Imports go one way, and each outside package that is hard to have stays in one adapter. Read from the sources, nothing is imported."""

from __future__ import annotations

import ast
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

# A module may import its own layer and those above it in this list. The longest name that fits counts.
LAYERS = (
    ("mrlhf", "mrlhf.errors", "mrlhf.metrics", "mrlhf.redaction"),
    ("mrlhf.config", "mrlhf.config_check", "mrlhf.config_io"),
    ("mrlhf.parallel",),
    ("mrlhf.data", "mrlhf.models", "mrlhf.losses", "mrlhf.rl.advantages", "mrlhf.rl.kl", "mrlhf.rl.policy_loss", "mrlhf.rl.rewards",
     "mrlhf.rl.reward_child", "mrlhf.rl.reward_process", "mrlhf.rl.reward_http", "mrlhf.rl.reward_server",
     "mrlhf.rl.shaping", "mrlhf.rl.best_of", "mrlhf.rl", "mrlhf.tokenizer", "mrlhf.plan", "mrlhf.activations", "mrlhf.memory", "mrlhf.less_memory",
     "mrlhf.safe_pickle", "mrlhf.spikes"),
    ("mrlhf.checkpoint", "mrlhf.manifest", "mrlhf.randomness", "mrlhf.saving", "mrlhf.saver", "mrlhf.resume", "mrlhf.stopping", "mrlhf.heartbeat",
     "mrlhf.dist_io", "mrlhf.engine", "mrlhf.preflight", "mrlhf.tracking", "mrlhf.report", "mrlhf.profiling", "mrlhf.inspection",
     "mrlhf.rl.vllm_engine", "mrlhf.rl.vllm_sampler", "mrlhf.rl.vllm_weights",
     "mrlhf.rl.rollout", "mrlhf.rl.environments", "mrlhf.rl.describe", "mrlhf.rl.updates", "mrlhf.rl.phases", "mrlhf.rl.sampler",
     "mrlhf.rl.remote"),
    ("mrlhf.supervised", "mrlhf.references", "mrlhf.pretrain", "mrlhf.sft", "mrlhf.rm", "mrlhf.dpo", "mrlhf.score", "mrlhf.generate",
     "mrlhf.serve_reward", "mrlhf.convert", "mrlhf.verify", "mrlhf.model_card",
     "mrlhf.rl.reward_sources", "mrlhf.rl.prompts", "mrlhf.rl.ppo"),
    ("mrlhf.cli", "mrlhf.__main__", "mrlhf.dryrun", "mrlhf.doctor", "mrlhf.tool", "mrlhf.export"),
    ("tools",),
)  # fmt: skip
PACKAGES = ("mrlhf", "mrlhf.rl")  # stand in the list for their own __init__.py, not for what lies in them
LAYER_OF = {name: i for i, names in enumerate(LAYERS) for name in names}


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


def layer(module: str) -> int:
    name = module
    while name not in LAYER_OF or (name in PACKAGES and name != module):
        assert "." in name, f"{module} belongs to no layer: say in tests/test_imports.py which one"
        name = name.rpartition(".")[0]
    return LAYER_OF[name]


def own_imports(module: str) -> set[str]:
    """Modules of this repository that `module` imports; `from package import submodule` counts as the submodule alone."""
    known, found = sources(), imports(sources()[module])
    wanted = {name for name in found if name in known}
    return {name for name in wanted if not any(other.startswith(name + ".") for other in wanted)} - {module}


def test_imports_go_one_way() -> None:
    wrong = [f"{module} imports {other}" for module in sources() for other in own_imports(module) if layer(other) > layer(module)]
    assert not wrong, "; ".join(sorted(wrong))


def test_no_cycles() -> None:
    """graphlib raises CycleError with the cycle. rollout names engine for a type only."""
    graph = {module: own_imports(module) for module in sources()}
    assert list(TopologicalSorter(graph).static_order())


@pytest.mark.parametrize(
    ("package", "files"),
    [
        ("vllm", "mrlhf/rl/vllm_engine.py mrlhf/rl/vllm_sampler.py mrlhf/rl/vllm_weights.py"),
        ("tensorboard", "mrlhf/tracking.py"),
        ("torch.utils.tensorboard", "mrlhf/tracking.py"),
        ("wandb", "mrlhf/tracking.py"),
        ("mlflow", "mrlhf/tracking.py"),
        ("httpx", "mrlhf/rl/reward_http.py"),
    ],
)
def test_one_adapter_imports_it(package: str, files: str) -> None:
    assert {str(f.relative_to(ROOT)) for f in sources().values() if uses(f, package)} <= set(files.split())


def test_data_runs_without_the_training_stack() -> None:
    """Preprocessing is for machines without torch, Megatron or a GPU; the loader alone hands out tensors."""
    for file in (ROOT / "mrlhf/data").glob("*.py"):
        assert not uses(file, "megatron") and not uses(file, "torch.distributed"), file
        assert file.name == "loader.py" or not uses(file, "torch"), file


@pytest.mark.parametrize("module", ["losses", "rl/advantages", "rl/kl", "rl/policy_loss", "parallel/logprobs"])
def test_maths_needs_torch_alone(module: str) -> None:
    outside = {name.partition(".")[0] for name in imports(ROOT / f"mrlhf/{module}.py")}
    assert outside <= {"__future__", "collections", "dataclasses", "math", "mrlhf", "torch", "typing"}
