"""vLLM in the ranks of this world, and its weight updates: the interface by which a PPO step generates."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from mrlhf.config.options import PPOStage
from mrlhf.data.tokenizers.hf import stop_ids
from mrlhf.models.reshard_plan import make_weight_update
from mrlhf.parallel import state
from mrlhf.parallel.split import Bridge
from mrlhf.parallel.weight_update import WeightUpdate
from mrlhf.rl.rollout.environments import make_environments
from mrlhf.rl.rollout.tables import Rollout, generate_rollout
from mrlhf.rl.rollout.vllm_engine import Sampling, VLLMEngine
from mrlhf.training import preflight
from mrlhf.training.trainer import DTYPES


def make_vllm_update(config: PPOStage, run: preflight.RunInputs, layout: state.Layout, bridge: Bridge | None,
                     made: Collection[str] = ()) -> WeightUpdate:
    """This rank's part of a weight update of vLLM. layout: the trainer's. made: parameters that vLLM converts."""
    return make_weight_update(run.source.spec, layout, rollout_tp=config.rollout.tensor_parallel_size,
                              rank=dist.get_rank() if bridge is None else bridge.rank, dtype=DTYPES[config.model.dtype],
                              made=made, bucket_bytes=config.rollout.reshard_bucket_mib << 20,
                              generators=0 if bridge is None else len(bridge.generators),
                              start_messages=None if bridge is None else bridge.start_messages)


class Sampler:
    """On every rank of a world with vLLM: the trainer's, or (with `bridge`) that of the generating ranks."""

    def __init__(self, config: PPOStage, run: preflight.RunInputs, tokenizer: Any, layout: state.Layout,
                 bridge: Bridge | None = None, to_come: int = 0) -> None:
        """layout: the trainer's. to_come: bytes that it will need beside vLLM and does not hold yet. Collective."""
        rollout, hf_dir, rank, world = config.rollout, run.source.hf_dir, dist.get_rank(), dist.get_world_size()
        self.seed, tp = config.train.seed, rollout.tensor_parallel_size
        self.replicas, self.replica = world // tp, rank // tp
        self.environments = make_environments(rollout.environment, tokenizer, stop_ids(hf_dir, tokenizer),
                                              max_turns=rollout.max_turns, threads=rollout.environment_threads,
                                              timeout_s=rollout.environment_timeout_s, tp=tp, world=world, rank=rank)
        self.engine = VLLMEngine(run.source.spec, hf_dir, dtype=config.model.dtype, tp=tp,
                                 max_model_len=run.train.max_length + rollout.max_new_tokens,
                                 kv_cache_mib=rollout.kv_cache_mib, max_num_seqs=rollout.max_num_seqs, seed=self.seed,
                                 weights=rollout.weights, sleep=rollout.sleep and bridge is None,
                                 tokenizer_dir=hf_dir if rollout.stop else None,
                                 log_dir=Path(config.train.output_dir) / "logs", to_come=to_come)
        self.reshard = make_vllm_update(config, run, layout, bridge, self.engine.weights.made)
        self.sleeps, self.sleep = self.engine.sleeps, self.engine.sleep

    @property
    def memory(self) -> str:
        """vLLM's memory on each rank, as text."""
        return self.engine.memory.summary()

    def bytes_of_ranks(self) -> list[tuple[int, int, int]]:
        """(sent, received, copied) by every rank in a weight update. Collective."""
        return state.from_all_ranks([(self.reshard.sent, self.reshard.received, self.reshard.copied)])

    def write_weights(self, source: Mapping[str, torch.Tensor]) -> tuple[float, float]:
        """Sends this rank's shard of the actor to vLLM. Collective. Returns the bytes received, and the seconds."""
        self.engine.wake("weights")
        seconds = self.reshard.exchange(source, self.engine.weights.parameters, self.engine.weights.convert)
        self.engine.wake("kv_cache")
        self.engine.weights_changed()
        return float(self.reshard.received), seconds

    def request_rollout(self, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int,
                        first: int = 0) -> None:
        """Announces the arguments of a later `generate`; only RemoteSampler uses them."""

    def generate(self, prompts: list[list[int]], labels: Sequence[Any], *, n: int, sampling: Sampling, step: int,
                 first: int = 0) -> Rollout:
        """n answers a prompt, see `generate_rollout`. first: the rollout's prompts before these. Collective."""
        return generate_rollout(self.engine, prompts, n=n, sampling=sampling, seed=self.seed, step=step, labels=labels,
                                replicas=self.replicas, replica=self.replica, first=first,
                                environments=self.environments)

    def pending_answers(self) -> bytes | None:
        """For a checkpoint: requested answers that no step has used yet. Here there are none."""
        return None

    def generation_metrics(self) -> dict[str, float]:
        """Metrics of the last `generate` on ranks of its own. Here there are none."""
        return {}

    def shutdown(self) -> None:
        """Leaves vLLM's groups, before torch's default group ends. Collective."""
        self.engine.shutdown()
