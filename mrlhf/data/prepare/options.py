"""The options of tools/preprocess_data.py, and the problems that can be seen without opening the data."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta

from mrlhf.config.options import REQUIRED, NonNegativeFloat, NonNegativeInt, PositiveInt, Seed, option
from mrlhf.config.schema import options_of
from mrlhf.data.prepare.formats import Columns
from mrlhf.data.prepare.ready_made import TEMPLATE_NAMES
from mrlhf.data.prepare.select import SPLIT_NAMES
from mrlhf.data.writer import OutputSet
from mrlhf.errors import ConfigError, DataError, MrlhfError
from mrlhf.observe.directory import directory_problem


@dataclass(frozen=True)
class PreprocessConfig:
    task: Literal["pretrain", "sft", "preference", "prompts"] = option(
        REQUIRED, "what the data is for (rm and dpo: preference, ppo: prompts)"
    )
    input: tuple[str, ...] = option(
        REQUIRED,
        "JSON lines (also .gz, .bz2, .zst), JSON arrays, parquet, globs, directories, HF datasets "
        "(DIR or id[@config][:split]), - for stdin",
    )
    tokenizer: str = option(REQUIRED, "directory (or hub id) of the HF tokenizer")
    output_prefix: str = option(REQUIRED, "the files written are PREFIX.bin, PREFIX.idx, ..., PREFIX.json")
    seq_length: Annotated[int, Meta(ge=2)] = option(REQUIRED,
                                                    "most tokens in a pack, and so in a sample; prompts: in a prompt")
    pack: bool = option(True, "several samples a pack; otherwise one sample (one pair) a pack")
    pack_order: Literal["shuffled", "length"] = option(
        "shuffled", "order of the packs in the file: by --seed, or longest samples first"
    )
    shuffle: bool = option(False,
                           "without packs (--no-pack, prompts): samples by --seed instead of in the order of the input")
    tokenizer_backend: Literal["auto", "hf", "gigatoken"] = option(
        "auto", "what encodes: gigatoken where it gives the tokenizer's own ids on a sample of the input, else hf"
    )
    verify_tokens: NonNegativeInt = option(
        2000, "texts of the input on which gigatoken must agree with hf before it is used; 0: none"
    )
    workers: PositiveInt | None = option(
        None, "processes that tokenise; the output does not depend on it (default: the usable cores)"
    )
    loss_on: Literal["last", "all"] = option("last", "train the assistant's last turn, or every one")
    truncate: Literal["error", "drop", "left", "right"] | None = option(
        None,
        "too long: stop, drop, keep the tail (left) or the head (right). Default: drop; pretrain: right, which splits "
        "and loses nothing",
    )
    on_empty: Literal["error", "drop"] = option("error", "rows with an empty text or turn: stop, or drop and count")
    chat_template: str | None = option(
        None, f"instead of the tokenizer's: a file with a Jinja chat template, or one of {', '.join(TEMPLATE_NAMES)}"
    )
    input_template: str | None = option(
        None, 'plain text with {} for the prompt instead of a chat template, like "User: {}\\nAssistant: "'
    )
    input_key: str | None = option(None, "column of the input (default: input; stands for the main column of any task)")
    output_key: str | None = option(None, "column of the answer (default: output)")
    prompt_key: str | None = option(None, "column of the prompt (default: prompt)")
    chosen_key: str | None = option(None, "column of the better answer (default: chosen)")
    rejected_key: str | None = option(None, "column of the worse answer (default: rejected)")
    label_key: str | None = option(None, "column handed to the reward function with a prompt (default: label)")
    margin_key: str | None = option(None, "column of a pair's margin (default: margin)")
    text_key: str | None = option(None, "column of a pretraining text; also --text-column (default: text)")
    messages_key: str | None = option(None, "column of a conversation (default: messages)")
    tools_key: str | None = option(None, "column of the tools a conversation may call (default: tools)")
    parse_special_in_text: bool = option(
        False, "read special tokens in the texts as special tokens instead of as text (prompt injection)"
    )
    append_eos: bool = option(True, "end texts, and chats whose template has no end token, with the tokenizer's eos")
    split: str | None = option(
        None,
        "fractions, like 0.98,0.01,0.01: PREFIX_train, PREFIX_valid, PREFIX_test by a hash of the prompt (or text)"
    )
    dedup: bool = option(False, "keep only the first of rows with the same content")
    limits: tuple[NonNegativeInt, ...] | None = option(None, "for each --input: its first rows only, so many; 0: all")
    weights: tuple[NonNegativeFloat, ...] | None = option(
        None, "for each --input: its share of the rows; the largest mixture without a repeated row is kept"
    )
    on_bad_row: Literal["error", "drop", "quarantine"] = option(
        "error", "rows that cannot be used: stop and show them, drop and count, or also write them to PREFIX_bad.jsonl"
    )
    seed: Seed = option(1, "order of the packs, choice of rows for --weights")
    resume: bool = option(False, "go on with an interrupted command; does nothing where it had finished")
    overwrite: bool = option(False, "replace an existing set; files of another kind in its place are refused")

    @property
    def columns(self) -> Columns:
        return Columns(**{f.name: getattr(self, f"{f.name}_key") for f in fields(Columns)})

    @property
    def fractions(self) -> tuple[float, ...]:
        """Of the splits; (1.0,) without. Raises ValueError where --split is not numbers."""
        return (1.0,) if self.split is None else tuple(float(part) for part in self.split.split(","))

    @property
    def prefixes(self) -> tuple[str, ...]:
        """One a split."""
        if self.split is None:
            return (self.output_prefix,)
        return tuple(f"{self.output_prefix}_{name}" for name, _ in zip(SPLIT_NAMES, self.fractions, strict=False))

    @property
    def how_to_truncate(self) -> str:
        return self.truncate or ("right" if self.task == "pretrain" else "drop")


def check_options(config: PreprocessConfig) -> list[MrlhfError]:
    """Every problem that can be seen without opening the data."""
    return [*_check_ranges(config), *_check_templates(config), *_check_columns(config), *_check_inputs(config),
            *_check_outputs(config)]


def _check_ranges(config: PreprocessConfig) -> list[ConfigError]:
    """Numbers outside of the range in their option's type."""
    errors = []
    for name, described in options_of(PreprocessConfig).items():
        value = getattr(config, name)
        values = value if isinstance(value, tuple) else () if value is None else (value,)
        if described.limits is not None and not all(map(described.accepts, values)):
            written = f"--{name.replace('_', '-')} {' '.join(map(str, values))}"
            expected = described.type_name.removesuffix(" or null").removesuffix(" ...")
            errors.append(ConfigError(written, expected=expected))
    return errors


def _check_templates(config: PreprocessConfig) -> list[ConfigError]:
    errors, template = [], config.chat_template
    if config.task == "prompts" and config.truncate == "right":
        what = "--truncate right would cut off the end of a prompt, where the answer begins"
        errors.append(ConfigError(what, expected="error, drop or left"))
    if template is not None and config.input_template is not None:
        errors.append(ConfigError("--chat-template and --input-template exclude each other", fix="leave one out"))
    if template is not None and template not in TEMPLATE_NAMES and not Path(template).is_file():
        expected = f"a Jinja file, or one of {', '.join(TEMPLATE_NAMES)}"
        errors.append(ConfigError(f"--chat-template {template}: no such file", expected=expected))
    return errors


def _check_columns(config: PreprocessConfig) -> list[ConfigError]:
    """One column in two roles would make wrong data: the worse answer as the prompt, for example."""
    columns = config.columns
    prompt = "prompt" if columns.prompt or not columns.input else "input"
    conversation = ["input", "output"] if columns.input and not columns.messages else ["messages"]
    roles = {"pretrain": [], "sft": conversation, "preference": [prompt, "chosen", "rejected", "margin"],
             "prompts": [prompt, "label"]}[config.task] + ["tools"]
    used = {role: getattr(columns, role) or role for role in roles}
    errors, flags = [], [role for role in roles if getattr(columns, role)]
    for flag in flags:
        others = [role for role, name in used.items() if name == used[flag] and role != flag]
        if others and (others[0] not in flags or flag < others[0]):
            what = f"column '{used[flag]}' is both {flag} and {others[0]}"
            errors.append(ConfigError(what, where=f"--{flag}-key", expected="a column of its own for each",
                                      fix=f"--{flag}-key COLUMN, or --{others[0]}-key COLUMN"))
    return errors


def _check_inputs(config: PreprocessConfig) -> list[ConfigError]:
    errors = [] if config.input else [ConfigError("no input files", fix="--input FILE")]
    for name, values in (("limits", config.limits), ("weights", config.weights)):
        if values is not None and len(values) != len(config.input):
            what = f"--{name} has {len(values)} numbers for {len(config.input)} arguments of --input"
            errors.append(ConfigError(what, expected="one for each, in their order"))
    if config.weights is not None and not any(config.weights):
        what = f"--weights {' '.join(map(str, config.weights))}"
        errors.append(ConfigError(what, expected="a weight above 0 for at least one input"))
    return errors


def _check_outputs(config: PreprocessConfig) -> list[MrlhfError]:
    try:
        fractions = config.fractions
    except ValueError:
        return [ConfigError(f"--split {config.split}", expected="up to three fractions, like 0.98,0.01,0.01")]
    errors: list[MrlhfError] = []
    too_many, sums_up = len(fractions) > len(SPLIT_NAMES), abs(sum(fractions) - 1) <= 1e-6
    if too_many or not sums_up or any(not 0 < f <= 1 for f in fractions):
        expected = "up to three fractions (train, valid, test), each above 0, that sum to 1"
        errors.append(ConfigError(f"--split {config.split}", expected=expected))
    problem = directory_problem(Path(config.output_prefix).parent, key="--output-prefix")
    errors += [] if problem is None else [problem]
    for prefix in () if config.resume else config.prefixes:
        try:
            OutputSet.refuse_existing(Path(prefix), overwrite=config.overwrite)
        except DataError as error:
            errors.append(error)
    return errors
