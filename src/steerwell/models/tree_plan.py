"""The plan of a batch in training and scoring: completions branch from shared prompts, rows do not branch.

A tree is cut into *nodes*: runs of tokens without a branch. The queries of a node see the keys of its
ancestors and, causally, its own; nothing else. So no T×T mask is ever made. Nodes of similar size are padded
into one call, because many small calls cost more than a little padding; a large node gets a call of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steerwell.models import varlen
from steerwell.models.varlen import VarlenIndex

# What one more attention call costs, counted in scores (query × key) that could be computed meanwhile.
CALL_COST = 4096


class Node(NamedTuple):
    """A run of tokens without a branch: ``length`` tokens from flat position ``offset`` and depth ``start``.

    ``path`` holds the flat ranges ``(from, to)`` of all its ancestors' tokens, root first.
    """

    offset: int
    length: int
    start: int
    path: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class _Call:
    """One padded attention call for n nodes; ``pieces`` is set when n is 1 (slices, not gathers)."""

    starts: Tensor  # (n,) depth of the first query
    sizes: Tensor  # (n,) number of keys
    n_queries: int
    n_keys: int
    query_index: Tensor | None = None  # (n * n_queries,)
    key_index: Tensor | None = None  # (n * n_keys,)
    pieces: tuple[int, ...] = ()  # which pieces of the split are the keys; the last one is the queries too
    masks: dict[Any, Tensor | None] = field(default_factory=dict)

    def to(self, device: torch.device | str) -> _Call:
        query, key = (None if x is None else x.to(device) for x in (self.query_index, self.key_index))
        starts, sizes = self.starts.to(device), self.sizes.to(device)
        return _Call(starts, sizes, self.n_queries, self.n_keys, query, key, self.pieces)

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """(n, 1, queries, keys): 0 where seen, -inf elsewhere; None when plain causal attention does."""
        window = None if window is None or window >= self.n_keys else int(window)
        if (window, dtype) not in self.masks:
            root = bool(self.pieces) and self.n_queries == self.n_keys
            self.masks[window, dtype] = None if root and window is None else self._make_mask(window, dtype)
        return self.masks[window, dtype]

    def _make_mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        device = self.starts.device
        at = self.starts[:, None] + torch.arange(self.n_queries, device=device)
        # a padded query sees what the last one sees, so that no row of the mask is empty
        at = torch.minimum(at, self.sizes[:, None] - 1)[:, :, None]
        key = torch.arange(self.n_keys, device=device)
        seen = key <= at
        if window is not None:
            seen &= key > at - window
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)[:, None]


class TreePlan:
    """Attention over packed trees of T tokens; rows are trees without branches.

    Made once per batch from its nodes, which must cover the T tokens in flat order, parents before children.
    On CUDA in half precision one variable-length call does it all (:mod:`~steerwell.models.varlen`).
    """

    def __init__(self, nodes: Sequence[Node], device: torch.device | str = "cpu") -> None:
        self.nodes, self.device = list(nodes), torch.device(device)
        self.n_tokens = sum(node.length for node in nodes)

    def to(self, device: torch.device | str) -> TreePlan:
        """The same plan with its index tensors on ``device``."""
        return TreePlan(self.nodes, device)

    @cached_property
    def varlen(self) -> VarlenIndex:
        """What one variable-length call needs to know."""
        return VarlenIndex.of(self.nodes, self.device)

    @cached_property
    def padded(self) -> _PaddedCalls:
        """The same as padded calls."""
        return _PaddedCalls(self.nodes, self.device)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Query (1, H, T, D), key (1, Hkv, T, D), value (1, Hkv, T, Dv) -> (1, T, H, Dv)."""
        if query.shape[0] != 1 or query.shape[2] != self.n_tokens or key.shape[2] != self.n_tokens:
            raise RuntimeError(
                f"the plan is for one row of {self.n_tokens} tokens, the model gave queries "
                f"{tuple(query.shape)} and keys {tuple(key.shape)}"
            )
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, D)
        if varlen.takes(q, k, v, softcap, sinks, dropout):
            return varlen.attend(self.varlen, q, k, v, scaling, sliding_window)[None]
        return self.padded.attend(q, k, v, scaling, sliding_window, softcap, sinks, dropout)[None]


class _PaddedCalls:
    """Attention in padded calls, for a CPU and for what the variable-length kernel does not take.

    Masks are made on first use and shared by all layers.
    """

    def __init__(self, nodes: Sequence[Node], device: torch.device) -> None:
        self.n_tokens = sum(node.length for node in nodes)
        self.calls: list[_Call] = []
        self.sizes: list[int] = []  # how to split T for the calls of one node each
        self.inverse: Tensor | None = None  # where each token's output lies after all calls
        self._make_calls(nodes)
        if device.type != "cpu":
            self.calls = [call.to(device) for call in self.calls]
            self.inverse = None if self.inverse is None else self.inverse.to(device)

    def _make_calls(self, nodes: Sequence[Node]) -> None:
        buckets = _buckets([(node.length, node.start + node.length) for node in nodes])
        alone = sorted(bucket[0] for bucket in buckets if len(bucket) == 1)
        spans = {span for i in alone for span in (*nodes[i].path, _own(nodes[i]))}
        if spans:
            cuts = sorted({0, self.n_tokens, *(edge for span in spans for edge in span)})
            self.sizes = [b - a for a, b in pairwise(cuts)]
            first = {cut: i for i, cut in enumerate(cuts)}
            for i in alone:
                node = nodes[i]
                ranges = [range(first[a], first[b]) for a, b in node.path]
                # a node's own range is whole: paths of other nodes hold whole nodes too
                pieces = (*(j for r in ranges for j in r), first[node.offset])
                call = _call([node])
                call.pieces = pieces
                self.calls.append(call)
        grouped = [[nodes[i] for i in bucket] for bucket in buckets if len(bucket) > 1]
        self.calls += [_gathered(members) for members in grouped]
        done = [nodes[i] for i in alone]
        if grouped or any(a.offset > b.offset for a, b in pairwise(done)):
            self.inverse = torch.from_numpy(_inverse(done, grouped, self.n_tokens))

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float | None,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
        dropout: float,
    ) -> Tensor:
        """Query (T, H, D), key (T, Hkv, D), value (T, Hkv, Dv) -> (T, H, Dv)."""
        pieces = [x.split(self.sizes) for x in (q, k, v)] if self.sizes else None
        outs = []
        for call in self.calls:
            if call.pieces:
                assert pieces is not None
                seen = [torch.cat([x[i] for i in call.pieces]) for x in pieces[1:]]
                parts = [x[None] for x in (pieces[0][call.pieces[-1]], *seen)]
            else:
                assert call.query_index is not None
                assert call.key_index is not None
                n = len(call.starts)
                index = (call.query_index, call.key_index, call.key_index)
                parts = [
                    x.index_select(0, i).view(n, len(i) // n, *x.shape[1:])
                    for x, i in zip((q, k, v), index, strict=True)
                ]
            mask = call.mask(window, q.dtype)
            out = _attention(*(x.transpose(1, 2) for x in parts), mask, scaling, softcap, sinks, dropout)
            outs.append(out.transpose(1, 2).flatten(0, 1))
        flat = torch.cat(outs) if len(outs) > 1 else outs[0]
        return flat if self.inverse is None else flat.index_select(0, self.inverse)


def _own(node: Node) -> tuple[int, int]:
    return node.offset, node.offset + node.length


def _buckets(shapes: Sequence[tuple[int, int]]) -> list[list[int]]:
    """Which nodes, of (queries, keys) each, share a call: largest first, while padding costs less."""
    order = sorted(range(len(shapes)), key=lambda i: (-shapes[i][0] * shapes[i][1], -shapes[i][1], i))
    buckets: list[list[int]] = []
    n_queries = n_keys = useful = 0
    for i in order:
        q, k = max(n_queries, shapes[i][0]), max(n_keys, shapes[i][1])
        area = shapes[i][0] * shapes[i][1]
        if buckets:
            n = len(buckets[-1]) + 1
            if n * q * k - useful - area <= CALL_COST * (n - 1):
                buckets[-1].append(i)
                n_queries, n_keys, useful = q, k, useful + area
                continue
        buckets.append([i])
        (n_queries, n_keys), useful = shapes[i], area
    return buckets


def _call(nodes: Sequence[Node]) -> _Call:
    starts = torch.tensor([node.start for node in nodes])
    lengths = torch.tensor([node.length for node in nodes])
    return _Call(starts, starts + lengths, int(lengths.max()), int((starts + lengths).max()))


def _gathered(nodes: Sequence[Node]) -> _Call:
    """A call for several nodes; indices beyond a node's end repeat its last token and are masked."""
    call = _call(nodes)
    queries = np.arange(call.n_queries)
    lengths = np.array([node.length for node in nodes])
    offsets = np.array([node.offset for node in nodes])
    query_index = offsets[:, None] + np.minimum(queries, lengths[:, None] - 1)
    key_index = np.empty((len(nodes), call.n_keys), dtype=np.int64)
    for row, node in zip(key_index, nodes, strict=True):
        at = 0
        for a, b in (*node.path, _own(node)):
            row[at : at + b - a] = np.arange(a, b)
            at += b - a
        row[at:] = row[at - 1]
    call.query_index = torch.from_numpy(query_index.reshape(-1))
    call.key_index = torch.from_numpy(key_index.reshape(-1))
    return call


def _inverse(alone: Sequence[Node], grouped: Sequence[Sequence[Node]], n_tokens: int) -> np.ndarray:
    """For each token, where its output lies when the calls' outputs are laid end to end."""
    inverse = np.empty(n_tokens, dtype=np.int64)
    at = 0
    for node in alone:
        inverse[slice(*_own(node))] = np.arange(at, at + node.length)
        at += node.length
    for members in grouped:
        longest = max(node.length for node in members)
        for node in members:
            inverse[slice(*_own(node))] = np.arange(at, at + node.length)
            at += longest
    return inverse


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scaling: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """(n, H, Tq, D), (n, Hkv, Tk, D) -> (n, H, Tq, Dv). No mask means causal, with Tq equal to Tk."""
    if softcap is None and sinks is None:
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, mask, dropout, mask is None, scale=scaling, enable_gqa=grouped
        )
    repeat = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    scores = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = torch.full(scores.shape[2:], -torch.inf, dtype=q.dtype, device=q.device).triu(1)
    scores = scores + mask
    if sinks is not None:
        column = sinks.view(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
        scores = torch.cat([scores, column.to(scores.dtype)], -1)
    weights = scores.softmax(-1, dtype=torch.float32).to(v.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    return F.dropout(weights, dropout) @ v


__all__ = ["Node", "TreePlan"]
