"""Small data and runs for the tests of the training room."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerwell.data.messages import Message
from steerwell.data.steps import with_steps
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair
from steerwell.models.attention import use_steerwell_attention
from steerwell.models.load import Policy
from tiny import tiny_llama, tiny_tokenizer

WORDS = [
    "alpha",
    "bravo",
    "delta",
    "echo",
    "golf",
    "hotel",
    "kilo",
    "lima",
    "mike",
    "oscar",
    "papa",
    "romeo",
    "sierra",
    "tango",
]


def tiny_policy(seed: int = 0, **settings: Any) -> Policy:
    """A policy of two layers with random weights."""
    model = tiny_llama(seed=seed, **settings)
    use_steerwell_attention(model)
    return Policy(model, tiny_tokenizer(), "tiny")


def text_group(prompt: str, completions: list[str], **targets: Any) -> CompletionGroup:
    """A group of plain texts."""
    asked = (Message("user", prompt),)
    return CompletionGroup(
        asked, tuple(Completion(asked, (Message("assistant", text),)) for text in completions), **targets
    )


def pair_groups(n: int = 12, seed: int = 0, k: int = 3) -> list[CompletionGroup]:
    """Groups of ``k`` completions with labels, scores and pairs: the first is better than each other one."""
    draw = random.Random(seed)
    groups = []
    for i in range(n):
        texts = [" ".join(draw.choices(WORDS, k=draw.randint(1, 6))) + f" {c}" for c in range(k)]
        groups.append(
            text_group(
                f"say {i} " + " ".join(draw.choices(WORDS, k=draw.randint(1, 5))),
                texts,
                pairs=tuple(Pair(0, j, 0.9 if j == 2 else 1.0) for j in range(1, k)),
                labels=tuple(c == 0 for c in range(k)),
                scores=tuple(float(k - c) for c in range(k)),
            )
        )
    return groups


def step_groups(n: int = 10, seed: int = 0) -> list[CompletionGroup]:
    """Groups of two completions of one to three steps, with labels of most steps and a pair."""
    draw = random.Random(seed)
    groups = []
    for i in range(n):
        steps = [[" ".join(draw.choices(WORDS, k=2)) for _ in range(draw.randint(1, 3))] for _ in range(2)]
        group = text_group(f"do {i}", ["\n\n".join(own) for own in steps], pairs=(Pair(0, 1),))
        labels = tuple(tuple(draw.choice((1.0, 0.0, 0.3, None)) for _ in own) for own in steps)
        groups.append(replace(with_steps(group), step_labels=((1.0, *labels[0][1:]), labels[1])))
    return groups


def weights(model: Any) -> dict[str, torch.Tensor]:
    """A copy of all weights."""
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of any weight."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def lines(out: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


class LengthJudge:
    """Scores a completion by its number of letters; every ``skip``-th one gets no verdict."""

    name = "length"

    def __init__(self, skip: int = 0) -> None:
        self.skip = skip

    def __call__(self, groups: Any) -> list[Annotation]:
        found = []
        for group in groups:
            for completion in group.completions:
                missing = self.skip and len(found) % self.skip == 0
                value = None if missing else len(completion.text) / 10
                found.append(Annotation("score", (completion.id,), self.name, value))
        return found
