"""The examples are documentation that runs: every YAML loads and fits,
every run.sh trains on a toy and exports its model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, environment, metrics

from mrlhf.config.dump import dump_yaml
from mrlhf.config.load import load_config
from mrlhf.config.options import STAGES
from mrlhf.observe.metrics import EVALUATED

YAMLS = sorted(p for p in ROOT.glob("examples/*/*.yaml"))
DATA = {"pretrain": "text", "sft": "sft", "rm": "pref", "dpo": "pref", "ppo": "prompts"}
LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 8192,
    "vocab_size": 128256,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}


LLAMA_3_70B = LLAMA_3_8B | {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
LARGE = {"llama3_8b": (LLAMA_3_8B, "8,030,261,248"), "llama3_70b": (LLAMA_3_70B, "70,553,706,496")}


def stage_of(path: Path) -> str:
    return path.stem if path.parent.name in ("quickstart", "calculator") else path.parent.name


def name(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def test_every_stage_has_its_files() -> None:
    for stage in DATA:
        files = {p.name for p in (ROOT / "examples" / stage).iterdir()}
        assert {"toy.yaml", "llama3_8b.yaml", "run.sh", "README.md"} <= files
        assert stage == "ppo" or "llama3_70b.yaml" in files
        assert os.access(ROOT / "examples" / stage / "run.sh", os.X_OK)


@pytest.mark.parametrize("path", YAMLS, ids=name)
def test_loads_strictly(path: Path, tmp_path: Path) -> None:
    stage = STAGES[stage_of(path)]
    config = load_config(stage, str(path), [])
    (tmp_path / "again.yaml").write_text(dump_yaml(config))
    assert load_config(stage, str(tmp_path / "again.yaml"), []) == config


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("examples/*/*.sh"), *ROOT.glob("examples/slurm/*.sbatch")]), ids=lambda p: p.parent.name
)
def test_shell_syntax(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.parametrize("path", [p for p in YAMLS if p.stem in LARGE], ids=name)
def test_large_configurations_pass_a_dry_run(
    path: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With Llama 3's shapes, the toy's tokenizer and data, and the number of ranks that the file names.
    No weights are read.
    """
    from mrlhf.commands import dry_run

    stage, text = stage_of(path), path.read_text()
    shape, parameters = LARGE[path.stem]
    assert "Checked by --dry-run only" in text
    command = next(line for line in text.splitlines() if line.startswith("#   WORLD_SIZE="))
    assert command.endswith(f"-m mrlhf {stage} --config {path.relative_to(ROOT)} --dry-run")
    ranks = command.partition("=")[2].split()[0]
    monkeypatch.setenv("WORLD_SIZE", ranks)
    monkeypatch.chdir(tmp_path)
    for directory, architecture in (("lm", "LlamaForCausalLM"), ("rm", "LlamaForSequenceClassification")):
        shutil.copytree(world / "llama", directory, ignore=shutil.ignore_patterns("*.safetensors"))
        Path(directory, "config.json").write_text(json.dumps({**shape, "architectures": [architecture]}))
    overrides = ["--model.path", "lm", "--data.train", str(world / DATA[stage]), "--data.seq_length", "160"]
    overrides += ["--data.eval", "null"] + (["--reward.sources", "model:rm"] if stage == "ppo" else [])
    dry_run.main(load_config(STAGES[stage], str(path), overrides))
    shown = capsys.readouterr().out
    assert f"({ranks} ranks = " in shown and f"{parameters} parameters" in shown
    assert float(shown.partition("together ")[2].split()[0]) < 80, "an H100 has 80 GB, and activations must fit beside"


def test_generated_docs_are_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    assert spec is not None and spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for page, text in generate.pages().items():
        assert page.read_text() == text, f"{page.name} is old: python docs/generate.py"


@pytest.mark.parametrize(
    "page",
    sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/README.md"), ROOT / "README.md"]),
    ids=lambda p: f"{p.parent.name}/{p.name}",
)
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    for link in re.findall(r"\]\(([^)#:]+?)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link
    for file in re.findall(r"`((?:mrlhf|tests|tools|examples|docs)/[\w./]+\.(?:py|yaml|sh|md|sbatch))`", text):
        assert (ROOT / file).exists(), file


def train(
    world: Path, stage: str, out: Path, *overrides: object, data: Path | None = None, **variables: object
) -> list[dict[str, float]]:
    """The stage's run.sh for two steps in one process; it neither preprocesses nor exports what is there already."""
    settings = {
        "PYTHON": sys.executable,
        "NPROC": 1,
        "MODEL": world / "qwen2",
        "TOKENIZER": world / "qwen2",
        "INPUT": world / f"{DATA[stage]}.jsonl",
        "DATA": data or world / DATA[stage],
        "SEQ_LENGTH": 160,
        "OUTPUT": out,
        **variables,
    }
    env = environment() | {key: str(value) for key, value in settings.items()}
    command = [
        f"examples/{stage}/run.sh",
        "--train.max_steps",
        2,
        "--checkpoint.save_optimizer",
        "false",
        "--logging.tensorboard",
        "false",
    ]
    done = subprocess.run(
        list(map(str, [*command, *overrides])), cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    lines = metrics(out)
    if stage != "ppo":
        readme = (ROOT / f"examples/{stage}/README.md").read_text()
        of_every_stage = ("perf/", "time/", "memory/")
        unnamed = [
            key for key in lines[0] if "/" in key and f"`{key}`" not in readme and not key.startswith(of_every_stage)
        ]
        assert not unnamed, f"examples/{stage}/README.md says nothing about {unnamed}"
    return lines


def exported(out: Path) -> Path:
    """A directory that looks as if the export had been made."""
    (out / "hf").mkdir(parents=True)
    (out / "hf/config.json").write_text("{}")
    return out


def test_sft_from_raw_records_to_an_exported_model(world: Path, tmp_path: Path) -> None:
    lines = train(
        world,
        "sft",
        tmp_path / "run",
        "--data.eval",
        world / "sft",
        "--train.eval_interval",
        0,
        data=tmp_path / "packed",
    )
    assert [line["step"] for line in lines] == [1, 2, 2] and "eval/loss" in lines[-1]
    assert (tmp_path / "packed.json").is_file() and (tmp_path / "run/hf/model.safetensors").is_file()


def test_pretrain(world: Path, tmp_path: Path) -> None:
    lines = train(world, "pretrain", exported(tmp_path / "run"))
    assert len(lines) == 2 and 5 < lines[0]["train/loss"] < 7, "new weights know nothing: ln 323 = 5.8"


def test_rm_then_ppo(world: Path, tmp_path: Path) -> None:
    lines = train(world, "rm", exported(tmp_path / "rm"), "--data.eval", world / "pref", "--train.eval_interval", 0)
    assert [line["step"] for line in lines] == [1, 2, 2] and "train/accuracy" in lines[0]
    measured = {key.removeprefix("eval/") for key in lines[-1] if key != "step"}
    assert {key for key in measured if not key.startswith("accuracy_by_margin/")} == set(EVALUATED["rm"]) and len(
        measured
    ) == 6 + 4
    scores = json.loads((tmp_path / "rm/rewards.json").read_text())
    pairs = json.loads((world / "pref.json").read_text())["num_samples"] // 2
    assert sum(scores["chosen"]) == sum(scores["rejected"]) == pairs and len(scores["edges"]) == 31
    manifest = json.loads((tmp_path / "rm/checkpoints/step_2/mrlhf.json").read_text())
    assert manifest["reward_count"] == 2 * pairs and manifest["reward_mean"] == pytest.approx(
        lines[-1]["eval/mean_reward"], abs=1e-6
    )
    small = ("--parallel.tensor_model_parallel_size", 1, "--rollout.tensor_parallel_size", 1, "--rollout.batch_size", 8)
    small += ("--train.global_batch_size", 4, "--train.micro_batch_size", 4)
    lines = train(world, "ppo", exported(tmp_path / "ppo"), *small, REWARD=f"model:{tmp_path / 'rm'}")
    assert len(lines) == 2 and lines[0]["actor/ratio_max_dev"] < 1e-4 and "critic/vf_loss" in lines[0]


def test_dpo(world: Path, tmp_path: Path) -> None:
    lines = train(world, "dpo", exported(tmp_path / "run"), "--data.eval", "null")
    assert lines[0]["train/loss"] == pytest.approx(0.693147, abs=1e-5)


def test_grpo(world: Path, tmp_path: Path) -> None:
    small = ("--rollout.batch_size", 2, "--rollout.n", 4, "--train.global_batch_size", 8, "--train.micro_batch_size", 4)
    config = {"CONFIG": "examples/ppo/grpo.yaml", "REWARD": "examples/rewards/exact_match.py:exact_match"}
    lines = train(world, "ppo", exported(tmp_path / "run"), *small, **config)
    assert (
        len(lines) == 2
        and "critic/vf_loss" not in lines[0]
        and "reward/function:exact_match.py:exact_match" in lines[0]
    )


def test_iterative_dpo(world: Path, tmp_path: Path) -> None:
    """One round: answers with rewards, the best and the worst of them through preprocessing, DPO."""
    prompts = [
        json.dumps({"prompt": row["prompt"]})
        for row in map(json.loads, (world / "prompts.jsonl").read_text().splitlines())
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(line + "\n" for line in prompts))
    reward = tmp_path / "reward.py"
    reward.write_text(
        "def vowels(prompts, completions, **columns):\n"
        "    return [float(sum(c in 'aeiou' for c in text)) for text in completions]\n"
    )
    settings = {
        "PYTHON": sys.executable,
        "NPROC": 1,
        "ROUNDS": 1,
        "BEST_OF": 4,
        "PROMPTS": 16,
        "INPUT": tmp_path / "prompts.jsonl",
        "SEQ_LENGTH": 160,
        "TOKENIZER": world / "qwen2",
        "MODEL": world / "qwen2",
        "REWARD": f"{reward}:vowels",
        "OUTPUT": tmp_path / "out",
        "MAX_NEW_TOKENS": 90,
    }
    env = environment() | {key: str(value) for key, value in settings.items()}
    command = [
        "examples/iterative_dpo/run.sh",
        "--train.max_steps",
        "2",
        "--train.global_batch_size",
        "2",
        "--logging.tensorboard",
        "false",
    ]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    here = tmp_path / "out/round_1"
    best, pairs = (
        [json.loads(line) for line in (here / f"{name}.jsonl").read_text().splitlines()] for name in ("best", "pairs")
    )
    assert 0 < len(pairs) <= len(best) <= 16
    assert f"{len(best)} best answers, {len(pairs)} pairs" in done.stdout
    for pair in pairs:
        chosen, rejected = (sum(c in "aeiou" for c in pair[side][0]["content"]) for side in ("chosen", "rejected"))
        assert chosen == pair["score_chosen"] > pair["score_rejected"] == rejected
    assert json.loads((here / "pairs.json").read_text())["task"] == "preference"
    assert metrics(here / "dpo")[0]["train/loss"] == pytest.approx(0.693147, abs=1e-5)
    done_sft = subprocess.run(
        [sys.executable, "tools/preprocess_data.py", "--task", "sft", "--input", here / "best.jsonl",
         "--tokenizer", world / "qwen2", "--output-prefix", here / "best", "--seq-length", "160"],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done_sft.returncode == 0, done_sft.stderr[-2000:]
    assert json.loads((here / "best.json").read_text())["task"] == "sft"
