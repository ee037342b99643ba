"""Objectives for reward models with one score: the learnt tensor is ``scores`` (N,), one number per completion.

Those that learn several outputs are in reward_heads.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import logistic, ranking_losses
from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective


def score_metrics(chosen: Tensor, rejected: Tensor) -> Metrics:
    """What is told of pairs of scores (M,): accuracy (ties count half), margin, and the scores themselves."""
    margin = (chosen - rejected).detach()
    return {
        "accuracy": (margin.sign() + 1) / 2,
        "margin": margin,
        "scores/chosen": chosen.detach(),
        "scores/rejected": rejected.detach(),
    }


@objective(
    unit="pair",
    kind="reward",
    only_if={"pair_strengths": "margin"},
    source="Bradley & Terry (1952); arXiv:2203.02155, equation 1; centering: arXiv:2312.09244; "
    "margin: arXiv:2307.09288 (Llama 2), equation 2",
)
def bradley_terry(
    scores: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    pair_strengths: Tensor | None = None,
    *,
    centering: float = 0.0,
    margin: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry reward model: the difference of two scores is the log-odds of the preference.

    Formula:
        loss = -p log s(r_w - r_l - m) - (1 - p) log s(r_l - r_w - m) + centering (r_w + r_l)^2
        with p = pair_probs (1 if not given), m = margin * pair_strengths
    Hyperparameters:
        centering: pulls the scores of each pair to a mean of 0; 0.01 is usual, 0 leaves the level free
        margin: the difference asked for beyond none, per step of strength; 1 is 1, 2 and 3 for slightly, clearly, by
            far; 0 asks for none and needs no strengths
    Returns:
        losses (M,), ln 2 for each pair of equal scores without a margin; accuracy (ties count half), margin, scores
    Differs:
        Where the strength of a pair is not known (NaN), it is asked for no margin: unknown is not weak.
        Llama 2 names its margins (1, 2/3, 1/3, 0 or 3, 2, 1, 0); here they are proportional to the strength.
    Use when:
        You have pairs and want a scorer: for best-of-n, for ranking, or as the reward of policy
        gradients.
    Failure modes:
        Overfits after about one epoch.
        Scores compare completions of one prompt only; across prompts their level means nothing without
        centering.
        Centering shrinks differences where a prompt has more than two completions.
        With a margin, s(r_w - r_l) is no more the probability of the preference: calibrate before reading it so.
        Learns whatever separates the pairs, length first of all: look at accuracy by length difference.
    """
    in_range("centering", centering, at_least=0)
    in_range("margin", margin, at_least=0)
    chosen, rejected = scores[pairs]
    difference = chosen - rejected
    asked = torch.zeros_like(difference)
    if margin > 0:
        if pair_strengths is None:
            raise ObjectiveError("a margin needs pair_strengths")
        asked = margin * pair_strengths.nan_to_num(0.0).to(difference.dtype)
    losses = logistic(difference - asked)
    if pair_probs is not None:
        losses = pair_probs * losses + (1 - pair_probs) * logistic(-difference - asked)
    if centering > 0:
        losses = losses + centering * (chosen + rejected).square()
    return losses, score_metrics(chosen, rejected)


@objective(
    unit="pair",
    kind="reward",
    source="arXiv:2410.01257 (HelpSteer2-Preference), the scaled Bradley-Terry loss",
)
def scaled_bradley_terry(
    scores: Tensor,
    pairs: Tensor,
    pair_strengths: Tensor,
    pair_probs: Tensor | None = None,
    *,
    centering: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry in which a pair counts as often as it is strong.

    Formula:
        loss = -m (p log s(r_w - r_l) + (1 - p) log s(r_l - r_w)) + centering (r_w + r_l)^2
        with m = pair_strengths and p = pair_probs (1 if not given)
    Hyperparameters:
        centering: pulls the scores of each pair to a mean of 0; 0 leaves the level free
    Returns:
        losses (M,), m ln 2 for each pair of equal scores; accuracy (ties count half), margin, scores
    Differs:
        The mean over pairs is not divided by the sum of strengths, as in the paper: strong data make larger steps.
        Where the strength is not known (NaN) a pair counts once. A tie has strength 0 and teaches nothing.
    Use when:
        Annotators said how much better, on a scale of 1 to 3; the paper found this better than margins.
    Failure modes:
        A strength tells of the annotator as much as of the pair: on mixed scales loud annotators rule.
        Overfits after about one epoch, strong pairs first.
    """
    in_range("centering", centering, at_least=0)
    chosen, rejected = scores[pairs]
    difference = chosen - rejected
    losses = logistic(difference)
    if pair_probs is not None:
        losses = pair_probs * losses + (1 - pair_probs) * logistic(-difference)
    losses = pair_strengths.nan_to_num(1.0).to(difference.dtype) * losses
    if centering > 0:
        losses = losses + centering * (chosen + rejected).square()
    return losses, score_metrics(chosen, rejected)


@objective(
    unit="pair",
    kind="reward",
    source="McCullagh (1980), the proportional-odds model, on the difference of two scores",
)
def ordinal(
    scores: Tensor, pairs: Tensor, pair_strengths: Tensor, *, cutpoints: tuple[float, ...] = (0.5, 1.5, 2.5)
) -> tuple[Tensor, Metrics]:
    """Ordinal reward model: graded preferences from -3 to 3, ties among them, by a cumulative link.

    Formula:
        P(y >= k) = s(d - c_k) for k = 1 ... K and P(y <= -k) = s(-d - c_k), with d = r_w - r_l, c = cutpoints
        y is the verdict seen from row 0 of pairs: its strength rounded to a whole number, at most K; 0 is a tie
        loss = -log P(y); where the strength is not known (NaN) it is -log P(y >= 1)
    Hyperparameters:
        cutpoints: 0 < c_1 < ... < c_K, the same on both sides; they set the scale of the scores
    Returns:
        losses (M,); accuracy (ties count half), margin, scores; level, the verdict (NaN strengths left out)
    Differs:
        The cut points are given, not learnt: the scores find their scale against them, so that their ratios alone
        matter. steerwell.fit_cutpoints finds the likeliest for a trained model.
    Use when:
        Annotators chose on a scale of strengths, and ties are common: every verdict is used, and none is more than
        it said.
    Failure modes:
        Annotators who use the scale differently are read alike.
        Cut points far from the data's use of the scale bend the scores; look at them again with fit_cutpoints.
        A mean over several annotators is rounded: strong disagreement looks like a tie.
    """
    cuts = _checked_cutpoints(cutpoints).to(scores)
    chosen, rejected = scores[pairs]
    d = chosen - rejected
    known = ~pair_strengths.isnan()
    level = pair_strengths.nan_to_num(1.0).round().clamp(0, len(cuts)).long()
    inf = cuts.new_full((1,), torch.inf)
    lower = torch.cat([-cuts[:1], cuts])[level]  # y = level: d between these two, in the logistic's units
    upper = torch.where(known, torch.cat([cuts, inf])[level], inf)
    losses = logistic(d - lower) + _logistic_or_nothing(upper - d)
    gap = torch.where(upper.isinf(), 1.0, upper - lower)  # constants: no gradient in where
    losses = losses - torch.where(upper.isinf(), 0.0, torch.log(-torch.expm1(-gap)))
    metrics = score_metrics(chosen, rejected)
    metrics["level"] = level[known].to(d.dtype)
    return losses, metrics


def _logistic_or_nothing(x: Tensor) -> Tensor:
    """-log s(x), exactly 0 with no gradient where x is infinite."""
    beyond = x.isinf()
    return torch.where(beyond, 0.0, logistic(torch.where(beyond, 0.0, x)))


def _checked_cutpoints(cutpoints: tuple[float, ...]) -> Tensor:
    if isinstance(cutpoints, str) or not isinstance(cutpoints, list | tuple) or not cutpoints:
        raise ObjectiveError(f"cutpoints must be a list of numbers, got {cutpoints!r}")
    before = 0.0
    for cut in cutpoints:
        in_range("cutpoints", cut, above=before)
        before = float(cut)
    return torch.tensor([float(cut) for cut in cutpoints], dtype=torch.float64)


@objective(
    unit="completion",
    kind="reward",
    source="Plackett (1975), Luce (1959); arXiv:2203.02155 takes all pairs of a ranking instead",
)
def plackett_luce_reward(scores: Tensor, ranks: Tensor, group: Tensor) -> tuple[Tensor, Metrics]:
    """Reward model from rankings of K completions: each before all that rank below it.

    Formula:
        loss_k = log(exp(r_k) + sum over j ranked below k of exp(r_j)) - r_k, within the prompt's completions
    Returns:
        losses (N,), 0 for the last of each ranking and where there is no rank; accuracy and margin of all ordered
        pairs, scores of each pair's sides
    Differs:
        Completions of equal rank are not compared with each other. Two completions give Bradley-Terry's loss, as one
        entry of it and one 0, so that the mean over completions is half of its mean over pairs.
    Use when:
        Annotators ranked several completions at once: one ranking is one sample, where all its pairs would count it
        K (K - 1) / 2 times.
    Failure modes:
        Early places have more terms: the order at the bottom of long rankings hardly counts.
        One annotator's slip at the top moves the whole ranking.
    """
    losses, _, below = ranking_losses(scores, ranks, group)
    above, under = torch.nonzero(below, as_tuple=True)
    return losses, score_metrics(scores[above], scores[under])


__all__ = ["bradley_terry", "ordinal", "plackett_luce_reward", "scaled_bradley_terry", "score_metrics"]
