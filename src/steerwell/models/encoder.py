"""What an encoder is, and how a reward model on one is read: a sequence classifier whose layers read both ways.

BERT, RoBERTa, DeBERTa, ModernBERT and their kin. Each prompt with its completion is a row of its own, encoded as a
pair (see :mod:`steerwell.models.pairs`); a mask hides what fills up shorter rows.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
)

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup

if TYPE_CHECKING:
    from steerwell.models.batch import Batch

_SEGMENTS = "_steerwell_segments"  # on a model: whether it is told which segment of a pair a token is in


def is_encoder(config: Any) -> bool:
    """Whether a configuration is that of a model which reads both ways: ``transformers`` knows it as a masked language
    model and as a sequence classifier, and it neither decodes nor has a decoder beside it.
    """
    kind = getattr(config, "model_type", None)
    return (
        kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        and kind in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
        and not getattr(config, "is_encoder_decoder", False)
        and not getattr(config, "is_decoder", False)
    )


def head_parts(model: Any) -> list[nn.Module]:
    """What stands between an encoder's last hidden states and its outputs: the backbone's pooler, if it has one, and
    every module beside the backbone.
    """
    backbone = model.base_model
    pooler = getattr(backbone, "pooler", None)
    beside = [part for part in model.children() if part is not backbone]
    return [*([pooler] if isinstance(pooler, nn.Module) else []), *beside]


def output_layer(model: Any) -> nn.Linear:
    """The last linear layer of a sequence classifier on an encoder, with one row per label.

    Raises :class:`InputError` for a classifier without one.
    """
    labels = model.config.num_labels
    linear = [
        module
        for part in head_parts(model)
        for module in part.modules()
        if isinstance(module, nn.Linear) and module.out_features == labels
    ]
    if not linear:
        raise InputError(
            f"{type(model).__name__} has no linear layer of {labels} outputs",
            mend="Choose another encoder (BERT, RoBERTa, DeBERTa, ModernBERT, …).",
        )
    return linear[-1]


def score_layer(model: Any) -> nn.Linear:
    """The layer that gives a reward model's outputs: ``score`` of a decoder, :func:`output_layer` of an encoder."""
    return output_layer(model) if is_encoder(model.config) else model.score


def output_weights(model: nn.Module) -> set[str]:
    """Names of the weights of the output layer of a reward model on an encoder; none for any other model. A peft
    wrapper is looked through.
    """
    inner = _unwrapped(model)
    if not is_encoder(getattr(inner, "config", None)):
        return set()
    own = {id(p) for p in output_layer(inner).parameters()} if hasattr(inner, "num_labels") else set()
    return {name for name, p in model.named_parameters() if id(p) in own}


def positions(model: Any) -> int | None:
    """How many tokens an encoder can read at once; None where it names no limit.

    Models that count positions from behind the padding's (RoBERTa) read fewer than their configuration says.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            taken = 0 if module.padding_idx is None else module.padding_idx + 1
            limit = min(limit, module.num_embeddings - taken)
    return limit


def train_what_is_read(model: Any, pooling: str) -> None:
    """Leave out of training what no score depends on: with ``mean``, all of the head but its output layer; and always
    the output layer's bias. It moves all scores alike, so that pairs give it a gradient of nothing but rounding, which
    AdamW would scale up to whole steps. (Decoders' heads have no bias.)
    """
    last = output_layer(model)
    if pooling == "mean":
        for part in head_parts(model):
            for module in part.modules():
                for parameter in module.parameters(recurse=False):
                    parameter.requires_grad_(module is last)
    if last.bias is not None:
        last.bias.requires_grad_(False)


def encoder_outputs(model: Any, batch: Batch, pooling: str) -> Tensor:
    """Raw outputs of a sequence classifier on an encoder, (N, labels) in fp32, differentiable.

    ``cls`` is the model's own way, through its pooler and head: the logits that ``transformers`` gives. ``mean`` is the
    mean of the last hidden states over the completion's tokens (its closing special token among them), read by the
    output layer alone. ``model`` is the ``transformers`` model itself, and ``batch`` is padded.
    """
    inputs = _inputs(model, batch)
    if pooling == "cls":
        return model.forward(**inputs).logits.float()
    if pooling != "mean":
        raise ValueError(f"unknown pooling {pooling!r}: choose cls or mean")
    hidden = model.base_model(**inputs)[0].flatten(0, 1)
    total = hidden.new_zeros(batch.n, hidden.shape[1]).index_add(0, batch.owner, hidden[batch.at])
    return output_layer(model)(total / batch.lengths[:, None].to(total.dtype)).float()


def _inputs(model: Any, batch: Batch) -> dict[str, Tensor]:
    """What the model takes: ids with its own padding, which of them are read, and the segments if it knows any."""
    if batch.plan is not None:
        raise RuntimeError(f"{type(model).__name__} reads both ways and takes padded rows: ask layout_for")
    width = batch.input_ids.shape[1]
    place = torch.arange(width, device=batch.input_ids.device)[None, :]
    length = (batch.last % width + 1)[:, None]
    mask = place < length
    pad = getattr(model.config, "pad_token_id", None) or 0
    inputs = {
        "input_ids": batch.input_ids.masked_fill(~mask, pad),
        "attention_mask": mask.to(batch.input_ids.dtype),
    }
    if getattr(model, _SEGMENTS, False):
        second = mask & (place >= length - batch.lengths[:, None].long())
        inputs["token_type_ids"] = second.to(batch.input_ids.dtype)
    return inputs


@torch.no_grad()
def adopt_encoder(model: Any, segments: bool) -> None:
    """Make a newly loaded classifier on an encoder ready for batches, and make sure that it gives its own numbers.

    ``segments`` says whether its tokenizer tells the two parts of a pair apart. Raises :class:`InputError` for a model
    whose numbers on padded rows differ from those on each row alone.
    """
    from steerwell.models.batch import padded
    from steerwell.models.render import Sequence, TokenizedGroup

    knows = "token_type_ids" in inspect.signature(type(model).forward).parameters
    setattr(model, _SEGMENTS, segments and knows and (getattr(model.config, "type_vocab_size", 0) or 0) > 1)
    output_layer(model).register_forward_pre_hook(_in_its_type)
    rows, pad = model.get_input_embeddings().weight.shape[0], getattr(model.config, "pad_token_id", None)
    words = [i for i in range(min(rows, 64)) if i not in (0, 1, pad)]
    ids = [[words[(7 * i + 3 * k) % len(words)] for i in range(n)] for k, n in enumerate((11, 5, 8))]
    groups = [TokenizedGroup([Sequence(x, 3) for x in ids], CompletionGroup(()), [False] * len(ids))]
    singles = [padded([TokenizedGroup([s], CompletionGroup(()), [False])]) for s in groups[0].sequences]
    try:
        each = [_read(model, batch.to(model.device)) for batch in singles]
        found = _read(model, padded(groups).to(model.device))
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:
        raise InputError(
            f"{type(model).__name__} cannot be run on rows of text ({error})",
            mend="Choose another encoder (BERT, RoBERTa, DeBERTa, ModernBERT, …).",
        ) from error
    alone = [torch.cat(parts) for parts in zip(*each, strict=True)]
    gap = max(float((a - b).norm() / b.norm().clamp(min=1e-12)) for a, b in zip(found, alone, strict=True))
    if not gap < (1e-3 if model.dtype == torch.float32 else 5e-2):
        raise InputError(
            f"{type(model).__name__} gives other numbers for a row beside longer ones (relative error {gap:.2g})",
            mend="Choose another encoder (BERT, RoBERTa, DeBERTa, ModernBERT, …).",
        )


def _read(model: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    """Last hidden states of the tokens of the completions, and the outputs."""
    hidden = model.base_model(**_inputs(model, batch))[0].flatten(0, 1)
    return hidden[batch.at].float(), encoder_outputs(model, batch, "cls")


def _in_its_type(layer: nn.Linear, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The output layer may be held in a finer type than the rest: what it reads is brought to that."""
    return (arguments[0].to(layer.weight.dtype), *arguments[1:])


def _unwrapped(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


__all__ = [
    "adopt_encoder",
    "encoder_outputs",
    "head_parts",
    "is_encoder",
    "output_layer",
    "output_weights",
    "positions",
    "score_layer",
    "train_what_is_read",
]
