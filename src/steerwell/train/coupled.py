"""Objectives that look at a whole optimizer step at once, exactly, however the step is cut.

Such an objective (a shift over the batch, sorted margins) cannot be computed a micro-batch at a time. So a step goes
through the model twice: first without gradient, which gives the objective all log-probs of the step, from all
processes; its gradient with respect to them is then carried back, micro-batch by micro-batch, in the second pass.
This costs one more forward pass, and only where a step is cut at all.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerwell.objectives.reduce import BY_OWNER, reduce
from steerwell.objectives.table import TENSORS
from steerwell.train.terms import Term

#: Tensors with a gradient, in the order in which they are looked for.
LEARNT_BY_POLICY = ("logps", "per_token_logps", "per_token_kl")
LEARNT_BY_REWARD = ("scores", "head_scores", "step_scores")
#: Indices, by what they count.
POINTS_AT = {"pairs": "N", "owner": "N", "step_owner": "N", "group": "G"}

Carried = dict[str, list[float]]


def coupled(terms: Sequence[Term]) -> list[Term]:
    """The terms that need all of a step at once. One that is given its own figure of the step (``kl``) does not."""
    return [term for term in terms if not term.decomposable and "kl" not in term.tensors]


def moved(
    terms: Sequence[Term], tensors: Mapping[str, Tensor], carried: Mapping[str, list[float]]
) -> Carried:
    """What the terms carry to this step, from what they carried to the one before and the tensors of this one."""
    found: Carried = {}
    for term in coupled(terms):
        if term.function.running is not None:
            before = carried.get(term.name)
            given = {name: tensors[name].detach() for name in term.tensors if name in tensors}
            with torch.no_grad():
                after = term.function.running(
                    None if before is None else torch.tensor(before, dtype=torch.float64),
                    **given,
                    **term.hyper,
                )
            found[term.name] = after.double().tolist()
    return found


def outcome(
    term: Term, tensors: Mapping[str, Tensor], carried: Mapping[str, list[float]]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Losses and metrics of a term, unreduced, from its tensors and from what it carries."""
    given = {name: tensors[name] for name in term.tensors if name in tensors}
    if term.function.running is not None and term.name in carried:
        like = next(x for x in given.values() if x.is_floating_point())
        given["running"] = torch.tensor(carried[term.name], dtype=like.dtype, device=like.device)
    return term.function(**given, **term.hyper)


@dataclass
class Whole:
    """The tensors of a step, put together from its micro-batches and processes.

    Completions, tokens, pairs and prompts are numbered through; ``starts`` says, by shape letter, where each of this
    process's micro-batches begins.
    """

    tensors: dict[str, Tensor]
    starts: list[dict[str, int]]
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def slope(self, part: int, tensors: Mapping[str, Tensor]) -> Tensor:
        """The inner product of the gradients found with the learnt tensors of micro-batch ``part``: its gradient is
        that part's share of the step's.
        """
        total = torch.zeros((), dtype=torch.float64, device=next(iter(tensors.values())).device)
        for name, gradient in self.gradients.items():
            own = tensors[name]
            start = self.starts[part].get(_letter(name), 0)
            total = total + (gradient[start : start + len(own)].to(own) * own).sum()
        return total


def put_together(
    parts: Sequence[Mapping[str, Tensor]], live: Sequence[bool], names: set[str], ranks: Any
) -> Whole:
    """One step's tensors from the micro-batches of all processes; those that are not ``live`` count nothing."""
    wanted = {*names, "lengths", "group"}
    own = [
        {name: x.detach() for name, x in part.items() if name in wanted} if alive else None
        for part, alive in zip(parts, live, strict=True)
    ]
    device = next(iter(parts[0].values())).device
    everyone = (
        own if ranks.alone else [p for rank in ranks.gather([_to(p, "cpu") for p in own]) for p in rank]
    )
    first = 0 if ranks.alone else ranks.rank * len(own)  # every process has equally many
    at, starts, chunks = {"N": 0, "G": 0}, [], {}
    for part in everyone:
        starts.append(dict(at))
        if part is None:
            continue
        for name, x in part.items():
            offset = at[POINTS_AT[name]] if name in POINTS_AT else 0
            chunks.setdefault(name, []).append(x + offset if offset else x)
        counts = {_letter(name): x.shape[_along(name)] for name, x in part.items() if x.dim()}
        for letter, count in counts.items():
            at[letter] = at.get(letter, 0) + count
        at["G"] += int(part["group"].max()) + 1 if part["group"].numel() else 0
    whole = {n: (torch.cat(some, dim=_along(n)) if some[0].dim() else some[0]) for n, some in chunks.items()}
    return Whole(_to(whole, device) or {}, starts[first : first + len(own)])


def learn(
    whole: Whole,
    terms: Sequence[Term],
    counts: Mapping[str, float],
    carried: Mapping[str, list[float]],
    *,
    backward: bool,
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The reduced losses of coupled terms over a whole step, and their metrics; with ``backward`` the gradients with
    respect to the learnt tensors, weighted, stay in ``whole``.
    """
    losses: dict[str, Tensor] = {}
    metrics: dict[str, dict[str, Tensor]] = {}
    learnt = LEARNT_BY_REWARD if terms[0].kind == "reward" else LEARNT_BY_POLICY
    leaves = {n: whole.tensors[n].clone().requires_grad_(backward) for n in learnt if n in whole.tensors}
    value = torch.zeros((), dtype=torch.float64, device=next(iter(leaves.values())).device)
    with torch.set_grad_enabled(backward):
        for term in terms:
            each, metrics[term.name] = outcome(term, {**whole.tensors, **leaves}, carried)
            owner = loss_owner(term, whole.tensors) if term.reduction in BY_OWNER else None
            own = reduce(each, term.reduction, denominator=counts[term.name], owner=owner)
            losses[term.name] = own.detach()
            value = value + term.weight * own
        if backward and value.requires_grad:
            found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
            whole.gradients = {n: g for n, g in zip(leaves, found, strict=True) if g is not None}
    return losses, metrics


def loss_owner(term: Term, tensors: Mapping[str, Tensor]) -> Tensor:
    """Which completion each of a term's losses by token or by step belongs to."""
    if term.unit == "step":
        return tensors["step_owner"][~tensors["step_labels"].isnan()]
    owner = tensors["owner"]
    return owner if term.mask is None else owner[tensors[term.mask][owner]]


def _to(part: Mapping[str, Tensor] | None, device: Any) -> dict[str, Tensor] | None:
    return None if part is None else {name: x.to(device) for name, x in part.items()}


def _along(name: str) -> int:
    """The dimension of a tensor that batches are put together along."""
    return 1 if TENSORS[name].shape[0] == "2" else 0


def _letter(name: str) -> str:
    return TENSORS[name].shape[_along(name)]


__all__ = ["Carried", "Whole", "coupled", "learn", "loss_owner", "moved", "outcome", "put_together"]
