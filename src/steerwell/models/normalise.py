"""Scores of mean 0 and standard deviation 1 over a reference set."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup

if TYPE_CHECKING:
    from steerwell.models.reward_model import RewardModel


def normalised(model: RewardModel, groups: Iterable[CompletionGroup]) -> RewardModel:
    """See :meth:`~steerwell.models.reward_model.RewardModel.normalised`."""
    groups, recipe = list(groups), model.recipe
    plain = replace(model, recipe=replace(recipe, mean=0.0, std=1.0))
    raw_temperature = recipe.temperature * recipe.std * statistics.fmean(recipe.scales or [1])
    if recipe.head == "members":
        plain = plain.with_recipe(levels=None, scales=None)
        rows = [[*each.values()] for own in plain.outputs(groups) for each in own]
        columns = [_scale([row[i] for row in rows]) for i in range(len(recipe.outputs))]
        levels, scales = zip(*columns, strict=True)
        plain = plain.with_recipe(levels=levels, scales=scales)
    mean, std = _scale([score for scores in plain.score(groups) for score in scores])
    temperature = raw_temperature / (std * statistics.fmean(plain.recipe.scales or [1]))
    return plain.with_recipe(mean=mean, std=std, temperature=temperature)


def _scale(raw: list[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    if len(set(raw)) < 2:
        raise InputError(
            f"{len(raw)} completions with {len(set(raw))} different scores have no scale",
            mend="Give a reference set of some hundred completions.",
        )
    return statistics.fmean(raw), statistics.pstdev(raw)


__all__ = ["normalised"]
