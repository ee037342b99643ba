"""A model without its weights: the architecture of a directory on the meta device, as a run would train it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from steerwell.data.errors import InputError
from steerwell.models.adapters import Adapter, AdapterKind, add_adapter
from steerwell.models.attention import takes_tree, use_steerwell_attention
from steerwell.models.directory import check_directory, first_line, model_place, quiet
from steerwell.models.render import TEMPLATE_MEND

NF4 = 4.127 / 8  # bytes per weight in 4 bits with doubly quantised scales (arXiv:2305.14314, section 3)


@dataclass(frozen=True)
class Skeleton:
    """A model on the meta device. Sizes are in bytes; a tied weight counts once.

    ``gathered`` is the largest layer, what one process has whole when weights are sharded over several.
    ``quantised`` weights are held in 4 bits; ``passed`` is what the policy takes from which a reward model was
    made and which stays beside it.
    """

    model: Any
    name: str
    dtype: torch.dtype
    total: int
    trainable: int
    weights: int
    gathered: int
    passed: int = 0

    @property
    def size(self) -> int:
        """Bytes of one number in the type that the model computes in."""
        return self.dtype.itemsize


def tokenizer_of(path: str) -> Any:
    """The tokenizer of a model; raises :class:`InputError` where training would."""
    place = check_directory(model_place(path))
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"no tokenizer could be loaded ({first_line(error)})",
                file=path,
                mend="Give a directory with tokenizer.json and tokenizer_config.json next to the model.",
            ) from error
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", file=path, mend=TEMPLATE_MEND)
    return tokenizer


def config_of(path: str) -> Any:
    """The configuration of a model, without its weights. Raises :class:`InputError` where there is none."""
    place = check_directory(model_place(path))
    with quiet():
        try:
            return AutoConfig.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"no such directory, and no configuration of this name from the hub ({first_line(error)})",
                file=path,
                mend="Name the directory that holds the model's config.json.",
            ) from error


def skeleton(
    path: str,
    *,
    reward: bool = False,
    dtype: torch.dtype = torch.float32,
    lora: int | None = None,
    adapter: AdapterKind = "lora",
    targets: Any = None,
) -> Skeleton:
    """Build the model of ``path`` without weights, with a new adapter of rank ``lora`` if one is asked for.

    ``adapter`` is ``lora``, ``dora`` or ``qlora``. Raises :class:`InputError` for what training would refuse.
    """
    config = config_of(path)
    kinds = [str(kind) for kind in getattr(config, "architectures", None) or []]
    classifier = any("ForSequenceClassification" in kind for kind in kinds)
    passed = 0
    if reward and not classifier:
        passed = _bytes(_made(AutoModelForCausalLM, config, dtype, path))
        config.num_labels = 1
        config.architectures = None
    model = _made(AutoModelForSequenceClassification if reward else AutoModelForCausalLM, config, dtype, path)
    if takes_tree(model):
        use_steerwell_attention(model)
    gathered = _largest_layer(model) * dtype.itemsize
    if lora is not None:
        with torch.device("meta"):
            model = add_adapter(
                model, Adapter(lora, adapter, targets=None if targets is None else tuple(targets))
            )
    weights = _bytes(model)
    if adapter == "qlora" and lora is not None:
        held = sum(
            module.weight.numel()
            for name, module in model.named_modules()
            if type(module) is nn.Linear and "base_layer" in name
        )
        weights -= round(held * (dtype.itemsize - NF4))
    return Skeleton(
        model=model,
        name=Path(path).name or path,
        dtype=dtype,
        total=sum(p.numel() for p in model.parameters()),
        trainable=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights=weights,
        gathered=gathered,
        passed=passed,
    )


def _made(kind: Any, config: Any, dtype: torch.dtype, path: str) -> Any:
    with quiet(), torch.device("meta"):
        try:
            return kind.from_config(config, dtype=dtype).eval()
        except (ValueError, KeyError) as error:
            raise InputError(
                f"{type(config).__name__} makes no model here ({first_line(error)})",
                file=path,
                mend="Use a causal language model (Llama, Qwen3, Mistral, Gemma, …).",
            ) from error


def _bytes(model: Any) -> int:
    return sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))


def _largest_layer(model: Any) -> int:
    """Weights of the largest decoder layer, or of the embeddings with the head if those are more."""
    layers = [m for m in model.modules() if isinstance(m, nn.ModuleList)]
    largest = max(
        (sum(p.numel() for p in layer.parameters()) for some in layers for layer in some), default=0
    )
    table = model.get_input_embeddings().weight.numel()
    return max(largest, table)


__all__ = ["Skeleton", "config_of", "skeleton", "tokenizer_of"]
