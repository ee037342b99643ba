"""Likelihood displacement: whether preferred completions become less likely while the margin grows (arXiv:2410.08847).

A preference objective rewards the difference of two log-probs, so both may fall. Every run on pairs, rankings or labels
measures how far the chosen completions (the best of a ranking, the desirable ones) are from where they were at its
start, and says so at the end if they fell. Where the objective
is given the reference's log-probs, and the reference is the start, the measure costs nothing: it is taken over each
step's pairs. Elsewhere a few groups (the probe) are read at the start, at each quarter of the run, and at its end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerwell.models.forward import sum_by_owner
from steerwell.train.items import Item
from steerwell.train.metrics import Totals
from steerwell.train.provide import Provider
from steerwell.train.terms import Term

#: Nats that a chosen completion must lose to have fallen: more than rounding.
FELL = 1e-3
#: Nats per token that the chosen lose on average before a run warns.
WARN_PER_TOKEN = 0.01
PROBE = 64  # groups at most
LOOKS = 4
#: Tensors that tell which completions are chosen, the first of them that a run has.
CHOSEN_BY = ("pairs", "labels", "ranks")

MEND = (
    'Terms that hold them: an sft term (losses = [["dpo", 1.0], ["sft", 0.1]]), dpop, or cal_dpo. '
    "A larger beta or a smaller learning rate moves all log-probs less."
)


MEND_LABELS = (
    "An sft term holds them (a mixture with weight 0.1). A larger beta or a smaller learning rate moves all log-probs "
    "less."
)


@dataclass
class Displacement:
    """The meter of one run. ``probe``: groups that are read apart, empty where each step's own are enough. ``by``: the
    tensor that says which completions are chosen.
    """

    provider: Provider
    steps: int
    on: bool = False
    probe: Sequence[Item] = ()
    by: str = "pairs"
    _start: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls, provider: Provider, terms: Sequence[Term], items: Sequence[Item], steps: int, batch_size: int
    ) -> Displacement:
        """The meter for a run over ``items``; the model must have its start weights now."""
        names = {name for term in terms if term.kind == "policy" for name in term.tensors}
        by = next((name for name in CHOSEN_BY if name in names), "")
        meter = cls(provider, steps, bool(by), by=by)
        on = meter.on
        if on and not meter._at_hand:
            few = min(PROBE, 2 * batch_size, len(items))
            meter.probe = [items[i * len(items) // few] for i in range(few)]
            meter._start = meter._read()
        return meter

    @property
    def _at_hand(self) -> bool:
        return self.provider.reference.kind == "start" and "ref_logps" in self.provider.names

    def observe(self, tensors: Mapping[str, Tensor], totals: Totals) -> None:
        """Take the chosen completions of one micro-batch, where its tensors say enough."""
        if self.on and self._at_hand and "ref_logps" in tensors:
            chosen = self._chosen(tensors)
            now, start = tensors["logps"].detach()[chosen], tensors["ref_logps"][chosen]
            _add(now - start, tensors["lengths"][chosen], totals)

    def _chosen(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Places of the chosen completions: one for each pair, each desirable one, or those of rank 0."""
        if self.by == "pairs":
            return tensors["pairs"][0]
        return torch.nonzero(tensors["labels"] if self.by == "labels" else tensors["ranks"] == 0).flatten()

    def look(self, step: int) -> dict[str, float]:
        """The figures of the probe after ``step``, where it is their turn; every process must ask."""
        if not self.probe or (step % math.ceil(self.steps / LOOKS) and step != self.steps):
            return {}
        totals = Totals()
        for now, start in zip(self._read(), self._start, strict=True):
            _add((now - start)[0], start[1], totals)
        if not self.provider.ranks.alone:
            totals.merge(self.provider.ranks.gather(totals.state()))
        return totals.means()

    def _read(self) -> list[Tensor]:
        """(2, M) by micro-batch of this process: log-probs of the chosen and their numbers of tokens."""
        found = []
        for part in self.provider.micro_batches(self.probe):
            targets = self.provider.targets(part.items)
            with torch.no_grad():
                logps = self.provider.logps(part.items)
            if part.live:
                chosen = self._chosen(targets)
                sums = sum_by_owner(*logps, len(targets["lengths"]))
                found.append(torch.stack([sums[chosen], targets["lengths"][chosen].to(sums)]))
        return found


def _add(shift: Tensor, lengths: Tensor, totals: Totals) -> None:
    totals.add("displacement/chosen", shift)
    totals.add("displacement/chosen_per_token", shift / lengths.clamp(min=1))
    totals.add("displacement/fell", (shift < -FELL).double())


def conclusion(metrics: Sequence[Mapping[str, Any]], steps: int, by: str = "pairs") -> dict[str, Any]:
    """What a run came to, from the lines of its metrics: means over its last tenth, and a warning where the chosen
    completions, told ``by`` that tensor, fell. Empty where nothing was measured.
    """
    names = ("displacement/chosen", "displacement/chosen_per_token", "displacement/fell")
    measured = [line for line in metrics if line.get(names[0]) is not None]
    last = [line for line in measured if line["step"] > 0.9 * steps] or measured[-1:]
    if not last:
        return {}
    chosen, per_token, fell = (sum(line[name] for line in last) / len(last) for name in names)
    found: dict[str, Any] = {"chosen": chosen, "chosen_per_token": per_token, "fell": fell, "warning": None}
    if fell > 0.5 and per_token < -WARN_PER_TOKEN:
        whose = {
            "labels": f"{fell:.0%} of the desirable completions",
            "ranks": f"the best completions of {fell:.0%} of the rankings",
        }.get(by, f"the chosen completions of {fell:.0%} of the pairs")
        mend = MEND if by == "pairs" else MEND_LABELS
        found["warning"] = (
            f"likelihood displacement: {whose} are less likely than at the start, by {-chosen:.1f} nats on average "
            f"({-per_token:.2f} per token). {mend}"
        )
    return found


__all__ = ["Displacement", "conclusion"]
