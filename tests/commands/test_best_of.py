from __future__ import annotations

from mrlhf.commands.best_of import Choice, choose_best_and_worst, pair_row, sft_row
from mrlhf.data.prepare.formats import Columns, normalise

PROMPT = [{"role": "user", "content": "q"}]


def test_choose() -> None:
    assert choose_best_and_worst(["a", "b", "c"], [1.0, 3.0, 0.0], [True] * 3) == Choice(1, 2)
    assert choose_best_and_worst(["a", "b", "c"], [1.0, 3.0, 0.0], [True, False, True]) == Choice(0, 2), (
        "a cut answer is not the best"
    )
    assert choose_best_and_worst(["a", "b", "c"], [1.0, 3.0, 0.0], [True, True, False]) == Choice(1, 2), (
        "but may be the worst"
    )
    assert choose_best_and_worst(["a", "b", "a"], [2.0, 2.0, 2.0], [True] * 3) == Choice(0, None), (
        "equal scores are no preference"
    )
    assert choose_best_and_worst(["a", "a"], [2.0, 1.0], [True] * 2) == Choice(0, None), "nor are equal texts"
    assert choose_best_and_worst(["a", " "], [2.0, 1.0], [True] * 2) == Choice(0, None), (
        "nor is an empty text an answer"
    )
    assert choose_best_and_worst(["a", ""], [1.0, 3.0], [False, True]) is None
    nearly = [2.0, 2.0000001, 1.9999999]
    assert choose_best_and_worst(["a", "b", "c"], nearly, [True] * 3, tolerance=1e-6) == Choice(0, None), "rounding"
    assert choose_best_and_worst(["a", "b", "c"], [2.0, 2.1, 1.0], [True] * 3, tolerance=1e-6) == Choice(1, 2)


def test_rows_are_what_preprocessing_takes() -> None:
    record = {"prompt": PROMPT, "tools": [{"name": "t"}], "label": 1}
    sample = normalise(sft_row(record, PROMPT, "yes", 1.0), "sft", Columns(), plain=False)
    assert sample.conversations[0] == [*PROMPT, {"role": "assistant", "content": "yes"}] and sample.tools == [
        {"name": "t"}
    ]
    sample = normalise(pair_row(record, PROMPT, "yes", "no", (1.0, 0.0)), "preference", Columns(), plain=False)
    assert [c[-1]["content"] for c in sample.conversations] == ["yes", "no"] and sample.tools == [{"name": "t"}]
    assert normalise(sft_row({}, "q", "yes", 1.0), "sft", Columns(), plain=True).conversations == (("q", "yes"),)
    assert normalise(pair_row({}, "q", "yes", "no", (1.0, 0.0)), "preference", Columns(), plain=True).conversations == (
        ("q", "yes"),
        ("q", "no"),
    )
