"""The language-model head, on the positions that predict scored tokens and nowhere else.

S positions, V tokens in the vocabulary, E hidden sizes. The head runs in chunks, forward and backward, so the
(S, V) logits never exist in fp32 at once. Up to a fixed budget the backward pass finds the probabilities kept
(in the dtype of the weights); beyond it, it makes them again, chunk by chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from steerwell.data.errors import InputError
from steerwell.models.attention import unwrap

# Logits held at once: 64 MiB in fp32 on a CPU, 512 MiB on an accelerator.
CHUNK_CPU, CHUNK_ACCELERATOR = 2**24, 2**27
# Logits that several passes are made over while they lie in the cache of a CPU: 1 MiB in fp32.
CACHED = 2**18
# Probabilities kept for the backward pass, at most: 256 MiB in fp32 on a CPU, 2 GiB in bf16 on an accelerator.
KEEP_CPU, KEEP_ACCELERATOR = 2**26, 2**30


@dataclass(frozen=True)
class LowRank:
    """A LoRA adapter on the head: it adds ``scaling * dropout(hidden) @ down.T @ up.T`` to the logits."""

    down: Tensor  # (r, E)
    up: Tensor  # (V, r)
    scaling: float = 1.0
    dropout: nn.Module | None = None

    def project(self, hidden: Tensor) -> Tensor:
        """(S, E) -> (S, r), scaled."""
        hidden = hidden.to(self.down.dtype)
        return F.linear(hidden if self.dropout is None else self.dropout(hidden), self.down) * self.scaling


@dataclass(frozen=True)
class Head:
    """The language-model head: ``logits = softcap(scale * (hidden @ weight.T + bias + adapters))``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    adapters: tuple[LowRank, ...] = ()


def head(model: nn.Module) -> Head:
    """The head of a causal language model: its final softcap (Gemma 2), its scale (Cohere, Granite, Falcon-H1)
    and the LoRA adapters that are active on it.

    Raises :class:`InputError` for a model without a linear head, and for adapters that are not plain LoRA.
    """
    inner = unwrap(model)
    layer, adapters = _plain_layer(inner)
    config: Any = inner.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return Head(layer.weight, layer.bias, scale, softcap, adapters)


def _plain_layer(model: Any) -> tuple[nn.Linear, tuple[LowRank, ...]]:
    """The linear layer of the head, without peft's wrappers, and the adapters that are active."""
    layer: Any = model.get_output_embeddings()
    if hasattr(layer, "modules_to_save"):  # peft: the layer itself is trained, as a copy
        chosen = (
            [] if layer.disable_adapters else [a for a in layer.active_adapters if a in layer.modules_to_save]
        )
        layer = layer.modules_to_save[chosen[0]] if chosen else layer.original_module
    adapters: list[LowRank] = []
    if hasattr(layer, "base_layer"):
        if not layer.disable_adapters and not layer.merged:
            if not hasattr(layer, "lora_A") or getattr(layer, "lora_variant", None):
                raise _refusal(model, "an adapter on its head that is not plain LoRA")
            for name in layer.active_adapters:
                if name in layer.lora_A:
                    down, up = layer.lora_A[name], layer.lora_B[name]
                    if type(down) is not nn.Linear or up.bias is not None:
                        raise _refusal(model, "a LoRA on its head with a bias or of another kind")
                    dropout = layer.lora_dropout[name]
                    adapters.append(LowRank(down.weight, up.weight, layer.scaling[name], dropout))
        layer = layer.base_layer
    if not isinstance(layer, nn.Linear) or type(layer).forward is not nn.Linear.forward:
        raise _refusal(model, "no plain linear language-model head")
    return layer, tuple(adapters)


def _refusal(model: nn.Module, what: str) -> InputError:
    return InputError(
        f"{type(model).__name__} has {what}",
        mend="Load a causal language model; adapters on its head must be plain LoRA.",
    )


@overload
def token_logps(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    *,
    temperature: float = ...,
    chunk: int | None = ...,
    entropy: Literal[False] = ...,
) -> Tensor:
    """As below."""


@overload
def token_logps(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    *,
    temperature: float = ...,
    chunk: int | None = ...,
    entropy: Literal[True],
) -> tuple[Tensor, Tensor]:
    """As below."""


def token_logps(
    hidden: Tensor,
    head: Head,
    target: Tensor,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
    entropy: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities (S,) in nats of ``target`` (S,) at ``hidden`` (S, E), through a chunked head.

    With ``entropy`` also the entropy (S,) in nats of the distribution that each target is taken from. Both are
    differentiable and in fp32 whatever the weights are in. ``temperature`` divides the logits. ``chunk`` is how
    many positions go through the head at once, and no probabilities are kept beyond it; without it, the budgets
    of this module hold.
    """
    cpu = hidden.device.type == "cpu"
    vocabulary = head.weight.shape[0]
    if chunk is None:
        chunk = max(16, (CHUNK_CPU if cpu else CHUNK_ACCELERATOR) // vocabulary)
        keep = (KEEP_CPU if cpu else KEEP_ACCELERATOR) // vocabulary
        keep = len(target) if len(target) <= keep else keep - keep % chunk
    else:
        keep = len(target) if len(target) <= chunk else 0
    low = up = None
    if head.adapters:
        low = torch.cat([adapter.project(hidden) for adapter in head.adapters], 1)
        up = torch.cat([adapter.up for adapter in head.adapters], 1)
    settings = _Settings(
        head.scale,
        head.softcap,
        1.0 / temperature,
        chunk,
        entropy,
        learning=torch.is_grad_enabled(),
        keep=keep,
    )
    hidden = hidden.to(head.weight.dtype)
    logps, entropies = _HeadLogps.apply(hidden, head.weight, head.bias, low, up, target, settings)
    return (logps, entropies) if entropy else logps


@dataclass(frozen=True)
class _Settings:
    scale: float
    cap: float | None
    inverse_temperature: float
    chunk: int
    entropy: bool
    learning: bool  # whether a backward pass may follow
    keep: int  # for so many positions, the first ones, probabilities may be kept

    @property
    def factor(self) -> float:
        """Derivative of a logit with respect to what comes out of the linear layer, without the cap's part."""
        return self.scale * self.inverse_temperature


def _logits(hidden, weight, bias, low, up, settings: _Settings, out: Tensor | None) -> Tensor:
    """One chunk of logits in fp32 (or finer), (c, V); ``out`` is a buffer (c, V) to write them to."""
    work = _working(weight)
    if out is not None:
        z = torch.mm(hidden, weight.t(), out=out)
    else:
        z = _product(hidden, weight.t(), work)
    if low is not None:
        z += (low @ up.t()).to(work)
    if bias is not None:
        z += bias
    if settings.cap is not None:
        z = z.mul_(settings.scale / settings.cap).tanh_().mul_(settings.cap * settings.inverse_temperature)
    elif settings.factor != 1.0:
        z *= settings.factor
    return z


def _exponentials(z: Tensor) -> tuple[Tensor, Tensor]:
    """Turn logits (c, V) into exp(z - top) in place; returns the row's maximum ``top`` and the sums, (c, 1) each."""
    parts = []
    for few in z.split(_rows_at_once(z)):
        top = few.amax(1, keepdim=True)
        parts.append((top, few.sub_(top).exp_().sum(1, keepdim=True)))
    top, total = zip(*parts, strict=True)
    return torch.cat(top), torch.cat(total)


def _rows_at_once(z: Tensor) -> int:
    """How many rows to pass over again and again: on a CPU what stays in its cache, elsewhere all of them."""
    return max(1, CACHED // z.shape[1]) if z.device.type == "cpu" else len(z)


def _working(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


def _product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in ``dtype``. Half-precision products keep their fp32 sums on CUDA; elsewhere they are rounded."""
    if a.dtype == dtype:
        return a @ b
    if a.is_cuda and dtype == torch.float32 and _MM_HAS_OUT_DTYPE:
        return torch.mm(a, b, out_dtype=torch.float32)
    return (a @ b).to(dtype)


_MM_HAS_OUT_DTYPE = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 8)


class _HeadLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target], and the entropy, without the (S, V) logits.

    With p the probabilities and y the target, the gradient of a log-prob with respect to the logits is
    ``onehot(y) - p``, and that of the entropy H is ``-p * (log p + H)``. The forward pass keeps either

    - ``ahead``: ``(p - onehot) @ weight`` (S, E), all that is needed where the head itself is not trained,
    - ``kept``: ``p - onehot``, up to a factor per row, of as many positions as fit into the budget, and
    - of all others nothing but the log-sum-exp: for these the backward pass makes p again.
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, low, up, target, settings: _Settings):
        n, work = len(target), _working(weight)
        exact = weight.dtype == work
        logps = torch.empty(n, dtype=work, device=hidden.device)
        norm, entropies = torch.empty_like(logps), torch.empty_like(logps) if settings.entropy else None
        needs = ctx.needs_input_grad
        simple = settings.learning and settings.cap is None and not settings.entropy
        ahead = hidden.new_empty(hidden.shape) if simple and needs[0] and not any(needs[1:5]) else None
        kept: Any = None
        if simple and ahead is None and any(needs[:5]) and settings.keep:
            kept = weight.new_empty(settings.keep, len(weight))
        n_kept = 0 if kept is None else len(kept)
        buffer: Any = None
        if exact and n_kept < n:
            buffer = hidden.new_empty(min(n, settings.chunk), len(weight))
        for i in range(0, n, settings.chunk):
            j = min(i + settings.chunk, n)
            keep_here = kept[i:j] if kept is not None and j <= n_kept else None
            out = None if not exact else buffer[: j - i] if keep_here is None else keep_here
            z = _logits(hidden[i:j], weight, bias, None if low is None else low[i:j], up, settings, out)
            y = target[i:j, None]
            if entropies is None:
                picked = z.gather(1, y)
                p, (top, total) = z, _exponentials(z)
                picked -= top
            else:
                top = z.amax(1, keepdim=True)
                z -= top
                picked = z.gather(1, y)
                p = z.exp()
                total = p.sum(1, keepdim=True)
            log_total = total.log()
            logps[i:j] = (picked - log_total)[:, 0]
            norm[i:j] = (log_total + top if keep_here is None else total)[:, 0]
            if entropies is not None:
                entropies[i:j] = (log_total - p.mul_(z).sum(1, keepdim=True).div_(total))[:, 0]
            elif ahead is not None or keep_here is not None:
                p.scatter_add_(1, y, -total)
                if ahead is not None:
                    ahead[i:j] = (p.to(weight.dtype) @ weight).div_(total)
                elif keep_here is not None and not exact:
                    keep_here.copy_(p)
        ctx.save_for_backward(hidden, weight, bias, low, up, target, norm, entropies, kept, ahead)
        ctx.settings = settings
        return logps, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor | None):
        hidden, weight, bias, low, up, target, norm, entropies, kept, ahead = ctx.saved_tensors
        settings, needs, work = ctx.settings, ctx.needs_input_grad, _working(weight)
        row = (grad.to(work) * -settings.factor)[:, None]
        if ahead is not None:
            return (ahead * row).to(hidden.dtype), *[None] * 6
        sums = _Sums(needs[:5], hidden, weight, bias, low, up)
        n, n_kept = len(target), 0
        if kept is not None:
            n_kept = len(kept)
            part = slice(None) if n_kept == n else slice(0, n_kept)
            sums.add(part, kept, row[:n_kept] / norm[:n_kept, None])
        buffer = None
        if weight.dtype == work and n_kept < n:
            buffer = hidden.new_empty(min(n - n_kept, settings.chunk), len(weight))
        for i in range(n_kept, n, settings.chunk):
            part = slice(i, min(i + settings.chunk, n))
            z = _logits(
                hidden[part],
                weight,
                bias,
                None if low is None else low[part],
                up,
                settings,
                None if buffer is None else buffer[: part.stop - i],
            )
            slope = None
            if settings.cap is not None:  # derivative of the softcap, before z becomes probabilities
                slope = 1 - (z / (settings.cap * settings.inverse_temperature)).square_()
            y, factor = target[part, None], row[part]
            if entropies is None:
                few = _rows_at_once(z)
                for some, own_norm in zip(z.split(few), norm[part, None].split(few), strict=True):
                    some.sub_(own_norm).exp_()
                p = z.scatter_add_(1, y, -torch.ones_like(factor))
            else:
                z -= norm[part, None]
                assert grad_entropy is not None
                own = grad_entropy[part, None].to(work) * -settings.factor
                p = z.exp()
                p *= z.add_(entropies[part, None]).mul_(own).add_(factor)
                p.scatter_add_(1, y, -factor)
                factor = torch.ones_like(factor)
            sums.add(part, p if slope is None else p.mul_(slope), factor)
        return *sums.results(), None, None


class _Sums:
    """The five gradients of the head, summed over chunks."""

    def __init__(self, needs, hidden, weight, bias, low, up) -> None:
        self.needs, self.bias = needs, bias
        self.pairs: list[tuple[Tensor, Tensor, int, int]] = [(hidden, weight, 0, 1)]
        if low is not None:
            self.pairs.append((low, up, 3, 4))
        self.found: list[Any] = [None] * 5

    def add(self, part: slice, p: Tensor, row: Tensor) -> None:
        """Positions ``part``, whose gradient with respect to the linear layer's output is ``p * row``."""
        for x, w, at_x, at_w in self.pairs:
            q = p.to(w.dtype)
            if self.needs[at_x]:
                d = (q @ w).mul_(row)
                if part == slice(None):
                    self.found[at_x] = d.to(x.dtype)
                else:
                    if self.found[at_x] is None:
                        self.found[at_x] = torch.empty_like(x)
                    self.found[at_x][part] = d
            if self.needs[at_w]:
                self._add(at_w, q.t(), (x[part] * row).to(w.dtype), part == slice(None))
        if self.needs[2]:
            q = p.to(self.bias.dtype)
            self._add(2, q.t(), row.to(q.dtype), part == slice(None))

    def _add(self, at: int, a: Tensor, b: Tensor, only: bool) -> None:
        sum = self.found[at]
        work = _working(a)
        if only:
            self.found[at] = a @ b
        elif sum is None:
            self.found[at] = _product(a, b, work)
        elif a.dtype == work:
            sum.addmm_(a, b)
        else:
            sum += _product(a, b, work)

    def results(self) -> list[Any]:
        """In the order of the inputs and in their dtypes."""
        x, w, _, _ = self.pairs[0]
        low, up = self.pairs[1][:2] if len(self.pairs) > 1 else (None, None)
        inputs = (x, w, self.bias, low, up)
        return [
            None if d is None or like is None else d.to(like.dtype).view_as(like)
            for d, like in zip(self.found, inputs, strict=True)
        ]


__all__ = ["Head", "LowRank", "head", "token_logps"]
