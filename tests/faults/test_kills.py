"""SIGKILL of a random rank at random moments, half of them inside a save, and in every phase of PPO:
the run goes on, and ends as the one never killed.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import TESTS, metrics
from conftest import run as run_command
from disks import empty, fill, small_disk

from faults.runs import Run, check_equal, kill_again_and_again, last, ppo, sft
from mrlhf.checkpoint.manifest import check_manifest as check_checkpoint
from mrlhf.checkpoint.manifest import read_manifest

SEED = 7


def check(whole: Run, broken: Run, kills: int) -> None:
    hit = kill_again_and_again(broken, kills, random.Random(SEED), steps=whole.steps())
    print(f"{broken.args[0]}, {broken.ranks} rank(s): killed {hit}")
    assert sum(hit.values()) >= kills - 1, "the run ended before it could be killed so often"
    assert hit["in a save"] >= kills // 2
    check_equal(whole.directory, broken.directory)


@pytest.fixture(scope="module")
def whole(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """SFT on two ranks that nobody disturbs."""
    args = sft(
        world,
        20,
        **{"checkpoint.async_save": "true", "checkpoint.verify": "hash", "checkpoint.on_save_error": "continue"},
    )
    undisturbed = Run(tmp_path_factory.mktemp("whole") / "run", args, ranks=2)
    undisturbed.finish()
    return undisturbed


def test_sft_on_two_ranks(whole: Run, tmp_path: Path) -> None:
    check(whole, Run(tmp_path / "broken", whole.args, ranks=2), 2)


def test_a_full_disk_does_not_end_a_run_that_may_go_on(whole: Run, tmp_path: Path) -> None:
    """Another program takes all of the disk in mid-run and gives it back when a save has failed and a line of metrics
    waits: nothing is missing.
    """
    try:
        with small_disk(tmp_path / "disk", 64) as disk:
            run = Run(disk / "run", whole.args, ranks=2)
            run.log = tmp_path / "log"
            run.start()
            assert run.until(lambda: run.steps() >= 3)

            def seen() -> bool:
                fill(disk)
                return (
                    "the run goes on without it" in run.output()
                    and "metrics.jsonl cannot be written: No space left" in run.output()
                )

            assert run.until(seen), run.output()[-4000:]
            empty(disk)
            assert run.wait() == 0, run.output()[-4000:]
            check_equal(whole.directory, run.directory)
    except OSError as error:
        pytest.skip(f"this process may not mount a small disk: {error}")


def test_ppo_uses_every_prompt_once_and_gives_the_same_answers(world: Path, tmp_path: Path) -> None:
    """Killed in a rollout, in a reward and in an update of the fourth step, and out of memory there, each time gone on
    with after the second: with all that PPO carries along. And SFT that runs out of memory in its third step."""
    more = {
        "checkpoint.save_interval": 2,
        "reward.overlong_buffer": 8,
        "reward.scaling": "running_std",
        "rollout.samples_to_log": 16,
        "ptx.coef": 0.1,
        "ptx.data": world / "sft",
        "ptx.batch_size": 2,
    }
    rows = {"data.packing": "false", "train.global_batch_size": 32, "train.micro_batch_size": 16}
    done = run_command(
        sys.executable,
        TESTS / "faults/phases_program.py",
        tmp_path,
        4,
        *ppo(world, 5, **more),
        "--",
        *sft(world, 5, **rows),
    )
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])
    log = (tmp_path / "broken.log").read_text()
    killed = {"gen": -9, "reward": -9, "update_actor": -9}
    assert {name: one["status"] for name, one in found.items()} == {
        "whole": 0,
        **killed,
        "memory": 2,
        "end": 0,
        "sft": 2,
    }, log[-4000:]
    assert not any(one["left"] for one in found.values()), "a process outlived its run"
    assert [line for line in log.splitlines() if line.startswith("killed in ")] == [
        f"killed in {p} of step 4" for p in ("gen", "reward", "update_actor")
    ]
    assert log.count("resumed from") == log.count(f"resumed from {tmp_path / 'broken/checkpoints/step_2'}") == 4
    check_out_of_memory(
        log,
        "update_critic of step 4",
        ["build", "gen", "reward", "logprobs", "values", "adv", "update_actor", "update_critic"],
    )
    assert "fix:      --rollout.kv_cache_mib 32 (now 64)" in log
    of_sft = (tmp_path / "sft.log").read_text()
    check_out_of_memory(of_sft, "step 3", ["build", "step", "save"])
    assert "fix:      --train.micro_batch_size 8 (now 16)" in of_sft and "--offload" not in of_sft + log
    assert [line["step"] for line in metrics(tmp_path / "sft")] == [1, 2], "nothing of the third step is left"
    assert last(tmp_path / "sft").name == "step_2" and check_checkpoint(last(tmp_path / "sft"), verify="hash")
    whole, broken = (
        [json.loads(line) for line in (tmp_path / name / "rollouts.jsonl").read_text().splitlines()]
        for name in ("whole", "broken")
    )
    assert [r["step"] for r in whole] == [1, 2, 3, 4, 5]
    assert [r["step"] for r in broken] == [1, 2, 3, *[3, 4], *[3, 4], *[3, 4], *[3, 4, 5]], "lost ones are drawn again"
    for drawn in broken:
        assert drawn == whole[drawn["step"] - 1], "the same prompts, the same answers"
    prompts = [row for r in whole for row in r["rows"]]
    assert sorted(prompts) == sorted(set(prompts)) and len(prompts) == 40 and all(len(r["sha256"]) == 16 for r in whole)
    check_equal(tmp_path / "whole", tmp_path / "broken")
    positions: list[Any] = [read_manifest(last(tmp_path / name))["data"] for name in ("whole", "broken")]
    assert positions[0] == positions[1] and positions[0][0]["consumed"] == 40
    for step in range(1, 6):
        assert len({(tmp_path / name / f"samples/step_{step}.jsonl").read_bytes() for name in ("whole", "broken")}) == 1


def check_out_of_memory(log: str, where: str, phases: list[str]) -> None:
    """One framed message, with what a person needs."""
    lines = log[log.index("OutOfMemory: ") :].splitlines()
    said = re.fullmatch(
        (
            rf"OutOfMemory: rank 0 \(CPU\) is out of memory in '{where}': "
            rf"([\d.]+) [KM]iB more were asked for \(at mrlhf/\S+\.py:\d+\)"
        ),
        lines[0],
    )
    assert said and float(said[1]) > 0, log[-4000:]
    peaks = dict(re.findall(r"(\w+) ([\d.]+) GiB", lines[1]))
    assert (
        lines[1].startswith("  peaks:    ")
        and set(phases) <= set(peaks)
        and all(0.1 < float(gib) < 20 for gib in peaks.values())
    ), lines[1]
    fixes = [line for line in lines if line.startswith("  fix:      --")]
    assert len(fixes) > 2 and "  fix:      --parallel.recompute full (now none)" in fixes
    assert log.count("OutOfMemory: ") == 1 and "Traceback" not in log


@pytest.mark.soak
def test_sft_many_times(world: Path, tmp_path: Path) -> None:
    undisturbed = Run(tmp_path / "whole", sft(world, 80, **{"checkpoint.async_save": "true"}), ranks=2)
    undisturbed.finish()
    check(undisturbed, Run(tmp_path / "broken", undisturbed.args, ranks=2), 18)


@pytest.mark.soak
def test_ppo_many_times(world: Path, tmp_path: Path) -> None:
    undisturbed = Run(tmp_path / "whole", ppo(world, 30), ranks=2)
    undisturbed.finish()
    check(undisturbed, Run(tmp_path / "broken", undisturbed.args, ranks=2), 12)
