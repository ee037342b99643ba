"""What one pass over a batch keeps and computes, found by running it on the meta device.

There every operation is done in shape only: no weight is loaded and no number is computed, but autograd keeps
what it would keep, and each operation says what it would allocate, read and multiply. So the account holds
for any architecture, adapter or layout, and follows the code of the forward pass when that changes.

Two things are put in the place of what a CPU or a GPU would run: attention is recorded as the fused kernel,
which never holds a query × key matrix, and the grouped product of experts as one product per expert.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from steerwell.models.batch import Batch
from steerwell.models.forward import (
    Pooling,
    head,
    hidden_states,
    reward_scores,
    token_logps,
)
from steerwell.train.layers import set_layers

aten = torch.ops.aten


class Product(NamedTuple):
    """``count`` matrix products (m, k) by (k, n)."""

    m: int
    k: int
    n: int


@dataclass
class Work:
    """What a stretch of a pass computes.

    ``products`` counts matrix products by shape; ``attention`` are the floating-point operations of attention
    (two per multiply-add, padding of shared calls included, the masked half included); ``moved`` are bytes
    that all other operations read and write; ``operations`` counts calls of all kinds.
    """

    products: Counter[Product] = field(default_factory=Counter)
    attention: float = 0.0
    moved: float = 0.0
    operations: int = 0

    @property
    def flops(self) -> float:
        """Floating-point operations of the matrix products, two per multiply-add."""
        return float(sum(2 * p.m * p.k * p.n * count for p, count in self.products.items()))


@dataclass(frozen=True)
class Trace:
    """One pass over a batch of T tokens, S of them scored, with or without a backward pass.

    ``peak`` are bytes at the moment when most are held, without the weights: ``gradients`` (of weights),
    ``activations`` (what is kept for the backward pass, and temporaries) and ``head``. ``saved`` are bytes
    that autograd keeps between forward and backward pass, the head's included. ``body`` and ``head`` say what
    is computed below the language-model head and in it.
    """

    tokens: int
    scored: int
    peak: dict[str, int]
    saved: int
    body: Work
    head: Work


def trace(
    model: Any,
    batch: Batch,
    *,
    backward: bool = True,
    accumulate: bool = False,
    pooling: Pooling | None = None,
    accelerator: bool = False,
    checkpointing: bool = False,
    masters: bool = False,
) -> Trace:
    """Run ``model``, which is on the meta device, over ``batch`` and say what that takes.

    ``accumulate``: gradients of an earlier micro-batch are there already. ``pooling`` is given for a reward
    model, which has no language-model head. ``accelerator``: the head's chunks are those of a GPU, else those
    of a CPU. ``checkpointing``: layers keep their input only and are computed again in the backward pass.
    ``masters``: each gradient is handed on to fp32 master weights and freed as soon as it is complete (what
    the masters hold is not counted here).
    """
    batch = batch.to("meta")
    recorder = _Recorder(model)
    with _layers(model, checkpointing and backward), _budgets(accelerator), _handing_on(model, masters):
        for _ in range(2 if accumulate and backward else 1):
            recorder.begin()
            with torch.set_grad_enabled(backward), _fused_attention(accelerator), recorder:
                _pass(model, batch, recorder, pooling, backward)
    peak = recorder.at_peak({id(p.grad): p.grad for p in model.parameters() if p.grad is not None})
    for parameter in model.parameters():
        parameter.grad = None
    return Trace(
        batch.n_tokens,
        len(batch.target),
        peak,
        recorder.saved,
        recorder.work["activations"],
        recorder.work["head"],
    )


def _pass(model: Any, batch: Batch, recorder: _Recorder, pooling: Pooling | None, backward: bool) -> None:
    if pooling is not None:
        out = reward_scores(model, batch, pooling)
    else:
        selected = hidden_states(model, batch).index_select(0, batch.src)
        plain = head(model)
        if backward and selected.requires_grad:
            selected.register_hook(lambda grad: recorder.enter("activations"))
        recorder.enter("head")
        out = token_logps(selected, plain, batch.target)
        recorder.enter("activations")
        del selected
    recorder.forward_done()
    if backward:
        loss = out.sum()
        del out
        recorder.enter("activations" if pooling is not None else "head")
        loss.backward()


@contextmanager
def _budgets(accelerator: bool) -> Iterator[None]:
    """The head's chunks of a CPU inside, where a CPU is meant: a meta tensor would get those of a GPU."""
    home = sys.modules[token_logps.__module__]
    names = [name for name in vars(home) if name.endswith("_ACCELERATOR")] if not accelerator else []
    before = {name: getattr(home, name) for name in names}
    try:
        for name in names:
            setattr(home, name, getattr(home, name.replace("_ACCELERATOR", "_CPU")))
        yield
    finally:
        for name, value in before.items():
            setattr(home, name, value)


@contextmanager
def _handing_on(model: Any, wanted: bool) -> Iterator[None]:
    def free(parameter: Tensor) -> None:
        parameter.grad = None

    trained = [p for p in model.parameters() if p.requires_grad] if wanted else []
    hooks = [p.register_post_accumulate_grad_hook(free) for p in trained]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _layers(model: Any, recompute: bool) -> Iterator[None]:
    take_back = set_layers(model, recompute=recompute, compiled=False)
    try:
        yield
    finally:
        take_back()


class _Recorder(TorchDispatchMode):
    """Watches every operation: which storages it makes, and how long they live."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.weights = {_key(p) for p in (*model.parameters(), *model.buffers())}
        self.begin()

    def begin(self) -> None:
        """Forget what was computed; what is held stays."""
        if not hasattr(self, "held"):
            self.held: dict[int, tuple[int, str, Any]] = {}  # storage -> bytes, part, weak reference
        self.part = "activations"
        self.work = {"activations": Work(), "head": Work()}
        self.now = sum(size for size, _, _ in self.held.values())
        self.most, self.saved = self.now, 0
        self.events: list[tuple[int, int, str]] = []  # (storage, bytes or -bytes, part)
        self.before = [(key, size, part) for key, (size, part, _) in self.held.items()]
        self.peak_event = 0

    def enter(self, part: str) -> None:
        """What is made from now on belongs to ``part``."""
        self.part = part

    def forward_done(self) -> None:
        """The forward pass is over: what is held now is what autograd keeps."""
        self.saved = self.now - sum(size for _, size, _ in self.before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = _grouped(args, kwargs) if func is aten._grouped_mm.default else func(*args, **kwargs)
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        made = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        for tensor in made:
            self._hold(tensor)
        if not _is_view(func):
            self._count(func, args, given, made)
        return out

    def _hold(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.held or key in self.weights:
            return
        size = storage.nbytes()

        self.held[key] = (size, self.part, weakref.ref(storage, partial(_release, weakref.ref(self), key)))
        self.events.append((key, size, self.part))
        self.now += size
        if self.now > self.most:
            self.most, self.peak_event = self.now, len(self.events)

    def release(self, key: int) -> None:
        """A storage is gone."""
        size, part, _ = self.held.pop(key, (0, "", None))
        if size:
            self.now -= size
            self.events.append((key, -size, part))

    def at_peak(self, gradients: dict[int, Tensor]) -> dict[str, int]:
        """Bytes by part at the moment when most were held. Gradients of weights are told by their storage."""
        kept = {_key(grad) for grad in gradients.values()}
        parts = {"gradients": 0, "activations": 0, "head": 0}
        last = len(self.events)
        # A storage's place may be used again, so only its last owner is a gradient.
        final = {key: i for i, (key, size, _) in enumerate(self.events) if size > 0}
        alive: dict[int, tuple[int, str]] = {}
        for key, size, part in self.before:
            alive[key] = size, "gradients" if key in kept and key not in final else part
        for i, (key, size, part) in enumerate(self.events[: self.peak_event or last]):
            if size > 0:
                alive[key] = size, "gradients" if key in kept and final[key] == i else part
            else:
                alive.pop(key, None)
        for size, part in alive.values():
            parts[part] += size
        return parts

    def _count(self, func: Any, args: Any, given: list[Tensor], made: list[Tensor]) -> None:
        work = self.work[self.part]
        work.operations += 1
        packet = func.overloadpacket
        if packet is aten.mm:
            work.products[_product(args[0], args[1])] += 1
        elif packet in (aten.addmm, aten.addmm_):
            work.products[_product(args[1], args[2])] += 1
        elif packet in (aten.bmm, aten.baddbmm):
            a, b = args[-2:] if packet is aten.baddbmm else args[:2]
            work.products[Product(a.shape[1], a.shape[2], b.shape[2])] += a.shape[0]
        elif packet is aten._grouped_mm:
            work.products[_grouped_product(args)] += _groups(args)
        elif packet in _FUSED:
            query, key, value = args[1:4] if packet in _BACKWARD else args[:3]
            area = math.prod(query.shape[:3]) * key.shape[2]
            times = 5 * query.shape[3] if packet in _BACKWARD else query.shape[3] + value.shape[3]
            work.attention += 2.0 * area * times
        else:
            work.moved += sum(_bytes(x) for x in (*given, *made))


def _release(recorder: Any, key: int, _: Any) -> None:
    found = recorder()
    if found is not None:
        found.release(key)


_FORWARD = {aten._scaled_dot_product_flash_attention_for_cpu, aten._scaled_dot_product_efficient_attention}
_BACKWARD = {
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_efficient_attention_backward,
}
_FUSED = _FORWARD | _BACKWARD


_PLAIN = F.scaled_dot_product_attention


@contextmanager
def _fused_attention(accelerator: bool) -> Iterator[None]:
    """Scaled-dot-product attention as the fused kernel, which a meta tensor would not choose by itself.

    The function is exchanged by name: a mode of torch's own would not reach what is computed again while the
    backward pass runs.
    """
    F.scaled_dot_product_attention = partial(_fused, accelerator)
    try:
        yield
    finally:
        F.scaled_dot_product_attention = _PLAIN


def _fused(
    accelerator: bool,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if query.shape[-1] == value.shape[-1]:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if not accelerator:  # a CPU has no fused kernel for values of another size than the keys
        return _PLAIN(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    times = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(times, 1), value.repeat_interleave(times, 1)
    return aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, torch.is_grad_enabled(), 0.0, is_causal, scale=scale
    )[0]


def _grouped(args: Any, kwargs: Any) -> Tensor:
    """The shape of a grouped product: (T, k) by (G, k, n) gives (T, n); (k, T) by (T, n) gives (G, k, n)."""
    a, b = args[:2]
    ends = args[2] if len(args) > 2 else kwargs.get("offs")
    if a.ndim == 2 and b.ndim == 2:
        return a.new_empty(len(ends), a.shape[0], b.shape[1])
    if a.ndim == 2:
        return a.new_empty(a.shape[0], b.shape[2])
    return (
        a.new_empty(a.shape[0], a.shape[1], b.shape[-1])
        if b.ndim == 3
        else b.new_empty(a.shape[1], b.shape[1])
    )


def _product(a: Tensor, b: Tensor) -> Product:
    return Product(a.shape[0], a.shape[1], b.shape[1])


def _groups(args: Any) -> int:
    a, b = args[:2]
    return b.shape[0] if b.ndim == 3 else a.shape[0] if a.ndim == 3 else len(args[2])


def _grouped_product(args: Any) -> Product:
    """One expert's product when tokens are spread evenly."""
    a, b = args[:2]
    n = _groups(args)
    if a.ndim == 2 and b.ndim == 2:
        return Product(a.shape[0], math.ceil(a.shape[1] / n), b.shape[1])
    if a.ndim == 2:
        return Product(math.ceil(a.shape[0] / n), a.shape[1], b.shape[2])
    return Product(a.shape[-2], a.shape[-1], b.shape[-1])


def _is_view(func: Any) -> bool:
    """Whether an operation makes no numbers: its result looks at its argument."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _bytes(tensor: Tensor) -> int:
    """Bytes that are touched to read a tensor once; a broadcast axis counts once."""
    count = math.prod(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or n == 1)
    return count * tensor.element_size()


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


__all__ = ["Product", "Trace", "Work", "trace"]
