"""The network of a reward model: a backbone with a linear head (``score``) of one output or several."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from steerwell.data.errors import InputError
from steerwell.models.encoder import is_encoder, output_layer
from steerwell.models.forward import adopt

#: Size of a fresh head's outputs, where hidden states have numbers of size 1.
NEAR_ZERO = 0.01
#: The same in an ensemble: the usual start of a head (arXiv:2009.01325), which acts as each member's own prior
#: (arXiv:1806.03335).
MEMBERS_APART = 1.0


def classifier_on(
    source: PreTrainedModel,
    pad_id: int,
    path: str | None = None,
    outputs: int = 1,
    *,
    spread: float = NEAR_ZERO,
) -> Any:
    """A classifier with so many ``outputs`` on the very backbone of ``source``. Its head is always the same, another
    row for each output, of standard deviation ``spread`` / sqrt(width).

    Raises :class:`InputError` for an architecture without a sequence classifier in ``transformers``.
    """
    config = copy.deepcopy(source.config)
    config.num_labels = outputs
    config.get_text_config().pad_token_id = config.pad_token_id = pad_id
    config.architectures = None
    try:
        with torch.device("meta"):
            model: Any = AutoModelForSequenceClassification.from_config(config, dtype=source.dtype)
    except ValueError as error:
        raise InputError(
            f"{type(source).__name__} has no sequence classifier", mend="Choose another base model."
        ) from error
    check_classifier(model, path)
    setattr(model, model.base_model_prefix, source.base_model)
    noise = torch.Generator().manual_seed(0)
    shape = model.score.weight.shape
    head = torch.randn(shape, generator=noise) * spread / shape[1] ** 0.5
    model.score.weight = nn.Parameter(head.to(source.device, source.dtype))
    adopt(model)
    return model.eval()


def size_at_start(head: str) -> float:
    """Size of a fresh head's outputs by what they are: near zero, but for members, which must differ."""
    return MEMBERS_APART if head == "members" else NEAR_ZERO


def check_classifier(model: Any, path: str | Path | None) -> None:
    """Raise :class:`InputError` unless the model has a linear head with as many outputs as labels: one called
    ``score``, or that of an encoder (:func:`steerwell.models.encoder.output_layer`).
    """
    head = output_layer(model) if is_encoder(model.config) else getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != getattr(model.config, "num_labels", None):
        raise InputError(
            f"{type(model).__name__} is not a reward model",
            file=path,
            mend="A reward model is a sequence classifier with a linear head called score.",
        )


__all__ = ["NEAR_ZERO", "check_classifier", "classifier_on", "size_at_start"]
