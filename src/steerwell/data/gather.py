"""From the rows of a data set to groups: rows about one prompt become one group, verdicts become annotations.

A loader turns each row into :class:`Item` s and :class:`Gather` puts them together: equal texts after equal
prompts are one completion, however many rows they are in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, Messages, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source


class DropRow(Exception):
    """A row that its format is known to contain and that holds nothing to learn: left out and reported."""


@dataclass(frozen=True)
class Row:
    """One row of a file, and where it stands."""

    value: Mapping[str, Any]
    file: Path
    number: int  # from 1: the line in the file

    def fail(self, what: str, mend: str = "") -> NoReturn:
        """Raise :class:`InputError` for this row."""
        raise InputError(what, file=self.file, row=self.number, mend=mend)

    def messages(self, value: Any, role: str) -> Messages:
        """A text (as one message of ``role``), a message list, or messages (as they are)."""
        if isinstance(value, tuple):
            return value
        if isinstance(value, str):
            return (Message(role, value),)
        items = [value] if isinstance(value, Mapping) else value
        if not isinstance(items, list):
            self.fail(f"expected text or a list of messages, got {type(value).__name__}", "Mend the row.")
        return as_messages([Message.from_dict(m, file=self.file, row=self.number) for m in items])

    def prompt(self, value: Any) -> Messages:
        """The messages of a prompt; a text is one user message. Raises for one without words."""
        messages = self.messages(value, "user")
        if not any(m.content.strip() or m.extra for m in messages):
            self.fail("the row has no prompt: it is empty", "Give the text that was answered.")
        return messages

    def completion(self, value: Any, name: str) -> Messages:
        """The messages of a completion; a text is one assistant message. Raises for one without words."""
        messages = self.messages(value, "assistant")
        if not messages or is_blank(messages[-1]):
            self.fail(f"the completion {name!r} is empty", "Give its text, or leave the row out.")
        if messages[0].role != "assistant":
            self.fail(
                f"the completion {name!r} begins with a {messages[0].role} message",
                "A completion begins with an assistant message; what comes before belongs to the prompt.",
            )
        return messages


@dataclass(frozen=True)
class Item:
    """What one row says: a prompt, texts that answer it, and verdicts about them.

    ``preferred``: the first text is better than the second. ``label`` is about the first text, ``scores`` has
    one entry per text, and so has ``steps``: the (end, verdict) of each of its steps. ``finished`` is that of texts
    which no earlier row had. ``flags`` are words for the report.
    """

    prompt: Messages
    texts: tuple[Messages, ...] = ()
    preferred: bool = False
    label: bool | None = None
    scores: tuple[float | None, ...] = ()
    steps: tuple[tuple[tuple[int, float | None], ...] | None, ...] = ()
    finished: bool | None = None
    strength: float | None = None
    annotator: str | None = None
    criterion: str = "overall"
    meta: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()


@dataclass
class _Open:
    """A group that is being put together."""

    completions: dict[Messages, Completion] = field(default_factory=dict)
    annotations: dict[str, Annotation] = field(default_factory=dict)
    meta: dict[str, Any] = field(default_factory=dict)


class Gather:
    """Puts the items of one file together, by prompt, in the order of the file."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name
        self.repeated_prompts = 0  # items whose prompt an earlier row had
        self.repeated_verdicts = 0  # annotations that an earlier row made word for word
        self._groups: dict[Messages, _Open] = {}

    def add(self, item: Item) -> None:
        """Take one item."""
        self.repeated_prompts += item.prompt in self._groups
        group = self._groups.setdefault(item.prompt, _Open())
        for key, value in item.meta.items():
            group.meta.setdefault(key, value)
        source = Source("dataset", self.file_name)
        found = [
            group.completions.setdefault(t, Completion(item.prompt, t, source, finished=item.finished))
            for t in item.texts
        ]
        for annotation in self._annotations(item, found):
            self.repeated_verdicts += annotation.id in group.annotations
            group.annotations.setdefault(annotation.id, annotation)

    def _annotations(self, item: Item, found: Sequence[Completion]) -> list[Annotation]:
        who = item.annotator or f"dataset:{self.file_name}"
        made = []
        if item.preferred:
            ids = tuple(c.id for c in found)
            made.append(
                Annotation(
                    "preference", ids, who, 0, item.criterion, strength=item.strength, order_known=False
                )
            )
        if item.label is not None:
            made.append(Annotation("label", (found[0].id,), who, item.label, item.criterion))
        for completion, score in zip(found, item.scores, strict=False):
            if score is not None:
                made.append(Annotation("score", (completion.id,), who, score, item.criterion))
        for completion, steps in zip(found, item.steps, strict=False):
            if steps is not None:
                made.append(Annotation("steps", (completion.id,), who, steps, item.criterion))
        return made

    def groups(self) -> list[CompletionGroup]:
        """The groups."""
        return [
            CompletionGroup(
                prompt, tuple(g.completions.values()), tuple(g.annotations.values()), meta=dict(g.meta)
            )
            for prompt, g in self._groups.items()
        ]


def is_blank(message: Message) -> bool:
    """Whether a message says nothing: no word, and no tool call."""
    return not message.content.strip() and not message.extra


def common_prompt(first: Messages, second: Messages) -> int:
    """How many messages two conversations share, up to where both go on with the assistant.

    0 when there is no such place: the conversations have no common prompt.
    """
    k = 0
    while k < min(len(first), len(second)) and first[k] == second[k]:
        k += 1
    while k > 0 and not (
        k < len(first) and k < len(second) and first[k].role == "assistant" and second[k].role == "assistant"
    ):
        k -= 1
    return k


__all__ = ["DropRow", "Gather", "Item", "Row", "common_prompt", "is_blank"]
