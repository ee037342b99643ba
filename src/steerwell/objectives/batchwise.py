"""Objectives that look at a whole batch: at its class means, its order statistics, its mean and its spread.

What such a figure is worth depends on how many completions it was taken from, so these objectives want all of an
optimizer step at once, across micro-batches and processes (``decomposable=False``). Figures that move slowly are
carried from step to step in ``running``; without it the batch's own figures are taken. A figure of the batch is
held constant: no gradient passes through it, unlike through the order statistics of AOT.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import logistic, pair_metrics
from steerwell.objectives.table import Metrics, in_range, objective

SMALLEST_BETA = 1e-3  # beta-DPO's floor, in its authors' code


def _label_metrics(rewards: Tensor, logps: Tensor, labels: Tensor) -> Metrics:
    rewards, logps = rewards.detach(), logps.detach()
    return {
        "rewards/chosen": rewards[labels],
        "rewards/rejected": rewards[~labels],
        "logps/chosen": logps[labels],
        "logps/rejected": logps[~labels],
    }


def _moved(before: Tensor | None, now: Tensor, momentum: float) -> Tensor:
    """The moving average, figure by figure: it begins with the first value seen, and NaN means none yet."""
    if before is None:
        return now
    before = before.to(now)
    kept = torch.where(now.isnan(), before, momentum * before + (1 - momentum) * now)
    return torch.where(before.isnan(), now, kept)


# --- BCO ---
def bco_class_means(running: Tensor | None, **given: Any) -> Tensor:
    """Moving averages (2,) of the reward beta * h of the desirable and of the undesirable; NaN: none seen yet."""
    rewards = given["beta"] * (given["logps"] - given["ref_logps"]).detach().double()
    labels = given["labels"]
    now = torch.stack([rewards[labels].mean(), rewards[~labels].mean()])
    return _moved(running, now, given["momentum"])


@objective(
    unit="completion",
    decomposable=False,
    surrogate=True,
    running=bco_class_means,
    source="arXiv:2404.04656: binary cross-entropy with the reward shift, a moving average",
)
def bco(
    logps: Tensor,
    ref_logps: Tensor,
    labels: Tensor,
    running: Tensor | None = None,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
    momentum: float = 0.9,
) -> tuple[Tensor, Metrics]:
    """Binary classifier optimisation: the reward tells desirable from undesirable, about a moving threshold.

    Formula:
        r(y) = beta (log pi(y|x) - log ref(y|x)), summed over tokens
        delta = (mean of r over the desirable + mean of r over the undesirable) / 2, without gradient
        desirable:    loss = -desirable_weight   log s(r - delta)
        undesirable:  loss = -undesirable_weight log s(delta - r)
    Hyperparameters:
        beta: how strongly the policy is held to the reference
        desirable_weight: weight of desirable completions
        undesirable_weight: weight of undesirable completions
        momentum: how much of delta's two means is kept from step to step; 0 takes each step's own
    Returns:
        losses (N,), ln 2 for each completion of weight 1 at the start; rewards/chosen over the desirable,
        rewards/rejected over the undesirable, delta
    Differs:
        delta is the middle of the two class means, each with a moving average of its own, as in the paper. Public
        trainers average over all completions instead: with ten times as many desirable ones that threshold
        lies inside their class.
        The paper adds the mean over each class. Here each completion weighs the same, as in public trainers; for
        the paper's balance of classes let desirable_weight * n_desirable = undesirable_weight * n_undesirable.
        A class that was never seen is left out of delta. The averages begin with the first step's values.
        The importance weights for prompts that differ between the classes (the paper's first version) are
        not applied.
    Failure modes:
        In a run with labels of one kind alone delta follows that class, and little is learnt.
        Strong imbalance without the weights moves the frequent class's probabilities for its own sake.
        Small steps give noisy means; raise momentum.
    Use when:
        The data are thumbs up and thumbs down on single completions, and KTO's mismatched pairs are not to be had.
    """
    in_range("beta", beta, above=0)
    in_range("desirable_weight", desirable_weight, at_least=0)
    in_range("undesirable_weight", undesirable_weight, at_least=0)
    in_range("momentum", momentum, at_least=0, below=1)
    if running is None:
        running = bco_class_means(
            None, logps=logps, ref_logps=ref_logps, labels=labels, beta=beta, momentum=momentum
        )
    rewards = beta * (logps - ref_logps)
    delta = running.nanmean().nan_to_num().to(rewards)  # the middle of the classes that were seen
    desirable = labels.to(rewards.dtype)
    weight = desirable * desirable_weight + (1 - desirable) * undesirable_weight
    losses = weight * logistic((2 * desirable - 1) * (rewards - delta))
    return losses, {**_label_metrics(rewards, logps, labels), "delta": delta.expand(len(logps))}


# --- AOT ---
@objective(
    unit="pair",
    decomposable=False,
    source="arXiv:2406.05882, paired AOT with the logistic loss",
)
def aot(logps: Tensor, ref_logps: Tensor, pairs: Tensor, *, beta: float = 0.1) -> tuple[Tensor, Metrics]:
    """Alignment by optimal transport: the distribution of margins is to exceed the reference's at every quantile.

    Formula:
        u = log pi(y_w|x) - log pi(y_l|x) of each pair, v the same under the reference; both sorted by themselves
        loss_k = -log s(beta (u_(k) - v_(k))), with u_(k) the k-th smallest of the batch's u
    Hyperparameters:
        beta: steepness of the penalty where a quantile falls behind the reference's
    Returns:
        losses (M,), that of u_(k) at the pair whose u it is; ln 2 for each pair at the start; rewards beta * h of
        each pair, margins and accuracies
    Differs:
        Public trainers sort the micro-batch at hand: at one pair each that is plain DPO. Here the whole step is
        sorted.
    Failure modes:
        Only the distribution counts: a pair may stay wrong while others make up for its quantile.
        The fewer pairs a step has, the coarser the quantiles; below some tens it is close to DPO.
        A pair cannot be weighted, nor its label be soft: its place depends on all the others.
    Use when:
        Pairs are noisy one by one but trustworthy in their sum, and steps are large.
    """
    in_range("beta", beta, above=0)
    margins = logps[pairs[0]] - logps[pairs[1]]
    reference = (ref_logps[pairs[0]] - ref_logps[pairs[1]]).sort().values
    place = margins.detach().argsort().argsort()
    losses = logistic(beta * (margins - reference[place]))
    return losses, pair_metrics(beta * (logps[pairs] - ref_logps[pairs]), logps[pairs])


@objective(
    unit="completion",
    decomposable=False,
    source="arXiv:2406.05882, unpaired AOT with the logistic loss; classes of unequal size by quantile coupling",
)
def aot_unpaired(
    logps: Tensor, ref_logps: Tensor, labels: Tensor, *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """Alignment by optimal transport: log-ratios of the desirable above the others' at every quantile.

    Formula:
        h(y) = log pi(y|x) - log ref(y|x), summed over tokens
        mean of the losses = integral over t in (0, 1) of -log s(beta (Q_w(t) - Q_l(t)))
        Q_w is the quantile function of h over the batch's desirable completions, Q_l over the undesirable;
        with k of each kind that is the mean over i of -log s(beta (h_w(i) - h_l(i))), both sorted by themselves
    Hyperparameters:
        beta: steepness of the penalty where a quantile of the desirable falls behind
    Returns:
        losses (N,): of each completion the mean over what it is coupled with; ln 2 at the start, 0 without the other
        kind; rewards/chosen over the desirable, rewards/rejected over the undesirable
    Differs:
        The paper and public trainers have as many of one kind as of the other. Unequal numbers are coupled in full
        (optimal transport on the line); nothing is dropped or drawn again.
        Public trainers sort the micro-batch at hand. Here the whole step is sorted.
    Failure modes:
        A step with completions of one kind alone teaches nothing.
        Only the distributions count: completions of different prompts are compared with each other.
    Use when:
        There are labels on single completions and steps are large.
    """
    in_range("beta", beta, above=0)
    h = logps - ref_logps
    good, bad = torch.nonzero(labels).flatten(), torch.nonzero(~labels).flatten()
    good, bad = good[h[good].detach().argsort()], bad[h[bad].detach().argsort()]
    metrics = _label_metrics(beta * h, logps, labels)
    if not len(good) or not len(bad):
        return h * 0, metrics
    # In units of 1 / (n_good n_bad): the i-th good one holds n_bad of them from i * n_bad on, and so on.
    steps = [torch.arange(1, len(a) + 1, device=h.device) * len(b) for a, b in ((good, bad), (bad, good))]
    ends = torch.unique(torch.cat(steps))
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    upper, lower = good[starts // len(bad)], bad[starts // len(good)]
    shared = logistic(beta * (h[upper] - h[lower])) * (ends - starts).to(h.dtype)
    losses = (
        torch.zeros_like(h).index_add(0, upper, shared / len(bad)).index_add(0, lower, shared / len(good))
    )
    return losses, metrics


# --- beta-DPO and alpha-DPO ---
def _margins(given: dict[str, Any]) -> Tensor:
    h = (given["logps"] - given["ref_logps"]).detach().double()
    return h[given["pairs"][0]] - h[given["pairs"][1]]


def beta_dpo_mean(running: Tensor | None, **given: Any) -> Tensor:
    """The moving average (1,) of the mean margin; NaN: no pair seen yet."""
    return _moved(running, _margins(given).mean().reshape(1), given["momentum"])


@objective(
    unit="pair",
    decomposable=False,
    surrogate=True,
    running=beta_dpo_mean,
    source="arXiv:2407.08639: batch-level beta and beta-guided filtering",
)
def beta_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    running: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.6,
    filtered: float = 0.2,
    momentum: float = 0.9,
) -> tuple[Tensor, Metrics]:
    """DPO with a beta for each batch, larger where its margins are large, and without the batch's outliers.

    Formula:
        h = log-ratio of the preferred completion - log-ratio of the other, summed over tokens
        M_0 = moving average of the batches' mean h
        kept: the share 1 - filtered of the pairs with the largest exp(-(h - M_0)^2 / (2 sigma^2))
        b = beta (1 + alpha (mean of h over the kept - M_0)), at least 0.001, without gradient
        loss = -log s(b h) where kept, 0 elsewhere
    Hyperparameters:
        beta: the beta of a batch whose mean margin is usual
        alpha: how far b follows the mean margin, per nat
        filtered: share of the pairs that is set aside in each batch
        momentum: how much of M_0 is kept from step to step; 0 takes each step's own
    Returns:
        losses (M,), 0 for pairs set aside; rewards beta * h, margins and accuracies; beta, and kept (1 or 0)
    Differs:
        The authors draw the kept pairs at random with the Gaussian weight. Here those with the largest weight are
        kept, so that a step is the same however it is cut; and as the weight falls with |h - M_0| whatever sigma
        is, sigma does not enter. Pairs as far from M_0 as each other are kept or set aside together.
        The number of kept pairs is rounded up, theirs down.
        The authors divide by the number of kept pairs, here pairs set aside count in the mean with 0: the step is
        1 - filtered times theirs, which a larger learning rate makes up for.
        The margin h is not multiplied by beta, as in the authors' code. M_0 begins with the first step's mean, not 0.
    Failure modes:
        Margins grow in nats with length: alpha = 0.6 per nat sends b to its floor, or to many times beta, in one step
        where the mean margin moves by a few nats. Watch the metric beta.
        The pairs that the policy gets most wrong are outliers too, and are set aside.
    Use when:
        Pairs differ much in how clear they are and the best single beta is not known.
    """
    in_range("beta", beta, above=0)
    in_range("alpha", alpha, at_least=0)
    in_range("filtered", filtered, at_least=0, below=1)
    in_range("momentum", momentum, at_least=0, below=1)
    if running is None:
        running = beta_dpo_mean(None, logps=logps, ref_logps=ref_logps, pairs=pairs, momentum=momentum)
    h = logps[pairs] - ref_logps[pairs]
    margins = h[0] - h[1]
    usual = running[0].to(margins)
    away = (margins.detach() - usual).abs()
    nearer = torch.searchsorted(away.sort().values, away.contiguous())  # how many pairs are strictly nearer
    room = math.ceil((1 - filtered) * len(away) - 1e-9)  # (1 - 0.7) * 10 is above 3
    kept = (nearer < room).to(margins.dtype)
    excess = (kept * (margins.detach() - usual)).sum() / kept.sum().clamp(min=1)
    scaled = (beta * (1 + alpha * excess)).clamp(min=SMALLEST_BETA).nan_to_num(beta)
    metrics = pair_metrics(beta * h, logps[pairs])
    metrics |= {"beta": scaled.expand(len(kept)), "kept": kept}
    return kept * logistic(scaled * margins), metrics


def _mean_margins(given: dict[str, Any]) -> Tensor:
    """Margins (M,) of the log-ratios per token."""
    h = (given["logps"] - given["ref_logps"]).detach().double() / given["lengths"].double().clamp(min=1)
    return h[given["pairs"][0]] - h[given["pairs"][1]]


def alpha_dpo_moments(running: Tensor | None, **given: Any) -> Tensor:
    """Moving averages (2,) of mean and standard deviation of the margin per token; NaN: no pair seen yet."""
    margins = _mean_margins(given)
    now = torch.stack([margins.mean(), (margins - margins.mean()).square().mean().sqrt()])
    return _moved(running, now, given["momentum"])


@objective(
    unit="pair",
    decomposable=False,
    surrogate=True,
    running=alpha_dpo_moments,
    source="arXiv:2410.10148, the final objective (AlphaDPO)",
)
def alpha_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    running: Tensor | None = None,
    *,
    beta: float = 2.5,
    gamma: float = 1.5,
    alpha: float = 0.5,
    momentum: float = 0.9,
) -> tuple[Tensor, Metrics]:
    """SimPO with a target margin for each pair: larger where policy and reference already differ for it.

    Formula:
        u = beta (log pi(y_w|x) / |y_w| - log pi(y_l|x) / |y_l|)
        m = the same difference of log pi - log ref per token; z = (m - mean m) / (standard deviation of m)
        loss = -log s(u - (gamma + alpha z)), without gradient through gamma + alpha z
        mean and standard deviation are moving averages over batches
    Hyperparameters:
        beta: scale of the reward
        gamma: the target margin of a usual pair, in units of u
        alpha: how far the target margin moves with z, in units of u
        momentum: how much of mean and standard deviation is kept from step to step; 0 takes each step's own
    Returns:
        losses (M,); rewards beta * log pi per token, margins and accuracies; target, the margin asked of the pair
    Differs:
        The authors' code has gamma and alpha inside the bracket that beta multiplies: its gamma_beta_ratio = 0.6 and
        alpha = 0.2 at beta = 2.5 are gamma = 1.5 and alpha = 0.5 here, as in the paper's equation.
        Where all margins are equal, as in the first step when policy and reference are one, z is 0 (their code
        divides 0 by 0). The standard deviation is the batch's own, with M below the line, not M - 1.
        The moving averages begin with the first step's values, not with 0.
    Failure modes:
        After a first step without spread the standard deviation is too small for about ten steps, and z too large.
        As with SimPO nothing holds the policy to its start, and the learning rate matters much.
    Use when:
        SimPO is the choice and its one margin for all pairs does not fit data of mixed clarity.
    """
    in_range("beta", beta, above=0)
    in_range("gamma", gamma, at_least=0)
    in_range("alpha", alpha, at_least=0)
    in_range("momentum", momentum, at_least=0, below=1)
    given = {"logps": logps, "ref_logps": ref_logps, "lengths": lengths, "pairs": pairs}
    if running is None:
        running = alpha_dpo_moments(None, momentum=momentum, **given)
    mean, spread = running.to(logps.device)
    z = torch.where(spread > 0, (_mean_margins(given) - mean) / spread, 0.0)
    rewards = beta * logps[pairs] / lengths[pairs].clamp(min=1)
    target = (gamma + alpha * z).to(rewards.dtype)
    losses = logistic(rewards[0] - rewards[1] - target)
    return losses, {**pair_metrics(rewards, logps[pairs]), "target": target}


__all__ = [
    "alpha_dpo",
    "alpha_dpo_moments",
    "aot",
    "aot_unpaired",
    "bco",
    "bco_class_means",
    "beta_dpo",
    "beta_dpo_mean",
]
