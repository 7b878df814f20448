"""DAPO's soft overlong penalty (Yu 2025, eq. 13): 0 up to a length, then falling in a line to -1.

Use it beside another source, with a weight of its own: `examples/rewards/length_penalty.py:length_penalty`. The
signature of a reward function is explained in exact_match.py. MAX_TOKENS should equal the run's largest answer length.
"""

from __future__ import annotations

MAX_TOKENS = 1024
PENALISED_TOKENS = 256


def length_penalty(
    prompts: list[str], completions: list[str], *, completion_ids: list[list[int]], **columns: list
) -> list[float]:
    """0 for an answer of at most MAX_TOKENS - PENALISED_TOKENS tokens, -1 from MAX_TOKENS on, linear between."""
    start = MAX_TOKENS - PENALISED_TOKENS
    return [-min(max((len(ids) - start) / PENALISED_TOKENS, 0.0), 1.0) for ids in completion_ids]
