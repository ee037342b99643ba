"""What annotations say about the completions of a group, read for the rules of :mod:`steerwell.data.resolve`: votes
on pairs, values of completions, how much better, verdicts on steps. What was read, and what was not and why, is
counted in a report.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from steerwell.data.evidence import comparisons
from steerwell.data.resolve_report import ResolveReport
from steerwell.data.steps import given_ends
from steerwell.data.types import Annotation, Completion, CompletionGroup


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


def step_verdicts(
    groups: Iterable[CompletionGroup],
    annotations: Iterable[Annotation] | None,
    criterion: str | None,
    report: ResolveReport,
) -> Iterator[tuple[CompletionGroup, list[Any], list[list[list[float]] | None]]]:
    """Each group with the ends of its completions' steps and the verdicts on each step (None: no annotation)."""
    for group in with_evidence(groups, annotations):
        report.groups += 1
        said = [
            a
            for a in group.annotations
            if a.kind == "steps" and (criterion is None or a.criterion == criterion)
        ]
        cuts = given_ends(group, said)
        position = {c.id: k for k, c in enumerate(group.completions)}
        verdicts = [None if ends is None else [[] for _ in ends] for ends in cuts]
        for annotation in said:
            at = position.get(annotation.completions[0])
            report.no_verdict += annotation.value is None
            if at is None or annotation.value is None:
                continue
            if tuple(end for end, _ in annotation.value) != cuts[at]:
                report.other_cuts += 1
                continue
            report.used += 1
            for step, (_, verdict) in zip(verdicts[at] or (), annotation.value, strict=True):
                if verdict is not None:
                    step.append(float(verdict))
        yield group, cuts, verdicts


__all__ = ["ballots", "by_criterion", "graded_votes", "step_verdicts", "values_of", "with_evidence"]
