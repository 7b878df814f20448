"""The rewards of a run: each source of `reward.sources` starts once and scores every rollout; the sum is weighted."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.config.options import ParallelConfig, PPOStage, RewardConfig
from mrlhf.data.loader import MicroBatch
from mrlhf.data.tokenizers.hf import fingerprint
from mrlhf.errors import CheckpointError, ConfigError, MrlhfError, RewardError
from mrlhf.models.families.spec import check_layout
from mrlhf.parallel import state
from mrlhf.rl.rewards.http import HttpReward
from mrlhf.rl.rewards.kinds import RewardSource, name_sources, parse_source
from mrlhf.rl.rewards.process import RewardProcess
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.training.trainer import Model, place_samples, score_micro_batches

log = logging.getLogger(__name__)


def _parse_sources(reward: RewardConfig) -> list[RewardSource]:
    weights = reward.weights or (1.0,) * len(reward.sources)
    return name_sources([parse_source(text, weight=w) for text, w in zip(reward.sources, weights, strict=True)])


def model_sources(reward: RewardConfig) -> list[str]:
    """The checkpoint directories of the local reward models."""
    return [s.spec for s in _parse_sources(reward) if s.kind == "model"]


def _start_source(r: RewardConfig, source: RewardSource, log_dir: Path | None = None) -> RewardProcess | HttpReward:
    if source.kind == "function":
        name = re.sub(r"[:/]", "_", source.name.removeprefix("function:"))
        log = None if log_dir is None else log_dir / f"reward_{name}.log"
        return RewardProcess(source, timeout_s=r.function_timeout_s, memory_mib=r.function_memory_mib,
                             env=r.function_env, log=log)
    return HttpReward(source.urls, timeout_s=r.http_timeout_s, total_s=r.http_total_timeout_s, retries=r.http_retries,
                      batch_size=r.http_batch_size, token_env=r.http_token_env)


def critic_source(config: PPOStage, actor: ModelSource) -> ModelSource:
    """The critic's start: `ppo.critic`, else the first local reward model, else the actor (with a new head)."""
    if config.ppo.critic:
        return open_source(config.ppo.critic)
    local = model_sources(config.reward)
    return open_source(local[0]) if local else actor


def check_reward_sources(config: RewardConfig, actor: ModelSource, *, parallel: ParallelConfig, world: int,
                         critic: str | None = None) -> list[MrlhfError]:
    """Every problem of the reward sources and of the checkpoint that the critic starts from. Builds no model."""
    try:
        sources = _parse_sources(config)
    except ConfigError as error:
        return [_located(error, "reward.sources")]
    problems: list[MrlhfError] = []
    for source in sources:
        if source.kind == "model":
            model, model_problems = _open_model("reward.sources", source.spec, actor, needs_value_head=True)
            problems += model_problems
            if model is not None:
                problems += check_layout(parallel, model.spec, world, trained=False)
    if critic:  # it is trained, and may have a layout of its own, which the stage checks
        problems += _open_model("ppo.critic", critic, actor, needs_value_head=False)[1]
    for source in sources:
        if source.kind != "model" and state.is_main():  # rank 0 calls it
            try:
                _start_source(config, source).close()
            except ConfigError as error:
                problems.append(_located(error, "reward.sources"))
    return problems


def _open_model(
    key: str, path: str, actor: ModelSource, *, needs_value_head: bool
) -> tuple[ModelSource | None, list[MrlhfError]]:
    try:
        model = open_source(path)
    except CheckpointError as error:
        return None, [_located(error, f"{key}: {error.where or path}")]
    problems: list[MrlhfError] = []
    where = f"{key} = {path}"
    if needs_value_head and model.head != "value":
        what = "it holds a language model, which gives no score"
        problems.append(CheckpointError(what, where=where, expected="a reward model (mrlhf rm)"))
    if fingerprint(model.hf_dir) != fingerprint(actor.hf_dir):
        expected = f"the tokenizer of {actor.hf_dir}"
        problems.append(CheckpointError("its tokenizer is not the actor's", where=where, expected=expected))
    return model, problems


def _located(error: MrlhfError, where: str) -> MrlhfError:
    """The same error at another place."""
    return type(error)(error.what, where=where, expected=error.expected, fix=error.fix)


class Rewards:
    """All reward sources. Rank 0 calls functions and HTTP servers and broadcasts the scores; models run on all ranks.

    environment: adds the reward that the environment gave to each answer. log_dir: for what functions print; None:
    stderr.
    """

    def __init__(self, config: RewardConfig, actor: ModelSource, tokenizer: Any, *, parallel: ParallelConfig,
                 dtype: str | None, seed: int, environment: bool = False, log_dir: Path | None = None) -> None:
        """dtype: of the reward models; None: each has its checkpoint's."""
        self.config, self.tokenizer, self.environment = config, tokenizer, environment
        self.sources, self.fingerprint = _parse_sources(config), fingerprint(actor.hf_dir)
        self.models: dict[str, Model] = {}
        self.external: dict[str, RewardProcess | HttpReward] = {}  # rank 0's
        for source in self.sources:
            if source.kind == "model":
                opened = open_source(source.spec)
                model = Model(opened, parallel, head="value", dtype=dtype or opened.dtype, seed=seed)
                self.models[source.name] = model
                if config.normalize and "reward_mean" not in model.source.manifest and state.is_main():
                    log.info(f"reward model {source.spec} has no score statistics: its scores are not normalised")
        if state.is_main():
            if log_dir is not None:
                log_dir.mkdir(parents=True, exist_ok=True)
            self.external = {s.name: _start_source(config, s, log_dir) for s in self.sources if s.kind != "model"}

    def close(self) -> None:
        """Ends the processes and connections of rank 0."""
        for source in self.external.values():
            source.close()

    def score(self, rollout: Rollout, batches: list[MicroBatch]) -> tuple[torch.Tensor, dict[str, float]]:
        """The weighted sum of all rewards [B], the same on every rank, and the metrics {"reward/<source>": mean,
        "reward_std/<source>": standard deviation}.

        The sum is taken in float64: in fp32 sums that are equal on paper differ. Collective. Raises RewardError on all
        ranks.
        """
        scores: dict[str, torch.Tensor] = {}
        total_B = torch.zeros(rollout.size, dtype=torch.float64)
        for source in self.sources:
            if source.kind == "model":
                scores_B = self._model_scores(source, rollout, batches)
            else:
                scores_B = self._external_scores(source, rollout)
            total_B += source.weight * scores_B
            scores[source.name] = scores_B
        if self.environment:
            scores["environment"] = torch.tensor([answer.reward for answer in rollout.answers], dtype=torch.float64)
            total_B += scores["environment"]
        means = {f"reward/{name}": float(scores_B.mean()) for name, scores_B in scores.items()}
        stds = {f"reward_std/{name}": float(scores_B.std(unbiased=False)) for name, scores_B in scores.items()}
        largest = torch.finfo(torch.float32).max  # beyond it fp32 has infinity, which no clip brings back into a mean
        return total_B.clamp(-largest, largest).float(), means | stds

    def _model_scores(self, source: RewardSource, rollout: Rollout, batches: list[MicroBatch]) -> torch.Tensor:
        model = self.models[source.name]
        scores_B = torch.zeros(rollout.size, dtype=torch.float64)
        place_samples(scores_B, batches, score_micro_batches(model, batches))
        scores_B = state.sum_over_data_parallel(scores_B)
        if not bool(scores_B.isfinite().all()):
            raise RewardError(f"reward model {source.spec!r} gave a score that is not finite")
        statistics = model.source.manifest
        if self.config.normalize and "reward_mean" in statistics:
            scores_B = (scores_B - statistics["reward_mean"]) / statistics["reward_std"]
        return scores_B

    def _external_scores(self, source: RewardSource, rollout: Rollout) -> torch.Tensor:
        answer: list[Any] = [None, None]
        if dist.get_rank() == 0:
            prompts = [self.tokenizer.decode(p) for p in rollout.prompts]
            completions = [self.tokenizer.decode(a.tokens, skip_special_tokens=True) for a in rollout.answers]
            columns: dict[str, Any] = {
                "labels": rollout.labels, "prompt_ids": rollout.prompts,
                "completion_ids": [a.tokens for a in rollout.answers],
            }
            external = self.external[source.name]
            if isinstance(external, HttpReward):
                columns["tokenizer"] = self.fingerprint
            try:
                answer[0] = external.score(prompts, completions, **columns)
            except RewardError as error:  # raised after the broadcast, which the other ranks wait for
                answer[1] = error.render()
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise RewardError(answer[1])
        return torch.tensor(answer[0], dtype=torch.float64)
