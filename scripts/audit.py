"""Known advisories of the installed packages, by pip-audit; says so and ends well where no index answers.

pip-audit is not among the requirements: it is fetched into build/audit on the first use.
"""

from __future__ import annotations

import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOL = ROOT / "build" / "audit"
INDEX = "https://pypi.org/pypi/pip/json"  # where pip-audit asks too
PATIENCE_S = 5.0


def skip(why: str) -> int:
    print(f"pip-audit: skipped, {why}")
    return 0


def main() -> int:
    try:
        with urllib.request.urlopen(INDEX, timeout=PATIENCE_S) as answer:
            answer.read(1)
    except (urllib.error.URLError, OSError) as error:
        return skip(f"the index does not answer ({getattr(error, 'reason', error)})")
    if not (TOOL / "pip_audit").is_dir():
        fetch = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--target", str(TOOL), "pip-audit"]
        if subprocess.run(fetch, check=False, timeout=300).returncode:
            return skip("it could not be installed")
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--path", packages]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": str(TOOL)}, check=False, timeout=600).returncode


if __name__ == "__main__":
    sys.exit(main())
