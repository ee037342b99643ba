"""What a rule of :mod:`steerwell.data.resolve` made: groups with targets, and the counts of how they came about."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from steerwell.data.types import CompletionGroup


@dataclass
class ResolveReport:
    """What was counted. Annotations are counted once for each group that they are about."""

    rule: str
    groups: int = 0  # given
    resolved: int = 0  # with a target
    used: int = 0  # annotations that gave a vote
    no_verdict: int = 0  # annotations that failed or were skipped
    both_bad: int = 0  # annotations that prefer neither, as both are bad: no vote
    across: int = 0  # annotations that compare completions of different prompts: no vote
    equal_texts: int = 0  # comparisons of two samples with the same text: no vote
    other_cuts: int = 0  # annotations that cut a completion into other steps than most do: no vote
    ties: int = 0  # votes that are a tie
    undecided: int = 0  # pairs or completions with as many votes for as against
    too_few: int = 0  # pairs or completions with fewer than min_votes votes
    disagreements: int = 0  # pairs or completions with votes both ways
    pairs: int = 0
    scores: int = 0
    labels: int = 0
    ranks: int = 0
    step_labels: int = 0
    strengths: int = 0  # pairs with a strength
    attributes: int = 0  # columns

    def to_dict(self) -> dict[str, Any]:
        """All counts by name."""
        return asdict(self)

    def __str__(self) -> str:
        made = ", ".join(
            f"{n} {w.replace('_', ' ')}"
            for w in ("pairs", "strengths", "scores", "attributes", "labels", "ranks", "step_labels")
            if (n := getattr(self, w))
        )
        words = {
            "no_verdict": "without a verdict",
            "both_bad": "both bad",
            "across": "across prompts",
            "equal_texts": "comparisons of equal texts",
            "other_cuts": "with other steps",
            "ties": "tied votes",
            "undecided": "undecided",
            "too_few": "with too few votes",
            "disagreements": "disagreements",
        }
        rest = [f"{n} {word}" for key, word in words.items() if (n := getattr(self, key))]
        head = f"{self.rule}: {made or 'no targets'} from {self.used} annotations"
        return "; ".join([f"{head} in {self.resolved} of {self.groups} groups", *rest])


class Resolved(list[CompletionGroup]):
    """The groups that got a target, with the ``report`` of how."""

    report: ResolveReport

    def __init__(self, groups: Iterable[CompletionGroup], report: ResolveReport) -> None:
        super().__init__(groups)
        self.report = report


__all__ = ["ResolveReport", "Resolved"]
