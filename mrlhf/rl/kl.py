"""Per-token KL estimates against the reference policy, and the controllers of the KL coefficient beta.

Letters: B answers, T tokens. Log-probs are in nats.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mrlhf.errors import CheckpointError, ConfigError
from mrlhf.losses import check_choice, check_same_shape

KINDS = ("k1", "k2", "k3")
EXPONENT_LIMIT = 20.0


def kl_estimate(logps: Tensor, ref_logps: Tensor, *, kind: str, clamp: float | None = 10.0) -> Tensor:
    """Estimate of KL(policy || reference) for each sampled token (Schulman, "Approximating KL Divergence"). [B, T].

    With x = logp - ref_logp: k1 = x, k2 = x^2 / 2, k3 = exp(-x) - 1 + x, clamped to +-clamp (None: no clamp).
    Differentiable in logps, with finite gradients for any finite x.
    Raises ConfigError for an unknown kind, ValueError if shapes differ.
    """
    check_choice("kind", kind, KINDS)
    check_same_shape(logps=logps, ref_logps=ref_logps)
    x = logps.float() - ref_logps.float()
    if kind == "k1":
        estimate = x
    elif kind == "k2":
        estimate = x.square() / 2
    else:
        # without the limit exp overflows, and clamp's zero gradient times inf is NaN
        estimate = torch.expm1(-x.clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)) + x
    return estimate if clamp is None else estimate.clamp(-clamp, clamp)


class FixedKL:
    """A constant beta without state: on resume the configuration decides."""

    def __init__(self, value: float):
        _check_beta(value)
        self.value = value

    def update(self, kl: float, n: int) -> None:
        """Does nothing."""

    def state_dict(self) -> dict[str, float]:
        return {}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Does nothing."""


class AdaptiveKL:
    """beta <- beta (1 + clip(kl / target - 1, -0.2, 0.2) n / horizon) (Ziegler 2019, section 2.2).

    value: the current beta. target: the desired mean KL, in the unit of `update`'s kl. horizon: number of answers over
    which a lasting error of 20 % or more changes beta by 20 %.
    Raises ConfigError if value < 0, target <= 0 or horizon <= 0.
    """

    MAX_ERROR = 0.2

    def __init__(self, value: float, *, target: float, horizon: float):
        _check_beta(value)
        for name, number in (("target", target), ("horizon", horizon)):
            if not (math.isfinite(number) and number > 0):
                raise ConfigError(f"kl {name} = {number} is not positive", expected="a finite number > 0")
        self.value, self.target, self.horizon = value, target, horizon

    def update(self, kl: float, n: int) -> None:
        """kl: mean KL of the last rollout. n: its answers, over all ranks.

        Raises ConfigError if one update could make beta 0 or negative, ValueError if kl is not finite.
        """
        if not math.isfinite(kl):
            raise ValueError(f"cannot adapt the KL coefficient to kl = {kl}")
        if self.MAX_ERROR * n >= self.horizon:
            raise ConfigError(
                f"kl horizon = {self.horizon} is too short for {n} answers a step: one update could make beta negative",
                expected=f"more than {self.MAX_ERROR * n:g}", fix=f"set the horizon to {20 * n}"
            )
        error = min(max(kl / self.target - 1, -self.MAX_ERROR), self.MAX_ERROR)
        self.value *= 1 + error * n / self.horizon

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Raises CheckpointError unless an AdaptiveKL wrote the state."""
        if "value" not in state:
            what = "the checkpoint holds no adaptive KL coefficient"
            raise CheckpointError(what, fix="resume with the fixed coefficient it was trained with")
        self.value = float(state["value"])


def _check_beta(value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"kl coefficient = {value} is not a finite number >= 0")
