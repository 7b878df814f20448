"""Removes secrets from what a run writes down: by the name of the field, or by how the value looks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(
    r"(?i)(?:^|[._\-])(token|secret|password|passwd|api[_\-]?key|access[_\-]?key|credentials?|auth)$"
)
_VALUE = re.compile(r"hf_[A-Za-z0-9]{16,}|sk-[\w\-]{16,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,}"
                    r"|xox[abp]-[\w\-]{10,}|eyJ[\w\-]{10,}\.[\w\-]+\.[\w\-]+|(?<=://)[^/@\s]+(?=@)"
                    r"|(?i:(?<=bearer )\S+)|(?i:(?<=token=)[^&\s]+|(?<=api_key=)[^&\s]+)")


def redact(value: Any) -> Any:
    """The same structure with "<redacted>" for each secret: in mappings, lists of arguments, `name=value` and texts."""
    if isinstance(value, Mapping):
        secrets = {k for k, v in value.items() if v and isinstance(v, str) and SECRET_NAME.search(str(k))}
        return {k: "<redacted>" if k in secrets else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        cleaned: list[Any] = []
        for item in value:
            before = cleaned[-1] if cleaned and isinstance(cleaned[-1], str) else ""
            is_option = before.startswith("-") and "=" not in before and SECRET_NAME.search(before)
            is_secret = is_option and not str(item).startswith("--")
            cleaned.append("<redacted>" if is_secret else redact(item))
        return cleaned
    if isinstance(value, str):
        name, equals, _ = value.partition("=")
        if equals and SECRET_NAME.search(name):
            return f"{name}=<redacted>"
        return _VALUE.sub("<redacted>", value)
    return value
