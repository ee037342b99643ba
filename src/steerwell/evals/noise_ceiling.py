"""The accuracy that no model can pass in expectation, because the labels themselves are noisy.

Each pair has a p: the share of annotators who would prefer its first side. A model that knew every p would
side with the majority, and would agree with *one* annotator's vote with probability max(p, 1 - p). Votes on the
same pair by different annotators show how far p is from 0 and 1: two of them agree with probability
p² + (1 - p)², of which k(k-1) + (K-k)(K-k-1) over K(K-1) is an unbiased estimate from k of K votes. The share
of the winning side in K votes is not: it takes 3 votes of 5 for certain 60%, and is 1 for every single vote.

The mean agreement A alone bounds the ceiling, whatever the distribution of p (both bounds are reached):

    A  <=  E max(p, 1 - p)  <=  (1 + sqrt(2A - 1)) / 2

The lower one is reached when pairs are either certain or a coin toss, the upper when all are equally noisy.
Between them, and for labels that are majorities of several votes, p ~ Beta(a, a) with the same A is assumed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

from steerwell.data.errors import InputError
from steerwell.evals import stats
from steerwell.evals.held_out_pairs import HeldOutPair
from steerwell.evals.stats import Estimate


@dataclass(frozen=True)
class Ceiling:
    """What repeated votes say about labels.

    ``agreement``: of two annotators on a pair. ``single``: the ceiling against one vote under Beta(a, a), and
    ``bounds`` on it without that model. ``labels``: the ceiling against the labels as they are used, each the
    majority of its own number of votes. All None where no pair has two votes: then it can't be known.
    ``repeated`` pairs have two votes or more, of ``pairs``.
    """

    agreement: Estimate
    single: Estimate
    labels: Estimate
    bounds: tuple[float, float] | None
    repeated: int
    pairs: int


def noise_ceiling(pairs: Sequence[HeldOutPair]) -> Ceiling:
    """The ceiling of the accuracy on ``pairs``, from those that several annotators judged.

    Pairs with one vote are taken to be as noisy as those with several. The interval is that of the agreement
    (clustered by prompt), carried through: the ceiling only rises with it. Agreement below 1/2 is chance.
    """
    several = [pair for pair in pairs if sum(pair.votes) >= 2]
    values = [vote_agreement(*pair.votes) for pair in several]
    prompts = [pair.prompt for pair in several]
    agreement = stats.proportion(values, prompts)
    votes = [max(sum(pair.votes), 1) for pair in pairs if pair.p != 0.5]
    kinds, counts = np.unique(np.array(votes, dtype=np.int64), return_counts=True)

    def of_labels(a: float) -> float:
        return float(counts @ [majority_ceiling(a, int(k)) for k in kinds]) / float(counts.sum())

    single = _carried(agreement, lambda a: majority_ceiling(a, 1))
    labels = _carried(agreement, of_labels) if len(votes) else Estimate(None, None, None, agreement.n)
    bounds = None if agreement.value is None else ceiling_bounds(agreement.value)
    return Ceiling(agreement, single, labels, bounds, len(several), len(pairs))


def _carried(agreement: Estimate, ceiling: Callable[[float], float]) -> Estimate:
    ends = [None if a is None else ceiling(a) for a in (agreement.value, agreement.low, agreement.high)]
    return Estimate(ends[0], ends[1], ends[2], agreement.n)


def vote_agreement(first: int, second: int) -> float:
    """The share of pairs of votes that agree, of first + second >= 2 votes: unbiased for p² + (1 - p)²."""
    total = first + second
    if total < 2:
        raise InputError(f"{total} votes can't agree or disagree", mend="Leave pairs with one vote out.")
    return (first * (first - 1) + second * (second - 1)) / (total * (total - 1))


def ceiling_bounds(agreement: float) -> tuple[float, float]:
    """The least and the greatest E max(p, 1 - p) that go with a mean agreement."""
    a = min(max(agreement, 0.5), 1.0)
    return a, (1 + float(np.sqrt(2 * a - 1))) / 2


def majority_ceiling(agreement: float, votes: int) -> float:
    """How often the side with p > 1/2 wins a decided majority of ``votes``, for p ~ Beta(a, a).

    E p² + (1 - p)² = (a + 1) / (2a + 1), so a = (1 - A) / (2A - 1). With K votes, of which ties are left out:
    2 Σ_{k > K/2} C(K, k) ∫_{1/2}^1 p^k (1 - p)^(K - k) dBeta, over the probability of no tie. One vote gives
    E max(p, 1 - p) = 1/2 + 1 / (a 4^a B(a, a)).
    """
    a = min(max(agreement, 0.5), 1.0)
    if a == 1.0:
        return 1.0
    if a == 0.5:
        return 0.5
    shape = (1 - a) / (2 * a - 1)
    if votes == 1:
        return 0.5 + float(np.exp(-np.log(shape) - shape * np.log(4) - special.betaln(shape, shape)))
    k = np.arange(votes + 1)
    weight = np.exp(
        special.gammaln(votes + 1)
        - special.gammaln(k + 1)
        - special.gammaln(votes - k + 1)
        + special.betaln(shape + k, shape + votes - k)
        - special.betaln(shape, shape)
    )
    above = special.betaincc(shape + k, shape + votes - k, 0.5)
    won = 2 * k > votes
    decided = 1 - (float(weight[votes // 2]) if votes % 2 == 0 else 0.0)
    return float(2 * (weight * above)[won].sum()) / decided


__all__ = ["Ceiling", "ceiling_bounds", "majority_ceiling", "noise_ceiling", "vote_agreement"]
