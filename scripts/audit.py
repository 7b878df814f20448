"""Known advisories of the installed packages, by pip-audit; says so and ends well where no index answers.

pip-audit is not among the requirements: it is fetched into build/audit on the first use.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

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
    packages, report = next(p for p in sys.path if p.endswith("site-packages")), TOOL / "report.json"
    report.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pip_audit", "--progress-spinner", "off", "--path", packages, "--format", "json", "--output", str(report)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(TOOL)}, check=False, timeout=600)
    return tell(json.loads(report.read_text())["dependencies"]) if report.is_file() else done.returncode or 1


def tell(packages: list[dict[str, Any]]) -> int:
    """1 where an advisory is known of one of them."""
    audited = [p for p in packages if "skip_reason" not in p]
    if not audited:
        return skip(f"the index knows none of the {len(packages)} installed packages in these versions")
    found = [(p, v) for p in audited for v in p["vulns"]]
    for package, advisory in found:
        print(f"{package['name']} {package['version']}: {advisory['id']}, mended in {', '.join(advisory['fix_versions']) or 'no version yet'}")
    print(f"pip-audit: {len(found)} advisories of {len(audited)} packages; {len(packages) - len(audited)} are not known to the index")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
