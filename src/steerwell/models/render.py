"""Messages to tokens: what the policy saw, and which tokens it is scored on.

The prompt is rendered once per group, with the header of the turn to come; a completion is what the template
appends, up to and with the token that ends the turn. The two are tokenised apart, because that is what
happens when a policy samples: every completion of a group continues the very same prompt tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from transformers import PreTrainedTokenizerBase

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, Messages
from steerwell.data.types import Completion, CompletionGroup


@dataclass(slots=True)
class Sequence:
    """Token ids of a prompt and one completion; the completion begins at ``n_prompt``.

    ``unscored`` are ranges ``(from, to)`` inside the completion that somebody else wrote (the user's turns
    of a completion with several messages): they are read, not scored.
    """

    ids: list[int]
    n_prompt: int
    unscored: tuple[tuple[int, int], ...] = ()

    def scored(self) -> Seq[int]:
        """Positions of the scored tokens, ascending."""
        if not self.unscored:
            return range(self.n_prompt, len(self.ids))
        skip = {i for a, b in self.unscored for i in range(a, b)}
        return [i for i in range(self.n_prompt, len(self.ids)) if i not in skip]


@dataclass(slots=True)
class TokenizedGroup:
    """A group with one :class:`Sequence` per completion; ``truncated`` says which lost their end, ``cut_prompts`` how
    many have a prompt that lost its beginning (only encoders read such).
    """

    sequences: list[Sequence]
    group: CompletionGroup
    truncated: list[bool]
    cut_prompts: int = 0


@dataclass(frozen=True)
class Ending:
    """What a template writes after the words of an assistant's turn: ``stop`` ends it, ``rest`` follows."""

    stop: str
    stop_id: int | None
    rest: str


_ENDINGS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[Any, Ending]] = WeakKeyDictionary()


def render(tokenizer: PreTrainedTokenizerBase, messages: Messages, *, header: bool) -> str:
    """The template's text for ``messages``; ``header`` adds the beginning of the assistant's next turn.

    Raises :class:`InputError` when there is no template or the template refuses the messages.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template", mend=TEMPLATE_MEND)
    try:
        text = tokenizer.apply_chat_template(
            [m.to_dict() for m in messages], tokenize=False, add_generation_prompt=header
        )
    except Exception as error:
        raise InputError(
            f"the chat template refuses these messages ({error}): roles {[m.role for m in messages]}",
            mend="Change the roles, or give the model directory a template that takes them.",
        ) from error
    return str(text)


TEMPLATE_MEND = (
    "Put a chat_template.jinja next to tokenizer.json (an instruction-tuned sibling model has one)."
)


def ending(tokenizer: PreTrainedTokenizerBase) -> Ending:
    """How the tokenizer's template ends an assistant's turn (found by rendering one; cached).

    A template without an end token gets the tokenizer's ``eos_token``, so that a policy can learn to stop.
    """
    made_of = getattr(tokenizer, "chat_template", None), tokenizer.eos_token_id
    known = _ENDINGS.get(tokenizer)
    if known is not None and known[0] == made_of:
        return known[1]
    probe = "qzjx"
    text = render(tokenizer, _PROBE, header=False)
    tail = text[text.rindex(probe) + len(probe) :] if probe in text else ""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    ids = tokenizer(tail, add_special_tokens=False).input_ids if tail else []
    stop = next((i for i in ids if i in special and i != tokenizer.bos_token_id), None)
    if stop is not None:
        word = str(tokenizer.convert_ids_to_tokens(stop))
        cut = tail.find(word)
        found = Ending(tail[: cut + len(word)], stop, tail[cut + len(word) :])
    else:
        found = Ending("", tokenizer.eos_token_id, tail)  # type: ignore[arg-type]
    _ENDINGS[tokenizer] = (made_of, found)
    return found


def tokenize_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Iterable[Messages]) -> list[list[int]]:
    """Token ids of prompts, each with the header of the assistant's turn: what a policy samples from."""
    return _encode(tokenizer, [render(tokenizer, prompt, header=True) for prompt in prompts])


def tokenize_group(
    tokenizer: PreTrainedTokenizerBase, group: CompletionGroup, max_length: int | None = None
) -> TokenizedGroup:
    """One group's :func:`tokenize_groups`."""
    return tokenize_groups(tokenizer, [group], max_length)[0]


def tokenize_groups(
    tokenizer: PreTrainedTokenizerBase, groups: Iterable[CompletionGroup], max_length: int | None = None
) -> list[TokenizedGroup]:
    """Token ids of groups: prompt with the assistant's header, then each completion with its end token.

    Completions that a policy sampled keep their own ``token_ids`` (and ``prompt_token_ids``), as long as
    these spell the completion's words with this tokenizer; ids from another tokenizer are rendered anew. An
    unfinished completion gets no end token. Sequences longer than ``max_length`` tokens lose the end of the
    completion, the end token included, and are marked ``truncated``.

    Raises :class:`InputError` for a missing template, and naming the prompt (and the file it came from, where
    that is known) for an empty completion, messages that the template refuses, and a prompt that leaves no room
    for a completion.
    """
    groups = list(groups)
    if not groups:
        return []
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the tokenizer has no chat template", mend=TEMPLATE_MEND)
    texts: list[str] = []  # all texts of all groups, encoded in one call
    todo: list[tuple[int, list[list[tuple[int, bool]] | None]]] = []
    for group in groups:
        try:
            todo.append(_texts_of(tokenizer, group, texts))
        except InputError as error:
            raise about(group, error) from error
    ids = _encode(tokenizer, texts)
    end = ending(tokenizer)
    out: list[TokenizedGroup] = []
    for group, (prompt_at, parts) in zip(groups, todo, strict=True):
        sequences: list[Sequence] = []
        for completion, segments in zip(group.completions, parts, strict=True):
            if segments is None:
                prompt_ids = list(completion.prompt_token_ids or ids[prompt_at])
                sequences.append(Sequence([*prompt_ids, *(completion.token_ids or ())], len(prompt_ids)))
                continue
            sequence = _join(ids[prompt_at], [(ids[i], scored) for i, scored in segments])
            if not end.stop and end.stop_id is not None and completion.finished is not False:
                sequence.ids.append(end.stop_id)
            sequences.append(sequence)
        made = TokenizedGroup(sequences, group, [False] * len(sequences))
        if max_length is not None and not truncate(made, max_length):
            raise about(group, no_room(made, max_length))
        out.append(made)
    return out


def _texts_of(
    tokenizer: PreTrainedTokenizerBase, group: CompletionGroup, texts: list[str]
) -> tuple[int, list[list[tuple[int, bool]] | None]]:
    """Append a group's texts; returns where its prompt is, and each completion's (place, scored) parts."""
    sampled = [_sampled(tokenizer, c) for c in group.completions]
    header = all(c.messages and c.messages[0].role == "assistant" for c in group.completions)
    prompt = render(tokenizer, group.prompt, header=header)
    texts.append(prompt)
    prompt_at, parts = len(texts) - 1, []
    for completion, as_it_is in zip(group.completions, sampled, strict=True):
        if as_it_is:
            parts.append(None)
            continue
        segments = _segments(tokenizer, prompt, completion)
        parts.append([(len(texts) + i, scored) for i, (_, scored) in enumerate(segments)])
        texts += [text for text, _ in segments]
    return prompt_at, parts


def truncate(tokens: TokenizedGroup, max_length: int) -> bool:
    """Cut sequences off at ``max_length`` tokens and mark them; False, with nothing cut, where a prompt
    leaves no room for a completion.
    """
    if any(s.n_prompt >= max_length for s in tokens.sequences):
        return False
    for i, sequence in enumerate(tokens.sequences):
        if len(sequence.ids) > max_length:
            del sequence.ids[max_length:]
            sequence.unscored = tuple((a, min(b, max_length)) for a, b in sequence.unscored if a < max_length)
            tokens.truncated[i] = True
    return True


def no_room(tokens: TokenizedGroup, max_length: int) -> InputError:
    """What to say of a group that :func:`truncate` could not cut."""
    longest = max(sequence.n_prompt for sequence in tokens.sequences)
    return InputError(
        f"a prompt of {longest} tokens leaves no room in max_length={max_length}",
        mend="Raise max_length, or leave this prompt out.",
    )


def about(group: CompletionGroup, error: InputError) -> InputError:
    """The error with the prompt's id and first words, and the file that the group came from if that is known."""
    words = _brief(group.prompt)
    named = "" if words in error.what else f" {words}"
    sources = [c.source.name for c in group.completions if c.source.kind == "dataset" and c.source.name]
    return InputError(
        f"{error.what} (prompt {group.prompt_id}{named})",
        file=error.file or next(iter(sources), None),
        row=error.row,
        mend=error.mend,
    )


_PROBE: Messages = (Message("user", "hello"), Message("assistant", "qzjx"))


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    # The template writes its own special tokens; the tokenizer must add none (no second BOS).
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]  # type: ignore[return-value]


def _sampled(tokenizer: PreTrainedTokenizerBase, completion: Completion) -> bool:
    """Whether the completion's own token ids are to be used: they are there and spell its words."""
    ids = completion.token_ids
    if ids is None:
        return False
    if not ids:
        raise InputError("a sampled completion has no tokens", mend="Drop it.")
    if max(ids) >= len(tokenizer):
        return False
    spelt = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return spelt.strip() == completion.text.strip()


def _segments(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: Completion
) -> list[tuple[str, bool]]:
    """The completion's text after the rendered ``prompt``, cut into (text, scored)."""
    messages = completion.messages
    if completion.token_ids is None and not any(m.content.strip() or m.extra for m in messages):
        raise InputError(
            f"an empty completion to {_brief(completion.prompt)}",
            mend="Drop it, or write what it should say.",
        )
    if not any(m.role == "assistant" for m in messages):
        raise InputError(
            f"a completion to {_brief(completion.prompt)} has no assistant message",
            mend="A completion is what the assistant answers: give it the role 'assistant'.",
        )
    end = ending(tokenizer)
    full = render(tokenizer, (*completion.prompt, *messages), header=False)
    if len(messages) == 1:
        start = len(prompt) if full.startswith(prompt) else full.rfind(messages[0].content.strip())
        if start < 0:
            raise _rewritten(completion)
        text = full[start:].removesuffix(end.rest)
        return [(text.removesuffix(end.stop) if completion.finished is False else text, True)]
    if not full.startswith(prompt):
        raise _rewritten(completion)
    segments: list[tuple[str, bool]] = []
    at = len(prompt)
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        head = render(tokenizer, (*completion.prompt, *messages[:i]), header=True)
        words = end.stop or message.content.strip()
        stop = full.find(words, len(head))
        if not full.startswith(head) or len(head) < at or stop < 0:
            raise _rewritten(completion)
        segments += [(full[at : len(head)], False), (full[len(head) : stop + len(words)], True)]
        at = stop + len(words)
    return [(text, scored) for text, scored in segments if text]


def _rewritten(completion: Completion) -> InputError:
    return InputError(
        f"the chat template rewrites earlier turns, so the completion to {_brief(completion.prompt)} "
        "does not continue its prompt",
        mend="Give each assistant turn as a completion of its own.",
    )


def _brief(prompt: Messages) -> str:
    return repr(prompt[-1].content[:60]) if prompt else "an empty prompt"


def _join(prompt: list[int], parts: list[tuple[list[int], bool]]) -> Sequence:
    ids, unscored = list(prompt), []
    for part, scored in parts:
        if not scored:
            unscored.append((len(ids), len(ids) + len(part)))
        ids += part
    return Sequence(ids, len(prompt), tuple(unscored))


__all__ = [
    "Ending",
    "Sequence",
    "TokenizedGroup",
    "about",
    "ending",
    "no_room",
    "render",
    "tokenize_group",
    "tokenize_groups",
    "tokenize_prompts",
    "truncate",
]
