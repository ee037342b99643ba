"""Every number with its uncertainty: one number type and the few estimators that the reports use.

Units of resampling are *prompts*, not rows: two completions of one prompt, or two orders of one comparison,
are not two independent facts. Give ``clusters`` (one prompt id per value) wherever a prompt can appear twice.
``None`` is a missing value: it is left out and does not count in ``n``. NaN and infinity are errors.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import special

from steerwell.data.errors import InputError

Values = Sequence[float | None] | Sequence[bool | None] | Sequence[float] | np.ndarray
Clusters = Sequence[Hashable] | np.ndarray


@dataclass(frozen=True, slots=True)
class Estimate:
    """A value with its interval and the number of observations behind it.

    ``value`` is None when nothing was observed; ``low`` and ``high`` are also None when one observation (or
    one cluster) gives a value but says nothing about its uncertainty.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """The JSON form: exactly ``value``, ``low``, ``high``, ``n``."""
        return {"value": self.value, "low": self.low, "high": self.high, "n": self.n}

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Estimate:
        """Read the JSON form back."""
        return cls(value["value"], value["low"], value["high"], value["n"])

    def __str__(self) -> str:
        if self.value is None:
            return "no data"
        if self.low is None or self.high is None:
            return f"{self.value:.3g} (no interval, n {self.n})"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True, slots=True)
class McNemar:
    """Paired yes/no outcomes of the same items: who changed, and the exact two-sided p-value."""

    gained: int  # no before, yes after
    lost: int  # yes before, no after
    unchanged: int
    p_value: float


NOTHING = Estimate(None, None, None, 0)


def _clean(values: Values, clusters: Clusters | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Drop missing values; number the clusters from 0. Returns x (n,) and c (n,) or None."""
    if clusters is not None and len(clusters) != len(values):
        raise InputError(
            f"{len(values)} values but {len(clusters)} clusters",
            mend="Give one cluster (a prompt id) per value.",
        )
    kept = [i for i, v in enumerate(values) if v is not None]
    x = np.array([values[i] for i in kept], dtype=np.float64)
    if not np.isfinite(x).all():
        where = kept[int(np.flatnonzero(~np.isfinite(x))[0])]
        raise InputError(f"value {where} is not a finite number", mend="Write None for a missing value.")
    if clusters is None:
        return x, None
    codes: dict[Hashable, int] = {}
    labels = []
    for i in kept:
        label = clusters[i]
        if label is None or label != label:
            raise InputError(f"value {i} has no cluster", mend="Give every value the id of its prompt.")
        labels.append(codes.setdefault(label, len(codes)))
    return x, np.array(labels, dtype=np.int64)


def _critical(confidence: float, freedom: int | None = None) -> float:
    """The two-sided critical value: normal, or Student's t with ``freedom`` degrees."""
    if not 0 < confidence < 1:
        raise InputError(f"confidence must lie between 0 and 1, got {confidence}", mend="Write 0.95 for 95%.")
    tail = 0.5 + confidence / 2
    return float(special.ndtri(tail) if freedom is None else special.stdtrit(freedom, tail))


def _se(x: np.ndarray, c: np.ndarray | None) -> tuple[float, int]:
    """Standard error of the mean and the number of independent units C (needs C >= 2)."""
    n = len(x)
    residual = x - x.mean()
    sums = residual if c is None else np.bincount(c, weights=residual)
    units = len(sums)
    return float(np.sqrt(units / (units - 1) * (sums**2).sum()) / n), units


def standard_error(values: Values, clusters: Clusters | None = None) -> float | None:
    """Standard error of the mean; with ``clusters``, of the mean of dependent values.

    SE^2 = C/(C-1) * sum_c (sum_{i in c} (x_i - mean))^2 / n^2 (Miller 2024, arXiv:2411.00640, with the
    finite-cluster factor C/(C-1) that it leaves out). Without clusters this is sd(n-1)/sqrt(n).
    None when there are fewer than two independent units.
    """
    x, c = _clean(values, clusters)
    units = len(x) if c is None else len(np.unique(c))
    return _se(x, c)[0] if units >= 2 else None


def mean(values: Values, clusters: Clusters | None = None, *, confidence: float = 0.95) -> Estimate:
    """Mean with a t interval; with ``clusters``, the clustered standard error and C-1 degrees of freedom."""
    x, c = _clean(values, clusters)
    if not len(x):
        return NOTHING
    value = float(x.mean())
    if len(x) < 2 or (c is not None and c.max() == 0):
        return Estimate(value, None, None, len(x))
    se, units = _se(x, c)
    half = _critical(confidence, units - 1) * se
    return Estimate(value, value - half, value + half, len(x))


def _wilson(p: float, n: float, z: float) -> tuple[float, float]:
    """Wilson's score interval for a share p out of n (n may be an effective, fractional size)."""
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # at p = 0 and p = 1 the bound is exact; rounding must not push the value out of its own interval
    return min(p, max(0.0, float(centre - half))), max(p, min(1.0, float(centre + half)))


def proportion(outcomes: Values, clusters: Clusters | None = None, *, confidence: float = 0.95) -> Estimate:
    """Share of outcomes in [0, 1] with Wilson's score interval (Wilson 1927).

    Yes/no outcomes without clusters: exactly Wilson. Otherwise (clusters, or fractions such as ties counted
    as half) n is replaced by the effective size p(1-p)/SE^2, shrunk by (z/t)^2 for the estimated variance, as
    in Korn and Graubard (1998) and Dean and Pagano (2015). It never exceeds n for yes/no outcomes. For
    fractions, SE^2 is at least what one win and one loss among ties would give, so that "all ties" is not a
    certainty. When all outcomes are 0, or all 1, dependence can't be seen and each cluster counts once.
    """
    x, c = _clean(outcomes, clusters)
    n = len(x)
    if not n:
        return NOTHING
    if x.min() < 0 or x.max() > 1:
        raise InputError("an outcome lies outside [0, 1]", mend="Use mean() for scores.")
    p, z = float(x.mean()), _critical(confidence)
    binary = bool(np.isin(x, (0.0, 1.0)).all())
    units = n if c is None else int(c.max()) + 1
    if units < 2 and not (c is None and binary):
        return Estimate(p, None, None, n)
    if c is None and binary:
        effective = float(n)
    elif p in (0.0, 1.0):
        effective = float(units)
    else:
        variance = _se(x, c)[0] ** 2
        floor = p * (1 - p) / n if binary else 0.5 / (units * (units + 2))
        effective = p * (1 - p) / max(variance, floor) * (z / _critical(confidence, units - 1)) ** 2
    return Estimate(p, *_wilson(p, effective, z), n)


def win_rate(outcomes: Values, clusters: Clusters | None = None, *, confidence: float = 0.95) -> Estimate:
    """Share of comparisons won: 1 a win, 0 a loss, 0.5 a tie (other fractions: means of verdicts)."""
    return proportion(outcomes, clusters, confidence=confidence)


def combined(estimates: Sequence[Estimate], weights: Sequence[float]) -> Estimate:
    """The weighted mean of independent estimates, its interval from theirs (MOVER, Zou and Donner 2008).

    With w the weights over their sum: low = value − sqrt(sum w² (value_s − low_s)²), high alike. Where the
    parts have Wilson intervals, the whole is never certain, even when every part is all right or all wrong.
    NOTHING when a part with weight has no value; no interval when one has none. ``n`` is the sum.
    """
    if len(estimates) != len(weights) or not all(w >= 0 for w in weights):
        raise InputError("each estimate needs one weight of 0 or more", mend="Mend the weights.")
    parts = [(e, w) for e, w in zip(estimates, weights, strict=True) if w > 0]
    total = float(sum(w for _, w in parts))
    if not parts or any(e.value is None for e, _ in parts):
        return NOTHING
    value = sum(w * float(e.value or 0.0) for e, w in parts) / total
    n = sum(e.n for e, _ in parts)
    if any(e.low is None or e.high is None for e, _ in parts):
        return Estimate(value, None, None, n)
    below = sum((w * (float(e.value or 0.0) - float(e.low or 0.0))) ** 2 for e, w in parts) ** 0.5 / total
    above = sum((w * (float(e.high or 0.0) - float(e.value or 0.0))) ** 2 for e, w in parts) ** 0.5 / total
    return Estimate(value, value - below, value + above, n)


def paired_difference(
    after: Values,
    before: Values,
    clusters: Clusters | None = None,
    *,
    shares: bool = False,
    confidence: float = 0.95,
) -> Estimate:
    """Mean of ``after - before`` over the same items, with a t interval on the differences.

    An item that misses either value is left out, so both sides are always measured on the same items.
    ``shares``: both values lie in [0, 1]. Then the differences, moved to [0, 1], get the interval of
    :func:`proportion`: it stays within [-1, 1], and "nothing changed" on n items is not a certainty.
    """
    if len(after) != len(before):
        raise InputError(
            f"{len(after)} values after but {len(before)} before", mend="Pair the values item by item."
        )
    differences = [
        None if a is None or b is None else float(a) - float(b) for a, b in zip(after, before, strict=True)
    ]
    if not shares:
        return mean(differences, clusters, confidence=confidence)
    moved = proportion(
        [None if d is None else (1 + d) / 2 for d in differences], clusters, confidence=confidence
    )
    value, low, high = (None if v is None else 2 * v - 1 for v in (moved.value, moved.low, moved.high))
    return Estimate(value, low, high, moved.n)


def mcnemar(after: Values, before: Values) -> McNemar:
    """Exact McNemar test for paired yes/no outcomes: a sign test on the items that changed.

    Under "no difference" the gained items are Binomial(gained + lost, 1/2); two-sided p = 2 P(X <= min).
    """
    if len(after) != len(before):
        raise InputError(
            f"{len(after)} outcomes after but {len(before)} before", mend="Pair them item by item."
        )
    pairs = [
        (float(a), float(b)) for a, b in zip(after, before, strict=True) if a is not None and b is not None
    ]
    if any(v not in (0.0, 1.0) for pair in pairs for v in pair):
        raise InputError("McNemar's test needs yes/no outcomes", mend="Use paired_difference() for scores.")
    gained = sum(a > b for a, b in pairs)
    lost = sum(a < b for a, b in pairs)
    changed = gained + lost
    p_value = min(1.0, 2 * float(special.bdtr(min(gained, lost), changed, 0.5))) if changed else 1.0
    return McNemar(gained, lost, len(pairs) - changed, p_value)


def cluster_bootstrap(
    values: Values | np.ndarray,
    clusters: Clusters,
    statistic: Callable[[np.ndarray], float] | Literal["ratio"] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    method: Literal["bca", "percentile"] = "bca",
    confidence: float = 0.95,
) -> Estimate:
    """Interval of any statistic by resampling whole clusters (prompts) with replacement.

    ``values`` (n,) or (n, k) rows; ``statistic`` takes the resampled rows and returns a number (default: the
    mean of a (n,) array; ``"ratio"``: sum / sum of the columns of a (n, 2) array, the second one positive. These
    two are computed for all draws at once). The default interval is BCa (Efron 1987):
    it corrects the bias and skew that rates near 0 or 1 and ratios have, at the price of one jackknife. Plain
    bootstrap intervals are too narrow with few clusters, as the resampled spread is short of a factor
    sqrt((C-1)/C) and takes the normal for Student's t; both methods here widen the quantiles by exactly that
    (Hesterberg 2015, section 5.3). With fewer than two clusters there is no interval.
    """
    if isinstance(values, np.ndarray) and values.ndim == 2:
        rows = values.astype(np.float64)
        _, codes = _clean(np.zeros(len(rows)), clusters)
        if not np.isfinite(rows).all():
            raise InputError("a row has a value that is not finite", mend="Leave incomplete rows out.")
        if statistic is None or (statistic == "ratio" and rows.shape[1] != 2):
            raise InputError("rows of several columns need a statistic", mend="Give statistic=….")
    else:
        rows, codes = _clean(values, clusters)
    if not len(rows):
        return NOTHING
    assert codes is not None
    units = int(codes.max()) + 1
    rng = np.random.default_rng(seed)
    picks = rng.integers(units, size=(draws, units))
    if statistic is None or statistic == "ratio":
        above, below = (rows, np.ones(len(rows))) if rows.ndim == 1 else rows.T
        sums, counts = np.bincount(codes, weights=above), np.bincount(codes, weights=below)
        value = float(above.sum() / below.sum())
        drawn = sums[picks].sum(1) / counts[picks].sum(1)
        left_out = (sums.sum() - sums) / (counts.sum() - counts) if units > 1 else sums
    else:
        members = [np.flatnonzero(codes == k) for k in range(units)]
        value = float(statistic(rows))
        drawn = np.array([statistic(rows[np.concatenate([members[k] for k in pick])]) for pick in picks])
        left_out = np.array([statistic(rows[codes != k]) for k in range(units)]) if units > 1 else drawn
    if units < 2:
        return Estimate(value, None, None, len(rows))
    z = _critical(confidence, units - 1) * float(np.sqrt(units / (units - 1)))
    low, high = np.quantile(drawn, _quantiles(z, value, drawn, left_out, method))
    return Estimate(value, float(low), float(high), len(rows))


def _quantiles(z: float, value: float, drawn: np.ndarray, left_out: np.ndarray, method: str) -> np.ndarray:
    """The two bootstrap quantiles to read: plain, or moved for bias z0 and acceleration a (BCa)."""
    ends = np.array([-z, z])
    if method == "percentile":
        return special.ndtr(ends)
    below = float(np.mean(drawn < value) + np.mean(drawn == value) / 2)
    influence = left_out.mean() - left_out
    spread = float((influence**2).sum()) ** 1.5
    if not 0 < below < 1 or spread == 0:
        return special.ndtr(ends)
    z0, a = float(special.ndtri(below)), float((influence**3).sum()) / (6 * spread)
    moved = 1 - a * (z0 + ends)
    if (moved <= 0.1).any():  # so skewed that the correction has no meaning
        return special.ndtr(ends)
    return special.ndtr(z0 + (z0 + ends) / moved)


__all__ = [
    "NOTHING",
    "Estimate",
    "McNemar",
    "cluster_bootstrap",
    "combined",
    "mcnemar",
    "mean",
    "paired_difference",
    "proportion",
    "standard_error",
    "win_rate",
]
