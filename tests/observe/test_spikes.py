"""What counts as a loss spike: by hand, on noise, on a level that stays, and through a resume."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest

from mrlhf.observe.loss_spikes import MIN_HISTORY, WINDOW, SpikeDetector, deviations, median_and_scale
from mrlhf.parallel import state
from mrlhf.training.run import report_spike


def test_by_hand() -> None:
    history = [1.0, 2.0, 3.0, 4.0, 100.0] * 4  # median 3; distances 2, 1, 0, 1, 97: their median 1
    assert median_and_scale(history) == (3.0, 1.4826)
    assert deviations(history, 3.0 + 2 * 1.4826) == pytest.approx(2)
    assert deviations(history[: MIN_HISTORY - 1], 1e9) == 0
    assert median_and_scale([2.0] * 30) == (2.0, 0.02)
    assert deviations([0.0] * 30, 1e-9) == math.inf and deviations([0.0] * 30, 0.0) == 0


def test_spikes_in_noise_are_found_and_nothing_else() -> None:
    """A falling, noisy loss with three spikes, two of them close together."""
    draw, detector, found = random.Random(1), SpikeDetector(6.0), []
    for step in range(2000):
        loss = 2.0 + 3.0 * math.exp(-step / 300) + draw.gauss(0, 0.05) + (1.0 if step in (500, 503, 1500) else 0.0)
        if detector.check_loss(loss):
            found.append(step)
    assert found == [500, 503, 1500]


def test_a_level_that_stays_is_soon_normal() -> None:
    detector = SpikeDetector(6.0)
    told = [bool(detector.check_loss(loss)) for loss in [1.0, 1.02] * 40 + [2.0, 2.02] * 40]
    assert told.index(True) == 80 and sum(told) < WINDOW and not any(told[80 + WINDOW :])


def test_what_a_checkpoint_keeps_goes_on_the_same() -> None:
    draw = random.Random(2)
    losses = [draw.gauss(1, 0.1) + (3 if i % 40 == 39 else 0) for i in range(200)]
    whole = SpikeDetector(6.0)
    expected = [whole.check_loss(loss) for loss in losses]
    assert sum(text is not None for text in expected) == 5
    first = SpikeDetector(6.0)
    start = [first.check_loss(loss) for loss in losses[:77]]
    resumed = SpikeDetector(6.0, first.recent)
    assert start + [resumed.check_loss(loss) for loss in losses[77:]] == expected
    assert resumed.check_loss(math.nan) is None and math.nan not in resumed.recent


def test_the_report_names_the_samples(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "on_any_rank", lambda flag: flag)  # of a world of one
    detector = SpikeDetector(6.0, [1.0, 1.1] * 20)
    trainer = SimpleNamespace(micro_batch_losses=lambda: [(9.0, (7, 3)), (4.0, (12,)), (1.0, (5,))])
    data = SimpleNamespace(prefix="data/sft")
    assert report_spike(detector, 1.05, step=41, trainer=trainer, data=data) == {"loss_spike": 0.0}  # type: ignore[arg-type]
    assert not capsys.readouterr().out
    assert report_spike(detector, 5.0, step=42, trainer=trainer, data=data) == {"loss_spike": 1.0}  # type: ignore[arg-type]
    line = capsys.readouterr().out
    assert line.startswith("loss spike at step 42: 5.0000, ") and line.count("\n") == 1
    assert line.endswith(
        "; micro-batches: 9.0000 with sample(s) 3, 7 of data/sft; 4.0000 with sample(s) 12 of data/sft\n"
    )
