"""Contradictions between the options of one stage, each with the dotted key it is about.

Ranges of single options are in their types (options.py). preflight.py checks files and data.
"""

from __future__ import annotations

from collections.abc import Callable
from difflib import get_close_matches
from typing import Any

from mrlhf.config import options
from mrlhf.errors import ConfigError
from mrlhf.observe.metrics import EVALUATED

Errors = list[ConfigError]


def contradictions(config: options.StageConfig) -> Errors:
    """All contradictions inside one stage's configuration; `where` is the dotted key."""
    return [error for stages, check in _CHECKS if isinstance(config, stages) for error in check(config)]


def _error(key: str, what: str, expected: str | None = None, fix: str | None = None) -> ConfigError:
    return ConfigError(what, where=key, expected=expected, fix=fix)


def _check_parallel(config: options.TrainingConfig | options.ScoreStage | options.ServeRewardStage) -> Errors:
    errors, p = [], config.parallel
    of_pipeline = {
        "virtual_pipeline_model_parallel_size": p.interleaved_chunks,
        "num_layers_in_first_pipeline_stage": p.num_layers_in_first_pipeline_stage,
        "num_layers_in_last_pipeline_stage": p.num_layers_in_last_pipeline_stage,
    }
    for name, value in of_pipeline.items():
        key = f"parallel.{name}"
        if value is not None and p.pipeline_model_parallel_size == 1:
            errors.append(_error(key, f"{key} = {value} needs pipeline_model_parallel_size > 1", fix=f"--{key} null"))
    if p.sequence_parallel and p.tensor_model_parallel_size == 1:
        key = "parallel.sequence_parallel"
        errors.append(_error(key, f"{key} needs tensor_model_parallel_size > 1", fix=f"--{key} false"))
    return errors


def _check_context_parallel(config: options.PretrainStage | options.SFTStage | options.PPOStage) -> Errors:
    by_sequence = {"loss.aggregation": config.loss.aggregation}
    if isinstance(config, options.PPOStage):
        by_sequence["ppo.ratio"] = config.ppo.ratio
    why = "= sequence needs a sample's tokens on one rank, and parallel.context_parallel_size cuts them"
    return [
        _error(key, f"{key} {why}", "token, or context_parallel_size 1", f"--{key} token")
        for key, value in by_sequence.items() if value == "sequence" and config.parallel.context_parallel_size > 1
    ]


def _check_data(config: options.TrainingConfig) -> Errors:
    errors, data, key = [], config.data, "data.padding_side"
    if data.padding_side == "left" and not isinstance(config, options.RMStage):
        errors.append(_error(key, f"{key} = left is for rm only", "right", f"--{key} right"))
    elif data.padding_side == "left" and data.packing:
        errors.append(_error(key, f"{key} = left needs data.packing false", fix="--data.packing false"))
    errors += _check_sources(data.train)
    is_weighted = any(source.loss_weight is not None for source in data.train)
    if is_weighted and not isinstance(config, (options.PretrainStage, options.SFTStage)):
        what = "data.train: loss_weight is for pretrain and sft"
        errors.append(_error("data.train", what, "sources without loss_weight"))
    return errors


def _check_sources(sources: tuple[options.DataSource, ...]) -> Errors:
    problems: list[tuple[str, str]] = []
    if not sources:
        problems.append(("no source", "a prefix, or a list of {prefix, weight, epochs}"))
    prefixes = [s.prefix for s in sources]
    for prefix in dict.fromkeys(p for p in prefixes if prefixes.count(p) > 1):
        what = f"{prefix} is given {prefixes.count(prefix)} times"
        problems.append((what, "each source once; epochs says how often it is passed"))
    if len(sources) == 1 and sources[0].loss_weight is not None:
        what = "loss_weight of the only source changes nothing: the loss is a weighted mean"
        problems.append((what, "two sources or more, or no loss_weight"))
    without = [s.prefix for s in sources if s.weight is None]
    if 0 < len(without) < len(sources):
        what = f"{', '.join(without)} without a weight, the others with one"
        problems.append((what, "a weight for every source or for none"))
    return [_error("data.train", f"data.train: {what}", expected) for what, expected in problems]


def _check_optim(config: options.TrainingConfig) -> Errors:
    errors, optim = [], config.optim
    if optim.min_lr > optim.lr:
        what = f"optim.min_lr = {optim.min_lr} is above optim.lr = {optim.lr}"
        errors.append(_error("optim.min_lr", what, f"float in [0, {optim.lr}]", f"--optim.min_lr {optim.lr}"))
    if optim.lr_decay_style == "WSD" and optim.lr_wsd_decay_steps == 0:
        key = "optim.lr_wsd_decay_steps"
        what = "optim.lr_decay_style = WSD needs the length of its decay"
        errors.append(_error(key, what, "the last steps of the run, a tenth of them for example", f"--{key} STEPS"))
    return errors


def _largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` that is at most `limit`."""
    return next(n for n in range(min(number, limit), 0, -1) if number % n == 0)


def _check_train(config: options.TrainingConfig) -> Errors:
    errors, train, key = [], config.train, "train.micro_batch_size"
    if train.global_batch_size % train.micro_batch_size:
        what = f"{key} = {train.micro_batch_size} does not divide train.global_batch_size = {train.global_batch_size}"
        fix = f"--{key} {_largest_divisor(train.global_batch_size, train.micro_batch_size)}"
        errors.append(_error(key, what, "global = micro x accumulation x data-parallel ranks", fix))
    if train.max_tokens_per_micro_batch is not None and train.micro_batch_size != 1:
        what = f"{key} = {train.micro_batch_size} beside train.max_tokens_per_micro_batch"
        errors.append(_error(key, what, "one of the two", f"--{key} 1"))
    return errors


def _check_checkpoint(config: options.TrainingConfig) -> Errors:
    errors, metric, key = [], config.checkpoint.best_metric, "checkpoint.best_metric"
    if metric is not None:
        if isinstance(config, options.PPOStage):
            what = f"{key} is for pretrain, sft, rm and dpo; ppo keeps its newest checkpoints (checkpoint.keep_last)"
            errors.append(_error(key, what, "null", f"--{key} null"))
        elif config.data.eval is None:
            errors.append(_error(key, f"{key} = {metric} needs an evaluation split", "data.eval"))
        known = [f"eval/{name}" for name in EVALUATED.get(config.stage, ())]
        if isinstance(config, (options.PretrainStage, options.SFTStage)) and config.loss.z_loss:
            known.append("eval/log_z_squared")
        if known and metric not in known:
            near = get_close_matches(metric, known, n=1)
            what = f"{key} = {metric} is not measured by the evaluation of {config.stage}"
            errors.append(_error(key, what, ", ".join(known), f"--{key} {near[0]}" if near else None))
    interval, saves = config.checkpoint.export_hf_interval, config.checkpoint.save_interval
    if interval and (not saves or interval % saves):
        key = "checkpoint.export_hf_interval"
        what = f"{key} = {interval} is not a multiple of checkpoint.save_interval = {saves or 'null'}"
        fix = f"--{key} {max(1, interval // saves) * saves}" if saves else f"--checkpoint.save_interval {interval}"
        errors.append(_error(key, what, "an export is made of a saved checkpoint", fix))
    return errors


def _mini_batch(answers: int, train: options.TrainConfig) -> int:
    """The largest size below the one given that divides a rollout, into whole micro-batches where it can."""
    sizes = [n for n in range(1, min(answers, train.global_batch_size) + 1) if answers % n == 0]
    return max((n for n in sizes if n % train.micro_batch_size == 0), default=max(sizes))


def _check_ppo(config: options.PPOStage) -> Errors:
    """What ppo does not take from the other stages, and how its batches fit together."""
    errors, answers = [], config.rollout.batch_size * config.rollout.n
    if config.train.on_nonfinite != "stop":
        key = "train.on_nonfinite"
        errors.append(_error(key, f"{key} = skip is not for ppo", "stop", f"--{key} stop"))
    if config.loss.z_loss:
        errors.append(_error("loss.z_loss", "loss.z_loss is for pretrain and sft", "0", "--loss.z_loss 0"))
    if answers % config.train.global_batch_size:
        key = "train.global_batch_size"
        what = f"{key} = {config.train.global_batch_size} does not divide rollout.batch_size x rollout.n = {answers}"
        fix = f"--{key} {_mini_batch(answers, config.train)}"
        errors.append(_error(key, what, "a divisor: each rollout is cut into whole mini-batches", fix))
    return errors


def _check_rollout(config: options.PPOStage) -> Errors:
    errors, rollout, key = [], config.rollout, "rollout.num_ranks"
    if rollout.placement == "separate" and rollout.num_ranks is None:
        what = f"rollout.placement = separate needs {key}"
        errors.append(_error(key, what, "how many of torchrun's ranks generate"))
    if rollout.placement == "colocated" and rollout.num_ranks is not None:
        what = f"{key} = {rollout.num_ranks}, and with rollout.placement = colocated every rank generates"
        errors.append(_error(key, what, fix="--rollout.placement separate"))
    key, stale = "rollout.max_staleness", rollout.max_staleness
    if stale and rollout.placement == "colocated":
        errors.append(_error(key, f"{key} = {stale} with rollout.placement = colocated", "0", f"--{key} 0"))
    elif stale and rollout.correction == "none":
        key = "rollout.correction"
        what = f"rollout.max_staleness = 1 samples from older weights, and {key} = none does not correct for it"
        errors.append(_error(key, what, "tis or icepop", f"--{key} tis"))
    if rollout.correction_low > rollout.correction_high:
        key = "rollout.correction_low"
        what = f"{key} = {rollout.correction_low} is above rollout.correction_high = {rollout.correction_high}"
        errors.append(_error(key, what, fix=f"--{key} {rollout.correction_high}"))
    return errors


def _check_estimator(config: options.PPOStage) -> Errors:
    """What the row of the estimator says, against ppo and rollout."""
    errors, ppo, rollout, row = [], config.ppo, config.rollout, config.ppo.estimator_row
    if row.needs_groups and rollout.n < 2:
        what = f"ppo.estimator = {ppo.estimator} compares the answers of one prompt, and rollout.n = {rollout.n}"
        errors.append(_error("rollout.n", what, "2 or more", "--rollout.n 2"))
    for name, off in (("critic_tensor_model_parallel_size", "null"), ("critic_pipeline_model_parallel_size", "null"),
                      ("critic_warmup_steps", "0")):
        if getattr(ppo, name) and not row.needs_critic:
            what = f"ppo.{name} = {getattr(ppo, name)}, and ppo.estimator = {ppo.estimator} has no critic"
            errors.append(_error(f"ppo.{name}", what, fix=f"--ppo.{name} {off}"))
    if row.undiscounted and ppo.gamma != 1.0:
        errors.append(_error("ppo.gamma", f"ppo.estimator = {ppo.estimator} has gamma 1", "1.0", "--ppo.gamma 1.0"))
    if rollout.dynamic_sampling and (rollout.n < 2 or not row.needs_groups):
        key, given = "rollout.dynamic_sampling", f"ppo.estimator = {ppo.estimator}, rollout.n = {rollout.n}"
        groups = ", ".join(name for name, row in options.ESTIMATORS.rows.items() if row.needs_groups)
        what = f"{key} compares the answers of one prompt; {given}"
        errors.append(_error(key, what, f"rollout.n of 2 or more and one of {groups}"))
    return errors


def _check_reward(config: options.PPOStage) -> Errors:
    errors, reward, key = [], config.reward, "reward.overlong_buffer"
    if reward.overlong_buffer > config.rollout.max_new_tokens:
        what = f"{key} = {reward.overlong_buffer} is longer than an answer"
        most = config.rollout.max_new_tokens
        errors.append(_error(key, what, f"at most rollout.max_new_tokens = {most}", f"--{key} {most}"))
    if reward.weights and len(reward.weights) != len(reward.sources):
        what = f"{len(reward.weights)} weights for {len(reward.sources)} reward sources"
        errors.append(_error("reward.weights", what, "one for each"))
    minutes = config.parallel.timeout_minutes
    for name in ("function_timeout_s", "http_total_timeout_s"):
        key, seconds = f"reward.{name}", getattr(reward, name)
        if seconds >= minutes * 60:
            what = f"{key} = {seconds:g} is not below parallel.timeout_minutes = {minutes:g} ({minutes * 60:g} s)"
            fix = f"--parallel.timeout_minutes {seconds / 60 + 5:g}"
            errors.append(_error(key, what, "less: the other ranks would give up first", fix))
    if not reward.sources and config.rollout.environment is None:
        expected = "model:DIR, file.py:function or a URL, or rollout.environment"
        errors.append(_error("reward.sources", "no reward source", expected))
    return errors


def _check_kl(config: options.PPOStage) -> Errors:
    errors, kl, answers = [], config.kl, config.rollout.batch_size * config.rollout.n
    if kl.target is not None and kl.coef == 0:
        errors.append(_error("kl.target", "kl.target steers kl.coef, which is 0", fix="--kl.coef 0.05"))
    if kl.target is not None and kl.horizon <= 0.2 * answers:
        what = f"kl.horizon = {kl.horizon} is too short for {answers} answers per rollout"
        errors.append(_error("kl.horizon", what, f"more than {0.2 * answers:g}", f"--kl.horizon {20 * answers}"))
    return errors


def _check_ptx(config: options.PPOStage) -> Errors:
    errors, ptx, key = [], config.ptx, "ptx.micro_batch_size"
    if ptx.coef > 0 and ptx.data is None:
        errors.append(_error("ptx.data", f"ptx.coef = {ptx.coef} needs a data set",
                             "a prefix made with --task sft or pretrain"))
    if ptx.coef > 0 and (config.model.moe_aux_loss_coeff or config.model.moe_z_loss_coeff):
        what = "ptx.coef and the router losses (model.moe_aux_loss_coeff, moe_z_loss_coeff) count different tokens"
        errors.append(_error("ptx.coef", what, "one of them", "--ptx.coef 0"))
    if ptx.batch_size % ptx.micro_batch_size:
        what = f"{key} = {ptx.micro_batch_size} does not divide ptx.batch_size = {ptx.batch_size}"
        errors.append(_error(key, what, fix=f"--{key} {_largest_divisor(ptx.batch_size, ptx.micro_batch_size)}"))
    return errors


def _check_dpo(config: options.DPOStage) -> Errors:
    smoothing, loss, key = config.dpo.label_smoothing, config.dpo.loss, "dpo.label_smoothing"
    if not smoothing or loss == "sigmoid":
        return []
    return [_error(key, f"{key} = {smoothing} with dpo.loss = {loss}", "0, or dpo.loss = sigmoid", f"--{key} 0")]


def _check_generate(config: options.GenerateStage) -> Errors:
    errors, best_of = [], config.best_of
    if not best_of:
        for name in ("pairs", "min_score"):
            if getattr(config, name) is not None:
                errors.append(_error(name, f"{name} = {getattr(config, name)} without best_of", fix="--best_of 8"))
        return errors
    if config.n != 1:
        what = f"best_of = {best_of} and n = {config.n}: both say how many answers a prompt gets"
        errors.append(_error("best_of", what, "one of them", "--n 1"))
    if not config.reward.sources:
        errors.append(_error("reward.sources", "best_of needs a reward source", "model:DIR, file.py:function or a URL"))
    if config.environment is not None:
        what = "best_of writes rows of one answer, and conversations with an environment have several turns"
        errors.append(_error("best_of", what, "one of the two", "--environment null"))
    return errors


_CHECKS: tuple[tuple[Any, Callable[[Any], Errors]], ...] = (
    ((options.TrainingConfig, options.ScoreStage, options.ServeRewardStage), _check_parallel),
    ((options.PretrainStage, options.SFTStage, options.PPOStage), _check_context_parallel),
    (options.TrainingConfig, _check_data),
    (options.TrainingConfig, _check_optim),
    (options.TrainingConfig, _check_train),
    (options.TrainingConfig, _check_checkpoint),
    (options.PPOStage, _check_ppo),
    (options.PPOStage, _check_rollout),
    (options.PPOStage, _check_estimator),
    (options.PPOStage, _check_reward),
    (options.PPOStage, _check_kl),
    (options.PPOStage, _check_ptx),
    (options.DPOStage, _check_dpo),
    (options.GenerateStage, _check_generate),
)
