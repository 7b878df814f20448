"""Strict configuration: values are read as meant, and every problem is shown at once with its place."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest

from mrlhf.config import names
from mrlhf.config.dump import diff, dump_yaml
from mrlhf.config.load import load_config, saved_values
from mrlhf.config.options import STAGES, DataSource, DPOStage, GenerateStage, PPOStage, ScoreStage, SFTStage
from mrlhf.config.schema import help_text, options_of
from mrlhf.errors import MrlhfError, SeveralErrors

GOOD = """\
model:
  path: models/toy
data:
  train: data/toy
train:
  output_dir: runs/sft
  global_batch_size: 8
optim:
  lr: 1e-5
"""

MINIMAL = {
    "pretrain": ["--model.path", "m", "--data.train", "d", "--train.output_dir", "o", "--train.global_batch_size", "8"],
    "score": ["--checkpoint", "c", "--data", "d", "--output", "o"],
    "generate": ["--checkpoint", "c", "--prompts", "p", "--output", "o"],
    "serve-reward": ["--checkpoint", "c"],
}
MINIMAL |= dict.fromkeys(("sft", "rm", "dpo"), MINIMAL["pretrain"])
MINIMAL["ppo"] = [*MINIMAL["pretrain"], "--rollout.batch_size", "16", "--reward.sources", "model:runs/rm"]


@pytest.fixture
def write(tmp_path: Path):
    def write(text: str) -> str:
        path = tmp_path / "c.yaml"
        path.write_text(text)
        return str(path)

    return write


def problems(stage: type, path: str | None, overrides: list[str]) -> list[MrlhfError]:
    with pytest.raises(MrlhfError) as raised:
        load_config(stage, path, overrides)
    return raised.value.errors if isinstance(raised.value, SeveralErrors) else [raised.value]


def test_values_are_read_as_people_mean_them(write):
    config = load_config(
        SFTStage, write(GOOD), ["--train.seed", "010", "--optim.min_lr=1E-7", "--optim.adam_eps", "1e-08"]
    )
    assert config.optim.lr == 1e-5 and isinstance(config.optim.lr, float)
    assert (config.train.seed, config.optim.min_lr, config.optim.adam_eps) == (10, 1e-7, 1e-8)
    assert config.model.path == "models/toy"


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("True", True), ("yes", True), ("off", False), ("false", False)],
)
def test_booleans(write, text, value):
    path = write(GOOD + f"parallel:\n  tensor_model_parallel_size: 2\n  sequence_parallel: {text}\n")
    assert load_config(SFTStage, path, []).parallel.sequence_parallel is value


def test_numbers_of_other_spellings(write):
    config = load_config(
        SFTStage, write(GOOD + "checkpoint: {save_interval: 1e3}\nlogging:\n"), ["--train.max_steps", "1_000"]
    )
    assert (config.checkpoint.save_interval, config.train.max_steps) == (1000, 1000)
    ppo = load_config(PPOStage, None, [*MINIMAL["ppo"], "--rollout.correction_high", ".inf", "--rollout.top_k", "-1"])
    assert ppo.rollout.correction_high == math.inf and ppo.rollout.top_k == -1


def test_override_forms(write):
    flags = ["--optim.weight-decay", "0.1", "--train.micro_batch_size=4", "--parallel.sequence_parallel"]
    config = load_config(SFTStage, write(GOOD), [*flags, "--parallel.tensor-model-parallel-size", "2"])
    assert (config.optim.weight_decay, config.train.micro_batch_size, config.parallel.sequence_parallel) == (
        0.1,
        4,
        True,
    )
    assert load_config(SFTStage, write(GOOD), ["--train.seed", "2", "--train.seed", "3"]).train.seed == 3


def test_optionals_take_null(write):
    path = write(GOOD.replace("train: data/toy", "train: data/toy\n  eval: null\n  seq_length:"))
    assert load_config(SFTStage, path, []).data.eval is None
    for word in ("null", "none", "None"):
        assert load_config(SFTStage, write(GOOD), ["--train.max_steps", word]).train.max_steps is None
    assert (
        load_config(
            PPOStage, None, [*MINIMAL["ppo"], "--rollout.correction", "none", "--ppo.value_clip", "none"]
        ).ppo.value_clip
        is None
    )


@pytest.mark.parametrize(
    "flags",
    [
        ["--reward.sources", "model:a,b.py:f", "--reward.weights", "1,0.5"],
        ["--reward.sources", "model:a", "b.py:f", "--reward.weights", "1", "0.5"],
        ["--reward.sources", "model:a", "--reward.sources=b.py:f", "--reward.weights=[1, 0.5]"],
        ["--reward.sources", '["model:a","b.py:f"]', "--reward.weights", "[1,0.5]"],
        ["--reward.sources=['model:a', b.py:f]", "--reward.weights", "[ 1 , 0.5 ]"],
        ["--reward.sources", '["model:a",', '"b.py:f"]', "--reward.weights", "[1,", "0.5]"],
        ["--reward.sources", '["model:a"]', "--reward.sources", '["b.py:f"]', "--reward.weights", "[1]", "[0.5]"],
    ],
)
def test_tuples(flags):
    base = [f for f in MINIMAL["ppo"] if f not in ("--reward.sources", "model:runs/rm")]
    config = load_config(PPOStage, None, base + flags)
    assert config.reward.sources == ("model:a", "b.py:f") and config.reward.weights == (1.0, 0.5)


BLEND = (DataSource("a", 0.7), DataSource("b", 0.3, 2.0))


@pytest.mark.parametrize(
    ("text", "sources"),
    [
        ("d", (DataSource("d"),)),
        ("d,e", (DataSource("d,e"),)),  # a file name may hold a comma
        ("[a, b]", (DataSource("a"), DataSource("b"))),
        ("{prefix: a, epochs: 2}", (DataSource("a", None, 2.0),)),
        ("[{prefix: a, weight: 0.7}, {prefix: b, weight: 3e-1, epochs: 2}]", BLEND),
        ("\n    - {prefix: a, weight: 0.7}\n    - prefix: b\n      weight: .3\n      epochs: 2", BLEND),
    ],
)
def test_blends_from_yaml_and_from_the_command_line(write, text, sources):
    config = load_config(SFTStage, write(GOOD.replace("data/toy", text)), [])
    assert config.data.train == sources
    assert load_config(SFTStage, write(dump_yaml(config)), []) == config
    if "\n" not in text:
        assert load_config(SFTStage, write(GOOD), ["--data.train", text]) == config
    assert diff(config, config) == [] and len(diff(config, load_config(SFTStage, write(GOOD), []))) == 1


def test_a_plain_prefix_is_dumped_as_one(write):
    assert "\n  train: data/toy\n" in dump_yaml(load_config(SFTStage, write(GOOD), []))


def test_everything_wrong_with_a_blend(write):
    text = "\n    - {prefix: a, wieght: 1}\n    - prefix: b\n      weight: x\n    - weight: 3\n    - prefix: [c]"
    path = write(GOOD.replace(" data/toy", text))
    assert [(e.where, e.what) for e in problems(SFTStage, path, [])] == [
        (f"{path}:5", "data.train: unknown key 'wieght'; did you mean 'weight'?"),
        (f"{path}:7", "data.train: weight = 'x' of b"),
        (f"{path}:8", "data.train: an item without prefix"),
        (f"{path}:9", "data.train: prefix = a list of 1"),
    ]
    (twice,) = problems(SFTStage, write(GOOD.replace("data/toy", "{prefix: a, prefix: b}")), [])
    assert twice.what.startswith("data.train.prefix is given twice") and twice.where.endswith(":4")
    flags = ["--data.train", "[{prefix: a, weight: 1}, b, {prefix: a, weight: 0, epochs: -1}]"]
    assert [e.what for e in problems(SFTStage, write(GOOD), flags)] == [
        "data.train: weight = 0 of a",
        "data.train: epochs = -1 of a",
    ]
    flags = ["--data.train", "[{prefix: a, weight: 1}, b, {prefix: a, weight: 2}]"]
    assert [e.what for e in problems(SFTStage, write(GOOD), flags)] == [
        "data.train: a is given 2 times",
        "data.train: b without a weight, the others with one",
    ]
    assert [e.what for e in problems(SFTStage, write(GOOD), ["--data.train", "[{prefix: a"])] == [
        "data.train = [{prefix: a (not valid YAML)"
    ]
    assert [e.what for e in problems(SFTStage, write(GOOD), ["--data.train", "[]"])] == ["data.train: no source"]


def test_quoted_items_of_a_list(write):
    def option(key, text):
        config = load_config(PPOStage, None, [*MINIMAL["ppo"], f"--{key}", text])
        section, name = key.split(".")
        return getattr(getattr(config, section), name)

    stop = ("a, b", "[/INST]", "\n", "http://c")
    assert option("rollout.stop", '["a, b", "[/INST]", "\\n", "http://c"]') == stop
    assert option("train.allow_changes", '["data.train","optim.lr"]') == ("data.train", "optim.lr")
    assert option("reward.function_env", "['A','B']") == ("A", "B")
    assert option("rollout.stop", '"x"') == ('"x"',) and option("rollout.stop", "[END]") == ("END",)
    assert option("reward.sources", '["http://a/s","http://b/s"]')[1:] == ("http://a/s", "http://b/s")
    assert option("reward.sources", "[http://a/s,http://b/s]")[1:] == ("http://a/s,http://b/s",)
    path = write('reward:\n  sources: \'["model:a","b.py:f"]\'\n')
    assert load_config(PPOStage, path, MINIMAL["ppo"][:-2]).reward.sources == ("model:a", "b.py:f")


def test_a_comma_between_urls_is_one_source(write):
    config = load_config(PPOStage, None, [*MINIMAL["ppo"][:-1], "http://a:1,http://b:1,r.py:f"])
    assert config.reward.sources == ("http://a:1,http://b:1", "r.py:f")
    path = write("reward:\n  sources:\n    - http://a:1,http://b:1\n    - model:x\n  weights: [2, 1e0]\n")
    config = load_config(PPOStage, path, MINIMAL["ppo"][:-2])
    assert config.reward.sources == ("http://a:1,http://b:1", "model:x") and config.reward.weights == (2.0, 1.0)


def test_override_replaces_a_bad_value_of_the_file(write):
    assert load_config(SFTStage, write(GOOD.replace("1e-5", "fast")), ["--optim.lr", "1e-3"]).optim.lr == 1e-3


def test_misspelt_key_names_file_line_and_the_right_word(write):
    path = write(GOOD.replace("lr: 1e-5", "learning_rate: 1e-5\n  weight_decy: 1"))
    errors = problems(SFTStage, path, [])
    assert [e.where for e in errors] == [f"{path}:9", f"{path}:10"]
    assert errors[1].what == "unknown key 'optim.weight_decy'; did you mean 'optim.weight_decay'?"
    assert errors[0].expected.startswith("optim: lr, min_lr, lr_decay_style")


def test_misspelt_flag_and_key_of_another_section():
    errors = problems(SFTStage, None, [*MINIMAL["sft"], "--optm.lr", "1", "--train.weight_decay", "1", "--lr", "1"])
    assert [e.what for e in errors] == [
        "unknown key 'optm.lr'; did you mean '--optim.lr'?",
        "unknown key 'train.weight_decay'; did you mean '--optim.weight_decay'?",
        "unknown key 'lr'; did you mean '--optim.lr'?",
    ]
    assert errors[0].where == "--optm.lr on the command line"


@pytest.mark.parametrize(
    ("flag", "value", "what", "expected"),
    [
        ("train.seed", "1.5", "train.seed = 1.5 (not a whole number)", "int in [0, 2147483647]"),
        ("train.seed", "true", "train.seed = 'true'", "int in [0, 2147483647]"),
        ("optim.lr", "nan", "optim.lr = nan", "float > 0"),
        ("data.packing", "1", "data.packing = '1'", "true|false"),
        ("data.eval", "true", "data.eval = true (a boolean)", "text or null"),
        ("model.dtype", "bf16", "model.dtype = bf16 is not a choice; did you mean bfloat16?", "{float32,bfloat16}"),
        (
            "model.dtype",
            "BFLOAT16",
            "model.dtype = BFLOAT16 is not a choice; did you mean bfloat16?",
            "{float32,bfloat16}",
        ),
        ("train.seed", "null", "train.seed = null", "int in [0, 2147483647]"),
    ],
)
def test_wrong_type(write, flag, value, what, expected):
    (error,) = problems(SFTStage, write(GOOD), [f"--{flag}", value])
    assert (error.what, error.expected, error.where) == (what, expected, f"--{flag} on the command line")


def test_wrong_types_in_the_file(write):
    path = write(
        GOOD.replace("global_batch_size: 8", 'global_batch_size: "8"').replace("lr: 1e-5", "lr: [1, 2]")
        + "parallel: 2\n"
    )
    assert [(e.what, e.where) for e in problems(SFTStage, path, [])] == [
        ("parallel holds '2'", f"{path}:10"),
        ("train.global_batch_size = '8' (a quoted string)", f"{path}:7"),
        ("optim.lr = a list of 2", f"{path}:9"),
    ]


def test_missing_keys_name_the_section_s_line(write):
    errors = problems(
        SFTStage, write(GOOD.replace("  train: data/toy\n", "").replace("  global_batch_size: 8\n", "")), []
    )
    assert [e.what for e in errors] == ["data.train is missing", "train.global_batch_size is missing"]
    assert [e.where.rsplit(":", 1)[1] for e in errors] == ["3", "4"]
    assert errors[0].fix == "--data.train VALUE"


def test_duplicated_key(write):
    path = write(GOOD + "  lr: 2e-5\nmodel:\n  path: other\n")
    errors = problems(SFTStage, path, [])
    assert [e.what for e in errors] == [
        f"optim.lr is given twice; first at {path}:9",
        f"model is given twice; first at {path}:1",
    ]
    assert [e.where for e in errors] == [f"{path}:10", f"{path}:11"]


def test_files_that_cannot_be_read(write, tmp_path):
    path = write(GOOD)
    (error,) = problems(SFTStage, str(tmp_path / "d.yaml"), [])
    assert (error.what, error.where, error.fix) == ("no such file", str(tmp_path / "d.yaml"), f"--config {path}")
    (error,) = problems(SFTStage, str(tmp_path), [])
    assert error.what == "is a directory"
    (error,) = problems(SFTStage, write("model:\n  path: a\n data: 3\n"), [])
    assert error.where == f"{path}:3" and error.what.startswith("not valid YAML")
    (error,) = problems(SFTStage, write("model: {path: a\n"), [])
    assert error.where.startswith(f"{path}:")
    (tmp_path / "c.yaml").write_bytes(b"model: \xff\xfe")
    (error,) = problems(SFTStage, path, [])
    assert error.what.startswith("cannot be read")


def test_contradictions_carry_the_line_of_their_key(write):
    path = write(GOOD.replace("global_batch_size: 8", "global_batch_size: 8\n  micro_batch_size: 3"))
    errors = problems(SFTStage, path, ["--optim.lr=-1"])
    assert [e.where for e in errors] == ["--optim.lr on the command line", f"{path}:8"]


def test_a_value_that_cannot_be_read_raises_no_second_problem(write):
    path = write(GOOD + "parallel:\n  tensor_model_parallel_size: two\n  sequence_parallel: true\n")
    (error,) = problems(SFTStage, path, [])
    assert error.what == "parallel.tensor_model_parallel_size = 'two'"


def test_everything_at_once(write):
    path = write(
        GOOD.replace("  path: models/toy\n", "").replace("lr: 1e-5", "lr: fast") + "logging:\n  tensorbord: true\n"
    )
    errors = problems(SFTStage, path, ["--train.seed", "x", "--model.dtype", "fp16", "stray", "--train.output_dir"])
    assert len(errors) == 7


def test_positional_yaml_is_explained():
    (error,) = problems(SFTStage, None, [*MINIMAL["sft"], "--data.packing=true", "run.yaml"])
    assert error.what == "unexpected argument 'run.yaml'" and error.fix == "--config run.yaml"


def test_flag_of_a_section_lists_its_keys():
    (error,) = problems(DPOStage, None, [*MINIMAL["dpo"], "--dpo", "0.1"])
    assert error.what == "dpo is a section" and "--dpo.beta" in error.expected


@pytest.mark.parametrize("stage", STAGES)
def test_round_trip(stage, write):
    config = load_config(STAGES[stage], None, MINIMAL[stage])
    assert load_config(STAGES[stage], write(dump_yaml(config)), []) == config


def test_round_trip_of_awkward_values(write):
    config = load_config(SFTStage, None, MINIMAL["sft"])
    for text in ("none", "123", "1e-5", "a: b # c", "true", "~", "ünïcode", "x" * 300):
        data, optim = dataclasses.replace(config.data, eval=text), dataclasses.replace(config.optim, lr=1.5e-7)
        odd = dataclasses.replace(config, data=data, optim=optim)
        assert load_config(SFTStage, write(dump_yaml(odd)), []) == odd
    generate = load_config(GenerateStage, None, [*MINIMAL["generate"], "--input_template=Q: {input}\nA:"])
    assert load_config(GenerateStage, write(dump_yaml(generate)), []) == generate


def test_diff():
    a = load_config(SFTStage, None, MINIMAL["sft"])
    b = load_config(
        SFTStage, None, [*MINIMAL["sft"], "--train.seed", "2", "--data.eval", "e", "--data.packing", "false"]
    )
    assert diff(a, a) == []
    assert diff(a, b) == ["data.eval: null -> e", "data.packing: true -> false", "train.seed: 1 -> 2"]


@pytest.mark.parametrize("stage", STAGES)
def test_help_shows_every_option(stage):
    text = help_text(stage)
    known = options_of(STAGES[stage])
    assert all(f"--{key} {opt.type_name} (" in text and opt.help.split()[0] in text for key, opt in known.items())


def test_score_has_options_of_its_own_and_of_a_section():
    config = load_config(
        ScoreStage, None, [*MINIMAL["score"], "--parallel.tensor_model_parallel_size", "2", "--padding-side", "left"]
    )
    assert config.parallel.tensor_model_parallel_size == 2 and config.padding_side == "left"


@pytest.mark.parametrize("text", ["a: &x [*x]\n", "a: " + "[" * 3000 + "]" * 3000 + "\n"])
def test_a_file_without_an_end(write, text):
    with pytest.raises(MrlhfError, match="nested too deeply, or an alias refers to itself"):
        load_config(SFTStage, write(text), [])


def test_a_source_that_refers_to_itself():
    (error,) = problems(SFTStage, None, [*MINIMAL["sft"], "--data.train", "[&x [*x]]"])
    assert error.what == "data.train = [&x [*x]] (not valid YAML)"


@pytest.mark.parametrize("stage", ["pretrain", "sft", "rm", "dpo", "ppo"])
def test_a_saved_configuration_is_read_back_as_the_run_read_it(write, stage):
    blend = "[{prefix: a, weight: 0.7}, {prefix: b, weight: 0.3, epochs: 2}]"
    config = load_config(STAGES[stage], None, [*MINIMAL[stage], "--data.train", blend, "--data.eval", "null"])
    values = saved_values(Path(write(dump_yaml(config))))
    assert values["data.train"] == config.data.train == (DataSource("a", 0.7), DataSource("b", 0.3, 2.0))
    assert values["data.eval"] is None and values["optim.lr"] == 1e-5
    assert set(values) == set(options_of(STAGES[stage]))


def test_a_configuration_of_another_version_is_read_as_far_as_it_is_known(write, tmp_path):
    optim = "optim: {lr: -1, lrs: 2, min_lr: 0.5}\n"
    text = f"data:\n  train: a\n  trains: b\n  evl: c\n  eval: d\n{optim}other: {{x: 1}}\ntrain:\n"
    values = saved_values(Path(write(text)))
    assert values == {"data.train": (DataSource("a"),), "data.eval": "d", "optim.min_lr": 0.5}
    assert saved_values(Path(write(""))) == {} == saved_values(tmp_path / "none.yaml")


def test_names_of_other_trainers_lead_to_options_that_exist():
    options = {key for stage in STAGES.values() for key in options_of(stage)}
    assert {key for keys in names.OPTIONS.values() for key in keys} <= options
    for theirs, ours in (("learning_rate", "optim.lr"), ("per_device_train_batch_size", "train.micro_batch_size"),
                         ("bf16", "model.dtype bfloat16"), ("num_generations", "rollout.n")):  # fmt: skip
        (error,) = problems(STAGES["ppo"], None, [*MINIMAL["ppo"], f"--{theirs}", "1"])
        assert error.what.endswith(f"; did you mean '--{ours}'?"), error.what


def test_a_default_is_no_fix_of_another_value():
    (error,) = problems(SFTStage, None, [*MINIMAL["sft"], "--parallel.tensor_model_parallel_size", "2.5"])
    assert error.fix is None and error.expected == "int >= 1"
