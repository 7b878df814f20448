"""The one command: `mrlhf STAGE --config FILE [--dry-run] [--section.key VALUE ...]`, alone or under torchrun.

Nothing here imports torch before the configuration is known to be good, so `--help` and errors come at once.
"""

from __future__ import annotations

import difflib
import importlib
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mrlhf import __version__
from mrlhf.config.load import load_config
from mrlhf.config.options import STAGES
from mrlhf.config.process import USER_ERROR, prepare_environment
from mrlhf.config.schema import help_text
from mrlhf.errors import ConfigError, MrlhfError, SeveralErrors

PATIENCE_S = 15.0

SUMMARIES = {
    "pretrain": "next-token training from random weights or a checkpoint",
    "sft": "supervised fine-tuning on conversations",
    "rm": "reward model from preference pairs",
    "dpo": "direct preference optimisation",
    "ppo": "PPO, REINFORCE, RLOO, GRPO with vLLM rollouts",
    "score": "log-probs or scores of a data set under a checkpoint",
    "generate": "answers to prompts through vLLM",
    "serve-reward": "a reward model behind HTTP, for runs on other machines",
    "data": "what a data set holds, its samples with the trained part marked, and whether it is whole",
    "report": "curves and samples of finished runs as one HTML file",
}

MODULES = {  # where a stage is not mrlhf.STAGE
    "ppo": "mrlhf.rl.ppo",
    "score": "mrlhf.commands.score",
    "generate": "mrlhf.commands.generate",
    "serve-reward": "mrlhf.commands.serve_reward",
}

USAGE = (
    "usage: mrlhf STAGE --config FILE [--dry-run] [--section.key VALUE ...]\n"
    "       torchrun --nproc-per-node N -m mrlhf STAGE --config FILE ...\n"
    "       mrlhf data PREFIX [--samples N] [--check] [--tokenizer DIR]\n"
    "       mrlhf report RUN_DIR [RUN_DIR ...] [--output report.html]\n\n"
    + "".join(f"  {name:<12} {text}\n" for name, text in SUMMARIES.items())
    + "\n  mrlhf STAGE --help   every option of a stage\n  mrlhf --version\n"
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns the exit status. An `MrlhfError` is printed once and gives 2."""
    prepare_environment()
    return _guarded(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _guarded(call: Callable[[], int]) -> int:
    try:
        return call()
    except MrlhfError as e:
        _show_error(e)
        if _distributed():
            # Leaving through destructors would wait for ranks that are still inside a collective.
            sys.stdout.flush()
            os._exit(USER_ERROR)
        return USER_ERROR


def _run(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        _print_once(USAGE)
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        _print_once(f"mrlhf {__version__}\n")
        return 0
    name, args = argv[0], argv[1:]
    if name == "report":
        return _report(args)
    if name == "data":
        from mrlhf.data.show import main as inspect_data

        return inspect_data(args)
    if name not in STAGES:
        near = difflib.get_close_matches(name, SUMMARIES, n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"unknown stage '{name}'{hint}", where="command line", expected=", ".join(SUMMARIES))
    if "--help" in args or "-h" in args:
        _print_once(help_text(name))
        return 0
    config_file, dry, overrides = _split_args(name, args)
    config = load_config(STAGES[name], config_file, overrides)
    if dry:
        return _status(importlib.import_module("mrlhf.commands.dry_run").main(name, config))

    def stage() -> int:
        return _guarded(lambda: _status(importlib.import_module(MODULES.get(name, f"mrlhf.{name}")).main(config)))

    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        stage = record(stage)
    return stage()


def _split_args(stage: str, args: list[str]) -> tuple[str | None, bool, list[str]]:
    """The config file, whether it is a dry run, and what is left for `load_config`."""
    config_file, dry, overrides = None, False, []
    rest = iter(args)
    for arg in rest:
        if arg == "--config":
            config_file = next(rest, None)
            if config_file is None or config_file.startswith("--"):
                raise ConfigError("--config has no value", where="command line", expected="a YAML file")
        elif arg.startswith("--config="):
            config_file = arg.partition("=")[2]
        elif arg in ("--dry-run", "--dry_run"):
            dry = True
        else:
            overrides.append(arg)
    flags = [a for a in overrides if a.startswith("--")]
    if config_file is None and not flags:
        yaml = next((a for a in overrides if a.endswith((".yaml", ".yml"))), None)
        raise ConfigError(
            f"mrlhf {stage} needs its options",
            where="command line",
            expected=f"--config FILE, or --key VALUE (mrlhf {stage} --help)",
            fix=f"--config {yaml}" if yaml else None,
        )
    return config_file, dry, overrides


def _report(args: list[str]) -> int:
    if "--help" in args or "-h" in args:
        _print_once("usage: mrlhf report RUN_DIR [RUN_DIR ...] [--output report.html]\n")
        return 0
    dirs, output = [], None
    rest = iter(args)
    for arg in rest:
        if arg == "--output" or arg.startswith("--output="):
            output = arg.partition("=")[2] or next(rest, None)
            if not output:
                raise ConfigError("--output has no value", where="command line", expected="the HTML file to write")
        elif arg.startswith("-"):
            raise ConfigError(f"unknown key '{arg}'", where="command line", expected="RUN_DIR [RUN_DIR ...] --output FILE")
        else:
            dirs.append(Path(arg))
    if not dirs:
        raise ConfigError("no run directory", where="command line", expected="mrlhf report RUN_DIR [RUN_DIR ...] --output report.html")
    names = [d.resolve().name for d in dirs]
    runs = {n if names.count(n) == 1 else str(d): d for n, d in zip(names, dirs, strict=True)}
    target = Path(output) if output else dirs[0] / "report.html" if len(dirs) == 1 else Path("report.html")
    if _rank() == 0:
        from mrlhf.observe.report import build_report

        print(build_report(runs, target, extra=None))
    return 0


def _show_error(error: MrlhfError) -> None:
    """Rank 0 at once and framed. Other ranks only if they outlive rank 0's exit, which means it did not see the problem."""
    if isinstance(error, SeveralErrors):
        text = f"{len(error.errors)} problems:\n{error}"
    else:
        text = f"{type(error).__name__}: {error}"
    rank = _rank()
    if rank:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a handler of the stage would let the sleep go on
        time.sleep(PATIENCE_S)
        text = "\n".join(f"[rank {rank}] {line}" for line in text.splitlines())
    bar = "=" * 100
    sys.stdout.flush()
    sys.stderr.write(f"{bar}\n{text}\n{bar}\n")
    sys.stderr.flush()


def _distributed() -> bool:
    dist = sys.modules.get("torch.distributed")
    return dist is not None and dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return int(os.environ.get("RANK", 0))


def _print_once(text: str) -> None:
    if _rank() == 0:
        sys.stdout.write(text)


def _status(result: Any) -> int:
    return result if isinstance(result, int) else 0
