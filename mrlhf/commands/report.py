"""`mrlhf report RUN_DIR [RUN_DIR ...] [--output report.html]`: curves and samples of finished runs as one HTML file."""

from __future__ import annotations

from pathlib import Path

from mrlhf.config.process import torchrun_rank
from mrlhf.errors import ConfigError
from mrlhf.observe.report import build_report

USAGE = "RUN_DIR [RUN_DIR ...] [--output report.html]"


def main(args: list[str]) -> int:
    """Writes the report on rank 0 and prints its path. Raises ConfigError for a wrong command line."""
    is_rank_0 = torchrun_rank() == 0
    if "--help" in args or "-h" in args:
        if is_rank_0:
            print(f"usage: mrlhf report {USAGE}")
        return 0
    dirs, output = _parse_args(args)
    names = [d.resolve().name for d in dirs]
    runs = {name if names.count(name) == 1 else str(d): d for name, d in zip(names, dirs, strict=True)}
    if is_rank_0:
        print(build_report(runs, output, extra=None))
    return 0


def _parse_args(args: list[str]) -> tuple[list[Path], Path]:
    """The run directories and the HTML file to write (by default in the run's directory; for several runs, here)."""
    dirs: list[Path] = []
    output: str | None = None
    rest = iter(args)
    for arg in rest:
        if arg == "--output" or arg.startswith("--output="):
            output = arg.partition("=")[2] or next(rest, None)
            if not output:
                raise ConfigError("--output has no value", where="command line", expected="the HTML file to write")
        elif arg.startswith("-"):
            raise ConfigError(f"unknown key '{arg}'", where="command line", expected=USAGE)
        else:
            dirs.append(Path(arg))
    if not dirs:
        raise ConfigError("no run directory", where="command line", expected=f"mrlhf report {USAGE}")
    return dirs, Path(output) if output else dirs[0] / "report.html" if len(dirs) == 1 else Path("report.html")
