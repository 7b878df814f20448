"""Known advisories of the installed packages, by pip-audit; says so and ends well where no index answers.

pip-audit is not among the requirements: it is fetched into build/audit on the first use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "build" / "audit"
PATIENCE_S = 5  # with the index, for each package


def skip(why: str) -> int:
    print(f"pip-audit: skipped, {why}")
    return 0


def main() -> int:
    if not (TOOL / "pip_audit").is_dir():
        fetch = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--disable-pip-version-check",
            "--target",
            str(TOOL),
            "pip-audit",
        ]
        done = subprocess.run(fetch, check=False, timeout=300, capture_output=True, text=True)
        if done.returncode:
            return skip(f"it could not be installed ({_last_line(done.stderr)})")
    packages, report = next(p for p in sys.path if p.endswith("site-packages")), TOOL / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--timeout", str(PATIENCE_S),
               "--path", packages, "--format", "json", "--output", str(report)]  # fmt: skip
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(TOOL)}, check=False, timeout=600, capture_output=True, text=True
    )
    if report.is_file():
        return tell(json.loads(report.read_text())["dependencies"])
    if "connect" in done.stderr.lower():
        return skip(f"the index does not answer ({_last_line(done.stderr)})")
    sys.stderr.write(done.stderr)
    return done.returncode or 1


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no reason given"])[-1]


def tell(packages: list[dict[str, Any]]) -> int:
    """1 where an advisory is known of one of them."""
    audited = [p for p in packages if "skip_reason" not in p]
    if not audited:
        return skip(f"the index knows none of the {len(packages)} installed packages in these versions")
    found = [(p, v) for p in audited for v in p["vulns"]]
    for package, advisory in found:
        print(
            f"{package['name']} {package['version']}: {advisory['id']}, "
            f"mended in {', '.join(advisory['fix_versions']) or 'no version yet'}"
        )
    print(
        f"pip-audit: {len(found)} advisories of {len(audited)} packages; "
        f"{len(packages) - len(audited)} are not known to the index"
    )
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
