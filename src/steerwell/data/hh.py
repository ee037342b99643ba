"""The text format of Anthropic's HH data: two whole transcripts, ``chosen`` and ``rejected``.

A transcript is a text of turns, each "\\n\\nHuman: …" or "\\n\\nAssistant: …". The prompt is the common
beginning *in turns* after which both go on with the assistant. (A common beginning in characters, as some
tools take it, moves the start of many answers into the prompt.) One space after the colon belongs to the
format; everything else is text and stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from steerwell.data.gather import DropRow, Item, Row, common_prompt, is_blank
from steerwell.data.messages import Message, Messages

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}
DIVERGES = (
    "diverge before the last turn (the prompt is the common beginning, a completion is several messages)"
)


def is_transcript(value: Any) -> bool:
    """Whether a value is a text that begins with a Human turn and has an Assistant turn."""
    return isinstance(value, str) and value.lstrip().startswith("Human:") and "\n\nAssistant:" in value


def is_hh(row: Mapping[str, Any]) -> bool:
    """Whether a row is in this format."""
    return "prompt" not in row and is_transcript(row.get("chosen")) and is_transcript(row.get("rejected"))


def read_transcript(value: str) -> Messages:
    """The turns of a transcript as messages; () when it does not begin with a turn."""
    head, *parts = _TURN.split(value)
    if head.strip():
        return ()
    turns = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_ROLES[who], words.removeprefix(" ")) for who, words in turns)


def read_row(row: Row) -> list[Item]:
    """One pair. A row whose chosen or rejected transcript ends with an empty turn is dropped."""
    sides = []
    for name in ("chosen", "rejected"):
        value = row.value.get(name)
        if value is None:
            row.fail(f"the row has no {name!r}", "Each row needs the transcripts chosen and rejected.")
        messages = read_transcript(value) if isinstance(value, str) else ()
        if not messages:
            row.fail(
                f"{name!r} is not a transcript of Human: and Assistant: turns",
                'Begin it with "\\n\\nHuman: ".',
            )
        sides.append(messages)
    chosen, rejected = sides
    if is_blank(chosen[-1]) or is_blank(rejected[-1]):
        raise DropRow("the last turn is empty")
    if chosen == rejected:
        row.fail("chosen and rejected are equal", "Leave the row out: it prefers nothing.")
    k = common_prompt(chosen, rejected)
    if not k:
        row.fail("chosen and rejected have no common prompt", "Both must begin with the same Human turn.")
    early = not (k == len(chosen) - 1 == len(rejected) - 1)
    return [
        Item(
            chosen[:k],
            (chosen[k:], rejected[k:]),
            preferred=True,
            flags=(DIVERGES,) if early else (),
        )
    ]


__all__ = ["DIVERGES", "is_hh", "is_transcript", "read_row", "read_transcript"]
