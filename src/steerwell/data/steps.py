"""What a step of a completion is: where each one ends in the text, and what annotators say of it.

A completion is cut by a separator (a blank line), or at ends that the data give. The separator belongs to the step
that it ends, so the steps put together are the text. Ends count characters of :attr:`Completion.text`; the last one
is its length.

Evidence about steps is an annotation of the kind ``steps``: a tuple of ``(end, verdict)``, one for each step. So it
says itself how it cut the text, and a verdict is never read as one about another cut.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.types import Annotation, Completion, CompletionGroup

SEPARATOR = "\n\n"
Ends = tuple[int, ...]


def step_ends(text: str, separator: str = SEPARATOR) -> Ends:
    """The character ends of a text's steps, ascending, the last one ``len(text)``.

    What holds no word is no step: it is part of the one before it, or of the first. An empty text has one step that
    ends at 0. Raises :class:`InputError` for an empty separator.
    """
    if not separator:
        raise InputError("the separator of steps is empty", mend='A blank line is "\\n\\n".')
    ends: list[int] = []
    start = at = 0
    while (found := text.find(separator, at)) >= 0:
        at = found + len(separator)
        if text[start:at].strip():
            ends.append(at)
        elif ends:
            ends[-1] = at
        start = ends[-1] if ends else 0
    if not text[start:].strip() and ends:
        ends.pop()
    return (*ends, len(text))


def joined(steps: Sequence[str], separator: str = SEPARATOR) -> tuple[str, Ends]:
    """The text of steps that are given one by one, and their ends in it."""
    ends: list[int] = []
    at = 0
    for i, step in enumerate(steps):
        at += len(step) + (len(separator) if i + 1 < len(steps) else 0)
        ends.append(at)
    return separator.join(steps), tuple(ends)


def step_texts(text: str, ends: Ends) -> list[str]:
    """The steps themselves, with what parts them."""
    return [text[a:b] for a, b in zip((0, *ends), ends, strict=False)]


def step_at(ends: Ends, character: int) -> int:
    """Which step a character is in; one behind the text is in the last."""
    return min(bisect_right(ends, character), len(ends) - 1)


def check_ends(completion: Completion, ends: Sequence[int]) -> None:
    """Raise :class:`InputError` unless the ends rise from above 0 to the length of the completion's text."""
    length = len(completion.text)
    rising = all(a < b for a, b in zip((0, *ends), ends, strict=False))
    if not ends or not rising or ends[-1] != length:
        raise InputError(
            f"steps end at {tuple(ends)} in a completion of {length} characters: {completion.text[:60]!r}",
            mend="Give rising character ends; the last one is the length of the text.",
        )


def check_steps(group: CompletionGroup) -> None:
    """Raise :class:`InputError` for a group whose ``steps`` do not fit its texts, or its ``step_labels`` its steps."""
    nothing = (None,) * len(group.completions)
    steps, labels = group.steps or nothing, group.step_labels or nothing
    for completion, ends, own in zip(group.completions, steps, labels, strict=True):
        if ends is not None:
            check_ends(completion, ends)
        if own is not None and len(own) != len(ends or ()):
            raise InputError(
                f"{len(own)} labels for {len(ends or ())} steps of {completion.text[:60]!r}",
                mend="Give one for each step, None where there is none.",
            )
        wrong = [x for x in own or () if x is not None and not 0 <= x <= 1]
        if wrong:
            raise InputError(f"the label of a step must be from 0 to 1, got {wrong[0]}")


def verdict_problem(value: Any) -> str:
    """What the value of a ``steps`` annotation must be, "" where it is."""
    rule = "a tuple of (end, verdict) with rising ends, a verdict being True, False, from 0 to 1, or None"
    if not isinstance(value, tuple) or not value:
        return rule
    before = 0
    for one in value:
        if not isinstance(one, tuple) or len(one) != 2:
            return rule
        end, verdict = one
        if isinstance(end, bool) or not isinstance(end, int) or end <= before:
            return rule
        before = end
        if verdict is not None and not (isinstance(verdict, int | float) and 0 <= verdict <= 1):
            return rule
    return ""


def annotate_steps(
    completion: Completion,
    verdicts: Sequence[bool | float | None],
    annotator: str,
    *,
    ends: Ends | None = None,
    separator: str = SEPARATOR,
    **more: Any,
) -> Annotation:
    """An annotation of a completion's steps: one verdict each (True, False, a probability, or None).

    The text is cut at ``ends``, or by ``separator``. ``more`` are further fields of :class:`Annotation`. Raises
    :class:`InputError` for another number of verdicts than steps, and for ends that do not fit the text.
    """
    found = step_ends(completion.text, separator) if ends is None else tuple(ends)
    check_ends(completion, found)
    if len(found) != len(verdicts):
        raise InputError(
            f"{len(verdicts)} verdicts for {len(found)} steps of {completion.text[:60]!r}",
            mend="Give one for each step, None where there is none.",
        )
    value = tuple(zip(found, verdicts, strict=True))
    return Annotation("steps", (completion.id,), annotator, value, **more)


def given_ends(group: CompletionGroup, annotations: Iterable[Annotation]) -> list[Ends | None]:
    """How the ``steps`` annotations cut each completion: as most of them do, of equally many as the first one.

    Raises :class:`InputError` for ends that do not fit the text.
    """
    position = {c.id: k for k, c in enumerate(group.completions)}
    cuts: list[Counter[Ends]] = [Counter() for _ in group.completions]
    for annotation in annotations:
        at = position.get(annotation.completions[0]) if annotation.kind == "steps" else None
        if at is not None and annotation.value is not None:
            cuts[at][tuple(end for end, _ in annotation.value)] += 1
    found = [cut.most_common(1)[0][0] if cut else None for cut in cuts]
    for completion, ends in zip(group.completions, found, strict=True):
        if ends is not None:
            check_ends(completion, ends)
    return found


def with_steps(group: CompletionGroup, separator: str = SEPARATOR) -> CompletionGroup:
    """The group with ``steps`` for every completion: those that it has, else those that its annotations say, else
    as the separator cuts.
    """
    own = group.steps or (None,) * len(group.completions)
    if all(ends is not None for ends in own) and own:
        return group
    said = given_ends(group, group.annotations)
    filled = tuple(
        mine or theirs or step_ends(completion.text, separator)
        for completion, mine, theirs in zip(group.completions, own, said, strict=True)
    )
    return replace(group, steps=filled)


__all__ = [
    "SEPARATOR",
    "Ends",
    "annotate_steps",
    "check_ends",
    "check_steps",
    "given_ends",
    "joined",
    "step_at",
    "step_ends",
    "step_texts",
    "verdict_problem",
    "with_steps",
]
