"""A model whose weights are spread over processes (FSDP2): each holds a part, layers come together when they run.

:func:`shard` spreads a model in place. From then on every pass over it goes through :func:`inside`, which lets
FSDP gather what the pass needs. On an unsharded model both cost nothing, so that the code above has one path.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Partial, distribute_tensor

from steerwell.data.errors import InputError
from steerwell.models.encoder import output_weights

T = TypeVar("T")
_ENTRY, _RUNNING = "_steerwell_inside", "_steerwell_running"


def shard(model: nn.Module, mesh: Any, compute: torch.dtype | None = None) -> None:
    """Spread the weights of ``model`` over the processes of ``mesh`` (one-dimensional), layer by layer, in place.

    Weights, gradients and optimizer state keep their own type; with ``compute`` (bf16) layers are gathered and
    run in that type, and gradients are summed in fp32. Raises :class:`InputError` when the model's layers
    can't be found.
    """
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=torch.float32 if compute else None)
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fine = output_weights(model)
    for name, module in list(model.named_modules()):
        head = name.rpartition(".")[2] == "score" or f"{name}.weight" in fine
        if head and isinstance(module, nn.Linear):
            fully_shard(module, mesh=mesh)  # a reward model's head stays in float32
    setattr(model, _ENTRY, MethodType(_run, model))
    fully_shard(model, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(model, _ENTRY)
    gathered(model, lambda: None)  # FSDP notes at the first pass what is trained: now, while adapters are on


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The repeated layers of a decoder: the largest list of as many modules as the configuration names."""
    config: Any = model.config
    count = config.get_text_config().num_hidden_layers
    found = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise InputError(
            f"the {count} layers of {type(model).__name__} were not found, so it can't be spread over processes",
            mend="Run it in one process.",
        )
    return max(found, key=lambda layers: sum(p.numel() for p in layers.parameters()))


def inside(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """Call ``function(*args)``, which runs ``model`` or reads its weights, with sharded weights at hand.

    All processes must make the same calls in the same order.
    """
    if not isinstance(model, FSDPModule) or getattr(model, _RUNNING, False):
        return function(*args)
    out = getattr(model, _ENTRY)(function, *args)
    if not torch.is_grad_enabled():  # FSDP keeps the outermost weights for a backward that will not come
        model.reshard()
    return out


def _run(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    setattr(model, _RUNNING, True)
    try:
        return function(*args)
    finally:
        setattr(model, _RUNNING, False)


def gathered(model: nn.Module, function: Callable[..., T], *args: Any) -> T:
    """As :func:`inside`, with the whole model gathered for as long as ``function`` takes (no gradients).

    Then the processes need not run the model equally often: for sampling.
    """
    if not isinstance(model, FSDPModule):
        return function(*args)

    def whole() -> T:
        with _kept(model):
            return function(*args)

    with torch.no_grad():
        return inside(model, whole)


@contextmanager
def _kept(model: nn.Module) -> Iterator[None]:
    parts = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.unshard()
    for part in parts:
        if part is not model:
            part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in parts:
            if part is not model:
                part.set_reshard_after_forward(True, recurse=False)
                part.reshard()


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of an unsharded model without its weights (on the meta device), to put gathered weights into."""
    memo: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
        for p in model.parameters()
    }
    return copy.deepcopy(model, memo)


def fill(bones: nn.Module, model: nn.Module, keep: bool) -> None:
    """Gather the weights of a sharded ``model`` one by one and put them into its :func:`skeleton`, on the CPU, in
    the types that it has.

    Every process must call it; only those with ``keep`` hold the result.
    """
    for name, parameter in model.named_parameters():
        value = whole(parameter.detach())
        if keep:
            owner, _, last = name.rpartition(".")
            module = bones.get_submodule(owner)
            bone: Any = module._parameters[last]
            fresh = nn.Parameter(value.to("cpu", bone.dtype, copy=True), requires_grad=bone.requires_grad)
            for other, attribute in _places(bones, bone):
                other._parameters[attribute] = fresh


def _places(root: nn.Module, parameter: Any) -> list[tuple[nn.Module, str]]:
    """Where a parameter hangs: in several places when it is tied."""
    return [(m, name) for m in root.modules() for name, p in m._parameters.items() if p is parameter]


def sharded(model: nn.Module) -> bool:
    """Whether a model's weights are spread over processes."""
    return isinstance(model, FSDPModule)


def everywhere(value: Any) -> list[Any]:
    """What each process has, in the order of ranks, on every process."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that may be spread over processes (then all of them must call this)."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole_to_train(parameter: Tensor) -> Tensor:
    """As :func:`whole`, for a parameter that a loss reads itself, outside of a layer: its gradient comes together as
    those of layers do, as a mean over processes. (By itself each process would keep its own.)
    """
    if not isinstance(parameter, DTensor):
        return parameter
    full = parameter.full_tensor(grad_placements=[Partial()])
    return full.detach() + (full - full.detach()) / parameter.device_mesh.size()


def own_part(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def spread_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A full tensor spread as ``like`` is (same shape); itself when ``like`` is not spread."""
    if not isinstance(like, DTensor) or isinstance(tensor, DTensor):
        return tensor
    return distribute_tensor(tensor, like.device_mesh, like.placements)


__all__ = [
    "decoder_layers",
    "everywhere",
    "fill",
    "gathered",
    "inside",
    "own_part",
    "shard",
    "sharded",
    "skeleton",
    "spread_like",
    "whole",
    "whole_to_train",
]
