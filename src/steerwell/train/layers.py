"""How a model's layers are run in training: their activations kept or computed again, compiled or not.

Both replace the ``forward`` of each decoder layer on the module itself, so names of weights, copies and saved
models stay those of the plain model.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface
from transformers.modeling_layers import GradientCheckpointingLayer

from steerwell.data.errors import InputError
from steerwell.models.attention import NAME, steerwell_attention, unwrap
from steerwell.models.head import CHUNK_ACCELERATOR, CHUNK_CPU

#: Share of the free memory that a run may be planned to take.
MARGIN = 0.85


def set_layers(
    model: nn.Module, *, recompute: bool, compiled: bool, dropout: bool = False
) -> Callable[[], None]:
    """Have the decoder layers recompute their activations in the backward pass, or run compiled, or both.

    Values and gradients stay the same (compiled: up to rounding). transformers' own switch acts in train mode
    only, and a run without dropout is in eval mode, so the layers are wrapped here. ``dropout`` says that the
    recomputation must draw the same noise. Returns what takes it back. Raises :class:`InputError` for a model
    whose layers are not known.
    """
    if not (recompute or compiled):
        return lambda: None
    layers = recomputable_layers(model)
    if not layers:
        raise InputError(
            f"the layers of {type(unwrap(model)).__name__} are not known",
            mend="Leave gradient_checkpointing and compile out.",
        )
    forwards: dict[type, Any] = {}
    if compiled:  # the plan of a batch is plain Python: it stays outside the compiled graphs
        AttentionInterface.register(NAME, torch.compiler.disable(steerwell_attention))
    for layer in layers:
        kind = type(layer)
        if kind not in forwards:
            forward = _compiled(kind.forward) if compiled else kind.forward
            forwards[kind] = _recomputed(forward, dropout) if recompute else forward
        layer.forward = MethodType(forwards[kind], layer)

    def take_back() -> None:
        for layer in layers:
            layer.__dict__.pop("forward", None)
        if compiled:
            AttentionInterface.register(NAME, steerwell_attention)

    return take_back


def recomputable_layers(model: nn.Module) -> list[nn.Module]:
    """The layers whose activations transformers knows how to compute again."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function, for any number of tokens. Sampling, one token at a time with a cache, goes by it."""
    fast = torch.compile(forward, dynamic=True)

    def compiled(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        run = forward if kwargs.get("past_key_values") is not None else fast
        return run(self, *args, **kwargs)

    return compiled


def _recomputed(forward: Callable[..., Any], dropout: bool) -> Callable[..., Any]:
    def recomputed(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(self, *args, **kwargs)
        once = partial(forward, self)
        return checkpoint(once, *args, use_reentrant=False, preserve_rng_state=dropout, **kwargs)

    return recomputed


def needs_checkpointing(model: nn.Module, tokens: int) -> bool:
    """Whether activations of a micro-batch of ``tokens`` are not likely to fit beside what training keeps.

    Counts what is still to be allocated (gradients, moments, activations, one chunk of logits) against the free
    memory of the device; False where that is not known. An estimate from above, for decoders without
    surprises: ask :func:`set_layers` for it, or against it, by the setting.
    """
    device = next(model.parameters()).device
    free = free_memory(device)
    if free is None or not recomputable_layers(model):
        return False
    trained = sum(p.numel() * max(4, p.element_size()) for p in model.parameters() if p.requires_grad)
    chunk = CHUNK_CPU if device.type == "cpu" else CHUNK_ACCELERATOR
    return 3 * trained + activation_bound(model, tokens) + 3 * 4 * chunk > MARGIN * free


def activation_bound(model: nn.Module, tokens: int) -> int:
    """Bytes that the layers keep for the backward pass over ``tokens`` tokens: about
    16 hidden + 6 (queries + keys + values) + 4 intermediate numbers per token and layer.
    """
    inner: Any = unwrap(model)
    config = inner.config.get_text_config()
    hidden, heads = config.hidden_size, config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    groups = getattr(config, "num_key_value_heads", None) or heads
    wide = getattr(config, "intermediate_size", None) or 4 * hidden
    if experts := getattr(config, "num_experts_per_tok", None):
        wide = max(wide, experts * (getattr(config, "moe_intermediate_size", None) or wide))
    numbers = 16 * hidden + 6 * width * (heads + 2 * groups) + 4 * wide
    size = inner.get_input_embeddings().weight.element_size()
    return tokens * config.num_hidden_layers * numbers * size


def free_memory(device: torch.device) -> int | None:
    """Bytes that can still be allocated on a device; None where that can't be asked."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration, ValueError):
        try:
            return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):
            return None


__all__ = ["activation_bound", "free_memory", "needs_checkpointing", "recomputable_layers", "set_layers"]
