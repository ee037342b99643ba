"""What a run will read: tokens, rows and steps, counted by the very functions that training uses."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from steerwell.data.types import CompletionGroup
from steerwell.models.batch import Layout, n_tokens, pack
from steerwell.models.render import Sequence as TokenSequence
from steerwell.models.render import TokenizedGroup, tokenize_prompts
from steerwell.train.config import TrainConfig
from steerwell.train.items import Item, Prepared, prepare
from steerwell.train.sources import Rollouts, passes, shuffled, steps_in
from steerwell.train.terms import Term

LONGEST = 5  # rows that are named
BARS = 12  # of the histogram
STEPS_WALKED = 5000  # steps whose micro-batches are cut one by one; of longer runs the rest is projected


@dataclass(frozen=True)
class Row:
    """One long row: the prompt's id and first words, the completion's place in its group, and its tokens."""

    prompt_id: str
    words: str
    completion: int
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True)
class Census:
    """What the data come to, in tokens.

    ``about`` is what ``run.json`` records under ``data``. ``tokens_rows`` is what a layout of rows would
    encode for the same completions, ``tokens_padded`` what a trainer would that gives every completion (of
    pairs: every chosen and every rejected one) its own padded row in batches of ``batch_size``.
    ``histogram`` are (from, to, rows) of prompt plus completion in tokens.
    """

    about: dict[str, Any]
    tokens_rows: int
    tokens_padded: int
    histogram: list[tuple[int, int, int]]
    longest: list[Row]
    steps: int
    items: Sequence[Item] = field(repr=False)
    eval_items: Sequence[Item] = field(repr=False)
    micro_batches: list[list[Item]] = field(repr=False)  # of the steps walked, in their order
    walked: int  # steps that they belong to
    passes: float  # over the data
    seconds: float  # that tokenising took
    upper_bound: bool = False  # rollouts: completions as long as they may become

    @property
    def tokens(self) -> int:
        """Tokens that the model encodes in one pass over the data."""
        return int(self.about["tokens"])


def recorded(
    data: Prepared,
    held_out: Prepared,
    config: TrainConfig,
    layout: Layout,
    seconds: float = 0.0,
    devices: int = 1,
) -> Census:
    """The census of recorded data. ``seconds`` went into tokenising; each of ``devices`` takes its share of the
    groups of a step.
    """
    items = data.items
    steps = config.steps or steps_in(len(items), config.batch_size, config.epochs)
    stream = steps * config.batch_size if config.steps else passes(len(items), config.epochs)
    walked = min(steps, STEPS_WALKED)
    found: list[list[Item]] = []
    for step in range(walked):
        places = shuffled(len(items), step, config.batch_size, config.seed, stream)[::devices]
        found += cut([items[i] for i in places], config.max_tokens, layout)
    return Census(
        about=data.about,
        tokens_rows=sum(n_tokens(item.tokens, "rows") for item in items),
        tokens_padded=_padded(items, config),
        histogram=_histogram([len(s.ids) for item in items for s in item.tokens.sequences]),
        longest=_longest(items),
        steps=steps,
        items=items,
        eval_items=held_out.items,
        micro_batches=found,
        walked=walked,
        passes=stream / max(1, len(items)),
        seconds=seconds,
    )


def tokenised(
    groups: Sequence[CompletionGroup],
    terms: Sequence[Term],
    tokenizer: Any,
    config: TrainConfig,
    layout: Layout,
    context: int | None,
) -> tuple[Prepared, float]:
    """The items of recorded groups, and the CPU seconds that making them took. Raises as :func:`prepare` does."""
    begin = time.process_time()
    if not groups:
        return Prepared([], {}), 0.0
    data = prepare(groups, terms, tokenizer, config.max_length, layout, context=context)
    return data, time.process_time() - begin


def sampled(
    source: Rollouts,
    tokenizer: Any,
    config: TrainConfig,
    layout: Layout,
    context: int | None,
    devices: int = 1,
) -> Census:
    """The census of rollouts: from the prompts, as if no completion stopped before ``max_new_tokens``."""
    begin = time.process_time()
    prompts = tokenize_prompts(tokenizer, [prompt.messages for prompt in source.prompts])
    items: list[Item] = []
    for prompt, ids in zip(source.prompts, prompts, strict=True):
        room = source.max_new_tokens if context is None else min(source.max_new_tokens, context - len(ids))
        if config.max_length is not None:
            room = min(room, config.max_length - len(ids))
        # completions that begin differently, so that nothing but the prompt is shared
        drawn = [TokenSequence([*ids, *[k + 1] * max(1, room)], len(ids)) for k in range(source.n)]
        group = TokenizedGroup(drawn, CompletionGroup(prompt.messages), [False] * source.n)
        items.append(_bare(group, prompt.id, layout))
    steps = config.steps or source.steps(config.epochs)
    sets = max(1, steps // source.updates)
    found: list[list[Item]] = []
    walked = min(sets, STEPS_WALKED // source.updates or 1)
    for number in range(walked):
        places = shuffled(len(items), number, source.prompts_per_step, config.seed)[::devices]
        found += cut([items[i] for i in places], config.max_tokens, layout) * source.updates
    about = {
        "groups": len(items),
        "completions": sum(len(item.lengths) for item in items),
        "tokens": sum(item.size for item in items),
        "scored_tokens": sum(sum(item.lengths) for item in items),
    }
    return Census(
        about=about,
        tokens_rows=sum(n_tokens(item.tokens, "rows") for item in items),
        tokens_padded=_padded(items, config.model_copy(update={"batch_size": source.prompts_per_step})),
        histogram=_histogram([len(s.ids) for item in items for s in item.tokens.sequences]),
        longest=_longest(items),
        steps=steps,
        items=items,
        eval_items=[],
        micro_batches=found,
        walked=walked * source.updates,
        passes=sets * source.prompts_per_step / len(items),
        seconds=time.process_time() - begin,
        upper_bound=True,
    )


def _bare(group: TokenizedGroup, prompt_id: str, layout: Layout) -> Item:
    lengths = [len(s.ids) - s.n_prompt for s in group.sequences]
    return Item(group, prompt_id, n_tokens(group, layout), lengths, [], [], [], [], [], [])


def cut(items: Sequence[Item], max_tokens: int, layout: Layout) -> list[list[Item]]:
    """Items cut into micro-batches as every pass cuts them."""
    members = pack([item.tokens for item in items], max_tokens, layout)
    return [[items[i] for i in some] for some in members]


def _padded(items: Sequence[Item], config: TrainConfig) -> int:
    """Tokens of one pass for a trainer that pads, in the order of the first pass."""
    total = 0
    for step in range(-(-len(items) // config.batch_size)):
        places = shuffled(len(items), step, config.batch_size, config.seed, len(items))
        batch = [items[i] for i in places]
        longest = max(len(s.ids) for item in batch for s in item.tokens.sequences)
        total += longest * sum(2 * len(item.pairs) or len(item.lengths) for item in batch)
    return total


def _histogram(lengths: Sequence[int]) -> list[tuple[int, int, int]]:
    """(from, to, count) of equal steps; the ends are round numbers."""
    if not lengths:
        return []
    top = max(lengths)
    width = max(1, -(-top // BARS))
    scale = 10 ** max(0, len(str(width)) - 2)
    width = -(-width // scale) * scale
    counts = [0] * (top // width + 1)
    for length in lengths:
        counts[length // width] += 1
    return [(i * width, (i + 1) * width - 1, count) for i, count in enumerate(counts)]


def _longest(items: Sequence[Item]) -> list[Row]:
    rows = [
        (len(s.ids), -i, -k, item, s)
        for i, item in enumerate(items)
        for k, s in enumerate(item.tokens.sequences)
    ]
    found: list[Row] = []
    for length, _, k, item, sequence in sorted(rows, key=lambda row: row[:3], reverse=True)[:LONGEST]:
        words = " ".join(message.content or "" for message in item.tokens.group.prompt[-1:])
        short = " ".join(words.split())
        short = short[:60] + ("…" if len(short) > 60 else "")
        found.append(Row(item.prompt_id, short, -k, sequence.n_prompt, length))
    return found


__all__ = ["Census", "Row", "cut", "recorded", "sampled", "tokenised"]
