"""Opens model and data of a run and reports every problem before the run starts.

Every stage and `--dry-run` use it. It opens files and builds no model.
"""

from __future__ import annotations

import logging
import shlex
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from mrlhf.checkpoint.source import ModelSource, open_source
from mrlhf.config.options import DataSource, PPOStage, TrainingConfig
from mrlhf.data.blend import Blend, Dataset, mismatches, sources_of
from mrlhf.data.indexed import PackedDataset, file_problem, read_meta
from mrlhf.data.megatron_text import MegatronText, is_megatron
from mrlhf.data.tokenizers.hf import fingerprint
from mrlhf.errors import CheckpointError, ConfigError, DataError, EnvironmentProblem, MrlhfError, Problems
from mrlhf.models.families.spec import check_layout
from mrlhf.models.layers import router_losses
from mrlhf.observe.directory import directory_problem
from mrlhf.observe.tracker import logger_problems
from mrlhf.parallel import device, state
from mrlhf.training.batches import make_order

log = logging.getLogger(__name__)
_PREPROCESS = "python tools/preprocess_data.py"
TASKS = {"pretrain": "pretrain", "sft": "sft", "rm": "preference", "dpo": "preference", "ppo": "prompts"}


@dataclass(frozen=True)
class RunInputs:
    """Model and data of a run, opened and checked."""

    source: ModelSource
    train: Dataset
    eval: Dataset | None
    notes: tuple[str, ...] = ()  # lines to log before the run


@dataclass
class Opened:
    """The inputs of a run that could be opened, and all problems so far. A stage adds its own, then calls `inputs`."""

    config: TrainingConfig
    problems: Problems
    source: ModelSource | None = None
    train: Dataset | None = None
    eval: Dataset | None = None
    notes: list[str] = field(default_factory=list)

    def datasets(self) -> list[tuple[str, Dataset]]:
        """(configuration key, data) of each data set that could be opened."""
        both = (("data.train", self.train), ("data.eval", self.eval))
        return [(key, data) for key, data in both if data is not None]

    @property
    def whole_train(self) -> Dataset | None:
        """data.train if all of its sources could be opened and are of the stage's task: its rows can be counted."""
        train = self.train
        if train is None or train.task != TASKS[self.config.stage]:
            return None
        return train if len(sources_of(train)) == len(self.config.data.train) else None

    def check_schedule(self, steps: int) -> None:
        """Checks warm-up and decay against the run's optimizer steps. A warm-up alone may be longer: a short trial."""
        optim = self.config.optim
        warmup, decay = optim.lr_warmup_steps, optim.lr_wsd_decay_steps
        if optim.lr_decay_style == "WSD" and warmup + decay > steps:
            key, keys = "optim.lr_wsd_decay_steps", "--optim.lr_warmup_steps {} --optim.lr_wsd_decay_steps {}"
            what = f"{key} = {decay} and optim.lr_warmup_steps = {warmup} exceed the run's {steps} optimizer steps"
            shorter = min(steps * warmup // (warmup + decay), steps - 1)
            fix = keys.format(shorter, steps - shorter)
            self.problems.add(ConfigError(what, where=key, expected=f"{steps} or less, together", fix=fix))
        elif warmup > steps:
            what = f"optim.lr_warmup_steps = {warmup} is longer than the run, {steps} optimizer steps"
            end = f"the learning rate rises to {optim.lr * steps / warmup:.3g} of optim.lr = {optim.lr:g}"
            self.notes.append(f"{what}: {end}")

    def inputs(self) -> RunInputs:
        """Raises all problems together."""
        self.problems.raise_if_any()
        assert self.source is not None and self.train is not None
        parts = [part for _, data in self.datasets() for part in sources_of(data)]
        notes = self.notes + [part.note for part in parts if isinstance(part, MegatronText)]
        if self.source.spec.experts is not None:
            notes.append(router_losses.balance_summary(self.config.model))
        return RunInputs(self.source, self.train, self.eval, tuple(notes))


def open_train(sources: Sequence[DataSource], *, task: str, source: ModelSource | None,
               seq_length: int | None) -> tuple[Dataset | None, list[MrlhfError]]:
    """Opens data.train, one data set or a blend. Returns it, and where its parts do not fit the run or each other."""
    opened, weights, problems = [], [], []
    for item in sources:
        data, errors = open_data(item.prefix, key="data.train", task=task, source=source, seq_length=seq_length)
        problems += errors
        if data is not None:
            opened.append(data)
            weights.append(1.0 if item.loss_weight is None else item.loss_weight)
    if not opened:
        return None, problems
    problems += mismatches(opened, key="data.train")
    return opened[0] if len(opened) == 1 else Blend(opened, loss_weights=weights), problems


def _open_megatron(prefix: str, *, key: str, source: ModelSource | None, seq_length: int | None) -> MegatronText:
    if seq_length is None:
        length = 4096 if source is None else min(4096, source.spec.max_position_embeddings)
        raise DataError("this is Megatron-LM's own text, which sets no sequence length", where=f"{key} = {prefix}",
                        expected="data.seq_length", fix=f"--data.seq_length {length}")
    return MegatronText(prefix, seq_length=seq_length,
                        vocab_size=source.spec.vocab_size if source is not None else 1 << 62)


def open_data(prefix: str, *, key: str, task: str | None, source: ModelSource | None,
              seq_length: int | None) -> tuple[Dataset | None, list[MrlhfError]]:
    """Opens a data set. Returns it, and all problems between it and the run. key: the option that names the prefix."""
    data: Dataset
    try:
        if task == "pretrain" and is_megatron(prefix):
            data = _open_megatron(prefix, key=key, source=source, seq_length=seq_length)
        else:
            data = PackedDataset.open(prefix)
    except DataError as error:
        where = f"{key} = {prefix}" if error.where in (None, prefix, f"{key} = {prefix}") else f"{key}: {error.where}"
        return None, [DataError(error.what, where=where, expected=error.expected, fix=error.fix)]
    problems: list[MrlhfError] = []

    def add_problem(what: str, expected: str, fix: str | None = None) -> None:
        problems.append(DataError(what, where=f"{key} = {prefix}", expected=expected, fix=fix))

    if task is not None and data.task != task:
        add_problem(f"the data was made with --task {data.task}", f"--task {task}",
                    f"{_PREPROCESS} --task {task} ...")
    if seq_length is not None and data.meta["seq_length"] != seq_length:
        add_problem(f"the data was made with --seq-length {data.meta['seq_length']}", f"data.seq_length = {seq_length}",
                    f"--data.seq_length {data.meta['seq_length']}")
    if source is not None:
        limit = source.spec.max_position_embeddings
        if data.max_length > limit:
            is_cut_here = isinstance(data, MegatronText)
            add_problem(f"its longest sample has {data.max_length} tokens",
                        f"at most max_position_embeddings = {limit} of {source.path}",
                        f"--data.seq_length {limit}" if is_cut_here else f"{_PREPROCESS} --seq-length {limit} ...")
        if isinstance(data, MegatronText):
            return data, problems
        try:
            theirs, ours = data.meta["tokenizer_fingerprint"], fingerprint(source.hf_dir)
        except DataError as error:
            return data, [*problems, error]
        if theirs != ours:
            made_with = f"{data.meta['tokenizer']}, fingerprint {theirs[:12]}"
            add_problem(f"the data's tokenizer ({made_with}) is not the model's ({source.hf_dir}, {ours[:12]})",
                        "one tokenizer for data and model",
                        f"{_PREPROCESS} --tokenizer {shlex.quote(str(source.hf_dir))} ...")
        elif data.meta["vocab_size"] > source.spec.vocab_size:
            add_problem(f"the tokenizer has {data.meta['vocab_size']} ids",
                        f"at most vocab_size = {source.spec.vocab_size} of {source.path}")
    return data, problems


def open_run(config: TrainingConfig, *, world: int) -> Opened:
    """Opens model and data and does the checks that all training stages share. world: number of training ranks."""
    opened = Opened(config, problems := Problems())
    problems.extend(_check_machine(config))
    try:
        source: ModelSource | None = open_source(config.model.path)
    except CheckpointError as error:
        source, where = None, f"model.path: {error.where or config.model.path}"
        problems.add(CheckpointError(error.what, where=where, expected=error.expected, fix=error.fix))
    if source is not None:
        apart = (config.rollout.num_ranks or 0) if isinstance(config, PPOStage) else 0
        problems.extend(check_layout(config.parallel, source.spec, world, apart=apart))
        problems.extend(_check_model(config, source))
    opened.source = source
    answers = config.rollout.batch_size * config.rollout.n if isinstance(config, PPOStage) else 0
    problems.extend(state.check_batch(config.train, config.parallel, world, answers=answers))
    how: dict[str, Any] = {"task": TASKS[config.stage], "source": source, "seq_length": config.data.seq_length}
    opened.train, errors = open_train(config.data.train, **how)
    problems.extend(errors)
    if config.data.eval is not None:
        opened.eval, errors = open_data(config.data.eval, key="data.eval", **how)
        problems.extend(errors)
    for key, data in opened.datasets():
        if config.stage != "ppo" or data.task == "prompts":
            problems.extend(check_micro_batches(config, data, key=key))
    return opened


def check_run(config: TrainingConfig, *, world: int) -> RunInputs:
    """The inputs of a supervised stage. Raises all problems together."""
    opened = open_run(config, world=world)
    if (train := opened.whole_train) is not None:
        opened.check_schedule(make_order(config, train).total_steps)
    return opened.inputs()


def _check_machine(config: TrainingConfig) -> list[MrlhfError]:
    """The device, the loggers that were asked for, and the directory that the run writes into."""
    problems: list[MrlhfError] = []
    try:
        device.current()
    except EnvironmentProblem as error:
        problems.append(error)
    if state.is_main():
        asked = {"wandb": config.logging.wandb_project, "mlflow": config.logging.mlflow_experiment}
        problems += logger_problems({name: value for name, value in asked.items() if value})
        parts = ("", "checkpoints", "hf", "heartbeat", "logs", "samples")
        wrong = [directory_problem(Path(config.train.output_dir, part), key="train.output_dir") for part in parts]
        problems += [problem for problem in wrong if problem is not None][:1]
    return problems


def verify_data(config: TrainingConfig) -> None:
    """data.verify: hash. Raises DataError on every rank, with all files whose bytes are not those that were written.

    Collective where torch.distributed runs: the ranks of a host divide its files among them (about 1.5 GB/s each).
    """
    if config.data.verify != "hash":
        return
    prefixes = [source.prefix for source in config.data.train]
    prefixes += [] if config.data.eval is None else [config.data.eval]
    if isinstance(config, PPOStage) and config.ptx.coef > 0 and config.ptx.data is not None:
        prefixes.append(config.ptx.data)
    unhashed = [prefix for prefix in prefixes if is_megatron(prefix)]
    files = [(prefix, suffix, digest) for prefix in dict.fromkeys(prefixes) if prefix not in unhashed
             for suffix, digest in read_meta(prefix)["files"].items()]
    files.sort(key=lambda file: -file[2]["bytes"])
    at, ranks = 0, 1
    if dist.is_initialized():
        host = socket.gethostname()
        neighbours = [rank for name, rank in state.from_all_ranks([(host, dist.get_rank())]) if name == host]
        at, ranks = neighbours.index(dist.get_rank()), len(neighbours)
    wrong = [problem for file in files[at::ranks] for problem in file_problem(*file, verify=True)]
    problems = Problems()
    problems.extend(state.from_all_ranks(wrong) if dist.is_initialized() else wrong)
    problems.raise_if_any()
    size = sum(digest["bytes"] for _, _, digest in files)
    log.info(f"data.verify: the hashes of all {len(files):,} files are right ({size / 2**30:.2f} GiB)")
    for prefix in unhashed:
        log.info(f"data.verify: {prefix} is Megatron-LM's own data and holds no hashes: only sizes and ids are checked")


def _check_model(config: TrainingConfig, source: ModelSource) -> list[ConfigError]:
    experts, problems = source.spec.experts, []
    if config.stage != "rm" and source.head == "value":
        what = f"model.path = {config.model.path} holds a value model"
        problems.append(ConfigError(what, where="model.path", expected="an LM checkpoint"))
    for name in ("moe_aux_loss_coeff", "moe_z_loss_coeff"):
        key = f"model.{name}"
        if getattr(config.model, name) and experts is None:
            what = f"{key} is set, and {source.path} has no experts"
            problems.append(ConfigError(what, where=key, expected="0", fix=f"--{key} 0"))
    is_cut = config.parallel.pipeline_model_parallel_size > 1 and config.model.dtype != "float32"
    if config.stage == "ppo" and experts is not None and experts.selection_bias and is_cut:
        what = (
            f"the router's selection bias of {source.spec.family} would reach vLLM from another pipeline stage "
            f"rounded to {config.model.dtype}"
        )
        expected = "1, or model.dtype float32"
        problems.append(ConfigError(what, where="parallel.pipeline_model_parallel_size", expected=expected))
    return problems


def check_micro_batches(config: TrainingConfig, data: Dataset, *, key: str) -> list[MrlhfError]:
    """Checks that train.max_tokens_per_micro_batch holds the largest row (PPO: longest prompt plus longest answer)."""
    limit, multiple = config.train.max_tokens_per_micro_batch, state.pad_multiple(config.parallel)
    if limit is None:
        return []
    if isinstance(config, PPOStage):
        lengths, what = [data.max_length + config.rollout.max_new_tokens], "prompt and answer"
    else:
        lengths = data.longest_row(packing=config.data.packing)
        what = "pack" if config.data.packing else "pair" if data.task == "preference" else "sample"
    count, length = (1, sum(lengths)) if config.data.packing else (len(lengths), max(lengths))
    tokens = count * -(-length // multiple) * multiple
    if tokens <= limit:
        return []
    key_of_limit = "train.max_tokens_per_micro_batch"
    problem = f"{key_of_limit} = {limit:,} is less than the largest {what} takes: {tokens:,} tokens with padding"
    return [ConfigError(problem, where=key, expected=f"{tokens} or more", fix=f"--{key_of_limit} {tokens}")]


def check_prompt_budget(config: PPOStage, source: ModelSource, sets: list[tuple[str, Dataset]]) -> list[MrlhfError]:
    """Checks that the longest prompt plus the longest answer fit the model's positions."""
    problems: list[MrlhfError] = []
    limit, new = source.spec.max_position_embeddings, config.rollout.max_new_tokens
    for key, data in sets:
        room = limit - data.max_length
        if new > room:
            what = f"the longest prompt ({data.max_length} tokens) and rollout.max_new_tokens = {new} exceed {limit}"
            fix = f"--rollout.max_new_tokens {room if 2 * room >= new else max(1, limit // 2)}"
            if 2 * room < new < limit:  # few prompts are so long
                fix = f"{_PREPROCESS} --seq-length {limit - new} ..."
            expected = f"max_position_embeddings = {limit} of {source.path}"
            problems.append(ConfigError(what, where=key, expected=expected, fix=fix))
    return problems
