"""Cut points of graded preferences: the thresholds on a score's difference that tell "slightly" from "clearly"."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize, special

from steerwell.data.errors import InputError


def fit_cutpoints(
    margins: Sequence[float] | np.ndarray, strengths: Sequence[float] | np.ndarray, levels: int = 3
) -> tuple[float, ...]:
    """The likeliest cut points 0 < c_1 < ... < c_K of the proportional-odds model (McCullagh 1980), symmetric about 0.

    ``margins`` (M,) are score differences, first completion less second; ``strengths`` (M,) the verdicts from the
    first one's side: positive where it was preferred, 0 for a tie, rounded to whole numbers between -K and K.
    P(y >= k) = s(margin - c_k) and P(y <= -k) = s(-margin - c_k).

    Raises :class:`InputError` for unequal lengths, numbers that are not finite, and a level that no pair has: its cut
    points could be anywhere.
    """
    m, y = np.asarray(margins, dtype=np.float64), np.asarray(strengths, dtype=np.float64)
    if m.ndim != 1 or m.shape != y.shape or not (np.isfinite(m).all() and np.isfinite(y).all()):
        raise InputError("margins and strengths must be finite numbers, one strength for each margin")
    level = np.clip(np.round(np.abs(y)), 0, levels).astype(int)
    for k in range(levels + 1):
        if not (level == k).any():
            raise InputError(
                f"no pair has strength {k}, so its cut points are unknown",
                mend=f"Give fewer levels than {levels}, or more pairs.",
            )
    side = np.where(y < 0, -m, m)  # seen from the preferred side; a tie from either

    def negative(theta: np.ndarray) -> float:
        cuts = np.cumsum(np.exp(theta))
        lower = np.concatenate([-cuts[:1], cuts])[level]
        upper = np.concatenate([cuts, [np.inf]])[level]
        return -float(
            np.log(np.maximum(special.expit(upper - side) - special.expit(lower - side), 1e-300)).sum()
        )

    shares = np.cumsum(np.bincount(level, minlength=levels + 1) / len(level))[:-1]
    start = 2 * np.arctanh(np.clip(shares, 0.01, 0.99)) * max(1.0, float(np.std(m)))
    steps = np.log(np.maximum(np.diff(np.concatenate([[0.0], start])), 1e-3))
    found = optimize.minimize(negative, steps, method="BFGS")
    return tuple(float(cut) for cut in np.cumsum(np.exp(found.x)))


__all__ = ["fit_cutpoints"]
