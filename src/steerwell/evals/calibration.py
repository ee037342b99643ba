"""Whether a reward model's margins say how often it is right: reliability, calibration error, Brier score.

A pair is looked at from the side that the model prefers: its confidence is sigmoid(|margin| / temperature), in
[0.5, 1], and it is right with the probability of the label (1, 0, a soft label, or 1/2 for equal scores).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from steerwell.data.calibration import fit_temperature, win_probability
from steerwell.evals import stats
from steerwell.evals.held_out_pairs import LENGTH_SIDES, HeldOutPair
from steerwell.evals.measure import Measure
from steerwell.evals.stats import NOTHING, Estimate
from steerwell.evals.winrate import Coverage

BINS = 10
PER_BIN = 20
LARGEST = 20.0  # an interval of the logarithm of the temperature that is wider than this says nothing


@dataclass(frozen=True)
class Bin:
    """One bin of a reliability table: mean confidence, and the share that was right with its interval."""

    low: float
    high: float
    confidence: float
    right: Estimate


@dataclass(frozen=True)
class Calibration:
    """The reliability of M pairs. ``ece`` = sum over bins of n_b / M · |right_b - confidence_b|.

    ``floor`` is the value that pairs of a perfectly calibrated model would show on average, by chance alone:
    with few pairs no calibration error is ever 0. ``brier`` = mean (P(preferred wins) - label)², of which
    ``squares`` has the terms by the key of the pair.
    """

    bins: tuple[Bin, ...]
    ece: Estimate
    floor: float | None
    brier: Estimate
    squares: tuple[tuple[str, float | None], ...] = ()


def calibration(
    pairs: Sequence[HeldOutPair],
    temperatures: float | Sequence[float] = 1.0,
    *,
    bins: int | None = None,
) -> Calibration:
    """Reliability at ``temperatures`` (one, or one per pair). Pairs without a score are left out.

    Bins hold equally many pairs, in order of confidence (equal scores in the order given): 10, or fewer so
    that each has 20 pairs. The interval of the calibration error is by the delta method, clustered by prompt
    with t quantiles: sum of sign_b · (right_i - confidence_i) / M. It ends at 0, and near ``floor`` the
    value says no more than that no error can be seen.
    """
    given = np.broadcast_to(np.asarray(temperatures, dtype=np.float64), (len(pairs),))
    kept = [i for i, pair in enumerate(pairs) if pair.margin is not None]
    if not kept:
        return Calibration((), NOTHING, None, NOTHING)
    m = np.array([pairs[i].margin for i in kept], dtype=np.float64)
    p = np.array([pairs[i].p for i in kept])
    prompts = [pairs[i].prompt for i in kept]
    wins = win_probability(m, given[kept])
    confidence = np.maximum(wins, 1 - wins)
    right = np.where(m == 0, 0.5, np.where(m > 0, p, 1 - p))
    count = bins or max(1, min(BINS, len(kept) // PER_BIN))
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, count) if len(part)]
    signed = np.zeros(len(kept))
    table, variance_of_gaps = [], []
    for part in parts:
        inside = [prompts[i] for i in part]
        several = len(set(inside)) < len(inside)
        table.append(
            Bin(
                float(confidence[part].min()),
                float(confidence[part].max()),
                float(confidence[part].mean()),
                stats.proportion(right[part], inside if several else None),
            )
        )
        gap = float((right[part] - confidence[part]).mean())
        signed[part] = (1.0 if gap >= 0 else -1.0) * (right[part] - confidence[part])
        variance_of_gaps.append(float((confidence[part] * (1 - confidence[part])).sum()))
    floor = float(np.sqrt(2 / np.pi) * np.sqrt(variance_of_gaps).sum() / len(kept))
    error = stats.mean(signed, prompts)
    low = None if error.low is None else max(0.0, error.low)
    ece = Estimate(error.value, low, error.high, error.n)
    squares = (wins - p) ** 2
    terms = tuple((pairs[i].key, float(square)) for i, square in zip(kept, squares, strict=True))
    return Calibration(tuple(table), ece, floor, stats.mean(squares, prompts), terms)


@dataclass(frozen=True)
class HeldOutTemperature:
    """Temperatures for pairs, each fitted on the other half of the prompts, and one fitted on all.

    ``per_pair`` (M,) is None where a half has no best temperature; ``why`` then says it.
    """

    overall: Estimate
    per_pair: tuple[float, ...] | None
    why: str = ""


def cross_fitted(pairs: Sequence[HeldOutPair]) -> HeldOutTemperature:
    """Fit on one half of the prompts for the other, and the other way round. The halves are by prompt id.

    The interval of the overall temperature is on its logarithm, with the standard error of the slope
    a = 1/T that holds for dependent pairs of one prompt (sandwich): sum of squared prompt scores / H².
    """
    half = [hashlib.blake2b(pair.prompt.encode(), digest_size=1).digest()[0] % 2 for pair in pairs]
    scored = [i for i, pair in enumerate(pairs) if pair.margin is not None]
    fits = {}
    for side in (0, 1):
        chosen = [pairs[i] for i in scored if half[i] != side]
        fits[side] = fit_temperature([pair.margin or 0.0 for pair in chosen], [pair.p for pair in chosen])
    overall = _overall([pairs[i] for i in scored])
    bad = next((fit.status for fit in fits.values() if fit.value is None), None)
    if bad is not None:
        return HeldOutTemperature(overall, None, f"half of the prompts: {bad}")
    return HeldOutTemperature(overall, tuple(float(fits[side].value or 1.0) for side in half))


def _overall(pairs: Sequence[HeldOutPair]) -> Estimate:
    m = np.array([pair.margin for pair in pairs], dtype=np.float64)
    y = np.array([pair.p for pair in pairs])
    fit = fit_temperature(m, y)
    if fit.value is None:
        return Estimate(None, None, None, fit.n)
    wins = special.expit(m / fit.value)
    codes: dict[str, int] = {}
    index = [codes.setdefault(pair.prompt, len(codes)) for pair in pairs]
    sums = np.bincount(index, weights=m * (y - wins))
    information = float((m**2 * wins * (1 - wins)).sum())
    units = len(sums)
    if units < 2 or information == 0:
        return Estimate(fit.value, None, None, fit.n)
    error = fit.value * np.sqrt(units / (units - 1) * (sums**2).sum()) / information
    half = float(special.stdtrit(units - 1, 0.975)) * float(error)
    if half > LARGEST:
        return Estimate(fit.value, None, None, fit.n)
    return Estimate(fit.value, fit.value * np.exp(-half), fit.value * np.exp(half), fit.n)


def calibration_measures(pairs: Sequence[HeldOutPair], carried: float) -> list[Measure]:
    """As the model stands, and with a temperature fitted on the other half of the prompts."""
    scored = [pair for pair in pairs if pair.margin is not None]
    if not scored:
        return []
    fitted = cross_fitted(scored)
    as_is = f"P(win) = sigmoid(margin / {carried:g}), the temperature of the model"
    crossed = "temperature fitted on the other half of the prompts"
    found = _reliability("", scored, [carried] * len(scored), as_is)
    if fitted.per_pair is None:
        coverage = Coverage(len(scored), 0, {f"no temperature ({fitted.why})": len(scored)})
        for name in ("rm_ece/fitted", "rm_brier/fitted"):
            found.append(Measure(name, NOTHING, coverage, "lower", unit="number", section="calibration"))
    else:
        found += _reliability("/fitted", scored, fitted.per_pair, crossed)
    value = fitted.overall
    coverage = Coverage(
        len(scored),
        len(scored) if value.value is not None else 0,
        {} if value.value is not None else {f"no best temperature ({fitted.why})": len(scored)},
    )
    notes = ("fitted on all pairs; sigmoid(margin / temperature) is then how often the model is right",)
    found.append(
        Measure("rm_temperature", value, coverage, unit="number", notes=notes, section="calibration")
    )
    return found


def _reliability(
    mark: str, pairs: Sequence[HeldOutPair], temperatures: Sequence[float], how: str
) -> list[Measure]:
    whole = calibration(pairs, temperatures)
    found = [
        _error(f"rm_ece{mark}", whole, how, shown=True),
        Measure(
            f"rm_brier{mark}",
            whole.brier,
            Coverage(len(pairs), len(pairs)),
            "lower",
            unit="number",
            items=whole.squares,
            clusters={pair.key: pair.prompt for pair in pairs},
            notes=(how, "0.25 is a coin"),
            section="calibration",
        ),
        *_table(f"rm_reliability{mark}", whole, how),
    ]
    if not mark:
        floor = Estimate(whole.floor, None, None, len(pairs))
        notes = ("the mean error of a perfectly calibrated model with these margins, by chance",)
        coverage = Coverage(len(pairs), len(pairs))
        found.insert(
            1,
            Measure("rm_ece/by_chance", floor, coverage, unit="number", notes=notes, section="calibration"),
        )
    for side in LENGTH_SIDES:
        inside = [i for i, pair in enumerate(pairs) if pair.tags["length"] == side]
        if not inside or len(inside) == len(pairs):
            continue
        part = calibration([pairs[i] for i in inside], [temperatures[i] for i in inside])
        found.append(_error(f"rm_ece{mark}/length={side}", part, how, shown=not mark))
        found += _table(f"rm_reliability{mark}/length={side}", part, how)
    return found


def _error(name: str, found: Calibration, how: str, *, shown: bool) -> Measure:
    n = found.ece.n
    floor = "" if found.floor is None else f", {found.floor:.3f} expected by chance"
    notes = (how, f"{len(found.bins)} bins of equally many pairs{floor}")
    coverage = Coverage(n, n)
    return Measure(
        name, found.ece, coverage, "lower", unit="number", notes=notes, section="calibration", shown=shown
    )


def _table(name: str, found: Calibration, how: str) -> list[Measure]:
    return [
        Measure(
            f"{name}/{i}",
            one.right,
            Coverage(one.right.n, one.right.n),
            notes=(how, f"confidence {one.low:.3f} to {one.high:.3f}, mean {one.confidence:.3f}"),
            section="calibration",
            shown=False,
        )
        for i, one in enumerate(found.bins, 1)
    ]


__all__ = ["Bin", "Calibration", "HeldOutTemperature", "calibration", "calibration_measures", "cross_fitted"]
