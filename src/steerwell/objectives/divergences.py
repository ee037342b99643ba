"""DPO with another distance to the reference than KL(pi || ref): the reward is f'(u) of the ratio u = pi / ref.

With h(y) = log u(y) = log pi(y|x) - log ref(y|x), summed over the tokens of a completion. Everything is computed
from h, never from u itself. Where f' grows like exp, it goes on beyond the exponent 40 as its tangent, so that
values and gradients stay finite; below that it is exact. Rewards are 0 at the start: a constant in f' cancels
between the sides of a pair.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from steerwell.objectives.pair_losses import expected, expm1_then_line, logistic, pair_metrics
from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective, one_of

DIVERGENCES: tuple[str, ...] = ("reverse_kl", "forward_kl", "js", "alpha", "chi2")
USUAL_ALPHA = 0.5


@objective(unit="pair", source="arXiv:2309.16240, the f-DPO loss with the divergences of its table 1")
def f_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    divergence: str = "reverse_kl",
    alpha: float | None = None,
) -> tuple[Tensor, Metrics]:
    """f-DPO: DPO with any of several divergences between policy and reference in the place of the reverse KL.

    Formula:
        loss = -log s(beta (f'(u_w) - f'(u_l))), with u(y) = pi(y|x) / ref(y|x)
        reverse_kl: f'(u) = log u, which is DPO      forward_kl: f'(u) = -1 / u
        js: f'(u) = log(2 u / (1 + u))               alpha: f'(u) = (1 - u^-alpha) / alpha
        chi2: f'(u) = 2 (u - 1)
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        divergence: "reverse_kl", "forward_kl", "js", "alpha" or "chi2"
        alpha: for "alpha" only, 0 < alpha < 1: towards 0 it is reverse_kl, towards 1 forward_kl; None takes 0.5
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * f'(u), 0 at the start, margins and accuracies
    Differs:
        alpha is the paper's. Some trainers write f'(u) = (u^(a - 1) - 1) / (a - 1): their a is 1 - alpha, and the
        two agree at 0.5 only. alpha given with another divergence is an error.
        f' is exact up to the exponent 40 and goes on as its tangent; public code cuts it off, and the gradient
        with it.
        chi2 fails the paper's condition that f' is not defined at 0: its optimum may have u = 0, where the loss
        no longer matches it. The objective chi_po mends that.
    Failure modes:
        u is the ratio of whole completions: with forward_kl and alpha a completion that lost 20 nats weighs
        5e8 (alpha = 1), so that one rejected completion can fill the margin. Watch rewards/rejected.
        js bounds the chosen reward at beta ln 2: margins come from the rejected side, which falls without end.
        chi2 hardly moves what is below the reference: rejected completions stay near -2 beta.
    Use when:
        More diverse samples than DPO's are wanted (forward_kl, js, alpha), at some cost in accuracy.
    """
    in_range("beta", beta, above=0)
    one_of("divergence", divergence, DIVERGENCES)
    if alpha is not None:
        in_range("alpha", alpha, above=0, below=1)
        if divergence != "alpha":
            raise ObjectiveError(
                f"alpha is used by divergence 'alpha' only, and divergence is {divergence!r}"
            )
    rewards = beta * _slope(
        logps[pairs] - ref_logps[pairs], divergence, USUAL_ALPHA if alpha is None else alpha
    )
    losses = expected(logistic, rewards[0] - rewards[1], pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2407.13399, algorithm 1 (chi-squared preference optimisation)")
def chi_po(
    logps: Tensor,
    ref_logps: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    r_max: float | None = None,
) -> tuple[Tensor, Metrics]:
    """chi-squared preference optimisation: DPO's link with u + log u for log u, against over-optimisation.

    Formula:
        phi(u) = u + log u, with u(y) = pi(y|x) / ref(y|x)
        loss = -log s(clip(beta (phi(u_w) - phi(u_l)), -2 r_max, 2 r_max)); no clip if r_max is not given
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: weight of chi-squared and KL together; larger holds more
        r_max: bound of the true reward's size, if known; beyond a margin of 2 r_max a pair gets no gradient
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta (phi(u) - 1), 0 at the start, margins and
        accuracies
    Differs:
        u is exact up to exp(40) and goes on as its tangent there.
    Failure modes:
        u is the ratio of whole completions: where the chosen one gains 10 nats the margin is 2e4 beta and the
        pair is done; the data teach little beyond a few nats. That is the point, and a limit.
        A rejected completion that gained over the reference gives a huge gradient: clip the gradient.
        r_max below the rewards' true size leaves pairs unlearnt.
    Use when:
        Data cover the good completions but not all others, and DPO's quality falls while its margin grows.
    """
    in_range("beta", beta, above=0)
    if r_max is not None:
        in_range("r_max", r_max, above=0)
    h = logps[pairs] - ref_logps[pairs]
    rewards = beta * (expm1_then_line(h) + h)
    margin = rewards[0] - rewards[1]
    if r_max is not None:
        margin = margin.clamp(-2 * r_max, 2 * r_max)
    return expected(logistic, margin, pair_probs), pair_metrics(rewards, logps[pairs])


def _slope(h: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(exp(h)) less its value at h = 0."""
    if divergence == "reverse_kl":
        return h
    if divergence == "forward_kl":
        return -expm1_then_line(-h)
    if divergence == "js":
        return math.log(2) + F.logsigmoid(h)
    if divergence == "alpha":
        return -expm1_then_line(-alpha * h) / alpha
    return 2 * expm1_then_line(h)


__all__ = ["DIVERGENCES", "chi_po", "f_dpo"]
