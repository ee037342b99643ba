"""What a well-formed annotation is, and the preferences it states about pairs of completions.

``check_annotation`` is asked wherever evidence enters (the store, the loaders), ``comparisons`` wherever it
is counted (``resolve``, ``quality``): one reading of a preference and of a ranking for both.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from steerwell.data.errors import InputError, nearest
from steerwell.data.steps import verdict_problem
from steerwell.data.types import ANNOTATION_KINDS, Annotation

SHOWN = {
    "preference": 2,
    "score": 1,
    "label": 1,
    "steps": 1,
}  # how many completions an annotation of a kind is about
PREFERENCES = (0, 1, "tie", "both_bad")


class Comparison(NamedTuple):
    """One verdict about two completions, ``first`` shown before ``second``.

    ``winner`` is 0 (first), 1 (second) or None (a tie).
    """

    first: str
    second: str
    winner: int | None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _value_problem(annotation: Annotation) -> str:
    kind, value = annotation.kind, annotation.value
    if value is None:
        return ""
    if kind == "preference":
        known = not isinstance(value, bool | float) and value in PREFERENCES
        return "" if known else "0, 1, 'tie', 'both_bad' or None"
    if kind == "score":
        return "" if _is_number(value) else "a finite number or None"
    if kind == "steps":
        wanted = verdict_problem(value)
        return wanted and f"{wanted}, or None"
    if kind == "label":
        return "" if isinstance(value, bool) else "True, False or None"
    if kind == "ranking":
        ranks = isinstance(value, tuple) and all(
            isinstance(r, int) and not isinstance(r, bool) for r in value
        )
        right = ranks and len(value) == len(annotation.completions)
        return "" if right else f"a tuple with {len(annotation.completions)} whole numbers or None"
    return "" if isinstance(value, str) else "text or None"


def check_annotation(annotation: Annotation) -> None:
    """Raise :class:`InputError` when the annotation can't be what its kind says (see :class:`Annotation`)."""
    kind, shown = annotation.kind, annotation.completions
    if kind not in ANNOTATION_KINDS:
        raise InputError(f"unknown kind of annotation {kind!r}", mend=nearest(str(kind), ANNOTATION_KINDS))
    if not annotation.annotator:
        raise InputError(f"a {kind} annotation names no annotator", mend="Say who judged.")
    if isinstance(shown, str) or not shown or len(shown) != SHOWN.get(kind, len(shown)):
        count = SHOWN.get(kind, "at least 1")
        raise InputError(
            f"a {kind} annotation is about {count} completion(s), got {shown!r:.80}",
            mend="Give a tuple of Completion.id in the order shown.",
        )
    if len(set(shown)) != len(shown):
        raise InputError(
            f"a {kind} annotation shows one completion twice",
            mend="Two samples of one text need different Source.index.",
        )
    if wanted := _value_problem(annotation):
        raise InputError(
            f"the value of a {kind} annotation must be {wanted}, got {annotation.value!r:.60}",
            mend=f"Annotator: {annotation.annotator}.",
        )


def comparisons(annotation: Annotation, *, best_worst: bool = False) -> Iterator[Comparison]:
    """The verdicts about pairs that a preference or a ranking states, in the order shown.

    A ranking of K completions gives K(K-1)/2; with ``best_worst`` only each best against each worst. Nothing
    comes from other kinds, from "both bad", or from an annotation without a verdict.
    """
    value, shown = annotation.value, annotation.completions
    if value is None:
        return
    if annotation.kind == "preference" and value != "both_bad":
        yield Comparison(shown[0], shown[1], None if value == "tie" else value)
    elif annotation.kind == "ranking":
        best, worst = min(value), max(value)
        for i in range(len(shown)):
            for j in range(i + 1, len(shown)):
                ends = {value[i], value[j]} == {best, worst} and best != worst
                if not best_worst or ends:
                    winner = None if value[i] == value[j] else int(value[j] < value[i])
                    yield Comparison(shown[i], shown[j], winner)


def as_value(value: Any) -> Any:
    """The value of an annotation as it was, from what JSON made of it: lists are tuples."""
    return tuple(as_value(one) for one in value) if isinstance(value, list) else value


def unique(annotations: Iterable[Annotation]) -> list[Annotation]:
    """The annotations without repeats, in order: one that spans groups is met once per group."""
    return list({a.id: a for a in annotations}.values())


__all__ = ["Comparison", "as_value", "check_annotation", "comparisons", "unique"]
