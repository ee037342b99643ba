"""Adapters: a few new weights that are trained in place of the model's own (LoRA, DoRA, QLoRA, by peft).

A fresh adapter changes nothing, so a run starts exactly at the model it is put on; with the adapter switched
off the model is the one it was. A saved model has its adapters merged.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from steerwell.data.errors import InputError, nearest
from steerwell.models.encoder import head_parts, is_encoder

AdapterKind = Literal["lora", "dora", "qlora"]
KINDS: tuple[AdapterKind, ...] = get_args(AdapterKind)


@dataclass(frozen=True)
class Adapter:
    """A new adapter: each chosen linear layer W gets ``W + alpha / rank * B @ A``, with B zero at first.

    ``lora`` is arXiv:2106.09685; ``dora`` (arXiv:2402.09353) also trains the length of each row of the sum;
    ``qlora`` (arXiv:2305.14314) is ``lora`` over weights held in 4 bits. ``alpha`` is twice the rank where it
    is None. ``targets`` are names of layers (``q_proj``, or a whole path); None: every linear layer below
    the head.
    """

    rank: int
    kind: AdapterKind = "lora"
    alpha: float | None = None
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"unknown adapter {self.kind!r}", mend=nearest(str(self.kind), KINDS))
        if isinstance(self.rank, bool) or not isinstance(self.rank, int) or self.rank < 1:
            raise InputError(f"lora must be a positive rank, got {self.rank}", mend="Use lora=16.")
        if self.alpha is not None and not self.alpha > 0:
            raise InputError(f"lora_alpha must be above 0, got {self.alpha}", mend="Use twice the rank.")
        if self.targets is not None and not self.targets:
            raise InputError("lora_targets is empty", mend="Name layers, or leave it out: all linear layers.")


def asked_adapter(
    lora: int | None = None,
    adapter: AdapterKind = "lora",
    lora_alpha: float | None = None,
    lora_targets: Iterable[str] | None = None,
) -> Adapter | None:
    """The adapter that settings ask for; None without ``lora``, the rank.

    Raises :class:`InputError` for an unknown kind, numbers out of range, and settings of an adapter without
    its rank.
    """
    if isinstance(lora_targets, str):
        lora_targets = (lora_targets,)
    targets = None if lora_targets is None else tuple(lora_targets)
    if lora is not None:
        return Adapter(lora, adapter, lora_alpha, targets)
    if adapter != "lora" or lora_alpha is not None or targets is not None:
        Adapter(1, adapter, lora_alpha, targets)  # a misspelt kind is said first
        name = "adapter" if adapter != "lora" else "lora_alpha" if lora_alpha is not None else "lora_targets"
        raise InputError(f"{name} is given without lora, the rank of the adapter", mend="Use lora=16.")
    return None


def settings_of(adapter: Adapter | None) -> dict[str, Any]:
    """An adapter as the settings that :func:`asked_adapter` takes."""
    if adapter is None:
        return {}
    return {
        "lora": adapter.rank,
        "adapter": adapter.kind,
        "lora_alpha": adapter.alpha,
        "lora_targets": adapter.targets,
    }


def four_bits(adapter: Adapter | None, device: torch.device) -> BitsAndBytesConfig | None:
    """How weights are to be quantised when they are read: None unless the adapter is ``qlora``.

    Raises :class:`InputError` where that cannot be done; no weight has been read by then.
    """
    if adapter is None or adapter.kind != "qlora":
        return None
    if device.type != "cuda":
        raise InputError(
            f"qlora needs a CUDA GPU, and the model would be on {device.type}",
            mend='Use adapter = "lora", or a machine with one.',
        )
    if find_spec("bitsandbytes") is None:
        raise InputError("qlora needs bitsandbytes", mend="Install it: pip install steerwell[qlora].")
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
        llm_int8_skip_modules=["lm_head", "score"],
    )


def add_adapter(model: PreTrainedModel, adapter: Adapter) -> Any:
    """peft's wrapper of ``model`` with a fresh adapter; only the adapter is trained.

    The head of a reward model is trained with it; on an encoder that is all between the last hidden states and the
    output. Raises :class:`InputError` for ``targets`` that are no linear layers of the model.
    """
    from peft import LoraConfig, get_peft_model

    encoder = is_encoder(model.config)
    heads = [p for part in head_parts(model) for p in part.parameters()] if encoder else []
    heads = [p for p in heads if p.requires_grad]
    chosen = _targets(model, adapter)
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=2 * adapter.rank if adapter.alpha is None else adapter.alpha,  # type: ignore[arg-type]
        lora_dropout=0.0,
        target_modules=chosen,
        use_dora=adapter.kind == "dora",
        task_type=None if encoder or hasattr(model, "score") else "CAUSAL_LM",
    )
    with warnings.catch_warnings(), torch.random.fork_rng():
        torch.manual_seed(0)  # A is always the same; a run draws it anew from its own seed
        # peft asks transformers under names that are going out of use
        warnings.simplefilter("ignore", FutureWarning)
        # A head that is tied to the embedding is untied when it is merged: what peft warns of cannot happen.
        warnings.filterwarnings("ignore", message="(?s).*tie_word_embeddings", category=UserWarning)
        wrapped: Any = get_peft_model(model, config)
    if hasattr(model, "score"):
        heads = [model.score.weight]  # type: ignore[union-attr]
    for parameter in heads:
        parameter.requires_grad_(True)
    return wrapped.eval()


def _targets(model: PreTrainedModel, adapter: Adapter) -> list[str]:
    """Full names of the layers that get the adapter."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}
    heads = {id(model.get_output_embeddings()), id(getattr(model, "score", None))}
    if is_encoder(model.config):
        heads |= {id(module) for part in head_parts(model) for module in part.modules()}
        linear = {name: module for name, module in linear.items() if id(module) not in heads}
    if adapter.targets is None:
        return [name for name, layer in linear.items() if id(layer) not in heads]
    chosen: dict[str, None] = {}
    for target in adapter.targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        found = [name for name in found if linear[name] is not getattr(model, "score", None)]
        if not found:
            known = {name.rpartition(".")[2] for name in linear} - {"score"}
            raise InputError(
                f"{type(model).__name__} has no linear layer {target!r}", mend=nearest(target, known)
            )
        chosen |= dict.fromkeys(found)
    if adapter.kind == "dora" and any(id(linear[name]) in heads for name in chosen):
        raise InputError(
            "dora cannot be put on the head", mend='Use adapter = "lora", or leave the head out.'
        )
    return list(chosen)


def adapter_below_head(model: Any) -> Adapter | None:
    """The adapter that a model has, as :func:`add_adapter` takes it, less its part on the head; None without
    one.
    """
    config = next(iter(getattr(model, "peft_config", {}).values()), None)
    if config is None:
        return None
    inner = model.get_base_model()
    head = next((n for n, m in inner.named_modules() if m is inner.get_output_embeddings()), None)
    targets = tuple(sorted(name for name in config.target_modules if name != head))
    kind: AdapterKind = "dora" if config.use_dora else "qlora" if is_quantised(model) else "lora"
    return Adapter(config.r, kind, config.lora_alpha, targets or None)


def fresh_adapter(model: Any) -> bool:
    """Whether the model has adapters that change nothing yet (all B matrices are zero)."""
    if not hasattr(model, "peft_config"):
        return False
    second = [p for name, p in model.named_parameters() if "lora_B" in name]
    return bool(second) and all(not p.any() for p in second)


def scalings(model: nn.Module) -> dict[str, float]:
    """What each adapter's product is multiplied by (alpha / rank), by layer: no weight, but it counts."""
    return {
        f"{name}.{key}": float(value)
        for name, module in model.named_modules()
        if isinstance(found := getattr(module, "scaling", None), dict)
        for key, value in found.items()
    }


def merged(model: Any) -> PreTrainedModel:
    """The ``transformers`` model with its adapters merged in: a copy when there are adapters, else itself.

    What was held in 4 bits comes out in the type it was computed in: W + BA cannot be told in 4 bits again.
    """
    if not hasattr(model, "merge_and_unload"):
        return model
    own = copy.deepcopy(model)
    if is_quantised(own):
        own = _over_whole_weights(own)
    _untie_head(own)
    return own.merge_and_unload()


def without_adapter(model: Any) -> PreTrainedModel:
    """A copy of the ``transformers`` model as it is with its adapters switched off."""
    own = copy.deepcopy(model)
    return own.unload() if hasattr(own, "unload") else own


def is_quantised(model: nn.Module) -> bool:
    """Whether some weights are held in 4 bits."""
    return any(hasattr(p, "quant_state") for p in model.parameters())


def _untie_head(wrapped: Any) -> None:
    """Give a head with an adapter its own weight: merging would otherwise change the embedding as well."""
    model = wrapped.get_base_model()
    head: Any = model.get_output_embeddings()
    if not hasattr(head, "merge") or head.base_layer.weight is not model.get_input_embeddings().weight:
        return
    head.base_layer.weight = nn.Parameter(head.base_layer.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module._tied_weights_keys = None  # type: ignore[assignment]
            module.all_tied_weights_keys = {}


def _over_whole_weights(wrapped: Any) -> Any:
    """The same adapter, with the same numbers, over weights that are no longer in 4 bits."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    numbers = get_peft_model_state_dict(wrapped)
    config = next(iter(wrapped.peft_config.values()))
    model = wrapped.unload()
    for module in list(model.modules()):
        for name, layer in list(module.named_children()):
            if hasattr(getattr(layer, "weight", None), "quant_state"):
                setattr(module, name, _whole(layer, model.dtype))
    for name in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, name):
            delattr(model.config, name)
    for name in ("hf_quantizer", "quantization_method", "is_loaded_in_4bit", "is_quantized"):
        if name in vars(model):
            delattr(model, name)
    again = get_peft_model(model, config)
    set_peft_model_state_dict(again, numbers)
    return again


def _whole(layer: Any, dtype: torch.dtype) -> nn.Linear:
    from bitsandbytes.functional import dequantize_4bit  # type: ignore[import-not-found]

    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(dtype)
    linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach().to(dtype), requires_grad=False)
    return linear


__all__ = [
    "KINDS",
    "Adapter",
    "AdapterKind",
    "adapter_below_head",
    "add_adapter",
    "asked_adapter",
    "four_bits",
    "fresh_adapter",
    "is_quantised",
    "merged",
    "scalings",
    "settings_of",
    "without_adapter",
]
