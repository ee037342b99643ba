"""A judge of pairs with planted strengths, for tests of what is made of its verdicts."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from scipy.stats import rankdata

from steerwell.data.messages import Message, as_messages, digest
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source


def group(*texts: str, prompt: str = "Say a number.") -> CompletionGroup:
    messages = as_messages(prompt)
    return CompletionGroup(
        messages,
        tuple(Completion(messages, (Message("assistant", t),), Source(index=i)) for i, t in enumerate(texts)),
    )


@dataclass
class Noisy:
    """Prefers by the Bradley–Terry model over strengths written in the texts; ``first`` of its verdicts name
    the side shown first, whatever it is. Its verdict is a function of the question and of how often it was asked.
    """

    name: str = "noisy"
    certain: bool = False
    first: float = 0.0
    fails: Callable[[str, str], bool] = lambda one, other: False
    seed: int = 0
    calls: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
        return [self.judge(*g.completions) for g in groups]

    def judge(self, one: Completion, other: Completion) -> Annotation:
        self.calls[one.id, other.id] += 1
        rng = random.Random(digest(self.seed, one.id, other.id, self.calls[one.id, other.id]))
        a, b = float(one.text), float(other.text)
        p = float(a > b) + (a == b) / 2 if self.certain else 1 / (1 + math.exp(b - a))
        value: Any = int(rng.random() >= p)
        if rng.random() < self.first:
            value = 0
        if self.fails(one.text, other.text):
            value = None
        return Annotation("preference", (one.id, other.id), self.name, value, seconds=1.0, cost=0.5)


def same_order(one: Sequence[float | None], other: Sequence[float]) -> float:
    """Spearman's correlation of ranks."""
    return float(np.corrcoef(rankdata(np.array(one, dtype=float)), rankdata(other))[0, 1])


def scores(found: Sequence[Annotation], data: CompletionGroup) -> list[float | None]:
    by_id = {a.completions[0]: a.value for a in found}
    return [by_id[c.id] for c in data.completions]
