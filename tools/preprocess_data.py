"""Tokenise, mask and pack raw data for training: python tools/preprocess_data.py --help

    python tools/preprocess_data.py --task sft --input chat.jsonl --tokenizer DIR --output-prefix data/sft \\
        --seq-length 4096

Exits with 0 when PREFIX.json was written, with 2 and the reasons when the input or the options do not fit.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mrlhf.commands.tool import naming_system_errors, until_closed  # noqa: E402
from mrlhf.config.process import raise_file_limit  # noqa: E402
from mrlhf.config.schema import options_of  # noqa: E402
from mrlhf.data.prepare.job import preprocess  # noqa: E402
from mrlhf.data.prepare.options import PreprocessConfig  # noqa: E402
from mrlhf.data.prepare.template import plain_template  # noqa: E402
from mrlhf.errors import MrlhfError, error_text  # noqa: E402

_TASK_OF = {
    "rm": "preference",
    "dpo": "preference",
    "reward": "preference",
    "ppo": "prompts",
    "grpo": "prompts",
    "rl": "prompts",
    "text": "pretrain",
    "chat": "sft",
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (--help lists every option)\n")


def _task(name: str) -> str:
    if name in _TASK_OF:
        raise argparse.ArgumentTypeError(f"the data of {name} is made with --task {_TASK_OF[name]}")
    return name


def parser() -> argparse.ArgumentParser:
    """An option for each field of PreprocessConfig, which holds the defaults and the help texts."""
    made = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    for name, option in options_of(PreprocessConfig).items():
        settings: dict[str, Any] = {"help": option.help.replace("%", "%%"), "required": option.required}
        if not option.required:
            settings["default"] = option.default
            if option.default is not None and option.kind is not bool:
                settings["help"] += f" (default: {option.default})"
        if option.kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif option.choices:
            settings |= {"choices": option.choices} | ({"type": _task} if name == "task" else {})
        else:
            settings |= {"type": option.kind} | ({"nargs": "+"} if option.several else {})
        names = ["--" + name.replace("_", "-"), *(("--text-column",) if name == "text_key" else ())]
        made.add_argument(*names, **settings)
    return made


def main(argv: list[str] | None = None) -> int:
    values = vars(parser().parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if values["input_template"] is not None:
        values["input_template"] = plain_template(values["input_template"])
    raise_file_limit()

    try:
        with naming_system_errors():
            preprocess(PreprocessConfig(**values), report=print)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    except MrlhfError as error:
        print(error_text(error), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(until_closed(main))
