"""`mrlhf generate`: answers of a checkpoint to a file of prompts, through vLLM and the same reshard as in PPO."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrlhf.checkpoint import ModelSource, open_source, write_text
from mrlhf.config import GenerateStage, ParallelConfig
from mrlhf.data.formats import Columns, RowProblem, normalise
from mrlhf.data.sources import read_chunks
from mrlhf.data.template import Template
from mrlhf.engine import DTYPES, Model
from mrlhf.errors import CheckpointError, DataError, Problems
from mrlhf.models.layouts import make_reshard
from mrlhf.models.spec import check_layout
from mrlhf.parallel import device, state
from mrlhf.rl.rollout import generate
from mrlhf.rl.vllm_engine import Sampling, VLLMEngine, check_rollout
from mrlhf.supervised import say
from mrlhf.tokenizer import load, stop_ids


def read_prompts(config: GenerateStage, tokenizer: Any, limit: int) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """(records, prompt ids). Raises every bad line at once, as file:line."""
    template = Template(tokenizer, input_template=config.input_template)
    records: list[dict[str, Any]] = []
    prompts: list[list[int]] = []
    problems = Problems()
    for chunk in read_chunks((config.prompts,)):
        for i, number in enumerate(chunk.numbers):
            where = f"{chunk.path}:{number}"
            try:
                record = chunk.record(i)
                ids = template.render_prompt(normalise(record, "prompts", Columns(), plain=template.plain).prompt or "")
            except RowProblem as error:
                problems.add(DataError(error.what, where=where, expected=error.expected))
                continue
            except ValueError as error:
                problems.add(DataError(f"not JSON: {error}", where=where))
                continue
            if len(ids) > limit:
                problems.add(DataError(f"the prompt has {len(ids)} tokens", where=where, expected=f"at most {limit}"))
            records.append(record)
            prompts.append(ids)
    problems.raise_if_any()
    return records, prompts


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
    if not Path(config.output).resolve().parent.is_dir():
        problems.add(DataError("the directory does not exist", where=config.output))
    problems.raise_if_any()
    return source, parallel


def main(config: GenerateStage) -> None:
    source, parallel = check(config, state.world_size())
    tokenizer = load(source.hf_dir)
    limit = config.max_prompt_length or source.spec.max_position_embeddings - config.max_new_tokens
    records, prompts = read_prompts(config, tokenizer, limit)
    layout = state.initialize(parallel, seed=config.seed)
    say(f"device: {device.current().describe()}")
    model = Model(source, parallel, head="lm", dtype=config.dtype, seed=config.seed)
    engine = VLLMEngine(
        source.spec,
        source.hf_dir,
        dtype=config.dtype,
        tp=config.tensor_parallel_size,
        max_model_len=max(map(len, prompts)) + config.max_new_tokens,
        kv_cache_mib=config.kv_cache_mib,
        max_num_seqs=config.max_num_seqs,
        seed=config.seed,
    )
    plan = make_reshard(source.spec, layout, rollout_tp=config.tensor_parallel_size, rank=dist.get_rank(), dtype=DTYPES[config.dtype])
    plan.exchange(model.parameters(), engine.parameters)
    engine.weights_changed()
    del model
    sampling = Sampling(config.temperature, config.top_p, config.top_k, config.max_new_tokens, stop_ids(source.hf_dir, tokenizer))
    rollout = generate(
        engine,
        prompts,
        n=config.n,
        sampling=sampling,
        seed=config.seed,
        step=0,
        labels=records,
        replicas=layout.world // config.tensor_parallel_size,
        replica=dist.get_rank() // config.tensor_parallel_size,
    )
    if state.is_main():
        texts = [tokenizer.decode(a.tokens, skip_special_tokens=True) for a in rollout.answers]
        lines = [{**record, "completions": texts[i * config.n : (i + 1) * config.n]} for i, record in enumerate(records)]
        write_text(Path(config.output), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    engine.shutdown()
    say(f"{rollout.size} answers to {len(prompts)} prompts: {config.output}")
    state.shutdown()
