"""The plain objects of an evaluation: a task, what it is handed (a trial) and what it hands back (measures).

A :class:`Task` is prompts, what to do with a policy's completions, and how to judge them. Nothing is
registered: a task of your own is a ``Task(name, prompts, measure)`` that you give to ``evaluate``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from steerwell.data.types import Annotation, CompletionGroup, Prompt
from steerwell.evals.stats import Estimate
from steerwell.evals.winrate import Coverage

Judge = Callable[[Sequence[CompletionGroup]], Sequence[Annotation]]
Better = Literal["higher", "lower"] | None


class Policy(Protocol):
    """What can be evaluated by its samples: anything with a name that can be sampled."""

    name: str

    def sample(self, prompts: Sequence[Prompt], n: int = 1, **settings: Any) -> Sequence[CompletionGroup]:
        """``n`` completions for each prompt, in the order of the prompts."""
        ...


@dataclass(frozen=True)
class Measure:
    """One number about one policy, and what it was made from.

    ``items`` are the single values behind the estimate, keyed by what both sides of a comparison share (a
    prompt id, or the id of a pair): equal keys are the same item measured on two policies. None is missing.
    ``clusters`` names the prompt of each key, where several keys share a prompt. ``section`` is the heading
    of a table that it stands under; a measure that is not ``shown`` is left to the JSON form.
    """

    name: str
    estimate: Estimate
    coverage: Coverage
    better: Better = None
    items: tuple[tuple[str, float | None], ...] = ()
    clusters: Mapping[str, str] = field(default_factory=dict)
    unit: Literal["share", "number"] = "share"
    notes: tuple[str, ...] = ()
    detail: Any = None  # e.g. the WinRate
    section: str = ""
    shown: bool = True


@dataclass(frozen=True)
class Trial:
    """What a task's measure is handed: one policy's completions, and those it is set against, if any.

    ``is_baseline`` says that this policy is itself the one the others are set against.
    """

    policy: Any
    name: str
    groups: tuple[CompletionGroup, ...]
    against: Any = None
    against_name: str = ""
    against_groups: tuple[CompletionGroup, ...] = ()
    judge: Judge | None = None
    is_baseline: bool = False


@dataclass(frozen=True)
class Findings:
    """What a measure hands back: numbers, and the groups with the annotations that led to them."""

    measures: tuple[Measure, ...]
    groups: tuple[CompletionGroup, ...]


@dataclass(frozen=True)
class Task:
    """What to ask a policy and how to turn its completions into numbers.

    ``compares``: the number is about two policies, so the baseline itself has none. ``needs_rewards``: it
    takes a reward model, or a policy beside the baseline that is its reference. ``beside``: a baseline that is
    itself a reward model is measured too, for the differences, when it is not one of the policies.
    """

    name: str
    prompts: tuple[Prompt, ...]
    measure: Callable[[Trial], Findings]
    compares: bool = False
    needs_judge: bool = False
    needs_rewards: bool = False
    beside: bool = False


def annotated(
    groups: Iterable[CompletionGroup], annotations: Iterable[Annotation]
) -> tuple[CompletionGroup, ...]:
    """The groups with each annotation attached to the group that holds the first completion it is about."""
    groups = tuple(groups)
    place = {c.id: i for i, group in enumerate(groups) for c in group.completions}
    found: list[list[Annotation]] = [[] for _ in groups]
    for a in annotations:
        if a.completions and a.completions[0] in place:
            found[place[a.completions[0]]].append(a)
    return tuple(
        replace(group, annotations=group.annotations + tuple(new)) if new else group
        for group, new in zip(groups, found, strict=True)
    )


def by_item(measure: Measure) -> Mapping[str, float | None]:
    """The mean value of each item; None where nothing was observed."""
    found: dict[str, list[float]] = {}
    for key, value in measure.items:
        found.setdefault(key, [])
        if value is not None:
            found[key].append(value)
    return {key: sum(values) / len(values) if values else None for key, values in found.items()}


__all__ = ["Better", "Findings", "Judge", "Measure", "Policy", "Task", "Trial", "annotated", "by_item"]
