"""Batches made up from tensor names, for checks of objectives: prompts with four completions each.

Completion 0 is good, 1 is bad, 2 lies between, and 3 is idle: no pair names it, it is no demonstration, and its steps
have no label.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from steerwell.objectives.table import TENSORS

PER_PROMPT = 4

Batch = dict[str, Tensor]


def made_up(
    names: tuple[str, ...], *, prompts: int = 3, seed: int = 0, at_start: bool = False, heads: int = 2
) -> Batch:
    """Float64 tensors by name for ``prompts`` prompts of four completions. Raises KeyError for unknown names.

    ``at_start``: policy, reference and sampling policy agree, and kl is 0, as on the first step of a run; all
    outputs of a reward model's head are 0. ``heads``: how many outputs it has.
    """
    g = torch.Generator().manual_seed(seed)
    n = prompts * PER_PROMPT
    place = torch.arange(n) % PER_PROMPT
    lengths = torch.randint(1, 5, (n,), generator=g)
    owner = torch.repeat_interleave(torch.arange(n), lengths)

    def normal(size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    def summed(x: Tensor) -> Tensor:
        return torch.zeros(n, dtype=torch.float64).index_add(0, owner, x)

    policy = -normal(len(owner)).square() - 0.05
    apart = 0.0 if at_start else 1.0
    ref, old = (policy + apart * spread * normal(len(owner)) for spread in (0.5, 0.15))
    quality = torch.tensor([1.0, -1.0, 0.2, -0.3], dtype=torch.float64)[place]
    first = torch.arange(prompts) * PER_PROMPT
    pairs = torch.cat([torch.stack([first + a, first + b]) for a, b in ((0, 1), (0, 2), (2, 1))], dim=1)
    attributes = torch.stack([quality + 0.1 * normal(n), 0.5 * quality + 0.1 * normal(n)], dim=1)
    attributes[::5, 1] = torch.nan  # not every completion was scored by every attribute
    everything = {
        "logps": summed(policy),
        "ref_logps": summed(ref),
        "old_logps": summed(old),
        "lengths": lengths.double(),
        "pairs": pairs,
        "pair_probs": 0.6 + 0.4 * torch.rand(3 * prompts, generator=g, dtype=torch.float64),
        "labels": quality > 0,
        "ranks": torch.tensor([0, 3, 1, 2])[place],
        "scores": 2 * quality + 0.1 * normal(n),
        "rewards": 2 * quality + 0.1 * normal(n),
        "head_scores": apart * torch.stack([quality + 0.3 * normal(n) for _ in range(heads)], dim=1),
        "head_weights": normal(3 * heads).view(heads, 3),
        "attributes": attributes,
        "pair_strengths": torch.randint(0, 4, (3 * prompts,), generator=g).double(),
        "group": torch.arange(n) // PER_PROMPT,
        "advantages": quality * (0.5 + torch.rand(n, generator=g, dtype=torch.float64)),
        "demonstrations": (place == 0) | (place == 2),
        "kl": torch.tensor(0.3 * apart, dtype=torch.float64),
        "per_token_logps": policy,
        "ref_per_token_logps": ref,
        "old_per_token_logps": old,
        "owner": owner,
        "per_token_kl": apart * normal(len(owner)).square(),
        "per_token_collision": -normal(len(owner)).square() - 0.05,
        "token_weights": 0.5 + torch.rand(len(owner), generator=g, dtype=torch.float64),
        "turns": _place_within(owner, lengths) // 2,
        "steps": _place_within(owner, lengths) // 2,
        "shared_tokens": (lengths[pairs].amin(0) - 1).clamp(max=2),  # so that both have a token after them
        "pair_draws": torch.randint(0, 2**48, (3 * prompts,), generator=g),
    }
    always = ("lengths", "owner", "group")
    if any(TENSORS[name].shape == ("U",) for name in names):
        everything |= _made_up_steps(everything, quality, normal)
        always = (*always, "step_owner")
    return {name: everything[name] for name in dict.fromkeys((*names, *always))}


def _made_up_steps(batch: Batch, quality: Tensor, normal: Callable[[int], Tensor]) -> Batch:
    """Steps of two tokens: those of good completions are likely right; idle completions have no label, and neither
    has a second step of the one between.
    """
    both = torch.stack([batch["owner"], batch["steps"]]).unique(
        dim=1
    )  # ascending by completion, then by step
    owner, step = both
    labels = 0.5 + 0.4 * quality.sign()[owner] + 0.05 * normal(len(owner)).tanh()
    place = owner % PER_PROMPT
    labels[(place == 3) | ((place == 2) & (step > 0))] = torch.nan
    return {"step_owner": owner, "step_scores": quality[owner] + normal(len(owner)), "step_labels": labels}


def _place_within(owner: Tensor, lengths: Tensor) -> Tensor:
    """Of each token, how many tokens of its completion come before it."""
    return torch.arange(len(owner)) - (lengths.cumsum(0) - lengths)[owner]


def take(batch: Batch, index: Tensor) -> tuple[Batch, dict[str, Tensor]]:
    """The completions ``index`` in that order, with their tokens, and the pairs that lie within.

    Also returns, by shape letter, the positions in ``batch`` that were taken ("N", "S", "M", "U").
    """
    n = len(batch["lengths"])
    place = torch.full((n,), -1)
    place[index] = torch.arange(len(index))
    tokens = _owned(batch["owner"], index)
    steps = _owned(batch["step_owner"], index) if "step_owner" in batch else tokens[:0]
    pairs = place[batch["pairs"]] if "pairs" in batch else torch.zeros(2, 0, dtype=torch.long)
    inside = torch.nonzero((pairs >= 0).all(0)).flatten()
    taken = {"N": index, "S": tokens, "M": inside, "U": steps}
    out: Batch = {}
    for name, x in batch.items():
        shape = TENSORS[name].shape
        whole = not shape or shape[0] == "H"  # nothing of a completion's or a pair's
        out[name] = x if whole else pairs[:, inside] if name == "pairs" else x[taken[shape[0]]]
    for name in {"owner", "step_owner"} & out.keys():
        out[name] = place[out[name]]
    return out, taken


def _owned(owner: Tensor, index: Tensor) -> Tensor:
    """Positions of what belongs to the completions ``index``, in their order."""
    owned = [torch.nonzero(owner == i).flatten() for i in index.tolist()]
    return torch.cat(owned) if owned else torch.zeros(0, dtype=torch.long)


__all__ = ["PER_PROMPT", "Batch", "made_up", "take"]
