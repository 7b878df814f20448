"""Tokenise, mask and pack raw data for training: python tools/preprocess_data.py --help

    python tools/preprocess_data.py --task sft --input chat.jsonl --tokenizer DIR --output-prefix data/sft \\
        --seq-length 4096

Exits with 0 when PREFIX.json was written, with 2 and the reasons when the input or the options do not fit.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mrlhf.data.prepare.job import preprocess  # noqa: E402
from mrlhf.data.prepare.options import PreprocessConfig  # noqa: E402
from mrlhf.errors import MrlhfError, SeveralErrors  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """An option for each field of PreprocessConfig, which holds the defaults and the help texts."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    hints = get_type_hints(PreprocessConfig)
    for option in fields(PreprocessConfig):
        hint = hints[option.name]
        plain = next((t for t in get_args(hint) if t is not type(None)), hint) if type(None) in get_args(hint) else hint
        settings: dict[str, Any] = {"help": option.metadata["help"].replace("%", "%%"), "default": option.default}
        if option.default is MISSING:
            settings = {"help": settings["help"], "required": True}
        elif option.default is not None and not isinstance(option.default, bool):
            settings["help"] += f" (default: {option.default})"
        if plain is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif get_origin(plain) is Literal:
            settings["choices"] = get_args(plain)
        elif get_origin(plain) is tuple:
            settings |= {"nargs": "+", "type": get_args(plain)[0]}
        else:
            settings["type"] = plain
        names = ["--" + option.name.replace("_", "-"), *(("--text-column",) if option.name == "text_key" else ())]
        made.add_argument(*names, **settings)
    return made


def main(argv: list[str] | None = None) -> int:
    values = vars(parser().parse_args(argv))
    values = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    if values["input_template"] is not None:  # a shell hands over backslash-n for the newline that is meant
        values["input_template"] = values["input_template"].replace("\\n", "\n").replace("\\t", "\t")
    try:
        preprocess(PreprocessConfig(**values), report=print)
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume continues", file=sys.stderr)
        return 130
    except MrlhfError as error:
        print(error if isinstance(error, SeveralErrors) else f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
