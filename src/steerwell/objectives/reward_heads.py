"""Objectives for reward models whose head has several outputs: the learnt tensor is ``head_scores`` (N, H)."""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective


@objective(
    unit="completion",
    kind="reward",
    head="attributes",
    source="arXiv:2311.09528 (HelpSteer) and arXiv:2406.12845 (ArmoRM), the regression stage",
)
def regression(head_scores: Tensor, attributes: Tensor) -> tuple[Tensor, Metrics]:
    """Regression reward model: one output for each named attribute, fitted to the scores that people gave.

    Formula:
        loss = mean over the attributes a that are known for y of (f_a(x, y) - attribute_a)^2
    Returns:
        losses (N,), 0 for a completion without any score; absolute_error, the mean over known attributes
    Differs:
        An attribute that nobody scored (NaN) is left out of the mean; it is not taken for 0.
    Use when:
        People scored single completions, by one or several criteria (helpfulness, correctness, verbosity).
        A gate is then learnt by bradley_terry on pairs, from the model that this gives.
    Failure modes:
        The head has no bias: centre the scores, or many steps are spent on their level.
        Scales matter: an attribute from 0 to 100 drowns one from 0 to 1. Bring them to one scale.
        Scores of annotators with different habits are averaged into noise; resolve them first.
        The plain mean of the outputs is the score until a gate or weights are given.
    """
    if head_scores.shape != attributes.shape and head_scores.numel():
        raise ObjectiveError(
            f"the head has {head_scores.shape[-1]} outputs for {attributes.shape[-1]} attributes"
        )
    known = ~attributes.isnan()
    error = torch.where(known, head_scores - attributes.nan_to_num(0.0).to(head_scores.dtype), 0.0)
    count = known.sum(1).clamp(min=1).to(head_scores.dtype)
    seen = known.any(1)
    absolute = (error.detach().abs().sum(1) / count)[seen]
    return error.square().sum(1) / count, {"absolute_error": absolute}


@objective(
    unit="completion",
    kind="reward",
    head="quantiles",
    source="Koenker & Bassett (1978), the pinball loss; arXiv:2409.10164 (QRM), quantile reward models",
)
def quantile(
    head_scores: Tensor,
    rewards: Tensor,
    *,
    levels: tuple[float, ...] = (0.05, 0.15, 0.25, 0.35, 0.45, 0.55, 0.65, 0.75, 0.85, 0.95),
) -> tuple[Tensor, Metrics]:
    """Quantile reward model: the distribution of the scores that a completion would be given.

    Formula:
        loss = mean over levels t of max(t (y - q_t), (t - 1) (y - q_t)), with y = rewards and q_t the head's output
    Hyperparameters:
        levels: the quantiles, rising between 0 and 1, one output each; their mean is the score
    Returns:
        losses (N,), 0 where there is no score; below, the share of levels under which the score lies
    Differs:
        The mean over levels, where the paper has the sum. Outputs are sorted where they are read, so that
        quantiles do not cross; the loss takes them as they are.
    Use when:
        Scores are noisy or people disagree, and the spread is worth knowing: a low quantile as a careful reward.
    Failure modes:
        Outer levels rest on few samples each.
        One score per completion shows the spread between completions that the model cannot tell apart, not
        that between annotators.
    """
    shares = _checked_levels(levels)
    if head_scores.shape[1] != len(shares):
        if head_scores.numel():
            raise ObjectiveError(f"the head has {head_scores.shape[1]} outputs for {len(shares)} levels")
        head_scores = head_scores.new_zeros(0, len(shares))
    known = ~rewards.isnan()
    t = head_scores.new_tensor(shares)
    gap = rewards.nan_to_num(0.0).to(head_scores.dtype)[:, None] - head_scores
    losses = torch.where(known, torch.maximum(t * gap, (t - 1) * gap).mean(1), 0.0)
    return losses, {"below": (gap.detach() < 0).to(gap.dtype).mean(1)[known]}


def _checked_levels(levels: tuple[float, ...]) -> list[float]:
    if isinstance(levels, str) or not isinstance(levels, list | tuple) or not levels:
        raise ObjectiveError(f"levels must be a list of numbers, got {levels!r}")
    before = 0.0
    for level in levels:
        in_range("levels", level, above=before, below=1)
        before = float(level)
    return [float(level) for level in levels]


__all__ = ["quantile", "regression"]
