"""The rewards of a run: every source of `reward.sources`, built once, asked for each rollout, summed with weights."""

from __future__ import annotations

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
from mrlhf.rl.rewards.kinds import RewardSource, parse_source
from mrlhf.rl.rewards.process import RewardProcess
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.training.scoring import score_micro_batches
from mrlhf.training.trainer import Model


def _sources(reward: RewardConfig) -> list[RewardSource]:
    weights = reward.weights or (1.0,) * len(reward.sources)
    return [parse_source(text, weight=w) for text, w in zip(reward.sources, weights, strict=True)]


def model_sources(reward: RewardConfig) -> list[str]:
    """Where the local reward models are."""
    return [s.spec for s in _sources(reward) if s.kind == "model"]


def _start_function(r: RewardConfig, source: RewardSource) -> RewardProcess:
    return RewardProcess(source, timeout_s=r.function_timeout_s, memory_mib=r.function_memory_mib, env=r.function_env)


def _connect(r: RewardConfig, source: RewardSource) -> HttpReward:
    return HttpReward(
        source.urls,
        timeout_s=r.http_timeout_s,
        total_s=r.http_total_timeout_s,
        retries=r.http_retries,
        batch_size=r.http_batch_size,
        token_env=r.http_token_env,
    )


def critic_source(config: PPOStage, actor: ModelSource) -> ModelSource:
    """`ppo.critic`, else the first local reward model, else the actor's model (with a fresh head)."""
    if config.ppo.critic:
        return open_source(config.ppo.critic)
    local = model_sources(config.reward)
    return open_source(local[0]) if local else actor


class Rewards:
    """Functions (in processes of their own) and HTTP are asked by rank 0 and their scores travel; reward models run on all ranks.

    environment: the answers have rewards of their own, which are added.
    """

    def __init__(
        self,
        config: RewardConfig,
        actor: ModelSource,
        tokenizer: Any,
        *,
        parallel: ParallelConfig,
        dtype: str,
        seed: int,
        environment: bool = False,
    ) -> None:
        self.config, self.tokenizer, self.sources, self.environment = config, tokenizer, _sources(config), environment
        self.models: dict[str, Model] = {}
        for source in self.sources:
            if source.kind == "model":
                self.models[source.spec] = Model(open_source(source.spec), parallel, head="value", dtype=dtype, seed=seed)
        if config.normalize:
            for path, model in self.models.items():
                if "reward_mean" not in model.source.manifest and state.is_main():
                    print(f"reward model {path} has no score statistics: its scores are not normalised", flush=True)
        self.outside: dict[str, RewardProcess | HttpReward] = {}
        if state.is_main():
            for source in self.sources:
                if source.kind == "function":
                    self.outside[source.spec] = _start_function(config, source)
                elif source.kind == "http":
                    self.outside[source.spec] = _connect(config, source)
        self.fingerprint = fingerprint(actor.hf_dir)

    def close(self) -> None:
        for source in self.outside.values():
            source.close()

    @staticmethod
    def check(
        config: RewardConfig, actor: ModelSource, *, parallel: ParallelConfig, world: int, critic: str | None = None
    ) -> list[MrlhfError]:
        """Everything wrong with the sources and the critic's start, before anything is built."""
        found: list[MrlhfError] = []
        try:
            sources = _sources(config)
        except ConfigError as error:
            return [ConfigError(error.what, where="reward.sources", expected=error.expected, fix=error.fix)]
        models = [("reward.sources", path) for path in model_sources(config)]
        if critic:
            models.append(("ppo.critic", critic))
        for key, path in models:
            try:
                model = open_source(path)
            except CheckpointError as error:
                found.append(CheckpointError(error.what, where=f"{key}: {error.where or path}", expected=error.expected, fix=error.fix))
                continue
            if key == "reward.sources" and model.head != "value":
                found.append(
                    CheckpointError(
                        "it holds a language model, which gives no score", where=f"{key} = {path}", expected="a reward model (mrlhf rm)"
                    )
                )
            if fingerprint(model.hf_dir) != fingerprint(actor.hf_dir):
                found.append(
                    CheckpointError(
                        "its tokenizer is not the actor's", where=f"{key} = {path}", expected=f"the tokenizer of {actor.hf_dir}"
                    )
                )
            if key == "reward.sources":  # the critic is trained, and may be cut in its own way: ppo.check
                found += check_layout(parallel, model.spec, world, trained=False)
        for source in sources:
            if source.kind != "model" and state.is_main():  # the rank that calls it
                try:
                    (_start_function if source.kind == "function" else _connect)(config, source).close()
                except ConfigError as error:
                    found.append(ConfigError(error.what, where="reward.sources", expected=error.expected, fix=error.fix))
        return found

    def score(self, rollout: Rollout, batches: list[MicroBatch]) -> tuple[torch.Tensor, dict[str, float]]:
        """([B] weighted sum, with the environment's reward, on every rank, {"reward/<source>": mean}). Collective. Raises RewardError on all ranks."""
        total_B, parts = torch.zeros(rollout.size), {}
        for source in self.sources:
            scores_B = self._model_scores(source, rollout, batches) if source.kind == "model" else self._outside_scores(source, rollout)
            total_B += source.weight * scores_B
            parts[f"reward/{source.kind}:{source.spec.rsplit('/', 1)[-1]}"] = float(scores_B.mean())
        if self.environment:
            scores_B = torch.tensor([answer.reward for answer in rollout.answers])
            total_B += scores_B
            parts["reward/environment"] = float(scores_B.mean())
        return total_B, parts

    def _model_scores(self, source: RewardSource, rollout: Rollout, batches: list[MicroBatch]) -> torch.Tensor:
        model = self.models[source.spec]
        scores_B = torch.zeros(rollout.size, dtype=torch.float64)
        for batch, scores_N in zip(batches, score_micro_batches(model, batches), strict=True):
            real = batch.weights_N > 0
            scores_B[batch.index_N[real]] = scores_N[real].double()
        scores_B = state.sum_over_data_parallel(scores_B).float()
        if not bool(scores_B.isfinite().all()):
            raise RewardError(f"reward model {source.spec!r} gave a score that is not finite")
        statistics = model.source.manifest
        if self.config.normalize and "reward_mean" in statistics:
            scores_B = (scores_B - statistics["reward_mean"]) / statistics["reward_std"]
        return scores_B

    def _outside_scores(self, source: RewardSource, rollout: Rollout) -> torch.Tensor:
        answer: list[Any] = [None, None]
        if dist.get_rank() == 0:
            prompts = [self.tokenizer.decode(p) for p in rollout.prompts]
            completions = [self.tokenizer.decode(a.tokens, skip_special_tokens=True) for a in rollout.answers]
            columns = {"labels": rollout.labels, "prompt_ids": rollout.prompts, "completion_ids": [a.tokens for a in rollout.answers]}
            asked = self.outside[source.spec]
            try:
                if isinstance(asked, HttpReward):
                    answer[0] = asked.score(prompts, completions, tokenizer=self.fingerprint, **columns)
                else:
                    answer[0] = asked.score(prompts, completions, **columns)
            except RewardError as error:  # the other ranks wait for the broadcast: they must hear of it
                answer[1] = error.render()
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise RewardError(answer[1])
        return torch.tensor(answer[0], dtype=torch.float32)
