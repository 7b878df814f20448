"""Python files of the user's that a configuration names: `file.py:Name` (reward functions, environments)."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.util
import sys
import types
from pathlib import Path

from mrlhf.errors import ConfigError


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
        loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise ConfigError(f"{what} {path_text!r} does not import: {type(error).__name__}: {error}") from error
    return module
