"""Objectives for several completions of one prompt: by their order, or by their scores.

Which completions belong together is ``group``; throughout h(y) = log pi(y|x) - log ref(y|x), summed over the tokens
of a completion, and r = beta h. Losses are one per completion, so that a group's loss is their sum; the mean over
completions is that of the groups divided by the completions a group has.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import logistic, ranking_losses
from steerwell.objectives.table import Metrics, in_range, objective


@objective(
    unit="completion",
    source="arXiv:2305.18290, appendix A.3 (Plackett-Luce); arXiv:2402.01878 (listwise)",
)
def plackett_luce(
    logps: Tensor, ref_logps: Tensor, ranks: Tensor, group: Tensor, *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """DPO for whole rankings: each completion is to be chosen before all that rank below it.

    Formula:
        loss_k = log(exp(r_k) + sum over j ranked below k of exp(r_j)) - r_k, within the prompt's completions
        the sum over a group is -log of the Plackett-Luce probability of the ranking
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
    Returns:
        losses (N,), 0 for the last of each ranking and where there is no rank; margins and accuracies of all ordered
        pairs, rewards and logps of the best (chosen) and of the worst (rejected) of each ranking
    Differs:
        Completions of equal rank are not compared with each other: each is weighed against those strictly below
        it. Counting the equals below one another too would ask that their rewards be equal.
        Rank -1 says that there is none: the completion is left out of every comparison, and its loss is 0.
        Two completions give DPO's loss exactly, as one entry of it and one 0: the mean over completions is half of
        DPO's mean over pairs.
    Failure modes:
        Early places have more terms: in long rankings the order at the bottom hardly counts.
        The whole ranking is taken for true; noise in the middle costs as much as at the ends.
        Groups of many completions weigh more than those of few, and completions without a rank count in the mean.
    Use when:
        There are rankings of three or more completions, rather than pairs taken from them.
    """
    in_range("beta", beta, above=0)
    rewards = beta * (logps - ref_logps)
    losses, together, below = ranking_losses(rewards, ranks, group)
    return losses, _order_metrics(rewards, logps, together, below)


def _order_metrics(rewards: Tensor, logps: Tensor, together: Tensor, below: Tensor) -> Metrics:
    """Margins and accuracies of all ordered pairs; rewards and logps of those at the top and at the bottom."""
    rewards, logps = rewards.detach(), logps.detach()
    above, under = torch.nonzero(below, as_tuple=True)
    margins = rewards[above] - rewards[under]
    compared = (together & (below | below.T)).any(1)
    best, worst = compared & ~below.any(0), compared & ~below.any(1)
    return {
        "rewards/chosen": rewards[best],
        "rewards/rejected": rewards[worst],
        "rewards/margins": margins,
        "rewards/accuracies": (margins.sign() + 1) / 2,
        "logps/chosen": logps[best],
        "logps/rejected": logps[worst],
    }


@objective(unit="completion", source="arXiv:2402.05369, InfoNCA (K completions with rewards)")
def info_nca(
    logps: Tensor, ref_logps: Tensor, scores: Tensor, group: Tensor, *, beta: float = 0.01, alpha: float = 1.0
) -> tuple[Tensor, Metrics]:
    """Noise contrastive alignment, relative: classify which of a prompt's completions the scores would pick.

    Formula:
        q = softmax of score / alpha over the prompt's completions
        loss_k = -q_k log softmax(r)_k; the sum over a group is the cross-entropy of the two distributions
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        alpha: temperature of the scores, in their own units; towards 0 the best completion takes all
    Returns:
        losses (N,), q_k ln K at the start; margins and accuracies of all pairs with unequal scores, rewards and
        logps of the best (chosen) and of the worst (rejected) of each prompt
    Differs:
        The authors' code adds 0.01 to the first completion's score, to break ties; nothing is added here.
        alpha divides the scores, as temperature_alpha does in their code (the paper's alpha is its inverse).
        A score of NaN says that there is none: the completion is left out, and its loss is 0.
    Failure modes:
        alpha belongs to the scale of the scores: 1 is soft for scores from 0 to 1 and hard for those from 0 to 100.
        Only differences between the rewards of one prompt count: all of them may fall together, the best included.
        Completions without a score, and prompts with one completion, count in the mean with 0.
    Use when:
        A reward model or rating scored several completions of a prompt, and how far apart they are matters.
    """
    q, rewards, _, metrics = _contest(logps, ref_logps, scores, group, beta, alpha)
    scored = ~scores.isnan()
    together = (group[:, None] == group[None, :]) & scored[:, None] & scored[None, :]
    own = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
    field = rewards[None, :].masked_fill(~(together | own), -torch.inf)
    return q * (torch.logsumexp(field, dim=1) - rewards), metrics


@objective(unit="completion", source="arXiv:2402.05369, NCA (K completions with rewards)")
def nca(
    logps: Tensor, ref_logps: Tensor, scores: Tensor, group: Tensor, *, beta: float = 0.01, alpha: float = 1.0
) -> tuple[Tensor, Metrics]:
    """Noise contrastive alignment, absolute: tell each completion the scores would pick from the reference's own.

    Formula:
        q = softmax of score / alpha over the prompt's K completions
        loss_k = -q_k log s(r_k) - (1 / K) log s(-r_k)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        alpha: temperature of the scores, in their own units; towards 0 the best completion takes all
    Returns:
        losses (N,), (q_k + 1 / K) ln 2 at the start; margins and accuracies of all pairs with unequal scores, rewards
        and logps of the best (chosen) and of the worst (rejected) of each prompt
    Differs:
        The authors' code adds 0.01 to the first completion's score, to break ties; nothing is added here.
        alpha divides the scores, as temperature_alpha does in their code (the paper's alpha is its inverse).
        A score of NaN says that there is none: the completion is left out, and its loss is 0.
    Failure modes:
        alpha belongs to the scale of the scores: 1 is soft for scores from 0 to 1 and hard for those from 0 to 100.
        The completions must be samples of the reference for the 1 / K term to mean what it says.
        Completions without a score count in the mean with 0.
    Use when:
        As for info_nca, where the best completion's own probability must not fall.
    """
    q, rewards, share, metrics = _contest(logps, ref_logps, scores, group, beta, alpha)
    return q * logistic(rewards) + share * logistic(-rewards), metrics


def _contest(
    logps: Tensor, ref_logps: Tensor, scores: Tensor, group: Tensor, beta: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor, Metrics]:
    """q, the rewards r, 1 / K (both 0 where there is no score) and the metrics, each per completion."""
    in_range("beta", beta, above=0)
    in_range("alpha", alpha, above=0)
    rewards = beta * (logps - ref_logps)
    scored = ~scores.isnan()
    together = (group[:, None] == group[None, :]) & scored[:, None] & scored[None, :]
    tempered = (scores / alpha).to(rewards.dtype)
    field = tempered[None, :].masked_fill(~together, -torch.inf)
    q = torch.where(scored, (tempered - torch.logsumexp(field, dim=1)).exp(), 0.0)
    share = scored.to(rewards.dtype) / together.sum(1).clamp(min=1)
    below = together & (scores[None, :] < scores[:, None])
    return q, rewards, share, _order_metrics(rewards, logps, together, below)


__all__ = ["info_nca", "nca", "plackett_luce"]
