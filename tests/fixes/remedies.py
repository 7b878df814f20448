"""Remedies of a rank that is out of memory: each line is followed, and the command passes its checks again."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mrlhf.config.dump import dump_yaml
from mrlhf.config.load import load_config
from mrlhf.config.options import STAGES, PPOStage
from mrlhf.memory.advice import PASSES, remedies
from mrlhf.models.families import spec_from_hf
from mrlhf.models.families.spec import read_hf_config
from mrlhf.training.resume import check_resume

from .harness import Command, attempt, follow
from .options import CP, EP, FIRST, PP, SEPARATE, TP, stage

SP, TOKENS = "parallel__sequence_parallel", "train__max_tokens_per_micro_batch"
CRITIC = "ppo__critic_tensor_model_parallel_size"
PHASES = (*PASSES, "build", "save", "offload", "gen", "reshard")
OF_PPO, OF_CRITIC = ("update_actor", "reward", "logprobs", "offload", "gen", "reshard"), ("update_critic", "values")
# stage, ranks, options
RUNS: tuple[tuple[str, int, dict[str, Any]], ...] = (
    ("pretrain", 1, {TOKENS: 700}),
    ("pretrain", 2, {"optim__use_distributed_optimizer": "false", "checkpoint__async_save": "true"}),
    ("sft", 1, {"train__micro_batch_size": 6, "train__global_batch_size": 12}),
    ("sft", 2, {TP: 2, "train__micro_batch_size": 4}),
    ("sft", 2, {PP: 2, "parallel__recompute": "full"}),
    ("sft", 4, {PP: 2, TP: 2, SP: "true"}),
    ("sft", 2, {CP: 2}),
    ("sft", 2, {"model__path": "WORLD/qwen3_moe", EP: 2}),
    ("sft", 2, {PP: 2, FIRST: 1}),
    ("sft", 1, {"loss__aggregation": "sequence"}),
    ("rm", 1, {"data__packing": "false", "data__padding_side": "left"}),
    ("rm", 2, {"data__packing": "false", "train__micro_batch_size": 2}),
    ("dpo", 1, {"dpo__reference": "online"}),
    ("dpo", 2, {TOKENS: 400, "checkpoint__async_save": "true"}),
    ("ppo", 1, {}),
    ("ppo", 1, {"ptx__coef": 1, "ptx__data": "WORLD/text", "ptx__micro_batch_size": 4}),
    ("ppo", 2, {TP: 2, SP: "true"}),
    ("ppo", 1, {"ppo__ratio": "sequence", "ppo__estimator": "grpo", "rollout__n": 2}),
    ("ppo", 1, {"rollout__weights": "packed", "rollout__sleep": "false"}),
    ("ppo", 2, {"rollout__tensor_parallel_size": 2, "rollout__max_num_seqs": 8}),
    ("ppo", 1, {"model__path": "WORLD/qwen3_moe", "reward__sources": "model:VALUE"}),
    ("ppo", 2, {TP: 2, CRITIC: 1}),
    ("ppo", 2, {CRITIC: 2}),
    ("ppo", 2, {CP: 2, "rollout__kv_cache_mib": 2}),
    ("ppo", 2, {**SEPARATE, "rollout__num_ranks": 1}),
    ("ppo", 3, {**SEPARATE, "rollout__num_ranks": 1, "rollout__max_num_seqs": 2}),
    ("ppo", 4, {PP: 2, "ppo__estimator": "grpo", "rollout__n": 2, "offload__optimizer": "true"}),
)


def lines(bench: SimpleNamespace) -> Iterator[tuple[str, Command, str]]:
    """(where from, the command, a printed line) of each run, phase and kind of device."""
    for name, ranks, changes in RUNS:
        command = stage(name, ranks, **changes)(bench)
        errors, _ = attempt(command)
        assert not errors, f"{name} {changes}: {errors}"
        config: Any = load_config(STAGES[name], None, command.flags)
        spec = spec_from_hf(read_hf_config(Path(config.model.path)))
        apart = (config.rollout.num_ranks or 0) if isinstance(config, PPOStage) else 0
        has_critic = isinstance(config, PPOStage) and config.ppo.estimator_row.needs_critic
        for phase in PHASES:
            if phase in OF_CRITIC:
                is_phase = has_critic
            else:
                is_phase = isinstance(config, PPOStage) or phase not in OF_PPO
            if is_phase:
                for cuda in (False, True):
                    for line in remedies(config, phase, spec=spec, world=ranks - apart, cuda=cuda):
                        yield f"{name} on {ranks} {changes}, {phase}, cuda {cuda}", command, line


def follow_remedy(command: Command, line: str, apart: int) -> Command:
    """The command with the line's change."""
    text = re.sub(r" \(now [^)]*\)", "", line)
    after = Command(command.run, list(command.flags), command.ranks, dict(command.env))
    *parts, last = text.split(", ")
    if match := re.fullmatch(r"on (\d+) (?:training )?ranks instead of (\d+)", last):
        assert int(match[2]) + apart == command.ranks
        after.ranks = int(match[1]) + apart
    else:
        parts.append(last)
    for part in parts:
        follow(after, part)
    return after


def problems(bench: SimpleNamespace) -> list[str]:
    """What is wrong with the remedies."""
    wrong, seen = [], set()
    for where, command, line in lines(bench):
        if line.startswith("nothing in the configuration") or (str(command.flags), command.ranks, line) in seen:
            continue
        seen.add((str(command.flags), command.ranks, line))
        name = where.split()[0]
        before: Any = load_config(STAGES[name], None, command.flags)
        apart = (before.rollout.num_ranks or 0) if isinstance(before, PPOStage) else 0
        after = follow_remedy(command, line, apart)
        errors, _ = attempt(after)
        # a line may say itself what would limit it
        errors = [e for e in errors if not ("longest row" in line and "is less than the largest" in e.what)]
        run = bench.tmp / "resumed"
        run.mkdir(exist_ok=True)
        (run / "config.yaml").write_text(dump_yaml(before))
        errors += attempt(Command(lambda _: check_resume(load_config(STAGES[name], None, after.flags), run)))[0]  # noqa: B023
        wrong += [f"{where}: {line}\n   -> {error}" for error in errors]
    assert len(seen) > 40
    return wrong
