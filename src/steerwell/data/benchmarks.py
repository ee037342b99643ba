"""Published benchmarks of reward models, read from the files in which they are published.

Each reader checks every row, and gives items: a prompt's completion group with what the benchmark says of it.
The files are not shipped. RewardBench and RewardBench 2 are Parquet tables, RM-Bench is one JSON array, PPE
are Parquet tables; the same rows as JSON or JSONL are read alike.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerwell.data.gather import Row
from steerwell.data.messages import Messages
from steerwell.data.tables import read_rows
from steerwell.data.types import Completion, CompletionGroup, Source

STYLES = 3  # RM-Bench: concise, detailed plain text, detailed markdown
SPLIT_ENDING = re.compile(r"-\d{5}-of-\d{5}(-[0-9a-f]+)?$")
HUMAN_WINNERS = {"model_a": 0, "model_b": 1, "tie": None, "tie (bothbad)": None, "both_bad": None}


@dataclass(frozen=True)
class BenchmarkItem:
    """One row: its prompt and completions, its part of the benchmark, and how many of the completions (the
    first ones) are right. ``facts`` hold what is particular to one benchmark.
    """

    key: str
    group: CompletionGroup
    part: str
    right: int
    facts: Mapping[str, Any] = field(default_factory=dict)


def read_rewardbench(path: str | Path) -> list[BenchmarkItem]:
    """RewardBench (arXiv:2403.13787): ``prompt``, ``chosen``, ``rejected`` (texts), ``subset``.

    The prior sets have no ``subset`` of their own, or another one: the part is then the name of the file
    (``shp-00000-of-00001.parquet`` is ``shp``), and their prompts are lists of messages.
    """
    name = part_of(path)

    def read(row: Row) -> BenchmarkItem:
        prior = name in PRIOR_SETS
        part = name if prior else _text(row, "subset")
        texts = [_completion(row, key, row.value.get(key)) for key in ("chosen", "rejected")]
        return BenchmarkItem(_key(row), _group(_prompt(row), texts, path), part, 1)

    return _read(path, read)


PRIOR_SETS = (
    "anthropic_helpful",
    "anthropic_hhh",
    "anthropic_harmless",
    "mtbench_gpt4",
    "mtbench_human",
    "shp",
    "summarize",
)


def read_rewardbench2(path: str | Path) -> list[BenchmarkItem]:
    """RewardBench 2 (arXiv:2506.01937): ``id``, ``prompt``, lists ``chosen`` and ``rejected``, ``subset``.

    Outside of Ties a row has one chosen completion. In Ties ``id`` is ``ref:N`` (one right answer) or
    ``tied:N`` (several, all equally right); ``facts`` then have ``kind`` and ``question`` N.
    """

    def read(row: Row) -> BenchmarkItem:
        part = _text(row, "subset")
        chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
        if row.value.get("num_correct") not in (None, len(chosen)):
            row.fail(
                f"num_correct is {row.value['num_correct']}, but {len(chosen)} completions are chosen",
                "Fetch the file again.",
            )
        facts: dict[str, Any] = {}
        if part.lower() == "ties":
            kind, _, number = str(row.value.get("id")).partition(":")
            if kind not in ("ref", "tied") or not number:
                row.fail(
                    f"the id {row.value.get('id')!r} of a Ties row names no question",
                    "Write ref:N or tied:N.",
                )
            if kind == "tied" and len(chosen) < 2:
                row.fail("a tied row has one right answer", "It needs two or more; ref:N has one.")
            facts = {"kind": kind, "question": number}
        elif len(chosen) != 1:
            row.fail(f"{len(chosen)} completions are chosen", "Outside of Ties a row has one.")
        return BenchmarkItem(
            _key(row), _group(_prompt(row), [*chosen, *rejected], path), part, len(chosen), facts
        )

    return _read(path, read)


def read_rm_bench(path: str | Path) -> list[BenchmarkItem]:
    """RM-Bench (arXiv:2410.16184): ``id``, ``prompt``, ``domain``, and three styles of ``chosen`` and ``rejected``
    each: concise, detailed, detailed with markdown.
    """

    def read(row: Row) -> BenchmarkItem:
        chosen, rejected = _texts(row, "chosen"), _texts(row, "rejected")
        if len(chosen) != STYLES or len(rejected) != STYLES:
            row.fail(
                f"{len(chosen)} chosen and {len(rejected)} rejected completions",
                "RM-Bench has three styles of each.",
            )
        return BenchmarkItem(
            _key(row), _group(_prompt(row), [*chosen, *rejected], path), _text(row, "domain"), STYLES
        )

    return _read(path, read)


def read_ppe(path: str | Path) -> list[BenchmarkItem]:
    """PPE (arXiv:2410.14872). Human preference: ``prompt``, ``response_1``, ``response_2``, ``winner`` (model_a,
    model_b or a tie), ``model_a``, ``model_b``. Correctness: ``prompt``, ``response_1`` … ``response_K``,
    ``scores`` (right or wrong, one each) and ``sampled_conflict_pairs``.

    ``facts``: ``winner`` (0, 1 or None) and ``models``; or ``scores`` and ``pairs`` (right, wrong). The part of
    a correctness row is the name of its file without the split's ending.
    """
    name = part_of(path)

    def read(row: Row) -> BenchmarkItem:
        if "winner" in row.value:
            return _human(row, path)
        if "scores" not in row.value:
            keys = ", ".join(sorted(row.value))
            row.fail(
                f"the row has neither 'winner' nor 'scores' (its keys: {keys[:120]})", "Give a PPE file."
            )
        return _correctness(row, name, path)

    return _read(path, read)


def _human(row: Row, path: str | Path) -> BenchmarkItem:
    winner = row.value["winner"]
    if winner not in HUMAN_WINNERS:
        row.fail(f"unknown winner {winner!r}", f"Known: {', '.join(HUMAN_WINNERS)}.")
    models = _text(row, "model_a"), _text(row, "model_b")
    texts = [_completion(row, key, row.value.get(key)) for key in ("response_1", "response_2")]
    facts = {
        "winner": HUMAN_WINNERS[winner],
        "models": models,
        **{k: row.value.get(k) for k in ("language", "hard_prompt", "if_prompt", "math_prompt", "is_code")},
    }
    return BenchmarkItem(_key(row), _group(_prompt(row), texts, path, models), "human", 1, facts)


def _correctness(row: Row, name: str, path: str | Path) -> BenchmarkItem:
    scores = row.value["scores"]
    if not isinstance(scores, list) or not all(isinstance(s, bool | int | float) for s in scores):
        row.fail("'scores' is not a list of true and false", "Give one per response.")
    values = [float(s) for s in scores]
    if len(values) < 2 or not all(math.isfinite(v) and 0 <= v <= 1 for v in values):
        row.fail(f"{len(values)} scores, or one outside [0, 1]", "Give one per response, 0 or 1.")
    texts = [
        _completion(row, f"response_{i}", row.value.get(f"response_{i}")) for i in range(1, len(values) + 1)
    ]
    pairs = []
    for pair in row.value.get("sampled_conflict_pairs") or []:
        if not isinstance(pair, list) or len(pair) != 2 or not all(i in range(len(values)) for i in pair):
            row.fail(f"{pair!r} is no pair of responses", f"Give two numbers from 0 to {len(values) - 1}.")
        a, b = pair
        if values[a] != values[b]:
            pairs.append((a, b) if values[a] > values[b] else (b, a))
    group = _group(_prompt(row), texts, path, [str(row.value.get("model_name") or "")] * len(texts))
    return BenchmarkItem(_key(row), group, name, 0, {"scores": tuple(values), "pairs": tuple(pairs)})


def part_of(path: str | Path) -> str:
    """The name of a file without its endings: ``shp-00000-of-00001.parquet`` is ``shp``."""
    name = Path(path).name
    for ending in (".gz", ".parquet", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    return SPLIT_ENDING.sub("", name)


def _read(path: str | Path, read: Callable[[Row], BenchmarkItem]) -> list[BenchmarkItem]:
    return [read(row) for row in read_rows(path)]


def _key(row: Row) -> str:
    """What an item is known by on two models: the file's row."""
    return f"{row.file.name}:{row.number}"


def _text(row: Row, name: str) -> str:
    value = row.value.get(name)
    if not isinstance(value, str) or not value.strip():
        row.fail(f"the row has no {name!r}", "Give a text; see docs/evaluating_reward_models.md.")
    return value


def _prompt(row: Row) -> Messages:
    if row.value.get("prompt") is None:
        row.fail("the row has no 'prompt'", "Give the text that was answered.")
    return row.prompt(row.value["prompt"])


def _completion(row: Row, name: str, value: Any) -> Messages:
    """A completion as published. Some are empty: a sampled model may have said nothing."""
    if isinstance(value, str) and not value.strip():
        return row.messages(value, "assistant")
    if value is None:
        row.fail(f"the row has no {name!r}", "Give the text of the completion.")
    return row.completion(value, name)


def _texts(row: Row, name: str) -> list[Messages]:
    value = row.value.get(name)
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values:
        row.fail(f"{name!r} is not a list of completions", "Give one text or more.")
    return [_completion(row, name, text) for text in values]


def _group(
    prompt: Messages, texts: Sequence[Messages], path: str | Path, models: Sequence[str] = ()
) -> CompletionGroup:
    """A group of completions, equal texts told apart by their place."""
    name = Path(path).name
    completions = tuple(
        Completion(prompt, messages, Source("dataset", models[i] if models else name, index=i))
        for i, messages in enumerate(texts)
    )
    return CompletionGroup(prompt, completions)


__all__ = [
    "PRIOR_SETS",
    "STYLES",
    "BenchmarkItem",
    "part_of",
    "read_ppe",
    "read_rewardbench",
    "read_rewardbench2",
    "read_rm_bench",
]
