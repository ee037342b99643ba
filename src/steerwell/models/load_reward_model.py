"""Reward models out of directories: whole classifiers, adapters with a head over a base, and encoders."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification

from steerwell.data.errors import InputError
from steerwell.models.adapter_files import base_of, is_adapter, load_base, read_adapter
from steerwell.models.adapters import AdapterKind, add_adapter, asked_adapter
from steerwell.models.classifier import check_classifier
from steerwell.models.directory import read_json
from steerwell.models.encoder import train_what_is_read
from steerwell.models.load import encoder_config, how_to_read, load_parts, name_of, read_tokenizer
from steerwell.models.load_encoder import load_encoder
from steerwell.models.reward_head import load_gate
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import (
    SCORING_FILE,
    ScoringRecipe,
    check_outputs,
    check_tokenizer,
    read_recipe,
)


def load_reward_model(
    path: str | Path,
    *,
    lora: int | None = None,
    adapter: AdapterKind = "lora",
    lora_alpha: float | None = None,
    lora_targets: Iterable[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
    base: str | Path | None = None,
) -> RewardModel:
    """Load a reward model: a sequence classifier, or an adapter with a head (:meth:`RewardModel.save_adapter`) over the
    base that its directory names, or over ``base``. Without a recipe it has one label and reads the last token, and on
    an encoder a pair of texts in the model's own way.

    With ``lora`` a new adapter and the head are trained, and nothing else; see :func:`load_policy`.

    Raises :class:`InputError` as :func:`load_policy` does, for a directory that holds a language model, and where the
    chat template or the stop token is another one than in training.
    """
    asked = asked_adapter(lora, adapter, lora_alpha, lora_targets)
    local = Path(path).expanduser()
    if is_adapter(local):
        if asked is not None:
            raise InputError(
                "this reward model has an adapter already",
                file=path,
                mend="Leave lora out, or save it whole first.",
            )
        return _over_base(local, base_of(local, base), device, dtype, name or name_of(path))
    if base is not None:
        raise InputError("base is given, and this is no adapter", file=path, mend="Leave it out.")
    if (local / "config.json").is_file():
        config = read_json(local / "config.json")
        kinds = [str(kind) for kind in config.get("architectures") or []]
        if kinds and not any("ForSequenceClassification" in kind for kind in kinds):
            raise InputError(
                f"this is a {kinds[0]}, not a reward model",
                file=path,
                mend='Train one from it: a recipe with objective = "bradley_terry".',
            )
    encoder = encoder_config(path) is not None
    recipe = recipe_beside(local, ScoringRecipe("cls", template="pair") if encoder else ScoringRecipe())
    if encoder != (recipe.template == "pair"):
        raise InputError(
            f"the template of an encoder is pair, that of a decoder chat, and this is {recipe.template}",
            file=local / SCORING_FILE,
        )
    if encoder:
        model, tokenizer = load_encoder(path, device, dtype, asked)
        train_what_is_read(model, recipe.pooling)
    else:
        model, tokenizer = load_parts(AutoModelForSequenceClassification, path, device, dtype, asked)
    check_classifier(model, path)
    check_tokenizer(recipe, tokenizer, path)
    check_outputs(recipe, model, path)
    if recipe.gate:
        load_gate(model, local)
    whole: Any = model if asked is None else add_adapter(model, asked)
    below = "" if asked is None else str(path)
    return RewardModel(whole, tokenizer, recipe, name or name_of(path), str(path), below)


def _over_base(
    folder: Path,
    base: str,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    name: str,
) -> RewardModel:
    recipe = recipe_beside(folder)
    tokenizer = read_tokenizer(str(folder), folder, how_to_read(str(folder)))
    check_tokenizer(recipe, tokenizer, folder)
    model, _ = read_adapter(load_base(base, len(recipe.outputs), device, dtype), folder)
    return RewardModel(model, tokenizer, recipe, name, str(folder), base)


def recipe_beside(folder: Path, usual: ScoringRecipe | None = None) -> ScoringRecipe:
    """The scoring recipe of a directory; the ``usual`` one (by default one score) where it has none."""
    file = folder / SCORING_FILE
    return read_recipe(read_json(file), file) if file.is_file() else usual or ScoringRecipe()


__all__ = ["load_reward_model", "recipe_beside"]
