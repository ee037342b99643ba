"""Which step a token is of: exact on rendered and on sampled tokens, whatever a template or a tokenizer does."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.steps import step_at, step_ends
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models.render import Sequence, tokenize_group
from steerwell.models.step_tokens import step_places, token_steps
from tiny import END, NEWLINE_TEMPLATE, SPECIAL, TEMPLATE, tiny_tokenizer

ASKED = (Message("user", "why?"),)
THINKING = TEMPLATE.replace(
    "m['content'] +", "('<t>\n\n' if m['role'] == 'assistant' else '') + m['content'] +"
)
STRIPPING = TEMPLATE.replace("m['content'] +", "m['content'].strip() +")
TEXTS = [
    "the one\n\nthen two\n\nand three",
    " leading and trailing \n\n spaces \n\n",
    "ünï — 漢字\n\n🙂🙂 emoji\n\n漢",
    "one step only",
    "a\n\n\n\nb\n\n \n\nc",
    "x\n\n.\n\nyou",
]


def group(*texts: str, **more: Any) -> CompletionGroup:
    made = tuple(Completion(ASKED, (Message("assistant", text),), **more) for text in texts)
    return CompletionGroup(ASKED, made)


def by_bytes(tokenizer: Any, text: str, ids: list[int], ends: tuple[int, ...]) -> list[int]:
    """The definition, worked out on bytes: every token of the tiny tokenizer is a run of bytes (or special)."""
    character = [i for i, c in enumerate(text) for _ in c.encode()]
    steps, at = [], 0
    for token in ids:
        size = 0 if token < 8 else len(tokenizer.convert_ids_to_tokens(token))
        own = character[at : at + size]
        words = [i for i in own if not text[i].isspace()] or own[:1] or [len(text) - 1]
        steps.append(step_at(ends, words[0]))
        at += size
    return steps


@pytest.mark.parametrize("template", [TEMPLATE, NEWLINE_TEMPLATE])
def test_equals_the_definition_on_bytes(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    made = group(*TEXTS)
    tokens = tokenize_group(tokenizer, made)
    for text, found, sequence in zip(
        TEXTS, token_steps(tokenizer, made, tokens), tokens.sequences, strict=True
    ):
        ids = [sequence.ids[i] for i in sequence.scored()]
        assert ids[-1] == END
        assert found == by_bytes(tokenizer, text, ids, step_ends(text))
        assert found[-1] == len(step_ends(text)) - 1, "the end of the turn is of the last step"


@pytest.mark.parametrize("seed", range(3))
def test_sampled_tokens_that_are_cut_otherwise(seed: int) -> None:
    """Byte by byte, and so in parts of characters: no tokenizer would cut the text like that."""
    tokenizer, draw = tiny_tokenizer(), random.Random(seed)
    pieces = ["the ", "you", "\n\n", "漢", "é", "🙂", " in", ".", "\n"]
    text = "s" + "".join(draw.choices(pieces, k=30)) + "e"
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids: list[int] = []
    for token in whole:  # merges undone, some of them
        letters = str(tokenizer.convert_ids_to_tokens(token))
        parts = list(letters) if draw.random() < 0.7 else [letters]
        ids += [int(tokenizer.convert_tokens_to_ids(part)) for part in parts]  # type: ignore[arg-type]
    assert len(ids) > len(whole)
    made = group(text, token_ids=(*ids, END), prompt_token_ids=(3, 20), finished=True)
    tokens = tokenize_group(tokenizer, made)
    assert tokens.sequences[0].ids[2:] == [*ids, END]
    ends = step_ends(text)
    assert token_steps(tokenizer, made, tokens) == [by_bytes(tokenizer, text, [*ids, END], ends)]


def test_steps_of_the_data_come_before_the_separator() -> None:
    tokenizer = tiny_tokenizer()
    made = group("one\n\ntwo", "one\n\ntwo")
    tokens = tokenize_group(tokenizer, made)
    given = replace(made, steps=((1, 8), None))
    first, second = token_steps(tokenizer, given, tokens)
    assert first == [0] + [1] * (len(first) - 1)
    assert second == token_steps(tokenizer, made, tokens)[1]
    letters = token_steps(tokenizer, made, tokens, "t")[1]
    assert letters == [0] * 6 + [1] * 3, "the t ends the first step; w, o and the end are the second"


@pytest.mark.parametrize("template", [THINKING, STRIPPING])
def test_what_a_template_adds_or_strips(template: str) -> None:
    tokenizer = tiny_tokenizer(template)
    made = group(" one\n\ntwo \n")
    tokens = tokenize_group(tokenizer, made)
    ids = [tokens.sequences[0].ids[i] for i in tokens.sequences[0].scored()]
    (steps,) = token_steps(tokenizer, made, tokens)
    spelt = ["", ""]
    for token, step in zip(ids, steps, strict=True):
        spelt[step] += str(tokenizer.decode([token]))
    assert spelt[0].endswith("one\n\n")
    assert spelt[1].startswith("two")
    assert spelt[1].endswith("<|end|>")


def test_words_that_the_template_writes_too() -> None:
    tokenizer = tiny_tokenizer(THINKING)
    made = group("t", "<t>\n\nt")
    steps = token_steps(tokenizer, made, tokenize_group(tokenizer, made))
    assert steps[0] == [0] * len(steps[0])
    assert [steps[1].index(1), len(steps[1])] == [len(steps[1]) - 2, len(steps[1])], "the last t and the end"


def test_truncated_sequences_have_the_steps_of_what_is_left() -> None:
    tokenizer = tiny_tokenizer()
    made = group("ünï 漢字\n\nmore 🙂\n\nand the rest")
    whole = tokenize_group(tokenizer, made)
    (steps,) = token_steps(tokenizer, made, whole)
    n = whole.sequences[0].n_prompt
    for length in range(n + 1, len(whole.sequences[0].ids)):
        cut = tokenize_group(tokenizer, made, length)
        assert token_steps(tokenizer, made, cut) == [steps[: length - n]]


def test_completions_of_several_messages() -> None:
    tokenizer = tiny_tokenizer()
    messages = (
        Message("assistant", "one\n\ntwo"),
        Message("user", "go\n\non"),
        Message("assistant", "three"),
    )
    completion = Completion(ASKED, messages)
    made = CompletionGroup(ASKED, (completion,))
    tokens = tokenize_group(tokenizer, made)
    (steps,) = token_steps(tokenizer, made, tokens)
    assert len(step_ends(completion.text)) == 5
    assert [steps[i] for i in step_places([0] * len(steps), steps)] == [0, 1, 4]
    assert len(steps) == len(tokens.sequences[0].scored())


def test_the_last_token_of_each_step() -> None:
    assert step_places([0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 1, 1]) == [1, 2, 4, 5]
    assert step_places([], []) == []


def test_tokens_that_spell_something_else_are_an_error() -> None:
    tokenizer = tiny_tokenizer()
    made = group("some words\n\nmore")
    tokens = tokenize_group(tokenizer, made)
    tokens.sequences[0] = Sequence([3, 20, 30, 31, 32], 2)
    with pytest.raises(InputError, match=r"tokens do not spell the completion.*prompt .*'why\?'"):
        token_steps(tokenizer, made, tokens)


def test_a_tokenizer_that_leaves_spaces_out_of_offsets() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    made = group(*TEXTS)
    tokens = tokenize_group(tokenizer, made)
    for text, found, sequence in zip(
        TEXTS, token_steps(tokenizer, made, tokens), tokens.sequences, strict=True
    ):
        ids = [sequence.ids[i] for i in sequence.scored()]
        assert found == by_bytes(tokenizer, text, ids, step_ends(text))


def test_a_tokenizer_of_words_with_a_space_before_the_first() -> None:
    """As SentencePiece's: a space is a letter of the word behind it, and one is put before the text."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*SPECIAL, "▁", "\n", *letters, "▁t", "▁th", "<0xE6>", "<0xBC>", "<0xA2>"]
    merges = [("▁", "t"), ("▁t", "h")]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, byte_fallback=True))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<|pad|>", eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATE
    made = group("the 漢\n\nthen that\n\nx")
    tokens = tokenize_group(tokenizer, made)
    (steps,) = token_steps(tokenizer, made, tokens)
    ids = [tokens.sequences[0].ids[i] for i in tokens.sequences[0].scored()]
    words_of = [[], [], []]
    for token, step in zip(ids, steps, strict=True):
        words_of[step].append(tokenizer.convert_ids_to_tokens(token))
    assert words_of == [
        ["▁th", "e", "▁", "<0xE6>", "<0xBC>", "<0xA2>", "\n", "\n"],
        ["t", "h", "e", "n", "▁th", "a", "t", "\n", "\n"],
        ["x", "<|end|>"],
    ]
