"""The scale of a trained reward model, found before it is saved: scores of mean 0 and deviation 1 over a reference set
(``normalise``), and the temperature that makes probabilities of held-out preferences right (``calibrate``).

Both go into the model's scoring recipe; the weights do not change, and neither does any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from steerwell.data.calibration import fit_temperature
from steerwell.data.errors import InputError
from steerwell.models.forward import head_outputs
from steerwell.models.load import evaluating
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import ScoringRecipe, combined, on_scale
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
        found = _outputs(model, provider, [items[i * len(items) // few] for i in range(few)])
        about["reference_completions"] = sum(len(own) for own, _ in found)
        try:
            rows = [row for own, _ in found for row in own.tolist()]
            recipe = on_scale(recipe, rows, lambda asked: [x for own in _scores(asked, found) for x in own])
        except InputError as error:
            about["not_normalised"] = error.what
    if config.calibrate:
        margins, outcomes = [], []
        for item, scores in zip(held_out, _scores(recipe, _outputs(model, provider, held_out)), strict=True):
            margins += [scores[c] - scores[r] for c, r in item.pairs]
            outcomes += item.pair_probs
        fitted = fit_temperature(margins, outcomes)
        about["calibration"] = fitted.to_dict()
        if fitted.value is not None:
            recipe = replace(recipe, temperature=fitted.value)
    model.recipe = recipe
    return about | {"mean": recipe.mean, "std": recipe.std, "temperature": recipe.temperature}


Outputs = list[tuple[Tensor, Tensor | None]]


def _scores(recipe: ScoringRecipe, outputs: Outputs) -> list[list[float]]:
    """Scores by a recipe, one list per item."""
    return [((combined(own, recipe, gate) - recipe.mean) / recipe.std).tolist() for own, gate in outputs]


@torch.no_grad()
def _outputs(model: RewardModel, provider: Provider, items: Sequence[Item]) -> Outputs:
    """Of each item the outputs (K, H) of its completions, and the gate's logits if there are any, in float64; the same
    on every process.
    """
    items, recipe = list(items), model.recipe
    place = {id(item): i for i, item in enumerate(items)}
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    with evaluating(model.model):
        for part in provider.micro_batches(items):
            batch = provider.batch(part.items)
            both = head_outputs(model.model, batch, recipe.pooling, gated=recipe.gate)
            sizes = [len(item.lengths) for item in part.items]
            cut = [(None,) * len(sizes) if x is None else x.double().cpu().split(sizes) for x in both]
            if part.live:
                for item, own, gate in zip(part.items, *cut, strict=True):
                    found[place[id(item)]] = own, gate
    everyone: dict[int, tuple[Tensor, Tensor | None]] = {}
    for own in provider.ranks.gather(found):
        everyone |= own
    return [everyone[i] for i in range(len(items))]


__all__ = ["settle"]
