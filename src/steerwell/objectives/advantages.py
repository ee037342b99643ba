"""From rewards to advantages: how much better than its peers a completion did.

Every function takes ``rewards`` (N,) and ``group`` (N,) long and returns (N,), without gradient. A reward
of NaN means "no verdict": the completion leaves the statistics and gets advantage 0. Where all rewards of a
group are equal the advantages are exactly 0, free of rounding noise. They see the whole step's completions,
not a micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from steerwell.objectives.table import ObjectiveError, in_range, one_of


class _Grouped(NamedTuple):
    """Float64 statistics per completion, over the completions of its group that have a reward."""

    valid: Tensor  # (N,) bool
    centred: Tensor  # (N,) reward minus the group's mean, 0 where not valid
    count: Tensor  # (N,) completions with a reward in the group
    std: Tensor  # (N,) with ddof = 1; 0 for a group of one


def group_mean_std(rewards: Tensor, group: Tensor, *, eps: float = 1e-4) -> Tensor:
    """``(r - mean) / (std + eps)`` within the group, GRPO (arXiv:2402.03300, section 4.1.2).

    std has ddof = 1, as in the public trainers (the paper does not say); a group of one or without spread
    gives 0.
    Dividing by std lifts groups in which nearly all agree; :func:`group_mean` does not.
    """
    in_range("eps", eps, at_least=0)
    g = _grouped(rewards, group)
    scale = torch.where(g.std > 0, g.std + eps, torch.ones_like(g.std))
    return (g.centred / scale).to(rewards.dtype)


def group_mean(rewards: Tensor, group: Tensor) -> Tensor:
    """``r - mean`` within the group, Dr. GRPO (arXiv:2503.20783). A group of one gives 0."""
    return _grouped(rewards, group).centred.to(rewards.dtype)


def leave_one_out(rewards: Tensor, group: Tensor) -> Tensor:
    """``r_i - mean of the others of the group``, RLOO (arXiv:2402.14740).

    Equal to ``n / (n - 1) * (r - mean)``. A group of one has no others and gives 0.
    """
    g = _grouped(rewards, group)
    return (g.centred * g.count / (g.count - 1).clamp(min=1)).to(rewards.dtype)


def whiten(rewards: Tensor, group: Tensor, *, eps: float = 1e-8) -> Tensor:
    """``(r - mean) / (std + eps)`` over the whole step, as PPO trainers do; ``group`` is not looked at.

    std has ddof = 1. Fewer than two rewards give 0.
    """
    return group_mean_std(rewards, torch.zeros_like(group), eps=eps)


ADVANTAGES: dict[str, Callable[..., Tensor]] = {
    "group_mean_std": group_mean_std,
    "group_mean": group_mean,
    "leave_one_out": leave_one_out,
    "whiten": whiten,
}


def compute(name: str, rewards: Tensor, group: Tensor) -> Tensor:
    """Advantages (N,) by name; raises ObjectiveError for an unknown name."""
    one_of("advantages", name, ADVANTAGES)
    return ADVANTAGES[name](rewards, group)


def _grouped(rewards: Tensor, group: Tensor) -> _Grouped:
    if rewards.dim() != 1 or rewards.shape != group.shape:
        raise ObjectiveError(
            f"rewards and group must both be (N,), got {tuple(rewards.shape)}, {tuple(group.shape)}"
        )
    r = rewards.detach().double()
    valid = ~torch.isnan(r)
    kinds, index = torch.unique(group, return_inverse=True)
    size = len(kinds)
    # Measure from the group's lowest reward: equal rewards are then exactly 0, whatever their value.
    lowest = torch.full((size,), torch.inf, dtype=r.dtype, device=r.device)
    lowest = lowest.scatter_reduce(0, index, r.masked_fill(~valid, torch.inf), "amin")[index]
    r = torch.where(valid, r - lowest, 0.0)

    def total(x: Tensor) -> Tensor:
        return torch.zeros(size, dtype=r.dtype, device=r.device).index_add(0, index, x)[index]

    count = total(valid.double())
    centred = torch.where(valid, r - total(r) / count.clamp(min=1), 0.0)
    std = (total(centred.square()) / (count - 1).clamp(min=1)).sqrt()
    return _Grouped(valid, centred, count, std)


__all__ = ["ADVANTAGES", "compute", "group_mean", "group_mean_std", "leave_one_out", "whiten"]
