"""From comparisons within one group to one number per completion: Bradley–Terry strengths, or least squares.

Both give strengths on the scale of log-odds: the logistic function of ``s[i] - s[j]`` is the probability that i
is preferred to j. Only differences mean anything, so strengths are centred at 0.
"""

from __future__ import annotations

from collections.abc import Sequence

MAX_STEPS = 200
CLOSE_ENOUGH = 1e-10
LONGEST_STEP = 2.0  # nats; a longer one can end where all is saturated and no curvature is left


def bradley_terry(wins: Sequence[Sequence[float]], prior: float = 0.5) -> list[float]:
    """Strengths of K players by maximum likelihood of the Bradley–Terry model, K numbers with mean 0.

    ``wins[i][j]`` counts how often i was preferred to j; a tie is half a win for each, and counts may be
    fractions. The model is P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley and Terry, Biometrika 39, 1952). It
    is fitted by Newton's method.

    Prior: every player is given ``prior`` wins and ``prior`` losses that nobody saw, spread evenly over the
    other K - 1 players. So a player that never lost stays finite, and players that no chain of comparisons
    connects are drawn together rather than left without a common scale. For K = 2 the difference is
    log((w + prior) / (n - w + prior)), the log-odds of the smoothed share of n comparisons. (Others put a normal
    or gamma prior on the strengths, which has no such closed form.)

    Raises ValueError for a table that is not square, for counts below 0 and for a prior that is not above 0, and
    ArithmeticError should the method not come to its end.
    """
    import numpy as np

    k = len(wins)
    counts = np.asarray(wins, dtype=float) if k else np.zeros((0, 0))
    if counts.shape != (k, k):
        raise ValueError(f"wins must be a square table, got {counts.shape}")
    if not prior > 0 or not (counts >= 0).all():
        raise ValueError("prior must be above 0, and counts must not be below 0")
    if k < 2:
        return [0.0] * k
    counts = counts + prior / (k - 1)
    np.fill_diagonal(counts, 0.0)
    total = counts + counts.T
    rounding = 4 * np.finfo(float).eps * total.sum()
    strengths = np.zeros(k)
    for _ in range(MAX_STEPS):
        p = 0.5 + 0.5 * np.tanh((strengths[:, None] - strengths[None, :]) / 2)
        slope = (counts - total * p).sum(axis=1)
        weight = total * p * (1.0 - p)
        curvature = np.diag(weight.sum(axis=1)) - weight
        # a constant added to all strengths changes nothing; the constant matrix takes that freedom away
        step = np.linalg.solve(curvature + weight.sum() / k**2, slope)
        step *= LONGEST_STEP / max(float(np.abs(step).max()), LONGEST_STEP)
        strengths = strengths + step
        if np.abs(step).max() < CLOSE_ENOUGH or np.abs(slope).max() < rounding:
            break
    else:
        raise ArithmeticError(f"no Bradley–Terry strengths after {MAX_STEPS} steps of Newton's method")
    return (strengths - strengths.mean()).tolist()


def least_squares(
    log_odds: Sequence[Sequence[float | None]], weights: Sequence[Sequence[float]]
) -> list[float]:
    """Strengths whose differences come closest to given log-odds, K numbers with mean 0.

    ``log_odds[i][j]`` is the log-odds that i is preferred to j, or None where it is not known; only i < j is
    read. The sum of ``weights[i][j] * (s_i - s_j - log_odds[i][j])**2`` is least (HodgeRank,
    arXiv:0811.1067). With all pairs known and equal weights, s_i is the mean over all K of the log-odds against each,
    itself counted with 0. Players that no chain of comparisons connects are centred at 0 part by part.
    """
    import numpy as np

    k = len(log_odds)
    laplacian, flow = np.zeros((k, k)), np.zeros(k)
    for i in range(k):
        for j in range(i + 1, k):
            known = log_odds[i][j]
            if known is None:
                continue
            weight = weights[i][j]
            laplacian[[i, j], [i, j]] += weight
            laplacian[[i, j], [j, i]] -= weight
            flow[i] += weight * known
            flow[j] -= weight * known
    found = np.linalg.lstsq(laplacian, flow, rcond=None)[0] if k else flow
    return (found - found.mean()).tolist() if k else []


__all__ = ["bradley_terry", "least_squares"]
