"""The command: exit status, one framed message without a traceback, also under torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import mrlhf
from mrlhf import cli
from mrlhf.commands import tool
from mrlhf.config.options import GenerateStage, SFTStage
from mrlhf.errors import ConfigError, DataError, MrlhfError

ROOT = Path(__file__).resolve().parent.parent
BAR = "=" * 100
GOOD = ["--model.path", "m", "--data.train", "d", "--train.output_dir", "o", "--train.global_batch_size", "8"]


@pytest.fixture(autouse=True)
def same_environment(monkeypatch):
    """`prepare_environment` writes to os.environ; other tests must not see it."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    for name in ("RANK", "TORCHELASTIC_RUN_ID"):
        os.environ.pop(name, None)


def shell(*args: str, module: tuple[str, ...] = ("-m", "mrlhf"), timeout: float = 60) -> subprocess.CompletedProcess:
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "TORCHELASTIC_RUN_ID")} | {"PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *module, *args], capture_output=True, text=True, timeout=timeout, env=env)


def fake_module(monkeypatch, name: str, main) -> None:
    monkeypatch.setitem(sys.modules, f"mrlhf.{name}", types.SimpleNamespace(main=main))


def test_help_of_a_stage():
    done = shell("sft", "--help")
    assert done.returncode == 0 and "--optim.lr float > 0 (1e-05)" in done.stdout and done.stderr == ""


def test_help_and_errors_do_not_import_torch():
    code = (
        "import sys; from mrlhf.cli import main; main(['ppo', '--help']); main(['sft', '--x', '1']); "
        "sys.exit('torch' in sys.modules)"
    )
    assert shell("-c", code, module=()).returncode == 0


def test_misspelt_key_in_a_file(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model:\n  path: m\noptim:\n  learning_rat: 3\n  lrr: 1e-5\n")
    done = shell(
        "sft",
        "--config",
        str(path),
        "--data.train",
        "d",
        "--train.output_dir=o",
        "--train.global_batch_size",
        "8",
        "--data.evl",
        "e",
    )
    assert done.returncode == 2 and done.stdout == ""
    text = done.stderr.splitlines()
    assert text[0] == text[-1] == BAR
    assert text[1] == "3 problems:"
    assert f"ConfigError: {path}:5: unknown key 'optim.lrr'; did you mean 'optim.lr'?" in text
    assert "ConfigError: --data.evl on the command line: unknown key 'data.evl'; did you mean '--data.eval'?" in text
    assert "Traceback" not in done.stderr


def test_missing_file(tmp_path):
    done = shell("rm", "--config", str(tmp_path / "no.yaml"))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        BAR,
        f"ConfigError: {tmp_path / 'no.yaml'}: no such file",
        "  expected: a YAML file",
        BAR,
    ]


def test_printed_once_under_torchrun(tmp_path):
    path = tmp_path / "sft.yaml"
    path.write_text("model:\n  pth: m\n")
    flags = ["--nproc-per-node", "2", "--master-port", "0", "-m", "mrlhf"]
    done = shell(*flags, "sft", "--config", str(path), *GOOD[2:], module=("-m", "torch.distributed.run"))
    assert done.returncode == 1
    assert done.stderr.count("unknown key 'model.pth'; did you mean 'model.path'?") == 1
    assert "exitcode: 2" in done.stderr
    assert "[rank 1]" not in done.stderr


def test_version_and_usage(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"mrlhf {mrlhf.__version__}\n"
    assert cli.main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(f"  {name:<10} " in usage for name in cli.SUMMARIES)
    assert cli.main([]) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["stf"], "ConfigError: command line: unknown stage 'stf'; did you mean 'sft'?"),
        (["chat"], "ConfigError: command line: unknown stage 'chat'"),
        (["export"], "  fix:      python tools/convert/megatron_to_hf.py --help"),
        (["sft"], "ConfigError: command line: mrlhf sft needs its options"),
        (["sft", "run.yaml"], "  fix:      --config run.yaml"),
        (["sft", "--config"], "ConfigError: command line: --config has no value"),
        (["report"], "ConfigError: command line: no run directory"),
        (["report", "x", "--outptu", "y"], "ConfigError: command line: unknown key '--outptu'"),
    ],
)
def test_mistakes(argv, message, capsys):
    assert cli.main(argv) == 2
    assert message in capsys.readouterr().err.splitlines()


def test_stage_gets_its_configuration(monkeypatch):
    seen = []
    fake_module(monkeypatch, "sft", seen.append)
    assert cli.main(["sft", *GOOD, "--train.seed=7"]) == 0
    assert isinstance(seen[0], SFTStage) and seen[0].train.seed == 7


def test_generate_from_flags_alone(monkeypatch):
    seen = []
    fake_module(monkeypatch, "commands.generate", seen.append)
    assert (
        cli.main(
            [
                "generate",
                "--checkpoint",
                "c",
                "--prompts",
                "p",
                "--output",
                "o",
                "--max-new-tokens",
                "9",
                "--top-p",
                "0.9",
            ]
        )
        == 0
    )
    assert isinstance(seen[0], GenerateStage) and (seen[0].max_new_tokens, seen[0].top_p) == (9, 0.9)


def test_dry_run_goes_elsewhere(monkeypatch):
    seen = []
    fake_module(monkeypatch, "commands.dry_run", seen.append)
    assert cli.main(["sft", "--dry-run", *GOOD]) == 0
    assert isinstance(seen[0], SFTStage) and seen[0].train.global_batch_size == 8


def test_user_errors_of_a_stage_are_framed_and_others_keep_their_traceback(monkeypatch, capsys):
    def stage(config):
        raise DataError("column 'messages' is missing", where="d.jsonl:3", fix="--input-key text")

    fake_module(monkeypatch, "sft", stage)
    assert cli.main(["sft", *GOOD]) == 2
    assert capsys.readouterr().err.splitlines() == [
        BAR,
        "DataError: d.jsonl:3: column 'messages' is missing",
        "  fix:      --input-key text",
        BAR,
    ]

    def broken(config):
        raise RuntimeError("ours")

    fake_module(monkeypatch, "sft", broken)
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["sft", *GOOD])


def test_another_rank_waits_and_then_says_who_it_is(monkeypatch, capsys):
    waited = []
    monkeypatch.setattr(tool.time, "sleep", waited.append)
    monkeypatch.setattr(tool.signal, "signal", lambda *a: None)
    os.environ["RANK"] = "3"
    assert cli.main(["sft", "--x"]) == 2
    assert waited == [15.0]
    assert "[rank 3] ConfigError: --x on the command line: unknown key 'x'" in capsys.readouterr().err
    assert cli.main(["--version"]) == 0 and capsys.readouterr().out == ""


def test_after_an_error_no_process_group_is_torn_down(monkeypatch, capsys):
    """`os._exit` because a destructor would wait for ranks that hang in a collective."""
    left = []
    monkeypatch.setattr(tool, "_is_distributed", lambda: True)
    monkeypatch.setattr(tool.os, "_exit", left.append)
    cli.main(["sft", "--x"])
    assert left == [2] and "ConfigError" in capsys.readouterr().err


def test_environment_defaults_keep_what_the_user_set():
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    os.environ["TORCHELASTIC_RUN_ID"] = "x"
    os.environ.pop("OMP_NUM_THREADS", None)
    cli.prepare_environment()
    assert (os.environ["TOKENIZERS_PARALLELISM"], os.environ["OMP_NUM_THREADS"], os.environ["TORCH_CPP_LOG_LEVEL"]) == (
        "true",
        "1",
        "ERROR",
    )


def test_main_module_is_safe_to_import():
    """Megatron's checkpoint writer spawns children, which import __main__ again."""
    assert shell("-c", "import mrlhf.__main__", module=()).returncode == 0


def test_report_command(tmp_path, capsys):
    run = tmp_path / "sft"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "train/loss": 1.0}\n')
    assert cli.main(["report", str(run)]) == 0
    assert capsys.readouterr().out.strip() == str(run / "report.html")
    assert cli.main(["report", str(run), "--output", str(tmp_path / "r.html")]) == 0
    assert (tmp_path / "r.html").read_text().startswith("<!doctype html>")
    assert cli.main(["report", str(tmp_path)]) == 2
    assert "has no metrics.jsonl" in capsys.readouterr().err


def test_error_classes_are_user_errors():
    assert issubclass(ConfigError, MrlhfError) and issubclass(DataError, MrlhfError)


@pytest.mark.parametrize("command", [["-m", "mrlhf", "sft", "--help"], ["tools/preprocess_data.py", "--help"]])
def test_a_reader_that_stops_early_is_no_error(command):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, *command], cwd=ROOT, stdout=writing, stderr=subprocess.PIPE, text=True)
    os.close(writing)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr


def test_a_stage_in_place_of_a_task_is_explained():
    command = [sys.executable, "tools/preprocess_data.py", "--task", "dpo"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "the data of dpo is made with --task preference" in done.stderr
    assert len(done.stderr.splitlines()) == 1
