"""A calculator as an environment: `rollout.environment: examples/calculator/calculator.py:Calculator`.

The model is asked for a product that it cannot work out. It may write `calc 57*83` and is told the result by a message
of the role `tool`; anything else is its answer. The reward is 1 for the right answer, at the end. The prompt's label is
the right answer.
"""

from __future__ import annotations

import re
from typing import Any

CALL = re.compile(r"calc (\d{1,6})\*(\d{1,6})")


class Calculator:
    """One conversation."""

    def reset(self, record: dict[str, Any]) -> None:
        self.answer = str(record["label"])

    def step(self, messages: list[dict[str, Any]], text: str) -> tuple[dict[str, str], float, bool]:
        call = CALL.fullmatch(text)
        if call is None:
            return {}, float(text == self.answer), True
        return {"role": "tool", "content": str(int(call[1]) * int(call[2]))}, 0.0, False
