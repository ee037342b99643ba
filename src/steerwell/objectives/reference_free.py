"""Pair objectives without a reference model: a preference term on the policy's own log-probabilities.

What holds the policy is imitation of the chosen completion (CPO, ORPO, SLiC) or nothing (AlphaPO; SimPO is in
preference.py). lp(y) = log pi(y|x), summed over the |y| scored tokens of a completion.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from steerwell.objectives.pair_losses import (
    expected,
    expected_either,
    expm1_then_line,
    logistic,
    pair_metrics,
)
from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective, one_of

#: log-odds are taken of mean log-probabilities at most this: at 0 they would be infinite.
NEARLY_CERTAIN = -1e-6


@objective(unit="pair", source="arXiv:2401.08417, the CPO loss")
def cpo(
    logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll: str | None = None,
) -> tuple[Tensor, Metrics]:
    """Contrastive preference optimisation: DPO with a uniform reference, plus imitation of the chosen side.

    Formula:
        loss = -log s(beta (lp(w) - lp(l))) - alpha lp(w) / |w|
        for nll "sum" the last term is -alpha lp(w)
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: scale of the preference term's reward
        alpha: weight of imitation; 0 leaves the preference term alone
        nll: "mean" takes imitation per token, "sum" per completion; None takes "mean"; an error while alpha is 0
    Returns:
        losses (M,); rewards beta * lp, margins and accuracies; nll/chosen, the chosen side's negative
        log-likelihood as it is in the loss
    Differs:
        The paper's equation has the sum. The default is the mean over a completion's tokens, which is nearer to the
        trainer that its first author published: there imitation is the mean over all chosen tokens of a
        micro-batch (long completions weigh more, and the value depends on how a batch is cut). With "sum" and
        alpha = 1 imitation outweighs the preference by about |w|.
    Failure modes:
        Without a reference the shorter completion of a pair starts with the larger reward: sums favour length
        differences over quality.
        Imitation of the chosen side is as good as the chosen side.
    Use when:
        There is no memory or time for a reference, and the chosen completions are worth imitating (translation).
    """
    in_range("beta", beta, above=0)
    in_range("alpha", alpha, at_least=0)
    if nll is not None:
        one_of("nll", nll, ("mean", "sum"))
        if alpha == 0:
            raise ObjectiveError(f"nll is used while alpha is not 0, and alpha is {alpha!r}")
    rewards = beta * logps[pairs]
    size = torch.ones_like(rewards) if nll == "sum" else lengths[pairs].clamp(min=1)
    imitation = -logps[pairs] / size
    losses = expected(logistic, rewards[0] - rewards[1], pair_probs)
    losses = losses + alpha * expected_either(lambda preferred, _: preferred, imitation, pair_probs)
    metrics = pair_metrics(rewards, logps[pairs])
    metrics["nll/chosen"] = imitation[0].detach()
    return losses, metrics


@objective(unit="pair", source="arXiv:2403.07691, the ORPO loss (odds of the mean log-probability)")
def orpo(
    logps: Tensor, lengths: Tensor, pairs: Tensor, pair_probs: Tensor | None = None, *, lam: float = 0.1
) -> tuple[Tensor, Metrics]:
    """Odds-ratio preference optimisation: imitation of the chosen side and a mild push by the odds ratio.

    Formula:
        m(y) = lp(y) / |y|;  log odds(y) = m(y) - log(1 - exp(m(y)))
        loss = -m(w) - lam log s(log odds(w) - log odds(l))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        lam: weight of the odds-ratio term
    Returns:
        losses (M,); rewards m (without lam), margins and accuracies; nll/chosen (-m(w)) and log_odds_ratio
    Differs:
        Both terms take the mean over a completion's tokens, as in the paper; public trainers take imitation as
        the mean over a micro-batch's tokens, and some over the prompt's tokens too.
        m is taken to be at most -1e-6 in the odds, which are infinite at 0.
    Failure modes:
        With sums in the place of means exp(lp) is 0 in any precision, the odds are exp(lp), and the term is
        another one: check lengths.
        lam is small: the model is first of all imitating; accuracy moves slowly.
        Needs a learning rate like imitation's (about 8e-6), not like DPO's.
    Use when:
        One stage from a base model, in place of imitation followed by DPO; no reference in memory.
    """
    in_range("lam", lam, at_least=0)
    mean = logps[pairs] / lengths[pairs].clamp(min=1)
    inner = mean.clamp(max=NEARLY_CERTAIN)
    log_odds = inner - log1mexp(inner)
    ratio = log_odds[0] - log_odds[1]
    losses = expected_either(lambda preferred, _: -preferred, mean, pair_probs)
    losses = losses + lam * expected(logistic, ratio, pair_probs)
    metrics = pair_metrics(mean, logps[pairs])
    metrics["nll/chosen"], metrics["log_odds_ratio"] = -mean[0].detach(), ratio.detach()
    return losses, metrics


@objective(unit="pair", source="arXiv:2305.10425 (SLiC-HF), the rank calibration loss with its regulariser")
def slic(
    logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    delta: float = 1.0,
    lam: float = 0.1,
) -> tuple[Tensor, Metrics]:
    """Sequence likelihood calibration: a hinge on the log-probabilities, and imitation of the chosen side.

    Formula:
        loss = max(0, delta - lp(w) + lp(l)) - lam lp(w)
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        delta: the margin aimed at, in nats per completion
        lam: weight of imitation, of sums over tokens
    Returns:
        losses (M,); rewards lp, margins and accuracies; nll/chosen (-lp(w))
    Differs:
        The paper imitates a reference text that may be a third one (the demonstration of the prompt); here it is
        the chosen completion. Where the data hold demonstrations, mix slic with lam = 0 and sft.
        Sums, as in the paper: imitation per token is lam times the length weaker than the number says.
    Failure modes:
        lp differs by tens of nats between completions of different length: the hinge is on or off by length.
        A pair that is right by delta is left to imitation alone.
    Use when:
        The two completions have about the same length, and no reference can be held.
    """
    in_range("delta", delta, at_least=0)
    in_range("lam", lam, at_least=0)
    lp = logps[pairs]
    losses = expected_either(
        lambda preferred, other: F.relu(delta - preferred + other) - lam * preferred, lp, pair_probs
    )
    metrics = pair_metrics(lp, lp)
    metrics["nll/chosen"] = -lp[0].detach()
    return losses, metrics


@objective(unit="pair", source="arXiv:2501.03884 (AlphaPO), the loss with the alpha-reward")
def alpha_po(
    logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 2.5,
    gamma: float = 0.1,
    alpha: float = 0.25,
) -> tuple[Tensor, Metrics]:
    """AlphaPO: SimPO with a reward that bends: (1 - p^-alpha) / alpha of the mean probability p per token.

    Formula:
        p(y) = exp(lp(y) / |y|);  r(y) = beta (1 - p(y)^-alpha) / alpha;  r = beta log p at alpha = 0 (SimPO)
        loss = -log s(r(w) - r(l) - gamma)
        with pair_probs p: -p log s(r(w) - r(l) - gamma) - (1 - p) log s(r(l) - r(w) - gamma)
    Hyperparameters:
        beta: scale of the reward
        gamma: the target margin itself, in units of r; not the ratio gamma / beta
        alpha: > 0 pulls harder on improbable completions and holds the chosen side up; < 0 the reverse
    Returns:
        losses (M,); rewards r, margins and accuracies
    Differs:
        Computed by expm1 from the mean log-probability, never from p: exp(-120)^-0.25 is inf in float32. Beyond
        the exponent 40 (alpha times the mean log-probability) it goes on as its tangent.
        The mean is part of the definition: trainers that pass sums have another loss, and it overflows.
    Failure modes:
        Nothing holds the policy to its start: too high a learning rate ends in repetition loops.
        With a large alpha one improbable token in a short completion rules the pair.
        gamma in the other convention (a ratio) is beta times too small or too large.
    Use when:
        SimPO works but lowers the chosen completions' probability, or stalls: alpha is the knob between.
    """
    in_range("beta", beta, above=0)
    in_range("gamma", gamma, at_least=0)
    in_range("alpha", alpha)
    mean = logps[pairs] / lengths[pairs].clamp(min=1)
    rewards = beta * (mean if alpha == 0 else -expm1_then_line(-alpha * mean) / alpha)
    losses = expected(lambda margin: logistic(margin - gamma), rewards[0] - rewards[1], pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, accurate near 0 and far below. Any shape."""
    near = x > -math.log(2)
    return torch.where(near, torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x)))


__all__ = ["alpha_po", "cpo", "log1mexp", "orpo", "slic"]
