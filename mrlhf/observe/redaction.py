"""Secrets out of what is written down: by the name they go under, or by their look."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

SECRET_NAME = re.compile(r"(?i)(?:^|[._\-])(token|secret|password|passwd|api[_\-]?key|access[_\-]?key|credentials?|auth)$")
_VALUE = re.compile(
    r"hf_[A-Za-z0-9]{16,}|sk-[\w\-]{16,}|gh[opsur]_\w{16,}|github_pat_\w{16,}|AKIA[A-Z0-9]{12,}|xox[abp]-[\w\-]{10,}"
    r"|eyJ[\w\-]{10,}\.[\w\-]+\.[\w\-]+|(?<=://)[^/@\s]+(?=@)|(?i:(?<=bearer )\S+)|(?i:(?<=token=)[^&\s]+|(?<=api_key=)[^&\s]+)"
)


def redact(value: Any) -> Any:
    """The same structure without passwords: by the name they go under, or by their look."""
    if isinstance(value, Mapping):
        return {k: "<redacted>" if v and isinstance(v, str) and SECRET_NAME.search(str(k)) else redact(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        cleaned: list[Any] = []
        for item in value:
            before = cleaned[-1] if cleaned else None
            secret = isinstance(before, str) and before.startswith("-") and "=" not in before and SECRET_NAME.search(before)
            cleaned.append("<redacted>" if secret and not str(item).startswith("--") else redact(item))
        return cleaned
    if isinstance(value, str):
        name, equals, _ = value.partition("=")
        if equals and SECRET_NAME.search(name):
            return f"{name}=<redacted>"
        return _VALUE.sub("<redacted>", value)
    return value
