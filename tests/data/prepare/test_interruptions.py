"""Interrupted, starved and badly fed preprocessing:
whole output or none, the same bytes in the end, never a traceback or a hang.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import multiprocessing
import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mrlhf.data.indexed import PackedDataset
from mrlhf.data.prepare.job import preprocess
from mrlhf.data.prepare.options import PreprocessConfig
from mrlhf.data.prepare.workers import run_workers
from mrlhf.errors import DataError, EnvironmentProblem, SeveralErrors

ROOT = Path(__file__).resolve().parents[3]
spec = importlib.util.spec_from_file_location("preprocess_tool", ROOT / "tools" / "preprocess_data.py")
assert spec is not None and spec.loader is not None
tool = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tool)
FORK = multiprocessing.get_context("fork")


def chat(i: int, length: int = 20) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": f"question {i}"},
            {"role": "assistant", "content": f"answer {i} " * length},
        ]
    }


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """About 1 MB in two files: some 16 blocks."""
    path = tmp_path / "in"
    path.mkdir()
    for part in range(2):
        rows = [chat(i, 1 + i % 37) for i in range(1100 * part, 1100 * (part + 1))]
        (path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(corpus: Path, tmp_path: Path, bpe_dir: str) -> Callable[..., PreprocessConfig]:
    def make(prefix: str, **options: Any) -> PreprocessConfig:
        options = {"input": (str(corpus),), "workers": 2, **options}
        return PreprocessConfig(
            task="sft", tokenizer=bpe_dir, output_prefix=str(tmp_path / prefix), seq_length=256, **options
        )

    return make


def files(tmp_path: Path, prefix: str) -> dict[str, bytes]:
    return {f.name.removeprefix(prefix): f.read_bytes() for f in tmp_path.iterdir() if f.name.startswith(prefix)}


def in_child(call: Callable[[], Any], kill_after: float | None = None) -> int:
    """Exit code of `call` in a forked process, killed after so many seconds. Its own children must be gone as well."""

    def body() -> None:
        os.setpgid(0, 0)
        call()

    child = FORK.Process(target=body)
    child.start()
    assert child.pid is not None
    child.join(kill_after)
    if child.exitcode is None and kill_after is not None:
        os.kill(child.pid, signal.SIGKILL)
    child.join(120)
    for _ in range(100):
        try:
            os.killpg(child.pid, 0)
        except ProcessLookupError:
            break
        time.sleep(0.05)
    else:
        os.killpg(child.pid, signal.SIGKILL)
        raise AssertionError("workers outlive their parent")
    assert child.exitcode is not None
    return child.exitcode


def test_any_number_of_workers_gives_the_same_bytes(config: Callable[..., PreprocessConfig], tmp_path: Path) -> None:
    for workers in (1, 2, 4):
        preprocess(config(f"w{workers}_", workers=workers, split="0.9,0.05,0.05", dedup=True))
    one = files(tmp_path, "w1_")
    assert len(one) == 15 and one == files(tmp_path, "w2_") == files(tmp_path, "w4_")


@pytest.mark.slow
def test_killed_at_random_times_it_ends_with_the_same_bytes(
    config: Callable[..., PreprocessConfig], tmp_path: Path
) -> None:
    start = time.monotonic()
    preprocess(config("whole"))
    whole, seconds = files(tmp_path, "whole"), time.monotonic() - start
    rng, kills, resumed = random.Random(0), 0, 0
    while kills < 20:
        prefix = f"k{kills}_"
        while in_child(lambda p=prefix: preprocess(config(p, resume=True)), rng.uniform(0.0, 1.3 * seconds)):
            kills += 1
            if (tmp_path / f"{prefix}.json").exists():  # killed behind the last rename, before its end
                assert files(tmp_path, prefix) == whole
            resumed += any((tmp_path / f".{prefix}.work").glob("*.npz"))
            seconds *= 1.02  # gets there in the end, however slow the machine
        assert files(tmp_path, prefix) == whole and not (tmp_path / f".{prefix}.work").exists()
        kills += 1
    assert resumed >= 1


def test_killed_at_every_rename(
    config: Callable[..., PreprocessConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of shards and of the files of two splits."""
    options = {"workers": 1, "split": "0.9,0.1"}
    preprocess(config("whole", **options))
    whole, real = files(tmp_path, "whole"), os.replace
    at = 0
    while True:
        at += 1
        calls = 0

        def killing(source: Any, target: Any, at: int = at) -> None:
            nonlocal calls
            calls += 1
            if calls == at:
                os.kill(os.getpid(), signal.SIGKILL)
            real(source, target)

        monkeypatch.setattr(os, "replace", killing)
        prefix = f"r{at}_"
        status = in_child(lambda p=prefix: preprocess(config(p, **options)))
        monkeypatch.undo()
        if status == 0:
            break
        done = [name for name in ("train", "valid") if (tmp_path / f"{prefix}_{name}.json").exists()]
        assert "train" not in done
        for name in done:
            PackedDataset.open(tmp_path / f"{prefix}_{name}", verify=True)
        if at == 1 or at % 5 == 0 or done:
            preprocess(config(prefix, resume=True, **options))
            assert files(tmp_path, prefix) == whole
    assert at > 20


def test_finished_work_is_not_done_again(config: Callable[..., PreprocessConfig], tmp_path: Path) -> None:
    preprocess(config("a"))
    before = {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.glob("a*")}
    preprocess(config("a", resume=True))
    assert before == {f: (f.stat().st_mtime_ns, f.stat().st_ino) for f in tmp_path.glob("a*")}
    with pytest.raises(DataError, match="output exists already"):
        preprocess(config("a", resume=True, loss_on="all"))


def test_no_work_on_changed_input_is_used_again(
    config: Callable[..., PreprocessConfig], corpus: Path, tmp_path: Path, bpe_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Same names, same sizes, other content: the blocks that changed are done anew."""
    monkeypatch.setattr("mrlhf.data.prepare.job._assemble", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    assert in_child(lambda: preprocess(config("a"))) == -signal.SIGKILL
    monkeypatch.undo()
    path = corpus / "1.jsonl"
    path.write_text(path.read_text().replace("answer 1500 ", "ANSWER 1500 "))
    preprocess(config("a", resume=True))
    preprocess(config("b"))
    assert files(tmp_path, "a") == files(tmp_path, "b")
    (corpus / "2.jsonl").write_text(json.dumps(chat(0)) + "\n")
    (tmp_path / ".c.work").mkdir()
    monkeypatch.setattr("mrlhf.data.prepare.job._assemble", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    assert in_child(lambda: preprocess(config("c"))) == -signal.SIGKILL
    monkeypatch.undo()
    (corpus / "2.jsonl").unlink()
    with pytest.raises(DataError, match="other input files"):
        preprocess(config("c", resume=True))


def test_two_processes_do_not_write_one_output(
    config: Callable[..., PreprocessConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    started = FORK.Event()

    def waiting(*_: Any) -> None:
        started.set()
        time.sleep(60)

    monkeypatch.setattr("mrlhf.data.prepare.job._assemble", waiting)
    child = FORK.Process(target=lambda: preprocess(config("a")))
    child.start()
    assert started.wait(60)
    monkeypatch.undo()
    with pytest.raises(DataError, match="another process .* is writing"):
        preprocess(config("a", overwrite=True))
    child.kill()
    child.join()
    preprocess(config("a", resume=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_a_full_disk_is_said_and_can_be_resumed(
    workers: int, config: Callable[..., PreprocessConfig], tmp_path: Path
) -> None:
    """A limit on the size of a file gives the same error as a full disk does, EFBIG for ENOSPC."""
    for limit in (20_000, 200_000):  # in a shard, in the output

        def starved(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            with pytest.raises(EnvironmentProblem, match="the disk is full.*") as caught:
                preprocess(config("a", workers=workers, resume=True))
            assert "--resume" in (caught.value.fix or "")

        assert in_child(starved) == 0
        assert files(tmp_path, "a") == {}
    preprocess(config("a", workers=workers, resume=True))
    preprocess(config("b"))
    assert files(tmp_path, "a") == files(tmp_path, "b")


def test_workers_leave_ctrl_c_to_their_parent(tmp_path: Path) -> None:
    """Their tracebacks would hide its message."""

    def work(number: int, block: Any) -> dict[str, Any]:
        return {"ignored": signal.getsignal(signal.SIGINT) is signal.SIG_IGN}

    heads = list(run_workers(work, iter(["a", "b", "c"]), workers=2))  # type: ignore[arg-type, list-item]
    assert heads == [{"ignored": True}] * 3


def test_a_worker_that_dies_is_an_error(
    config: Callable[..., PreprocessConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mrlhf.data.prepare.workers.Work.__call__", lambda *a: os.kill(os.getpid(), signal.SIGKILL))
    with pytest.raises(EnvironmentProblem, match="a worker process died"):
        preprocess(config("a"))


# ---- bad input -----------------------------------------------------------------------------------


def bad_files() -> dict[str, tuple[bytes, str]]:
    good = json.dumps(chat(1)).encode() + b"\n"
    many = good * 2000
    return {
        "malformed.jsonl": (many + b'{"messages": [\n' + many, ":2001: not valid JSON"),
        "missing.jsonl": (many + b'{"text": "x"}\n', ":2001: column 'messages' is missing"),
        "bytes.jsonl": (many + b'{"messages": "\xff\xfe"}\n', ":2001: not valid JSON"),
        "twice.jsonl": (good + b'{"messages": [], "messages": []}\n', ":2: column 'messages' stands twice"),
        "inner.jsonl": (
            good + good.replace(b'"role": "user"', b'"role": "system", "role": "user"'),
            ":2: column 'role' stands twice",
        ),
        "surrogate.jsonl": (good + good.replace(b"question", b"\\ud800"), ":2: "),
        "list.jsonl": (good + b"[1, 2]\n", ":2: the row is a list"),
        "cut.jsonl.gz": (gzip.compress(many)[:-9], "cut.jsonl.gz: cannot be read"),
        "blank.jsonl": (b"\n\n  \n", "nothing is left of 0 rows"),
        "bom.jsonl": (b"\xef\xbb\xbf", "nothing is left of 0 rows"),
        "deep.jsonl": (good + b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", ":2: not valid JSON"),
    }


@pytest.mark.parametrize("name", bad_files())
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_ends_with_status_2_and_its_place(
    name: str, workers: int, tmp_path: Path, bpe_dir: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data, message = bad_files()[name]
    path = tmp_path / name
    path.write_bytes(data)
    arguments = [
        "--task",
        "sft",
        "--input",
        str(path),
        "--tokenizer",
        bpe_dir,
        "--output-prefix",
        str(tmp_path / "out"),
        "--seq-length",
        "512",
    ]
    assert tool.main([*arguments, "--workers", str(workers)]) == 2
    text = capfd.readouterr().err
    assert message in text and name in text and "Traceback" not in text
    assert not list(tmp_path.glob("out*")) and not list(tmp_path.glob(".out*"))


def test_bad_rows_are_dropped_or_kept_apart_when_asked(tmp_path: Path, bpe_dir: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(
        b"".join(json.dumps(chat(i)).encode() + b"\n" for i in range(5))
        + b'{"x": 1}\n\xff\n'
        + json.dumps(chat(6)).encode()
    )
    base = {"task": "sft", "input": (str(path),), "tokenizer": bpe_dir, "seq_length": 512}
    dropped = preprocess(PreprocessConfig(**base, output_prefix=str(tmp_path / "a"), on_bad_row="drop"))[
        str(tmp_path / "a")
    ]
    assert dropped["drops"] == {"bad row (json)": 1, "bad row (missing:messages)": 1}
    assert dropped["num_kept"] == 6 and dropped["num_rows"] == 8 and not (tmp_path / "a_bad.jsonl").exists()
    preprocess(PreprocessConfig(**base, output_prefix=str(tmp_path / "b"), on_bad_row="quarantine"))
    bad = [json.loads(line) for line in (tmp_path / "b_bad.jsonl").read_text().splitlines()]
    assert [(row["line"], row["file"]) for row in bad] == [(6, str(path)), (7, str(path))]
    assert bad[0]["row"] == '{"x": 1}' and bad[1]["row"] == "\\xff" and "missing" in bad[0]["problem"]


pieces = st.one_of(
    st.binary(max_size=40),
    st.sampled_from(
        [
            b"{}",
            b"null",
            b'"\\ud800"',
            b"\x00",
            b'{"messages": null}',
            b'{"messages": [{}]}',
            b"[[[[",
            b'{"a":',
            b"1e999",
            b"NaN",
        ]
    ),
    st.text(max_size=20).map(lambda t: json.dumps({"messages": t}).encode()),
    st.builds(
        lambda role, content: json.dumps(
            {"messages": [{"role": "user", "content": "q"}, {"role": role, "content": content}]}, ensure_ascii=False
        ).encode("utf-8", "surrogatepass"),
        st.sampled_from(["assistant", "user", "", "tool", None, 3]),
        st.one_of(
            st.text(max_size=30),
            st.none(),
            st.integers(),
            st.lists(st.text(max_size=3), max_size=2),
            st.just("\ud800"),
            st.just("\x00"),
        ),
    ),
)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(pieces, min_size=1, max_size=12), newline=st.sampled_from([b"\n", b"\r\n"]))
def test_fuzzed_rows_are_samples_drops_or_problems(
    rows: list[bytes], newline: bytes, tmp_path: Path, bpe_dir: str
) -> None:
    path = tmp_path / "fuzz.jsonl"
    path.write_bytes(json.dumps(chat(0)).encode() + b"\n" + newline.join(rows))
    prefix = tmp_path / "fuzz"
    base = {
        "task": "sft",
        "input": (str(path),),
        "tokenizer": bpe_dir,
        "seq_length": 256,
        "output_prefix": str(prefix),
        "overwrite": True,
    }
    base["tokenizer_backend"] = "hf"  # its comparison would be repeated for every example
    meta = preprocess(PreprocessConfig(**base, on_bad_row="drop", on_empty="drop"))[str(prefix)]
    assert meta["num_kept"] + sum(meta["drops"].values()) == meta["num_rows"]
    data = PackedDataset.open(prefix, verify=True)
    end = meta["end_token_id"]
    for i in range(data.num_samples):
        ids, mask = data.tokens(i), data.mask(i)
        assert mask[-1] == 1 and ids[-1] == end and mask[0] == 0 and ids.max() < meta["vocab_size"]
    if meta["num_kept"] < meta["num_rows"] and any("bad row" in cause for cause in meta["drops"]):
        with pytest.raises((DataError, SeveralErrors)):
            preprocess(PreprocessConfig(**base, on_empty="drop"))


def test_a_row_of_ten_megabytes(tmp_path: Path, bpe_dir: str) -> None:
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(chat(0)) + "\n" + json.dumps(chat(1, 1_000_000)) + "\n" + json.dumps(chat(2)) + "\n")
    prefix = str(tmp_path / "out")
    meta = preprocess(
        PreprocessConfig(task="sft", input=(str(path),), tokenizer=bpe_dir, seq_length=512, output_prefix=prefix)
    )[prefix]
    assert meta["drops"] == {"too_long": 1} and meta["num_samples"] == 2
