"""What a model says about a batch: log-probs of the scored tokens, hidden states, reward scores.

The language-model head runs on the S positions that predict scored tokens and nowhere else, in chunks,
forward and backward, so the (S, V) logits never exist at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers import PreTrainedModel

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.attention import refuse_other_layers, use_steerwell_attention
from steerwell.models.batch import Batch, tree
from steerwell.models.render import Sequence, TokenizedGroup

Pooling = Literal["last", "mean"]
# Logits held at once: 64 MiB in fp32 on a CPU, 512 MiB on an accelerator.
CHUNK_CPU, CHUNK_ACCELERATOR = 2**24, 2**27


def per_token_logps(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Log-probabilities (nats) of the scored tokens, (S,) in fp32, differentiable.

    ``temperature`` divides the logits, as it does in sampling. ``chunk`` is how many positions go through the
    head at once; by default as many as keep the logits below 64 MiB (512 MiB on an accelerator).
    """
    hidden = hidden_states(model, batch).index_select(0, batch.src)
    return token_logps(hidden, head(model), batch.target, temperature=temperature, chunk=chunk)


def sum_by_owner(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """(S,) values of tokens -> (n,) sums over each completion's tokens."""
    return values.new_zeros(n).index_add(0, owner, values)


def reward_scores(model: nn.Module, batch: Batch, pooling: Pooling = "last") -> Tensor:
    """Raw scores of a sequence classifier with one label, (N,) in fp32, differentiable.

    ``last`` reads the hidden state of each completion's last token (as ``transformers`` does), ``mean`` the
    mean over its scored tokens.
    """
    hidden = hidden_states(model, batch)
    if pooling == "last":
        pooled = hidden.index_select(0, batch.last)
    elif pooling == "mean":
        states = hidden.index_select(0, batch.at)
        total = hidden.new_zeros(batch.n, hidden.shape[1]).index_add(0, batch.owner, states)
        pooled = total / batch.lengths[:, None].to(total.dtype)
    else:
        raise ValueError(f"unknown pooling {pooling!r}: choose last or mean")
    score: Any = unwrap(model).score
    return score(pooled.to(score.weight.dtype))[:, 0].float()


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The backbone's last hidden states, (T, hidden)."""
    backbone: Any = unwrap(model).base_model
    out = backbone(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, plan=batch.plan
    )
    return out.last_hidden_state[0]


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The ``transformers`` model inside a peft wrapper (adapters stay in place and active)."""
    outer: Any = model
    return outer.get_base_model() if hasattr(outer, "get_base_model") else outer


# Architectures that the tests compare with their own attention; others are compared when they are loaded.
_LLAMA_LIKE = ("llama", "qwen2", "qwen3", "qwen3_moe", "mistral", "granite", "phi3", "olmo2", "smollm3")
COMPARED = frozenset((*_LLAMA_LIKE, "cohere", "gemma2", "gemma3_text", "gpt_oss"))


@torch.no_grad()
def adopt(model: PreTrainedModel) -> None:
    """Switch a newly loaded model to our attention, and make sure that it still gives its own numbers.

    Raises :class:`InputError` for architectures that cannot run so: layers that are not attention, a head that
    is not linear, or outputs on a small tree that differ from the model's own.
    """
    if model.config.model_type in COMPARED:
        use_steerwell_attention(model)
        return
    refuse_other_layers(model)
    anything: Any = model.eval()
    rows = anything.get_input_embeddings().weight.shape[0]
    ids = [[(7 * i + 3) % rows for i in branch] for branch in ((0, 1, 2, 3, 4, 5), (0, 1, 2, 6, 7))]
    batch = tree([TokenizedGroup([Sequence(x, 3) for x in ids], CompletionGroup(()), [False, False])])
    batch = batch.to(anything.device)
    own = [anything.base_model(input_ids=_row(x, anything), use_cache=False) for x in ids]
    whole = torch.cat([out.last_hidden_state[0, 3:] for out in own])
    has_head = anything.get_output_embeddings() is not None
    logits = anything(input_ids=_row(ids[0], anything)).logits[0, 2:-1].float() if has_head else None
    use_steerwell_attention(model)
    errors = [_distance(hidden_states(model, batch).index_select(0, batch.at), whole)]
    if logits is not None:
        target = batch.target[batch.owner == 0]
        expected = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
        errors.append(_distance(per_token_logps(model, batch)[batch.owner == 0], expected))
    if not max(errors) < (1e-3 if whole.dtype == torch.float32 else 5e-2):
        raise InputError(
            f"{type(model).__name__} does not give its own numbers here (relative error {max(errors):.2g})",
            mend="Use another architecture (Llama, Qwen3, Mistral, Gemma, …).",
        )


def _row(ids: list[int], model: PreTrainedModel) -> Tensor:
    return torch.tensor([ids], device=model.device)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


@dataclass(frozen=True)
class Head:
    """The language-model head: ``logits = softcap(scale * (hidden @ weight.T + bias))``."""

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def head(model: nn.Module) -> Head:
    """The head of a causal language model, with its final softcap (Gemma 2) and scale (Cohere, Granite).

    Raises :class:`InputError` for a model without a plain linear head (an adapter on the head included).
    """
    inner = unwrap(model)
    layer: Any = inner.get_output_embeddings()
    if type(layer) is not nn.Linear:
        raise InputError(
            f"{type(inner).__name__} has no plain linear language-model head",
            mend="Load a causal language model, with adapters on the layers below its head only.",
        )
    config: Any = inner.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(layer.weight, layer.bias, scale, softcap)


def token_logps(
    hidden: Tensor, head: Head, target: Tensor, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Log-probabilities (S,) of ``target`` (S,) at ``hidden`` (S, E), through a chunked head.

    The log-sum-exp is in fp32 whatever the weights are in.
    """
    if chunk is None:
        budget = CHUNK_CPU if hidden.device.type == "cpu" else CHUNK_ACCELERATOR
        chunk = max(16, budget // head.weight.shape[0])
    return _HeadLogps.apply(
        hidden, head.weight, head.bias, target, head.scale, head.softcap, 1.0 / temperature, chunk
    )  # type: ignore[return-value]


def _logits(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factor: float,
    cap: float | None,
    inverse_temperature: float,
    out: Tensor | None,
) -> Tensor:
    """One chunk of logits in fp32 (or finer), (c, V); ``out`` is a buffer to write them to."""
    if out is not None:
        z = torch.mm(hidden, weight.t(), out=out[: len(hidden)])
    else:
        z = (hidden @ weight.t()).to(_working(weight))
    if bias is not None:
        z += bias
    if cap is not None:
        z = z.mul_(factor / cap).tanh_().mul_(cap * inverse_temperature)
    elif factor * inverse_temperature != 1.0:
        z *= factor * inverse_temperature
    return z


def _working(weight: Tensor) -> torch.dtype:
    return torch.promote_types(weight.dtype, torch.float32)


class _HeadLogps(torch.autograd.Function):
    """log softmax(head(hidden))[target] without the (S, V) logits.

    The forward pass keeps one log-sum-exp per position; the backward pass makes the probabilities again,
    chunk by chunk. When all positions fit into one chunk, they are kept instead.
    """

    @staticmethod
    def forward(ctx: Any, hidden, weight, bias, target, scale, cap, inverse_temperature, chunk):
        n = len(target)
        work = _working(weight)
        exact = weight.dtype == work
        buffer = hidden.new_empty(min(n, chunk), len(weight)) if exact else None
        logps = torch.empty(n, dtype=work, device=hidden.device)
        norm = torch.empty_like(logps)  # log-sum-exp
        kept = None
        for i in range(0, n, chunk):
            j = min(i + chunk, n)
            z = _logits(hidden[i:j], weight, bias, scale, cap, inverse_temperature, buffer)
            picked = z.gather(1, target[i:j, None])[:, 0]
            top = z.amax(1, keepdim=True)
            total = z.sub_(top).exp_().sum(1)
            norm[i:j] = total.log().add_(top[:, 0])
            logps[i:j] = picked - norm[i:j]
            if n <= chunk and cap is None and any(ctx.needs_input_grad[:3]):
                kept, norm = z, total  # unnormalised probabilities and their sums
        ctx.save_for_backward(hidden, weight, bias, target, norm, kept)
        ctx.settings = scale, cap, inverse_temperature, chunk
        return logps

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        hidden, weight, bias, target, norm, kept = ctx.saved_tensors
        scale, cap, inverse_temperature, chunk = ctx.settings
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        n, work = len(target), _working(weight)
        exact = weight.dtype == work
        g = (grad.to(work) * (scale * inverse_temperature))[:, None]
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        zeros = partial(torch.zeros, dtype=work, device=weight.device)
        d_weight = zeros(weight.shape) if need_weight else None
        d_bias = zeros(len(weight)) if need_bias else None
        buffer = hidden.new_empty(min(n, chunk), len(weight)) if exact and kept is None else None
        for i in range(0, n, chunk):
            j = min(i + chunk, n)
            h, y, gc = hidden[i:j], target[i:j, None], g[i:j]
            if kept is not None:
                p, row = kept, gc / norm[i:j, None]
            else:
                z = _logits(h, weight, bias, scale, cap, inverse_temperature, buffer)
                slope = None
                if cap is not None:  # derivative of the softcap, before z becomes probabilities
                    slope = 1 - (z / (cap * inverse_temperature)).square_()
                p, row = z.sub_(norm[i:j, None]).exp_(), gc
                if slope is not None:
                    hit = slope.gather(1, y)
                    p *= slope
            hit_row = gc if cap is None else gc * hit
            p = p.to(weight.dtype)
            if d_hidden is not None:
                d = (p @ weight).mul_(-row).add_(weight.index_select(0, y[:, 0]) * hit_row)
                d_hidden[i:j] = d
            if d_weight is not None:
                scaled = (h * row).to(weight.dtype)
                if exact:
                    d_weight.addmm_(p.t(), scaled, alpha=-1)
                else:
                    d_weight.sub_(p.t() @ scaled)
                d_weight.index_add_(0, y[:, 0], (h * hit_row).to(work))
            if d_bias is not None:
                d_bias.sub_((p.t() @ row.to(p.dtype))[:, 0]).index_add_(0, y[:, 0], hit_row[:, 0])
        cast = [None if d is None else d.to(weight.dtype) for d in (d_weight, d_bias)]
        return d_hidden, *cast, None, None, None, None, None


__all__ = [
    "COMPARED",
    "Head",
    "Pooling",
    "adopt",
    "head",
    "hidden_states",
    "per_token_logps",
    "reward_scores",
    "sum_by_owner",
    "token_logps",
    "unwrap",
]
