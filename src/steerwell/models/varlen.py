"""Attention over a tree in one variable-length call on CUDA: no padding, no mask.

Every node of a tree is a sequence to the kernel: its tokens are the queries, and its ancestors' tokens and its
own are the keys, gathered in the order of their depth. ``torch.nn.attention.varlen`` (torch >= 2.13) calls
FlashAttention 2, which aligns queries and keys at their ends: of k keys, query i of q may see those up to
i + k - q, and with a window (left, 0) only those from i + k - q - left on, both ends included (``mask.h`` in
ATen's ``flash_attn``: ``col_idx_limit_right = row_idx + 1 + max_seqlen_k - max_seqlen_q + window_size_right``).
That is the depth of the query in its sequence, so a branch sees its prompt and, causally, itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_HEAD = 256  # the widest head that the kernel takes


@dataclass(frozen=True)
class VarlenIndex:
    """Where the nodes' queries and keys begin, and which of the T tokens the keys are.

    ``key_index`` is None when every node is a root: then the keys are the T tokens as they lie.
    """

    query_starts: Tensor  # (n + 1,) int32
    key_starts: Tensor  # (n + 1,) int32
    n_queries: int  # of the longest node
    n_keys: int
    key_index: Tensor | None  # (all keys,)

    @classmethod
    def of(
        cls, nodes: Sequence[tuple[int, int, int, tuple[tuple[int, int], ...]]], device: torch.device
    ) -> VarlenIndex:
        """From nodes ``(offset, length, start, path)`` in flat order."""
        lengths = np.array([length for _, length, _, _ in nodes])
        sizes = np.array([start + length for _, length, start, _ in nodes])
        starts = [np.concatenate([[0], np.cumsum(x)]).astype(np.int32) for x in (lengths, sizes)]
        queries, keys = (torch.from_numpy(x).to(device) for x in starts)
        index = None
        if any(path for _, _, _, path in nodes):
            ranges = [r for offset, length, _, path in nodes for r in (*path, (offset, offset + length))]
            index = torch.from_numpy(np.concatenate([np.arange(a, b) for a, b in ranges])).to(device)
        return cls(queries, keys, int(lengths.max()), int(sizes.max()), index)


def takes(
    query: Tensor, key: Tensor, value: Tensor, softcap: float | None, sinks: Tensor | None, dropout: float
) -> bool:
    """Whether the kernel can do this: half precision on an Ampere GPU or newer, heads of a multiple of 8 up to
    256, and neither soft cap nor sinks nor dropout, which it does not know."""
    if not query.is_cuda or softcap is not None or sinks is not None or dropout:
        return False
    size = query.shape[-1]
    return (
        query.dtype in (torch.bfloat16, torch.float16)
        and query.dtype == key.dtype == value.dtype
        and size % 8 == 0
        and value.shape[-1] <= size <= MAX_HEAD
        and _new_enough(query.device.index or 0)
        and kernel() is not None
    )


@cache
def kernel() -> Callable[..., Any] | None:
    """The kernel of the installed torch; None where it is missing or of an older signature."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= known.keys() else None


@cache
def _new_enough(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device)[0] >= 8


def attend(
    index: VarlenIndex, query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None
) -> Tensor:
    """Query (T, H, D), key (T, Hkv, D), value (T, Hkv, Dv) -> (T, H, Dv). A window counts the query itself."""
    narrow = value.shape[-1]
    if narrow < query.shape[-1]:  # the kernel wants values as wide as keys
        value = F.pad(value, (0, query.shape[-1] - narrow))
    if index.key_index is not None:
        key, value = (gather(x, index.key_index) for x in (key, value))
    call = kernel()
    assert call is not None
    out = call(
        query,
        key,
        value,
        index.query_starts,
        index.key_starts,
        index.n_queries,
        index.n_keys,
        scale=scaling,
        window_size=(-1, 0) if window is None or window >= index.n_keys else (int(window) - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[..., :narrow]


def gather(tokens: Tensor, index: Tensor) -> Tensor:
    """``tokens[index]``. The gradients of a token that many branches see are added up in fp32."""
    return _Gather.apply(tokens, index)  # type: ignore[return-value]


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens, index):
        ctx.save_for_backward(index)
        ctx.like = tokens.shape, tokens.dtype
        return tokens.index_select(0, index)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor):
        (index,) = ctx.saved_tensors
        shape, dtype = ctx.like
        work = torch.promote_types(dtype, torch.float32)
        total = torch.zeros(shape, dtype=work, device=grad.device)
        return total.index_add_(0, index, grad.to(work)).to(dtype), None


__all__ = ["VarlenIndex", "attend", "gather", "kernel", "takes"]
