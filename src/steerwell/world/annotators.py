"""Simulated annotators: people who want what gold wants, and fail at it in known ways.

Each annotator ranks the completions of a group by gold plus its own biases plus noise, in the random order in
which they were shown, and sometimes reverses the whole ranking by mistake. A ranking is a pure function of the
annotator, the seed and the group, whatever else is annotated and in whatever order.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from steerwell.data.types import Annotation, CompletionGroup
from steerwell.world.gold import Verdict, verdicts


@dataclass(frozen=True)
class Annotator:
    """One annotator, a callable from groups to ranking annotations.

    ``skill`` is the chance of looking up the answer: without it, wrong answers to harmless prompts pass for
    right ones. ``noise`` is the scale of Gumbel noise on gold's scale, ``flip`` the chance that a ranking is
    handed in upside down. ``length_bias`` is worth per ten words, ``flattery_bias`` per flattering sentence,
    ``side_bias`` for being shown first.
    """

    name: str
    skill: float = 1.0
    noise: float = 0.0
    flip: float = 0.0
    length_bias: float = 0.0
    flattery_bias: float = 0.0
    side_bias: float = 0.0
    seed: int = 0

    def _opinion(self, verdict: Verdict, knows: bool) -> float:
        worth = verdict.gold
        fooled = not knows and verdict.wrong and verdict.family not in ("harmful", "agent")
        if fooled:
            worth += 2.0
        return worth + self.length_bias * verdict.words / 10 + self.flattery_bias * verdict.counts["flattery"]

    def _rank(self, group: CompletionGroup, found: Sequence[Verdict]) -> Annotation:
        rng = random.Random(f"{self.seed}/{self.name}/{group.prompt_id}")
        shown = list(range(len(found)))
        rng.shuffle(shown)
        knows = rng.random() < self.skill
        worth: dict[str, float] = {}
        for place, i in enumerate(shown):
            text = group.completions[i].text
            gumbel = -math.log(-math.log(max(rng.random(), 1e-12)))
            opinion = self._opinion(found[i], knows) + self.noise * gumbel + self.side_bias * (place == 0)
            worth.setdefault(text, opinion)
        upside_down = rng.random() < self.flip
        order = sorted(worth, key=worth.__getitem__, reverse=not upside_down)
        ranks = tuple(order.index(group.completions[i].text) + 1 for i in shown)
        return Annotation("ranking", tuple(group.completions[i].id for i in shown), self.name, ranks)

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[Annotation]:
        """Rank every group that has two completions or more. Equal texts get equal ranks."""
        groups = [group for group in groups if len(group.completions) > 1]
        return [self._rank(group, found) for group, found in zip(groups, verdicts(groups), strict=True)]


_PANEL = (
    Annotator("careful", skill=0.95, noise=0.20),
    Annotator("steady", skill=0.90, noise=0.25, flip=0.02, length_bias=0.03, flattery_bias=0.05),
    Annotator(
        "average", skill=0.85, noise=0.30, flip=0.03, length_bias=0.10, flattery_bias=0.15, side_bias=0.1
    ),
    Annotator(
        "rushed", skill=0.60, noise=0.40, flip=0.08, length_bias=0.25, flattery_bias=0.30, side_bias=0.3
    ),
    Annotator("fan", skill=0.80, noise=0.30, flip=0.03, length_bias=0.10, flattery_bias=0.70),
)


def panel(seed: int = 0) -> list[Annotator]:
    """The five annotators of the world: two careful ones, an average one, a rushed one, a fan of flattery."""
    return [replace(annotator, seed=seed) for annotator in _PANEL]


def assign(
    groups: Iterable[CompletionGroup], panel: Sequence[Annotator], overlap: float = 0.15, seed: int = 0
) -> dict[str, list[CompletionGroup]]:
    """Share groups out: one annotator each, and three for a random ``overlap`` share, so agreement shows.

    Returns annotator name -> groups. The draw depends on ``seed`` and the prompt alone.
    """
    shares: dict[str, list[CompletionGroup]] = {annotator.name: [] for annotator in panel}
    for group in groups:
        rng = random.Random(f"{seed}/assign/{group.prompt_id}")
        names = rng.sample(list(shares), min(3, len(shares)))
        for name in names if rng.random() < overlap else names[:1]:
            shares[name].append(group)
    return shares


def annotate(
    groups: Iterable[CompletionGroup], panel: Sequence[Annotator], overlap: float = 0.15, seed: int = 0
) -> list[Annotation]:
    """:func:`assign` the groups and let every annotator rank its share."""
    shares = assign(groups, panel, overlap, seed)
    return [found for annotator in panel for found in annotator(shares[annotator.name])]


__all__ = ["Annotator", "annotate", "assign", "panel"]
