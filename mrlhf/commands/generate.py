"""`mrlhf generate`: a checkpoint answers a file of prompts, through vLLM and the same reshard as in PPO.

Reward sources score the answers, an environment turns them into conversations, `best_of` writes rows to train on.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrlhf.checkpoint.manifest import write_text
from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.commands.best_of import Prompt, Row, choose_best_and_worst, pair_row, sft_row
from mrlhf.config.options import GenerateStage, ParallelConfig
from mrlhf.data.prepare.formats import Columns, normalise
from mrlhf.data.prepare.sources import read_chunks
from mrlhf.data.prepare.template import Template, plain_template
from mrlhf.data.prepare.tokenise import SHOWN, RowFault, fault_error, read_record
from mrlhf.data.tokenizers.hf import load_tokenizer, stop_ids
from mrlhf.errors import CheckpointError, ConfigError, DataError, MrlhfError, Problems, RowProblem
from mrlhf.models.families.spec import check_layout, rename_keys
from mrlhf.models.reshard_plan import make_weight_update
from mrlhf.observe.directory import file_problems
from mrlhf.parallel import device, state
from mrlhf.rl.rewards.sources import Rewards, check_reward_sources
from mrlhf.rl.rollout.environments import check_environment, make_environments
from mrlhf.rl.rollout.tables import Rollout, generate_rollout, micro_batches
from mrlhf.rl.rollout.vllm_checks import check_vllm_model
from mrlhf.rl.rollout.vllm_engine import Sampling, VLLMEngine
from mrlhf.training.batches import make_batch_plan
from mrlhf.training.trainer import DTYPES, Model

log = logging.getLogger(__name__)


# What mends rows of a kind here, where no option names the columns
_FIXES = {
    "missing": "rename the column of the prompts to prompt",
    "message_keys": "rename from to role, value to content, human to user, gpt to assistant",
    "prompt_role": "remove the last message",
    "plain_turns": "leave out --input_template",
    "plain_content": "leave out --input_template",
    "tools_ignored": "a chat template that renders tools in the model's directory, or remove the column",
    "too_long": "shorter prompts, or a smaller --max_new_tokens",
}


@dataclass(frozen=True)
class PromptRow:
    """One line of the prompts' file: the record, its prompt, and the prompt's token ids."""

    record: dict[str, Any]
    prompt: Prompt
    ids: list[int]


def read_prompts(config: GenerateStage, tokenizer: Any, limit: int) -> list[PromptRow]:
    """Raises DataError for every bad line, together, as file:line. limit: tokens of a prompt."""
    if config.input_template is None and tokenizer.chat_template is None:
        raise ConfigError("the tokenizer has no chat template", where=tokenizer.name_or_path,
                          expected="one, or the template that the training data was made with",
                          fix='--input_template "User: {}\\nAssistant: "')
    written = config.input_template
    template = Template(tokenizer, input_template=None if written is None else plain_template(written))
    rows: list[PromptRow] = []
    faults: dict[str, list[RowFault]] = {}
    count = 0
    for chunk in read_chunks((config.prompts,), flag="--prompts"):
        count += len(chunk.rows)
        for i, number in enumerate(chunk.numbers):
            try:
                rows.append(_read_prompt(read_record(chunk, i), template, limit))
            except RowProblem as error:
                fix = _FIXES.get(error.kind.partition(":")[0], "mend or remove such rows")
                fault = RowFault(error.kind, chunk.path, number, error.what, error.expected, fix)
                faults.setdefault(error.kind, []).append(fault)
    problems = Problems()
    problems.extend(fault_error(own[:SHOWN], count=len(own), rows=count) for own in faults.values())
    problems.raise_if_any()
    if not rows:
        raise DataError("no rows", where=config.prompts, expected="a prompt in every line")
    return rows


def _read_prompt(record: Any, template: Template, limit: int) -> PromptRow:
    sample = normalise(record, "prompts", Columns(), plain=template.plain)
    prompt = sample.prompt or ""
    ids = template.render_prompt(prompt, tools=sample.tools)
    if len(ids) > limit:
        raise RowProblem("too_long", f"the prompt has {len(ids)} tokens", expected=f"at most {limit}")
    if isinstance(prompt, str) and not template.plain:
        prompt = [{"role": "user", "content": prompt}]
    return PromptRow(record, prompt, ids)


def check_generate(config: GenerateStage, world: int) -> tuple[ModelSource, ParallelConfig]:
    """The model and its layout, which has vLLM's tensor parallel size. Raises every problem, together."""
    source = open_source(config.checkpoint)
    parallel = ParallelConfig(tensor_model_parallel_size=config.tensor_parallel_size)
    problems = Problems()
    layout: list[MrlhfError] = [*check_vllm_model(source.spec, tp=config.tensor_parallel_size, world=world,
                                                  key="tensor_parallel_size")]
    layout = layout or [*check_layout(parallel, source.spec, world, trained=False)]
    layout += check_reward_sources(config.reward, source, parallel=parallel, world=world)
    problems.extend(rename_keys(layout, {"parallel.tensor_model_parallel_size": "tensor_parallel_size"}))
    if source.head != "lm":
        what = "it holds a value model, which writes no text"
        problems.add(CheckpointError(what, where=config.checkpoint, expected="a language model"))
    for key, path in (("output", config.output), ("pairs", config.pairs)):
        if path is not None and not Path(path).resolve().parent.is_dir():
            problems.add(DataError("the directory does not exist", where=path))
        elif path is not None:
            problems.extend(file_problems(path, key=key))
    problems.extend(check_environment(config.environment, load_tokenizer(source.hf_dir), {}))
    problems.raise_if_any()
    return source, parallel


def main(config: GenerateStage) -> None:
    source, parallel = check_generate(config, state.world_size())
    tokenizer = load_tokenizer(source.hf_dir)
    limit = config.max_prompt_length or source.spec.max_position_embeddings - config.max_new_tokens
    rows = read_prompts(config, tokenizer, limit)
    layout = state.initialize(parallel, seed=config.seed)
    rank, tp = dist.get_rank(), config.tensor_parallel_size
    model = Model(source, parallel, head="lm", dtype=config.dtype or source.dtype, seed=config.seed)
    log.info(f"device: {device.current().summary()}; {model.dtype}")
    engine = VLLMEngine(source.spec, source.hf_dir, dtype=model.dtype, tp=tp,
                        max_model_len=max(len(row.ids) for row in rows) + config.max_new_tokens,
                        kv_cache_mib=config.kv_cache_mib, max_num_seqs=config.max_num_seqs, seed=config.seed,
                        tokenizer_dir=source.hf_dir if config.stop else None, cache_key="kv_cache_mib",
                        sleep=bool(config.reward.sources))
    weights = engine.weights
    dtype = DTYPES[model.dtype]
    update = make_weight_update(source.spec, layout, rollout_tp=tp, rank=rank, dtype=dtype, made=weights.made)
    update.exchange(model.parameters(), weights.parameters, weights.convert)
    engine.weights_changed()
    del model
    ids = stop_ids(source.hf_dir, tokenizer)
    rollout = generate_rollout(
        engine, [row.ids for row in rows], n=config.best_of or config.n,
        sampling=Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens, ids, config.stop),
        seed=config.seed, step=0, labels=[row.record.get("label") for row in rows], replicas=layout.world // tp,
        replica=rank // tp,
        environments=make_environments(config.environment, tokenizer, ids, max_turns=config.max_turns, threads=16,
                                       timeout_s=60.0, tp=tp, world=layout.world, rank=rank)
    )
    engine.sleep()  # reward models need the memory
    scores = score_answers(config, source, parallel, tokenizer, rollout)
    if state.is_main():
        print(write_answers(config, tokenizer, rows, rollout, scores))
    engine.shutdown()
    state.shutdown()


def score_answers(
    config: GenerateStage, source: ModelSource, parallel: ParallelConfig, tokenizer: Any, rollout: Rollout
) -> list[float] | None:
    """The score of every answer; None if there are no reward sources and no environment. Collective."""
    if not config.reward.sources and config.environment is None:
        return None
    environment = config.environment is not None
    rewards = Rewards(config.reward, source, tokenizer, parallel=parallel, dtype=config.dtype, seed=config.seed,
                      environment=environment)
    plan = make_batch_plan(state.groups(), packing=True, micro_batch_size=config.micro_batch_size)
    scores_B, _ = rewards.score(rollout, micro_batches(rollout, plan.with_fillers(range(rollout.size)), plan))
    rewards.close()
    return scores_B.tolist()


def write_answers(config: GenerateStage, tokenizer: Any, prompts: list[PromptRow], rollout: Rollout,
                  scores: list[float] | None) -> str:
    """Writes the output files and returns a line about them."""
    n = config.best_of or config.n
    # In a conversation the special tokens show the turns.
    texts = [tokenizer.decode(a.tokens, skip_special_tokens=config.environment is None) for a in rollout.answers]
    rows: list[Row] = []
    pairs: list[Row] = []
    for i, prompt in enumerate(prompts):
        own = slice(i * n, (i + 1) * n)
        if not config.best_of:
            own_scores = {} if scores is None else {"scores": scores[own]}
            rows.append({**prompt.record, "completions": texts[own], **own_scores})
            continue
        assert scores is not None
        _add_best(config, prompt, texts[own], scores[own], [a.stopped for a in rollout.answers[own]], rows, pairs)
    _write_lines(config.output, rows)
    line = f"{rollout.size} answers to {len(prompts)} prompts: {config.output}"
    if scores is not None:
        line += f", mean score {sum(scores) / len(scores):.4f}"
    if config.best_of:
        line += f"; {len(rows)} best answers"
    if config.pairs is not None:
        _write_lines(config.pairs, pairs)
        line += f", {len(pairs)} pairs: {config.pairs}"
    return line


def _add_best(config: GenerateStage, prompt: PromptRow, texts: list[str], scores: list[float], stopped: list[bool],
              rows: list[Row], pairs: list[Row]) -> None:
    """Appends the prompt's best answer to `rows`, its best and worst answers to `pairs`."""
    choice = choose_best_and_worst(texts, scores, stopped, tolerance=config.reward.equal_tolerance)
    if choice is None or (config.min_score is not None and scores[choice.best] < config.min_score):
        return
    best, worst = choice.best, choice.worst
    rows.append(sft_row(prompt.record, prompt.prompt, texts[best], scores[best]))
    if worst is not None:
        pairs.append(pair_row(prompt.record, prompt.prompt, texts[best], texts[worst], (scores[best], scores[worst])))


def _write_lines(path: str, rows: list[Row]) -> None:
    write_text(Path(path), "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
