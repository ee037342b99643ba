"""Policy-gradient objectives: advantages x surrogate x reduction, and the paper names as points of that grid.

The advantages (N,) come from ``advantages.py``, the denominators from ``reduce.py``; here are the surrogates.
Exponentials of log-ratios go on as straight lines beyond ``LIMIT``, so that values and gradients stay finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.advantages import leave_one_out
from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective

LIMIT = 20.0


@objective(
    unit="completion", kind="policy_gradient", advantages="group_mean", source="Williams (1992), REINFORCE"
)
def reinforce(logps: Tensor, advantages: Tensor) -> tuple[Tensor, Metrics]:
    """REINFORCE: log-probability of the whole completion, weighted by its advantage.

    Formula:
        loss_i = -A_i log pi(y_i | x_i), summed over tokens
    Returns:
        losses (N,); logps. The value means nothing by itself, only its gradient does.
    Use when:
        You sample afresh for every step and want the plain estimator to compare others with.
    Failure modes:
        Right only for completions that the current policy sampled: one step per batch of samples.
        High variance; long completions make large gradients.
        Nothing holds the policy to its start: what the reward overlooks will be exploited.
    """
    return -advantages.detach() * logps, {"logps": logps.detach()}


@objective(
    unit="completion",
    kind="policy_gradient",
    advantages="leave_one_out",
    surrogate=True,
    only_if={"ref_logps": "beta"},
    source="arXiv:2402.14740 (the RLOO estimator, with the KL-penalised reward)",
)
def rloo(
    logps: Tensor,
    advantages: Tensor,
    group: Tensor,
    ref_logps: Tensor | None = None,
    *,
    beta: float = 0.05,
) -> tuple[Tensor, Metrics]:
    """REINFORCE leave-one-out, with the KL penalty inside the reward.

    Formula:
        k_i = log pi(y_i|x) - log ref(y_i|x), summed over tokens, without gradient
        loss_i = -(A_i - beta (k_i - mean of k over the others of the group)) log pi(y_i|x)
        A_i = leave-one-out advantage of the plain reward; both parts together are that of r_i - beta k_i
    Hyperparameters:
        beta: weight of the KL penalty; at 0 no reference is needed
    Returns:
        losses (N,); logps, kl (k_i: its mean estimates KL(pi || ref) per completion, single entries may be
        < 0)
    Use when:
        You sample several completions per prompt, afresh for every step, and the reward is noisy;
        simpler than PPO, no value network.
    Failure modes:
        Right only for completions that the current policy sampled: one step per batch of samples.
        A group of one completion gets neither reward nor penalty.
        Groups must come whole: a group that is cut in two has other baselines.
    """
    in_range("beta", beta, at_least=0)
    seen = logps.detach()
    weight, metrics = advantages.detach(), {"logps": seen}
    if beta > 0:
        if ref_logps is None:
            raise ObjectiveError(f"rloo needs ref_logps while beta is not 0, and beta is {beta!r}")
        metrics["kl"] = seen - ref_logps.detach()
        weight = weight - beta * leave_one_out(metrics["kl"], group)
    return -weight * logps, metrics


@objective(
    unit="token",
    kind="policy_gradient",
    advantages="group_mean_std",
    source="arXiv:1707.06347, equation 7; separate upper bound: arXiv:2503.14476 (Clip-Higher)",
)
def ppo_clip(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    owner: Tensor,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """PPO's clipped surrogate per token, with one advantage per completion and no value network.

    Formula:
        rho_t = pi(y_t | ...) / old(y_t | ...)
        loss_t = -min(rho_t A, clip(rho_t, 1 - epsilon, 1 + epsilon_high) A)
    Hyperparameters:
        epsilon: how far the ratio may fall below 1 before the token stops to matter
        epsilon_high: the same above 1; None takes epsilon
    Returns:
        losses (S,); ratio, clipped (1 where the clip took the gradient away)
    Differs:
        A log-ratio beyond 20 continues exp as a straight line, so that nothing overflows.
    Use when:
        You take several steps on one batch of samples and bring your own advantages.
    Failure modes:
        Nothing holds the policy to its start beyond one batch of samples.
        For A < 0 a large ratio is not clipped: one token can dominate the step.
        Old log-probabilities from another engine or temperature bias every ratio: at the first step all
        must be 1.
    """
    losses, metrics = _clipped(
        per_token_logps, old_per_token_logps, advantages[owner], epsilon=epsilon, epsilon_high=epsilon_high
    )
    return losses, metrics


@objective(
    unit="token",
    reduction="sequence_mean",
    kind="policy_gradient",
    advantages="group_mean_std",
    only_if={"ref_per_token_logps": "beta"},
    source="arXiv:2402.03300, equations 3 and 4",
)
def grpo(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    owner: Tensor,
    ref_per_token_logps: Tensor | None = None,
    *,
    beta: float = 0.04,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
) -> tuple[Tensor, Metrics]:
    """Group relative policy optimisation: the clipped surrogate plus a KL estimate in the loss.

    Formula:
        rho_t = pi(y_t | ...) / old(y_t | ...);  d_t = log ref(y_t | ...) - log pi(y_t | ...)
        loss_t = -min(rho_t A, clip(rho_t, 1 - epsilon, 1 + epsilon_high) A) + beta (exp(d_t) - d_t - 1)
        A = (r - mean of the group) / (std of the group + 1e-4); mean over each completion's tokens, then
        over them
    Hyperparameters:
        beta: weight of the KL estimate; at 0 no reference is needed
        epsilon: how far the ratio may fall below 1 before the token stops to matter
        epsilon_high: the same above 1; None takes epsilon
    Returns:
        losses (S,); ratio, clipped (1 where the clip took the gradient away), and kl if beta is not 0
    Differs:
        A log-ratio beyond 20 continues exp as a straight line, so that nothing overflows.
    Use when:
        You sample groups of eight or more per prompt and score them by a checker or a reward model;
        no value network.
    Failure modes:
        A group whose rewards are all equal teaches nothing; dividing by std lifts groups that nearly agree.
        The mean per completion favours short right answers and long wrong ones.
        The KL estimate (k3) is unbiased in value, but its gradient is that of KL(ref || pi), not KL(pi ||
        ref).
        Dividing by std scales the KL weight by the rewards' spread: beta may be too weak to stop a collapse.
        A proxy reward will be over-optimised: watch a second opinion, and stop where it turns down.
    """
    in_range("beta", beta, at_least=0)
    losses, metrics = _clipped(
        per_token_logps, old_per_token_logps, advantages[owner], epsilon=epsilon, epsilon_high=epsilon_high
    )
    if beta > 0:
        if ref_per_token_logps is None:
            raise ObjectiveError(f"grpo needs ref_per_token_logps while beta is not 0, and beta is {beta!r}")
        kl = k3(per_token_logps, ref_per_token_logps)
        losses, metrics["kl"] = losses + beta * kl, kl.detach()
    return losses, metrics


@objective(
    unit="token",
    kind="policy_gradient",
    advantages="group_mean_std",
    surrogate=True,
    source="arXiv:2506.13585, equations 4 and 5 (CISPO), without a lower bound as in its experiments; "
    "the cap's size: arXiv:2510.13786",
)
def cispo(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    advantages: Tensor,
    owner: Tensor,
    *,
    epsilon_max: float = 5.0,
) -> tuple[Tensor, Metrics]:
    """Clipped importance weights: REINFORCE per token, reweighted to the policy of now, the weight capped.

    Formula:
        rho_t = pi(y_t | ...) / old(y_t | ...)
        loss_t = -sg(min(rho_t, epsilon_max)) A log pi(y_t | ...), where sg holds its argument constant
    Hyperparameters:
        epsilon_max: the cap itself: no token weighs more than this; >= 1
    Returns:
        losses (S,); ratio, capped (1 where the cap holds). The value means nothing by itself, only its gradient does.
    Differs:
        epsilon_max is the cap, not its distance from 1. The paper writes it 1 + epsilon_high, and some trainers ask
        for that epsilon_high (4.0 there is 5.0 here); others ask for the cap under the same name (5.0 is 5.0).
        A value below 1, as a distance such as 0.28 would be, is an error.
        No lower bound: the paper's is set so far off that it never holds.
        The mean is over all tokens of the step; the paper's is over those of each prompt's group, then over prompts.
    Failure modes:
        Nothing holds the policy to its start beyond one batch of samples, and no token ever stops to matter: with
        many steps on one batch it can run far.
        For A < 0 a token's weight shrinks with its probability, but its push never ends.
        Old log-probabilities from another engine or temperature bias every weight: at the first step all must be 1.
    Use when:
        You take several steps on one batch of samples, and rare tokens that turn a solution round are to be learnt
        rather than clipped away.
    """
    in_range("epsilon_max", epsilon_max, at_least=1)
    ratio = _bounded_exp((per_token_logps - old_per_token_logps).detach())
    losses = -ratio.clamp(max=epsilon_max) * advantages.detach()[owner] * per_token_logps
    return losses, {"ratio": ratio, "capped": (ratio > epsilon_max).to(ratio.dtype)}


def k3(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """Estimate of KL(pi || ref) from samples of pi, per entry: ``exp(d) - d - 1`` with d = ref - pi; never
    < 0.

    Shapes: any, the same. Source: arXiv:2402.03300, equation 4 (Schulman's third estimator). Its value is
    unbiased and of low variance; differentiated, it follows KL(ref || pi).
    """
    d = ref_logps - logps
    # expm1 keeps small differences that exp(d) - 1 would round away.
    inner = d.clamp(max=LIMIT)
    return torch.expm1(inner) - inner + (_bounded_exp(d) - torch.exp(inner)) - (d - inner)


def _bounded_exp(x: Tensor) -> Tensor:
    """exp(x), continued beyond LIMIT by its tangent: finite, increasing and with a gradient everywhere."""
    return torch.exp(x.clamp(max=LIMIT)) * (1 + (x - LIMIT).clamp(min=0))


def _clipped(
    logps: Tensor, old_logps: Tensor, advantages: Tensor, *, epsilon: float, epsilon_high: float | None
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate on tensors of one shape, and its metrics."""
    in_range("epsilon", epsilon, above=0, below=1)
    high = epsilon if epsilon_high is None else epsilon_high
    in_range("epsilon_high", high, above=0)
    advantages = advantages.detach()
    ratio = _bounded_exp(logps - old_logps.detach())
    plain, clipped = ratio * advantages, ratio.clamp(1 - epsilon, 1 + high) * advantages
    metrics = {"ratio": ratio.detach(), "clipped": (clipped < plain).to(ratio.dtype)}
    return -torch.minimum(plain, clipped), metrics


__all__ = ["cispo", "grpo", "k3", "ppo_clip", "reinforce", "rloo"]
