"""`mrlhf STAGE --dry-run` shows every problem at once, or what the run would do. It needs no GPU and writes nothing.

The number of ranks is WORLD_SIZE if it is set (WORLD_SIZE=64 mrlhf sft ... --dry-run), else the smallest number that
the parallel sizes allow.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import torch

from mrlhf.config.options import GenerateStage, PPOStage, ScoreStage, ServeRewardStage, StageConfig, TrainingConfig
from mrlhf.data.blend import Dataset, names_of, sources_of
from mrlhf.data.order import Order
from mrlhf.data.show import marked
from mrlhf.data.tokenizers.hf import load_tokenizer
from mrlhf.memory.estimate import GIB, memory_table, update_peak
from mrlhf.memory.vllm_budget import CPU_CACHE_MIB, cache_on_a_card
from mrlhf.models.families.spec import ModelSpec
from mrlhf.models.reshard_plan import make_planner
from mrlhf.parallel import device, reshard, state
from mrlhf.parallel.state import Layout
from mrlhf.training import preflight
from mrlhf.training.batches import few_steps_warning, make_order, step_contents
from mrlhf.training.resume import check_resume


def main(config: StageConfig) -> None:
    """Raises every problem of the configuration, together; prints what the run would do."""
    if isinstance(config, ScoreStage):
        from mrlhf.commands.score import check_score

        check_score(config, _num_ranks(Layout.from_config(config.parallel, 1).ranks_per_replica))
    elif isinstance(config, ServeRewardStage):
        from mrlhf.commands.serve_reward import check_server

        check_server(config, _num_ranks(Layout.from_config(config.parallel, 1).ranks_per_replica))
    elif isinstance(config, GenerateStage):
        from mrlhf.commands.generate import check_generate, read_prompts

        source, _ = check_generate(config, _num_ranks(config.tensor_parallel_size))
        limit = config.max_prompt_length or source.spec.max_position_embeddings - config.max_new_tokens
        print(f"{len(read_prompts(config, load_tokenizer(source.hf_dir), limit))} prompts")
    else:
        _show_training(config)
    print("nothing wrong was found")


def _num_ranks(smallest: int) -> int:
    return int(os.environ.get("WORLD_SIZE", smallest))


def _show_training(config: TrainingConfig) -> None:
    one = Layout.from_config(config.parallel, 1)
    smallest, generators = math.lcm(one.tp * one.cp, one.ep) * one.pp, 0
    if isinstance(config, PPOStage):
        generators = config.rollout.num_ranks or 0
        rollout_tp = 1 if generators else config.rollout.tensor_parallel_size
        smallest = math.lcm(smallest, rollout_tp, Layout.from_config(config.critic_parallel, 1).ranks_per_replica)
    world = _num_ranks(smallest + generators)
    run, others = _check_training(config, world)
    check_resume(config, Path(config.train.output_dir))
    preflight.verify_data(config)
    world -= generators
    spec, data = run.source.spec, run.train
    print(f"model    {run.source.path}: {spec.summary()}, {config.model.dtype}")
    print(f"batch    {Layout.from_config(config.parallel, world).batch_summary(config.train)}")
    for note in run.notes:
        print(note)
    _show_steps(config, data)
    _show_memory(config, spec, data, world=world, others=others)
    if isinstance(config, PPOStage):
        _show_reshard(config, spec, world=world, generators=generators)
    _, tokens, mask = data.sample(0)
    print(f"first sample, [[trained]]:\n{marked(load_tokenizer(run.source.hf_dir), tokens, mask)}")


def _check_training(config: TrainingConfig, world: int) -> tuple[preflight.RunInputs, dict[str, ModelSpec]]:
    """The stage's inputs, and the models beside the trained one. Raises every problem, together."""
    if not isinstance(config, PPOStage):
        return preflight.check_run(config, world=world), {}
    from mrlhf.checkpoint.source import open_source
    from mrlhf.rl.ppo_checks import check_ppo
    from mrlhf.rl.rewards.sources import critic_source, model_sources

    run = check_ppo(config, world)
    critic = {"critic": critic_source(config, run.source).spec} if config.ppo.estimator_row.needs_critic else {}
    return run, critic | {f"reward {path}": open_source(path).spec for path in model_sources(config.reward)}


def _show_steps(config: TrainingConfig, data: Dataset) -> None:
    if isinstance(config, PPOStage):
        from mrlhf.rl.rollout.prompts import make_prompt_order

        order, rollout = make_prompt_order(config, data), config.rollout
        size = f"{rollout.batch_size} prompts x {rollout.n} answers"
        print(f"steps    {order.total_steps} rollouts of {size}, {config.updates_per_rollout} updates each")
    else:
        order = make_order(config, data)
        epochs = order.epoch(order.total_steps)
        print(f"steps    {order.total_steps}: {order.mix.pass_rows:,} rows x {epochs:.3g} epochs")
        print(f"         {step_contents(config, data)}")
        if warning := few_steps_warning(config, order, data):
            print(f"warning: {warning}")
    counts = f"{data.num_samples:,} samples in {data.num_packs:,} packs, {data.num_tokens:,} tokens"
    print(f"data     {data.prefix}: {counts}")
    _show_blend(data, order)


def _show_blend(data: Dataset, order: Order) -> None:
    """One line for each data set of a blend: its share of all rows of the run."""
    parts, total = sources_of(data), order.position(order.total_steps)
    if len(parts) == 1:
        return
    names = names_of([p.prefix for p in parts])
    for name, used, size in zip(names, order.approximate_counts(total), order.mix.rows, strict=True):
        print(f"         {name}: {used:,} of {total:,} rows ({used / total:.2%}), {used / size:.3g} epochs")


def _show_memory(
    config: TrainingConfig, spec: ModelSpec, data: Dataset, *, world: int, others: dict[str, ModelSpec]
) -> None:
    table = memory_table(config, spec, world=world, others=others)
    together = sum(size for _, size in table)
    print("memory   a rank, without activations: " + ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in table))
    print(f"         together {together / GIB:.2f} GiB")
    peak = update_peak(config, spec, data, world=world, others=others)
    update, stages = peak.update, config.parallel.pipeline_model_parallel_size
    where = f"pipeline stage {peak.stage}, " if stages > 1 else ""
    print(f"         peak of an update on a GPU: {peak.total / GIB:.2f} GiB ({where}{update.moment}'s backward): "
          f"models {peak.models / GIB:.2f} GiB, activations {update.kept / GIB:.2f} GiB, "
          f"a layer recomputed {update.again / GIB:.2f} GiB, temporary tensors {update.work / GIB:.2f} GiB")
    if isinstance(config, PPOStage) and config.rollout.kv_cache_mib is None:
        card = torch.cuda.mem_get_info()[1] if device.current().is_cuda else 80 * GIB
        tokens = data.max_length + config.rollout.max_new_tokens
        cache = cache_on_a_card(config, spec, world=world, others=others, tokens=tokens, update=update.total, card=card)
        print(f"         vLLM key/value cache (rollout.kv_cache_mib unset): {cache / GIB:.2f} GiB of a GPU of "
              f"{card / GIB:.0f} GiB, {CPU_CACHE_MIB / 1024:.2f} GiB on a CPU")


def _show_reshard(config: PPOStage, spec: ModelSpec, *, world: int, generators: int) -> None:
    planner = make_planner(spec, Layout.from_config(config.parallel, world),
                           rollout_tp=config.rollout.tensor_parallel_size, node=state.ranks_of_a_node(),
                           generators=generators)
    for line in reshard.traffic_summary(planner.bytes_of_ranks(4 if config.model.dtype == "float32" else 2)):
        print(line)
