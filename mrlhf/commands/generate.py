"""`mrlhf generate`: answers of a checkpoint to a file of prompts, through vLLM and the same reshard as in PPO.

With reward sources they are scored, with an environment they are conversations; `best_of` writes rows to train on.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrlhf.checkpoint.manifest import write_text
from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.commands.best_of import Prompt, Row, choose, pair_row, sft_row
from mrlhf.config.options import GenerateStage, ParallelConfig
from mrlhf.data.prepare.formats import Columns, normalise
from mrlhf.data.prepare.sources import read_chunks
from mrlhf.data.prepare.template import Template
from mrlhf.data.tokenizers.hf import load_tokenizer, stop_ids
from mrlhf.errors import CheckpointError, DataError, Problems, RowProblem
from mrlhf.models.families.spec import check_layout
from mrlhf.models.reshard_plan import make_weight_update
from mrlhf.parallel import device, state
from mrlhf.rl.rewards.sources import Rewards
from mrlhf.rl.rollout.environments import check_environment, make_environments
from mrlhf.rl.rollout.tables import Rollout, generate, micro_batches
from mrlhf.rl.rollout.vllm_engine import Sampling, VLLMEngine, check_rollout
from mrlhf.training.run import say
from mrlhf.training.trainer import DTYPES, Model


@dataclass(frozen=True)
class Asked:
    """A line of the prompts' file."""

    record: dict[str, Any]
    prompt: Prompt
    ids: list[int]


def read_prompts(config: GenerateStage, tokenizer: Any, limit: int) -> list[Asked]:
    """Raises every bad line at once, as file:line."""
    template = Template(tokenizer, input_template=config.input_template)
    found: list[Asked] = []
    problems = Problems()
    for chunk in read_chunks((config.prompts,)):
        for i, number in enumerate(chunk.numbers):
            where = f"{chunk.path}:{number}"
            try:
                record = chunk.record(i)
                prompt = normalise(record, "prompts", Columns(), plain=template.plain).prompt or ""
                ids = template.render_prompt(prompt)
            except RowProblem as error:
                problems.add(DataError(error.what, where=where, expected=error.expected))
                continue
            except ValueError as error:
                problems.add(DataError(f"not JSON: {error}", where=where))
                continue
            if len(ids) > limit:
                problems.add(DataError(f"the prompt has {len(ids)} tokens", where=where, expected=f"at most {limit}"))
            found.append(
                Asked(record, prompt if template.plain or not isinstance(prompt, str) else [{"role": "user", "content": prompt}], ids)
            )
    problems.raise_if_any()
    return found


def check(config: GenerateStage, world: int) -> tuple[ModelSource, ParallelConfig]:
    """The model and the layout it is loaded in: tensor parallel like vLLM's, where the model allows it."""
    source = open_source(config.checkpoint)
    parallel = ParallelConfig(tensor_model_parallel_size=config.tensor_parallel_size)
    problems = Problems()
    problems.extend(
        check_rollout(source.spec, tp=config.tensor_parallel_size, world=world, key="tensor_parallel_size")
        or check_layout(parallel, source.spec, world, trained=False)
    )
    if source.head != "lm":
        problems.add(CheckpointError("it holds a value model, which writes no text", where=config.checkpoint, expected="a language model"))
    for path in (config.output, config.pairs):
        if path is not None and not Path(path).resolve().parent.is_dir():
            problems.add(DataError("the directory does not exist", where=path))
    problems.extend(Rewards.check(config.reward, source, parallel=parallel, world=world))
    problems.extend(check_environment(config.environment, load_tokenizer(source.hf_dir), {}))
    problems.raise_if_any()
    return source, parallel


def main(config: GenerateStage) -> None:
    source, parallel = check(config, state.world_size())
    tokenizer = load_tokenizer(source.hf_dir)
    limit = config.max_prompt_length or source.spec.max_position_embeddings - config.max_new_tokens
    asked = read_prompts(config, tokenizer, limit)
    layout = state.initialize(parallel, seed=config.seed)
    rank, tp = dist.get_rank(), config.tensor_parallel_size
    say(f"device: {device.current().describe()}")
    model = Model(source, parallel, head="lm", dtype=config.dtype, seed=config.seed)
    engine = VLLMEngine(
        source.spec,
        source.hf_dir,
        dtype=config.dtype,
        tp=tp,
        max_model_len=max(len(a.ids) for a in asked) + config.max_new_tokens,
        kv_cache_mib=config.kv_cache_mib,
        max_num_seqs=config.max_num_seqs,
        seed=config.seed,
        tokenizer_dir=source.hf_dir if config.stop else None,
    )
    weights = engine.weights
    plan = make_weight_update(source.spec, layout, rollout_tp=tp, rank=rank, dtype=DTYPES[config.dtype], made=weights.made)
    plan.exchange(model.parameters(), weights.parameters, weights.make)
    engine.weights_changed()
    del model
    ids = stop_ids(source.hf_dir, tokenizer)
    rollout = generate(
        engine,
        [a.ids for a in asked],
        n=config.best_of or config.n,
        sampling=Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens, ids, config.stop),
        seed=config.seed,
        step=0,
        labels=[a.record.get("label") for a in asked],
        replicas=layout.world // tp,
        replica=rank // tp,
        environments=make_environments(
            config.environment, tokenizer, ids, max_turns=config.max_turns, threads=16, timeout_s=60.0, tp=tp, world=layout.world, rank=rank
        ),
    )
    scores = score(config, source, parallel, layout, tokenizer, rollout)
    if state.is_main():
        say(write(config, tokenizer, asked, rollout, scores))
    engine.shutdown()
    state.shutdown()


def score(
    config: GenerateStage, source: ModelSource, parallel: ParallelConfig, layout: state.Layout, tokenizer: Any, rollout: Rollout
) -> list[float] | None:
    """Of every answer; None without reward sources and environment. Collective."""
    if not config.reward.sources and config.environment is None:
        return None
    environment = config.environment is not None
    rewards = Rewards(config.reward, source, tokenizer, parallel=parallel, dtype=config.dtype, seed=config.seed, environment=environment)
    _, dp_rank, _ = layout.coordinates(dist.get_rank())
    unit = config.micro_batch_size * layout.dp
    batches = micro_batches(
        rollout,
        [*range(rollout.size), *[-1] * (-rollout.size % unit)],
        micro_batch_size=config.micro_batch_size,
        max_tokens=None,
        dp_rank=dp_rank,
        dp_size=layout.dp,
        packing=True,
        pad_multiple=state.pad_multiple(parallel),
        slice_multiple=1,
    )
    scores_B, _ = rewards.score(rollout, batches)
    rewards.close()
    return scores_B.tolist()


def write(config: GenerateStage, tokenizer: Any, asked: list[Asked], rollout: Rollout, scores: list[float] | None) -> str:
    """The output files; a line about them."""
    n = config.best_of or config.n
    # of a conversation the turns are of interest
    texts = [tokenizer.decode(a.tokens, skip_special_tokens=config.environment is None) for a in rollout.answers]
    rows: list[Row] = []
    pairs: list[Row] = []
    for i, question in enumerate(asked):
        own = slice(i * n, (i + 1) * n)
        if not config.best_of:
            rows.append({**question.record, "completions": texts[own], **({} if scores is None else {"scores": scores[own]})})
            continue
        assert scores is not None
        own_texts, own_scores = texts[own], scores[own]
        choice = choose(own_texts, own_scores, [a.stopped for a in rollout.answers[own]])
        if choice is None or (config.min_score is not None and own_scores[choice.best] < config.min_score):
            continue
        rows.append(sft_row(question.record, question.prompt, own_texts[choice.best], own_scores[choice.best]))
        if choice.worst is not None:
            both = own_scores[choice.best], own_scores[choice.worst]
            pairs.append(pair_row(question.record, question.prompt, own_texts[choice.best], own_texts[choice.worst], both))
    _write_lines(config.output, rows)
    said = f"{rollout.size} answers to {len(asked)} prompts: {config.output}"
    if scores is not None:
        said += f", mean score {sum(scores) / len(scores):.4f}"
    if config.best_of:
        said += f"; {len(rows)} best answers"
    if config.pairs is not None:
        _write_lines(config.pairs, pairs)
        said += f", {len(pairs)} pairs: {config.pairs}"
    return said


def _write_lines(path: str, rows: list[Row]) -> None:
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
