"""The table of advantage estimators, one row for each choice of `ppo.estimator`.

A new estimator is one function (rl/advantages.py has those below) and one row here. The option's choices, the checks of
the configuration, ppo, the advice on memory and the docs read the row. The table names functions as text and imports no
torch: `--help` lists it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pkgutil import resolve_name
from typing import Any


@dataclass(frozen=True)
class Estimator:
    """A row. function is "module:name": with a critic it has the signature of `advantages.gae`. Without one it shapes
    the scores of G groups of N answers to one prompt, function(scores_GN) -> [G, N]; the discounted token rewards are
    then the advantages.
    """

    name: str
    function: str
    formula: str  # for the docs: the advantage of an answer with score r in a group of n
    source: str
    needs_critic: bool = False
    needs_groups: bool = False  # compares the answers to one prompt: rollout.n of 2 or more
    whitens: bool = False  # ppo.whiten_advantages applies
    undiscounted: bool = False  # defined for ppo.gamma 1 only

    def resolve(self) -> Any:
        """The function itself; imports its module."""
        return resolve_name(self.function)


_GAE = (
    "delta_t = r_t + gamma V_(t+1) - V_t (V past the end is 0); A_t = delta_t + gamma lambda A_(t+1); "
    "return R_t = A_t + V_t"
)
_HERE = "mrlhf.rl.advantages"
_ROWS = (
    Estimator("gae", f"{_HERE}:gae", _GAE, "PPO, Schulman 2017; GAE, Schulman 2016", needs_critic=True, whitens=True),
    Estimator(
        "reinforce", f"{_HERE}:no_baseline", "A_t = r_t + gamma A_(t+1), whitened", "REINFORCE++, Hu 2025", whitens=True
    ),
    Estimator(
        "reinforce_baseline", f"{_HERE}:minus_group_mean", "as `reinforce`, with r - mean(group) for the score",
        "REINFORCE++-baseline, Hu 2025", needs_groups=True, whitens=True,
    ),
    Estimator(
        "rloo", f"{_HERE}:minus_mean_of_others", "r - mean(the others) for the score", "RLOO, Ahmadian 2024",
        needs_groups=True, undiscounted=True,
    ),
    Estimator(
        "grpo", f"{_HERE}:standardized_in_group", "(r - mean) / (std + 1e-6), std with n - 1", "GRPO, Shao 2024",
        needs_groups=True, undiscounted=True,
    ),
    Estimator(
        "dr_grpo", f"{_HERE}:minus_group_mean", "r - mean", "Dr. GRPO, Liu 2025", needs_groups=True, undiscounted=True,
    ),
)
ESTIMATORS = {row.name: row for row in _ROWS}


def markdown_table() -> str:
    """The table of docs/rl.md."""
    lines = [
        f"| `{row.name}` | {row.formula} | {2 if row.needs_groups else 1} or more | {row.source} |\n"
        for row in ESTIMATORS.values()
    ]
    head = "| `ppo.estimator` | of an answer with score r in a group of n | answers a prompt | source |\n"
    return head + "|---|---|---|---|\n" + "".join(lines)
