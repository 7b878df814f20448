"""Every option of every stage, its meaning and its default, in one place.

One frozen dataclass per concern; a stage's configuration is a dataclass of these sections. The text in
`option(default, help)` is what `mrlhf STAGE --help` prints. `config_io.py` fills them from YAML and from
`--section.key VALUE`; `config_check.py` finds every contradiction that can be seen without opening a file.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pkgutil import resolve_name
from typing import Annotated, Any, ClassVar, Literal

REQUIRED: Any = object()


def option(default: Any, help: str) -> Any:
    """A dataclass field with its help text. `REQUIRED` as default: the user must give it."""
    if default is REQUIRED:
        return field(metadata={"help": help})
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class OneOf:
    """Marks a text as a key of a table in a later folder, "module:NAME": `Annotated[str, OneOf(...)]`. It is imported when it is read."""

    table: str

    @property
    def rows(self) -> dict[str, Any]:
        return resolve_name(self.table)


ESTIMATORS = OneOf("mrlhf.rl.estimators:ESTIMATORS")


@dataclass(frozen=True)
class ModelConfig:
    path: str = option(REQUIRED, "HF directory or hub id, mrlhf checkpoint, or a finished run's directory")
    init: Literal["weights", "random"] = option("weights", "random: take only config and tokenizer of `path`, new weights from train.seed")
    dtype: Literal["float32", "bfloat16"] = option(
        "bfloat16", "parameters and activations; bfloat16 keeps fp32 master weights and fp32 gradients"
    )
    moe_aux_loss_coeff: float = option(
        0.0, "experts: weight of the load-balancing loss of each layer, e.g. 0.001; config.json's router_aux_loss_coef is not read. 0: without"
    )
    moe_z_loss_coeff: float = option(0.0, "experts: weight of the mean of log(sum of exp(router's logits))^2 of each layer, e.g. 0.001")


@dataclass(frozen=True)
class ParallelConfig:
    tensor_model_parallel_size: int = option(1, "ranks that share every layer's matrices")
    pipeline_model_parallel_size: int = option(1, "ranks that share the layers")
    virtual_pipeline_model_parallel_size: int | None = option(
        None, "interleaved pipeline: pieces of the model on each rank; fewer idle ranks, more messages"
    )
    num_layers_in_first_pipeline_stage: int | None = option(None, "uneven pipeline: layers of the first stage, which has the embedding too")
    num_layers_in_last_pipeline_stage: int | None = option(None, "uneven pipeline: layers of the last stage, which has the head too")
    context_parallel_size: int = option(
        1, "ranks that share each row's tokens, for long rows; in attention they share the heads instead"
    )
    expert_model_parallel_size: int = option(
        1, "ranks that share the experts, each with whole ones; divides tensor x data-parallel ranks. 1: every expert is cut by tensor_model_parallel_size"
    )
    sequence_parallel: bool = option(
        False, "split norms and residuals over the tensor-parallel ranks; needs tensor_model_parallel_size > 1"
    )
    recompute: Literal["none", "selective", "full"] = option(
        "none", "activations computed again in backward: selective: inside attention; full: of every layer but its input"
    )
    overlap_grad_reduce: bool | None = option(
        None, "reduce gradients over data-parallel ranks while backward still runs; unset: where there is a GPU"
    )
    overlap_param_gather: bool | None = option(
        None, "distributed optimizer: gather the new parameters while the next forward runs; unset: where there is a GPU"
    )
    timeout_minutes: float = option(10.0, "a collective that waits longer ends the run with an error")
    silence_seconds: float = option(60.0, "a rank that gives no sign of life for so long ends the run on all ranks, with its name")


@dataclass(frozen=True)
class DataSource:
    """One source of a blend. docs/data.md says what weights and epochs mean.

    weight: its share of the rows. loss_weight: what each of its tokens counts in the loss (pretrain, sft), 1 where it is None.
    """

    prefix: str
    weight: float | None = None
    epochs: float | None = None
    loss_weight: float | None = None


@dataclass(frozen=True)
class DataConfig:
    train: tuple[DataSource, ...] = option(
        REQUIRED,
        "prefix written by tools/preprocess_data.py, or a blend: weight = share of the rows, epochs = passes over that source, "
        "loss_weight = what its tokens count in the loss (pretrain, sft)",
    )
    eval: str | None = option(None, "prefix of the evaluation split")
    packing: bool = option(
        True, "true: a row is a pack (THD attention); false: a row is a sample (a pair), padded to the longest of its micro-batch"
    )
    padding_side: Literal["right", "left"] = option("right", "unpacked only; left is for rm")
    shuffle: bool = option(True, "a new order every epoch, from train.seed")
    seq_length: int | None = option(None, "refuse data that was made for another length; unset: take the data's; Megatron-LM's own text is cut to it")


@dataclass(frozen=True)
class OptimConfig:
    lr: float = option(1e-5, "peak learning rate")
    min_lr: float = option(0.0, "where the decay ends")
    lr_decay_style: Literal["constant", "linear", "cosine", "WSD"] = option("cosine", "schedule after the warm-up")
    lr_warmup_steps: int = option(0, "linear warm-up from 0")
    lr_wsd_decay_steps: int = option(0, "WSD: length of the final decay, in steps")
    adam_beta1: float = option(0.9, "Adam")
    adam_beta2: float = option(0.95, "Adam")
    adam_eps: float = option(1e-8, "Adam")
    weight_decay: float = option(0.0, "decoupled; not applied to norms and biases")
    clip_grad: float = option(1.0, "largest global gradient norm; 0: no clipping")
    use_distributed_optimizer: bool = option(True, "each data-parallel rank keeps its share of the optimizer state")


@dataclass(frozen=True)
class TrainConfig:
    output_dir: str = option(REQUIRED, "the run's directory; the same command again resumes it")
    global_batch_size: int = option(
        REQUIRED, "rows an optimizer step: packs, or samples (pairs) when data.packing is false; ppo: answers a mini-batch"
    )
    micro_batch_size: int = option(1, "rows a forward pass")
    max_tokens_per_micro_batch: int | None = option(
        None, "instead of micro_batch_size: as many rows a forward pass as have so many tokens with their padding, shared out evenly over the ranks"
    )
    num_epochs: float = option(1.0, "passes over the training data")
    max_steps: int | None = option(None, "stop after so many optimizer steps (ppo: rollouts) whatever num_epochs says")
    eval_interval: int = option(0, "evaluate every so many steps; 0: only at the end")
    seed: int = option(1, "order of the data, new weights, sampling")
    loss_spike_threshold: float = option(
        6.0,
        "say so, with the samples, when a step's loss lies this many robust standard deviations (1.4826 x MAD) above the median of the last 50; "
        "0: off; not for ppo",
    )
    exit_duration_minutes: float | None = option(
        None, "wall-clock budget: save and exit with status 75 before it is over; the same command again goes on"
    )
    allow_changes: tuple[str, ...] = option(
        (), "what may differ from the run that is resumed: keys of the configuration, and data or tokenizer for changed files"
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "loss or gradient not finite on any rank: stop, or leave the step out (ten in a row stop the run); ppo: stop"
    )


@dataclass(frozen=True)
class CheckpointConfig:
    save_interval: int = option(0, "save every so many steps; 0: only at the end")
    keep_last: int = option(2, "whole checkpoints to keep")
    best_metric: str | None = option(
        None, "an eval/ metric, e.g. eval/loss: the checkpoint where it was best is kept beside the last ones; saves are then also evaluated"
    )
    best_is: Literal["lowest", "highest"] = option("lowest", "which value of best_metric is best; highest for eval/accuracy")
    save_optimizer: bool = option(True, "false: weights only in the last checkpoint (cannot be resumed)")
    keep_every: int = option(0, "also keep every checkpoint whose step is a multiple of this; 0: none")
    async_save: bool = option(False, "copy the tensors and write them in the background while the next steps run; the last save waits")
    verify: Literal["size", "hash"] = option("size", "how a checkpoint is checked before it is used: sizes of its files, or every byte")
    on_save_error: Literal["stop", "continue"] = option(
        "stop", "a save that fails (disk full, no permission): end the run, or warn and go on; the last save always ends it"
    )
    export_hf_at_end: bool = option(False, "write the last checkpoint also as a HF directory, <output_dir>/hf/step_N")
    export_hf_interval: int = option(0, "the same every so many steps, where a checkpoint is saved; 0: never")


@dataclass(frozen=True)
class LoggingConfig:
    log_interval: int = option(1, "console line every so many steps; metrics.jsonl always has every step")
    tensorboard: bool = option(True, "write event files to <output_dir>/tensorboard where tensorboard is installed")
    wandb_project: str | None = option(None, "log to this Weights & Biases project")
    mlflow_experiment: str | None = option(None, "log to this MLflow experiment")


@dataclass(frozen=True)
class LossConfig:
    aggregation: Literal["token", "sequence"] = option(
        "token", "token: mean over all trained tokens of the step; sequence: mean of the samples' means"
    )
    z_loss: float = option(0.0, "pretrain, sft: weight of log(sum of exp(logits))^2, e.g. 1e-4; keeps logits from drifting")


@dataclass(frozen=True)
class SFTConfig:
    neftune_alpha: float = option(0.0, "noise on the embeddings while training, +- this / sqrt(length x hidden size); 5 is usual, 0: none")


@dataclass(frozen=True)
class RMConfig:
    loss: Literal["sigmoid", "logexp"] = option("sigmoid", "-log sigmoid(d), or log(1 + exp(-d)) written so that it cannot overflow")
    head_position: Literal["last"] = option("last", "the token whose value is the score: the one that closes the sequence")


@dataclass(frozen=True)
class DPOConfig:
    beta: float = option(0.1, "strength of the pull to the reference")
    loss: Literal["sigmoid", "ipo", "hinge"] = option("sigmoid", "the loss of the margin")
    label_smoothing: float = option(0.0, "cDPO: share of pairs taken to be flipped")
    length_normalize: bool = option(False, "mean instead of summed log-probs of an answer, with any loss")
    nll_coef: float = option(0.0, "weight of the negative log-likelihood of the chosen answer")
    reference: Literal["precompute", "online"] = option(
        "precompute", "reference log-probs once before training, kept beside the data for later runs; or a second model in memory"
    )


@dataclass(frozen=True)
class RolloutConfig:
    batch_size: int = option(REQUIRED, "prompts a rollout")
    n: int = option(1, "answers a prompt")
    max_new_tokens: int = option(128, "longest answer")
    temperature: float = option(1.0, "also divides the trainer's logits")
    top_p: float = option(1.0, "nucleus; 1: off")
    top_k: int = option(-1, "-1: off")
    tensor_parallel_size: int = option(1, "vLLM's; free of the trainer's, divides the ranks that generate")
    kv_cache_mib: int = option(256, "vLLM's key/value cache on each rank")
    max_num_seqs: int = option(256, "answers vLLM decodes at once")
    weights: Literal["plain", "packed", "fp8"] = option(
        "plain", "form of vLLM's linear layers: as trained; packed by oneDNN (CPU); fp8, quantised anew at every update (dense, bfloat16)"
    )
    sleep: bool = option(True, "colocated, CUDA: free vLLM's memory while training")
    reshard_bucket_mib: int = option(256, "memory of each rank for packing and unpacking while weights go to vLLM")
    placement: Literal["colocated", "separate"] = option("colocated", "vLLM in the trainer's ranks, or in ranks of its own")
    num_ranks: int | None = option(None, "separate: how many ranks generate, the last ones of torchrun's; tensor_parallel_size divides them")
    max_staleness: int = option(0, "separate: 1: the next rollout is made by weights one update older, during training; 0: in turns")
    correction: Literal["none", "tis", "icepop"] = option("none", "weigh the policy loss by exp(trainer - vLLM log-prob)")
    correction_low: float = option(0.0, "lower bound of that weight")
    correction_high: float = option(2.0, "upper bound of that weight")
    stop: tuple[str, ...] = option((), "texts that end an answer (a turn) besides the end-of-turn token; they belong to it")
    stop_token_ids: tuple[int, ...] = option((), "ids that do so")
    environment: str | None = option(None, "file.py:Class that the model talks with in turns (tools, games); see docs/rl.md")
    max_turns: int = option(8, "turns of the model in a conversation with the environment")
    environment_threads: int = option(16, "steps of the environment at once, on each vLLM replica")
    environment_timeout_s: float = option(60.0, "of one turn's steps, all conversations together")
    mismatch_warning: float = option(0.01, "rollout/kl_mismatch, in nats a token, above which a step prints a warning")
    dynamic_sampling: bool = option(False, "drop the groups whose scores are all equal and draw further prompts in their place (DAPO)")
    max_refills: int = option(4, "times that a rollout draws further prompts; the last ones are taken whatever their scores")
    samples_to_log: int = option(4, "answers of each rollout written to samples/step_N.jsonl")


@dataclass(frozen=True)
class OffloadConfig:
    """What waits in the host's memory while no phase needs it."""

    reference: bool = option(False, "the reference model's weights")
    reward: bool = option(False, "the reward models' weights")
    optimizer: bool = option(False, "actor's and critic's optimizer states, but for their own update")
    gradients: bool = option(False, "actor's and critic's gradients, which are simply dropped between updates")


@dataclass(frozen=True)
class RewardConfig:
    sources: tuple[str, ...] = option((), "model:DIR, file.py:function or http(s)://host[,http://host2]; weighted sum of all")
    weights: tuple[float, ...] = option((), "a weight for each source; empty: 1 each")
    normalize: bool = option(True, "reward models: (score - mean) / std with the statistics in their checkpoint")
    clip: float = option(10.0, "the sequence score is clipped to +- this")
    scaling: Literal["none", "whiten", "std", "running_std"] = option(
        "none", "of the scores of a rollout: minus mean, by std; by std; by the std of all rollouts so far"
    )
    overlong_buffer: int = option(0, "DAPO: the last so many tokens before rollout.max_new_tokens are punished, linearly; 0: off")
    overlong_penalty: float = option(1.0, "DAPO: subtracted from the score of an answer of rollout.max_new_tokens")
    function_timeout_s: float = option(300.0, "of one call of a Python function; then its process is killed and the run ends")
    function_memory_mib: int = option(8192, "address space of a Python function's process; 0: no limit, e.g. for one that uses a GPU")
    function_env: tuple[str, ...] = option((), "names of environment variables that Python functions may see; all but a few are kept from them")
    http_timeout_s: float = option(30.0, "of one request")
    http_total_timeout_s: float = option(300.0, "of a request with all its retries")
    http_retries: int = option(4, "after a failed request, with back-off")
    http_batch_size: int = option(64, "answers a request")
    http_token_env: str | None = option(None, "name of the environment variable that holds the bearer token")


@dataclass(frozen=True)
class KLConfig:
    coef: float = option(0.05, "beta; 0: no reference model is built")
    kind: Literal["k1", "k2", "k3"] = option("k1", "estimator of the divergence to the reference")
    in_loss: bool = option(False, "add it to the loss instead of the token rewards")
    target: float | None = option(None, "adaptive: steer coef so that the KL of an answer stays near this")
    horizon: int = option(10000, "adaptive: answers over which coef may change by its own size")


@dataclass(frozen=True)
class PPOConfig:
    estimator: Annotated[str, ESTIMATORS] = option("gae", "gae trains a critic; the others need none")
    epochs: int = option(1, "passes over each rollout")
    clip_low: float = option(0.2, "ratio >= 1 - this")
    clip_high: float = option(0.2, "ratio <= 1 + this")
    dual_clip: float | None = option(None, "lower bound of the objective for negative advantages, e.g. 3")
    ratio: Literal["token", "sequence"] = option("token", "sequence: gspo")
    gamma: float = option(1.0, "discount")
    lam: float = option(0.95, "GAE lambda")
    entropy_coef: float = option(0.0, "bonus")
    value_clip: float | None = option(0.2, "clip of the value's change; unset: none")
    whiten_advantages: bool = option(True, "gae and the reinforce estimators: over all trained tokens of the rollout")
    critic: str | None = option(None, "where the critic starts; unset: a local reward model, else model.path with a fresh head")
    critic_lr: float = option(1e-5, "peak learning rate of the critic")
    critic_warmup_steps: int = option(0, "rollouts that train only the critic")
    critic_tensor_model_parallel_size: int | None = option(None, "the critic's own; unset: as parallel.tensor_model_parallel_size")
    critic_pipeline_model_parallel_size: int | None = option(None, "the critic's own; unset: as parallel.pipeline_model_parallel_size")

    @property
    def estimator_row(self) -> Any:
        """Of mrlhf.rl.estimators: what the estimator needs."""
        return ESTIMATORS.rows[self.estimator]


@dataclass(frozen=True)
class PTXConfig:
    coef: float = option(0.0, "weight of the pretraining loss in the actor's updates; 0: none")
    data: str | None = option(None, "prefix written by tools/preprocess_data.py --task sft or pretrain")
    batch_size: int = option(8, "rows of it in every update")
    micro_batch_size: int = option(1, "rows of it a forward pass")


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """What every training stage has. A stage adds its own sections and its name."""

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
    def critic_parallel(self) -> ParallelConfig:
        """How the critic is cut: as everything else, but for the sizes of its own."""
        ppo, p = self.ppo, self.parallel
        tp = ppo.critic_tensor_model_parallel_size or p.tensor_model_parallel_size
        pp = ppo.critic_pipeline_model_parallel_size or p.pipeline_model_parallel_size
        if (tp, pp) == (p.tensor_model_parallel_size, p.pipeline_model_parallel_size):
            return p
        return replace(
            p, tensor_model_parallel_size=tp, sequence_parallel=p.sequence_parallel and tp > 1, pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=None, num_layers_in_first_pipeline_stage=None, num_layers_in_last_pipeline_stage=None,
        )  # fmt: skip


@dataclass(frozen=True)
class ScoreStage:
    checkpoint: str = option(REQUIRED, "mrlhf checkpoint, run directory or HF directory")
    data: str = option(REQUIRED, "prefix written by tools/preprocess_data.py")
    output: str = option(REQUIRED, "jsonl file to write, one line a sample in data order")
    packing: bool = option(True, "false: pad instead of pack")
    padding_side: Literal["right", "left"] = option("right", "unpacked only; left for value heads")
    micro_batch_size: int = option(1, "rows a forward pass")
    temperature: float = option(1.0, "divides the logits")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "of parameters and activations")
    parallel: ParallelConfig = ParallelConfig()


@dataclass(frozen=True)
class GenerateStage:
    checkpoint: str = option(REQUIRED, "mrlhf checkpoint, run directory or HF directory")
    prompts: str = option(REQUIRED, "jsonl with `prompt` (messages) or `input` (string) in every line")
    output: str = option(REQUIRED, "jsonl to write: the line's columns and `completions`")
    n: int = option(1, "answers a prompt")
    best_of: int = option(0, "so many answers a prompt, of which the best goes into `output` as a row for sft; 0: off")
    pairs: str | None = option(None, "with best_of: jsonl to write with the best and the worst answers, rows for rm and dpo")
    min_score: float | None = option(None, "with best_of: leave out prompts whose best answer scores less (rejection sampling)")
    temperature: float = option(1.0, "0: greedy")
    top_p: float = option(1.0, "nucleus; 1: off")
    top_k: int = option(-1, "-1: off")
    max_new_tokens: int = option(128, "longest answer (conversation)")
    stop: tuple[str, ...] = option((), "texts that end an answer besides the end-of-turn token")
    environment: str | None = option(None, "file.py:Class to talk with in turns, as rollout.environment of ppo")
    max_turns: int = option(8, "turns of the model in a conversation with the environment")
    max_prompt_length: int | None = option(None, "refuse longer prompts; unset: what the model's length leaves")
    seed: int = option(1, "answers are the same for the same seed, whatever the number of ranks")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "of parameters and activations")
    tensor_parallel_size: int = option(1, "vLLM's; must divide the number of ranks")
    kv_cache_mib: int = option(256, "vLLM's key/value cache on each rank")
    max_num_seqs: int = option(256, "answers vLLM decodes at once")
    input_template: str | None = option(None, "plain text template for tokenizers without a chat template")
    micro_batch_size: int = option(8, "answers a forward pass of a reward model")
    reward: RewardConfig = RewardConfig()


@dataclass(frozen=True)
class ServeRewardStage:
    checkpoint: str = option(REQUIRED, "reward model: mrlhf checkpoint, run directory or HF ...ForSequenceClassification directory")
    host: str = option("127.0.0.1", "address to listen at; anything but this machine itself needs a token")
    port: int = option(5000, "0: any free one")
    token_env: str | None = option(None, "name of the environment variable with the bearer token that requests must bring")
    normalize: bool = option(True, "(score - mean) / std with the statistics in the checkpoint")
    packing: bool = option(True, "false: pad instead of pack")
    micro_batch_size: int = option(16, "sequences a forward pass")
    max_batch_size: int = option(512, "sequences a request, and those of several requests that go through the model together")
    max_request_mib: int = option(16, "larger requests are refused")
    timeout_s: float = option(300.0, "a request that waits longer for the model is answered with 503")
    dtype: Literal["float32", "bfloat16"] = option("bfloat16", "of parameters and activations")
    parallel: ParallelConfig = ParallelConfig()

StageConfig = TrainingConfig | ScoreStage | GenerateStage | ServeRewardStage

STAGES: dict[str, type] = {
    **{stage.stage: stage for stage in (PretrainStage, SFTStage, RMStage, DPOStage, PPOStage)},
    "score": ScoreStage,
    "generate": GenerateStage,
    "serve-reward": ServeRewardStage,
}
