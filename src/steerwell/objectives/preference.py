"""Objectives for preference tuning: imitation, pairs, and labels on single completions.

Each pair loss is a function f of the pair's margin. ``pair_probs`` p are soft labels: the loss is the
expectation over which side is the preferred one, ``p f(margin) + (1 - p) f(-margin)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import expected, logistic, pair_metrics
from steerwell.objectives.table import Metrics, in_range, objective, one_of


@objective(unit="token", mask="demonstrations", source="maximum likelihood on demonstrations")
def sft(per_token_logps: Tensor, owner: Tensor, demonstrations: Tensor) -> tuple[Tensor, Metrics]:
    """Imitate the demonstrations: negative log-likelihood of their tokens.

    Formula:
        loss_t = -log pi(y_t | x, y_<t), for the tokens of completions marked as demonstrations
    Returns:
        losses (S_d,), the tokens of demonstrations in the order given; no metrics
    Use when:
        You have completions worth imitating: a first stage before preferences, or the anchor in a
        mixture that keeps the chosen completions likely.
    Failure modes:
        token_mean lets long demonstrations weigh more than short ones.
        Several epochs over few demonstrations memorise them; watch the held-out loss.
    """
    return -per_token_logps[demonstrations[owner]], {}


@objective(unit="pair", source="arXiv:2305.18290, equation 7; label smoothing: cDPO (Mitchell 2023)")
def dpo(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """Direct preference optimisation: logistic loss on the difference of implicit rewards.

    Formula:
        h(y) = log pi(y|x) - log ref(y|x), summed over tokens
        loss = -q log s(beta (h_w - h_l)) - (1 - q) log s(-beta (h_w - h_l))
        q = p (1 - e) + (1 - p) e, with p = pair_probs (1 if not given) and e = label_smoothing
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        label_smoothing: e, the share of labels taken to be flipped (cDPO); 0 <= e < 0.5
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h, margins and accuracies (ties count
        half)
    Use when:
        You have pairs and room for a reference: the one to try first and to compare others with.
        label_smoothing for labels known to be noisy, pair_probs where several annotators voted.
    Failure modes:
        On deterministic labels the margin grows without bound; label smoothing stops it at logit(1 - e) /
        beta.
        The chosen completion's own log-probability may fall (likelihood displacement): watch logps/chosen.
        Completions grow longer if the chosen ones are; quality may peak before one epoch is over.
        Label smoothing shrinks the margin, it does not correct for flipped labels.
    """
    in_range("beta", beta, above=0)
    in_range("label_smoothing", label_smoothing, at_least=0, below=0.5)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    probs = pair_probs
    if label_smoothing > 0:
        p = torch.ones_like(rewards[0]) if probs is None else probs
        probs = p * (1 - label_smoothing) + (1 - p) * label_smoothing
    return expected(logistic, rewards[0] - rewards[1], probs), pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2310.12036, equation 17")
def ipo(
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    tau: float = 0.1,
    reduction: str = "mean",
) -> tuple[Tensor, Metrics]:
    """Identity preference optimisation: regress the log-ratio difference on 1 / (2 tau).

    Formula:
        loss = (h_w - h_l - 1 / (2 tau))^2
        h(y) = (log pi(y|x) - log ref(y|x)) / |y| for reduction "mean", without the division for "sum"
        with pair_probs p: p (h_w - h_l - 1 / (2 tau))^2 + (1 - p) (h_l - h_w - 1 / (2 tau))^2
    Hyperparameters:
        tau: how strongly the policy is held to the reference; the margin aimed at is 1 / (2 tau)
        reduction: "mean" takes log-ratios per token, "sum" per completion
    Returns:
        losses (M,), 1 / (4 tau^2) for each pair at the start; rewards tau * h, margins and accuracies
    Differs:
        The paper's equation has sums. The default is the mean per token, which its authors recommend for
        language models and which public trainers use. With "mean" the aim of 1 / (2 tau) is in nats per
        token: 5 at tau = 0.1 is far; with "sum" the same number is in nats per completion.
    Use when:
        You have pairs with one firm verdict each, and DPO's margin runs away on them.
    Failure modes:
        A tau tuned for one reduction is wrong for the other by about the length of a completion.
        Beyond the aim the gradient turns and pulls the margin back: accuracy may fall while the loss falls.
    """
    in_range("tau", tau, above=0)
    one_of("reduction", reduction, ("mean", "sum"))
    h = logps[pairs] - ref_logps[pairs]
    if reduction == "mean":
        h = h / lengths[pairs].clamp(min=1)
    losses = expected(lambda margin: (margin - 1 / (2 * tau)).square(), h[0] - h[1], pair_probs)
    return losses, pair_metrics(tau * h, logps[pairs])


@objective(unit="pair", source="arXiv:2405.14734, equation 6")
def simpo(
    logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 2.5,
    gamma: float = 1.375,
) -> tuple[Tensor, Metrics]:
    """Simple preference optimisation: mean log-probabilities as rewards, a target margin, no reference model.

    Formula:
        r(y) = beta * log pi(y|x) / |y|
        loss = -log s(r_w - r_l - gamma)
        with pair_probs p: -p log s(r_w - r_l - gamma) - (1 - p) log s(r_l - r_w - gamma)
    Hyperparameters:
        beta: scale of the reward
        gamma: the target margin itself, as in the paper's equation, in units of r; not the ratio gamma / beta
            that some trainers call gamma_beta_ratio (that ratio is 0.55 here)
    Returns:
        losses (M,); rewards r, margins and accuracies
    Use when:
        You have pairs but no room for a reference, and can afford to sweep the learning rate.
        The chosen and the rejected differ much in length.
    Failure modes:
        Nothing holds the policy to its start: too high a learning rate ends in repetition loops.
        Very sensitive to the learning rate (3e-7 to 1e-6 for models of 7B parameters).
        Lengths are normalised within a pair only; completions may still grow or shrink.
    """
    in_range("beta", beta, above=0)
    in_range("gamma", gamma, at_least=0)
    rewards = beta * logps[pairs] / lengths[pairs].clamp(min=1)
    losses = expected(lambda margin: logistic(margin - gamma), rewards[0] - rewards[1], pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="completion", decomposable=False, source="arXiv:2402.01306, section 4.1 (L_KTO)")
def kto(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    kl: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """Kahneman-Tversky optimisation: desirable or not, each completion by itself, against a reference point.

    Formula:
        h(y) = log pi(y|x) - log ref(y|x), summed over tokens;  z = max(0, kl), without gradient
        desirable:    loss = desirable_weight   (1 - s(beta (h - z)))
        undesirable:  loss = undesirable_weight (1 - s(beta (z - h)))
    Hyperparameters:
        beta: how strongly the policy is held to the reference, and how soon a completion stops to matter
        desirable_weight: weight of desirable completions; keep desirable_weight * n_desirable /
            (undesirable_weight * n_undesirable) between 1 and 4/3
        undesirable_weight: weight of undesirable completions
    Returns:
        losses (N,); rewards/chosen over the desirable, rewards/rejected over the undesirable, kl
    Use when:
        You have thumbs up or down on single completions, or far more of one than of the other.
        Steps hold some tens of completions, so that kl is an estimate.
    Failure modes:
        kl is the mean of h over completions put beside prompts that are not theirs, over the whole step;
        from a micro-batch of one, or where a prompt meets its own completion, it is no estimate of anything.
        Completions far on either side get no gradient; a wrong label that is firmly disbelieved stays so.
        Strong imbalance without the weights drives everything up or down.
    """
    in_range("beta", beta, above=0)
    in_range("desirable_weight", desirable_weight, at_least=0)
    in_range("undesirable_weight", undesirable_weight, at_least=0)
    z = kl.detach().clamp(min=0)
    h = logps - ref_logps
    gain = beta * torch.where(labels, h - z, z - h)
    desirable = labels.to(gain.dtype)  # in the losses' dtype: torch.where on two numbers is float32
    weight = desirable * desirable_weight + (1 - desirable) * undesirable_weight
    rewards, seen = (beta * h).detach(), logps.detach()
    metrics = {
        "rewards/chosen": rewards[labels],
        "rewards/rejected": rewards[~labels],
        "logps/chosen": seen[labels],
        "logps/rejected": seen[~labels],
        "kl": z.expand(len(logps)),
    }
    return weight * torch.sigmoid(-gain), metrics


__all__ = ["dpo", "ipo", "kto", "sft", "simpo"]
