"""Neither data parallelism nor the micro-batch size nor packing changes an update of the actor."""

from __future__ import annotations

from pathlib import Path

import torch
from conftest import TESTS, python


def test_the_update_is_the_same_however_the_rollout_is_cut(world: Path, tmp_path: Path) -> None:
    program = TESTS / "rl/update_program.py"
    python(program, world, tmp_path / "one.pt")
    python(program, world, tmp_path / "two.pt", ranks=2)
    one, two = (torch.load(tmp_path / name, weights_only=True) for name in ("one.pt", "two.pt"))
    for results in (one, two):
        assert "disagree by more than rounding" in results.pop("fault")
    cases = {case for case, _, _ in one}
    assert cases == {"token", "sequence", "ptx"} and len(one) == len(two) == 12
    # a row of ptx.data is a pack or a sample: packing decides which, and so what is mixed in
    reference = {case: one[case, 1, True] for case in cases} | {"ptx, padded": one["ptx", 2, False]}
    for ranks, results in ((1, one), (2, two)):
        for (case, micro, packing), (change, log) in results.items():
            expected, expected_log = reference["ptx, padded" if case == "ptx" and not packing else case]
            scale = float(expected.abs().max())
            assert scale > 1e-6
            gap = float((change - expected).abs().max()) / scale
            assert gap < 1e-5, f"{case}, {ranks} ranks, micro {micro}, packing {packing}: {gap}"
            for key, value in expected_log.items():
                assert abs(log[key] - value) <= 1e-5 * max(1.0, abs(value)), (key, log[key], value)
    changes = [change / change.norm() for change, _ in reference.values()]
    assert all(float(a @ b) < 0.999 for i, a in enumerate(changes) for b in changes[:i]), (
        "the cases are different losses"
    )
    assert reference["ptx"][1]["ptx_loss"] > 1
