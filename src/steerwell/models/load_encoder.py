"""Classifiers on encoders out of directories: trained reward models, and new heads on bare encoders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from steerwell.data.errors import InputError
from steerwell.models.adapters import Adapter
from steerwell.models.classifier import NEAR_ZERO
from steerwell.models.directory import check_directory, model_place
from steerwell.models.encoder import adopt_encoder, head_parts, output_layer
from steerwell.models.load import (
    check_rows,
    how_to_read,
    number_type,
    read_network,
    read_tokenizer,
    refuse_missing,
)
from steerwell.models.pairs import pair_frame


def load_encoder(
    path: str | Path,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    adapter: Adapter | None = None,
    *,
    outputs: int | None = None,
    spread: float = NEAR_ZERO,
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A sequence classifier on an encoder, and its tokenizer, checked, on their device, and ready for batches.

    With ``outputs`` its output layer is a new one of so many rows: of standard deviation ``spread`` / sqrt(width),
    always the same. What else the files lack between the last hidden states and it (the dense layer of RoBERTa's
    head) is drawn as the architecture draws it, always the same too; a backbone must be whole. Without ``outputs``
    all weights must be there.

    Raises :class:`InputError` for all that can be wrong with the directory, a tokenizer without pairs, ``qlora``, and
    an encoder whose numbers depend on the rows beside it.
    """
    place = check_directory(model_place(path))
    if adapter is not None and adapter.kind == "qlora":
        raise InputError("qlora is for language models, and this is an encoder", file=path, mend="Use lora.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    how = how_to_read(place)
    tokenizer = read_tokenizer(place, path, how)
    try:
        frame = pair_frame(tokenizer)
    except InputError as error:
        raise InputError(error.what, file=path, mend=error.mend) from error
    if outputs is not None:
        how |= {"num_labels": outputs, "ignore_mismatched_sizes": True}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, missing = read_network(
            AutoModelForSequenceClassification, place, path, number_type(dtype, device), how
        )
    if outputs is not None:
        made = {id(p) for part in head_parts(model) for p in part.parameters()}
        missing = [name for name in missing if id(model.get_parameter(name)) not in made]
    refuse_missing(model, missing, path)
    check_rows(model, tokenizer, path)
    if outputs is not None:
        _renew(output_layer(model), spread)
        model.config.problem_type = None
    model.to(device).eval()
    adopt_encoder(model, frame.segments)
    return model, tokenizer


@torch.no_grad()
def _renew(layer: nn.Linear, spread: float) -> None:
    noise = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(0))
    layer.weight.copy_(noise * spread / layer.in_features**0.5)
    if layer.bias is not None:
        layer.bias.zero_()


__all__ = ["load_encoder"]
