"""From margins to probabilities: the temperature at which a reward model's margins say how often it is right.

The model of Bradley and Terry says P(first is better) = sigmoid(margin / temperature). The temperature is the
one free number (temperature scaling, Guo et al. 2017, arXiv:1706.04599, for two classes); it changes no order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import optimize, special

from steerwell.data.errors import InputError

Status = Literal["fitted", "separable", "no signal", "no data"]


@dataclass(frozen=True, slots=True)
class Temperature:
    """What :func:`fit_temperature` found. ``value`` is None where no positive finite temperature is best.

    ``status``: ``fitted``; ``separable`` (every margin is on the right side: the likelihood grows without
    end as the temperature falls to 0); ``no signal`` (the margins are right no more often than wrong: it
    grows as the temperature rises without end); ``no data`` (no margin differs from 0).
    ``log_loss`` is the mean negative log-likelihood in nats at ``value``, ``log_loss_before`` at 1.
    """

    value: float | None
    status: Status
    n: int
    log_loss: float | None
    log_loss_before: float | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {name: getattr(self, name) for name in self.__slots__}


def fit_temperature(
    margins: Sequence[float] | np.ndarray, outcomes: Sequence[float] | np.ndarray
) -> Temperature:
    """The temperature T > 0 of highest likelihood: sum of y log s(m/T) + (1 - y) log s(-m/T), s the sigmoid.

    ``margins`` (M,) are scores of the first completion less those of the second; ``outcomes`` (M,) the
    probability in [0, 1] that the first is better (1 where it was chosen, a soft label otherwise). In
    a = 1/T the likelihood is concave (a logistic regression with one slope and no intercept), so its root is
    the only one. Raises :class:`InputError` for unequal lengths, margins that are not finite, and outcomes
    outside [0, 1].
    """
    m, y = np.asarray(margins, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if m.ndim != 1 or m.shape != y.shape:
        raise InputError(
            f"{m.shape} margins but {y.shape} outcomes", mend="Give one outcome per margin, both flat."
        )
    if not np.isfinite(m).all():
        raise InputError("a margin is not a finite number", mend="Leave the pairs without a score out.")
    if not ((y >= 0) & (y <= 1)).all():
        raise InputError("an outcome lies outside [0, 1]", mend="1: the first is better, 0: the second.")
    before = _log_loss(m, y) if len(m) else None
    scale = float(np.abs(m).max()) if len(m) else 0.0
    if scale == 0:
        return Temperature(None, "no data", len(m), None, before)
    x = m / scale
    if float(x @ (y - 0.5)) <= 0:
        return Temperature(None, "no signal", len(m), None, before)
    moving = x[x != 0]
    if ((moving > 0) == (y[x != 0] == 1)).all() and np.isin(y[x != 0], (0.0, 1.0)).all():
        return Temperature(None, "separable", len(m), None, before)

    def slope(a: float) -> float:
        return float(x @ (y - special.expit(a * x)))

    high = 1.0
    while slope(high) > 0:
        high *= 2
    a = optimize.root_scalar(slope, bracket=(0.0, high), method="brentq", xtol=1e-14).root
    value = scale / a
    return Temperature(value, "fitted", len(m), _log_loss(m / value, y), before)


def win_probability(
    margins: Sequence[float] | np.ndarray, temperature: float | np.ndarray = 1.0
) -> np.ndarray:
    """P(first is better) = sigmoid(margin / temperature), (M,). Raises for a temperature of 0 or below."""
    if not (np.asarray(temperature) > 0).all():
        raise InputError(f"a temperature must be positive, got {temperature}", mend="1 changes nothing.")
    return special.expit(np.asarray(margins, dtype=np.float64) / temperature)


def _log_loss(m: np.ndarray, y: np.ndarray) -> float:
    return float(np.mean(np.logaddexp(0.0, m) - y * m))


__all__ = ["Status", "Temperature", "fit_temperature", "win_probability"]
