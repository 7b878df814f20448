"""`mrlhf STAGE --dry-run`: no GPU, no torchrun, nothing written. Every problem at once, else what the run would be.

The number of ranks is WORLD_SIZE where set (WORLD_SIZE=64 mrlhf sft ... --dry-run), else the smallest that the
parallel sizes allow.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from mrlhf.config.options import GenerateStage, PPOStage, ScoreStage, ServeRewardStage, StageConfig, TrainingConfig
from mrlhf.data.blend import Dataset, names_of, sources_of
from mrlhf.data.order import Order
from mrlhf.data.show import marked
from mrlhf.data.tokenizers.hf import load_tokenizer
from mrlhf.memory.estimate import GIB, memory_table, update_activations
from mrlhf.models.reshard_plan import make_planner
from mrlhf.parallel import reshard, state
from mrlhf.parallel.state import Layout
from mrlhf.training import preflight
from mrlhf.training.resume import check_resume
from mrlhf.training.run import make_order


def _first_sample(data: Dataset, tokenizer: Any) -> str:
    _, tokens, mask = data.sample(0)
    return marked(tokenizer, tokens, mask)


def _sources(data: Dataset, order: Order) -> list[str]:
    """A line for each part of a blend: what it gives to the whole run."""
    parts, total = sources_of(data), order.position(order.total_steps)
    if len(parts) == 1:
        return []
    rows = zip(names_of([p.prefix for p in parts]), order.approximate_counts(total), order.mix.rows, strict=True)
    return [f"         {name}: {n:,} of {total:,} rows ({n / total:.2%}), {n / own:.3g} epochs" for name, n, own in rows]


def _training(stage: str, config: TrainingConfig) -> None:
    one = Layout.of(config.parallel, 1)
    smallest, generators = math.lcm(one.tp * one.cp, one.ep) * one.pp, 0
    if isinstance(config, PPOStage):
        generators = config.rollout.num_ranks or 0
        rollout_tp = 1 if generators else config.rollout.tensor_parallel_size
        smallest = math.lcm(smallest, rollout_tp, Layout.of(config.critic_parallel, 1).smallest)
    smallest += generators
    world = int(os.environ.get("WORLD_SIZE", smallest))
    others = {}
    if isinstance(config, PPOStage):
        from mrlhf.checkpoint.source import open_source
        from mrlhf.rl.ppo import check
        from mrlhf.rl.rewards.sources import critic_source, model_sources
        from mrlhf.rl.rollout.prompts import make_prompt_order

        run = check(config, world)
        if config.ppo.estimator == "gae":
            others["critic"] = critic_source(config, run.source).spec
        others |= {f"reward {path}": open_source(path).spec for path in model_sources(config.reward)}
    else:
        run = preflight.check_run(stage, config, world=world)
    check_resume(config, Path(config.train.output_dir))
    spec, train = run.source.spec, config.train
    world -= generators
    layout = Layout.of(config.parallel, world)
    print(f"model    {run.source.path}: {spec.describe()}, {config.model.dtype}")
    print(f"batch    {layout.describe(train)}")
    data = run.train
    for note in run.notes:
        print(note)
    if isinstance(config, PPOStage):
        order = make_prompt_order(config, data)
        rollouts = order.total_steps
        answers = config.rollout.batch_size * config.rollout.n
        print(f"steps    {rollouts} rollouts of {config.rollout.batch_size} prompts x {config.rollout.n} answers, "
              f"{config.ppo.epochs * (answers // train.global_batch_size)} updates each")  # fmt: skip
    else:
        order = make_order(config, data)
        print(f"steps    {order.total_steps}: {order.mix.pass_rows:,} rows x {order.epoch(order.total_steps):.3g} epochs")
    print(f"data     {data.prefix}: {data.num_samples:,} samples in {data.num_packs:,} packs, {data.num_tokens:,} tokens")
    for line in _sources(data, order):
        print(line)
    table = memory_table(stage, config, spec, world=world, others=others)
    print("memory   a rank, without activations: " + ", ".join(f"{what} {size / GIB:.2f} GiB" for what, size in table))
    together = sum(size for _, size in table)
    print(f"         together {together / GIB:.2f} GiB")
    found = update_activations(stage, config, spec, data, world=world, critic=others.get("critic"))
    print(f"         an update on a GPU, estimated: activations {found.kept / GIB:.2f} GiB, a layer recomputed {found.again / GIB:.2f} GiB, "
          f"log-prob buffers {found.head / GIB:.2f} GiB; with them {(together + found.total) / GIB:.2f} GiB")  # fmt: skip
    if isinstance(config, PPOStage):
        tp, node = config.rollout.tensor_parallel_size, state.ranks_of_a_node()
        planner = make_planner(spec, layout, rollout_tp=tp, node=node, generators=generators)
        for line in reshard.describe(planner.bytes_of_ranks(4 if config.model.dtype == "float32" else 2)):
            print(line)
    print("first sample, [[trained]]:")
    print(_first_sample(data, load_tokenizer(run.source.hf_dir)))


def main(stage: str, config: StageConfig) -> None:
    if isinstance(config, ScoreStage):
        from mrlhf.commands.score import check as check_score

        check_score(config, int(os.environ.get("WORLD_SIZE", Layout.of(config.parallel, 1).smallest)))
    elif isinstance(config, ServeRewardStage):
        from mrlhf.commands.serve_reward import check as check_server

        check_server(config, int(os.environ.get("WORLD_SIZE", Layout.of(config.parallel, 1).smallest)))
    elif isinstance(config, GenerateStage):
        from mrlhf.commands.generate import check as check_generate
        from mrlhf.commands.generate import read_prompts

        source, _ = check_generate(config, int(os.environ.get("WORLD_SIZE", config.tensor_parallel_size)))
        limit = config.max_prompt_length or source.spec.max_position_embeddings - config.max_new_tokens
        print(f"{len(read_prompts(config, load_tokenizer(source.hf_dir), limit))} prompts")
    else:
        _training(stage, config)
    print("nothing wrong was found")
