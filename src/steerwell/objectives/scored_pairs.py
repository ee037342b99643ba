"""Pair objectives that use how much better a completion is: given scores, or the probability of winning.

``scores`` are those of the data (a reward model's, a person's), one for each completion, and must be there for
every completion that a pair names. h(y) = log pi(y|x) - log ref(y|x), summed over the tokens of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import logistic, pair_metrics
from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective


@objective(unit="pair", source="arXiv:2402.10571 (ODPO), with the offset alpha log(score gap)")
def odpo(
    logps: Tensor,
    ref_logps: Tensor,
    scores: Tensor,
    pairs: Tensor,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """DPO with an offset: the margin asked of a pair grows with the gap of the given scores.

    Formula:
        loss = -log s(beta (h_w - h_l) - alpha log(score_w - score_l))
        0, without gradient, where score_w <= score_l (the limit as the gap goes to 0)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        alpha: weight of the offset; 0 is DPO on the pairs whose scores agree
    Returns:
        losses (M,); rewards beta * h, margins and accuracies; offsets (0 where there is none) and scores/agree,
        1 where the preferred completion has the higher score
    Differs:
        The paper builds its pairs from the scores, so the gap is never <= 0. Here pairs and scores may come from
        different judges; pairs on which they disagree teach nothing and are counted in scores/agree.
        No soft labels: the gap says how sure the label is.
    Failure modes:
        The offset is negative for gaps below 1: on a scale of 0 to 1 every pair is asked for less than DPO asks.
        Rescale the scores, or know that alpha log(c) is added by a factor c.
        A few huge gaps rule the gradient, as their pairs are never satisfied.
    Use when:
        Pairs carry scores whose gaps mean something (ratings, a calibrated reward model).
    """
    in_range("beta", beta, above=0)
    in_range("alpha", alpha, at_least=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    margin = rewards[0] - rewards[1]
    gap = (scores[pairs[0]] - scores[pairs[1]]).detach()
    agree = gap > 0
    offset = alpha * torch.log(torch.where(agree, gap, 1.0))
    losses = torch.where(agree, logistic(margin - offset), 0.0 * margin)
    metrics = pair_metrics(rewards, logps[pairs])
    metrics["offsets"], metrics["scores/agree"] = offset, agree.to(gap.dtype)
    return losses, metrics


@objective(unit="pair", source="arXiv:2404.16767, the REBEL regression")
def rebel(
    logps: Tensor, ref_logps: Tensor, scores: Tensor, pairs: Tensor, *, eta: float = 1.0
) -> tuple[Tensor, Metrics]:
    """REBEL: regress the difference of log-ratios on the difference of rewards.

    Formula:
        loss = ((h_w - h_l) / eta - (score_w - score_l))^2
    Hyperparameters:
        eta: step size: the optimum is ref * exp(eta * score) / Z, so larger goes further from the reference
    Returns:
        losses (M,), the squared gap of scores at the start; rewards h / eta, margins, accuracies (agreement with
        the order of the pair)
    Differs:
        Turning a pair round changes nothing: which side is preferred is in the scores only, and soft labels have
        no meaning here.
    Failure modes:
        The reference must be the policy that sampled the completions, renewed from round to round; with old
        completions the regression is right where the data are and free elsewhere.
        Scores on a wide scale ask for log-ratios of that size: normalise them, or choose eta accordingly.
        One wild score is squared.
    Use when:
        On-policy rounds with a reward model's scores, two or more completions to a prompt.
    """
    in_range("eta", eta, above=0)
    rewards = (logps[pairs] - ref_logps[pairs]) / eta
    gap = (scores[pairs[0]] - scores[pairs[1]]).detach()
    losses = (rewards[0] - rewards[1] - gap).square()
    return losses, pair_metrics(rewards, logps[pairs])


@objective(
    unit="pair",
    only_if={"scores": "scores_are_win_rates"},
    source="arXiv:2405.00675, equation 4.7 (SPPO); the authors' code for the factor 1/2",
)
def sppo(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    scores: Tensor | None = None,
    *,
    eta: float = 1000.0,
    scores_are_win_rates: bool = False,
) -> tuple[Tensor, Metrics]:
    """Self-play preference optimisation: each side's log-ratio regressed on its probability of winning.

    Formula:
        loss = ((h_w - eta (P_w - 1/2))^2 + (h_l - eta (P_l - 1/2))^2) / 2
        P_w = 1 and P_l = 0; with pair_probs p: P_w = p and P_l = 1 - p
        with scores_are_win_rates: P = scores, each completion's rate of winning against samples of the reference
    Hyperparameters:
        eta: the targets are +-eta / 2 nats; the optimum is ref * exp(eta P) / Z; the paper's 1 / beta
        scores_are_win_rates: take P from scores (0 to 1) instead of the pairs' labels
    Returns:
        losses (M,), eta^2 / 4 for each hard pair at the start; rewards h / eta, margins and accuracies
    Differs:
        The mean over the two sides, as the paper's expectation over completions and the authors' code have it;
        some trainers take the sum, which is twice this. A soft label is the target and not an expectation over
        two hard ones: gradients are the same, values differ by a constant.
    Failure modes:
        At eta = 1000 a hard target is 500 nats, far beyond what a completion can move: the loss is some 2.5e5,
        its gradient as good as constant, and the learning rate decides how far it goes.
        A pair's label is a noisy win rate against one opponent: with few samples to a prompt use win rates.
        The reference must be the policy that sampled, renewed from round to round.
    Use when:
        Iterative self-play with a preference model that gives win rates, intransitive preferences included.
    """
    in_range("eta", eta, above=0)
    h = logps[pairs] - ref_logps[pairs]
    if scores_are_win_rates:
        if scores is None:
            raise ObjectiveError("sppo needs scores while scores_are_win_rates is true")
        wins = scores[pairs].detach()
        if wins.numel() and not bool(((wins >= 0) & (wins <= 1)).all()):
            low, high = wins.min().item(), wins.max().item()
            raise ObjectiveError(f"scores_are_win_rates needs scores from 0 to 1, got {low:g} to {high:g}")
    else:
        p = torch.ones_like(h[0]) if pair_probs is None else pair_probs
        wins = torch.stack([p, 1 - p])
    losses = (h - eta * (wins - 0.5)).square().sum(0) / 2
    return losses, pair_metrics(h / eta, logps[pairs])


__all__ = ["odpo", "rebel", "sppo"]
