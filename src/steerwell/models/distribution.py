"""Figures of the whole next-token distribution at scored positions, in chunks: the full logits never exist at once.

S positions, V tokens in the vocabulary, E hidden sizes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.utils.checkpoint import checkpoint

from steerwell.models.batch import Batch
from steerwell.models.forward import hidden_states
from steerwell.models.head import CHUNK_ACCELERATOR, CHUNK_CPU, Head, head
from steerwell.models.sharding import inside


def predicting(model: nn.Module, batch: Batch) -> tuple[Tensor, Head]:
    """The hidden states (S, E) that scored tokens are predicted from, and the head that is on them now."""

    def run() -> tuple[Tensor, Head]:
        return hidden_states(model, batch).index_select(0, batch.src), head(model)

    return inside(model, run)


def collision(hidden: Tensor, on: Head, *, temperature: float = 1.0, chunk: int | None = None) -> Tensor:
    """Log of the sum of squared probabilities, (S,) in fp32 without gradient: of two tokens drawn there, the
    log-probability that they are the same. ``hidden`` (S, E); ``temperature`` divides the logits.
    """
    found = []
    with torch.no_grad():
        for few in hidden.split(chunk or _chunk(on)):
            found.append((2 * _log_probs(few, on, temperature)).logsumexp(1))
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def divergence(
    hidden: Tensor,
    on: Head,
    ref_hidden: Tensor,
    ref_on: Head,
    *,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """KL from the reference to the policy at each position, (S,) in nats and fp32: the expectation under the
    reference of log ref - log pi, over the vocabulary. ``hidden`` (S, E) of the policy and ``ref_hidden``
    (S, E') of the reference; differentiable with respect to the policy's, by chunks that are made again in the
    backward pass.
    """

    def part(own: Tensor, ref: Tensor) -> Tensor:
        with torch.no_grad():
            ref_logs = _log_probs(ref, ref_on, temperature)
        logs = _log_probs(own, on, temperature)
        return (ref_logs.exp() * (ref_logs - logs)).sum(1)

    size = chunk or _chunk(on)
    parts = zip(hidden.split(size), ref_hidden.split(size), strict=True)
    found = [checkpoint(part, own, ref, use_reentrant=False) for own, ref in parts]
    return torch.cat(found) if found else hidden.new_zeros(0, dtype=torch.float32)


def _log_probs(hidden: Tensor, on: Head, temperature: float) -> Tensor:
    """(c, E) -> (c, V) in fp32 (or finer), differentiable."""
    logits = linear(hidden.to(on.weight.dtype), on.weight, on.bias)
    for adapter in on.adapters:
        logits = logits + linear(adapter.project(hidden), adapter.up)
    logits = logits.to(torch.promote_types(on.weight.dtype, torch.float32)) * on.scale
    if on.softcap is not None:
        logits = torch.tanh(logits / on.softcap) * on.softcap
    return (logits / temperature).log_softmax(1)


def _chunk(on: Head) -> int:
    """Positions at once: two such blocks of logits lie side by side, and their gradients."""
    budget = CHUNK_CPU if on.weight.device.type == "cpu" else CHUNK_ACCELERATOR
    return max(16, budget // (4 * on.weight.shape[0]))


__all__ = ["collision", "divergence", "predicting"]
