"""What data can tell an objective beyond pairs, labels and rewards: one entry per tensor, by its name.

A :class:`Target` makes plain numbers of a group and its tokens; they travel with the item under the tensor's name
and become one tensor again, in the order of completions, when a batch is put together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.data.types import CompletionGroup
from steerwell.models.render import Sequence, TokenizedGroup
from steerwell.models.step_tokens import step_places, token_steps
from steerwell.objectives.table import TENSORS

#: A rank that is not known.
NO_RANK = -1
#: Of each completion, the step of each scored token; found when it is first asked for.
Steps = Callable[[], list[list[int]]]


@dataclass(frozen=True)
class Target:
    """How the tensor of that name comes out of data.

    ``known`` says which completions of a group have a value (None: it needs none of the data's own, tokens are
    enough). ``lacking`` says what to do where no group has one.
    """

    make: Callable[[CompletionGroup, TokenizedGroup, Steps], list[float]]
    known: Callable[[CompletionGroup], list[bool]] | None = None
    lacking: str = ""


def _ranks(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    ranks = group.ranks or (None,) * len(group.completions)
    return [NO_RANK if rank is None else rank for rank in ranks]


def _scores(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    scores = group.scores or (None,) * len(group.completions)
    return [math.nan if score is None else float(score) for score in scores]


def _token_weights(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    found: list[float] = []
    weights = group.token_weights or (None,) * len(group.completions)
    for completion, own, sequence in zip(group.completions, weights, tokens.sequences, strict=True):
        n = len(sequence.scored())
        if own is None or len(own) < n:
            have = "no token weights" if own is None else f"{len(own)} token weights for its {n} tokens"
            raise InputError(
                f"a completion has {have}: {completion.text[:60]!r}",
                mend="Make them with steerwell.contrast_weights and the tokenizer of this policy.",
            )
        found += own[:n]
    return found


def turns(sequence: Sequence) -> list[int]:
    """Of each scored token, which of the assistant's turns it is in: a new one begins behind what others wrote."""
    found, turn, before = [], 0, None
    for at in sequence.scored():
        turn += before is not None and at != before + 1
        found.append(turn)
        before = at
    return found


def _turns(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    return [turn for sequence in tokens.sequences for turn in turns(sequence)]


def shared_tokens(one: Sequence, other: Sequence) -> int:
    """How many scored tokens two sequences begin with in common."""
    first, second = ([s.ids[i] for i in s.scored()] for s in (one, other))
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _shared(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    return [shared_tokens(tokens.sequences[p.chosen], tokens.sequences[p.rejected]) for p in group.pairs]


def _attributes(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    columns = (group.attributes or {}).values()
    return [
        math.nan if column[i] is None else float(column[i])  # type: ignore[arg-type]
        for i in range(len(group.completions))
        for column in columns
    ]


def _has_attribute(group: CompletionGroup) -> list[bool]:
    columns = (group.attributes or {}).values()
    return [any(column[i] is not None for column in columns) for i in range(len(group.completions))]


def _strengths(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    given = group.pair_strengths or (None,) * len(group.pairs)
    return [math.nan if strength is None else float(strength) for strength in given]


def _steps(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    return [step for own in steps() for step in own]


def _step_owner(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    return [i for i, own in enumerate(steps()) for _ in set(own)]


def _step_labels(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    found: list[float] = []
    for labels, own in zip(group.step_labels or (None,) * len(group.completions), steps(), strict=True):
        there = [own[at] for at in step_places([0] * len(own), own)]  # without those that were cut off
        given = [None if labels is None else labels[step] for step in there]
        found += [math.nan if label is None else float(label) for label in given]
    return found


def _labelled(group: CompletionGroup) -> list[bool]:
    labels = group.step_labels or (None,) * len(group.completions)
    return [any(label is not None for label in own or ()) for own in labels]


def _draws(group: CompletionGroup, tokens: TokenizedGroup, steps: Steps) -> list[float]:
    """48 bits of a hash of the texts; where a group has the same pair again, that one has its own."""
    seen: dict[str, int] = {}
    found: list[float] = []
    for pair in group.pairs:
        texts = [group.completions[i].text_id for i in (pair.chosen, pair.rejected)]
        name = digest(group.prompt_id, *texts)
        seen[name] = seen.get(name, 0) + 1
        found.append(int(digest(name, seen[name])[:12], 16))
    return found


def _known(values: Seq[object] | None, group: CompletionGroup) -> list[bool]:
    return [False] * len(group.completions) if values is None else [value is not None for value in values]


#: By tensor name. ``scores`` are the data's; a reward model's own are no target.
TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        "ranks": Target(
            _ranks,
            lambda group: _known(group.ranks, group),
            "Resolve ranking annotations first: steerwell.resolve.ranks(groups).",
        ),
        "scores": Target(
            _scores,
            lambda group: _known(group.scores, group),
            "Resolve score annotations first: steerwell.resolve.mean(groups).",
        ),
        "token_weights": Target(
            _token_weights,
            lambda group: _known(group.token_weights, group),
            "Make them first: steerwell.contrast_weights(groups, positive, negative).",
        ),
        "attributes": Target(
            _attributes,
            _has_attribute,
            "Resolve score annotations first: steerwell.resolve.attributes(groups).",
        ),
        "pair_strengths": Target(_strengths),
        "pair_draws": Target(_draws),
        "turns": Target(_turns),
        "steps": Target(_steps),
        "step_owner": Target(_step_owner),
        "step_labels": Target(
            _step_labels,
            _labelled,
            "Resolve annotations of steps first: steerwell.resolve.step_labels(groups).",
        ),
        "shared_tokens": Target(_shared),
    }
)


def made(
    names: Iterable[str], group: CompletionGroup, tokens: TokenizedGroup, tokenizer: Any
) -> dict[str, list[float]]:
    """The targets of one group by name, of those among ``names`` that are in the table. ``step_owner`` counts the
    completions of the group.
    """
    steps = cache(lambda: token_steps(tokenizer, group, tokens))
    return {name: TARGETS[name].make(group, tokens, steps) for name in sorted(set(names) & TARGETS.keys())}


def tensor(name: str, values: Iterable[float], device: torch.device, completions: int = 0) -> Tensor:
    """Values as the tensor of that name; those of a table come row by row, of so many ``completions``."""
    found = torch.tensor(list(values), dtype=TENSORS[name].dtype, device=device)
    return found.view(completions, -1) if len(TENSORS[name].shape) == 2 and completions else found


__all__ = ["NO_RANK", "TARGETS", "Target", "made", "shared_tokens", "tensor", "turns"]
