"""Sampling from models that carry a state along the sequence: recurrent, linear-attention, convolutional layers.

Their state cannot be packed, so rows that are read together have prompts of one length and stay in step; a row
that has finished leaves. The model keeps its own attention and its own cache. Some caches do not continue with
the numbers of a whole reading (or there is none): this is found out beforehand on a few tokens, and then every
step reads all tokens again, which is slow and right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from steerwell.models.attention import unwrap

# (R, V) logits, row numbers (R,), tokens drawn so far (R,) -> the next tokens (R,), and which rows they end (R,)
Pick = Callable[[Tensor, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def run_in_step(
    model: nn.Module, prompts: Sequence[Sequence[int]], n: int, batch_size: int, pick: Pick
) -> None:
    """Sample ``n`` rows of every prompt, ``batch_size`` at a time; row p * n + k is sample k of prompt p."""
    device = next(model.parameters()).device
    reader = _Cached if _cache_is_exact(model) else _Whole
    for rows in _blocks([len(ids) for ids in prompts], n, batch_size):
        each, prompt_of = np.unique(rows // n, return_inverse=True)
        ids = torch.tensor([list(prompts[p]) for p in each], device=device)
        reading = reader(model, ids)
        logits = reading.choose(torch.from_numpy(prompt_of).to(device))
        drawn = np.zeros(len(rows), dtype=np.int64)
        while True:
            token, over = pick(logits, rows, drawn)
            left = np.flatnonzero(~over)
            if not len(left):
                break
            if len(left) < len(rows):
                reading.choose(torch.from_numpy(left).to(device))
            rows, drawn = rows[left], drawn[left] + 1
            logits = reading.step(torch.from_numpy(token[left]).to(device)[:, None])


def _blocks(lengths: Sequence[int], n: int, batch_size: int) -> Iterator[np.ndarray]:
    """Row numbers that are read together: prompts of one length, longest first."""
    for length in sorted(set(lengths), reverse=True):
        rows = np.array([p * n + k for p, found in enumerate(lengths) if found == length for k in range(n)])
        for first in range(0, len(rows), batch_size):
            yield rows[first : first + batch_size]


class _Cached:
    """Rows in step through the model's own cache."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model: Any = model
        self._read(input_ids=ids)

    def _read(self, **inputs: Any) -> Tensor:
        out = self.model(**inputs, use_cache=True, logits_to_keep=1)
        self.cache, self.logits = out.past_key_values, out.logits[:, -1]
        return self.logits

    def choose(self, index: Tensor) -> Tensor:
        """Go on with these rows, which may be fewer or come several times; the logits of their last tokens."""
        self.cache.reorder_cache(index)
        self.logits = self.logits[index]
        return self.logits

    def step(self, token: Tensor) -> Tensor:
        """One more token (R, 1) for every row; logits (R, V)."""
        return self._read(input_ids=token, past_key_values=self.cache)


class _Whole:
    """Rows in step, read from their first token again each time."""

    def __init__(self, model: nn.Module, ids: Tensor) -> None:
        self.model: Any = model
        self.ids = ids[:, :0]
        self.step(ids)

    def choose(self, index: Tensor) -> Tensor:
        self.ids, self.logits = self.ids[index], self.logits[index]
        return self.logits

    def step(self, token: Tensor) -> Tensor:
        self.ids = torch.cat([self.ids, token], 1)
        self.logits = self.model(input_ids=self.ids, use_cache=False, logits_to_keep=1).logits[:, -1]
        return self.logits


def _cache_is_exact(model: nn.Module) -> bool:
    """Whether the model's cache gives the logits of a whole reading, on prompts of one and of seven tokens."""
    inner: Any = unwrap(model)
    rows, device = inner.get_input_embeddings().weight.shape[0], inner.device
    ids = torch.tensor([[(5 * i + 3) % rows for i in range(11)], [(7 * i + 2) % rows for i in range(11)]])
    ids = ids.to(device)
    order = torch.tensor([1, 0, 1], device=device)
    for length in (1, 7):
        found = expected = torch.zeros(1)
        whole = _Whole(model, ids[:, :length])
        try:
            cached = _Cached(model, ids[:, :length])
            cached.choose(order)
            whole.choose(order)
            for i in range(length, 11):
                found, expected = (reading.step(ids[order, i : i + 1]) for reading in (cached, whole))
        except (AttributeError, IndexError, NotImplementedError, TypeError, ValueError):
            return False
        error = (found - expected).float().norm() / expected.float().norm()
        if not error < (1e-4 if found.dtype == torch.float32 else 5e-2):
            return False
    return True


__all__ = ["run_in_step"]
