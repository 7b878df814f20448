"""Fixes of configurations: of options that contradict each other, the model, the data or the ranks."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mrlhf import cli
from mrlhf.config.load import load_config
from mrlhf.config.options import STAGES, GenerateStage, PPOStage, ScoreStage, ServeRewardStage

from .harness import Command, Scenario

DATA = {"pretrain": "text", "sft": "sft", "rm": "pref", "dpo": "pref", "ppo": "prompts"}


def _checked(name: str, with_files: bool) -> Callable[[Command], Any]:
    """The configuration, after the stage's own checks where files are looked at too."""

    def run(command: Command) -> Any:
        config = load_config(STAGES[name], None, command.flags)
        if not with_files:
            return config
        from mrlhf.commands.generate import check_generate, read_prompts
        from mrlhf.commands.score import check_score
        from mrlhf.commands.serve_reward import check_server
        from mrlhf.data.tokenizers.hf import load_tokenizer
        from mrlhf.rl.ppo_checks import check_ppo
        from mrlhf.training import preflight

        if isinstance(config, GenerateStage):
            source, _ = check_generate(config, command.ranks)
            return read_prompts(config, load_tokenizer(source.hf_dir), 100)
        if isinstance(config, ScoreStage | ServeRewardStage):
            return (check_score if isinstance(config, ScoreStage) else check_server)(config, command.ranks)
        check = check_ppo if isinstance(config, PPOStage) else preflight.check_run
        return check(config, world=command.ranks)

    return run


def stage(name: str, ranks: int = 1, *, files: bool = True, env: dict[str, str] | None = None, **changes: Any) -> Any:
    """A command of the stage on the world's model and data, with `changes` (`__` for the dot; "WORLD/x", "VALUE")."""

    def make(bench: SimpleNamespace) -> Command:
        world = bench.world
        values: dict[str, Any] = {"checkpoint": "WORLD/qwen2", "output": bench.tmp / "out.jsonl"}
        if name in DATA:
            values = {
                "model.path": "WORLD/qwen2",
                "model.dtype": "float32",
                "data.train": f"WORLD/{DATA[name]}",
                "train.output_dir": bench.tmp / "run",
                "train.global_batch_size": 8,
            }
        if name == "ppo":
            values |= {"rollout.batch_size": 8, "rollout.max_new_tokens": 8, "reward.sources": "model:VALUE"}
        values |= {"score": {"data": "WORLD/sft"}, "generate": {"prompts": "WORLD/prompts.jsonl"}}.get(name, {})
        if name == "serve-reward":
            values = {"checkpoint": "VALUE"}
        values |= {key.replace("__", "."): value for key, value in changes.items()}
        flags = []
        for key, value in values.items():
            text = str(value(bench) if callable(value) else value)
            flags += [f"--{key}", text.replace("WORLD", str(world)).replace("VALUE", str(bench.value))]
        return Command(_checked(name, files), flags, ranks, env or {})

    return make


def option(
    name: str,
    fix: str,
    *,
    next: str | None = None,
    take: str | None = None,
    fill: tuple[Any, ...] = (),
    stage_name: str = "sft",
    **changes: Any,
) -> Scenario:
    """One that options alone contradict."""
    return Scenario(name, stage(stage_name, files=False, **changes), fix, next=next, take=take, fill=fill)


def size(
    name: str, fix: str, *, stage_name: str = "sft", ranks: int = 1, next: str | None = None, **changes: Any
) -> Scenario:
    """One that a model, data or the number of ranks contradicts."""
    return Scenario(name, stage(stage_name, ranks, **changes), fix, next=next)


TP, PP, CP, EP = (
    f"parallel__{name}_size"
    for name in ("tensor_model_parallel", "pipeline_model_parallel", "context_parallel", "expert_model_parallel")
)
VPP, FIRST, LAST = (
    f"parallel__{name}"
    for name in (
        "virtual_pipeline_model_parallel_size",
        "num_layers_in_first_pipeline_stage",
        "num_layers_in_last_pipeline_stage",
    )
)
FIXED_BATCH = {"train__global_batch_size": 12}
SEPARATE = {"rollout__placement": "separate"}

CONTRADICTIONS = [
    *(option(f"{key} without stages", f"--{key.replace('__', '.')} null", **{key: 2}) for key in (VPP, FIRST, LAST)),
    option("sequence parallel alone", r"--parallel\.sequence_parallel false", parallel__sequence_parallel="true"),
    *(
        option(f"{key} under CP", rf"--{key.replace('__', '.')} token", stage_name=name, **{key: "sequence", CP: 2})
        for name, key in (("sft", "loss__aggregation"), ("ppo", "ppo__ratio"))
    ),
    option("left padding of sft", "--data.padding_side right", data__padding_side="left"),
    option("left padding of packs", "--data.packing false", stage_name="rm", data__padding_side="left"),
    option("minimum above lr", r"--optim\.min_lr 1e-05", optim__min_lr=1),
    option("WSD", "--optim.lr_wsd_decay_steps STEPS", fill=(3,), optim__lr_decay_style="WSD"),
    option("micro batch", "--train.micro_batch_size 2", train__micro_batch_size=3),
    option(
        "micro batch beside tokens",
        "--train.micro_batch_size 1",
        train__micro_batch_size=2,
        train__max_tokens_per_micro_batch=400,
    ),
    option("best of ppo", "--checkpoint.best_metric null", stage_name="ppo", checkpoint__best_metric="eval/loss"),
    option(
        "best metric misspelt",
        "--checkpoint.best_metric eval/loss",
        checkpoint__best_metric="eval/los",
        data__eval="WORLD/sft",
    ),
    option("export without a save", "--checkpoint.save_interval 6", checkpoint__export_hf_interval=6),
    option(
        "export between saves",
        "--checkpoint.export_hf_interval 4",
        checkpoint__export_hf_interval=6,
        checkpoint__save_interval=4,
    ),
    option(
        "export before a save",
        "--checkpoint.export_hf_interval 4",
        checkpoint__export_hf_interval=3,
        checkpoint__save_interval=4,
    ),
    option("label smoothing", "--dpo.label_smoothing 0", stage_name="dpo", dpo__label_smoothing=0.1, dpo__loss="ipo"),
    *(
        option(f"{key} = {bad} of ppo", f"--{key.replace('__', '.')} {good}", stage_name="ppo", **{key: bad, **more})
        for key, bad, good, more in (
            ("train__on_nonfinite", "skip", "stop", {}),
            ("loss__z_loss", 0.1, "0", {}),
            ("train__global_batch_size", 3, "2", {}),
            ("train__global_batch_size", 10, "8", {"train__micro_batch_size": 2, "rollout__n": 3}),
            ("rollout__max_staleness", 1, "0", {}),
            ("rollout__correction", "none", "tis", {**SEPARATE, "rollout__num_ranks": 1, "rollout__max_staleness": 1}),
            ("rollout__correction_low", 3, r"2\.0", {"rollout__correction_high": 2}),
            ("rollout__n", 1, "2", {"ppo__estimator": "grpo"}),
            ("ppo__critic_tensor_model_parallel_size", 2, "null", {"ppo__estimator": "rloo", "rollout__n": 2}),
            ("ppo__gamma", 0.9, r"1\.0", {"ppo__estimator": "rloo", "rollout__n": 2}),
            ("reward__overlong_buffer", 9, "8", {}),
            ("kl__horizon", 1, "160", {"kl__target": 1}),
            ("ptx__micro_batch_size", 3, "2", {}),
        )
    ),
    option("ranks without a placement", "--rollout.placement separate", stage_name="ppo", rollout__num_ranks=1),
    *(
        option(f"{key} is long", r"--parallel\.timeout_minutes 15", stage_name="ppo", **{f"reward__{key}": 600})
        for key in ("function_timeout_s", "http_total_timeout_s")
    ),
    option("target without a coefficient", r"--kl\.coef 0\.05", stage_name="ppo", kl__target=1, kl__coef=0),
    option(
        "ptx beside the router's losses",
        "--ptx.coef 0",
        stage_name="ppo",
        ptx__coef=1,
        ptx__data="d",
        model__moe_z_loss_coeff=1,
    ),
    *(
        option(f"{key} without best_of", "--best_of 8", stage_name="generate", next="needs a reward source", **{key: 1})
        for key in ("pairs", "min_score")
    ),
    option("n beside best_of", "--n 1", stage_name="generate", best_of=4, n=2, reward__sources="model:r"),
    option(
        "best of conversations",
        "--environment null",
        stage_name="generate",
        best_of=4,
        pairs="p",
        reward__sources="model:r",
        environment="e.py:E",
    ),
]


def _written(text: str) -> Callable[[SimpleNamespace], Command]:
    """A configuration file whose text may have WORLD in it."""

    def make(bench: SimpleNamespace) -> Command:
        path = bench.tmp / "sft.yaml"
        whole = "model: {path: m}\ndata: {train: d}\ntrain: {output_dir: o, global_batch_size: 8}\n"
        path.write_text(whole + text)
        return Command(lambda command: load_config(STAGES["sft"], str(path), command.flags))

    return make


def _without_last_line(bench: SimpleNamespace, command: Command, fix: str) -> None:
    path = bench.tmp / "sft.yaml"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")


def _cli(*argv: str, main: Any = None) -> Callable[[SimpleNamespace], Command]:
    """A command line up to the point where its stage would start."""

    def run(command: Command) -> Any:
        if command.flags[0] not in STAGES:
            raise cli._unknown_stage(command.flags[0])
        file, _, rest = cli._split_args(command.flags[0], command.flags[1:])
        return load_config(STAGES[command.flags[0]], file, rest)

    def make(bench: SimpleNamespace) -> Command:
        (bench.tmp / "good.yaml").write_text(
            "model: {path: m}\ndata: {train: d}\ntrain: {output_dir: o, global_batch_size: 8}\n"
        )
        return Command(run, [part.replace("TMP", str(bench.tmp)) for part in argv])

    return make


def _start_with(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The printed command in place of the wrong one."""
    words = fix.removesuffix(" ...").split()
    assert words[0] == "mrlhf"
    command.flags = [*words[1:], *command.flags[1:]]


def _is_a_script(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """Shows the script's options, and goes on with a stage for the second attempt."""
    words = fix.split()
    assert words[0] == "python" and words[-1] == "--help" and Path(words[1]).is_file()
    assert "--help" in bench.load(words[1]).parser().format_help()
    command.flags = ["sft", "--config", str(bench.tmp / "good.yaml")]


def _instead(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """`--config FILE` or `--key=value` for the last word of the command line."""
    command.flags = [*command.flags[:-1], *fix.split()]


WORDS = [
    Scenario(
        "misspelt choice", stage("sft", files=False, optim__lr_decay_style="cosin"), "--optim.lr_decay_style cosine"
    ),
    Scenario(
        "missing key",
        _cli("sft", "--model.path", "m", "--train.output_dir", "o", "--train.global_batch_size", "8"),
        "--data.train VALUE",
        fill=("d",),
    ),
    Scenario(
        "flag without a value",
        stage("sft", files=False, optim__lr="1", train__seed="--optim.clip_grad"),
        "--(train.seed|optim.clip_grad) VALUE",
        take="--train.seed VALUE --optim.clip_grad VALUE"[:18],
        fill=(3,),
        next="clip_grad has no value",
    ),
    Scenario(
        "key twice in a section", _written("optim:\n  lr: 1\n  lr: 2\n"), "remove one of them", by=_without_last_line
    ),
    Scenario(
        "key twice in two ways", _written("optim:\n  lr: 1\noptim.lr: 2\n"), "remove one of them", by=_without_last_line
    ),
    Scenario("config misspelt", _cli("sft", "--config", "TMP/god.yaml"), "--config .*good.yaml"),
    Scenario("config without its flag", _cli("sft", "TMP/good.yaml"), "--config .*good.yaml", by=_instead),
    Scenario(
        "config without its flag, beside a flag",
        _cli("sft", "--train.seed=3", "TMP/good.yaml"),
        "--config .*good.yaml",
        by=_instead,
    ),
    Scenario(
        "value without its flag",
        _cli("sft", "--config", "TMP/good.yaml", "train.seed=3"),
        "--train.seed=3",
        by=_instead,
    ),
    *(
        Scenario(
            f"mrlhf {name}",
            _cli(
                name,
                "--rollout.n",
                "4",
                "--rollout.batch_size",
                "2",
                "--reward.sources",
                "model:r",
                "--model.path",
                "m",
                "--data.train",
                "d",
                "--train.output_dir",
                "o",
                "--train.global_batch_size",
                "8",
            ),
            f"mrlhf ppo --ppo.estimator {ours} ...",
            by=_start_with,
        )
        for name, ours in (("grpo", "grpo"), ("Dr-GRPO", "dr_grpo"), ("rloo", "rloo"))
    ),
    *(
        Scenario(f"mrlhf {name}", _cli(name), f"python tools/.*{script}.py --help", by=_is_a_script)
        for name, script in (
            ("convert", "hf_to_megatron"),
            ("import", "hf_to_megatron"),
            ("export", "megatron_to_hf"),
            ("preprocess", "preprocess_data"),
            ("verify", "verify"),
            ("inspect", "inspect_checkpoint"),
        )
    ),
]


def _preprocess(bench: SimpleNamespace, task: str, records: Path, prefix: Path, *flags: str) -> None:
    where = ["--input", str(records), "--output-prefix", str(prefix), "--tokenizer", str(bench.world / "qwen2")]
    argv = ["--task", task, *where, "--seq-length", "160", "--workers", "1", *flags]
    assert bench.load("tools/preprocess_data.py").main(argv) == 0


def _remade(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The raw file through tools/preprocess_data.py once more, with what the fix adds."""
    at = command.flags.index("--data.train")
    made = json.loads(Path(command.flags[at + 1] + ".json").read_text())
    flags = fix.removesuffix(" ...").split()[2:]
    raw = {"preference": "pref", "prompts": "prompts", "sft": "sft"}[
        dict(zip(flags, flags[1:])).get("--task", made["task"])
    ]
    _preprocess(bench, made["task"], bench.world / f"{raw}.jsonl", bench.tmp / "again", *flags)
    command.flags[at + 1] = str(bench.tmp / "again")


def _megatron_text(bench: SimpleNamespace) -> str:
    """A set of ours without what Megatron-LM's tool does not write."""
    for ending in (".bin", ".idx"):
        shutil.copy(f"{bench.world / 'text'}{ending}", bench.tmp / f"megatron{ending}")
    return str(bench.tmp / "megatron")


def _long_megatron_text(bench: SimpleNamespace) -> str:
    """One document of more tokens than `short_model` has positions."""
    (bench.tmp / "long.jsonl").write_text(json.dumps({"text": "red green blue " * 40}) + "\n")
    _preprocess(bench, "pretrain", bench.tmp / "long.jsonl", bench.tmp / "long")
    for ending in (".bin", ".idx"):
        shutil.copy(bench.tmp / f"long{ending}", bench.tmp / f"megatron{ending}")
    return str(bench.tmp / "megatron")


SIZES = [
    size("TP of 3", "--parallel.tensor_model_parallel_size 2", ranks=6, **FIXED_BATCH, **{TP: 3}),
    size(
        "TP of 3 on 3 ranks",
        "--parallel.tensor_model_parallel_size 2",
        ranks=3,
        next="cannot be divided",
        **FIXED_BATCH,
        **{TP: 3},
    ),
    size("PP of 3", "--parallel.pipeline_model_parallel_size 2", ranks=6, **FIXED_BATCH, **{PP: 3}),
    size("VPP of 3", "--parallel.virtual_pipeline_model_parallel_size 2", ranks=2, **{PP: 2, VPP: 3}),
    size(
        "VPP of 1 is none",
        "--parallel.pipeline_model_parallel_size 2",
        ranks=2,
        train__global_batch_size=3,
        **{PP: 3, VPP: 1},
    ),
    size("uneven first", "--parallel.num_layers_in_first_pipeline_stage 3", ranks=2, **{PP: 2, FIRST: 4}),
    size("uneven last", "--parallel.num_layers_in_last_pipeline_stage 2", ranks=3, **FIXED_BATCH, **{PP: 3, LAST: 1}),
    size("uneven both", "--parallel.num_layers_in_first_pipeline_stage 2", ranks=2, **{PP: 2, FIRST: 1, LAST: 2}),
    size("CP of 3", "--parallel.context_parallel_size 2", ranks=6, **FIXED_BATCH, **{CP: 3}),
    size("EP without experts", "--parallel.expert_model_parallel_size 1", ranks=2, **{EP: 2}),
    size(
        "EP of 3",
        "--parallel.expert_model_parallel_size 2",
        ranks=6,
        model__path="WORLD/qwen3_moe",
        **FIXED_BATCH,
        **{EP: 3},
    ),
    size("experts under TP", "--parallel.sequence_parallel true", ranks=2, model__path="WORLD/qwen3_moe", **{TP: 2}),
    size("ranks", "torchrun --nproc-per-node 2 -m mrlhf ...", ranks=3, **{TP: 2}),
    size("too few ranks", "torchrun --nproc-per-node 4 -m mrlhf ...", **{TP: 2, PP: 2}),
    size(
        "ranks for experts",
        "torchrun --nproc-per-node 4 -m mrlhf ...",
        ranks=1,
        model__path="WORLD/qwen3_moe",
        parallel__sequence_parallel="true",
        **{TP: 2, EP: 4},
    ),
    size("ranks of a dry run", "WORLD_SIZE=2 for --dry-run", ranks=3, env={"WORLD_SIZE": "3"}, **{TP: 2}),
    size(
        "ranks of two nodes",
        "torchrun --nnodes 2 --nproc-per-node 2 -m mrlhf ...",
        ranks=6,
        env={"LOCAL_WORLD_SIZE": "3"},
        **{TP: 4 // 2, PP: 2},
    ),
    size("global batch", "--train.global_batch_size 6", ranks=2, train__global_batch_size=7),
    size("global batch below the ranks", "--train.global_batch_size 4", ranks=4, train__global_batch_size=1),
    size(
        "global batch of a rollout",
        "--train.global_batch_size 6",
        stage_name="ppo",
        ranks=3,
        rollout__batch_size=10,
        rollout__n=3,
        train__global_batch_size=10,
    ),
    size(
        "no rank trains",
        "torchrun --nproc-per-node 3 -m mrlhf ...",
        stage_name="ppo",
        ranks=1,
        rollout__num_ranks=1,
        **SEPARATE,
        **{TP: 2},
    ),
    size(
        "ranks beside generating ones",
        "torchrun --nproc-per-node 3 -m mrlhf ...",
        stage_name="ppo",
        ranks=4,
        rollout__num_ranks=1,
        **SEPARATE,
        **{TP: 2},
    ),
    size(
        "ranks beside generating ones, fewer",
        "torchrun --nproc-per-node 5 -m mrlhf ...",
        stage_name="ppo",
        ranks=4,
        rollout__num_ranks=1,
        **SEPARATE,
        **{TP: 2, PP: 2},
    ),
    size(
        "critic's TP",
        "--ppo.critic_tensor_model_parallel_size 2",
        stage_name="ppo",
        ranks=2,
        ppo__critic_tensor_model_parallel_size=4,
    ),
    size(
        "critic's CP is the actor's",
        "--parallel.context_parallel_size 2",
        stage_name="ppo",
        ranks=12,
        rollout__batch_size=12,
        **FIXED_BATCH,
        ppo__critic_pipeline_model_parallel_size=2,
        **{CP: 3},
    ),
    size(
        "vLLM's TP does not divide the ranks",
        "--rollout.tensor_parallel_size 1",
        stage_name="ppo",
        rollout__tensor_parallel_size=2,
    ),
    size(
        "vLLM's TP does not divide the heads",
        "--rollout.tensor_parallel_size 1",
        stage_name="ppo",
        ranks=3,
        rollout__batch_size=12,
        **FIXED_BATCH,
        rollout__tensor_parallel_size=3,
    ),
    size("TP of generate", "--tensor_parallel_size 2", stage_name="generate", ranks=4, tensor_parallel_size=4),
    size("fp8 weights", "--model.dtype bfloat16", stage_name="ppo", rollout__weights="fp8"),
    size(
        "fp8 weights of experts",
        "--rollout.weights plain",
        stage_name="ppo",
        model__path="WORLD/qwen3_moe",
        model__dtype="bfloat16",
        rollout__weights="fp8",
        reward__sources=lambda bench: f"model:{bench.value}",
    ),
    size(
        "packed weights of other ranks",
        "--rollout.weights plain",
        stage_name="ppo",
        ranks=2,
        rollout__num_ranks=1,
        rollout__weights="packed",
        **SEPARATE,
    ),
    size("balance of no experts", "--model.moe_aux_loss_coeff 0", model__moe_aux_loss_coeff=0.1),
    size("tokens of a micro batch", r"--train\.max_tokens_per_micro_batch \d+", train__max_tokens_per_micro_batch=9),
    size("long answers", r"--rollout\.max_new_tokens \d+", stage_name="ppo", rollout__max_new_tokens=250),
    size("length of the data", "--data.seq_length 160", data__seq_length=80),
    size("Megatron's text", "--data.seq_length 256", stage_name="pretrain", data__train=_megatron_text),
    size(
        "Megatron's text is long",
        "--data.seq_length 64",
        stage_name="pretrain",
        data__train=_long_megatron_text,
        data__seq_length=100,
        model__path=lambda bench: bench.short_model,
    ),
    Scenario(
        "data of another task",
        stage("dpo", data__train="WORLD/sft"),
        "python tools/preprocess_data.py --task preference ...",
        by=_remade,
    ),
    Scenario(
        "data of another tokenizer",
        stage("sft", data__train=lambda bench: bench.other_data),
        "python tools/preprocess_data.py --tokenizer .*qwen2 ...",
        by=_remade,
    ),
    Scenario(
        "data longer than the model",
        stage("sft", model__path=lambda bench: bench.short_model),
        "python tools/preprocess_data.py --seq-length 64 ...",
        by=_remade,
    ),
    Scenario(
        "prompts as long as the model",
        stage("ppo", model__path=lambda bench: bench.short_model),
        "python tools/preprocess_data.py --seq-length 56 ...",
        by=_remade,
    ),
    Scenario(
        "answers as long as the model",
        stage("ppo", model__path=lambda bench: bench.short_model, rollout__max_new_tokens=64),
        "--rollout.max_new_tokens 32",
        next="python tools/preprocess_data.py --seq-length 32 ...",
    ),
    Scenario("left padding of score", stage("score", padding_side="left", checkpoint="VALUE"), "--packing false"),
    Scenario("token of serve-reward", stage("serve-reward", token_env="T"), r"export T=\.\.\."),
    Scenario(
        "open server",
        stage("serve-reward", host="0.0.0.0"),
        r"export REWARD_TOKEN=\.\.\.; --token_env REWARD_TOKEN",
        by=lambda bench, command, fix: (
            command.env.update(REWARD_TOKEN="t"),
            command.set("--token_env", "REWARD_TOKEN"),
        ),
    ),
]


def _remade_template(bench: SimpleNamespace, command: Command, fix: str) -> None:
    command.set("--checkpoint", str(bench.world / "qwen2"))


def _reads_line_breaks(bench: SimpleNamespace, rows: Any) -> None:
    from mrlhf.data.tokenizers.hf import load_tokenizer

    assert "\nAssistant: " in load_tokenizer(bench.world / "qwen2").decode(rows[0].ids)


def _single_prompts(bench: SimpleNamespace) -> Path:
    path = bench.tmp / "one.jsonl"
    path.write_text('{"input": "red"}\n')
    return path


def _renamed(bench: SimpleNamespace, command: Command, fix: str) -> None:
    path = bench.tmp / "rows.jsonl"
    path.write_text(path.read_text().replace('"question"', '"prompt"'))


def _questions(bench: SimpleNamespace) -> Path:
    path = bench.tmp / "rows.jsonl"
    path.write_text('{"question": "red"}\n' * 30)
    return path


def _counts_rows(bench: SimpleNamespace, rows: Any) -> None:
    assert len(rows) == 30


GENERATE = [
    Scenario(
        "generate without a template",
        stage("generate", checkpoint=lambda bench: bench.no_template, prompts=_single_prompts),
        r'--input_template "User: \{\}\\nAssistant: "',
        right=_reads_line_breaks,
    ),
    Scenario(
        "rows of generate",
        stage("generate", prompts=_questions),
        "rename the column of the prompts to prompt",
        by=_renamed,
        right=_counts_rows,
    ),
    Scenario("made data for generate", stage("generate", prompts="WORLD/prompts"), "--prompts .*prompts.jsonl"),
    Scenario(
        "no prompts for generate",
        stage("generate", prompts="./none.jsonl"),
        "check the path given to --prompts",
        by=lambda bench, command, fix: command.set("--prompts", str(bench.world / "prompts.jsonl")),
    ),
]

SCHEDULES = [
    Scenario(
        f"{warmup} steps of warm-up and {decay} of decay, of {steps}",
        stage(
            name,
            optim__lr_decay_style="WSD",
            optim__lr_warmup_steps=warmup,
            optim__lr_wsd_decay_steps=decay,
            train__max_steps=steps,
        ),
        f"--optim.lr_warmup_steps {shorter} --optim.lr_wsd_decay_steps {steps - shorter}",
    )
    for name, warmup, decay, steps, shorter in (
        ("sft", 0, 9, 3, 0),
        ("dpo", 3, 1, 3, 2),
        ("rm", 1, 1, 1, 0),
        ("ppo", 50, 50, 1, 0),
        ("pretrain", 900, 100, 2, 1),
    )
]

SCENARIOS = [*CONTRADICTIONS, *WORDS, *SIZES, *GENERATE, *SCHEDULES]
