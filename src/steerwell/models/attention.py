"""One attention function for every decoder model, and which models can take it.

``transformers`` calls the function registered here (under the name ``"steerwell"``) in place of a model's own
attention. It does no work itself: the ``plan`` that travels with the call does. :class:`TreePlan` serves
training and scoring, where completions branch from shared prompts; the sampler brings a plan of its own.

Only softmax attention can be told who sees whom. Layers that carry a state along the sequence (recurrent,
linear attention, convolutions) would leak one branch into the next without any sign of it, so models that have
them keep their own attention and get one sequence per row: see :func:`takes_tree`.
"""

from __future__ import annotations

import re
from typing import Any, Protocol
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel

from steerwell.data.errors import InputError
from steerwell.models.encoder import is_encoder
from steerwell.models.tree_plan import Node, TreePlan

NAME = "steerwell"


class Plan(Protocol):
    """What attends. Query (B, H, T, D), key and value (B, Hkv, T, D) -> (B, T, H, D)."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        dropout: float = 0.0,
    ) -> Tensor: ...


def steerwell_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    plan: Plan | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The registered function hands the work to ``plan``; a model that loses the plan is an error."""
    if plan is None:
        raise RuntimeError(
            "no plan reached the attention function: call the model through steerwell.models.forward, "
            "or give it its own attention back with model.set_attn_implementation('sdpa')"
        )
    out = plan.attend(
        module,
        query,
        key,
        value,
        scaling=scaling,
        sliding_window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    return out, None


# No mask function is registered under this name, so that models pass no mask of their own.
AttentionInterface.register(NAME, steerwell_attention)


def takes_tree(model: nn.Module) -> bool:
    """Whether completions may branch from a shared prompt in ``model``: all its layers are softmax attention.

    A model that does not (hybrids with recurrent, linear-attention or convolutional layers) runs with its own
    attention on one sequence per row. A peft wrapper is looked through.
    """
    return not stateful_layers(model)


def stateful_layers(model: nn.Module) -> str:
    """What in ``model`` is not softmax attention over the whole past or a window, in words; "" if nothing is."""
    inner = unwrap(model)
    if inner not in _STATEFUL:
        _STATEFUL[inner] = _find_stateful_layers(inner)
    return _STATEFUL[inner]


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The ``transformers`` model inside a peft wrapper (adapters stay in place and active)."""
    outer: Any = model
    return outer.get_base_model() if hasattr(outer, "get_base_model") else outer


# Modules are many and batches are more: each model is looked through once.
_STATEFUL: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary()
_PLAIN = {"full_attention", "sliding_attention", "moe", "mlp"}
_RECURRENT = re.compile(
    "Mamba|SSM|Ssm[A-Z]|R[Ww][Kk][Vv]|Delta(Net|Attention|Rule)|Recurrent|R[Gg]L[Rr][Uu]|Retention"
    "|(Short|Causal)Conv|Lightning|LSTM"
)


def _find_stateful_layers(model: PreTrainedModel) -> str:
    if is_encoder(model.config):
        return "attention that reads both ways"
    kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ()) - _PLAIN
    if kinds:
        return f"layers of type {', '.join(sorted(map(str, kinds)))}"
    for module in model.modules():
        name = type(module).__name__
        if isinstance(module, (nn.Conv1d, nn.RNNBase)) or _RECURRENT.search(name):
            return f"a {name} layer"
    return ""


def use_steerwell_attention(model: PreTrainedModel) -> None:
    """Switch ``model`` to the registered attention.

    Raises :class:`InputError` for models that cannot take it: see :func:`takes_tree`.
    """
    refuse_other_ways(model)
    if why := stateful_layers(model):
        raise refusal(model, f"cannot share prompts: it has {why}", "Use layout = auto or rows.")
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, AttributeError) as error:
        raise refusal(model, f"does not take a registered attention function ({error})") from error
    if model.config._attn_implementation != NAME:  # transformers only warns
        raise refusal(model, "does not take a registered attention function")


def refuse_other_ways(model: PreTrainedModel) -> None:
    """Raise :class:`InputError` for a model that does not read from left to right."""
    config = model.config.get_text_config()
    if (
        is_encoder(config)
        or getattr(config, "is_encoder_decoder", False)
        or getattr(config, "is_causal", True) is False
    ):
        raise refusal(model, "is not a decoder that reads from left to right")


def refusal(model: PreTrainedModel, why: str, mend: str = "") -> InputError:
    """The error for a model that cannot be used so, for the caller to raise."""
    return InputError(
        f"{type(model).__name__} {why}",
        mend=mend or "Use a decoder model with attention in every layer (Llama, Qwen3, Mistral, Gemma, …).",
    )


__all__ = [
    "NAME",
    "Node",
    "Plan",
    "TreePlan",
    "refusal",
    "refuse_other_ways",
    "stateful_layers",
    "steerwell_attention",
    "takes_tree",
    "unwrap",
    "use_steerwell_attention",
]
