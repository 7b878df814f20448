"""Rehearses cases on a CUDA device that does not exist. usage: -m cuda.rehearse_program CASES.json OUTPUT.json

CASES.json: a list of [kind, layout, padding, stage]. OUTPUT.json: an outcome for each, in order.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from conftest import FAMILIES, make_hf_config
from zoo import KINDS, VOCAB

from cuda.cases import LAYOUTS, Case
from mrlhf.checkpoint import save
from mrlhf.checkpoint.source import ModelSource
from mrlhf.config.load import load_config
from mrlhf.config.options import DPOStage, OffloadConfig, OptimConfig, ParallelConfig, PPOStage
from mrlhf.data.indexed import FORMAT_VERSION, PackedDataset
from mrlhf.data.loader import Loader, MicroBatch, collate
from mrlhf.data.writer import OutputSet
from mrlhf.dpo import preference_loss, reference_logps
from mrlhf.models.families import spec_from_hf, vllm_map
from mrlhf.models.layers.router_losses import Balance, Count, trained_pairs, trained_tokens
from mrlhf.models.reshard_plan import make_weight_update
from mrlhf.parallel import state
from mrlhf.parallel.rehearsal import Rehearsal, Report, unpaired
from mrlhf.rl.offload import Offload
from mrlhf.rl.ppo import PPO
from mrlhf.rl.ppo_models import PPOModels
from mrlhf.rl.rollout import tables
from mrlhf.rl.rollout.tables import Rollout
from mrlhf.rl.rollout.vllm_engine import Answer
from mrlhf.rl.updates import actor_loss, critic_loss
from mrlhf.rm import reward_loss
from mrlhf.sft import language_model_loss
from mrlhf.training.batches import make_batch_plan
from mrlhf.training.trainer import Trainer, score_micro_batches

ROW = 600  # the longest sample: more than any other dimension of these models, and than a block of queries (512)
LENGTHS = ((ROW, 60), (90, ROW))  # of the samples of a row, in turn


def make_data(prefix: Path, task: str) -> PackedDataset:
    """Rows of two samples (a pair)."""
    rng = np.random.default_rng(0)
    with OutputSet(prefix) as output:
        ids, mask = output.indexed("", np.dtype("uint16")), output.indexed("_loss_mask", np.dtype("uint8"))
        for lengths in itertools.islice(itertools.cycle(LENGTHS), 4):
            ids.add_documents(rng.integers(3, VOCAB, sum(lengths)), lengths, [2])
            mask.add_documents(np.concatenate([[0] * 8 + [1] * (n - 8) for n in lengths]), lengths, [2])
        output.commit({"format": FORMAT_VERSION, "task": task, "num_samples": 8, "num_packs": 4})
    return PackedDataset.open(prefix)


def make_rollout() -> Rollout:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(3, VOCAB, 20).tolist() for _ in range(8)]
    lengths = [ROW - 20 if b % 2 else 50 for b in range(8)]
    answers = [Answer(rng.integers(3, VOCAB, n).tolist(), [-1.0] * n, True, ()) for n in lengths]
    return Rollout(prompts, answers, [None] * 8)


class Models:
    """The models of one kind in one layout on one rank, made when a case asks for them."""

    def __init__(self, kind: str, layout: str, rehearsal: Rehearsal, data: dict[str, PackedDataset]) -> None:
        family, changes = KINDS[kind]
        pipelines = "pp2" in layout
        sizes = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4 if pipelines else 2,
                 "n_positions" if family == "gpt2" else "max_position_embeddings": 2 * ROW}  # fmt: skip
        if "head_dim" in changes:
            changes = changes | {"head_dim": 64}  # a wider linear_qkv would be longer than a row
        config = make_hf_config(family, vocab_size=VOCAB, **{**sizes, **changes})
        self.spec = spec_from_hf({**config.to_dict(), "architectures": None}, where=kind)
        self.row, self.rehearsal, self.data = LAYOUTS[layout], rehearsal, data
        self.hf_dir = Path(next(iter(data.values())).prefix).parent / "hf"
        config.architectures = [f"{FAMILIES[family][0]}ForCausalLM"]
        config.save_pretrained(self.hf_dir)
        self.fetched: Any = None
        self.parallel = ParallelConfig(**self.row.parallel)
        state.initialize(self.parallel, seed=1)

    def _trainer(self, head: str) -> Trainer:
        source = ModelSource(self.hf_dir, self.hf_dir, self.spec, head, {})
        balance = Balance(0.01, 0.001) if self.spec.experts is not None and head == "lm" else None
        return Trainer(source, self.parallel, OptimConfig(**self.row.optim), head=head, dtype="bfloat16", seed=1,
                       total_steps=10, random_init=True, balance=balance,
                       neftune_alpha=self.row.neftune if head == "lm" else 0.0)  # fmt: skip

    @cached_property
    def actor(self) -> Trainer:
        actor = self._trainer("lm")
        if actor.balance is not None:  # compares its count with that of the last stage, another process
            self.rehearsal.from_last_stage = lambda: {"loss": torch.tensor([1.0, actor.balance._count])}
        return actor

    def count_by(self, count: Count) -> None:
        """A stage makes its trainer with the count of its loss; here several stages share one."""
        if self.actor.balance is not None:
            self.actor.balance.balance = Balance(0.01, 0.001, count)

    @cached_property
    def critic(self) -> Trainer:
        return self._trainer("value")

    def loader(self, task: str, padding: str) -> Loader:
        side = "left" if padding == "left" else "right"
        plan = make_batch_plan(state.groups(), packing=padding == "packed", micro_batch_size=2, padding_side=side)
        return Loader(self.data[task], plan)

    def batches(self, loader: Loader) -> list[MicroBatch]:
        """Two micro-batches, which is also what the interleaved pipeline takes at once."""
        rows = range(2 * loader.plan.rows_per_slice // loader.plan.micro_batch_multiple)
        return loader.micro_batches([row % loader.num_rows for row in rows])


def sft(models: Models, padding: str) -> None:
    models.count_by(trained_tokens)
    loader = models.loader("sft", padding)
    batches, loss = models.batches(loader), language_model_loss(models.actor, aggregation="token", z_loss=1e-4)
    models.actor.step(batches, loss)
    models.actor.evaluate(batches, loss)


def rm(models: Models, padding: str) -> None:
    loader = models.loader("preference", padding)
    batches = models.batches(loader)
    models.critic.step(batches, reward_loss(models.critic, loader, kind="sigmoid"))
    score_micro_batches(models.critic, batches)


def dpo(models: Models, padding: str) -> None:
    models.count_by(trained_pairs)
    values = {"model.path": "none", "data.train": "none", "train.output_dir": "none", "dpo.nll_coef": 0.1,
              "train.global_batch_size": 4}  # fmt: skip
    config = load_config(DPOStage, None, [str(part) for key, value in values.items() for part in (f"--{key}", value)])
    loader = models.loader("preference", padding)
    batches = models.batches(loader)
    reference = reference_logps(models.actor, loader)
    models.actor.step(batches, preference_loss(config, models.actor, loader, reference))


def ppo(models: Models, padding: str) -> None:
    models.count_by(trained_tokens)
    values = {
        "model.path": "none",
        "data.train": "none",
        "train.output_dir": "none",
        "data.packing": str(padding == "packed").lower(),
        "train.global_batch_size": 8,
        "train.micro_batch_size": 2,
        "rollout.batch_size": 8,
        "rollout.correction": "tis",
        "reward.sources": "examples/rewards/length_penalty.py:length_penalty",
        "kl.in_loss": "true",
        "kl.kind": "k3",
        "ppo.entropy_coef": 0.01,
    }
    config = load_config(PPOStage, None, [str(part) for key, value in values.items() for part in (f"--{key}", value)])
    run = object.__new__(PPO)  # its passes alone: no vLLM, no reward
    run.models = object.__new__(PPOModels)
    run.config, run.models.config, run.updates_per_rollout = config, config, 1
    run.models.critic = models.critic
    run.health = mock.Mock()  # would read ratios, which do not exist
    plan = make_batch_plan(state.groups(), packing=padding == "packed", micro_batch_size=2)
    run.models.plan = run.models.critic_plan = plan
    rollout, offload = make_rollout(), None
    if models.row.offload:
        options = OffloadConfig(optimizer=True, gradients=True)
        offload = Offload(options, trainers={"actor": models.actor, "critic": models.critic}, frozen={})
        offload.park_all()
    with mock.patch.object(tables, "collate", partial(collate, padding_side="left" if padding == "left" else "right")):
        old_BA, _ = run.models.logprobs(models.actor, rollout, with_entropy=True)
        values_BA = run.models.values(models.critic, rollout)
        loss = critic_loss(config, old_values_BA=values_BA, returns_BA=values_BA)
        with offload.using("critic") if offload else mock.MagicMock():
            run.update(models.critic, rollout, loss, step=1)
        loss = actor_loss(models.actor, config, beta=0.1, old_BA=old_BA, ref_BA=old_BA, advantages_BA=values_BA,
                          rollout_BA=old_BA)  # fmt: skip
        with offload.using("actor") if offload else mock.MagicMock():
            run.update(models.actor, rollout, loss, step=1)
    if offload:  # to the end: later cases use them too
        models.fetched = offload.using("actor", "critic")
        models.fetched.__enter__()


def reshard(models: Models, padding: str) -> None:
    spec, layout = models.spec, state.groups().layout
    shard = vllm_map(spec, tp=2, rank=models.rehearsal.rank % 2)
    update = make_weight_update(spec, layout, rollout_tp=2, rank=models.rehearsal.rank, dtype=torch.bfloat16,
                                bucket_bytes=1 << 17)  # fmt: skip
    planner_shape = {name: update_shape(spec, slices) for name, slices in shard.items()}
    target = {
        name: torch.empty(shape, dtype=torch.float32 if wide else torch.bfloat16, device="cuda")
        for name, (shape, wide) in planner_shape.items()
    }
    update.exchange(models.actor.parameters(), target)


def update_shape(spec: Any, slices: Any) -> tuple[tuple[int, ...], bool]:
    from mrlhf.models.families import hf_tensors

    tensor = hf_tensors(spec, head="lm")[slices[0].hf]
    shape = list(tensor.shape)
    shape[slices[0].dim] = max(s.offset + s.length for s in slices)
    return tuple(shape), tensor.in_fp32


def checkpoint(models: Models, padding: str) -> None:
    """The plan of a save; its thread, which would write what does not exist, does not start."""
    validations = (  # of the shards of all ranks, which one rank does not have
        "megatron.core.dist_checkpointing.state_dict_utils.validate_sharding_integrity",
        "torch.distributed.checkpoint.default_planner._validate_global_plan",
    )
    content = {"stage": "sft", "step": 1, "dtype": "bfloat16"}
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as patches:
        for name in (*validations, "mrlhf.checkpoint.save._Writer.start"):
            patches.enter_context(mock.patch(name, return_value=True))
        save.begin_save(Path(directory, "step_1"), [models.actor.part()], content, copy=True)


STAGES: dict[str, Callable[[Models, str], None]] = {f.__name__: f for f in (sft, rm, dpo, ppo, reshard, checkpoint)}
TRAINERS = {"rm": ("critic",), "ppo": ("actor", "critic")}  # fmt: skip


def where(error: BaseException) -> str:
    frames = [f for f in traceback.extract_tb(error.__traceback__) if "/parallel/" not in f.filename]
    ours = [f for f in frames if "/mrlhf/" in f.filename or "/megatron/" in f.filename][-3:]
    places = " > ".join(f"{'/'.join(f.filename.split('/')[-3:])}:{f.lineno}" for f in ours)
    return f"{type(error).__name__}: {str(error)[:600]} at {places}"


def rehearse_rank(kind: str, layout: str, rank: int, cases: list[Case], data: Any) -> tuple[Report, dict[Case, str]]:
    """What rank `rank` did, and its errors. After an error the models are made anew."""
    errors: dict[Case, str] = {}
    models: Models | None = None
    with Rehearsal(rank=rank, world=LAYOUTS[layout].world, square=ROW) as rehearsal:
        for case in cases:
            started = time.perf_counter()
            try:
                models = models or Models(kind, layout, rehearsal, data)
                with rehearsal.tracing("build"):
                    for name in TRAINERS.get(case.stage, ("actor",)):
                        getattr(models, name)
                with rehearsal.tracing(str(case)):
                    STAGES[case.stage](models, case.padding)
            except Exception as error:  # any kind is the case's outcome
                errors[case], models = where(error), None
            print(f"{case} rank {rank}: {time.perf_counter() - started:.2f} s {errors.get(case, '')}", flush=True)
        return rehearsal.report(), errors


def outcome(case: Case, reports: list[Report], errors: list[str]) -> dict[str, Any]:
    """Of a case on all its ranks."""
    phase, waits = str(case), collections.Counter()
    for report in reports:
        waits |= collections.Counter(report.waits(phase))  # the most of a rank
    peaks = [report.peaks[phase].nbytes for report in reports if phase in report.peaks]
    parts = [dataclasses.replace(r, messages=tuple(m for m in r.messages if m.phase == phase)) for r in reports]
    return {
        "errors": errors,
        "waits": waits,
        "squares": sorted({what for r in reports for of, what in r.squares if of == phase}),
        "unpaired": [] if errors else unpaired(parts),
        "peak": max(peaks, default=0),
    }


def main() -> None:
    cases = [Case(*row) for row in json.loads(Path(sys.argv[1]).read_text())]
    outcomes: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "hf").mkdir()
        data = {task: make_data(Path(directory, task), task) for task in ("sft", "preference")}
        for (kind, layout), some in itertools.groupby(cases, key=lambda case: (case.kind, case.layout)):
            group = list(some)
            ranks = {rank: rehearse_rank(kind, layout, rank, group, data) for rank in LAYOUTS[layout].ranks}
            reports = [report for report, _ in ranks.values()]
            for case in group:
                errors = [f"rank {rank}: {e[case]}" for rank, (_, e) in ranks.items() if case in e]
                outcomes[str(case)] = outcome(case, reports, errors)
    Path(sys.argv[2]).write_text(json.dumps(outcomes))


if __name__ == "__main__":
    main()
