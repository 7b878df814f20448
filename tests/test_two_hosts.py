"""Two hosts: SFT and PPO over a network of their own, the cable cut or a host lost in mid-run,
and the same command again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import metrics, mrlhf
from hosts import Host, Node, cut_cable, join_cable, two_hosts, wait_for

PATIENCE_S = (
    150.0  # timeout_minutes, the half minute that the groups wait longer, and the ranks' and the agents' own ends
)


@pytest.fixture(scope="module")
def hosts() -> Iterator[tuple[Host, Host]]:
    try:
        with two_hosts() as made:
            yield made
    except OSError as error:
        pytest.skip(f"this machine gives no network namespaces: {error}")


def start(hosts: tuple[Host, Host], folder: Path, args: list[object], *, port: int) -> tuple[Node, Node]:
    first, second = (host.start(folder / f"host{host.number}_{port}.log", *args, port=port) for host in hosts)
    return first, second


def options(stage: str, out: Path, **values: object) -> list[object]:
    common = {
        "model.dtype": "float32",
        "train.output_dir": out,
        "checkpoint.save_interval": 1,
        "parallel.timeout_minutes": 0.25,
    }
    return [
        "-m",
        "mrlhf",
        stage,
        *(part for key, value in {**common, **values}.items() for part in (f"--{key}", value)),
    ]


def finish(hosts: tuple[Host, Host], folder: Path, args: list[object], *, port: int) -> tuple[Node, Node]:
    nodes = start(hosts, folder, args, port=port)
    assert [n.wait(200) for n in nodes] == [0, 0], nodes[0].text[-4000:] + nodes[1].text[-4000:]
    return nodes


@pytest.mark.soak
def test_sft_goes_on_after_the_cable_was_cut(hosts: tuple[Host, Host], world: Path, tmp_path: Path) -> None:
    more = {
        "model.path": world / "qwen2",
        "data.train": world / "sft",
        "train.global_batch_size": 2,
        "train.max_steps": 16,
        "train.num_epochs": 100,
        "optim.lr": 1e-3,
        "checkpoint.keep_last": 3,
    }
    args = options("sft", tmp_path / "run", **more)
    nodes = start(hosts, tmp_path, args, port=29611)
    wait_for(tmp_path / "run/checkpoints/step_3/mrlhf.json", *nodes)
    cut_cable()
    began = time.monotonic()
    status = [n.wait(PATIENCE_S) for n in nodes]
    join_cable()
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    print(f"both hosts ended {time.monotonic() - began:.0f} s after the cut, at step {steps[-1]}")
    assert all(status) and steps[-1] < 16
    for node in nodes:
        # what ends it first: a collective's time-out, the neighbour's silence, or the store of the other side
        assert any(
            said in node.text
            for said in ("Timed out", "timed out", "did not", "no sign of life", "does not answer any more")
        ), node.text[-4000:]
    last = finish(hosts, tmp_path, args, port=29612)
    assert "resumed from" in last[0].text
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(1, 17))
    mrlhf(*options("sft", tmp_path / "whole", **more, **{"checkpoint.save_interval": 0})[2:], ranks=2)
    assert [line["train/loss"] for line in lines] == [line["train/loss"] for line in metrics(tmp_path / "whole")]


@pytest.mark.soak
def test_ppo_goes_on_after_a_host_was_lost(hosts: tuple[Host, Host], world: Path, tmp_path: Path) -> None:
    (tmp_path / "length.py").write_text(
        "def length(completions, **columns):\n    return [len(c) / 10 for c in completions]\n"
    )
    more = {
        "model.path": world / "qwen2",
        "data.train": world / "prompts",
        "train.global_batch_size": 4,
        "train.max_steps": 4,
        "ppo.estimator": "rloo",
        "rollout.batch_size": 4,
        "rollout.n": 2,
        "rollout.samples_to_log": 8,
        "rollout.max_new_tokens": 8,
        "rollout.kv_cache_mib": 64,
        "reward.sources": f"{tmp_path}/length.py:length",
        "reward.function_timeout_s": 10,
        "reward.http_total_timeout_s": 10,
    }
    args = options("ppo", tmp_path / "run", **more)
    nodes = start(hosts, tmp_path, args, port=29613)
    wait_for(tmp_path / "run/checkpoints/step_1/mrlhf.json", *nodes)
    nodes[1].kill()
    began = time.monotonic()
    assert nodes[0].wait(PATIENCE_S) != 0
    steps = len(metrics(tmp_path / "run"))
    print(f"the other host ended {time.monotonic() - began:.0f} s after the loss, at step {steps}")
    assert steps < 4
    last = finish(hosts, tmp_path, args, port=29614)
    assert "resumed from" in last[0].text and [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    mrlhf(*options("ppo", tmp_path / "whole", **more)[2:], ranks=2)
    for step in range(1, 5):  # every prompt, answer and score of the run that lost nothing
        assert (tmp_path / f"run/samples/step_{step}.jsonl").read_text() == (
            tmp_path / f"whole/samples/step_{step}.jsonl"
        ).read_text()
    for ours, whole in zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True):
        assert "actor/grad_norm" in ours
        assert {k: ours[k] for k in ours if k.startswith(("actor/", "critic/"))} == {
            k: whole[k] for k in ours if k.startswith(("actor/", "critic/"))
        }
