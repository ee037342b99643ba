"""What a model computes in, and what its weights are kept in.

In bfloat16 (8 bits of significand) an update of 1e-6 on a weight of 0.1 is lost: the weight stays where it was.
So the trained weights are kept in float32 beside the model: the forward and backward passes are pure bfloat16,
their gradients are summed over the micro-batches of a step in float32, and AdamW updates the float32 weights,
from which the model's are rounded anew after each step. That is what FSDP2's mixed precision policy does
across processes, here for one.

Per trained parameter: 2 bytes (model) + 4 (master) + 4 (gradient) + 8 (moments). With an adapter the base is
bfloat16 and only the adapter has float32 weights.
"""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import Tensor, nn

from steerwell.models.encoder import output_weights

#: A reward model's head: bfloat16 would round scores near 8 to multiples of 1/16.
HEADS_IN_FLOAT32 = re.compile(r"(^|\.)score\.")


def resolved_dtype(dtype: str, device: torch.device, own: torch.dtype) -> torch.dtype:
    """The dtype that a setting means: "auto" is bfloat16 on a GPU, and what the model has (``own``) elsewhere,
    but float32 for a model in half precision.
    """
    if dtype != "auto":
        return getattr(torch, dtype)
    if device.type == "cuda":
        return torch.bfloat16
    return torch.promote_types(own, torch.float32)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype that a model computes in: that of its input embeddings."""
    anything: Any = model
    return anything.get_input_embeddings().weight.dtype


def cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Change a model in place to compute in ``dtype``. Parameters stay the same objects.

    Buffers are left alone (rotary frequencies must be float32), and so are quantised weights, what the
    architecture keeps in float32, and the head of a reward model.
    """
    strict = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    fine = output_weights(model)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        stays = name in fine or HEADS_IN_FLOAT32.search(name) or any(part in name for part in strict)
        wanted = torch.promote_types(dtype, torch.float32) if stays else dtype
        if parameter.dtype != wanted:
            parameter.data = parameter.data.to(wanted)


def in_dtype(model: Any, dtype: torch.dtype) -> Any:
    """The model if it computes in ``dtype``, else a copy that does."""
    if dtype_of(model) == dtype:
        return model
    other = copy.deepcopy(model)
    cast(other, dtype)
    return other


class MasterWeights:
    """Float32 copies of the trained parameters of a model that computes in a coarser dtype.

    They are what the optimizer updates and what a checkpoint holds. Gradients arrive in the copies' ``.grad``
    while the backward pass runs; the model's own are freed at once.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Take the copies, then cast the model to ``dtype`` in place."""
        self.model = model
        kept = {name: p.dtype for name, p in model.named_parameters() if p.is_floating_point()}
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        masters = {name: nn.Parameter(_fine(p.detach())) for name, p in trained.items()}
        cast(model, dtype)
        self.names: dict[Tensor, str] = {master: name for name, master in masters.items()}
        self._pairs = [(trained[name], master) for name, master in masters.items()]
        self._hooks = [p.register_post_accumulate_grad_hook(_collector(m)) for p, m in self._pairs]
        # the dtype in which each weight is given back: its own, or the finer one it was computed in
        self._after = {
            name: torch.promote_types(kept[name], p.dtype)
            for name, p in model.named_parameters()
            if name in kept
        }

    @torch.no_grad()
    def pull(self) -> None:
        """Round the masters into the model."""
        for parameter, master in self._pairs:
            parameter.copy_(master)

    def close(self) -> None:
        """Give the model its weights in the dtype they came in: the trained ones straight from the masters, so
        that nothing is rounded where they came in float32.
        """
        for hook in self._hooks:
            hook.remove()
        masters: dict[int, Tensor] = {id(parameter): master for parameter, master in self._pairs}
        for name, parameter in self.model.named_parameters():
            if name in self._after:
                source = masters.get(id(parameter), parameter)
                parameter.data = source.detach().to(self._after[name], copy=True)


def keep_fine(model: nn.Module, dtype: torch.dtype) -> bool:
    """Cast a model whose layers will be run in ``dtype`` by FSDP: what is trained to float32 (or finer), the rest
    to ``dtype``. Whether ``dtype`` is coarser than what is trained.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    cast(model, dtype)
    for parameter in trained:
        parameter.data = _fine(parameter.data)
    return torch.promote_types(dtype, torch.float32) != dtype


def _fine(weight: Tensor) -> Tensor:
    """A copy in float32, or in the weight's own dtype where that is finer."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def _collector(master: nn.Parameter) -> Any:
    """Moves a gradient that is complete for this backward pass to the master's, in float32."""

    def collect(parameter: Tensor) -> None:
        gradient = parameter.grad
        parameter.grad = None
        if gradient is None:
            return
        if master.grad is None:
            master.grad = gradient.to(master.dtype, copy=True)
        else:
            master.grad += gradient

    return collect


def set_precision(model: nn.Module, dtype: torch.dtype) -> MasterWeights | None:
    """Have a model compute in ``dtype`` for training. Returns the masters where its weights need them: where
    ``dtype`` is coarser than float32.
    """
    if torch.promote_types(dtype, torch.float32) != dtype:
        return MasterWeights(model, dtype)
    if dtype_of(model) != dtype:
        cast(model, dtype)
    return None


__all__ = ["MasterWeights", "cast", "dtype_of", "in_dtype", "keep_fine", "resolved_dtype", "set_precision"]
