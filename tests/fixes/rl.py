"""Fixes that speak of rewards, of vLLM, of a run that goes on, and of what the maths is given."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mrlhf.data.prepare import job as preprocessing
from mrlhf.data.prepare import render, sources, workers
from mrlhf.rl.rewards.kinds import load_function, parse_source

from .harness import Command, Scenario, call, state
from .options import stage
from .rows import CHAT, GOOD, A, U, gives, prepare, setting
from .templates import LOOP, TURN

REWARDS = """
import time
def length(prompts, completions, **columns): return [0.0] * len(completions)
def narrow(prompts, completions): return [0.0] * len(completions)
def slow(prompts, completions, **columns): time.sleep(1.0); return [0.0] * len(completions)
"""


def reward(name: str, fix: str, function: str, *, by: Any = None, next: str | None = None, **changes: Any) -> Scenario:
    """A reward function: loaded in its process, and called once with `--`-flags of the reward section."""

    def make(bench: SimpleNamespace) -> Command:
        from mrlhf.rl.rewards.process import RewardProcess

        (bench.tmp / "r.py").write_text(REWARDS)
        flags = {
            "reward.sources": f"{bench.tmp}/r.py:{function}",
            "reward.function_timeout_s": "20",
            "reward.function_memory_mib": "0",
            **changes,
        }

        def run(command: Command) -> Any:
            given = dict(zip(command.flags[::2], command.flags[1::2], strict=True))
            env = [given["--reward.function_env"]] if "--reward.function_env" in given else []
            with RewardProcess(
                parse_source(given["--reward.sources"]),
                env=env,
                timeout_s=float(given["--reward.function_timeout_s"]),
                memory_mib=int(given["--reward.function_memory_mib"]),
            ) as process:
                return process.score(["p"], ["c"], labels=[None], prompt_ids=[[1]], completion_ids=[[1]])

        return Command(run, [str(part) for key, value in flags.items() for part in (f"--{key}", value)])

    return Scenario(name, make, fix, by=by, next=next)


def _with_columns(bench: SimpleNamespace, command: Command, fix: str) -> None:
    path = bench.tmp / "r.py"
    path.write_text(path.read_text().replace("narrow(prompts, completions)", "narrow(prompts, completions, **columns)"))


def _in_process(bench: SimpleNamespace) -> Command:
    """The function loaded here, as the child does it."""
    (bench.tmp / "r.py").write_text(REWARDS)
    return Command(
        lambda command: load_function(parse_source(command.flags[1])),
        ["--reward.sources", f"{bench.tmp}/r.py:{bench.function}"],
    )


def loaded(name: str, function: str, fix: str, by: Any = None) -> Scenario:
    def make(bench: SimpleNamespace) -> Command:
        bench.function = function
        return _in_process(bench)

    return Scenario(name, make, fix, by=by)


REWARD = [
    loaded("misspelt function", "lenght", "--reward.sources .*r.py:length"),
    loaded("function without columns", "narrow", r"add \*\*columns to its parameters", by=_with_columns),
    reward(
        "variable for a function", r"export MRLHF_TEST_V=\.\.\.", "length", **{"reward.function_env": "MRLHF_TEST_V"}
    ),
    Scenario(
        "token of a server",
        call(lambda bench: __import__("mrlhf.rl.rewards.http", fromlist=["_"])._read_token("MRLHF_TEST_T")),
        r"export MRLHF_TEST_T=\.\.\.",
    ),
    state(
        parse_source,
        "http://a/score?api_key=1",
        "--reward.http_token_env NAME: a bearer token, from the environment",
        "http://a/score",
        "key in a URL",
    ),
]


# ---------------------------------------------------------------- vLLM


def _vllm(**changes: Any) -> Callable[[int], None]:
    from mrlhf.models.families.spec import Layer, ModelSpec
    from mrlhf.rl.rollout.vllm_checks import check_vllm_model

    spec = ModelSpec("olmo2", 2, 128, 192, 4, 4, 32, 512, 64, 1e-6, tied=False, layers=(Layer(),) * 2)
    spec = dataclasses.replace(spec, **changes)

    def check(tp: int) -> None:
        for error in check_vllm_model(spec, tp=tp, world=4, key="rollout.tensor_parallel_size"):
            raise error

    return check


def _experts() -> Any:
    from mrlhf.models.families.spec import Experts

    return Experts(4, 2, 64, shared_ffn_hidden_size=66)


def _memory(bench: SimpleNamespace) -> Command:
    import torch.distributed as dist

    from mrlhf.models.families.spec import Layer, ModelSpec
    from mrlhf.rl.rollout import vllm_engine

    spec = ModelSpec("qwen2", 2, 1024, 2048, 8, 8, 128, 512, 64, 1e-6, tied=True, layers=(Layer(),) * 2)

    def run(command: Command) -> None:
        store = dist.FileStore(str(bench.tmp / f"store{len(list(bench.tmp.iterdir()))}"), 1)
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(vllm_engine, "_free_bytes", lambda: 200 << 20)
                vllm_engine.check_vllm_memory(
                    spec,
                    dtype="float32",
                    tp=1,
                    kv_cache_mib=int(command.flags[1]),
                    key=command.flags[0].removeprefix("--"),
                )
        finally:
            dist.destroy_process_group()

    return Command(run, [bench.key, "200"])


def memory(key: str) -> Scenario:
    def make(bench: SimpleNamespace) -> Command:
        bench.key = f"--{key}"
        return _memory(bench)

    return Scenario(f"memory for {key}", make, rf"--{key} \d+")


def _saved(error: bool) -> None:
    """In a world of one rank."""
    import torch.distributed as dist

    from mrlhf.checkpoint.save import on_main

    def fail() -> None:
        if error:
            raise OSError("No space left on device")

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        on_main(fail, Path("step_1"))
    finally:
        dist.destroy_process_group()


def _resumed(run_dir: Path) -> None:
    import torch.distributed as dist

    from mrlhf.checkpoint.source import to_resume

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert to_resume(run_dir, total_steps=2) is None
    finally:
        dist.destroy_process_group()


def _damaged_run(bench: SimpleNamespace) -> None:
    folder = bench.tmp / "run/checkpoints/step_1"
    folder.mkdir(parents=True)
    (folder / "mrlhf.json").write_text("x")
    bench.now = bench.tmp / "run"


def _weights_alone(bench: SimpleNamespace) -> None:
    from mrlhf.checkpoint.manifest import write_manifest

    bench.now = bench.tmp / "run"
    folder = bench.now / "checkpoints/step_1"
    folder.mkdir(parents=True)
    shutil.copytree(bench.world / "qwen2", folder / "hf", ignore=shutil.ignore_patterns("*.safetensors"))
    content = {"stage": "sft", "step": 1, "head": "lm", "dtype": "float32", "resumable": False}
    write_manifest(folder, content)


def _opens(bench: SimpleNamespace) -> None:
    """As --model.path."""
    from mrlhf.checkpoint.source import open_source

    assert open_source(str(bench.tmp / "run/checkpoints/step_1")).is_checkpoint


def _environment(meta: dict[str, Any]) -> None:
    from hashlib import sha256

    from mrlhf.rl.rollout.environments import check_environment

    tokenizer = SimpleNamespace(chat_template="t", get_chat_template=lambda: "t")
    own = sha256(b"t").hexdigest()
    for error in check_environment(
        "examples/calculator/calculator.py:Calculator",
        tokenizer,
        {name: own if value == "own" else value for name, value in meta.items()},
    ):
        raise error


ROLLOUT = [
    state(_vllm(qk_norm="all"), 2, "--rollout.tensor_parallel_size 1", 1, "vLLM's norm over all heads"),
    state(_vllm(num_query_groups=1, ffn_hidden_size=99), 4, "--rollout.tensor_parallel_size 1", 1, "vLLM's MLP"),
    state(_vllm(experts=_experts()), 4, "--rollout.tensor_parallel_size 2", 2, "vLLM's shared experts"),
    memory("rollout.kv_cache_mib"),
    memory("kv_cache_mib"),
    state(
        _environment,
        {"chat_template_sha256": "x"},
        "save the template in the tokenizer's directory",
        {"chat_template_sha256": "own"},
        "observations of another template",
    ),
]


# ---------------------------------------------------------------- going on


class Rows:
    num_samples, prefix, task, num_packs = 30, "data/x", "prompts", 30

    def __init__(self, identity: str = "x" * 64) -> None:
        self.identity = identity


def _restore(
    bench: SimpleNamespace, *, manifest: dict[str, Any], identity: str = "x" * 64, step: int = 3
) -> Callable[[Command], None]:
    from mrlhf.config.load import load_config
    from mrlhf.config.options import SFTStage
    from mrlhf.training.batches import make_order, restore_position

    def run(command: Command) -> None:
        values = dict(zip(command.flags[::2], command.flags[1::2], strict=True))
        allowed = values.get("--train.allow-changes", "").strip("[]").split(",")
        base = [
            "--model.path",
            "m",
            "--data.train",
            "x",
            "--train.output_dir",
            "o",
            "--train.global_batch_size",
            "4",
            "--data.packing",
            "false",
        ]
        data = Rows(identity if command.env.get("DATA") != "back" else "x" * 64)
        order = make_order(load_config(SFTStage, None, base), data)
        source = {"prefix": "data/x", "identity": "x" * 64, "rows": 30, "consumed": 12}
        if command.env.get("CHECKPOINT") != "earlier":
            source |= manifest.get("source", {})
        hf_dir = None if "tokenizer" not in manifest else bench.world / "qwen2"
        whole = {"step": step, "data": [source], "tokenizer": manifest.get("tokenizer")}
        restore_position(order, data, whole, where="c", hf_dir=hf_dir, allowed=[a for a in allowed if a])

    return run


def going_on(
    name: str, fix: str, *, take: str | None = None, env: dict[str, str] | None = None, **more: Any
) -> Scenario:
    by = None if env is None else (lambda bench, command, fix: command.env.update(env))
    return Scenario(name, lambda bench: Command(_restore(bench, **{"manifest": {}, **more})), fix, take=take, by=by)


def _first_command(bench: SimpleNamespace) -> Command:
    """A run of lr 1e-5 in the directory, and the command with another lr."""
    from mrlhf.config.dump import dump_yaml
    from mrlhf.config.load import load_config
    from mrlhf.config.options import SFTStage
    from mrlhf.training.resume import check_resume

    run_dir = bench.tmp / "run"
    run_dir.mkdir()
    base = [
        "--model.path",
        "m",
        "--data.train",
        "x",
        "--train.output_dir",
        str(run_dir),
        "--train.global_batch_size",
        "4",
    ]
    (run_dir / "config.yaml").write_text(dump_yaml(load_config(SFTStage, None, base)))

    def run(command: Command) -> None:
        config = load_config(SFTStage, None, command.flags)
        check_resume(config, Path(config.train.output_dir))

    return Command(run, [*base, "--optim.lr", "2e-5"])


OTHER = "the first command again, or another --train.output_dir"
RESUME = [
    *(
        going_on(
            f"data that changed, {name}",
            "bring that data back, or --train.allow_changes '.data.', or start anew: .*",
            identity="y" * 64,
            **more,
        )
        for name, more in (
            ("brought back", {"env": {"DATA": "back"}}),
            ("allowed", {"take": "--train.allow_changes '[data]'"}),
        )
    ),
    going_on(
        "tokenizer that changed",
        "bring that tokenizer back, or --train.allow_changes '.tokenizer.'",
        take="--train.allow_changes '[tokenizer]'",
        manifest={"tokenizer": "x"},
    ),
    going_on(
        "position that is wrong",
        "move .* away; the same command then goes on from the checkpoint before it",
        manifest={"source": {"consumed": 11}},
        env={"CHECKPOINT": "earlier"},
    ),
    Scenario("another configuration", _first_command, OTHER, by=setting("--optim.lr", "1e-5")),
    Scenario(
        "another configuration, elsewhere",
        _first_command,
        OTHER,
        by=lambda bench, command, fix: command.set("--train.output_dir", str(bench.tmp / "new")),
    ),
    Scenario(
        "save that fails",
        call(lambda bench: _saved(bench.now), lambda bench: setattr(bench, "now", True)),
        "make room or mend the permissions; the same command then goes on from the newest checkpoint",
        by=lambda bench, command, fix: setattr(bench, "now", False),
    ),
    Scenario(
        "no whole checkpoint",
        call(lambda bench: _resumed(bench.now), _damaged_run),
        "bring one back, or start anew with another --train.output_dir",
        by=lambda bench, command, fix: setattr(bench, "now", bench.tmp / "new"),
    ),
    Scenario(
        "checkpoint of weights alone",
        call(lambda bench: _resumed(bench.now), _weights_alone),
        "start from it: --model.path with another --train.output_dir",
        by=lambda bench, command, fix: setattr(bench, "now", bench.tmp / "new"),
        right=lambda bench, result: _opens(bench),
    ),
]


# ---------------------------------------------------------------- what the maths is given


def _estimated(given: tuple[str, int]) -> None:
    from mrlhf.rl.advantages import group_scores

    group_scores(torch.zeros(4), estimator=given[0], group_size=given[1])


def _adapted(horizon: int) -> None:
    from mrlhf.rl.kl import AdaptiveKL

    AdaptiveKL(0.1, target=1.0, horizon=horizon).update(1.0, 8)


def _loaded(kind: str) -> Callable[[Any], None]:
    def load(state: Any) -> None:
        from mrlhf.rl.kl import AdaptiveKL
        from mrlhf.rl.shaping import RunningStd

        made = AdaptiveKL(0.1, target=1.0, horizon=100) if kind == "kl" else RunningStd()
        if state is not None:  # None: the run has no such state
            made.load_state_dict(state)

    return load


def _corrected(logps: Any) -> None:
    from mrlhf.rl.policy_loss import _correction_weight

    _correction_weight(torch.zeros(1, 2), logps, torch.ones(1, 2, dtype=torch.bool), ("tis", 0.0, 2.0))


def _device(name: str) -> None:
    from mrlhf.parallel import device

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MRLHF_DEVICE", name)
        patch.setattr(torch.cuda, "is_available", lambda: False)
        device.current.__wrapped__()


def _megatron(version: str | None) -> None:
    import importlib.metadata as metadata

    from mrlhf.parallel import megatron

    def installed(name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(megatron.importlib.metadata, "version", installed)
        megatron.check_version()


MATHS = [
    state(
        _estimated,
        ("grpo", 1),
        "sample more answers per prompt, or use estimator 'reinforce'",
        ("grpo", 2),
        "groups of 1",
    ),
    state(
        _estimated,
        ("rloo", 1),
        "sample more answers per prompt, or use estimator 'reinforce'",
        ("reinforce", 1),
        "groups of 1, reinforce",
    ),
    state(_adapted, 1, "set the horizon to 160", 160, "short horizon"),
    state(_loaded("kl"), {}, "resume with the fixed coefficient it was trained with", None, "no adaptive coefficient"),
    state(_loaded("std"), {}, "resume with the reward.scaling it was trained with", None, "no running statistics"),
    state(_corrected, None, "record them, or switch the correction off", torch.zeros(1, 2), "nothing to correct with"),
    state(_device, "cuda", "that, or MRLHF_DEVICE=cpu to insist on the CPU", "cpu", "no GPU"),
    *(
        state(_megatron, version, "pip install megatron-core==0.16.1", "0.16.1", f"megatron-core {version}")
        for version in (None, "0.1")
    ),
]


# ---------------------------------------------------------------- preprocessing, with something broken inside


def _patched(
    make: Callable[[SimpleNamespace], Command],
    patch: Callable[[pytest.MonkeyPatch, SimpleNamespace], None],
    always: bool = False,
) -> Callable[[SimpleNamespace], Command]:
    """The command with a change of the package, the first time or always."""

    def made(bench: SimpleNamespace) -> Command:
        command, runs = make(bench), []
        whole = command.run

        def run(command: Command) -> Any:
            with pytest.MonkeyPatch.context() as monkey:
                if always or not runs:
                    patch(monkey, bench)
                runs.append(1)
                return whole(command)

        command.run = run
        return command

    return made


def _worker_dies(patch: pytest.MonkeyPatch, bench: SimpleNamespace) -> None:
    """As concurrent.futures says it; forking this process with all its threads could hang."""

    class Pool:
        def __init__(self, *_: Any, **__: Any) -> None: ...
        def shutdown(self, **_: Any) -> None: ...

        def submit(self, *_: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_exception(BrokenProcessPool("died"))
            return future

    patch.setattr(workers, "ProcessPoolExecutor", Pool)


def _shard_is_cut(patch: pytest.MonkeyPatch, bench: SimpleNamespace) -> None:
    plain = preprocessing._assemble

    def assemble(*args: Any) -> Any:
        (bench.tmp / ".out.work/00000000.npz").write_bytes(b"x")
        return plain(*args)

    patch.setattr(preprocessing, "_assemble", assemble)


def _delete_it(bench: SimpleNamespace, command: Command, fix: str) -> None:
    (bench.tmp / ".out.work/00000000.npz").unlink()
    command.set("--resume")


def _two_rows(bench: SimpleNamespace, command: Command, fix: str) -> None:
    (bench.tmp / "rows.jsonl").write_text((json.dumps(GOOD) + "\n") * 2)


LONG = json.dumps({"messages": [{**U, "content": "red " * 50_000}, A]})
BROKEN = [
    Scenario(
        "worker that dies",
        _patched(prepare("sft", (json.dumps(GOOD) + "\n") * 1500, workers=2, no_pack=""), _worker_dies),
        "--workers 1 --resume",
    ),
    Scenario(
        "shard that is damaged",
        _patched(prepare("sft", [GOOD]), _shard_is_cut),
        "delete it, then the same command with --resume",
        by=_delete_it,
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "endless line",
        _patched(prepare("sft", LONG), lambda patch, bench: patch.setattr(sources, "MAX_LINE", 1000), always=True),
        "one JSON object a line",
        by=_two_rows,
        right=gives(CHAT("blue"), CHAT("blue")),
    ),
    Scenario(
        "template without an end",
        _patched(
            prepare("sft", [GOOD], chat_template=lambda bench: _endless(bench)),
            lambda patch, bench: patch.setattr(render, "LIMIT_S", 0.2),
        ),
        "--chat-template FILE",
        take="--chat-template FILE",
        fill=("chatml",),
        right=gives(CHAT("blue")),
    ),
    Scenario(
        "sources made in two ways",
        lambda bench: stage("sft", data__train=f"[WORLD/sft, {_shorter(bench)}]")(bench),
        "one --seq-length for all of them",
        by=lambda bench, command, fix: command.set("--data.train", f"[{bench.world}/sft, {bench.world}/sft_few]"),
    ),
]


def _shorter(bench: SimpleNamespace) -> str:
    argv = [
        "--task",
        "sft",
        "--input",
        f"{bench.world}/sft.jsonl",
        "--tokenizer",
        f"{bench.world}/qwen2",
        "--output-prefix",
        f"{bench.tmp}/short",
        "--seq-length",
        "100",
        "--workers",
        "1",
    ]
    assert bench.load("tools/preprocess_data.py").main(argv) == 0
    return f"{bench.tmp}/short"


def _endless(bench: SimpleNamespace) -> Path:
    """Endless for the rows, and quick for the probe."""
    path = bench.tmp / "endless.jinja"
    loops = "{% for i in range(9999) %}" * 3 + "{% endfor %}" * 3
    path.write_text("{% if messages[0]['content'] != 'a0b1' %}" + loops + "{% endif %}" + LOOP.replace("BODY", TURN))
    return path


def _of_another_stage(bench: SimpleNamespace) -> Command:
    """A dpo run in the directory of an sft run."""
    from mrlhf.config.load import load_config
    from mrlhf.config.options import DPOStage
    from mrlhf.training.resume import check_resume

    base = _first_command(bench).flags
    (bench.tmp / "run" / "env.json").write_text('{"stage": "sft"}')

    def run(command: Command) -> None:
        config = load_config(DPOStage, None, command.flags)
        check_resume(config, Path(config.train.output_dir))

    return Command(run, base)


def _logged(asked: dict[str, str]) -> None:
    from mrlhf.observe.tracker import logger_problems

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "wandb", None)
        for problem in logger_problems(asked):
            raise problem


def _prepared(bench: SimpleNamespace, command: Command, fix: str) -> None:
    """The printed command, with the rest that `...` stands for, and its output in place of the raw file."""
    words = shlex.split(fix.partition(" ..., then NEW here")[0].replace("NEW", f"{bench.tmp}/new"))
    assert words[:2] == ["python", "tools/preprocess_data.py"]
    rest = ["--task", "sft", "--tokenizer", f"{bench.world}/qwen2", "--seq-length", "160", "--workers", "1"]
    assert bench.load(words[1]).main([*words[2:], *rest]) == 0
    command.set("--data.train", f"{bench.tmp}/new")


LATER = [
    Scenario(
        "another stage",
        _of_another_stage,
        "another --train.output_dir",
        by=lambda bench, command, fix: command.set("--train.output_dir", str(bench.tmp / "new")),
    ),
    state(_logged, {"wandb": "p"}, r"pip install 'mrlhf\[wandb\]', or --logging.wandb_project null", {}, "no wandb"),
    Scenario(
        "raw records as data",
        stage("sft", data__train="WORLD/sft.jsonl"),
        "python tools/preprocess_data.py --input .*/sft.jsonl --output-prefix NEW ..., then NEW here",
        by=_prepared,
    ),
]

SCENARIOS = [*REWARD, *ROLLOUT, *RESUME, *MATHS, *BROKEN, *LATER]
