"""The most memory that a run will hold on one device, by part, and the moment when it does.

What tensors take is counted from the trace of a pass. What lies beside them is fitted to measured runs on a
CPU (``benchmarks/plan_error.py --fit``): glibc gives memory back late and in pieces. For GPUs it is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from steerwell.models.batch import Layout, build
from steerwell.models.forward import Pooling
from steerwell.train.skeleton import Skeleton
from steerwell.train.trace import Trace, trace

#: Bytes beside tensors, as a share of activations and head (freed and taken anew in every pass), on a CPU: glibc
#: serves tensors below 32 MiB from a heap whose holes the next ones often miss. Holes are more where gradients
#: of earlier micro-batches lie between, and most with adapters, which take many small tensors between large ones.
ALLOCATOR = {"plain": 0.30, "accumulating": 0.69, "adapted": 0.97}
#: Share that the caching allocator of CUDA wastes: an assumption.
CUDA_ALLOCATOR = 0.06

PARTS = (
    "weights",
    "master weights",
    "gradients",
    "optimizer",
    "activations",
    "head",
    "reference",
    "cache",
    "gathered layers",
    "allocator",
    "process",
)


@dataclass(frozen=True)
class Peak:
    """Bytes on one device by part, at the moment when most are held, and what happens then."""

    parts: dict[str, int]
    moment: str

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Holding:
    """What a run holds besides activations. ``beside`` are bytes of another model (a reference with weights
    of its own, or the policy that a reward model was made from), ``cache`` those of the sampler's keys and
    values, ``reserved`` those that are taken before the first tensor. ``accumulates``: a step has several
    micro-batches.
    """

    skeleton: Skeleton
    kind: str  # cpu | cuda
    count: int = 1
    beside: int = 0
    cache: int = 0
    reserved: int = 0
    accumulates: bool = False

    @property
    def masters(self) -> bool:
        """Whether trained weights have fp32 copies: always when the model computes in less."""
        return self.skeleton.size < 4


def peak(
    holding: Holding, training: Trace, reading: Trace | None = None, *, accumulates: bool = False
) -> Peak:
    """The peak of a run whose largest training pass is ``training`` and whose largest pass without gradient
    (reference, evaluation) is ``reading``. ``accumulates``: a step has several micro-batches.
    """
    steady = _steady(holding)
    skeleton = holding.skeleton
    trained = -(-skeleton.trainable * 4 // holding.count)
    found = dict(training.peak)
    if holding.masters or holding.count > 1:
        # handed on to fp32 sums, which stay until the step is over
        found["gradients"] = trained + (skeleton.gathered if holding.count > 1 else 0)
    moments = [("the backward pass", {**steady, **found})]
    if reading is not None:
        moments.append(("a pass without gradient", {**steady, **reading.peak}))
    moments.append(("the update", {**steady, "gradients": trained}))
    if holding.cache:
        moments.append(("sampling", {**steady, "cache": holding.cache}))
    if holding.kind == "cpu" and not holding.cache:
        # the file is mapped while it is copied
        loading = {"weights": 2 * skeleton.weights, "process": holding.reserved}
        moments.append(("loading", loading))
    peaks = [Peak(_whole(parts, holding), moment) for moment, parts in moments]
    return max(peaks, key=lambda one: one.total)


def _steady(holding: Holding) -> dict[str, int]:
    """What is held all the time, from the second step on."""
    skeleton, count = holding.skeleton, holding.count
    masters = 4 * skeleton.trainable if holding.masters else 0
    weights = skeleton.weights
    gathered = 0
    if count > 1:
        frozen = weights - skeleton.trainable * skeleton.size
        weights = frozen + (0 if masters else skeleton.trainable * skeleton.size)
        gathered = 2 * skeleton.gathered  # the layer at work, and the next one on its way
    shared = {
        "weights": weights,
        "master weights": masters,
        "optimizer": 8 * skeleton.trainable,
        "reference": holding.beside,
    }
    return {name: -(-size // count) for name, size in shared.items()} | {
        "gathered layers": gathered,
        "process": holding.reserved,
    }


def _whole(parts: dict[str, int], holding: Holding) -> dict[str, int]:
    passing = parts.get("activations", 0) + parts.get("head", 0)
    if holding.kind == "cpu":
        adapted = holding.skeleton.trainable < holding.skeleton.total
        kind = "adapted" if adapted else "accumulating" if holding.accumulates else "plain"
        allocator = round(ALLOCATOR[kind] * passing)
    else:
        allocator = round(CUDA_ALLOCATOR * (passing + parts.get("gradients", 0)))
    return {name: {**parts, "allocator": allocator}.get(name, 0) for name in PARTS}


def activation_bytes(
    model: Any,
    groups: Any,
    *,
    layout: Layout = "auto",
    pooling: Pooling | None = None,
    accelerator: bool = False,
    checkpointing: bool = False,
) -> int:
    """Bytes that autograd keeps between the forward and the backward pass over tokenised ``groups``.

    ``model`` is on the meta device (:func:`steerwell.train.skeleton.skeleton`); nothing is computed. For the
    peak of a whole pass see :func:`steerwell.train.trace.trace`.
    """
    batch = build(groups, layout)
    return trace(model, batch, pooling=pooling, accelerator=accelerator, checkpointing=checkpointing).saved


def cache_bytes(config: Any, rows: int, slots: int, size: int) -> int:
    """Bytes of the sampler's keys and values: ``rows`` completions at a time with ``slots`` tokens each, numbers
    of ``size`` bytes.
    """
    inner = config.get_text_config()
    heads = inner.num_attention_heads
    width = getattr(inner, "head_dim", None) or inner.hidden_size // heads
    keys = getattr(inner, "num_key_value_heads", None) or heads
    return 2 * inner.num_hidden_layers * rows * slots * keys * width * size


def device_kind() -> str:
    """The kind of the machine at hand."""
    return "cuda" if torch.cuda.is_available() else "cpu"


__all__ = ["PARTS", "Holding", "Peak", "activation_bytes", "cache_bytes", "device_kind", "peak"]
