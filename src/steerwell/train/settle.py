"""The scale of a trained reward model, found before it is saved: scores of mean 0 and deviation 1 over a reference set
(``normalise``), and the temperature that makes probabilities of held-out preferences right (``calibrate``).

Both go into the model's scoring recipe; the weights do not change, and neither does any order.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from steerwell.data.calibration import fit_temperature
from steerwell.models.load import evaluating
from steerwell.models.reward_model import RewardModel
from steerwell.train.config import TrainConfig
from steerwell.train.items import Item
from steerwell.train.provide import Provider

#: Completions that the scale is read from, in groups spread evenly over the training data.
REFERENCE_GROUPS = 512


def settle(
    model: RewardModel,
    provider: Provider,
    config: TrainConfig,
    items: Sequence[Item],
    held_out: Sequence[Item],
) -> dict[str, Any]:
    """Put mean, std and temperature into the recipe, as far as the settings ask for them; returns what was found, for
    ``run.json``. Every process must call it.

    Where no temperature is best (all held-out pairs right, or no more right than wrong) it stays as it was, and
    ``status`` says why.
    """
    about: dict[str, Any] = {}
    recipe = model.recipe
    if config.normalise:
        few = min(REFERENCE_GROUPS, len(items))
        chosen = [items[i * len(items) // few] for i in range(few)]
        raw = [score for scores in _scores(model, provider, chosen) for score in scores]
        std = statistics.pstdev(raw)
        about |= {"reference_completions": len(raw), "raw_mean": statistics.fmean(raw), "raw_std": std}
        if std > 0:
            recipe = replace(
                recipe,
                mean=about["raw_mean"],
                std=std,
                temperature=recipe.temperature * recipe.std / std,
            )
    if config.calibrate:
        margins, outcomes = [], []
        for item, scores in zip(held_out, _scores(model, provider, held_out), strict=True):
            margins += [(scores[c] - scores[r]) / recipe.std for c, r in item.pairs]
            outcomes += item.pair_probs
        found = fit_temperature([m / recipe.temperature for m in margins], outcomes)
        about["calibration"] = found.to_dict()
        if found.value is not None:
            recipe = replace(recipe, temperature=recipe.temperature * found.value)
    model.recipe = recipe
    return about | {"mean": recipe.mean, "std": recipe.std, "temperature": recipe.temperature}


@torch.no_grad()
def _scores(model: RewardModel, provider: Provider, items: Sequence[Item]) -> list[list[float]]:
    """Raw scores of the completions of each item; the same on every process."""
    items = list(items)
    place = {id(item): i for i, item in enumerate(items)}
    found: dict[int, list[float]] = {}
    with evaluating(model.model):
        for part in provider.micro_batches(items):
            batch = provider.batch(part.items)
            values = iter(provider.head_tensors(batch)["scores"].tolist())
            if part.live:
                for item in part.items:
                    found[place[id(item)]] = [next(values) for _ in item.lengths]
    everyone: dict[int, list[float]] = {}
    for own in provider.ranks.gather(found):
        everyone |= own
    return [everyone[i] for i in range(len(items))]


__all__ = ["settle"]
