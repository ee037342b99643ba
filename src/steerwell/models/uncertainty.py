"""The spread of a reward model's scores: over members of an ensemble, between quantiles, or by a posterior."""

from __future__ import annotations

import math
from collections.abc import Iterable
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.bayesian_head import pair_places, score_variances
from steerwell.models.forward import head_outputs, pooled_states
from steerwell.models.load import batches, by_group, evaluating
from steerwell.models.scoring import combined, member_scores

if TYPE_CHECKING:
    from steerwell.models.reward_model import RewardModel

#: Quantiles at one standard deviation of a normal distribution.
ONE_STD = (0.16, 0.84)


@torch.no_grad()
def score_with_std(
    model: RewardModel, groups: Iterable[CompletionGroup], max_tokens: int
) -> list[list[tuple[float, float]]]:
    """See :meth:`~steerwell.models.reward_model.RewardModel.score_with_std`."""
    recipe = model.recipe
    _check(model)

    def values(batch: Any) -> Tensor:
        found, _ = head_outputs(model.model, batch, recipe.pooling)
        return torch.stack([combined(found, recipe), _spread(model, batch, found)], dim=1)

    with evaluating(model.model):
        rows = by_group(model.tokenize(groups), values, model.model, max_tokens)
    return [[((x - recipe.mean) / recipe.std, s / recipe.std) for x, s in own] for own in rows]


@torch.no_grad()
def margins_with_std(
    model: RewardModel, groups: Iterable[CompletionGroup], max_tokens: int
) -> list[list[tuple[float, float]]]:
    """See :meth:`~steerwell.models.reward_model.RewardModel.margins_with_std`."""
    recipe, groups = model.recipe, list(groups)
    _check(model)
    out: list[list[tuple[float, float]]] = [[] for _ in groups]
    with evaluating(model.model):
        for members, batch in batches(model.tokenize(groups), model.model, max_tokens):
            found, _ = head_outputs(model.model, batch, recipe.pooling)
            first, second = pair_places(members, groups)
            scores = combined(found, recipe)
            margins = (scores[first] - scores[second]) / recipe.std
            if recipe.head == "members":
                each = member_scores(found, recipe)
                spread = (each[first] - each[second]).std(1, correction=0)
            elif recipe.head == "quantiles":
                single = _spread(model, batch, found).square()
                spread = (single[first] + single[second]).sqrt()
            else:
                posterior, states = model.posterior(), pooled_states(model.model, batch, recipe.pooling)
                apart = states[first].double() - states[second].double()
                spread = score_variances(posterior, apart, recipe).sqrt()
            told = iter(zip(margins.tolist(), (spread / recipe.std).tolist(), strict=True))
            for i in members:
                out[i] = [next(told) for _ in groups[i].pairs]
    return out


def _check(model: RewardModel) -> None:
    recipe = model.recipe
    if recipe.head in ("members", "quantiles") or recipe.uncertainty:
        return
    raise InputError(
        "this reward model gives a score and no spread",
        mend="Use model.with_uncertainty(groups), or train an ensemble (ensemble_bradley_terry) or quantiles "
        "(quantile).",
    )


def _spread(model: RewardModel, batch: Any, found: Tensor) -> Tensor:
    """Standard deviation (N,) of the raw scores of a batch, from all outputs (N, H)."""
    recipe = model.recipe
    if recipe.head == "members":
        return member_scores(found, recipe).std(1, correction=0)
    if recipe.head == "quantiles":
        low, high, z = _outer([float(name.removeprefix("q")) for name in recipe.outputs])
        rising = found.sort(1).values
        return (rising[:, high] - rising[:, low]) / z
    states, posterior = pooled_states(model.model, batch, recipe.pooling), model.posterior()
    return score_variances(posterior, states.to(posterior.centre) - posterior.centre, recipe).sqrt().to(found)


def _outer(levels: list[float]) -> tuple[int, int, float]:
    """Which two levels lie nearest to 0.16 and 0.84, and how many standard deviations of a normal distribution lie
    between them.
    """
    low, high = (min(range(len(levels)), key=lambda i: abs(levels[i] - at)) for at in ONE_STD)
    if low >= high:
        raise InputError(
            "a spread takes two quantiles or more", mend="Train with levels such as 0.15, 0.5, 0.85."
        )
    normal = NormalDist()
    return low, high, normal.inv_cdf(levels[high]) - normal.inv_cdf(levels[low])


def moderation(variance: float) -> float:
    """What a log-odds of this variance is multiplied by, so that s of it is about the mean of s: (1 + pi v / 8)^-1/2
    (MacKay 1992, "The evidence framework applied to classification networks").
    """
    return 1 / math.sqrt(1 + math.pi * variance / 8)


__all__ = ["margins_with_std", "moderation", "score_with_std"]
