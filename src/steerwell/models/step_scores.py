"""Scores of steps: what the head of a reward model says at the last token of each, and one score of them all.

The last token of a step is mostly what parts it from the next one; that of the last step is the end of the turn. Each
score is the log-odds that the step is right, having read everything up to it and nothing behind it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerwell.data.errors import InputError, nearest
from steerwell.data.steps import SEPARATOR, with_steps
from steerwell.data.types import CompletionGroup
from steerwell.models.attention import unwrap
from steerwell.models.batch import Batch, build, layout_for, pack
from steerwell.models.forward import hidden_states
from steerwell.models.render import TokenizedGroup
from steerwell.models.sharding import inside
from steerwell.models.step_tokens import token_steps

#: How scores of steps become one of the completion, from log-probabilities that each step is right (U,).
AGGREGATES: dict[str, Callable[[Tensor], Tensor]] = {
    "min": lambda logps: logps.min(),
    "prod": lambda logps: logps.sum(),
    "last": lambda logps: logps[-1],
}


def step_scores(model: nn.Module, batch: Batch, steps: Tensor) -> tuple[Tensor, Tensor]:
    """Log-odds of each step, (U,) in fp32, differentiable, and which completion it belongs to, (U,).

    ``steps`` (S,) is the step of each scored token; see :func:`steerwell.models.step_tokens.token_steps`. Completions
    keep their order and steps theirs. The head's first output is read.
    """
    last = torch.ones_like(steps, dtype=torch.bool)
    last[:-1] = (batch.owner[1:] != batch.owner[:-1]) | (steps[1:] != steps[:-1])
    scores = inside(model, _at, model, batch, batch.at[last])
    return scores, batch.owner[last]


def _at(model: nn.Module, batch: Batch, places: Tensor) -> Tensor:
    states = hidden_states(model, batch).index_select(0, places)
    score: Any = unwrap(model).score
    # FSDP wants a tensor of its own, not a view
    return score(states.to(score.weight.dtype))[:, 0].float().clone()


def check_aggregate(name: str | None) -> None:
    """Raise :class:`InputError` for a name that is not in :data:`AGGREGATES`; None stands for no scores of steps."""
    if name is not None and name not in AGGREGATES:
        raise InputError(f"unknown aggregate {name!r}", mend=nearest(str(name), AGGREGATES))


def aggregate(name: str, logits: Sequence[float]) -> float:
    """One score of a completion, in nats, from the log-odds r of its steps.

    ========  ======================  =========================================================
    min       min over k of log s(r)  the worst step (arXiv:2312.08935)
    prod      sum over k of log s(r)  the log-probability that every step is right, if they are
                                      independent (arXiv:2305.20050); long completions score low
    last      log s(r) of the last    a step is scored for all before it (arXiv:2408.03314)
    ========  ======================  =========================================================

    s is the logistic function. Logarithms rank as probabilities do, and tell apart those that round to 1.
    """
    check_aggregate(name)
    return float(AGGREGATES[name](F.logsigmoid(torch.tensor(logits, dtype=torch.float64))))


@torch.no_grad()
def step_logits(
    model: Any,
    tokenizer: Any,
    groups: Iterable[CompletionGroup],
    tokenize: Callable[[list[CompletionGroup]], list[TokenizedGroup]],
    *,
    max_tokens: int,
    separator: str = SEPARATOR,
) -> list[list[list[float]]]:
    """Log-odds of every step of every completion: a list of lists per group, the same whatever else is in the batch.

    A step that no token begins in (one character, say, that a token holds together with the step before it) has the
    score of the one before. Raises :class:`InputError` as :func:`token_steps` does.
    """
    cut = [with_steps(group, separator) for group in groups]
    tokens = tokenize(cut)
    own = [token_steps(tokenizer, group, made) for group, made in zip(cut, tokens, strict=True)]
    layout, device = layout_for("auto", model), next(model.parameters()).device
    busy = [i for i, made in enumerate(tokens) if made.sequences]
    found: list[list[list[float]]] = [[] for _ in cut]
    for members in pack([tokens[i] for i in busy], max_tokens, layout):
        here = [busy[i] for i in members]
        batch = build([tokens[i] for i in here], layout).to(device)
        flat = torch.tensor([step for i in here for steps in own[i] for step in steps], device=device)
        scores = iter(step_scores(model, batch, flat)[0].tolist())
        for i in here:
            for steps, ends in zip(own[i], cut[i].steps or (), strict=True):
                known = {step: next(scores) for step in dict.fromkeys(steps)}
                found[i].append(_all_steps(known, len(ends or ())))
    return found


def _all_steps(known: dict[int, float], count: int) -> list[float]:
    """Scores of steps from 0 on; one that has none takes that of the step before it (the first, of the next)."""
    before = known[min(known)] if known else math.nan
    filled: list[float] = []
    for step in range(count):
        before = known.get(step, before)
        filled.append(before)
    return filled


__all__ = ["AGGREGATES", "aggregate", "check_aggregate", "step_logits", "step_scores"]
