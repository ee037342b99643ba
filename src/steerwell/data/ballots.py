"""What annotations say about the completions of a group, read for the rules of :mod:`steerwell.data.resolve`: votes
on pairs, values of completions, how much better. What was read, and what was not and why, is counted in a report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from steerwell.data.evidence import comparisons
from steerwell.data.types import Annotation, Completion, CompletionGroup


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
    ties: int = 0  # votes that are a tie
    undecided: int = 0  # pairs or completions with as many votes for as against
    too_few: int = 0  # pairs or completions with fewer than min_votes votes
    disagreements: int = 0  # pairs or completions with votes both ways
    pairs: int = 0
    scores: int = 0
    labels: int = 0
    ranks: int = 0
    strengths: int = 0  # pairs with a strength
    attributes: int = 0  # columns

    def to_dict(self) -> dict[str, Any]:
        """All counts by name."""
        return asdict(self)

    def __str__(self) -> str:
        made = ", ".join(
            f"{n} {w}"
            for w in ("pairs", "strengths", "scores", "attributes", "labels", "ranks")
            if (n := getattr(self, w))
        )
        words = {
            "no_verdict": "without a verdict",
            "both_bad": "both bad",
            "across": "across prompts",
            "equal_texts": "comparisons of equal texts",
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


def with_evidence(
    groups: Iterable[CompletionGroup], annotations: Iterable[Annotation] | None
) -> Iterator[CompletionGroup]:
    """The groups with the annotations to count: their own, or those given that name their completions."""
    if annotations is None:
        yield from groups
        return
    about: dict[str, list[Annotation]] = defaultdict(list)
    for annotation in annotations:
        for completion in annotation.completions:
            about[completion].append(annotation)
    for group in groups:
        found = {id(a): a for c in group.completions for a in about.get(c.id, ())}
        yield replace(group, annotations=tuple(found.values()))


def ballots(
    groups: Iterable[CompletionGroup],
    annotations: Iterable[Annotation] | None,
    criterion: str | None,
    best_worst: bool,
    report: ResolveReport,
) -> Iterator[tuple[CompletionGroup, dict[tuple[int, int], list[int]]]]:
    """Each group with its votes: ``{(i, j): [for i, for j, ties]}``, i < j, in the order first voted on."""
    for group in with_evidence(groups, annotations):
        report.groups += 1
        position = {c.id: k for k, c in enumerate(group.completions)}
        votes: dict[tuple[int, int], list[int]] = {}
        for annotation in group.annotations:
            if annotation.kind not in ("preference", "ranking"):
                continue
            if criterion is not None and annotation.criterion != criterion:
                continue
            report.no_verdict += annotation.value is None
            report.both_bad += annotation.value == "both_bad"
            used = stated = False
            for first, second, winner in comparisons(annotation, best_worst=best_worst):
                stated = True
                if first not in position or second not in position:
                    continue
                used = True
                i, j = position[first], position[second]
                if group.completions[i].messages == group.completions[j].messages:
                    report.equal_texts += 1
                    continue
                report.ties += winner is None
                slot = 2 if winner is None else winner if i < j else 1 - winner
                votes.setdefault((min(i, j), max(i, j)), [0, 0, 0])[slot] += 1
            report.used += used
            report.across += stated and not used
        yield group, votes


def values_of(
    groups: Iterable[CompletionGroup],
    annotations: Iterable[Annotation] | None,
    kind: str,
    criterion: str | None,
    report: ResolveReport,
) -> Iterator[tuple[CompletionGroup, list[list[Any]]]]:
    """Each group with the values given to each of its completions."""
    for group in with_evidence(groups, annotations):
        report.groups += 1
        position = {c.id: k for k, c in enumerate(group.completions)}
        values: list[list[Any]] = [[] for _ in group.completions]
        for annotation in group.annotations:
            if annotation.kind != kind or (criterion is not None and annotation.criterion != criterion):
                continue
            report.no_verdict += annotation.value is None
            if annotation.value is not None and annotation.completions[0] in position:
                values[position[annotation.completions[0]]].append(annotation.value)
                report.used += 1
        yield group, values


def graded_votes(
    group: CompletionGroup, criterion: str | None, report: ResolveReport
) -> dict[tuple[int, int], list[tuple[int, float | None]]]:
    """Of each pair i < j that was voted on: (1 for i, -1 for j, 0 for a tie; signed strength, if there is one)."""
    position = {c.id: k for k, c in enumerate(group.completions)}
    votes: dict[tuple[int, int], list[tuple[int, float | None]]] = {}
    for annotation in group.annotations:
        if annotation.kind != "preference" or (criterion is not None and annotation.criterion != criterion):
            continue
        report.no_verdict += annotation.value is None
        report.both_bad += annotation.value == "both_bad"
        for first, second, winner in comparisons(annotation):
            if first not in position or second not in position:
                report.across += 1
                continue
            i, j = position[first], position[second]
            report.used += 1
            report.ties += winner is None
            sign = 0 if winner is None else 1 if (winner == 0) == (i < j) else -1
            strength = 0.0 if winner is None else annotation.strength
            graded = None if strength is None else sign * abs(strength)
            votes.setdefault((min(i, j), max(i, j)), []).append((sign, graded))
    return votes


def by_criterion(group: CompletionGroup, completion: Completion) -> Iterator[tuple[str, float]]:
    """The scores given to one completion, each with its criterion."""
    for annotation in group.annotations:
        about = annotation.kind == "score" and annotation.completions == (completion.id,)
        if about and annotation.value is not None:
            yield annotation.criterion, float(annotation.value)


__all__ = [
    "ResolveReport",
    "Resolved",
    "ballots",
    "by_criterion",
    "graded_votes",
    "values_of",
    "with_evidence",
]
