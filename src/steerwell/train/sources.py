"""Where the groups of a step come from: recorded data in a seeded order, or fresh rollouts of the policy.

A source is anything with ``step(policy, step, seed) -> list[CompletionGroup]`` whose answer depends on
nothing but its arguments, so that a run can be continued from any step. :func:`rollouts` makes the usual
one.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages, digest
from steerwell.data.types import Annotation, CompletionGroup, Prompt
from steerwell.models.load import Policy
from steerwell.train.ranks import current

Judge = Callable[[Sequence[CompletionGroup]], Sequence[Annotation]]


@runtime_checkable
class Source(Protocol):
    """Gives the groups of each step, with targets."""

    @property
    def temperature(self) -> float:
        """What divides the logits, in sampling and in the log-probs of the update alike."""
        ...

    @property
    def updates(self) -> int:
        """Optimizer steps on each set of rollouts; 1 is strictly on-policy."""
        ...

    def steps(self, epochs: float) -> int:
        """How many optimizer steps ``epochs`` passes over the prompts take."""
        ...

    def step(self, policy: Policy, step: int, seed: int) -> list[CompletionGroup]:
        """The groups of step ``step`` (from 0), sampled from ``policy`` as it is now."""
        ...

    def identity(self) -> dict[str, Any]:
        """All that decides what :meth:`step` gives, for ``run.json``."""
        ...


@dataclass(frozen=True)
class Rollouts:
    """Completions sampled from the policy in training and scored by a judge. Made by :func:`rollouts`."""

    prompts: tuple[Prompt, ...] = field(repr=False)
    judge: Judge = field(repr=False)
    n: int = 8
    prompts_per_step: int = 16
    max_new_tokens: int = 256
    temperature: float = 1.0
    updates: int = 1
    batch_size: int = 256

    def steps(self, epochs: float) -> int:
        """Optimizer steps of ``epochs`` passes over the prompts."""
        return steps_in(len(self.prompts), self.prompts_per_step, epochs) * self.updates

    def step(self, policy: Policy, step: int, seed: int) -> list[CompletionGroup]:
        """Sample ``n`` completions for each prompt of this step, have them judged, put the scores in.

        A completion for which the judge has no verdict has the score None: it takes no part in the update.
        Of several processes each samples and judges its share of the prompts.
        """
        rollout = step // self.updates
        chosen = [self.prompts[i] for i in shuffled(len(self.prompts), rollout, self.prompts_per_step, seed)]
        ranks = current()
        unique = list(
            {prompt.id: prompt for prompt in chosen}.values()
        )  # equal ones count their samples together
        shared = ranks.share([sum(len(message.content) for message in prompt.messages) for prompt in unique])
        ids = {unique[i].id for i in shared}
        mine = [i for i, prompt in enumerate(chosen) if prompt.id in ids]
        groups = policy.sample(
            [chosen[i] for i in mine],
            self.n,
            max_new_tokens=self.max_new_tokens,
            temperature=self.temperature,
            seed=derived_seed(seed, "rollout", rollout),
            batch_size=self.batch_size,
        )
        groups = [_at_step(group, rollout) for group in groups]
        scored = ranks.together(lambda: with_scores(groups, self.judge(groups) if groups else []))
        found = {i: group for part in ranks.gather(list(zip(mine, scored, strict=True))) for i, group in part}
        return [found[i] for i in range(len(chosen))]

    def identity(self) -> dict[str, Any]:
        """The prompts (by digest), the judge's name and the sampling settings."""
        return {
            "kind": "rollouts",
            "prompts": digest([prompt.id for prompt in self.prompts]),
            "judge": str(getattr(self.judge, "name", getattr(self.judge, "__qualname__", "judge"))),
            "n": self.n,
            "prompts_per_step": self.prompts_per_step,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "updates": self.updates,
        }


def rollouts(
    prompts: Iterable[Prompt | CompletionGroup | str | Sequence[Message]],
    judge: Judge,
    n: int = 8,
    *,
    prompts_per_step: int = 16,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    updates: int = 1,
    batch_size: int = 256,
) -> Rollouts:
    """Rollouts for online training: each step samples ``n`` completions for ``prompts_per_step`` prompts.

    ``judge`` is any callable from groups to annotations of kind ``score``; several scores of one completion
    are averaged, a missing or failed one (None) masks the completion. ``updates`` optimizer steps are made
    on each set of rollouts (1: strictly on-policy). ``temperature`` is used for sampling and for the
    log-probs of the update alike. Prompts are gone through in a seeded order, again and again. Equal
    prompts count once. Raises :class:`InputError` when there are no prompts or a number is out of range.
    """
    unique = {prompt.id: prompt for prompt in map(_as_prompt, prompts)}
    if not unique:
        raise InputError("rollouts need prompts; there are none", mend="Give at least one prompt.")
    numbers = {
        "n": n,
        "prompts_per_step": prompts_per_step,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "updates": updates,
        "batch_size": batch_size,
    }
    for name, value in numbers.items():
        if not value > 0:
            raise InputError(f"rollouts: {name} = {value} must be above 0")
    return Rollouts(tuple(unique.values()), judge, **numbers)


def with_scores(
    groups: Sequence[CompletionGroup], annotations: Iterable[Annotation]
) -> list[CompletionGroup]:
    """The groups with ``scores`` from ``score`` annotations: the mean per completion, None without a
    verdict.
    """
    found: dict[str, list[float]] = {}
    for annotation in annotations:
        if annotation.kind == "score" and annotation.value is not None:
            for completion in annotation.completions:
                found.setdefault(completion, []).append(float(annotation.value))
    return [
        replace(group, scores=tuple(_mean(found.get(completion.id)) for completion in group.completions))
        for group in groups
    ]


def rollout_figures(groups: Sequence[CompletionGroup]) -> dict[str, float]:
    """Figures of one set of rollouts: reward (mean, spread, spread within groups, share without a verdict),
    tokens per completion, share of completions that reached their end.
    """
    scores = [[s for s in group.scores or () if s is not None] for group in groups]
    flat = [score for own in scores for score in own]
    spreads = [statistics.stdev(own) for own in scores if len(own) > 1]
    completions = [completion for group in groups for completion in group.completions]
    figures: dict[str, float] = {}
    if flat:
        figures["reward"] = statistics.fmean(flat)
        figures["reward/std"] = statistics.stdev(flat) if len(flat) > 1 else 0.0
    if spreads:
        figures["reward/group_std"] = statistics.fmean(spreads)
    figures["reward/missing"] = 1.0 - len(flat) / max(1, len(completions))
    lengths = [len(c.token_ids) for c in completions if c.token_ids is not None]
    if lengths:
        figures["completions/tokens"] = statistics.fmean(lengths)
    ends = [c.finished for c in completions if c.finished is not None]
    if ends:
        figures["completions/finished"] = sum(ends) / len(ends)
    return figures


def shuffled(total: int, step: int, size: int, seed: int, end: int | None = None) -> list[int]:
    """Positions of step ``step`` in a seeded stream of passes over ``total`` things, ``end`` of them in all.

    A pure function: each pass is a shuffle of its own, and a step may lie across two passes. Without
    ``end`` the stream never ends; with it the last step may be smaller than ``size``.
    """
    picked: list[int] = []
    position = step * size
    last = position + size if end is None else min(position + size, end)
    while position < last:
        epoch, start = divmod(position, total)
        taken = epoch_order(total, epoch, seed)[start : start + last - position]
        picked += taken
        position += len(taken)
    return picked


def epoch_order(total: int, epoch: int, seed: int) -> list[int]:
    """The seeded order of one pass over ``total`` things; the last one asked for is remembered."""
    key = (total, epoch, seed)
    if key not in _ORDERS:
        order = list(range(total))
        random.Random(derived_seed(seed, "order", epoch)).shuffle(order)
        _ORDERS.clear()
        _ORDERS[key] = order
    return _ORDERS[key]


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def derived_seed(seed: int, purpose: str, number: int) -> int:
    """An independent seed (63 bits) for one purpose and one step of a run."""
    return int(digest(seed, purpose, number)[:16], 16) >> 1


def steps_in(total: int, size: int, epochs: float) -> int:
    """Optimizer steps that ``epochs`` passes over ``total`` groups take; the last one may be smaller."""
    return max(1, math.ceil(passes(total, epochs) / size))


def passes(total: int, epochs: float) -> int:
    """How many groups (with repetition) ``epochs`` passes over ``total`` groups see; at least one."""
    return max(1, round(total * epochs))


def _at_step(group: CompletionGroup, step: int) -> CompletionGroup:
    """The group with the policy's step in the source of each completion."""
    return replace(
        group, completions=tuple(replace(c, source=replace(c.source, step=step)) for c in group.completions)
    )


def _mean(values: list[float] | None) -> float | None:
    if not values:
        return None
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None


def _as_prompt(value: Prompt | CompletionGroup | str | Sequence[Message]) -> Prompt:
    if isinstance(value, Prompt):
        return value
    if isinstance(value, CompletionGroup):
        return Prompt(value.prompt, value.meta)
    return Prompt(as_messages(value))


__all__ = [
    "Judge",
    "Rollouts",
    "Source",
    "derived_seed",
    "epoch_order",
    "passes",
    "rollout_figures",
    "rollouts",
    "shuffled",
    "steps_in",
    "with_scores",
]
