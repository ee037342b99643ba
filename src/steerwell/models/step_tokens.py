"""Which step of its completion a token belongs to: that of its first character that is no space.

Steps are ends in the completion's text (:mod:`steerwell.data.steps`); tokens are ids. So the tokens of each of the
assistant's turns are spelt, the message is found in what they spell, and every token gets the character that it
begins with. What a template writes before the words belongs to the turn's first step, what follows them (the end
token) to its last. A token of nothing but spaces counts by its first one: what parts two steps ends the first.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from itertools import groupby
from typing import Any

from transformers import PreTrainedTokenizerBase

from steerwell.data.errors import InputError
from steerwell.data.steps import SEPARATOR, step_at, with_steps
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models.render import Sequence, TokenizedGroup, about

BROKEN = "\ufffd"  # what a decoder writes for a part of a character


def token_steps(
    tokenizer: PreTrainedTokenizerBase,
    group: CompletionGroup,
    tokens: TokenizedGroup,
    separator: str = SEPARATOR,
) -> list[list[int]]:
    """Of each completion, the step of each of its scored tokens: numbers from 0 that never fall.

    Completions without ``steps`` of their own are cut by ``separator``. Raises :class:`InputError` where a completion's
    words are not what its tokens spell (a template that rewrites them).
    """
    group = with_steps(group, separator)
    found = []
    for completion, ends, sequence, cut in zip(
        group.completions, group.steps or (), tokens.sequences, tokens.truncated, strict=True
    ):
        try:
            found.append(_steps(tokenizer, completion, ends or (len(completion.text),), sequence, cut))
        except InputError as error:
            raise about(group, error) from error
    return found


def step_places(owner: Seq[int], steps: Seq[int]) -> list[int]:
    """The last token of each step, from whose each token is and which step of it: positions, ascending, (U,)."""
    marks = list(zip(owner, steps, strict=True))
    return [i for i, mark in enumerate(marks) if i + 1 == len(marks) or marks[i + 1] != mark]


def _steps(
    tokenizer: PreTrainedTokenizerBase,
    completion: Completion,
    ends: tuple[int, ...],
    sequence: Sequence,
    truncated: bool,
) -> list[int]:
    own = [message for message in completion.messages if message.role == "assistant"]
    runs = list(_runs(sequence))
    if len(runs) > len(own) or (len(runs) < len(own) and not truncated):
        raise _unlike(completion)
    places = _message_places(completion)
    steps: list[int] = []
    for run, at, message in zip(runs, places, own, strict=False):
        starts, text = _starts(tokenizer, run)
        first = _found_at(text, message.content, completion)
        first -= len(message.content) - len(message.content.lstrip())
        last = max(len(message.content) - 1, 0)
        for start, until in zip(starts, [*starts[1:], len(text)], strict=True):
            word = next((i for i in range(start, until) if not text[i].isspace()), start)
            step = step_at(ends, at + min(max(word - first, 0), last))
            steps.append(max(step, steps[-1] if steps else 0))
    return steps


def _runs(sequence: Sequence) -> Iterator[list[int]]:
    """The ids of the assistant's turns: scored tokens that follow one another."""
    for _, run in groupby(enumerate(sequence.scored()), key=lambda pair: pair[1] - pair[0]):
        yield [sequence.ids[at] for _, at in run]


def _message_places(completion: Completion) -> list[int]:
    """Where the assistant's messages begin in the completion's text, which has a blank line between messages."""
    places, at = [], 0
    for message in completion.messages:
        if message.role == "assistant":
            places.append(at)
        at += len(message.content) + 2
    return places


def _found_at(text: str, content: str, completion: Completion) -> int:
    """Where the message's first word is in the text that its tokens spell; the text may lack the message's end."""
    words = content.strip()
    if (whole := text.rfind(words)) >= 0:  # a template writes more before the words than behind them
        return whole
    spelt = text.rstrip(BROKEN).rstrip()
    for at in range(len(spelt)):
        if spelt[at] == words[0] and words.startswith(spelt[at:]):
            return at
    if not spelt:  # nothing but spaces was left
        return 0
    raise _unlike(completion)


def _unlike(completion: Completion) -> InputError:
    return InputError(
        f"the tokens do not spell the completion, so its steps cannot be found in them: {completion.text[:60]!r}",
        mend="Does the chat template rewrite what the assistant says?",
    )


def _starts(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], str]:
    """The character at which each token begins in the text that all of them spell, and that text."""
    text = _spelt(tokenizer, ids)
    special = set(tokenizer.all_special_ids)
    plain = [i for i in ids if i not in special]
    if tokenizer.is_fast and ids[: len(plain)] == plain:  # special tokens, if any, come last
        again: Any = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        if again["input_ids"] == plain:
            starts, before = [], 0
            for start, end in again["offset_mapping"]:
                starts.append(start if start < end else before)  # some leave spaces out, all of them here
                before = end
            return starts + [len(text)] * (len(ids) - len(plain)), text
    return _one_by_one(tokenizer, ids), text


def _one_by_one(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """Where each token begins, for tokens that are not those of their text: sampled ones may be cut otherwise.

    A token's text is what it adds to that of the tokens before it. Tokens that hold parts of one character wait for
    its last part and begin where it does.
    """
    starts: list[int] = []
    total = window = read = 0
    before = ""  # the text of the window up to what was read
    pending = 0  # whole characters of tokens that wait
    for k in range(len(ids)):
        starts.append(total + pending)
        text = _spelt(tokenizer, ids[window : k + 1])
        new = text[len(before) :]
        if new.endswith(BROKEN):
            pending = len(new.rstrip(BROKEN))
            continue
        total += len(new)
        window, read, pending = read, k + 1, 0
        before = _spelt(tokenizer, ids[window:read])
    return starts


def _spelt(tokenizer: PreTrainedTokenizerBase, ids: Seq[int]) -> str:
    return str(tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))


__all__ = ["step_places", "token_steps"]
