"""Python files of the user's that a configuration names: `file.py:Name` (reward functions, environments).

Their code may do anything: raise what cannot be shown, or fork and let the child come back.
"""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
import traceback
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mrlhf.errors import ConfigError

_OTHERS_CODE = ("<", str(Path(__file__).resolve().parents[1]) + os.sep,
                *(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")))
_LONGEST_TEXT = 1000  # characters of an exception's text


@contextmanager
def user_code() -> Iterator[None]:
    """Around calls of the user's code: a child that it forks and that comes back leaves here, however it comes."""
    pid = os.getpid()
    try:
        yield
    finally:
        if os.getpid() != pid:
            os._exit(0)


def exception_text(error: BaseException) -> str:
    """`ZeroDivisionError: division by zero (rewards.py:12)`: the place is the user's own last line.

    Holds for exceptions with a text that is huge, raises an error itself, or is no valid Unicode.
    """
    try:
        text = str(error)
    except BaseException as own:
        text = f"its text raises {type(own).__name__}"
    text = text[:_LONGEST_TEXT] + "..." * (len(text) > _LONGEST_TEXT)
    places = [(f.f_code.co_filename, line) for f, line in traceback.walk_tb(error.__traceback__)]
    own_places = [place for place in places if not place[0].startswith(_OTHERS_CODE)]
    where = " ({}:{})".format(*own_places[-1]) if own_places else ""
    return printable(f"{type(error).__name__}: {text}{where}")


def printable(text: str) -> str:
    """The text with lone surrogates escaped: no encoding has them."""
    return text.encode("utf-8", "backslashreplace").decode()


def load_module(path_text: str, *, what: str) -> types.ModuleType:
    """Imports a file of the user's. Raises ConfigError, calling it `what`, if it is missing or does not import."""
    path = Path(path_text).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"{what} {path_text!r} does not exist (looked for {path})", expected="path/file.py:name")
    # named by path: two files may share a file name
    module_name = f"mrlhf_user_{path.stem}_{hashlib.sha1(str(path).encode()).hexdigest()[:8]}"
    loader = importlib.machinery.SourceFileLoader(module_name, str(path))
    spec = importlib.machinery.ModuleSpec(module_name, loader, origin=str(path))
    spec.has_location = True
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        with user_code():
            loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[module_name]
        raise ConfigError(f"{what} {path_text!r} does not import: {exception_text(error)}") from error
    return module
