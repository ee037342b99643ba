"""Parts that pair objectives are made of: links from a margin to a loss, expectations under soft labels, metrics.

Rows of (2, M) tensors: 0 is the preferred completion of each pair, 1 the other. A soft label p is the probability
that row 0 is indeed the preferred one; the expected loss is p times the loss of the pair as it stands plus
1 - p times that of the pair turned round.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from steerwell.objectives.table import Metrics

#: Beyond this exponent :func:`expm1_then_line` is straight. exp(40) and its square are far from overflow in float32.
LIMIT = 40.0


def logistic(margin: Tensor) -> Tensor:
    """-log s(margin), stable on both sides."""
    return -F.logsigmoid(margin)


def expected(loss: Callable[[Tensor], Tensor], margin: Tensor, probs: Tensor | None) -> Tensor:
    """The loss of a margin (M,), or its expectation when row 0 is the preferred one with probability ``probs``.

    For losses of a margin that changes its sign when the pair is turned round.
    """
    if probs is None:
        return loss(margin)
    return probs * loss(margin) + (1 - probs) * loss(-margin)


def expected_either(loss: Callable[[Tensor, Tensor], Tensor], sides: Tensor, probs: Tensor | None) -> Tensor:
    """The same for losses of both sides: ``loss(preferred, other)`` of (M,) tensors, ``sides`` (2, M)."""
    if probs is None:
        return loss(sides[0], sides[1])
    return probs * loss(sides[0], sides[1]) + (1 - probs) * loss(sides[1], sides[0])


def ranking_losses(values: Tensor, ranks: Tensor, group: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log of the Plackett-Luce choice of each completion before all that rank below it, (N,); and which completions
    are ranked together and which rank below which, (N, N) each, row k for completion k. Rank -1 is none.
    """
    ranked = ranks >= 0
    together = (group[:, None] == group[None, :]) & ranked[:, None] & ranked[None, :]
    below = together & (ranks[None, :] > ranks[:, None])
    own = torch.eye(len(ranks), dtype=torch.bool, device=ranks.device)
    field = values[None, :].masked_fill(~(below | own), -torch.inf)
    return torch.logsumexp(field, dim=1) - values, together, below


def expm1_then_line(x: Tensor) -> Tensor:
    """exp(x) - 1, exact for small x; beyond :data:`LIMIT` its tangent there: finite, increasing, never flat."""
    inner = x.clamp(max=LIMIT)
    return torch.expm1(inner) + torch.exp(inner) * (x - LIMIT).clamp(min=0)


def pair_metrics(rewards: Tensor, logps: Tensor) -> Metrics:
    """Metrics (M,) from the pairs' rewards and log-probabilities, both (2, M). A tie is half accurate."""
    rewards, logps = rewards.detach(), logps.detach()
    margin = rewards[0] - rewards[1]
    return {
        "rewards/chosen": rewards[0],
        "rewards/rejected": rewards[1],
        "rewards/margins": margin,
        "rewards/accuracies": (margin.sign() + 1) / 2,
        "logps/chosen": logps[0],
        "logps/rejected": logps[1],
    }


__all__ = [
    "LIMIT",
    "expected",
    "expected_either",
    "expm1_then_line",
    "logistic",
    "pair_metrics",
    "ranking_losses",
]
