"""Pair objectives that keep DPO's margin of implicit rewards and change what is asked of it.

Throughout h(y) = log pi(y|x) - log ref(y|x), summed over the tokens of a completion, and h = h_w - h_l for the
preferred and the other completion of a pair. Rewards in the metrics are beta * h(y).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from steerwell.objectives.pair_losses import expected, expected_either, logistic, pair_metrics
from steerwell.objectives.table import Metrics, in_range, objective


@objective(unit="pair", source="arXiv:2403.00409, the rDPO loss")
def robust_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    flip_rate: float = 0.1,
) -> tuple[Tensor, Metrics]:
    """Robust DPO: the loss whose expectation under flipped labels is that of DPO under the true ones.

    Formula:
        loss = (-(1 - e) log s(beta h) + e log s(-beta h)) / (1 - 2 e), with e = flip_rate
        with pair_probs p: p loss(h) + (1 - p) loss(-h)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        flip_rate: e, the share of labels known to be flipped at random; 0 <= e < 0.5
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h, margins and accuracies
    Differs:
        Computed as -log s(beta h) - e beta h / (1 - 2 e), which is the same and does not cancel.
    Failure modes:
        Unbiased only if labels flip independently at this rate; a wrong rate biases, either way.
        One example is unbounded below: a loss far under 0 means that pairs are fitted, flipped ones too.
        The variance grows with 1 / (1 - 2 e)^2; near 0.5 it drowns the signal.
        Not label smoothing: cDPO (dpo with label_smoothing) bounds the margin and does not correct for flips.
    Use when:
        A known share of labels is flipped at random (a measured annotator error), and there are many pairs.
    """
    in_range("beta", beta, above=0)
    in_range("flip_rate", flip_rate, at_least=0, below=0.5)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    slope = flip_rate / (1 - 2 * flip_rate)
    losses = expected(lambda margin: logistic(margin) - slope * margin, rewards[0] - rewards[1], pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(
    unit="pair", source="arXiv:2309.06657 (RSO), the hinge-norm loss; the link of SLiC on DPO's margin"
)
def hinge(
    logps: Tensor, ref_logps: Tensor, pairs: Tensor, pair_probs: Tensor | None = None, *, beta: float = 0.1
) -> tuple[Tensor, Metrics]:
    """Hinge loss on the margin of implicit rewards: pairs that are right by a margin of 1 are left alone.

    Formula:
        loss = max(0, 1 - beta h)
        with pair_probs p: p max(0, 1 - beta h) + (1 - p) max(0, 1 + beta h)
    Hyperparameters:
        beta: scale of the reward; the pair is done at h = 1 / beta nats (RSO uses 0.05)
    Returns:
        losses (M,), 1 for each pair at the start; rewards beta * h, margins and accuracies
    Failure modes:
        A flipped label pulls with full force for ever: the gradient is not bounded by doubt.
        Beyond the margin nothing holds a pair; with beta small no pair gets there.
        A soft label below 1 has its optimum at the kink h = 1 / beta, not at the logit of p.
    Use when:
        Margins should stop to grow at a fixed size, and labels are clean.
    """
    in_range("beta", beta, above=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    losses = expected(lambda margin: F.relu(1 - margin), rewards[0] - rewards[1], pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2402.13228, the DPO-Positive loss (Smaug)")
def dpop(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    lam: float = 50.0,
) -> tuple[Tensor, Metrics]:
    """DPO-Positive: DPO with a penalty, inside the link, where the chosen completion falls below its start.

    Formula:
        loss = -log s(beta (h_w - h_l - lam max(0, -h_w)))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        lam: weight of the penalty; at 0 this is DPO
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h (the penalty is not in them), margins,
        accuracies and penalty, lam max(0, -h_w)
    Failure modes:
        Below its start the chosen completion is pulled up lam + 1 times as hard as the other is pushed down:
        that is close to plain imitation of the chosen side.
        Kink at h_w = 0, where every run starts: the first steps see two different gradients.
    Use when:
        The two completions of a pair differ in few tokens (mathematics, edits), where DPO lowers both.
    """
    in_range("beta", beta, above=0)
    in_range("lam", lam, at_least=0)
    h = logps[pairs] - ref_logps[pairs]

    def loss(preferred: Tensor, other: Tensor) -> Tensor:
        return logistic(beta * (preferred - other - lam * F.relu(-preferred)))

    metrics = pair_metrics(beta * h, logps[pairs])
    metrics["penalty"] = lam * F.relu(-h[0].detach())
    return expected_either(loss, h, pair_probs), metrics


@objective(unit="pair", source="arXiv:2402.00856, equation 16 (EXO-pref)")
def exo_pair(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    epsilon: float = 1e-3,
) -> tuple[Tensor, Metrics]:
    """Efficient exact optimisation on pairs: the reverse KL from the policy's preference to the label's.

    Formula:
        q = s(beta h), the policy's probability that w is preferred
        loss = q log(q / t) + (1 - q) log((1 - q) / (1 - t)), with the target t = 1 - epsilon
        with pair_probs p: t = p (1 - epsilon) + (1 - p) epsilon
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        epsilon: how far the label is held from certainty; 0 < epsilon < 0.5
    Returns:
        losses (M,), 0 where q = t; rewards beta * h, margins and accuracies
    Differs:
        A soft label is the target distribution itself, as in the paper's equation for a reward model, and not
        an expectation over two hard labels; so its optimum is q = t.
        epsilon = 0 is an error: the divergence is infinite. Some trainers set 1e-3 in silence.
    Failure modes:
        Mode seeking: where q is near 0 the gradient dies, so a pair that is firmly wrong stays wrong.
        The value depends on epsilon as much as on the data: losses of runs with different epsilon do not
        compare.
    Use when:
        Soft labels or a reward model's preferences are at hand, and the policy starts near the data.
    """
    in_range("beta", beta, above=0)
    in_range("epsilon", epsilon, above=0, below=0.5)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    margin = rewards[0] - rewards[1]
    if pair_probs is None:
        towards, away = math.log1p(-epsilon), math.log(epsilon)
    else:
        # each side's share by itself: 1 - target would cancel where a float32 label is certain
        towards = torch.log(pair_probs * (1 - epsilon) + (1 - pair_probs) * epsilon)
        away = torch.log(pair_probs * epsilon + (1 - pair_probs) * (1 - epsilon))
    losses = torch.sigmoid(margin) * (F.logsigmoid(margin) - towards)
    losses = losses + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - away)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(
    unit="pair",
    source="arXiv:2406.08414, equation 5 (log-ratio modulated loss)",
    rises_at_start="its slope there is (1 - ln 2) / (4 tau) - 3 / 4 in units of beta h, above 0 for tau < 0.102; "
    "a dip lies at a small negative margin and the fall begins at a small positive one",
)
def discopop(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.05,
    tau: float = 0.05,
) -> tuple[Tensor, Metrics]:
    """DiscoPOP: a link found by search, logistic for wrong pairs, exponential for right ones.

    Formula:
        x = beta h;  m = s(x / tau)
        loss = -(1 - m) log s(x) + m exp(-x)
        with pair_probs p: p loss(x) + (1 - p) loss(-x)
    Hyperparameters:
        beta: scale of the reward
        tau: width of the passage from one link to the other, in units of x; 0 < tau <= 1
    Returns:
        losses (M,), (ln 2 + 1) / 2 for each pair at the start; rewards beta * h, margins and accuracies
    Differs:
        tau > 1 is an error: the exponential would then win on the wrong side and grow without bound.
    Failure modes:
        Not convex: at the start the loss of a single pair rises with its margin (see the notes). Noise and other
        pairs must carry it over a bump before it falls.
        Smaller than the bump, a step goes downhill into the dip: check that accuracy passes one half.
    Use when:
        Comparing with the paper. For new work another link is easier to reason about.
    """
    in_range("beta", beta, above=0)
    in_range("tau", tau, above=0, at_most=1)
    rewards = beta * (logps[pairs] - ref_logps[pairs])

    def loss(margin: Tensor) -> Tensor:
        # m exp(-x) as one exponential: its exponent is never above 0 when tau <= 1
        right = torch.exp(F.logsigmoid(margin / tau) - margin)
        return torch.sigmoid(-margin / tau) * logistic(margin) + right

    losses = expected(loss, rewards[0] - rewards[1], pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2502.07599 (DPO-Shift); the authors' code, strategy 'fixed'")
def dpo_shift(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    lam: float = 0.95,
) -> tuple[Tensor, Metrics]:
    """DPO-Shift: DPO with the rejected completion's reward scaled down, so that the chosen one falls less.

    Formula:
        loss = -log s(beta (h_w - lam h_l))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        lam: weight of the rejected side; at 1 this is DPO; 0 < lam <= 1 (the paper: 0.5 to 0.95)
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h without lam, margins and accuracies
    Differs:
        lam is fixed. The paper also moves it along a line over the run, up or down; a hyperparameter is constant
        within a run, so such a schedule is a sequence of runs, each with its lam, each from the last one's model
        and with the first one's reference.
    Failure modes:
        Trades margin for the chosen completion's probability: accuracy and margin are lower than DPO's.
        With lam < 1 raising both sides lowers the loss: a policy may gain by being likelier everywhere in the data.
    Use when:
        logps/chosen falls under DPO and a term with a weight of its own (DPOP, SFT) is too strong.
    """
    in_range("beta", beta, above=0)
    in_range("lam", lam, above=0, at_most=1)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    losses = expected_either(lambda preferred, other: logistic(preferred - lam * other), rewards, pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2401.01335, the SPIN objective with the logistic loss")
def spin(logps: Tensor, ref_logps: Tensor, pairs: Tensor, *, beta: float = 0.1) -> tuple[Tensor, Metrics]:
    """Self-play fine-tuning: demonstrations against what the policy of the last round answered.

    Formula:
        loss = -log s(beta (h_w - h_l)), w a demonstration, l a sample of the reference
        the reference is the policy of the round before, which sampled l
    Hyperparameters:
        beta: the paper's lambda; how strongly a round is held to the round before
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h, margins and accuracies
    Differs:
        The formula is DPO's; what differs is the data and the reference, and those are the caller's: sample
        every prompt from the reference, pair each sample with its demonstration, train, and let the result be
        the next reference. No soft labels: the demonstration is the better one by definition.
    Failure modes:
        Run with a reference other than the sampler it is DPO on off-policy pairs, and its fixed point is lost.
        Stops to teach when samples cannot be told from demonstrations; it never passes their quality.
        Demonstrations of one style teach the style first.
    Use when:
        There are demonstrations and no preferences, and imitation alone has levelled off.
    """
    in_range("beta", beta, above=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    return logistic(rewards[0] - rewards[1]), pair_metrics(rewards, logps[pairs])


__all__ = ["discopop", "dpo_shift", "dpop", "exo_pair", "hinge", "robust_dpo", "spin"]
