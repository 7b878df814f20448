"""Every option of every stage with its meaning, range and default.

One frozen dataclass per concern; a stage's configuration is a dataclass of these sections. `mrlhf STAGE --help` prints
the text of `option(default, help)` and the type with its range. load.py fills the sections from YAML and
from `--section.key VALUE`; check.py reports contradictions between options.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal

from msgspec import Meta

REQUIRED: Any = object()

# A numeric option carries its range in its type. YAML, `--section.key` and `--help` read it there. NaN and infinities
# are refused unless the range names them.
OTHERWISE = "or"  # key of Meta.extra: one more valid value outside of the bounds, such as -1 for "off"

PositiveInt = Annotated[int, Meta(ge=1)]
NonNegativeInt = Annotated[int, Meta(ge=0)]
BatchSize = Annotated[int, Meta(ge=1, le=1 << 24)]  # a step's rows are listed in memory
RunningAnswers = Annotated[int, Meta(ge=1, le=8192)]  # vLLM decodes a token of each at once, and takes 8192 tokens
PositiveFloat = Annotated[float, Meta(gt=0)]
TimeLimit = Annotated[float, Meta(gt=0, le=1e7)]  # larger ones overflow in the timers of Python and torch
NonNegativeFloat = Annotated[float, Meta(ge=0)]
UnitInterval = Annotated[float, Meta(ge=0, le=1)]
AdamBeta = Annotated[float, Meta(ge=0, lt=1)]
TopP = Annotated[float, Meta(gt=0, le=1)]
TopK = Annotated[int, Meta(ge=1, extra={OTHERWISE: -1})]
Seed = Annotated[int, Meta(ge=0, le=2**31 - 1)]  # numpy's and vLLM's seeds are not negative; room for what ranks add
Score = Annotated[float, Meta(description="any finite value is valid: scores have any sign")]
ScoreWeight = Annotated[float, Meta(description="any finite value is valid: a negative weight punishes")]


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text. `REQUIRED` as default: the user must give it."""
    if default is REQUIRED:
        return field(metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class OneOf:
    """Marks a text as a key of a table in a later folder, "module:NAME": `Annotated[str, OneOf(...)]`.

    The table's module is imported when its rows are read.
    """

    table: str

    @property
    def rows(self) -> dict[str, Any]:
        return resolve_name(self.table)


ESTIMATORS = OneOf("mrlhf.rl.estimators:ESTIMATORS")


@dataclass(frozen=True)
class ModelConfig:
    path: str = option(REQUIRED, "HF directory or hub id, mrlhf checkpoint or run, or Megatron-LM checkpoint")
    init: Literal["weights", "random"] = option(
        "weights", "random: use only the config and tokenizer of `path`; train.seed gives new weights")
    dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", "of parameters and activations; bfloat16 keeps fp32 master weights and fp32 gradients")
    moe_aux_loss_coeff: NonNegativeFloat = option(
        0.0, "experts: weight of each layer's load-balancing loss, e.g. 0.001; 0: off. Not read from config.json")
    moe_z_loss_coeff: NonNegativeFloat = option(
        0.0, "experts: weight of each layer's router z-loss, the mean of log(sum of exp(router logits))^2, e.g. 0.001")


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: PositiveInt = option(1, "ranks that share every layer's matrices")
    pipeline_model_parallel_size: PositiveInt = option(1, "pipeline stages, each with its part of the layers")
    virtual_pipeline_model_parallel_size: PositiveInt | None = option(
        None, "interleaved pipeline: model chunks on each rank; fewer idle ranks, more messages")
    num_layers_in_first_pipeline_stage: PositiveInt | None = option(
        None, "uneven pipeline: layers of the first stage, which also has the embedding")
    num_layers_in_last_pipeline_stage: PositiveInt | None = option(
        None, "uneven pipeline: layers of the last stage, which also has the head")
    context_parallel_size: PositiveInt = option(
        1, "ranks that share each row's tokens, for long rows; inside attention they share the heads")
    expert_model_parallel_size: PositiveInt = option(
        1, "ranks that share the experts, each with whole experts; divides tensor x data-parallel ranks. "
        "1: tensor_model_parallel_size cuts every expert")
    sequence_parallel: bool = option(
        False, "split norms and residuals over the tensor-parallel ranks; needs tensor_model_parallel_size > 1")
    recompute: Literal["none", "selective", "full"] = option(
        "none", "recompute activations in backward: selective: inside attention; full: of every layer but its input")
    overlap_grad_reduce: bool | None = option(
        None, "reduce gradients over data-parallel ranks during backward; unset: on a GPU")
    overlap_param_gather: bool | None = option(
        None, "distributed optimizer: all-gather new parameters during the next forward; unset: on a GPU")
    timeout_minutes: TimeLimit = option(10.0, "a collective that waits longer ends the run with an error")
    silence_seconds: TimeLimit = option(
        60.0, "a rank without a heartbeat for this long ends the run on all ranks; the error names it")

    @property
    def interleaved_chunks(self) -> int | None:
        """Model chunks on each rank of an interleaved pipeline; one is a plain pipeline."""
        chunks = self.virtual_pipeline_model_parallel_size
        return None if chunks == 1 else chunks


@dataclass(frozen=True)
class DataSource:
    """One source of a blend. docs/data.md says what weights and epochs mean.

    weight: share of the rows. loss_weight: weight of each token in the loss (pretrain, sft); None: 1.
    """

    prefix: str
    weight: PositiveFloat | None = None
    epochs: PositiveFloat | None = None
    loss_weight: PositiveFloat | None = None


@dataclass(frozen=True)
class DataConfig:
    train: tuple[DataSource, ...] = option(
        REQUIRED, "prefix written by tools/preprocess_data.py, or a blend: weight = share of the rows, "
        "epochs = passes over that source, loss_weight = weight of its tokens in the loss (pretrain, sft)")
    eval: str | None = option(None, "prefix of the evaluation split")
    packing: bool = option(
        True,
        "true: a row is a pack (THD attention); false: a row is a sample (a pair), padded to the micro-batch's longest"
    )
    padding_side: Literal["right", "left"] = option("right", "unpacked only; left is for rm")
    shuffle: bool = option(True, "a new order every epoch, from train.seed")
    seq_length: PositiveInt | None = option(
        None, "refuse data made for another length; unset: the data's. Megatron-LM's own text is cut to it")
    verify: Literal["size", "hash"] = option(
        "size", "check of the data before a run: sizes of its files, or a hash of every byte; the ranges of ids and "
        "masks are checked in every batch")


@dataclass(frozen=True)
class OptimConfig:
    lr: PositiveFloat = option(1e-5, "peak learning rate")
    min_lr: NonNegativeFloat = option(0.0, "learning rate at the end of the decay")
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = option("cosine", "schedule after the warm-up")
    lr_warmup_steps: NonNegativeInt = option(
        0, "linear warm-up from 0; of more steps than the run: the run ends below the peak")
    lr_wsd_decay_steps: NonNegativeInt = option(0, "WSD: length of the final decay, in steps")
    adam_beta1: AdamBeta = option(0.9, "Adam: decay of the mean of the gradients")
    adam_beta2: AdamBeta = option(0.95, "Adam: decay of the mean of their squares")
    adam_eps: PositiveFloat = option(1e-8, "Adam: added to the denominator")
    weight_decay: NonNegativeFloat = option(0.0, "decoupled; not applied to norms and biases")
    clip_grad: NonNegativeFloat = option(1.0, "largest global gradient norm; 0: no clipping")
    use_distributed_optimizer: bool = option(True, "each data-parallel rank keeps its shard of the optimizer state")


@dataclass(frozen=True)
class TrainConfig:
    output_dir: str = option(REQUIRED, "the run's directory; the same command again resumes the run")
    global_batch_size: BatchSize = option(
        REQUIRED, "rows per optimizer step: packs, or samples (pairs) without data.packing; ppo: answers per mini-batch"
    )
    micro_batch_size: PositiveInt = option(1, "rows per forward pass")
    max_tokens_per_micro_batch: PositiveInt | None = option(
        None, "instead of micro_batch_size: rows per forward pass by tokens, padding included, balanced over the ranks")
    num_epochs: PositiveFloat = option(1.0, "passes over the training data")
    max_steps: PositiveInt | None = option(
        None, "stop after this many optimizer steps (ppo: rollouts), whatever num_epochs says"
    )
    eval_interval: NonNegativeInt = option(0, "steps between evaluations; 0: only at the end")
    seed: Seed = option(1, "of the data order, new weights and sampling")
    deterministic: bool = option(
        False, "on a GPU: the same run gives the same numbers, bit for bit, more slowly (docs/reliability.md: how far)")
    loss_spike_threshold: NonNegativeFloat = option(
        6.0, "report a step and its samples if its loss lies this many robust standard deviations (1.4826 x MAD) above "
        "the median of the last 50; 0: off; not for ppo")
    exit_duration_minutes: PositiveFloat | None = option(
        None, "wall-clock budget: save and exit with status 75 before it ends; the same command again continues")
    allow_changes: tuple[str, ...] = option(
        (), "what may differ from the resumed run: configuration keys, and data or tokenizer for changed files")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "loss or gradient not finite on any rank: stop, or skip the step (ten in a row stop the run); ppo: stop"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    save_interval: NonNegativeInt | None = option(
        None, "steps between saves; unset: a save every 30 minutes; 0: only at the end. A stopped run saves too")
    keep_last: PositiveInt = option(2, "complete checkpoints to keep")
    best_metric: str | None = option(
        None,
        "an eval/ metric, e.g. eval/loss: also keep the checkpoint where it was best; every save is then evaluated; "
        "not for ppo"
    )
    best_is: Literal["lowest", "highest"] = option("lowest",
                                                   "which value of best_metric is best; highest for eval/accuracy")
    save_optimizer: bool = option(True, "false: only weights in the last checkpoint (cannot be resumed)")
    keep_every: NonNegativeInt = option(0, "also keep checkpoints whose step is a multiple of this; 0: none")
    async_save: bool = option(
        False, "copy the tensors and write them in the background during the next steps; the last save waits")
    verify: Literal["size", "hash"] = option(
        "size", "check of a checkpoint before use: sizes of its files, or a hash of every byte")
    on_save_error: Literal["stop", "continue"] = option(
        "stop",
        "a save fails (disk full, no permission): end the run, or warn and continue; the last save always ends it"
    )
    export_hf_at_end: bool = option(False, "also write the last checkpoint as an HF directory, <output_dir>/hf/step_N")
    export_hf_interval: NonNegativeInt = option(0, "steps between exports, a multiple of save_interval; 0: never")


@dataclass(frozen=True)
class LoggingConfig:
    log_interval: PositiveInt = option(1, "steps between console lines; metrics.jsonl always has every step")
    tensorboard: bool = option(True, "write event files to <output_dir>/tensorboard if tensorboard is installed")
    wandb_project: str | None = option(None, "log to this Weights & Biases project")
    mlflow_experiment: str | None = option(None, "log to this MLflow experiment")


@dataclass(frozen=True)
class LossConfig:
    aggregation: Literal["token", "sequence"] = option(
        "token", "token: mean over all trained tokens of the step; sequence: mean of the samples' means")
    z_loss: NonNegativeFloat = option(
        0.0, "pretrain, sft: weight of log(sum of exp(logits))^2, e.g. 1e-4; keeps logits from drifting")


@dataclass(frozen=True)
class SFTConfig:
    neftune_alpha: NonNegativeFloat = option(
        0.0, "noise on the embeddings in training, +- this / sqrt(length x hidden size); 5 is usual, 0: none")


@dataclass(frozen=True)
class RMConfig:
    loss: Literal["sigmoid", "logexp"] = option(
        "sigmoid", "-log sigmoid(d), or log(1 + exp(-d)) in a form that cannot overflow")
    head_position: Literal["last"] = option("last", "token whose value is the score: the one that closes the sequence")


@dataclass(frozen=True)
class DPOConfig:
    beta: PositiveFloat = option(0.1, "strength of the pull to the reference")
    loss: Literal["sigmoid", "ipo", "hinge"] = option("sigmoid", "the loss of the margin")
    label_smoothing: Annotated[float, Meta(ge=0, lt=0.5)] = option(0.0, "cDPO: assumed share of flipped pairs")
    length_normalize: bool = option(False, "mean instead of summed log-probs of an answer, with any loss")
    nll_coef: NonNegativeFloat = option(0.0, "weight of the negative log-likelihood of the chosen answer")
    reference: Literal["precompute", "online"] = option(
        "precompute", "reference log-probs once before training, kept beside the data for later runs; "
        "or a second model in memory")


@dataclass(frozen=True)
class RolloutConfig:
    batch_size: BatchSize = option(REQUIRED, "prompts per rollout")
    n: PositiveInt = option(1, "answers per prompt")
    max_new_tokens: PositiveInt = option(128, "longest answer, in tokens")
    temperature: Annotated[float, Meta(gt=0, le=2)] = option(  # vLLM takes no more than 2
        1.0, "also divides the trainer's logits; greedy answers (0) have no gradient")
    top_p: TopP = option(1.0, "nucleus; 1: off")
    top_k: TopK = option(-1, "-1: off")
    tensor_parallel_size: PositiveInt = option(1, "vLLM's; independent of the trainer's; divides the generating ranks")
    kv_cache_mib: PositiveInt | None = option(
        None, "vLLM's key/value cache on each rank; unset: on a GPU from what is free beside the trainer, on a CPU 256")
    max_num_seqs: RunningAnswers = option(256, "answers that vLLM decodes at once")
    weights: Literal["plain", "packed", "fp8"] = option(
        "plain", "format of vLLM's linear layers: as trained; packed by oneDNN (CPU); fp8, quantised anew at every "
        "update (dense, bfloat16)")
    sleep: bool = option(True, "colocated, CUDA: free vLLM's memory during training")
    reshard_bucket_mib: PositiveInt = option(256, "each rank's buffer for packing the weights that go to vLLM")
    placement: Literal["colocated", "separate"] = option("colocated",
                                                         "vLLM in the trainer's ranks, or in ranks of its own")
    num_ranks: PositiveInt | None = option(
        None, "separate: number of generating ranks, the last ones of torchrun's; tensor_parallel_size divides it")
    max_staleness: Annotated[int, Meta(ge=0, le=1)] = option(
        0, "separate: 1: weights one update older generate the next rollout, during training; 0: in turns")
    correction: Literal["none", "tis", "icepop"] = option("none",
                                                          "weigh the policy loss by exp(trainer - vLLM log-prob)")
    correction_low: NonNegativeFloat = option(0.0, "lower bound of that weight")
    correction_high: Annotated[float, Meta(gt=0, extra={OTHERWISE: float("inf")})] = option(
        2.0, "upper bound of that weight")
    stop: tuple[str, ...] = option(
        (), "texts that end an answer (a turn), as the end-of-turn token does; they are part of the answer")
    stop_token_ids: tuple[NonNegativeInt, ...] = option((), "token ids that end an answer")
    environment: str | None = option(
        None, "file.py:Class that the model talks with in turns (tools, games); see docs/rl.md")
    max_turns: PositiveInt = option(8, "turns of the model in a conversation with the environment")
    environment_threads: PositiveInt = option(16, "concurrent steps of the environment on each vLLM replica")
    environment_timeout_s: TimeLimit = option(60.0, "limit of one turn's steps, all conversations together")
    mismatch_warning: NonNegativeFloat = option(
        0.01, "warn at a step whose rollout/kl_mismatch, in nats per token, is above this")
    dynamic_sampling: bool = option(
        False, "DAPO: drop groups whose scores are all equal and sample further prompts instead")
    max_refills: NonNegativeInt = option(
        4, "how often a rollout samples further prompts; it takes the last ones whatever their scores")
    samples_to_log: NonNegativeInt = option(4, "answers of each rollout written to samples/step_N.jsonl")


@dataclass(frozen=True)
class OffloadConfig:
    """What moves to the host's memory while no phase needs it."""

    reference: bool = option(False, "the reference model's weights")
    reward: bool = option(False, "the reward models' weights")
    optimizer: bool = option(False, "optimizer states of actor and critic, except during their own update")
    gradients: bool = option(False, "gradients of actor and critic; freed between updates instead of copied")


@dataclass(frozen=True)
class RewardConfig:
    sources: tuple[str, ...] = option(
        (), "model:DIR, file.py:function or http(s)://host[,http://host2]; the score is their weighted sum")
    weights: tuple[ScoreWeight, ...] = option((), "one weight per source; empty: 1 each")
    normalize: bool = option(True, "reward models: (score - mean) / std with the statistics in their checkpoint")
    clip: PositiveFloat = option(10.0, "clip the sequence score to +- this")
    equal_tolerance: NonNegativeFloat = option(
        1e-6, "scores of a prompt's answers are equal, with advantage 0, if they differ by no more than this x max(1, "
        "largest |score|); 0.01 for a bfloat16 reward model, whose score of a text moves with its micro-batch")
    scaling: Literal["none", "whiten", "std", "running_std"] = option(
        "none", "of a rollout's scores: whiten: (score - mean) / std; std: score / std; "
        "running_std: score / std of all rollouts so far")
    overlong_buffer: NonNegativeInt = option(
        0, "DAPO: linear penalty on the last so many tokens before rollout.max_new_tokens; 0: off")
    overlong_penalty: NonNegativeFloat = option(
        1.0, "DAPO: subtracted from the score of an answer of rollout.max_new_tokens")
    function_timeout_s: TimeLimit = option(
        300.0, "limit of one call of a Python function; after it the process is killed and the run ends")
    function_memory_mib: NonNegativeInt = option(
        8192, "address space of a Python function's process; 0: no limit, e.g. for one that uses a GPU")
    function_env: tuple[str, ...] = option(
        (), "environment variables that Python functions may see besides the few allowed to all")
    http_timeout_s: TimeLimit = option(30.0, "limit of one request")
    http_total_timeout_s: TimeLimit = option(300.0, "limit of a request with all its retries")
    http_retries: NonNegativeInt = option(4, "retries of a failed request, with back-off")
    http_batch_size: PositiveInt = option(64, "answers per request")
    http_token_env: str | None = option(None, "name of the environment variable that holds the bearer token")


@dataclass(frozen=True)
class KLConfig:
    coef: NonNegativeFloat = option(0.05, "beta; 0: no reference model is built")
    kind: Literal["k1", "k2", "k3"] = option("k1", "estimator of the divergence from the reference")
    in_loss: bool = option(False, "add it to the loss instead of the token rewards")
    target: PositiveFloat | None = option(None, "adaptive: steer coef so that the KL of an answer stays near this")
    horizon: PositiveInt = option(10000, "adaptive: number of answers over which coef may change by its own size")


@dataclass(frozen=True)
class PPOConfig:
    estimator: Annotated[str, ESTIMATORS] = option("gae", "gae trains a critic; the others need none")
    epochs: PositiveInt = option(1, "passes over each rollout")
    clip_low: UnitInterval = option(0.2, "ratio >= 1 - this")
    clip_high: NonNegativeFloat = option(0.2, "ratio <= 1 + this")
    dual_clip: Annotated[float, Meta(gt=1)] | None = option(
        None, "lower bound of the objective for negative advantages, e.g. 3")
    ratio: Literal["token", "sequence"] = option("token", "sequence: gspo")
    ratio_tolerance: PositiveFloat | None = option(
        None, "end the run if |ratio - 1| is above this on average at a rollout's first update; unset: 0.001 in "
        "float32, 0.05 in bfloat16")
    gamma: UnitInterval = option(1.0, "discount")
    lam: UnitInterval = option(0.95, "GAE lambda")
    entropy_coef: NonNegativeFloat = option(0.0, "weight of the entropy bonus")
    value_clip: PositiveFloat | None = option(0.2, "largest change of a value in the loss; unset: no clipping")
    whiten_advantages: bool = option(True, "gae and the reinforce estimators: over all trained tokens of the rollout")
    critic: str | None = option(
        None, "the critic's initial weights; unset: a local reward model, else model.path with a new head")
    critic_lr: NonNegativeFloat = option(1e-5, "peak learning rate of the critic; ends at optim.min_lr or this")
    critic_warmup_steps: NonNegativeInt = option(0, "first rollouts, which train only the critic")
    critic_tensor_model_parallel_size: PositiveInt | None = option(
        None, "the critic's own; unset: parallel.tensor_model_parallel_size")
    critic_pipeline_model_parallel_size: PositiveInt | None = option(
        None, "the critic's own; unset: parallel.pipeline_model_parallel_size")

    @property
    def estimator_row(self) -> Any:
        """Of mrlhf.rl.estimators: what the estimator needs."""
        return ESTIMATORS.rows[self.estimator]


@dataclass(frozen=True)
class PTXConfig:
    coef: NonNegativeFloat = option(0.0, "weight of the pretraining loss in the actor's updates; 0: none")
    data: str | None = option(None, "prefix written by tools/preprocess_data.py --task sft or pretrain")
    batch_size: BatchSize = option(8, "rows of that data per update")
    micro_batch_size: PositiveInt = option(1, "rows of that data per forward pass")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """The sections of every training stage. A stage adds its own sections and its name."""

    stage: ClassVar[str]
    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    parallel: ParallelConfig = ParallelConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()


@dataclass(frozen=True, kw_only=True)
class PretrainStage(TrainingConfig):
    stage: ClassVar[str] = "pretrain"
    loss: LossConfig = LossConfig()


@dataclass(frozen=True, kw_only=True)
class SFTStage(TrainingConfig):
    stage: ClassVar[str] = "sft"
    loss: LossConfig = LossConfig()
    sft: SFTConfig = SFTConfig()


@dataclass(frozen=True, kw_only=True)
class RMStage(TrainingConfig):
    stage: ClassVar[str] = "rm"
    rm: RMConfig = RMConfig()


@dataclass(frozen=True, kw_only=True)
class DPOStage(TrainingConfig):
    stage: ClassVar[str] = "dpo"
    dpo: DPOConfig = DPOConfig()


@dataclass(frozen=True, kw_only=True)
class PPOStage(TrainingConfig):
    stage: ClassVar[str] = "ppo"
    rollout: RolloutConfig
    reward: RewardConfig = RewardConfig()
    ppo: PPOConfig = PPOConfig()
    kl: KLConfig = KLConfig()
    ptx: PTXConfig = PTXConfig()
    offload: OffloadConfig = OffloadConfig()
    loss: LossConfig = LossConfig()

    @property
    def updates_per_rollout(self) -> int:
        """Optimizer steps of each model."""
        return self.ppo.epochs * (self.rollout.batch_size * self.rollout.n // self.train.global_batch_size)

    @property
    def critic_parallel(self) -> ParallelConfig:
        """The critic's parallel sizes: those of the actor, except where ppo.critic_... sets its own."""
        ppo, p = self.ppo, self.parallel
        tp = ppo.critic_tensor_model_parallel_size or p.tensor_model_parallel_size
        pp = ppo.critic_pipeline_model_parallel_size or p.pipeline_model_parallel_size
        if (tp, pp) == (p.tensor_model_parallel_size, p.pipeline_model_parallel_size):
            return p
        return replace(p, tensor_model_parallel_size=tp, sequence_parallel=p.sequence_parallel and tp > 1,
                       pipeline_model_parallel_size=pp, virtual_pipeline_model_parallel_size=None,
                       num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None)


@dataclass(frozen=True)
class ScoreStage:
    checkpoint: str = option(REQUIRED, "mrlhf checkpoint, run directory or HF directory")
    data: str = option(REQUIRED, "prefix written by tools/preprocess_data.py")
    output: str = option(REQUIRED, "jsonl file to write, one line per sample in data order")
    packing: bool = option(True, "false: pad instead of pack")
    padding_side: Literal["right", "left"] = option("right", "unpacked only; left for value heads")
    micro_batch_size: PositiveInt = option(1, "rows per forward pass")
    temperature: PositiveFloat = option(1.0, "divides the logits")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of parameters and activations; unset: the checkpoint's, for a HF directory bfloat16 if all weights are")
    parallel: ParallelConfig = ParallelConfig()


@dataclass(frozen=True)
class GenerateStage:
    checkpoint: str = option(REQUIRED, "mrlhf checkpoint, run directory or HF directory")
    prompts: str = option(REQUIRED, "jsonl with `prompt` (messages) or `input` (string) in every line")
    output: str = option(REQUIRED, "jsonl to write: the line's columns and `completions`")
    n: PositiveInt = option(1, "answers per prompt")
    best_of: NonNegativeInt = option(
        0, "sample this many answers per prompt and write the best to `output` as a row for sft; 0: off")
    pairs: str | None = option(
        None, "with best_of: jsonl to write with the best and the worst answers, rows for rm and dpo")
    min_score: Score | None = option(
        None, "with best_of: leave out prompts whose best answer scores less (rejection sampling)")
    temperature: Annotated[float, Meta(ge=0, le=2)] = option(1.0, "0: greedy")
    top_p: TopP = option(1.0, "nucleus; 1: off")
    top_k: TopK = option(-1, "-1: off")
    max_new_tokens: PositiveInt = option(128, "longest answer (conversation), in tokens")
    stop: tuple[str, ...] = option((), "texts that end an answer, as the end-of-turn token does")
    environment: str | None = option(None, "file.py:Class to talk with in turns, like rollout.environment of ppo")
    max_turns: PositiveInt = option(8, "turns of the model in a conversation with the environment")
    max_prompt_length: PositiveInt | None = option(
        None, "refuse longer prompts; unset: the model's length minus the answer's")
    seed: Seed = option(1, "equal seeds give equal answers, whatever the number of ranks")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of parameters and activations; unset: the checkpoint's, for a HF directory bfloat16 if all weights are; "
        "a reward model has its own")
    tensor_parallel_size: PositiveInt = option(1, "vLLM's; must divide the number of ranks")
    kv_cache_mib: PositiveInt | None = option(
        None, "vLLM's key/value cache on each rank; unset: on a GPU from what is free beside the trainer, on a CPU 256")
    max_num_seqs: RunningAnswers = option(256, "answers that vLLM decodes at once")
    input_template: str | None = option(None, "plain text template for tokenizers without a chat template, as "
                                              '--input-template of the data: "User: {}\\nAssistant: "')
    micro_batch_size: PositiveInt = option(8, "answers per forward pass of a reward model")
    reward: RewardConfig = RewardConfig()


@dataclass(frozen=True)
class ServeRewardStage:
    checkpoint: str = option(
        REQUIRED, "reward model: mrlhf checkpoint, run directory or HF ...ForSequenceClassification directory")
    host: str = option("127.0.0.1", "address to listen at; any address but the loopback needs a token")
    port: Annotated[int, Meta(ge=0, le=65535)] = option(5000, "0: any free one")
    token_env: str | None = option(
        None, "name of the environment variable with the bearer token that requests must bring")
    normalize: bool = option(True, "(score - mean) / std with the statistics in the checkpoint")
    packing: bool = option(True, "false: pad instead of pack")
    micro_batch_size: PositiveInt = option(16, "sequences per forward pass")
    max_batch_size: PositiveInt = option(
        512, "sequences per request, and per group of requests that the model scores together")
    max_request_mib: PositiveInt = option(16, "refuse larger requests")
    timeout_s: TimeLimit = option(300.0, "answer 503 to a request that waits longer for the model")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of parameters and activations; unset: the checkpoint's, for a HF directory bfloat16 if all weights are")
    parallel: ParallelConfig = ParallelConfig()


StageConfig = TrainingConfig | ScoreStage | GenerateStage | ServeRewardStage

STAGES: dict[str, type] = {
    **{stage.stage: stage for stage in (PretrainStage, SFTStage, RMStage, DPOStage, PPOStage)},
    "score": ScoreStage, "generate": GenerateStage, "serve-reward": ServeRewardStage,
}
