"""Rules that keep foreign input from running code, read from the sources; and paths and secrets."""

from __future__ import annotations

import ast
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT

SAFE_PICKLE = "mrlhf/checkpoint/safe_pickle.py"
WRITES_PICKLES = ("mrlhf/checkpoint/tensor_archive.py",)  # a tensor's description, as torch.save does
CALLS = {
    "eval", "exec", "compile", "os.system", "os.popen", "yaml.load", "yaml.load_all", "yaml.unsafe_load",
    "yaml.full_load", "marshal.loads", "shelve.open", "tarfile.open", "zipfile.extractall", "pickle.load",
    "pickle.loads", "pickle.Unpickler", "dill.load", "joblib.load", "numpy.load",
}  # fmt: skip
VALUES = {
    "weights_only": True,
    "shell": False,
    "allow_pickle": False,
    "trust_remote_code": False,
    "follow_redirects": False,
}
NEEDED = {"torch.load": "weights_only", "np.load": "allow_pickle"}  # whatever the default is
VARIABLES = (
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_SERVER_DEV_MODE",
    "HF_HUB_TRUST_REMOTE_CODE",
    "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD",
)


def problems(text: str) -> Iterator[str]:
    """What a source must not hold: `line: finding`."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call):
            name, given = ast.unparse(node.func), {k.arg: k.value for k in node.keywords}
            if name in CALLS:
                yield f"{node.lineno}: {name}"
            if name in NEEDED and NEEDED[name] not in given:
                yield f"{node.lineno}: {name} without {NEEDED[name]}"
            if (
                name.endswith("from_pretrained")
                and name.startswith(("Auto", "kind."))
                and "trust_remote_code" not in given
            ):
                yield f"{node.lineno}: {name} without trust_remote_code"
            if name.startswith("httpx") and "verify" in given:
                yield f"{node.lineno}: {name} with verify"
            for key, wanted in VALUES.items():
                if key in given and not (isinstance(given[key], ast.Constant) and given[key].value is wanted):
                    yield f"{node.lineno}: {key} is not {wanted}"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "")}
            for name in names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}:
                yield f"{node.lineno}: imports {name}"


def test_the_sources_keep_the_rules() -> None:
    found = []
    for folder in ("mrlhf", "tools", "scripts", "docs"):
        for file in (ROOT / folder).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            wrong = list(problems(file.read_text()))
            if name in WRITES_PICKLES:
                wrong = [w for w in wrong if not w.endswith("imports pickle")]
            found += [f"{name}:{w}" for w in wrong if name != SAFE_PICKLE]
            found += [f"{name}: {variable}" for variable in VARIABLES if variable in file.read_text()]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "torch.load(f)",
        "torch.load(f, weights_only=False)",
        "torch.load(f, weights_only=flag)",
        "np.load(f, allow_pickle=True)",
        "subprocess.run(c, shell=True)",
        "yaml.load(f, Loader=L)",
        "pickle.load(f)",
        "AutoTokenizer.from_pretrained(p)",
        "from pickle import loads",
        "eval(x)",
        "httpx.get(u, verify=False)",
    ],
)
def test_the_rules_find_what_they_forbid(text: str) -> None:
    assert list(problems(text))


def test_vllm_gets_no_remote_code_and_no_pickles_by_network() -> None:
    source = (ROOT / "mrlhf/rl/rollout/vllm_engine.py").read_text()
    call = next(n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Call) and ast.unparse(n.func) == "vllm.LLM")
    assert "trust_remote_code" in {k.arg for k in call.keywords}


def test_a_checkpoint_names_no_file_outside_of_it(tmp_path: Path) -> None:
    """Its list of files, the note of how an export is cut, and a HF index."""
    import torch

    from mrlhf.checkpoint.manifest import FORMAT, MANIFEST
    from mrlhf.checkpoint.source import open_source
    from mrlhf.errors import CheckpointError
    from mrlhf.models.hf_files import HEADERS, open_files, plan_output

    for name in ("../secret", "/etc/passwd", "hf/../../x"):
        (tmp_path / MANIFEST).write_text(json.dumps({"format": FORMAT, "head": "lm", "files": {name: 1}}))
        with pytest.raises(CheckpointError, match="outside"):
            open_source(str(tmp_path))
    for name in ("../x.safetensors", "/tmp/x.safetensors", "a/../x.safetensors", ".bashrc"):
        (tmp_path / HEADERS).write_text(json.dumps({"index": None, "files": {name: "{}"}}))
        with pytest.raises(CheckpointError, match="outside"):
            plan_output({"w": (torch.float32, (1,))}, tmp_path)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(CheckpointError, match="outside|no such|missing"):
            open_files(tmp_path)


def test_what_make_audit_tells(capsys: pytest.CaptureFixture[str]) -> None:
    """Of pip-audit's report: advisories fail it, and an index that knows nothing is no clean bill."""
    spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts/audit.py")
    assert spec is not None and spec.loader is not None
    audit = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(audit)
    clean, unknown = {"name": "a", "version": "1", "vulns": []}, {"name": "b", "skip_reason": "not on the index"}
    bad = {
        "name": "c",
        "version": "2",
        "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}, {"id": "CVE-2", "fix_versions": []}],
    }
    assert [audit.tell(report) for report in ([clean, unknown], [unknown, unknown], [clean, bad])] == [0, 0, 1]
    assert capsys.readouterr().out.splitlines() == [
        "pip-audit: 0 advisories of 1 packages; 1 are not known to the index",
        "pip-audit: skipped, the index knows none of the 2 installed packages in these versions",
        "c 2: CVE-1, mended in 3",
        "c 2: CVE-2, mended in no version yet",
        "pip-audit: 2 advisories of 2 packages; 0 are not known to the index",
    ]
