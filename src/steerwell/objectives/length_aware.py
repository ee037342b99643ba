"""Pair objectives that keep DPO from rewarding length: by a penalty, by the mean per token, by the shared length.

Throughout h(y) = log pi(y|x) - log ref(y|x), summed over the |y| scored tokens of a completion.
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import expected, logistic, pair_metrics
from steerwell.objectives.table import Metrics, in_range, objective


@objective(unit="pair", source="arXiv:2403.19159, the length-regularised DPO loss (R-DPO)")
def r_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
) -> tuple[Tensor, Metrics]:
    """Length-regularised DPO: the reward behind the labels is taken to include a price per token.

    Formula:
        loss = -log s(beta (h_w - h_l) + alpha (|w| - |l|))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        alpha: price of a token, in units of beta * h; 0 is DPO, and > 0 shortens
    Returns:
        losses (M,); rewards beta * h (without the price), margins and accuracies
    Differs:
        The sign is that of the derivation: labels follow r, the policy maximises r - alpha |y| under the KL, so
        r = beta h + alpha |y| up to a constant. A long chosen completion is then already explained by its length
        and is pushed less. Public code has both signs; with minus the same alpha lengthens.
    Failure modes:
        alpha is per token and beta h per completion: at a difference of 300 tokens alpha = 0.01 is 3 in the
        link, which switches such pairs off, or gives them full force if the shorter one was chosen.
        Too large an alpha learns "shorter" and little else.
    Use when:
        Chosen completions are longer than rejected ones and the policy's answers grow.
    """
    in_range("beta", beta, above=0)
    in_range("alpha", alpha, at_least=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs])
    longer = lengths[pairs[0]] - lengths[pairs[1]]
    losses = expected(logistic, rewards[0] - rewards[1] + alpha * longer, pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2411.15124 (Tulu 3), length-normalised DPO")
def ln_dpo(
    logps: Tensor,
    ref_logps: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 5.0,
) -> tuple[Tensor, Metrics]:
    """Length-normalised DPO: implicit rewards are means per token.

    Formula:
        loss = -log s(beta (h_w / |w| - h_l / |l|))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: scale of the reward per token; larger than DPO's by about the length of a completion
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * h / |y|, margins and accuracies
    Failure modes:
        A beta tuned for sums (0.1) hardly learns here, and 5.0 in dpo hardly moves.
        The same change per token counts alike in a short and a long completion, so tokens of short ones weigh
        more: few tokens may carry the margin.
        No more the optimum of a KL-constrained reward: the closed form of DPO does not hold.
    Use when:
        Lengths within a pair differ much, and the loss should not see it.
    """
    in_range("beta", beta, above=0)
    rewards = beta * (logps[pairs] - ref_logps[pairs]) / lengths[pairs].clamp(min=1)
    losses = expected(logistic, rewards[0] - rewards[1], pair_probs)
    return losses, pair_metrics(rewards, logps[pairs])


@objective(unit="pair", source="arXiv:2409.06411 (LD-DPO), the length-desensitised likelihood")
def ld_dpo(
    per_token_logps: Tensor,
    ref_per_token_logps: Tensor,
    owner: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 0.5,
) -> tuple[Tensor, Metrics]:
    """Length-desensitised DPO: tokens beyond the shorter completion's length count for less.

    Formula:
        m = min(|w|, |l|)
        g(y) = sum_{t <= m} d_t + alpha sum_{t > m} d_t, with d_t = log pi(y_t | ...) - log ref(y_t | ...)
        loss = -log s(beta (g(w) - g(l)))
        with pair_probs p: p loss(w, l) + (1 - p) loss(l, w)
    Hyperparameters:
        beta: how strongly the policy is held to the reference; larger holds more
        alpha: weight of the tokens beyond m; 1 is DPO, 0 cuts both completions to the same length
    Returns:
        losses (M,), ln 2 for each pair at the start; rewards beta * g, margins and accuracies; logps/chosen and
        logps/rejected are the plain sums
    Differs:
        The weight is on policy and reference alike, so that the loss is ln 2 at the start. Tokens of a completion
        are taken in the order in which they come in the tensors. m belongs to a pair: a completion in several
        pairs is weighed anew in each.
    Failure modes:
        With a small alpha the end of the longer completion is hardly taught, be it good or bad: endings,
        conclusions and end-of-text of long chosen completions are learnt last.
        Lengths are counted in tokens, not in content.
    Use when:
        Answers grow under DPO, and the extra tokens of the chosen ones are mostly padding.
    """
    in_range("beta", beta, above=0)
    in_range("alpha", alpha, at_least=0, at_most=1)
    side, token, place = _tokens_of(owner, lengths, pairs)
    shared = lengths[pairs].amin(0).repeat(2)[side]
    seen = per_token_logps[token]
    weight = torch.where(place < shared, seen.new_ones(()), alpha)  # of two numbers it would be float32
    nothing = per_token_logps.new_zeros(pairs.numel())
    sums = nothing.index_add(0, side, weight * (seen - ref_per_token_logps[token])).view_as(pairs)
    plain = nothing.index_add(0, side, seen.detach()).view_as(pairs)
    rewards = beta * sums
    return expected(logistic, rewards[0] - rewards[1], pair_probs), pair_metrics(rewards, plain)


def _tokens_of(owner: Tensor, lengths: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Every token of both sides of every pair: which side (into ``pairs.flatten()``), where in the tensors of all
    tokens, and at which place within its completion, counted from 0. All (tokens,), long.
    """
    counts = lengths.long()
    by_completion = torch.argsort(owner, stable=True)  # tokens of a completion need not lie together
    first = counts.cumsum(0) - counts
    sides = pairs.flatten()
    here = counts[sides]
    side = torch.repeat_interleave(torch.arange(len(sides), device=owner.device), here)
    place = torch.arange(len(side), device=owner.device) - (here.cumsum(0) - here)[side]
    return side, by_completion[first[sides][side] + place], place


__all__ = ["ld_dpo", "ln_dpo", "r_dpo"]
