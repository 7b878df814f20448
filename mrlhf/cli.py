"""The command line, `mrlhf STAGE --config FILE [--dry-run] [--section.key VALUE ...]`, alone or under torchrun.

This module only dispatches. A stage (and torch) is imported after the configuration is checked, so `--help` is fast.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from pathlib import Path
from typing import Any

from mrlhf import __version__
from mrlhf.commands.tool import leave_at_interrupt, show_user_errors, until_closed
from mrlhf.config.load import load_config
from mrlhf.config.names import COMMANDS
from mrlhf.config.options import ESTIMATORS, STAGES, TrainingConfig
from mrlhf.config.process import USER_ERROR, prepare_environment, torchrun_rank
from mrlhf.config.schema import help_text
from mrlhf.errors import ConfigError

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
    "doctor": "versions, the device of a run here, and what would stop one",
    "report": "curves and samples of finished runs as one HTML file",
}

MODULES = {  # for stages that are not in mrlhf.STAGE
    "ppo": "mrlhf.rl.ppo",
    "score": "mrlhf.commands.score",
    "generate": "mrlhf.commands.generate",
    "serve-reward": "mrlhf.commands.serve_reward",
}

USAGE = (
    "usage: mrlhf STAGE --config FILE [--dry-run] [--section.key VALUE ...]\n"
    "       torchrun --nproc-per-node N -m mrlhf STAGE --config FILE ...\n"
    "       mrlhf data PREFIX [--samples N] [--check] [--tokenizer DIR]\n"
    "       mrlhf doctor\n"
    "       mrlhf report RUN_DIR [RUN_DIR ...] [--output report.html]\n\n"
    + "".join(f"  {name:<12} {text}\n" for name, text in SUMMARIES.items())
    + "\n  mrlhf STAGE --help   every option of a stage\n  mrlhf --version\n"
)


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns the exit status: 2 for an `MrlhfError`, which is printed once."""
    leave_at_interrupt()
    prepare_environment()
    return show_user_errors(lambda: _dispatch(list(sys.argv[1:] if argv is None else argv)))


def _dispatch(argv: list[str]) -> int:
    if not argv or argv[0] in ("--help", "-h", "help"):
        _print_once(USAGE)
        return 0 if argv else USER_ERROR
    if argv[0] == "--version":
        _print_once(f"mrlhf {__version__}\n")
        return 0
    name, args = argv[0], argv[1:]
    if name == "report":
        from mrlhf.commands.report import main as write_report

        return until_closed(lambda: write_report(args))
    if name == "data":
        from mrlhf.commands.data import main as show_data

        return until_closed(lambda: show_data(args))
    if name == "doctor":
        return until_closed(lambda: importlib.import_module("mrlhf.commands.doctor").main())
    if name not in STAGES:
        raise _unknown_stage(name)
    if "--help" in args or "-h" in args:
        _print_once(help_text(name))
        return 0
    config_file, dry, overrides = _split_args(name, args)
    config = load_config(STAGES[name], config_file, overrides)
    if dry:
        return until_closed(lambda: _exit_status(importlib.import_module("mrlhf.commands.dry_run").main(config)))

    def run_stage() -> int:
        module = MODULES.get(name, f"mrlhf.{name}")
        run_dir = Path(config.train.output_dir) if isinstance(config, TrainingConfig) else None
        return show_user_errors(lambda: _exit_status(importlib.import_module(module).main(config)), run_dir=run_dir)

    if "TORCHELASTIC_RUN_ID" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import record

        return record(run_stage)()
    return run_stage()


def _unknown_stage(name: str) -> ConfigError:
    """Names the stage of an estimator, what has another name here, or one that differs in a letter or their order."""
    estimator, fix = name.lower().replace("-", "_"), COMMANDS.get(name.lower())
    if estimator in ESTIMATORS.rows:
        fix = f"mrlhf ppo --ppo.estimator {estimator} ..."
    near = difflib.get_close_matches(name, SUMMARIES, n=1, cutoff=0.75)
    near = near or [stage for stage in SUMMARIES if sorted(stage) == sorted(name)]
    hint = f"; did you mean '{near[0]}'?" if near and fix is None else ""
    return ConfigError(f"unknown stage '{name}'{hint}", where="command line", expected=", ".join(SUMMARIES), fix=fix)


def _split_args(stage: str, args: list[str]) -> tuple[str | None, bool, list[str]]:
    """The config file, whether this is a dry run, and the remaining arguments for `load_config`."""
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
        raise ConfigError(f"mrlhf {stage} needs its options", where="command line",
                          expected=f"--config FILE, or --key VALUE (mrlhf {stage} --help)",
                          fix=f"--config {yaml}" if yaml else None)
    return config_file, dry, overrides


def _print_once(text: str) -> None:
    if torchrun_rank() == 0:
        until_closed(lambda: sys.stdout.write(text))


def _exit_status(result: Any) -> int:
    return result if isinstance(result, int) else 0
