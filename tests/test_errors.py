"""What goes wrong before a run starts is said once, in one form, with the way out; all of it together."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import make_tokenizer, run, torchrun, write_jsonl

from mrlhf.config.dump import dump_yaml
from mrlhf.config.load import load_config
from mrlhf.config.options import STAGES
from mrlhf.data.indexed import PackedDataset
from mrlhf.errors import MrlhfError, SeveralErrors

MRLHF = (sys.executable, "-m", "mrlhf")
BAR = "=" * 100
FIRST = re.compile(r"^(Config|Data|Checkpoint|Reward)Error: \S")
FURTHER = re.compile(r"^  (expected: |fix:      )\S")


def in_form(stderr: str) -> list[str]:
    """The lines of a framed message, after checking that each is one of those that style allows."""
    lines = stderr.splitlines()
    assert lines[0] == lines[-1] == BAR and lines.count(BAR) == 2, stderr
    body = lines[1:-1]
    if re.fullmatch(r"\d+ problems:", body[0]):
        assert int(body[0].split()[0]) == sum(bool(FIRST.match(line)) for line in body[1:])
        body = body[1:]
    assert FIRST.match(body[0]), body
    assert all(FIRST.match(line) or FURTHER.match(line) for line in body), body
    assert "Traceback" not in stderr
    return body


def options(world: Path, stage: str, **changes: object) -> list[str]:
    data = {"pretrain": "text", "sft": "sft", "rm": "pref", "dpo": "pref", "ppo": "prompts"}[stage]
    values: dict[str, object] = {
        "model.path": world / "qwen2",
        "model.dtype": "float32",
        "data.train": world / data,
        "train.output_dir": world / "never_made",
        "train.global_batch_size": 8,
    }
    if stage == "ppo":
        values |= {
            "rollout.batch_size": 8,
            "rollout.max_new_tokens": 8,
            "reward.sources": "examples/rewards/length_penalty.py:length_penalty",
        }
    return [str(part) for key, value in (values | changes).items() for part in (f"--{key}", value)]


@pytest.fixture
def problems(world: Path) -> Callable[..., list[MrlhfError]]:
    """Every error of a configuration: those of its text, or else those of its files."""
    from mrlhf.rl.ppo_checks import check_ppo
    from mrlhf.training import preflight

    def find(stage: str, *, ranks: int = 1, **changes: object) -> list[MrlhfError]:
        try:
            config = load_config(
                STAGES[stage], None, options(world, stage, **{k.replace("__", "."): v for k, v in changes.items()})
            )
            if stage == "ppo":
                check_ppo(config, ranks)
            else:
                preflight.check_run(config, world=ranks)
        except SeveralErrors as several:
            return several.errors
        except MrlhfError as error:
            return [error]
        return []

    return find


@pytest.fixture(scope="module")
def other_tokenizer(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world's model with a tokenizer that was trained on other text."""
    directory = tmp_path_factory.mktemp("other") / "qwen2"
    shutil.copytree(world / "qwen2", directory)
    make_tokenizer(directory, ["an entirely other text, with other merges"] * 4, vocab_size=300)
    return directory


@pytest.fixture(scope="module")
def value_model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory that says it holds a reward model; its weights are never read."""
    directory = tmp_path_factory.mktemp("value") / "qwen2"
    shutil.copytree(world / "qwen2", directory)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "architectures": ["Qwen2ForSequenceClassification"]}))
    return directory


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize("part", ["checkpoints", "hf", "heartbeat"])
def test_a_part_of_the_directory_that_cannot_be_written_is_found_first(
    part: str, problems: Callable[..., list[MrlhfError]], tmp_path: Path
) -> None:
    """Not at the first save."""
    (tmp_path / part).touch()
    (error,) = problems("sft", train__output_dir=tmp_path)
    assert f"{tmp_path / part} is not a directory" in error.what


@pytest.mark.parametrize("stage", ["sft", "ppo", "score"])
def test_help_names_every_option(stage: str) -> None:
    done = run(*MRLHF, stage, "--help")
    shown = {word[2:] for word in re.findall(r"--[\w.]+", done.stdout)}
    from mrlhf.config.schema import options_of as known

    assert set(known(STAGES[stage])) <= shown and done.stderr == ""


def test_misspelt_key(world: Path) -> None:
    done = run(*MRLHF, "sft", *options(world, "sft"), "--parallel.tensor_model_paralel_size", 2, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert "; did you mean '--parallel.tensor_model_parallel_size'" in in_form(done.stderr)[0]


def test_missing_config_file(tmp_path: Path) -> None:
    (tmp_path / "sft.yaml").write_text("model:\n  path: m\n")
    done = run(*MRLHF, "sft", "--config", tmp_path / "stf.yaml", check=False)
    assert done.returncode == 2
    assert in_form(done.stderr) == [
        f"ConfigError: {tmp_path / 'stf.yaml'}: no such file",
        "  expected: a YAML file",
        f"  fix:      --config {tmp_path / 'sft.yaml'}",
    ]


def test_wrong_column(world: Path, tmp_path: Path) -> None:
    rows = write_jsonl(
        tmp_path / "chat.jsonl", [{"conversation": [{"role": "user", "content": "a"}], "id": i} for i in range(4)]
    )
    done = run(sys.executable, "tools/preprocess_data.py", "--task", "sft", "--input", rows,
               "--tokenizer", world / "qwen2", "--output-prefix", tmp_path / "out", "--seq-length", 64,
               check=False)  # fmt: skip
    assert done.returncode == 2 and "Traceback" not in done.stderr
    first, *further = done.stderr.strip().splitlines()
    assert first == f"DataError: {rows}:1: column 'messages' is missing; found ['conversation', 'id']"
    assert all(FURTHER.match(line) for line in further)
    assert (
        further[-1].startswith("  fix:      --input-key conversation")
        and "(4 of 4 rows have this problem; first: 1, 2, 3)" in further[-1]
    )
    assert not list(tmp_path.glob("out*"))


def test_everything_at_once_and_once_under_torchrun(world: Path, other_tokenizer: Path) -> None:
    changes: dict[str, object] = {
        "model.path": other_tokenizer,
        "parallel.tensor_model_parallel_size": 3,
        "data.train": world / "pref",
        "data.eval": world / "nowhere",
    }
    done = torchrun(2, "-m", "mrlhf", "sft", *options(world, "sft", **changes), check=False)
    assert done.returncode == 1 and "exitcode: 2" in done.stderr  # torchrun's own status, and ours in its report
    for text in (
        (
            "ConfigError: parallel.tensor_model_parallel_size: "
            "parallel.tensor_model_parallel_size = 3 does not divide the model's num_attention_heads = 4"
        ),
        "ConfigError: parallel: 2 ranks cannot be divided into tensor 3 x pipeline 1",
        f"DataError: data.train = {world / 'pref'}: the data was made with --task preference",
        f"DataError: data.train = {world / 'pref'}: the data's tokenizer ({world / 'qwen2'}, ",
        f"DataError: data.eval: {world / 'nowhere'}.json: no such dataset",
        "5 problems:",
    ):
        assert done.stderr.count(text) == 1, text
    start = done.stderr.index(BAR)
    end = done.stderr.index(BAR, start + 1) + len(BAR)
    in_form(done.stderr[start:end])
    assert "[rank 1]" not in done.stderr


def test_dry_run_shows_everything_at_once(world: Path, other_tokenizer: Path) -> None:
    changes: dict[str, object] = {
        "model.path": other_tokenizer,
        "parallel.tensor_model_parallel_size": 3,
        "data.eval": world / "nowhere",
    }
    done = run(*MRLHF, "rm", "--dry-run", *options(world, "rm", **changes), check=False)
    assert done.returncode == 2 and done.stdout == ""
    found = [line for line in in_form(done.stderr) if FIRST.match(line)]
    assert [line.partition(":")[0] for line in found] == ["ConfigError", "DataError", "DataError"]


# ---------------------------------------------------------------- a dry run of what is fine


def test_dry_run_says_what_the_run_would_be(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mrlhf.commands import dry_run

    monkeypatch.setenv("WORLD_SIZE", "4")
    changes: dict[str, object] = {
        "parallel.tensor_model_parallel_size": 2,
        "train.micro_batch_size": 2,
        "train.output_dir": tmp_path / "run",
    }
    dry_run.main(load_config(STAGES["sft"], None, options(world, "sft", **changes)))
    shown = capsys.readouterr().out
    assert "global 8 = micro 2 x accumulation 2 x dp 2   (4 ranks = tp 2 x pp 1 x dp 2)" in shown
    meta = json.loads((world / "sft.json").read_text())
    assert f"steps    {-(-meta['num_packs'] // 8)}: {meta['num_packs']} rows x 1 epochs" in shown
    assert "nothing wrong was found" in shown and "memory   a rank" in shown
    sample = shown.partition("first sample, [[trained]]:\n")[2]
    assert re.search(r"<\|im_start\|>assistant\n\[\[[^\[\]]+<\|im_end\|>\]\]", sample)
    assert not (tmp_path / "run").exists()


def test_dry_run_of_ppo(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from mrlhf.commands import dry_run

    dry_run.main(
        load_config(
            STAGES["ppo"], None, options(world, "ppo", **{"train.max_steps": 3, "ppo.epochs": 2, "rollout.n": 2})
        )
    )
    shown = capsys.readouterr().out
    assert "3 rollouts of 8 prompts x 2 answers, 4 updates each" in shown
    assert all(what in shown for what in ("actor", "critic", "reference", "vLLM weights", "vLLM key/value cache"))
    assert " GiB of a GPU of 80 GiB, 0.25 GiB on a CPU" in shown, "rollout.kv_cache_mib is not set"


# ---------------------------------------------------------------- the text of each


def test_tensor_parallel_size_that_does_not_divide(problems: Callable[..., list[MrlhfError]]) -> None:
    (error,) = problems("sft", ranks=4, parallel__tensor_model_parallel_size=4)
    assert "does not divide the model's num_key_value_heads (num_query_groups) = 2" in error.what
    assert (error.expected, error.fix) == ("1, 2", "--parallel.tensor_model_parallel_size 2")


def test_pipeline_that_does_not_divide(problems: Callable[..., list[MrlhfError]]) -> None:
    (error,) = problems("sft", ranks=3, parallel__pipeline_model_parallel_size=3, train__global_batch_size=9)
    assert "parallel.pipeline_model_parallel_size = 3 does not divide the model's num_hidden_layers = 4" in error.what
    assert error.expected == "1, 2, 4"


@pytest.mark.parametrize(
    ("warmup", "decay", "fix"),
    [
        (8, 8, "--optim.lr_warmup_steps 5 --optim.lr_wsd_decay_steps 5"),
        (0, 11, "--optim.lr_warmup_steps 0 --optim.lr_wsd_decay_steps 10"),
        (1000, 1, "--optim.lr_warmup_steps 9 --optim.lr_wsd_decay_steps 1"),
        (3, 7, None),
    ],
)
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_warm_up_and_decay_of_wsd_fit_into_the_run(
    problems: Callable[..., list[MrlhfError]], stage: str, warmup: int, decay: int, fix: str | None
) -> None:
    """Of ppo: into its updates. 2 epochs of one mini-batch on 5 rollouts are 10."""
    steps = {"train__max_steps": 10} if stage == "sft" else {"train__max_steps": 5, "ppo__epochs": 2}
    schedule = {"lr_decay_style": "WSD", "lr_warmup_steps": warmup, "lr_wsd_decay_steps": decay}
    found = problems(stage, **steps, **{f"optim__{k}": v for k, v in schedule.items()})
    assert [e.fix for e in found] == ([] if fix is None else [fix])
    for error in found:
        assert f"optim.lr_wsd_decay_steps = {decay} and optim.lr_warmup_steps = {warmup}" in error.what
        assert "10 optimizer steps" in error.what


def test_what_never_happens_in_the_run_is_a_note(world: Path) -> None:
    from mrlhf.rl.ppo_checks import check_ppo
    from mrlhf.training.preflight import check_run

    trial = options(world, "sft", **{"train.max_steps": 5, "optim.lr": 1e-3, "optim.lr_warmup_steps": 125})
    (note,) = check_run(load_config(STAGES["sft"], None, trial), world=1).notes
    assert note.startswith("optim.lr_warmup_steps = 125 is longer than the run, 5 optimizer steps") and "4e-05" in note
    trial = options(world, "ppo", **{"train.max_steps": 5, "optim.lr_warmup_steps": 6, "ppo.critic_warmup_steps": 5})
    notes = check_ppo(load_config(STAGES["ppo"], None, trial), 1).notes
    assert "optim.lr_warmup_steps = 6 is longer" in notes[0] and "no actor is trained" in notes[1]
    trial = options(world, "sft", **{"train.max_steps": 5, "optim.lr_warmup_steps": 5})
    assert not check_run(load_config(STAGES["sft"], None, trial), world=1).notes


def test_one_chunk_a_rank_is_a_plain_pipeline(problems: Callable[..., list[MrlhfError]]) -> None:
    one = {"parallel__virtual_pipeline_model_parallel_size": 1, "train__global_batch_size": 3}
    assert not problems("sft", ranks=2, parallel__pipeline_model_parallel_size=2, **one)
    assert not problems("sft", **one)


def test_interleaved_and_uneven_pipelines(problems: Callable[..., list[MrlhfError]]) -> None:
    pipeline = {"ranks": 2, "parallel__pipeline_model_parallel_size": 2}
    (error,) = problems("sft", **pipeline, parallel__virtual_pipeline_model_parallel_size=3)
    assert (
        error.what
        == "parallel.virtual_pipeline_model_parallel_size = 3 does not divide the model's 2 layers of a stage"
    )
    assert error.expected == "1, 2"
    (error,) = problems("sft", **pipeline, parallel__virtual_pipeline_model_parallel_size=2, train__global_batch_size=7)
    assert (
        error.what
        == "train.global_batch_size = 7 is not a multiple of micro_batch_size 1 x dp 1 x pp 2 (interleaved) = 2"
    )
    (error,) = problems("sft", **pipeline, parallel__num_layers_in_first_pipeline_stage=4)
    assert "4 layers less those of the uneven stage leave 0 for 1 stages" in error.what
    assert not problems("sft", **pipeline, parallel__num_layers_in_first_pipeline_stage=1)
    assert not problems(
        "sft", **pipeline, parallel__num_layers_in_first_pipeline_stage=1, parallel__num_layers_in_last_pipeline_stage=3
    )
    assert not problems("ppo", **pipeline, parallel__virtual_pipeline_model_parallel_size=2)


def test_context_parallel_sizes(problems: Callable[..., list[MrlhfError]]) -> None:
    """4 heads, 2 key/value heads: these are repeated for 4 ranks, but 3 do not divide the heads."""
    assert not problems("sft", ranks=4, parallel__context_parallel_size=4)
    assert not problems("dpo", ranks=4, parallel__context_parallel_size=2, parallel__tensor_model_parallel_size=2)
    (error,) = problems("sft", ranks=3, parallel__context_parallel_size=3)
    assert "parallel.context_parallel_size = 3 does not divide the 4 heads (and 2 key/value heads)" in error.what
    assert (error.expected, error.fix) == ("1, 2, 4", "--parallel.context_parallel_size 2")
    (error,) = problems("sft", ranks=2, parallel__context_parallel_size=2, loss__aggregation="sequence")
    assert error.fix == "--loss.aggregation token"
    assert not problems("ppo", ranks=2, parallel__context_parallel_size=2)
    (error,) = problems("ppo", ranks=2, parallel__context_parallel_size=2, ppo__ratio="sequence")
    assert error.fix == "--ppo.ratio token"


def test_ranks_that_do_not_divide(problems: Callable[..., list[MrlhfError]]) -> None:
    (error,) = problems("sft", ranks=3, parallel__tensor_model_parallel_size=2)
    assert (
        error.what == "3 ranks cannot be divided into tensor 2 x pipeline 1"
        and error.expected == "a multiple of 2 ranks"
    )


def test_best_metric_that_the_stage_does_not_measure(problems: Callable[..., list[MrlhfError]], world: Path) -> None:
    (error,) = problems("rm", data__eval=world / "pref", checkpoint__best_metric="eval/accurracy")
    assert error.what == "checkpoint.best_metric = eval/accurracy is not measured by the evaluation of rm"
    assert error.expected == "eval/loss, eval/accuracy, eval/margin, eval/mean_reward, eval/min_reward, eval/max_reward"
    assert error.fix == "--checkpoint.best_metric eval/accuracy"
    sft = {"data__eval": world / "sft", "checkpoint__best_metric": "eval/log_z_squared"}
    assert len(problems("sft", **sft)) == 1 and not problems("sft", **sft, loss__z_loss=1e-4)


def test_loss_weights(problems: Callable[..., list[MrlhfError]], world: Path, tmp_path: Path) -> None:
    for file in world.glob("sft[._]*"):
        shutil.copy(file, tmp_path / file.name)
    one, other = world / "sft", tmp_path / "sft"
    assert not problems("sft", data__train=f"[{{prefix: {one}, loss_weight: 0.5}}, {other}]")
    (error,) = problems("sft", data__train=f"[{{prefix: {one}, loss_weight: 0}}, {other}]")
    assert error.what == f"data.train: loss_weight = 0 of {one}"
    (error,) = problems("sft", data__train=f"[{{prefix: {one}, loss_weight: 2}}]")
    assert "of the only source changes nothing" in error.what
    (error,) = problems("dpo", data__train=f"[{{prefix: {one}, loss_weight: 2}}, {other}]")
    assert error.what == "data.train: loss_weight is for pretrain and sft"


def test_batch_arithmetic(problems: Callable[..., list[MrlhfError]]) -> None:
    (error,) = problems("sft", ranks=4, train__global_batch_size=10)
    assert error.what == "train.global_batch_size = 10 is not a multiple of micro_batch_size 1 x dp 4 = 4"
    assert (error.expected, error.fix) == ("a multiple of 4", "--train.global_batch_size 8")
    (error,) = problems("sft", train__micro_batch_size=3)
    assert error.what == "train.micro_batch_size = 3 does not divide train.global_batch_size = 8"


def test_micro_batches_by_tokens(problems: Callable[..., list[MrlhfError]], world: Path) -> None:
    """Any number of rows, no micro_batch_size beside it, and nothing that is larger than a micro-batch."""
    assert not problems("sft", ranks=4, train__global_batch_size=10, train__max_tokens_per_micro_batch=4096)
    (error,) = problems("sft", train__micro_batch_size=2, train__max_tokens_per_micro_batch=4096)
    assert error.fix == "--train.micro_batch_size 1"
    packs, pairs = PackedDataset.open(world / "sft"), PackedDataset.open(world / "pref")
    largest = int(np.add.reduceat(packs.lengths, packs.doc_index[:-1]).max())
    assert not problems("sft", train__max_tokens_per_micro_batch=largest)
    (error,) = problems("sft", train__max_tokens_per_micro_batch=largest - 1)
    assert error.what == (
        f"train.max_tokens_per_micro_batch = {largest - 1} is less than the largest pack takes: "
        f"{largest} tokens with padding"
    )
    width = -(-pairs.max_length // 4) * 4
    options: dict[str, Any] = {
        "data__packing": False,
        "ranks": 4,
        "parallel__tensor_model_parallel_size": 2,
        "parallel__sequence_parallel": True,
    }
    (error,) = problems(
        "dpo", parallel__context_parallel_size=2, train__max_tokens_per_micro_batch=2 * width - 1, **options
    )
    assert "the largest pair takes" in error.what and error.fix == f"--train.max_tokens_per_micro_batch {2 * width}"
    (error,) = problems("ppo", train__max_tokens_per_micro_batch=8)
    assert "the largest prompt and answer takes" in error.what


def test_data_of_another_task_or_length(problems: Callable[..., list[MrlhfError]], world: Path) -> None:
    (error,) = problems("dpo", data__train=world / "sft")
    assert error.render().splitlines() == [
        f"data.train = {world / 'sft'}: the data was made with --task sft",
        "  expected: --task preference",
        "  fix:      python tools/preprocess_data.py --task preference ...",
    ]
    (error,) = problems("sft", data__seq_length=4096)
    assert (error.what, error.fix) == ("the data was made with --seq-length 160", "--data.seq_length 160")


def test_sources_of_a_blend_that_do_not_fit_each_other(problems: Callable[..., list[MrlhfError]], world: Path) -> None:
    found = problems("sft", data__train=f"[{world / 'sft'}, {world / 'pref'}, {world / 'nowhere'}]")
    assert [e.what for e in found] == [
        "the data was made with --task preference",
        "no such dataset",
        f"the sources differ in task: {world / 'sft'} has sft, {world / 'pref'} has preference",
    ]
    assert found[0].where == f"data.train = {world / 'pref'}" and found[2].where == "data.train"


def test_megatrons_own_text(problems: Callable[..., list[MrlhfError]], world: Path, tmp_path: Path) -> None:
    for end in (".bin", ".idx"):
        shutil.copy(world / f"text{end}", tmp_path / f"x_text_document{end}")
    (length,) = problems("pretrain", data__train=tmp_path / "x_text_document")
    assert length.what.startswith("this is Megatron-LM's own text") and length.expected == "data.seq_length"
    (other,) = problems("sft", data__train=tmp_path / "x_text_document", data__seq_length=64)
    assert other.what.startswith("PREFIX.json is missing") and "serves pretraining alone" in (other.expected or "")


def test_data_that_is_not_there(problems: Callable[..., list[MrlhfError]], world: Path) -> None:
    (error,) = problems("sft", data__train=world / "sft.idx")
    assert error.fix == "leave out .idx"
    (error,) = problems("sft", data__train=world / "sfft")
    assert error.what == "no such dataset"


def test_tokenizer_that_does_not_fit(
    problems: Callable[..., list[MrlhfError]], world: Path, other_tokenizer: Path
) -> None:
    (error,) = problems("sft", model__path=other_tokenizer)
    assert (
        error.what.startswith(f"the data's tokenizer ({world / 'qwen2'}, fingerprint ")
        and str(other_tokenizer) in error.what
    )
    assert error.fix == f"python tools/preprocess_data.py --tokenizer {other_tokenizer} ..."


def test_model_without_tokenizer_hides_nothing_else(
    problems: Callable[..., list[MrlhfError]], world: Path, tmp_path: Path
) -> None:
    shutil.copy(world / "qwen2/config.json", tmp_path)
    tokenizer, data = problems("sft", model__path=tmp_path, data__eval=world / "nowhere")
    assert (tokenizer.what, tokenizer.where) == ("no tokenizer files", str(tmp_path)) and data.what == "no such dataset"


def test_model_that_is_not_there(problems: Callable[..., list[MrlhfError]], world: Path, tmp_path: Path) -> None:
    (error,) = problems("sft", model__path=tmp_path)
    assert error.what == "neither a checkpoint nor a HF model"
    (error,) = problems("sft", model__path=tmp_path / "no" / "such")
    assert error.what.startswith("no such directory") and error.where.startswith("model.path")


def test_value_model_where_a_language_model_is_needed(
    problems: Callable[..., list[MrlhfError]], value_model: Path
) -> None:
    for stage in ("sft", "dpo", "ppo"):
        (error,) = problems(stage, model__path=value_model)
        assert error.what.endswith("holds a value model") and error.expected == "an LM checkpoint"


def test_language_model_as_reward_model(problems: Callable[..., list[MrlhfError]], world: Path) -> None:
    (error,) = problems("ppo", reward__sources=f"model:{world / 'llama'}")
    assert (error.what, error.expected) == (
        "it holds a language model, which gives no score",
        "a reward model (mrlhf rm)",
    )


def test_reward_file_without_the_function(problems: Callable[..., list[MrlhfError]]) -> None:
    (error,) = problems("ppo", reward__sources="examples/rewards/exact_match.py:exact_mach")
    assert (
        "has no function 'exact_mach'" in error.what
        and "exact_match" in (error.expected or "")
        and error.where == "reward.sources"
    )
    (error,) = problems("ppo", reward__sources="examples/rewards/no_such.py:f")
    assert "does not exist" in error.what
    (error,) = problems("ppo", reward__sources="exact_match")
    assert "none of the known forms" in error.what


def test_prompt_and_answer_longer_than_the_model(problems: Callable[..., list[MrlhfError]], world: Path) -> None:
    longest = json.loads((world / "prompts.json").read_text())["lengths"]["max"]
    (error,) = problems("ppo", rollout__max_new_tokens=250)
    assert error.what == f"the longest prompt ({longest} tokens) and rollout.max_new_tokens = 250 exceed 256"
    assert error.fix == f"--rollout.max_new_tokens {256 - longest}"


def test_rollout_that_cannot_be_cut(problems: Callable[..., list[MrlhfError]]) -> None:
    ranks, heads = problems("ppo", ranks=2, rollout__tensor_parallel_size=3)
    assert ranks.what == "rollout.tensor_parallel_size = 3 does not divide the 2 ranks"
    assert heads.what.startswith("rollout.tensor_parallel_size = 3 does not fit num_attention_heads = 4")
    (error,) = problems("ppo", train__global_batch_size=6)
    assert error.what == "train.global_batch_size = 6 does not divide rollout.batch_size x rollout.n = 8"
    (error,) = problems("ppo", ppo__estimator="grpo")
    assert error.expected == "2 or more"


def test_a_critic_that_cannot_be_cut_in_its_own_way(problems: Callable[..., list[MrlhfError]]) -> None:
    (error,) = problems("ppo", ranks=4, ppo__critic_tensor_model_parallel_size=4)
    assert error.what.startswith(
        "critic: ppo.critic_tensor_model_parallel_size = 4 does not divide the model's num_key_value_heads"
    )
    assert (error.where, error.fix) == (
        "ppo.critic_tensor_model_parallel_size",
        "--ppo.critic_tensor_model_parallel_size 2",
    )
    sizes = {"parallel__tensor_model_parallel_size": 2, "ppo__critic_tensor_model_parallel_size": 1}
    assert not problems("ppo", ranks=2, train__micro_batch_size=1, train__global_batch_size=4, **sizes)
    (error,) = problems("ppo", ranks=2, train__micro_batch_size=4, train__global_batch_size=4, **sizes)
    assert "critic: train.global_batch_size = 4 is not a multiple of micro_batch_size 4 x dp 2" in error.what
    (error,) = problems("ppo", ppo__estimator="reinforce", ppo__critic_pipeline_model_parallel_size=2)
    assert "has no critic" in error.what


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        ("ppo", {"kl__target": 1, "kl__horizon": 1}),
        ("ppo", {"ppo__dual_clip": 1}),
        ("ppo", {"ppo__value_clip": 0}),
        ("ppo", {"ppo__clip_low": -0.1}),
        ("ppo", {"rollout__correction_low": 3}),
        ("ppo", {"rollout__temperature": 0}),
        ("ppo", {"kl__target": 1, "kl__coef": 0}),
        ("dpo", {"dpo__beta": 0}),
        ("dpo", {"dpo__label_smoothing": 0.5}),
        ("dpo", {"dpo__label_smoothing": 0.1, "dpo__loss": "ipo"}),
        ("sft", {"parallel__context_parallel_size": 2}),
        ("sft", {"parallel__virtual_pipeline_model_parallel_size": 2}),
        ("sft", {"parallel__num_layers_in_first_pipeline_stage": 2}),
        ("ppo", {"train__on_nonfinite": "skip"}),
        ("ppo", {"loss__z_loss": 0.1}),
        ("ppo", {"checkpoint__best_metric": "eval/score/mean"}),
        ("sft", {"checkpoint__best_metric": "eval/loss"}),
        ("sft", {"sft__neftune_alpha": -1}),
        ("sft", {"parallel__sequence_parallel": "true"}),
        ("sft", {"data__padding_side": "left", "data__packing": "false"}),
        ("rm", {"data__padding_side": "left"}),
        ("sft", {"optim__lr_decay_style": "WSD"}),
    ],
)
def test_what_the_losses_would_refuse_is_refused_before_the_run(
    problems: Callable[..., list[MrlhfError]], stage: str, changes: dict[str, Any]
) -> None:
    (error,) = problems(stage, **changes)
    assert type(error).__name__ == "ConfigError"


def test_resuming_with_another_configuration_shows_the_difference(world: Path, tmp_path: Path) -> None:
    from mrlhf.training.resume import check_resume

    def config(**changes: object) -> Any:
        return load_config(STAGES["sft"], None, options(world, "sft", **{"train.output_dir": tmp_path, **changes}))

    check_resume(config(), tmp_path)
    (tmp_path / "config.yaml").write_text(dump_yaml(config()))
    check_resume(config(), tmp_path)
    check_resume(
        config(
            **{
                "parallel.tensor_model_parallel_size": 2,
                "logging.log_interval": 5,
                "checkpoint.keep_last": 9,
                "train.max_tokens_per_micro_batch": 4096,
                "optim.use_distributed_optimizer": "false",
            }
        ),
        tmp_path,
    )
    with pytest.raises(MrlhfError) as raised:
        check_resume(config(**{"optim.lr": 3e-4, "train.seed": 2}), tmp_path)
    assert raised.value.what.endswith("another configuration: train.seed: 1 -> 2; optim.lr: 1e-05 -> 0.0003")
    assert raised.value.fix == "the first command again, or another --train.output_dir"
    assert raised.value.expected and "--train.allow_changes '[train.seed, optim.lr]'" in raised.value.expected
    check_resume(
        config(**{"optim.lr": 3e-4, "train.seed": 2, "train.allow_changes": "[train.seed, optim.lr]"}), tmp_path
    )
    for key, value in {"data.seq_length": 160, "train.global_batch_size": 16}.items():
        with pytest.raises(MrlhfError, match=key):
            check_resume(config(**{key: value}), tmp_path)


def test_paths_are_compared_as_paths(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the model, of data, and of the sources of a blend; relative ones from where the run was started."""
    from mrlhf.training.resume import check_resume

    def config(data: object, model: object = world / "qwen2") -> Any:
        changes = {"train.output_dir": run_dir, "data.train": data, "data.eval": data_eval, "model.path": model}
        return load_config(STAGES["sft"], None, options(world, "sft", **changes))

    run_dir, data_eval = tmp_path / "run", "sft"
    run_dir.mkdir()
    (run_dir / "config.yaml").write_text(dump_yaml(config(f"[{{prefix: {world}/sft, epochs: 2}}]", "qwen2")))
    (run_dir / "env.json").write_text(json.dumps({"cwd": str(world)}))
    (tmp_path / "link").symlink_to(world)
    monkeypatch.chdir(tmp_path)
    data_eval = "link/sft"
    check_resume(config("[{prefix: ./link/sft, epochs: 2}]", "link/qwen2/"), run_dir)
    for data, model in (("[{prefix: link/sft, epochs: 3}]", "link/qwen2"), ("[{prefix: x, epochs: 2}]", "link/qwen2")):
        with pytest.raises(MrlhfError, match="another configuration: data.train: "):
            check_resume(config(data, model), run_dir)
    with pytest.raises(MrlhfError, match="another configuration: model.path: "):
        check_resume(config("[{prefix: link/sft, epochs: 2}]", "link/llama"), run_dir)


def test_the_run_of_another_stage_is_named(world: Path, tmp_path: Path) -> None:
    from mrlhf.checkpoint.manifest import write_manifest
    from mrlhf.training.resume import check_resume

    def config(stage: str) -> Any:
        return load_config(STAGES[stage], None, options(world, stage, **{"train.output_dir": tmp_path}))

    (tmp_path / "config.yaml").write_text(dump_yaml(config("ppo")))
    with pytest.raises(MrlhfError, match=f"{tmp_path} holds a run of ppo"):
        check_resume(config("sft"), tmp_path)
    (tmp_path / "config.yaml").unlink()
    check_resume(config("sft"), tmp_path)
    (tmp_path / "checkpoints/step_3").mkdir(parents=True)
    write_manifest(
        tmp_path / "checkpoints/step_3",
        {"stage": "rm", "step": 3, "head": "value", "dtype": "float32", "resumable": True},
    )
    with pytest.raises(MrlhfError, match=f"{tmp_path} holds a run of rm"):
        check_resume(config("sft"), tmp_path)
    check_resume(config("rm"), tmp_path)


def test_a_directory_and_loggers_that_do_not_work(
    problems: Callable[..., list[MrlhfError]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every problem before the run, also of what has been a note until the run was over."""
    (tmp_path / "file").touch()
    for name in ("wandb", "mlflow"):
        monkeypatch.setitem(sys.modules, name, None)
    changes = {
        "logging__wandb_project": "p",
        "logging__mlflow_experiment": "e",
        "train__output_dir": tmp_path / "file/x",
    }
    for stage in ("sft", "ppo"):
        wandb, mlflow, directory = problems(stage, **changes)
        assert wandb.where == "logging.wandb_project" and "pip install 'mrlhf[wandb]'" in (wandb.fix or "")
        assert mlflow.where == "logging.mlflow_experiment" and f"{tmp_path}/file is not a directory" in directory.what


def test_a_gpu_that_torch_cannot_use_is_a_problem_of_every_stage(
    problems: Callable[..., list[MrlhfError]], monkeypatch: pytest.MonkeyPatch
) -> None:
    from mrlhf.errors import EnvironmentProblem
    from mrlhf.parallel import device

    def refuse() -> None:
        raise EnvironmentProblem("there is a GPU")

    monkeypatch.setattr(device, "current", refuse)
    (error,) = problems("sft")
    assert error.what == "there is a GPU"


def test_raw_records_are_told_from_data(problems: Callable[..., list[MrlhfError]], world: Path, tmp_path: Path) -> None:
    for name in ("rows.jsonl", "rows.json", "rows.parquet"):
        (tmp_path / name).write_text("[]")
        (error,) = problems("sft", data__train=tmp_path / name)
        assert error.where == f"data.train = {tmp_path / name}" and "a file of raw records" in error.what
        assert f"tools/preprocess_data.py --input {tmp_path / name}" in (error.fix or "")
    (error,) = problems("sft", data__eval=tmp_path)
    assert "a directory" in error.what and "data.eval" in (error.where or "")
    (error,) = problems("sft", data__train=world / "sft.bin")
    assert "leave out .bin" in (error.fix or "")


def test_hardly_a_step_is_warned_of(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mrlhf.commands import dry_run

    for size, more, warned in ((512, {}, True), (1, {}, False), (512, {"train.max_steps": 1}, False)):
        changes = {"train.global_batch_size": size, "train.output_dir": tmp_path / "run", **more}
        dry_run.main(load_config(STAGES["sft"], None, options(world, "sft", **changes)))
        shown = capsys.readouterr().out
        assert f"{size:,} packs, about " in shown and ("warning: the run ends after 1 step(s)" in shown) == warned


@pytest.mark.parametrize("number", ["ENOSPC", "EROFS", "EACCES", "ENAMETOOLONG", "ENOTDIR", "EDQUOT", "EFBIG"])
def test_an_error_of_the_disk_is_a_message(number: str, capsys: pytest.CaptureFixture[str]) -> None:
    import errno
    import os

    from mrlhf.commands.tool import show_user_errors

    def fail() -> int:
        code = getattr(errno, number)
        raise OSError(code, os.strerror(code), "runs/x/config.yaml")

    assert show_user_errors(fail) == 2
    assert capsys.readouterr().err.splitlines()[1].startswith("EnvironmentProblem: runs/x/config.yaml: ")
    with pytest.raises(FileNotFoundError):
        show_user_errors(lambda: len(os.listdir("/no/such")))
