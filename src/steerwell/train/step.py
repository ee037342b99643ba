"""One pass over the items of a step, or of an evaluation: the same code for both, with or without gradient.

The denominators are counted over all the items before the first backward, so neither the loss nor its
gradient nor any figure depends on how the items are cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.objectives.policy_gradient import k3
from steerwell.objectives.reduce import denominator, reduce
from steerwell.train.items import Item, gather
from steerwell.train.metrics import Totals
from steerwell.train.provide import Provider
from steerwell.train.terms import Term


@dataclass(frozen=True)
class Outcome:
    """The loss of a step (scalar, detached), that of each term by name, and the figures by example."""

    loss: Tensor
    parts: dict[str, Tensor]
    totals: Totals


def run_items(
    items: Sequence[Item],
    terms: Sequence[Term],
    provider: Provider,
    *,
    backward: bool,
    observe: Callable[[Mapping[str, Tensor]], None] | None = None,
) -> Outcome:
    """Forward (and with ``backward`` also backward) over ``items``. ``observe`` sees the tensors of each
    micro-batch, detached from nothing: it must not keep them.
    """
    micro = provider.micro_batches(items)
    _refuse_cut(terms, provider, len(micro))
    # Over all of the step: the denominators are those of all processes together.
    masks = {term.mask for term in terms if term.mask}
    counted = gather(items, {"pairs", *masks} & provider.names, torch.device("cpu"))
    whole = {term.name: denominator(term.reduction, counted, mask=term.mask) for term in terms}
    kl = provider.mismatched_kl(items) if "kl" in provider.names else None
    totals = Totals()
    zero = torch.zeros((), dtype=torch.float64, device=provider.device)
    loss, parts = zero, {term.name: zero for term in terms}
    for part in micro:
        with torch.set_grad_enabled(backward):
            tensors = provider.tensors(part.items, provider.targets(part.items))
            if kl is not None:
                tensors["kl"] = kl
            own = _objectives(terms, tensors, whole, totals if part.live else Totals())
            value = sum((term.weight * own[term.name] for term in terms), start=zero)
        if not part.live:
            value, own = value * 0.0, {}
        elif observe is not None:
            observe(tensors)
        if backward and value.requires_grad:
            (value * provider.ranks.size).backward()  # gradients come together as a mean over processes
        loss = loss + value.detach()
        parts = {name: so_far + own[name].detach() if own else so_far for name, so_far in parts.items()}
    if not provider.ranks.alone:
        loss, *rest = _summed(provider, [loss, *parts.values()])
        parts = dict(zip(parts, rest, strict=True))
        totals.merge(provider.ranks.gather(totals.state()))
    if len(terms) > 1:
        for name, value in parts.items():
            totals.add(f"loss/{name}", value)
    return Outcome(loss, parts, totals)


def _refuse_cut(terms: Sequence[Term], provider: Provider, cuts: int) -> None:
    """Refuse to show an objective that looks at a whole step only a part of it."""
    for term in terms:
        if term.decomposable or "kl" in term.tensors:
            continue
        if not provider.ranks.alone:
            raise InputError(
                f"{term.name} looks at all completions of a step at once, and {provider.ranks.size} processes "
                "would see a part each",
                mend="Run it in one process.",
            )
        if cuts > 1:
            raise InputError(
                f"{term.name} looks at all completions of a step at once, and they do not fit max_tokens",
                mend="Raise max_tokens, or lower batch_size.",
            )


def _summed(provider: Provider, values: Sequence[Tensor]) -> list[Tensor]:
    """Numbers summed over processes, in the order of ranks."""
    rows = provider.ranks.gather([value.item() for value in values])
    return list(torch.tensor(rows, dtype=torch.float64, device=provider.device).sum(0))


def _objectives(
    terms: Sequence[Term], tensors: Mapping[str, Tensor], whole: Mapping[str, float], totals: Totals
) -> dict[str, Tensor]:
    """The share of each term's loss that one micro-batch has; the figures go into ``totals``.

    A figure that an earlier term has under the same name carries the name of its own term before it.
    """
    parts: dict[str, Tensor] = {}
    taken: set[str] = set()
    for term in terms:
        given = {name: tensors[name] for name in term.tensors if name in tensors}
        losses, metrics = term.function(**given, **term.hyper)
        owner = _loss_owner(term, tensors) if term.reduction == "sequence_mean" else None
        parts[term.name] = reduce(losses, term.reduction, denominator=whole[term.name], owner=owner)
        for name, values in metrics.items():
            totals.add(f"{term.name}/{name}" if name in taken else name, values)
        taken |= metrics.keys()
    return parts


def _loss_owner(term: Term, tensors: Mapping[str, Tensor]) -> Tensor:
    owner = tensors["owner"]
    return owner if term.mask is None else owner[tensors[term.mask][owner]]


def kl_figures(tensors: Mapping[str, Tensor], totals: Totals) -> None:
    """Per completion: the KL from the reference, summed over tokens, by the estimators k1 (the log-ratio
    itself) and k3 (never below 0), in nats (Schulman 2020). Both are right for completions of the current
    policy.
    """
    if "ref_per_token_logps" not in tensors:
        return
    mine, ref = tensors["per_token_logps"].detach(), tensors["ref_per_token_logps"]
    zero = torch.zeros_like(tensors["lengths"])
    totals.add("kl/k1", zero.index_add(0, tensors["owner"], mine - ref))
    totals.add("kl/k3", zero.index_add(0, tensors["owner"], k3(mine, ref)))


def suspects(items: Sequence[Item], terms: Sequence[Term], provider: Provider) -> list[str]:
    """The prompt ids of the items whose own loss is not finite (all of them, if none is by itself)."""
    found: list[str] = []
    for item in items:
        with torch.no_grad():
            outcome = run_items([item], terms, provider, backward=False)
        if not torch.isfinite(outcome.loss):
            found.append(item.prompt_id)
    return found or [item.prompt_id for item in items]


__all__ = ["Outcome", "kl_figures", "run_items", "suspects"]
