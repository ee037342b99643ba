"""Objectives for reward models: the learnt tensor is ``scores`` (N,), one number per completion."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from steerwell.objectives.table import Metrics, in_range, objective


@objective(
    unit="pair",
    kind="reward",
    source="Bradley & Terry (1952); arXiv:2203.02155, equation 1; centering: arXiv:2312.09244",
)
def bradley_terry(
    scores: Tensor, pairs: Tensor, pair_probs: Tensor | None = None, *, centering: float = 0.0
) -> tuple[Tensor, Metrics]:
    """Bradley-Terry reward model: the difference of two scores is the log-odds of the preference.

    Formula:
        loss = -p log s(r_w - r_l) - (1 - p) log s(r_l - r_w) + centering (r_w + r_l)^2
        with p = pair_probs (1 if not given)
    Hyperparameters:
        centering: pulls the scores of each pair to a mean of 0; 0.01 is usual, 0 leaves the level free
    Returns:
        losses (M,), ln 2 for each pair of equal scores; accuracy (ties count half), margin, scores
    Use when:
        You have pairs and want a scorer: for best-of-n, for ranking, or as the reward of policy
        gradients.
    Failure modes:
        Overfits after about one epoch.
        Scores compare completions of one prompt only; across prompts their level means nothing without
        centering.
        Centering shrinks differences where a prompt has more than two completions.
        Learns whatever separates the pairs, length first of all: look at accuracy by length difference.
    """
    in_range("centering", centering, at_least=0)
    chosen, rejected = scores[pairs]
    margin = chosen - rejected
    losses = -F.logsigmoid(margin)
    if pair_probs is not None:
        losses = pair_probs * losses - (1 - pair_probs) * F.logsigmoid(-margin)
    if centering > 0:
        losses = losses + centering * (chosen + rejected).square()
    seen = margin.detach()
    metrics = {
        "accuracy": (seen.sign() + 1) / 2,
        "margin": seen,
        "scores/chosen": chosen.detach(),
        "scores/rejected": rejected.detach(),
    }
    return losses, metrics


__all__ = ["bradley_terry"]
