"""One pass over the items of a step, or of an evaluation: the same code for both, with or without gradient.

The denominators are counted over all the items before the first backward, so neither the loss nor its
gradient nor any figure depends on how the items are cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steerwell.objectives.policy_gradient import k3
from steerwell.objectives.reduce import BY_OWNER, denominator, reduce
from steerwell.train.coupled import (
    Carried,
    Whole,
    coupled,
    learn,
    loss_owner,
    moved,
    outcome,
    put_together,
)
from steerwell.train.items import Item, gather
from steerwell.train.metrics import Totals
from steerwell.train.provide import MicroBatch, Provider
from steerwell.train.reference import REFERENCE_NAMES
from steerwell.train.terms import Term

NOTHING: Mapping[str, Any] = MappingProxyType({})
#: Targets that denominators count, beside the pairs.
COUNTED = ("step_labels", "step_owner")


@dataclass(frozen=True)
class Outcome:
    """The loss of a step (scalar, detached), that of each term by name, the figures by example, and what the terms
    carry from here on.
    """

    loss: Tensor
    parts: dict[str, Tensor]
    totals: Totals
    carried: Carried


def run_items(
    items: Sequence[Item],
    terms: Sequence[Term],
    provider: Provider,
    *,
    backward: bool,
    observe: Callable[[Mapping[str, Tensor]], None] | None = None,
    carried: Mapping[str, list[float]] = NOTHING,
) -> Outcome:
    """Forward (and with ``backward`` also backward) over ``items``. ``observe`` sees the tensors of each
    micro-batch, detached from nothing: it must not keep them. ``carried``: what the terms carried to here, from
    the step before; only a pass with ``backward`` moves it.
    """
    micro = provider.micro_batches(items)
    # Over all of the step: the denominators are those of all processes together.
    masks = {term.mask for term in terms if term.mask}
    counted = gather(items, {"pairs", *COUNTED, *masks} & provider.names, torch.device("cpu"))
    counts = {term.name: denominator(term.reduction, counted, mask=term.mask) for term in terms}
    kl = provider.mismatched_kl(items) if "kl" in provider.names else None
    together = coupled(terms)
    cut = bool(together) and (len(micro) > 1 or not provider.ranks.alone)
    zero = torch.zeros((), dtype=torch.float64, device=provider.device)
    pass_ = _Pass(provider, terms, counts, kl, Totals(), dict(carried), dict.fromkeys(counts, zero), observe)
    if not cut:
        pass_.go(micro, terms, backward=backward, moves=backward and bool(together))
    else:
        apart = [term for term in terms if term not in together]
        noise = torch.random.get_rng_state()
        seen = pass_.look(micro, together, observe=None if backward else observe)
        whole = pass_.settle(seen, micro, together, backward=backward)
        if backward:
            torch.random.set_rng_state(noise)  # the same dropout in both passes
        if apart or backward:
            pass_.go(micro, apart, backward=backward, whole=whole, seen=seen)
    parts, totals = pass_.parts, pass_.totals
    if not provider.ranks.alone:
        parts = dict(zip(parts, _summed(provider, list(parts.values())), strict=True))
        totals.merge(provider.ranks.gather(totals.state()))
    loss = sum((term.weight * parts[term.name] for term in terms), start=zero)
    if len(terms) > 1:
        for name, value in parts.items():
            totals.add(f"loss/{name}", value)
    return Outcome(loss, parts, totals, pass_.carried)


@dataclass
class _Pass:
    """One or two passes over the micro-batches of a step, and what has come of them so far."""

    provider: Provider
    terms: Sequence[Term]
    counts: Mapping[str, float]
    kl: Tensor | None
    totals: Totals
    carried: Carried
    parts: dict[str, Tensor]
    observe: Callable[[Mapping[str, Tensor]], None] | None

    def tensors(self, part: MicroBatch, known: Mapping[str, Tensor] = NOTHING) -> dict[str, Tensor]:
        """All tensors of a micro-batch; what is ``known`` of the reference is not computed again."""
        targets = self.provider.targets(part.items)
        known = {name: x for name, x in known.items() if name in REFERENCE_NAMES}
        found = self.provider.tensors(part.items, targets | known)
        return found if self.kl is None else found | {"kl": self.kl}

    def go(
        self,
        micro: Sequence[MicroBatch],
        terms: Sequence[Term],
        *,
        backward: bool,
        moves: bool = False,
        whole: Whole | None = None,
        seen: Sequence[Mapping[str, Tensor]] = (),
    ) -> None:
        """The losses of ``terms``, micro-batch by micro-batch, and of ``whole`` its share of the gradient."""
        for i, part in enumerate(micro):
            with torch.set_grad_enabled(backward):
                tensors = self.tensors(part, seen[i] if seen else NOTHING)
                if moves:
                    self.carried |= moved(terms, tensors, self.carried)
                own = _objectives(
                    terms, tensors, self.counts, self.carried, self.totals if part.live else Totals()
                )
                value = sum(
                    (term.weight * own[term.name] for term in terms),
                    start=torch.zeros((), dtype=torch.float64, device=self.provider.device),
                )
                if whole is not None and backward and part.live:
                    value = value + whole.slope(i, tensors)
            if not part.live:
                value, own = value * 0.0 + _nothing(tensors), {}
            elif self.observe is not None and (whole is None or backward):
                self.observe(tensors)
            if backward and value.requires_grad:
                # gradients come together as a mean over processes
                (value * self.provider.ranks.size).backward()
            for name, loss in own.items():
                self.parts[name] = self.parts[name] + loss.detach()

    def look(
        self,
        micro: Sequence[MicroBatch],
        together: Sequence[Term],
        observe: Callable[[Mapping[str, Tensor]], None] | None,
    ) -> list[dict[str, Tensor]]:
        """The tensors of all micro-batches that ``together`` take, without gradient."""
        names = {name for term in together for name in term.tensors} | {"lengths", "group"} | REFERENCE_NAMES
        found = []
        for part in micro:
            with torch.no_grad():
                tensors = self.tensors(part)
            if observe is not None and part.live:
                observe(tensors)
            found.append({name: x for name, x in tensors.items() if name in names})
        return found

    def settle(
        self,
        seen: Sequence[Mapping[str, Tensor]],
        micro: Sequence[MicroBatch],
        together: Sequence[Term],
        *,
        backward: bool,
    ) -> Whole:
        """The losses and figures of ``together`` over the whole step; every process finds the same."""
        names = {name for term in together for name in term.tensors}
        whole = put_together(seen, [part.live for part in micro], names, self.provider.ranks)
        if backward:
            self.carried |= moved(together, whole.tensors, self.carried)
        losses, metrics = learn(whole, together, self.counts, self.carried, backward=backward)
        if self.provider.ranks.writes:  # what is summed over processes comes from one of them
            _take(metrics, self.totals, set())
            self.parts |= losses
        return whole


def _nothing(tensors: Mapping[str, Tensor]) -> Tensor:
    """Zero, with a gradient of zero for all that was computed: a process that has nothing more to do stays in step."""
    learnt = [x for x in tensors.values() if x.requires_grad]
    return sum((x.double().sum() * 0.0 for x in learnt), start=torch.zeros((), dtype=torch.float64))


def _summed(provider: Provider, values: Sequence[Tensor]) -> list[Tensor]:
    """Numbers summed over processes, in the order of ranks."""
    rows = provider.ranks.gather([value.item() for value in values])
    return list(torch.tensor(rows, dtype=torch.float64, device=provider.device).sum(0))


def _objectives(
    terms: Sequence[Term],
    tensors: Mapping[str, Tensor],
    counts: Mapping[str, float],
    carried: Mapping[str, list[float]],
    totals: Totals,
) -> dict[str, Tensor]:
    """The share of each term's loss that one micro-batch has; the figures go into ``totals``."""
    parts: dict[str, Tensor] = {}
    taken: set[str] = set()
    for term in terms:
        losses, metrics = outcome(term, tensors, carried)
        owner = loss_owner(term, tensors) if term.reduction in BY_OWNER else None
        parts[term.name] = reduce(losses, term.reduction, denominator=counts[term.name], owner=owner)
        _take({term.name: metrics}, totals, taken)
    return parts


def _take(metrics: Mapping[str, Mapping[str, Tensor]], totals: Totals, taken: set[str]) -> None:
    """Figures into ``totals``. One that an earlier term has under the same name carries its own term's before it."""
    for term, own in metrics.items():
        for name, values in own.items():
            totals.add(f"{term}/{name}" if name in taken else name, values)
        taken |= own.keys()


def kl_figures(tensors: Mapping[str, Tensor], totals: Totals) -> None:
    """Per completion: the KL from the reference, summed over tokens, by the estimators k1 (the log-ratio
    itself) and k3 (never below 0), in nats (Schulman 2020). Both are right for completions of the current
    policy.
    """
    if "ref_per_token_logps" not in tensors:
        return
    mine, ref = tensors["per_token_logps"].detach(), tensors["ref_per_token_logps"]
    zero = mine.new_zeros(len(tensors["lengths"]))  # a model in float64 has figures in float64
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
