"""RewardBench 2 (Malik et al. 2025, arXiv:2506.01937): the best of four, and questions with many right answers.

Outside of Ties a row counts 1 where the chosen completion alone has the highest score of the four, 1/k where k
share it, else 0. Ties asks two things of a model: that every right answer beats every wrong one, and that right
answers score more alike than right and wrong ones do. With, for each question, spread = best − worst right
answer of the tied row, gap = worst right − best wrong answer of it, and ref = the same gap of the row with one
right answer:

    0.30 P(gap > 0) + 0.30 P(ref > 0) + 0.20 P(gap > spread) + 0.20 P(min(ref, gap) > spread)
        + 0.01 mean tanh(min(ref, gap) / spread − 1)

The first two are over all rows of their kind, the others over the questions that have both; 0/0 counts 0. So
the highest score is 1.01. The whole is the mean of the subsets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from steerwell.data.benchmarks import read_rewardbench2
from steerwell.evals import stats
from steerwell.evals.benchmark_scores import Files, Scored, benchmark, by_part, item_share, weighted
from steerwell.evals.measure import Measure, Task
from steerwell.evals.stats import NOTHING, Estimate
from steerwell.evals.winrate import Coverage

TIES = "ties"
SECTION = "RewardBench 2"
WEIGHTS = {"tied": 0.30, "ref": 0.30, "preferred": 0.20, "preferred_hard": 0.20, "margin": 0.01}
MEANING = {
    "tied": "P(gap > 0): every right answer beats every wrong one, of several right ones",
    "ref": "P(ref > 0): the one right answer beats every wrong one",
    "preferred": "P(gap > spread): right answers score more alike than right and wrong ones",
    "preferred_hard": "P(min(ref, gap) > spread)",
    "margin": "mean tanh(min(ref, gap) / spread − 1), in (-1, 1]",
}


def rewardbench2(files: Files) -> Task:
    """RewardBench 2 from its published file. Raises :class:`InputError` naming file and row for a bad row."""
    return benchmark("rewardbench2", files, read_rewardbench2, scores)


def scores(scored: Sequence[Scored]) -> list[Measure]:
    """The whole, the subsets, and the terms of Ties."""
    subsets, terms = [], []
    for part, items in by_part(scored).items():
        name = f"rewardbench2/subset={part}"
        if part.lower() == TIES:
            whole, terms = _ties(name, items)
            subsets.append(whole)
        else:
            subsets.append(item_share(name, items, best_credit, section=SECTION))
    notes = (f"mean of the {len(subsets)} subsets in the file; the published benchmark has 6",)
    whole = weighted("rewardbench2", subsets, [1.0] * len(subsets), section=SECTION, notes=notes)
    return [whole, *subsets, *terms]


def best_credit(one: Scored) -> float:
    """1 / (how many share the highest score) where the chosen completion, the first, is among them, else 0."""
    values = one.values
    top = max(values)
    return 1 / values.count(top) if values[0] == top else 0.0


def ties_terms(ref: dict[str, float], tied: dict[str, tuple[float, float]]) -> np.ndarray:
    """One row per question, (Q, 10): for each term whether it is counted and its value, in the order of WEIGHTS.

    ``ref``: question → gap. ``tied``: question → (gap, spread).
    """
    rows = []
    for question in dict.fromkeys([*ref, *tied]):
        both = question in ref and question in tied
        gap, spread = tied.get(question, (math.nan, math.nan))
        least = min(ref.get(question, math.nan), gap) if both else math.nan
        rows.append(
            [
                *((1.0, float(gap > 0)) if question in tied else (0.0, 0.0)),
                *((1.0, float(ref[question] > 0)) if question in ref else (0.0, 0.0)),
                *((1.0, float(gap > spread)) if both else (0.0, 0.0)),
                *((1.0, float(least > spread)) if both else (0.0, 0.0)),
                *((1.0, _squashed(least, spread)) if both else (0.0, 0.0)),
            ]
        )
    return np.array(rows, dtype=np.float64).reshape(len(rows), 2 * len(WEIGHTS))


def ties_score(rows: np.ndarray) -> float:
    """The formula above from the rows of :func:`ties_terms`; NaN where a term has no question."""
    sums = rows.sum(0)
    counts, values = sums[0::2], sums[1::2]
    if not counts.all():
        return math.nan
    return float((values / counts) @ np.array(list(WEIGHTS.values())))


def _squashed(least: float, spread: float) -> float:
    if spread == 0:
        return 0.0 if least == 0 else math.copysign(1.0, least)
    return math.tanh(least / spread - 1)


def _ties(name: str, items: Sequence[Scored]) -> tuple[Measure, list[Measure]]:
    ref: dict[str, float] = {}
    tied: dict[str, tuple[float, float]] = {}
    for one in items:
        if not one.complete:
            continue
        right, wrong = one.values[: one.item.right], one.values[one.item.right :]
        gap = min(right) - max(wrong)
        if one.item.facts["kind"] == "ref":
            ref[one.item.facts["question"]] = gap
        else:
            tied[one.item.facts["question"]] = gap, max(right) - min(right)
    judged = sum(one.complete for one in items)
    coverage = Coverage(len(items), judged, {"no score": len(items) - judged} if judged < len(items) else {})
    rows = ties_terms(ref, tied)
    found = []
    for i, term in enumerate(WEIGHTS):
        kept = rows[rows[:, 2 * i] == 1, 2 * i + 1]
        estimate = stats.mean(kept) if term == "margin" else stats.proportion(kept)
        found.append(
            Measure(
                f"rewardbench2/ties/{term}",
                estimate,
                coverage,
                "higher",
                unit="number" if term == "margin" else "share",
                notes=(MEANING[term], f"weight {WEIGHTS[term]}"),
                section=SECTION,
                shown=False,
            )
        )
    return Measure(name, _ties_estimate(rows), coverage, "higher", unit="number", section=SECTION), found


def _ties_estimate(rows: np.ndarray) -> Estimate:
    """The score with a bootstrap interval over questions; resamples that miss a term keep the whole's value."""
    value = ties_score(rows) if len(rows) else math.nan
    if math.isnan(value):
        return NOTHING

    def statistic(drawn: np.ndarray) -> float:
        again = ties_score(drawn)
        return value if math.isnan(again) else again

    return stats.cluster_bootstrap(rows, list(range(len(rows))), statistic)


__all__ = ["WEIGHTS", "best_credit", "rewardbench2", "scores", "ties_score", "ties_terms"]
