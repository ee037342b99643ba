"""A prompt and a completion as the two texts of an encoder's pair: ``[CLS] prompt [SEP] completion [SEP]``.

Encoders have no chat template. The first text is the prompt: the words of its one message where that is the user's,
else one line ``role: words`` for each message, joined by newlines. The second text is the completion: the words of its
one message, else such lines. What a message holds besides words (tool calls) follows them as JSON, after a blank.
The special tokens around and between the two are the tokenizer's own. In a recipe this way is called ``pair``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, Messages
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models.render import Sequence, TokenizedGroup, about

_PROBES = (("good", "yes"), ("a", "b"), ("1", "2"))
_MEND = "Take an encoder whose tokenizer encodes pairs of texts (BERT, RoBERTa, DeBERTa, ModernBERT, …)."


@dataclass(frozen=True)
class PairFrame:
    """The special tokens of a pair, ``before`` the first text, ``between`` the two and ``after`` the second one.

    ``segments``: whether the tokenizer gives token types, 0 up to the second text and 1 from there on.
    """

    before: tuple[int, ...]
    between: tuple[int, ...]
    after: tuple[int, ...]
    segments: bool

    @property
    def size(self) -> int:
        """How many special tokens there are."""
        return len(self.before) + len(self.between) + len(self.after)


def pair_frame(tokenizer: PreTrainedTokenizerBase) -> PairFrame:
    """What the tokenizer puts around the texts of a pair, found by encoding one.

    Raises :class:`InputError` for a tokenizer that puts nothing between them, or gives token types of another kind.
    """
    for first, second in _PROBES:
        a, b = _encode(tokenizer, [first, second])
        found = tokenizer(first, second, verbose=False)
        whole = list(found["input_ids"])  # type: ignore[arg-type]
        start = next((i for i in range(len(whole)) if a and whole[i : i + len(a)] == a), None)
        ends = [i for i in range(len(whole) - len(b) + 1) if b and whole[i : i + len(b)] == b]
        if start is None or not ends or ends[-1] < start + len(a):
            continue
        at = ends[-1]
        between = tuple(whole[start + len(a) : at])
        if not between:
            break
        types = list(found.get("token_type_ids") or [0] * len(whole))
        if any(types) and types != [0] * at + [1] * (len(whole) - at):
            raise InputError(f"its tokenizer gives a pair the token types {types}", mend=_MEND)
        return PairFrame(tuple(whole[:start]), between, tuple(whole[at + len(b) :]), any(types))
    raise InputError("its tokenizer puts nothing between the two texts of a pair", mend=_MEND)


def tokenize_pairs(
    tokenizer: PreTrainedTokenizerBase, groups: Iterable[CompletionGroup], limit: int | None = None
) -> list[TokenizedGroup]:
    """Token ids of groups, each completion with a copy of its prompt; it begins at ``n_prompt``.

    A pair of more than ``limit`` tokens loses the beginning of its prompt first (how a conversation ends is nearer to
    what is judged), then, where no prompt is left, the end of its completion; the special tokens stay. How many
    prompts were cut is in ``cut_prompts``, which completions were is in ``truncated``. Each completion is cut by
    itself: its tokens do not depend on the others of its group.

    Raises :class:`InputError` for a tokenizer without pairs, a ``limit`` that holds no text, and naming the prompt for
    a completion without words or without an assistant's message.
    """
    groups = list(groups)
    if not groups:
        return []
    frame = pair_frame(tokenizer)
    room = None if limit is None else limit - frame.size
    if room is not None and room < 1:
        raise InputError(
            f"max_length = {limit} holds no text beside {frame.size} special tokens", mend="Raise it."
        )
    texts: list[str] = []
    for group in groups:
        texts.append(prompt_text(group.prompt))
        for completion in group.completions:
            try:
                texts.append(completion_text(completion))
            except InputError as error:
                raise about(group, error) from error
    ids = iter(_encode(tokenizer, texts))
    out: list[TokenizedGroup] = []
    for group in groups:
        prompt = next(ids)
        made = TokenizedGroup([], group, [])
        for _ in group.completions:
            words = next(ids)
            if not words:
                raise about(group, _silent())
            kept = prompt if room is None else prompt[max(0, len(prompt) - max(0, room - len(words))) :]
            made.cut_prompts += len(kept) < len(prompt)
            made.truncated.append(room is not None and len(words) > room)
            head = [*frame.before, *kept, *frame.between]
            made.sequences.append(Sequence([*head, *words[:room], *frame.after], len(head)))
        out.append(made)
    return out


def prompt_text(messages: Messages) -> str:
    """The first text of a pair."""
    if len(messages) == 1 and messages[0].role == "user":
        return _words(messages[0])
    return _lines(messages)


def completion_text(completion: Completion) -> str:
    """The second text of a pair. Raises :class:`InputError` where the assistant says nothing."""
    messages = completion.messages
    if not any(message.content.strip() or message.extra for message in messages):
        raise _silent()
    if not any(message.role == "assistant" for message in messages):
        raise InputError(
            "a completion has no assistant message",
            mend="A completion is what the assistant answers: give it the role 'assistant'.",
        )
    return _words(messages[0]) if len(messages) == 1 else _lines(messages)


def _lines(messages: Messages) -> str:
    return "\n".join(f"{message.role}: {_words(message)}" for message in messages)


def _words(message: Message) -> str:
    return f"{message.content} {message.extra}".strip() if message.extra else message.content


def _silent() -> InputError:
    return InputError("an empty completion", mend="Drop it, or write what it should say.")


def _encode(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Ids of texts alone, whole: a tokenizer's file may ask for cuts and padding of its own."""
    found = tokenizer(texts, add_special_tokens=False, truncation=False, padding=False, verbose=False)
    return [list(ids) for ids in found["input_ids"]]  # type: ignore[union-attr]


__all__ = ["PairFrame", "completion_text", "pair_frame", "prompt_text", "tokenize_pairs"]
