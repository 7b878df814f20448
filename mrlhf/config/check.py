"""What contradicts itself in one stage's configuration; every problem, with the dotted key where it is. Files and data: preflight.py."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from difflib import get_close_matches
from typing import Any

from mrlhf.config.options import (
    ESTIMATORS,
    CheckpointConfig,
    DataSource,
    DPOStage,
    GenerateStage,
    ParallelConfig,
    PPOStage,
    PretrainStage,
    RMStage,
    RolloutConfig,
    SFTStage,
    StageConfig,
    TrainingConfig,
)
from mrlhf.errors import ConfigError
from mrlhf.observe.metrics import EVALUATED

_POSITIVE = (
    "tensor_model_parallel_size pipeline_model_parallel_size virtual_pipeline_model_parallel_size num_layers_in_first_pipeline_stage "
    "num_layers_in_last_pipeline_stage context_parallel_size expert_model_parallel_size global_batch_size micro_batch_size num_epochs max_steps lr "
    "batch_size n beta max_new_tokens tensor_parallel_size kv_cache_mib max_num_seqs epochs log_interval keep_last timeout_minutes seq_length clip horizon "
    "exit_duration_minutes http_timeout_s http_total_timeout_s timeout_s max_batch_size max_request_mib function_timeout_s http_batch_size "
    "max_prompt_length value_clip max_tokens_per_micro_batch reshard_bucket_mib silence_seconds max_turns environment_threads environment_timeout_s "
    "critic_tensor_model_parallel_size critic_pipeline_model_parallel_size num_ranks"
).split()
_NOT_NEGATIVE = (
    "min_lr lr_warmup_steps lr_wsd_decay_steps weight_decay clip_grad eval_interval save_interval keep_every export_hf_interval "
    "temperature clip_low clip_high coef http_retries "
    "function_memory_mib port critic_warmup_steps entropy_coef nll_coef z_loss "
    "moe_aux_loss_coeff moe_z_loss_coeff neftune_alpha samples_to_log correction_low critic_lr loss_spike_threshold "
    "overlong_buffer overlong_penalty max_refills mismatch_warning best_of"
).split()


def check_sources(sources: tuple[DataSource, ...]) -> list[ConfigError]:
    """Contradictions inside data.train."""
    found: list[ConfigError] = []

    def bad(what: str, expected: str) -> None:
        found.append(ConfigError(f"data.train: {what}", where="data.train", expected=expected))

    if not sources:
        bad("no source", "a prefix, or a list of {prefix, weight, epochs}")
    prefixes = [s.prefix for s in sources]
    for prefix in dict.fromkeys(p for p in prefixes if prefixes.count(p) > 1):
        bad(f"{prefix} is given {prefixes.count(prefix)} times", "each source once; epochs says how often it is passed")
    for source in sources:
        for name in ("weight", "epochs", "loss_weight"):
            value = getattr(source, name)
            if value is not None and not 0 < value < float("inf"):
                bad(f"{name} = {value} of {source.prefix}", "a number above 0")
    if len(sources) == 1 and sources[0].loss_weight is not None:
        bad("loss_weight of the only source changes nothing: the loss is a weighted mean", "two sources or more, or no loss_weight")
    without = [s.prefix for s in sources if s.weight is None]
    if 0 < len(without) < len(sources):
        bad(f"{', '.join(without)} without a weight, the others with one", "a weight for every source or for none")
    return found


def _check_best(config: TrainingConfig) -> list[ConfigError]:
    metric, key = config.checkpoint.best_metric, "checkpoint.best_metric"
    if metric is None:
        return []
    found = []
    if isinstance(config, PPOStage):
        found.append(ConfigError(f"{key} is for pretrain, sft, rm and dpo", where=key, fix=f"--{key} null"))
    elif config.data.eval is None:
        found.append(ConfigError(f"{key} = {metric} needs an evaluation split", where=key, expected="data.eval"))
    known = [f"eval/{name}" for name in EVALUATED.get(config.stage, ())]
    if isinstance(config, (PretrainStage, SFTStage)) and config.loss.z_loss:
        known.append("eval/log_z_squared")
    if known and metric not in known:
        near = get_close_matches(metric, known, n=1)
        what = f"{key} = {metric} is not measured by the evaluation of {config.stage}"
        found.append(ConfigError(what, where=key, expected=", ".join(known), fix=f"--{key} {near[0]}" if near else None))
    return found


def _check_export(config: CheckpointConfig) -> list[ConfigError]:
    every, saves = config.export_hf_interval, config.save_interval
    if every > 0 and (saves <= 0 or every % saves):
        key = "checkpoint.export_hf_interval"
        what = f"{key} = {every} is not a multiple of checkpoint.save_interval = {saves}"
        return [ConfigError(what, where=key, expected="an export is made of a saved checkpoint")]
    return []


def _check_pipeline(p: ParallelConfig) -> list[ConfigError]:
    found, pp = [], p.pipeline_model_parallel_size
    for name in ("virtual_pipeline_model_parallel_size", "num_layers_in_first_pipeline_stage", "num_layers_in_last_pipeline_stage"):
        value, key = getattr(p, name), f"parallel.{name}"
        if value is not None and pp <= 1:
            found.append(ConfigError(f"{key} = {value} needs pipeline_model_parallel_size > 1", where=key, fix=f"--{key} null"))
    return found


def _check_placement(rollout: RolloutConfig) -> list[ConfigError]:
    found, key = [], "rollout.num_ranks"
    if rollout.placement == "separate" and rollout.num_ranks is None:
        found.append(ConfigError(f"rollout.placement = separate needs {key}", where=key, expected="how many of torchrun's ranks generate"))
    if rollout.placement == "colocated" and rollout.num_ranks is not None:
        what = f"{key} = {rollout.num_ranks}, and with rollout.placement = colocated every rank generates"
        found.append(ConfigError(what, where=key, fix="--rollout.placement separate"))
    key, allowed = "rollout.max_staleness", (0, 1) if rollout.placement == "separate" else (0,)
    if rollout.max_staleness not in allowed:
        what = f"{key} = {rollout.max_staleness} with rollout.placement = {rollout.placement}"
        found.append(ConfigError(what, where=key, expected=" or ".join(map(str, allowed)), fix=f"--{key} {allowed[-1]}"))
    elif rollout.max_staleness and rollout.correction == "none":
        what = f"{key} = 1 samples from older weights, and rollout.correction = none leaves the loss as if it did not"
        found.append(ConfigError(what, where="rollout.correction", expected="tis or icepop", fix="--rollout.correction tis"))
    return found


def check(config: StageConfig) -> list[ConfigError]:
    """All contradictions inside one stage's configuration; `where` is the dotted key."""
    found: list[ConfigError] = []

    def bad(key: str, what: str, expected: str | None = None, fix: str | None = None) -> None:
        found.append(ConfigError(what, where=key, expected=expected, fix=fix))

    def walk(prefix: str, node: Any) -> None:
        for f in fields(node):
            key, value = f"{prefix}{f.name}", getattr(node, f.name)
            if is_dataclass(value):
                walk(key + ".", value)
            elif isinstance(value, (int, float)) and not isinstance(value, bool):
                if f.name in _POSITIVE and not value > 0:
                    bad(key, f"{key} = {value}", "a number above 0")
                elif f.name in _NOT_NEGATIVE and not value >= 0:
                    bad(key, f"{key} = {value}", "0 or more")

    walk("", config)
    if not isinstance(config, GenerateStage):
        p: ParallelConfig = config.parallel
        found += _check_pipeline(p)
        if p.sequence_parallel and p.tensor_model_parallel_size == 1:
            bad(
                "parallel.sequence_parallel",
                "parallel.sequence_parallel needs tensor_model_parallel_size > 1",
                fix="--parallel.sequence_parallel false",
            )
    if isinstance(config, (PretrainStage, SFTStage, PPOStage)) and config.parallel.context_parallel_size > 1:
        by_sequence = {"loss.aggregation": config.loss.aggregation} | (
            {"ppo.ratio": config.ppo.ratio} if isinstance(config, PPOStage) else {}
        )
        for key, value in by_sequence.items():
            if value == "sequence":
                what = f"{key} = sequence needs a sample's tokens on one rank, and parallel.context_parallel_size cuts them"
                bad(key, what, "token", f"--{key} token")
    if isinstance(config, TrainingConfig):
        if config.data.padding_side == "left" and not isinstance(config, RMStage):
            bad("data.padding_side", "data.padding_side = left is for rm only", "right")
        if config.data.padding_side == "left" and config.data.packing:
            bad("data.padding_side", "data.padding_side = left needs data.packing false", fix="--data.packing false")
        if config.optim.lr_decay_style == "WSD" and config.optim.lr_wsd_decay_steps <= 0:
            bad(
                "optim.lr_wsd_decay_steps", "optim.lr_decay_style = WSD needs the length of its decay", fix="--optim.lr_wsd_decay_steps 100"
            )
        if config.train.global_batch_size % max(1, config.train.micro_batch_size):
            bad(
                "train.micro_batch_size",
                f"train.micro_batch_size = {config.train.micro_batch_size} does not divide train.global_batch_size = {config.train.global_batch_size}",
                "global = micro x accumulation x data-parallel ranks",
            )
        if config.train.max_tokens_per_micro_batch is not None and config.train.micro_batch_size != 1:
            what = f"train.micro_batch_size = {config.train.micro_batch_size} beside train.max_tokens_per_micro_batch"
            bad("train.micro_batch_size", what, "one of the two", "--train.micro_batch_size 1")
        found += check_sources(config.data.train)
        if not isinstance(config, (PretrainStage, SFTStage)) and any(s.loss_weight is not None for s in config.data.train):
            bad("data.train", "data.train: loss_weight is for pretrain and sft", "sources without loss_weight")
        found += _check_best(config)
        found += _check_export(config.checkpoint)
    if isinstance(config, PPOStage):
        if config.train.on_nonfinite != "stop":
            bad("train.on_nonfinite", "train.on_nonfinite = skip is not for ppo", "stop", "--train.on_nonfinite stop")
        if config.loss.z_loss:
            bad("loss.z_loss", "loss.z_loss is for pretrain and sft", "0", "--loss.z_loss 0")
        found += _check_placement(config.rollout)
        answers = config.rollout.batch_size * config.rollout.n
        if config.train.global_batch_size <= 0 or answers % config.train.global_batch_size:
            bad(
                "train.global_batch_size",
                f"train.global_batch_size = {config.train.global_batch_size} does not divide rollout.batch_size x rollout.n = {answers}",
                "a divisor: each rollout is cut into whole mini-batches",
            )
        if config.ppo.estimator_row.needs_groups and config.rollout.n < 2:
            bad(
                "rollout.n",
                f"ppo.estimator = {config.ppo.estimator} compares the answers of one prompt, and rollout.n = {config.rollout.n}",
                "2 or more",
            )
        for name in ("critic_tensor_model_parallel_size", "critic_pipeline_model_parallel_size"):
            if getattr(config.ppo, name) is not None and not config.ppo.estimator_row.needs_critic:
                what = f"ppo.{name} = {getattr(config.ppo, name)}, and ppo.estimator = {config.ppo.estimator} has no critic"
                bad(f"ppo.{name}", what, fix=f"--ppo.{name} null")
        if config.ppo.estimator_row.undiscounted and config.ppo.gamma != 1.0:
            bad("ppo.gamma", f"ppo.estimator = {config.ppo.estimator} has gamma 1", "1.0", "--ppo.gamma 1.0")
        if config.rollout.dynamic_sampling and (config.rollout.n < 2 or not config.ppo.estimator_row.needs_groups):
            what = f"rollout.dynamic_sampling compares the answers of one prompt; ppo.estimator = {config.ppo.estimator}, rollout.n = {config.rollout.n}"
            groups = ", ".join(name for name, row in ESTIMATORS.rows.items() if row.needs_groups)
            bad("rollout.dynamic_sampling", what, f"rollout.n of 2 or more and one of {groups}")
        if config.reward.overlong_buffer > config.rollout.max_new_tokens:
            what = f"reward.overlong_buffer = {config.reward.overlong_buffer} is longer than an answer"
            bad("reward.overlong_buffer", what, f"at most rollout.max_new_tokens = {config.rollout.max_new_tokens}")
        if config.ptx.coef > 0 and config.ptx.data is None:
            bad("ptx.data", f"ptx.coef = {config.ptx.coef} needs a data set", "a prefix made with --task sft or pretrain")
        if config.ptx.coef > 0 and (config.model.moe_aux_loss_coeff or config.model.moe_z_loss_coeff):
            what = "ptx.coef and the routers' losses (model.moe_aux_loss_coeff, moe_z_loss_coeff) would be counted by different tokens"
            bad("ptx.coef", what, "one of them", "--ptx.coef 0")
        if config.ptx.batch_size % max(1, config.ptx.micro_batch_size):
            what = f"ptx.micro_batch_size = {config.ptx.micro_batch_size} does not divide ptx.batch_size = {config.ptx.batch_size}"
            bad("ptx.micro_batch_size", what)
        if config.reward.weights and len(config.reward.weights) != len(config.reward.sources):
            bad("reward.weights", f"{len(config.reward.weights)} weights for {len(config.reward.sources)} reward sources", "one for each")
        for name in ("function_timeout_s", "http_total_timeout_s"):
            seconds, patience = getattr(config.reward, name), config.parallel.timeout_minutes * 60
            if seconds >= patience:
                what = f"reward.{name} = {seconds:g} is not below parallel.timeout_minutes = {config.parallel.timeout_minutes:g} ({patience:g} s)"
                bad(f"reward.{name}", what, "less: the other ranks would give up first", f"--parallel.timeout_minutes {seconds / 60 + 5:g}")
        if not config.reward.sources and config.rollout.environment is None:
            bad("reward.sources", "no reward source", "model:DIR, file.py:function or a URL, or rollout.environment")
        if config.rollout.temperature == 0:
            bad("rollout.temperature", "greedy answers have no gradient", "above 0")
        if config.kl.target is not None and config.kl.coef == 0:
            bad("kl.target", "kl.target steers kl.coef, which is 0", fix="--kl.coef 0.05")
        if config.kl.target is not None and config.kl.horizon <= 0.2 * answers:
            bad(
                "kl.horizon",
                f"kl.horizon = {config.kl.horizon} is too short for {answers} answers a rollout",
                f"more than {0.2 * answers:g}",
            )
        if config.ppo.dual_clip is not None and config.ppo.dual_clip <= 1:
            bad("ppo.dual_clip", f"ppo.dual_clip = {config.ppo.dual_clip}", "a number above 1 (usually 3), or null")
        if config.rollout.correction_low > config.rollout.correction_high:
            bad("rollout.correction_low", "rollout.correction_low is above rollout.correction_high")
    if isinstance(config, GenerateStage):
        if config.best_of and config.n != 1:
            bad(
                "best_of", f"best_of = {config.best_of} and n = {config.n}: both say how many answers a prompt gets", "one of them", "--n 1"
            )
        if config.best_of and not config.reward.sources:
            bad("reward.sources", "best_of needs something that scores", "model:DIR, file.py:function or a URL")
        for name in ("pairs", "min_score"):
            if getattr(config, name) is not None and not config.best_of:
                bad(name, f"{name} = {getattr(config, name)} without best_of", fix="--best_of 8")
        if config.best_of and config.environment is not None:
            bad(
                "best_of", "best_of writes rows of one answer, and conversations with an environment have several turns", "0", "--best_of 0"
            )
    if (
        isinstance(config, DPOStage)
        and config.dpo.label_smoothing
        and not (config.dpo.loss == "sigmoid" and 0 < config.dpo.label_smoothing < 0.5)
    ):
        what = f"dpo.label_smoothing = {config.dpo.label_smoothing} with dpo.loss = {config.dpo.loss}"
        bad("dpo.label_smoothing", what, "0, or below 0.5 with dpo.loss = sigmoid")
    return found
