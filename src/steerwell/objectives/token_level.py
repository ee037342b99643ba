"""Pair objectives that look inside a completion: at its tokens, its steps or its turns.

Per-token tensors (S,) say by ``owner`` whose token it is; the tokens of one completion come in their order. Throughout
h_t = log pi(y_t) - log ref(y_t), each given what came before, and a completion's sum of them is h(y).
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import expected, logistic, pair_metrics
from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective


def _summed(by_token: Tensor, owner: Tensor, completions: Tensor) -> Tensor:
    """Sums (N,) over the tokens of each completion; ``completions`` is any tensor (N,)."""
    return by_token.new_zeros(len(completions)).index_add(0, owner, by_token)


@objective(unit="pair", surrogate=True, source="arXiv:2404.11999, the objectives TDPO2 and TDPO1")
def tdpo(
    logps: Tensor,
    ref_logps: Tensor,
    per_token_kl: Tensor,
    owner: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
    stop_gradient: bool | None = None,
) -> tuple[Tensor, Metrics]:
    """Token-level DPO: a margin that also weighs how far the policy has left the reference on each side.

    Formula:
        D(y) = sum over the tokens of y of KL(ref(. | y_<t) || pi(. | y_<t)), over the whole vocabulary
        loss = -log s(beta (h_w - h_l) - beta alpha (D(y_l) - sg(D(y_w)))), where sg holds its argument constant
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        alpha: weight of the difference in divergence; 0 is DPO
        stop_gradient: hold D(y_w) constant (TDPO2); with alpha = 1 and False it is TDPO1; None holds it; an error
            while alpha is 0
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h, margins and accuracies, kl/chosen and
        kl/rejected (D of each side)
    Failure modes:
        Needs the full distribution of both models at every token: more time, and a reference that runs along.
        Without stop_gradient the loss falls by moving the policy away from the reference on the chosen side.
        A long rejected completion has a larger D for its length alone.
    Use when:
        DPO drifts far from the reference on rejected completions, and diversity is to be kept.
    """
    in_range("beta", beta, above=0)
    in_range("alpha", alpha, at_least=0)
    if stop_gradient is not None and alpha == 0:
        raise ObjectiveError(f"stop_gradient is used while alpha is not 0, and alpha is {alpha!r}")
    held = stop_gradient is not False
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    divergence = _summed(per_token_kl, owner, logps)[pairs]

    def loss(preferred: int, other: int) -> Tensor:
        near = divergence[preferred].detach() if held else divergence[preferred]
        excess = beta * alpha * (divergence[other] - near)
        return logistic(rewards[preferred] - rewards[other] - excess)

    losses = loss(0, 1)
    if pair_probs is not None:
        losses = pair_probs * losses + (1 - pair_probs) * loss(1, 0)
    kl = divergence.detach()
    return losses, {**pair_metrics(rewards, logps[pairs]), "kl/chosen": kl[0], "kl/rejected": kl[1]}


@objective(
    unit="pair",
    surrogate=True,
    source="arXiv:2406.11827, equation 2 with sampled alignment; the clamp: the authors' code",
)
def wpo(
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    per_token_collision: Tensor,
    owner: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    clamp: bool = True,
) -> tuple[Tensor, Metrics]:
    """Weighted DPO: pairs count by how likely the policy of now would be to write both completions.

    Formula:
        w(y) = exp(mean over the tokens of y of log pi(y_t) - log sum over v of pi(v)^2), without gradient
        loss = -min(1, w(y_w) w(y_l)) log s(beta (h_w - h_l))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        clamp: take at most 1 for the product of the two weights, as the authors' code does
    Returns:
        losses (M,); rewards beta * h, margins and accuracies; weights, the pair's weight
    Differs:
        The paper's equation has no upper limit, its authors' code has; clamp = False is the equation (and what
        some public trainers do). A token of the policy's first choice weighs more than 1.
        The mean over pairs is not divided by the weights' sum: pairs far from the policy shrink the step.
    Failure modes:
        Off-policy data that the policy finds unlikely gets almost no weight: watch weights.
        The weights move with the policy; a run cannot be compared with DPO by its loss.
    Use when:
        The pairs were written by other models, or by an older policy.
    """
    in_range("beta", beta, above=0)
    tokens = lengths.clamp(min=1)
    aligned = _summed((per_token_logps - per_token_collision).detach(), owner, lengths) / tokens
    weights = aligned[pairs].sum(0)
    weights = (weights.clamp(max=0) if clamp else weights).exp()
    logps = _summed(per_token_logps, owner, lengths)
    rewards = beta * (logps - _summed(ref_per_token_logps, owner, lengths))[pairs]
    losses = weights * expected(logistic, rewards[0] - rewards[1], pair_probs)
    return losses, {**pair_metrics(rewards, logps[pairs]), "weights": weights}


@objective(unit="pair", source="arXiv:2410.04350, the objective TIS-DPO, its token-weighted margin u")
def tis_dpo(
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    token_weights: Tensor,
    owner: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, Metrics]:
    """DPO by weighted tokens: importance sampling towards data in which every token matters alike.

    Formula:
        h(y) = sum over the tokens of y of w_t h_t, with w = token_weights
        loss = -log s(beta (h_w - h_l))
        with pair_probs p: -p log s(beta (h_w - h_l)) - (1 - p) log s(beta (h_l - h_w))
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h with the weights, margins and accuracies; logps
        without the weights
    Differs:
        The weights come with the data. The paper takes k exp(mu clamp(log pi_plus(y_t) - log pi_minus(y_t), L, U))
        from a pair of contrastive models, with mu > 0 for preferred and mu < 0 for other completions.
        The paper also subtracts a difference eta of weighted sequential divergences KL(pi || ref) within the
        logistic. Public code has it as an option; it is not applied here.
    Failure modes:
        Weights of 1 are plain DPO; weights that grow with length favour long completions.
        Negative weights turn a token round: an error in the data that nothing here stops.
    Use when:
        It is known, or estimated, which tokens made a completion better or worse.
    """
    in_range("beta", beta, above=0)
    logps = _summed(per_token_logps, owner, lengths)
    h = _summed(token_weights * (per_token_logps - ref_per_token_logps), owner, lengths)
    rewards = beta * h[pairs]
    return expected(logistic, rewards[0] - rewards[1], pair_probs), pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2406.18629, the objective Step-DPO")
def step_dpo(
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    owner: Tensor,
    lengths: Tensor,
    steps: Tensor,
    pairs: Tensor,
    shared_tokens: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
) -> tuple[Tensor, Metrics]:
    """DPO on one step: of two solutions with a shared history, only the step in which they part counts.

    Formula:
        k = the first step in which the pair's completions differ
        h(y) = sum over the tokens of y's step k of h_t
        loss = -log s(beta (h_w - h_l))
        with pair_probs p: -p log s(beta (h_w - h_l)) - (1 - p) log s(beta (h_l - h_w))
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h of the step, margins and accuracies; logps
        of the step
    Differs:
        The paper writes the history into the prompt and its two completions are one step each: shared_tokens is 0
        then, step 0 is the one that counts, and steps that follow it do not. A history within the completions
        gives the same loss: steps before k are equal on both sides and left out.
        Tokens of step k that both completions begin with are counted on both sides, where they cancel.
        The authors' code puts no end-of-text token behind the preferred and the other step. One that steps counts as
        of step k is taught to follow it: give it a step of its own unless the solution ends there.
    Failure modes:
        Where a step ends is the data's word: steps cut too long are plain DPO.
        Two completions that are one and the same, or of which one stops where the other goes on to a new step, have
        nothing on one side to count.
    Use when:
        Step-wise reasoning is labelled by the first wrong step.
    """
    in_range("beta", beta, above=0)
    k = _parting_step(owner, lengths, steps, pairs, shared_tokens)
    width = int(steps.max()) + 1 if len(steps) else 1
    cell = owner * width + steps  # completion by step
    room = lengths.new_zeros(len(lengths) * width)
    at = (pairs * width + k.clamp(max=width - 1)).clamp(min=0)
    counts = (k < width).to(per_token_logps.dtype)
    logps = counts * _summed(per_token_logps, cell, room)[at]
    h = logps - counts * _summed(ref_per_token_logps, cell, room)[at]
    rewards = beta * h
    return expected(logistic, rewards[0] - rewards[1], pair_probs), pair_metrics(rewards, logps)


def _parting_step(owner: Tensor, lengths: Tensor, steps: Tensor, pairs: Tensor, shared: Tensor) -> Tensor:
    """Of each pair (M,) the smaller of the steps that its completions' first tokens after the shared ones are of.

    Beyond every step where neither completion has a further token.
    """
    beyond = int(steps.max()) + 1 if len(steps) else 1
    order = owner.argsort(stable=True)
    counts = torch.bincount(owner, minlength=len(lengths))
    first = counts.cumsum(0) - counts
    has = shared < counts[pairs]
    if not len(steps):
        return torch.full_like(shared, beyond)
    place = torch.where(has, first[pairs] + shared, 0)
    return torch.where(has, steps[order[place]], beyond).amin(0)


@objective(unit="pair", source="arXiv:2406.14868, the objective DMPO with its phi(t, T)")
def dmpo(
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    owner: Tensor,
    lengths: Tensor,
    turns: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    gamma: float = 0.7,
) -> tuple[Tensor, Metrics]:
    """DPO for trajectories of several turns: earlier turns weigh more, and long ones no more than short.

    Formula:
        phi(t, T) = gamma^t (1 - gamma^(T - t)) / (1 - gamma^T), and (T - t) / T for gamma = 1
        h(y) = sum over the tokens of y of phi(t, T) h_i, with t the token's turn from 0 and T the turns of y
        loss = -log s(beta (h_w - h_l))
        with pair_probs p: -p log s(beta (h_w - h_l)) - (1 - p) log s(beta (h_l - h_w))
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        gamma: discount from turn to turn, 0 to 1; 0 counts the first turn alone
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h with phi, margins and accuracies; logps without
        phi
    Failure modes:
        The last turns, where tasks are won or lost, weigh least: phi falls to gamma^(T-1) / (1 + ... + gamma^(T-1)).
        Tokens of a turn are summed: long turns weigh more than short ones.
        With one turn it is DPO.
    Use when:
        Whole trajectories of an agent are compared, and the better one is better from early on.
    """
    in_range("beta", beta, above=0)
    in_range("gamma", gamma, at_least=0, at_most=1)
    logps = _summed(per_token_logps, owner, lengths)
    number = turns.new_zeros(len(lengths)).scatter_reduce(0, owner, turns + 1, "amax")
    # s(n) = 1 + gamma + ... + gamma^(n-1), so that phi = gamma^t s(T - t) / s(T) needs no limit at gamma = 1
    most = int(number.max()) if len(number) else 0
    powers = gamma ** torch.arange(most + 1, dtype=torch.float64, device=turns.device)
    sums = powers.cumsum(0)
    of_token = number[owner]
    phi = powers[turns] * sums[of_token - turns - 1] / sums[of_token - 1]
    h = _summed(phi.to(logps.dtype) * (per_token_logps - ref_per_token_logps), owner, lengths)
    rewards = beta * h[pairs]
    return expected(logistic, rewards[0] - rewards[1], pair_probs), pair_metrics(rewards, logps[pairs])


__all__ = ["dmpo", "step_dpo", "tdpo", "tis_dpo", "wpo"]
