"""Every supervised stage on a toy in one process, as its command would run it:
the learning curves that tests/training/test_curves.py compares.

    python tests/training/curves_program.py FOLDER            # writes FOLDER/curves/STAGE.json
    python tests/training/curves_program.py FOLDER --write    # writes tests/fixtures/curves/, too

Use --write after a change that is meant to change the curves.

The toy: chats about the weather. Pretraining reads the texts, SFT learns the answers, and of each pair the answer with
a warm word is chosen over the one with a cold word; the pairs of words of the evaluation stand in no training pair.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

WARM = "sunny bright clear mild warm golden gentle lovely".split()
COLD = "rainy grey foggy harsh icy bitter stormy dull".split()
PLACES = "the coast|the hills|the lake|our town|the valley|the north".split("|")
STEPS = {"pretrain": 60, "sft": 60, "rm": 60, "dpo": 60}
COLUMNS = {
    "pretrain": ("loss", "mean_token_accuracy"),
    "sft": ("loss", "mean_token_accuracy"),
    "rm": ("loss", "accuracy"),
    "dpo": ("loss", "rewards/accuracies"),
}


def make_data(folder: Path) -> None:
    """The tokenizer with a random Llama in model/, and the packed sets text, sft, pref and pref_eval."""
    from conftest import make_hf_model, make_tokenizer, write_jsonl

    from mrlhf.data.prepare.job import preprocess
    from mrlhf.data.prepare.options import PreprocessConfig

    rng = random.Random(0)

    def question() -> str:
        return f"how is the weather at {rng.choice(PLACES)} {rng.choice(('today', 'now', 'this week'))}?"

    def answer(word: str) -> str:
        return f"{rng.choice(('it is', 'the sky is', 'they say it is'))} {word} there."

    words = [(w, c) for w in WARM for c in COLD]
    rng.shuffle(words)
    held_out, seen = words[:10], words[10:]
    chats = [
        [{"role": "user", "content": question()}, {"role": "assistant", "content": answer(rng.choice(WARM + COLD))}]
        for _ in range(480)
    ]
    texts = [f"{chat[0]['content']} {chat[1]['content']}" for chat in chats]

    def pair(warm: str, cold: str) -> dict[str, object]:
        return {"prompt": question(), "chosen": answer(warm), "rejected": answer(cold)}

    make_tokenizer(folder / "model", texts)
    make_hf_model(
        folder / "model",
        "llama",
        vocab_size=323,
        hidden_size=64,
        num_hidden_layers=2,
        head_dim=16,
        intermediate_size=128,
    )
    rows = {
        "text": ("pretrain", [{"text": text} for text in texts]),
        "sft": ("sft", [{"messages": chat} for chat in chats]),
        "pref": ("preference", [pair(*rng.choice(seen)) for _ in range(480)]),
        "pref_eval": ("preference", [pair(*rng.choice(held_out)) for _ in range(64)]),
    }
    for name, (task, found) in rows.items():
        file = write_jsonl(folder / f"{name}.jsonl", found)
        preprocess(
            PreprocessConfig(
                task=task,
                input=(str(file),),
                tokenizer=str(folder / "model"),
                output_prefix=str(folder / name),
                seq_length=128,
                workers=1,
            )
        )


def train(folder: Path, stage: str, run: str, *options: object) -> list[dict[str, float]]:
    """The lines of metrics.jsonl."""
    from mrlhf import cli

    common = (
        "--train.output_dir",
        folder / run,
        "--train.global_batch_size",
        8,
        "--train.micro_batch_size",
        4,
        "--train.num_epochs",
        20,
    )
    common += ("--train.max_steps", STEPS[stage], "--optim.lr_warmup_steps", 5, "--checkpoint.save_optimizer", "false")
    common += ("--logging.tensorboard", "false")
    with contextlib.redirect_stdout(io.StringIO()):
        status = cli.main([stage, *map(str, common), *map(str, options)])
    assert status == 0, f"{stage} ended with {status}"
    return [json.loads(line) for line in (folder / run / "metrics.jsonl").read_text().splitlines()]


def main(folder: Path) -> dict[str, dict[str, object]]:
    make_data(folder)
    fp32, pairs = ("--model.dtype", "float32"), ("--data.train", folder / "pref", "--data.eval", folder / "pref_eval")
    new = (
        "--model.path",
        folder / "model",
        "--model.init",
        "random",
        "--data.train",
        folder / "text",
        "--optim.lr",
        3e-3,
    )
    tuned = ("--model.path", folder / "pretrain", "--data.train", folder / "sft", "--optim.lr", 5e-4)
    lines = {
        "pretrain": train(folder, "pretrain", "pretrain", *fp32, *new),
        "sft": train(folder, "sft", "sft", *fp32, *tuned),
        "rm": train(folder, "rm", "rm", *fp32, "--model.path", folder / "sft", *pairs, "--optim.lr", 1e-4),
        "dpo": train(folder, "dpo", "dpo", *fp32, "--model.path", folder / "sft", *pairs, "--optim.lr", 3e-4),
    }
    bf16 = train(folder, "pretrain", "pretrain_bf16", "--model.dtype", "bfloat16", *new)
    curves: dict[str, dict[str, object]] = {}
    for stage, found in lines.items():
        steps = [line for line in found if "train/loss" in line]
        curves[stage] = {name: [round(line[f"train/{name}"], 5) for line in steps] for name in COLUMNS[stage]}
        curves[stage]["eval"] = {
            key: round(value, 5) for line in found for key, value in line.items() if key.startswith("eval/")
        }
    curves["pretrain"]["bfloat16"] = [round(line["train/loss"], 5) for line in bf16 if "train/loss" in line]
    return curves


if __name__ == "__main__":
    target = Path(sys.argv[1])
    curves = main(target)
    for directory in (target / "curves", *([ROOT / "tests/fixtures/curves"] if "--write" in sys.argv else [])):
        directory.mkdir(parents=True, exist_ok=True)
        for stage, curve in curves.items():
            (directory / f"{stage}.json").write_text(json.dumps(curve, indent=1) + "\n")
