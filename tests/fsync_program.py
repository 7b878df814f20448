"""`mrlhf ARGS` in this process, with every fsync and rename recorded; prints them in their order.

usage: fsync_program.py ARGS ...
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    from mrlhf import cli

    events: list[list[str]] = []

    def recorded(name: str, call: Callable[..., Any], describe: Callable[..., list[str]]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            event = [name, *describe(*args)]
            result = call(*args, **kwargs)
            events.append(event)
            return result

        return wrapper

    for name in ("fsync", "fdatasync"):
        setattr(os, name, recorded("fsync", getattr(os, name), lambda fd: [os.readlink(f"/proc/self/fd/{fd}")]))
    for name in ("rename", "replace"):
        setattr(os, name, recorded("rename", getattr(os, name), lambda old, new: [os.path.abspath(old), os.path.abspath(new)]))
    status = cli.main(sys.argv[1:])
    print("RESULT " + json.dumps(events))
    sys.exit(status)


if __name__ == "__main__":
    main()
