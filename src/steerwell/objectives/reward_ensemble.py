"""Objectives for reward models with several heads that see the pairs in different ways: the members of an ensemble,
and ODIN's quality and length. The learnt tensor is ``head_scores`` (N, H).
"""

from __future__ import annotations

import torch
from torch import Tensor

from steerwell.objectives.pair_losses import logistic
from steerwell.objectives.reward import score_metrics
from steerwell.objectives.table import Metrics, ObjectiveError, in_range, objective

#: P(Poisson(1) <= k) in 2^32nds, for k = 0 ... 11; what lies beyond is below one 2^32nd.
POISSON_STEPS = (
    1580030169, 3160060337, 3950075422, 4213413783, 4279248374, 4292415292,
    4294609778, 4294923276, 4294962463, 4294966817, 4294967253, 4294967292,
)  # fmt: skip
LOW = 0xFFFFFFFF


@objective(
    unit="pair",
    kind="reward",
    head="members",
    only_if={"pair_draws": "bootstrap"},
    source="arXiv:2310.02743 (reward model ensembles); heads over one backbone and the Poisson bootstrap: "
    "arXiv:1602.04621, Oza & Russell (2001)",
)
def ensemble_bradley_terry(
    head_scores: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    pair_draws: Tensor | None = None,
    *,
    members: int = 4,
    bootstrap: bool = True,
    centering: float = 0.0,
) -> tuple[Tensor, Metrics]:
    """An ensemble of Bradley-Terry heads on one backbone, each with its own resample.

    Formula:
        loss = mean over members k of w_k [-p log s(d_k) - (1 - p) log s(-d_k)
            + centering (r_w,k + r_l,k)^2]
        with d_k = r_w,k - r_l,k and p = pair_probs (1 if not given)
        w_k ~ Poisson(1), a hash of the pair and of k (1 without bootstrap)
    Hyperparameters:
        members: how many heads, from 2 to 64; 3 to 8 are usual
        bootstrap: whether each member sees the pairs as often as its own resample has them; without it members
            differ by their start alone
        centering: pulls each member's scores of each pair to a mean of 0; 0 leaves their levels free
    Returns:
        losses (M,), 0 where no member's resample has the pair; accuracy (ties count half), margin and scores
        of the mean over members; disagreement, the standard deviation of the margin over members
    Differs:
        The paper trains whole models from different seeds; this has one backbone, so it costs as much as one model
        and its members share what the backbone has learnt. steerwell.reward_ensemble puts whole models together.
        The weights of a resample are not divided by their sum: a member's expected loss is that over all pairs.
    Use when:
        You want to know where a reward model guesses: score_with_std; or a careful reward: combine = "min" or "uwo".
    Failure modes:
        Members agree where the data are biased alike: they all like length if the pairs do (arXiv:2312.09244).
        Heads of one backbone agree more than models of different seeds; their spread is a lower bound.
        Pairs leave each member's level free, and "min" and "uwo" read levels: bring them to one scale by
        normalised(groups).
    """
    if isinstance(members, bool) or not isinstance(members, int):
        raise ObjectiveError(f"members must be a whole number, got {members!r}")
    in_range("members", members, at_least=2, at_most=64)
    if not isinstance(bootstrap, bool):
        raise ObjectiveError(f"bootstrap must be true or false, got {bootstrap!r}")
    in_range("centering", centering, at_least=0)
    if head_scores.shape[1] != members:
        if head_scores.numel():
            raise ObjectiveError(f"the head has {head_scores.shape[1]} outputs for {members} members")
        head_scores = head_scores.new_zeros(0, members)
    chosen, rejected = head_scores[pairs[0]], head_scores[pairs[1]]
    margins = chosen - rejected
    each = logistic(margins)
    if pair_probs is not None:
        p = pair_probs[:, None]
        each = p * each + (1 - p) * logistic(-margins)
    if centering > 0:
        each = each + centering * (chosen + rejected).square()
    if bootstrap:
        if pair_draws is None:
            raise ObjectiveError("a bootstrap needs pair_draws")
        each = each * poisson_weights(pair_draws, members).to(each.dtype)
    metrics = score_metrics(chosen.mean(1), rejected.mean(1))
    apart = margins.detach() - margins.detach().mean(1, keepdim=True)
    metrics["disagreement"] = apart.square().mean(1).sqrt()
    return each.mean(1), metrics


def poisson_weights(draws: Tensor, members: int) -> Tensor:
    """How often each member's resample has each pair: (M, members), long, Poisson(1), a function of the draws alone.

    ``draws`` (M,) are numbers below 2^48. Independent over pairs and members.
    """
    low, high = draws & LOW, draws >> 32
    member = torch.arange(1, members + 1, device=draws.device)
    noise = _mixed(low[:, None] ^ _mixed(_times(member, 0x9E3779B9)[None, :] ^ high[:, None]))
    steps = torch.tensor(POISSON_STEPS, device=draws.device)
    return (noise[..., None] >= steps).sum(-1)


def _mixed(x: Tensor) -> Tensor:
    """A bijection of 32-bit numbers in which every bit depends on every bit (lowbias32 by C. Wellons)."""
    x = _times(x ^ (x >> 16), 0x7FEB352D)
    x = _times(x ^ (x >> 15), 0x846CA68B)
    return x ^ (x >> 16)


def _times(x: Tensor, factor: int) -> Tensor:
    """x * factor modulo 2^32, without leaving 63 bits on the way."""
    return (x * (factor & 0xFFFF) + (((x * (factor >> 16)) & 0xFFFF) << 16)) & LOW


@objective(
    unit="pair",
    kind="reward",
    head="quality_length",
    decomposable=False,
    source="arXiv:2402.07319 (ODIN), the ranking and length losses, and its code",
)
def odin_pairs(
    head_scores: Tensor,
    lengths: Tensor,
    pairs: Tensor,
    pair_probs: Tensor | None = None,
    *,
    length_weight: float = 1.0,
) -> tuple[Tensor, Metrics]:
    """ODIN's ranking and length losses: two outputs explain the preference, and length goes to the second.

    Formula:
        loss = -p log s(d) - (1 - p) log s(-d) + length_weight (|corr(q, len)| + 1 - corr(l, len))
        with d = (q_w + l_w) - (q_l + l_l), p = pair_probs (1 if not given); q, l: the head's outputs
        corr: Pearson's, over the completions of all pairs of the step; 0 where one of the two does not vary
    Hyperparameters:
        length_weight: of the length losses; the paper has 1
    Returns:
        losses (M,); accuracy (ties count half), margin and scores of q + l; corr/quality_length, corr/length_length
    Differs:
        The correlations are over the whole optimizer step, on all processes, where the code has those of a
        device's batch. The third loss, |W_q . W_l|, is orthogonal_heads; the mixture odin has both.
    Use when:
        The chosen completions are longer for no good reason, and the policy would learn to ramble.
        The score of the trained model is q alone.
    Failure modes:
        Takes away length that people did want, too.
        Length enters linearly; a preference for a middling length stays in q.
        Small steps: the correlation of few completions is noise, and it is pulled to 0 all the same.
    """
    in_range("length_weight", length_weight, at_least=0)
    if head_scores.shape[1] != 2:
        if head_scores.numel():
            raise ObjectiveError(f"odin_pairs needs a head of 2 outputs, got {head_scores.shape[1]}")
        head_scores = head_scores.new_zeros(0, 2)
    chosen, rejected = head_scores.sum(1)[pairs]
    losses = logistic(chosen - rejected)
    if pair_probs is not None:
        losses = pair_probs * losses + (1 - pair_probs) * logistic(rejected - chosen)
    within = pairs.flatten()
    both = [correlation(head_scores[within, i], lengths[within]) for i in (0, 1)]
    if length_weight > 0:
        losses = losses + length_weight * (both[0].abs() + 1 - both[1])
    metrics = score_metrics(chosen, rejected)
    for name, value in zip(("quality", "length"), both, strict=True):
        metrics[f"corr/{name}_length"] = value.detach().expand(len(losses))
    return losses, metrics


def correlation(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's correlation of two tensors (n,), a scalar; 0 without a gradient where one of them does not vary."""
    if not len(x):
        return x.sum()
    x, y = (v - v.mean() for v in (x, y.to(x.dtype)))
    # brought to size 1 first: squares of large or tiny numbers leave the range
    sizes = [v.detach().abs().amax() for v in (x, y)]
    varies = (sizes[0] > 0) & (sizes[1] > 0)
    x, y = (v / torch.where(varies, size, 1.0) for v, size in zip((x, y), sizes, strict=True))
    square = torch.where(varies, x.square().sum() * y.square().sum(), 1.0)
    return torch.where(varies, (x * y).sum(), 0.0) / square.sqrt()


@objective(
    unit="completion",
    kind="reward",
    head="quality_length",
    source="arXiv:2402.07319 (ODIN), the orthogonal loss, and its code",
)
def orthogonal_heads(head_weights: Tensor, lengths: Tensor) -> tuple[Tensor, Metrics]:
    """ODIN's third loss: the weights of quality and of length stand at right angles.

    Formula:
        loss = |W_q . W_l| for every completion, so that their mean has it once; W_q, W_l: rows of the head
    Returns:
        losses (N,), all the same; no metrics
    Use when:
        Together with odin_pairs: the mixture odin.
    Failure modes:
        By itself it teaches nothing.
        It does not grow with the angle but with the product: small heads satisfy it.
    """
    if head_weights.shape[0] != 2:
        if head_weights.numel():
            raise ObjectiveError(f"orthogonal_heads needs a head of 2 outputs, got {head_weights.shape[0]}")
        head_weights = head_weights.new_zeros(2, head_weights.shape[1])
    product = (head_weights[0] * head_weights[1]).sum().abs()
    return product.expand(len(lengths)), {}


__all__ = ["correlation", "ensemble_bradley_terry", "odin_pairs", "orthogonal_heads", "poisson_weights"]
