"""Pair objectives that ask something of each side's own reward, not only of their difference.

They hold the chosen completion's probability where DPO may let it fall. Throughout
h(y) = log pi(y|x) - log ref(y|x), summed over the tokens of a completion, and r = beta h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import expected_either, logistic, pair_metrics
from steerwell.objectives.table import Metrics, in_range, objective


@objective(unit="pair", source="arXiv:2408.06266, equation 7 (APO-zero)")
def apo_zero(
    logps: Tensor, ref_logps: Tensor, pairs: Tensor, pair_probs: Tensor | None = None, *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """Anchored preference optimisation, zero: the chosen side up, the rejected one down, each by itself.

    Formula:
        loss = 1 - s(r_w) + s(r_l)
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference, and how soon a completion stops to matter
    Returns:
        losses (M,), 1 for each pair at the start; rewards beta * h, margins and accuracies
    Differs:
        The constant 1 keeps the loss >= 0; the paper's equation is without it.
    Failure modes:
        Completions far on either side get no gradient: a wrong pair that is firmly believed stays so.
        Wrong where the policy is already better than the chosen completions: it is pulled down to them.
    Use when:
        The chosen completions are better than what the policy writes (a stronger model's, a person's).
    """
    in_range("beta", beta, above=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    losses = expected_either(
        lambda preferred, other: torch.sigmoid(-preferred) + torch.sigmoid(other), rewards, pair_probs
    )
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2408.06266, equation 8 (APO-down)")
def apo_down(
    logps: Tensor, ref_logps: Tensor, pairs: Tensor, pair_probs: Tensor | None = None, *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """Anchored preference optimisation, down: both completions down, the rejected one further.

    Formula:
        loss = s(r_w) + 1 - s(r_w - r_l)
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference, and how soon a pair stops to matter
    Returns:
        losses (M,), 1 for each pair at the start; rewards beta * h, margins and accuracies
    Differs:
        The constant 1 keeps the loss >= 0; the paper's equation is without it.
    Failure modes:
        Lowers the chosen completion on purpose: falling logps/chosen are no sign of a fault here.
        At the start the two pulls on the chosen side cancel and only the rejected one moves.
        Probability that leaves both completions goes where the data say nothing.
    Use when:
        The policy already writes better than the chosen completions, and only their order is worth learning.
    """
    in_range("beta", beta, above=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    losses = expected_either(
        lambda preferred, other: torch.sigmoid(preferred) + torch.sigmoid(other - preferred),
        rewards,
        pair_probs,
    )
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2402.05369 (NCA), the loss for pairs")
def nca_pair(
    logps: Tensor, ref_logps: Tensor, pairs: Tensor, pair_probs: Tensor | None = None, *, beta: float = 0.01
) -> tuple[Tensor, Metrics]:
    """Noise contrastive alignment on pairs: chosen against noise, both sides held to the start.

    Formula:
        loss = -log s(r_w) - (log s(-r_w) + log s(-r_l)) / 2
        with pair_probs p: -p log s(r_w) - (1 - p) log s(r_l) - (log s(-r_w) + log s(-r_l)) / 2
    Hyperparameters:
        beta: scale of the reward; the paper's 0.01 lets the policy move far
    Returns:
        losses (M,), 2 ln 2 for each pair at the start; rewards beta * h, margins and accuracies
    Failure modes:
        Rewards are absolute: a completion that is always chosen aims at r = ln 2 (twice its probability if
        beta = 1), so a longer one gets a smaller share per token.
        The rejected side is pushed with half the weight: margins are smaller than DPO's.
    Use when:
        The chosen completions' own probability must not fall (reasoning, code), at some cost in margin.
    """
    in_range("beta", beta, above=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs])

    def loss(preferred: Tensor, other: Tensor) -> Tensor:
        return logistic(preferred) + 0.5 * (logistic(-preferred) + logistic(-other))

    return expected_either(loss, rewards, pair_probs), pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2404.04656, the loss of BCO with a given reward shift, on pairs")
def bco_pair(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    delta: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Binary classifier optimisation on pairs: each side told from its reward alone, the shift given.

    Formula:
        loss = -log s(r_w - delta) - log s(-(r_l - delta))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        delta: the reward shift, in units of beta * h; 0 holds both sides to the start
    Returns:
        losses (M,), 2 ln 2 for each pair at the start if delta = 0; rewards beta * h, margins and accuracies
    Differs:
        The shift is a constant. The paper's is the mean reward over the data, which moves with the run: that is
        the objective bco. With one chosen and one rejected to a pair the classes are balanced and 0 is a fair
        value; public trainers have used both 0 and a running mean under this name.
    Failure modes:
        A delta far from the rewards' middle turns one side off.
        Bounds DPO's loss from above for every delta, but is not tight: the order is learnt more slowly.
    Use when:
        As a part of a mixture that holds the sides' rewards apart from zero (MPO), or where pairs are noisy.
    """
    in_range("beta", beta, above=0)
    in_range("delta", delta)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    losses = expected_either(
        lambda preferred, other: logistic(preferred - delta) + logistic(delta - other), rewards, pair_probs
    )
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2412.14516, the Cal-DPO loss")
def cal_dpo(
    logps: Tensor, ref_logps: Tensor, pairs: Tensor, pair_probs: Tensor | None = None, *, beta: float = 1e-3
) -> tuple[Tensor, Metrics]:
    """Calibrated DPO: the order of a pair, and each side's log-ratio regressed on its own target.

    Formula:
        loss = -log s(h_w - h_l) + (h_w - 1 / (2 beta))^2 + (h_l + 1 / (2 beta))^2
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: only sets the targets +-1 / (2 beta): 500 nats at 1e-3; smaller pulls further from the reference
    Returns:
        losses (M,), ln 2 + 1 / (2 beta^2) for each pair at the start; rewards h (without beta), margins,
        accuracies
    Differs:
        The formula is the paper's; the authors' code halves the two squares.
    Failure modes:
        At beta = 1e-3 the squares are some 5e5 at the start and the order term is noise beside them; the
        gradient is as good as constant, so the learning rate decides how far it goes. Clip the gradient.
        Targets are nats per completion: a completion of 20 tokens can hardly fall by 500.
    Use when:
        The chosen completions' probability must rise and the rejected ones' fall, by a set amount.
    """
    in_range("beta", beta, above=0)
    h, aim = logps[pairs] - ref_logps[pairs], 1 / (2 * beta)
    losses = expected_either(
        lambda preferred, other: (
            logistic(preferred - other) + (preferred - aim).square() + (other + aim).square()
        ),
        h,
        pair_probs,
    )
    return losses, pair_metrics(h, logps[pairs])


__all__ = ["apo_down", "apo_zero", "bco_pair", "cal_dpo", "nca_pair"]
