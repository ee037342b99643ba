"""The sampler's attention plan: prompts packed into one row, then one new token per row from a static cache.

Shape letters: P prompts of a packed forward pass, T packed prompt tokens, R live rows (one per completion), L
slots that are visible, H query heads, Hkv key/value heads, D head size.

Rows are aligned to the right: the newest token of every row is in one common slot, so that a step writes one
slice, a sliding window is a slice, and new prompts may join while others are half way. What lies before the
first token of a row is masked. Rotary positions are already in the keys, so alignment changes no number.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention


class CachePlan:
    """What attention does during sampling, and the keys and values that it keeps.

    :meth:`admit` announces a forward pass over packed prompts, :meth:`step` one over the newest token of
    every live row; :meth:`drop` forgets rows that are done.
    """

    def __init__(self, rows: int, slots: int, device: torch.device) -> None:
        """Room for ``rows`` rows. ``slots`` must hold the longest row; with more, moves are rarer."""
        self.rows, self.slots, self.device = rows, slots, device
        self.live = 0
        self.slot = -1  # of the newest token
        self.first = 0  # slot of the oldest token of all live rows
        self.starts = torch.zeros(rows, dtype=torch.long, device=device)  # slot of each row's first token
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.block: _Block | None = None

    def admit(self, lengths: Sequence[int], copies: Sequence[int]) -> None:
        """The next forward pass reads P packed prompts, each for as many new rows as ``copies`` says.

        While rows are live, no prompt may be longer than they are.
        """
        if not self.live:
            self.slot, self.first = max(lengths) - 1, 0
        if max(lengths) > self.slot + 1 - self.first or self.live + sum(copies) > self.rows:
            raise ValueError("no room in the cache for these prompts")
        self.block = _Block(lengths, copies, self.live, self.device)
        new = torch.tensor([length for length, k in zip(lengths, copies, strict=True) for _ in range(k)])
        self.starts[self.live : self.live + len(new)] = self.slot + 1 - new.to(self.device)
        self.live += len(new)
        self._hide()

    def step(self) -> None:
        """The next forward pass reads one token of every live row."""
        self.block = None
        self.slot += 1
        if self.slot == self.slots:  # full: move everything to the left
            shift = self.first
            if not shift:
                raise ValueError("a row is longer than the cache")
            for cache in (x for layer in self.layers.values() for x in layer):
                cache[: self.live, :, :-shift] = cache[: self.live, :, shift:].clone()
            self.starts -= shift
            self.slot -= shift
            self._hide()

    def drop(self, holes: Tensor, movers: Tensor, live: int) -> None:
        """Keep ``live`` rows: rows ``movers`` (all ≥ live) take the places of rows ``holes`` (all < live)."""
        self.live = live
        if len(holes):
            for cache in (x for layer in self.layers.values() for x in layer):
                cache[holes, :, self.first : self.slot + 1] = cache[movers, :, self.first : self.slot + 1]
            self.starts[holes] = self.starts[movers]
        if live:
            self._hide()

    def _hide(self) -> None:
        """The first slot in use, and the additive mask (R, 1, 1, slots) over what lies before each row."""
        starts = self.starts[: self.live]
        self.first, last = (int(x) for x in starts.aminmax())
        self.mask: Tensor | None = None
        if last > self.first:
            hidden = torch.arange(self.slots, device=self.device) < starts[:, None]
            self.mask = torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)
            self.mask = self.mask[:, None, None]

    def attend(
        self,
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        sinks: Tensor | None = None,
        dropout: float = 0.0,
    ) -> Tensor:
        """Attention of one layer: (B, H, T, D), (B, Hkv, T, D) twice, to (B, T, H, D). Never drops out."""
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer: int = module.layer_idx  # type: ignore[assignment]
        if layer not in self.layers:
            room = (self.rows, key.shape[1], self.slots)
            self.layers[layer] = key.new_empty(*room, key.shape[-1]), value.new_empty(*room, value.shape[-1])
        keys, values = self.layers[layer]
        if self.block is not None:
            self.block.store(key, keys, self.first, self.slot + 1)
            self.block.store(value, values, self.first, self.slot + 1)
            return self.block.attend(query, key, value, scale, sliding_window, softcap, sinks)
        end = self.slot + 1
        start = self.first if not sliding_window else max(self.first, end - sliding_window)
        keys[: self.live, :, self.slot] = key[:, :, 0]
        values[: self.live, :, self.slot] = value[:, :, 0]
        mask = None if self.mask is None else self.mask[..., start:end]
        keys, values = keys[: self.live, :, start:end], values[: self.live, :, start:end]
        return _attend(query, keys, values, mask, scale, softcap, sinks)


class _Block:
    """Prompts packed into one row, and the ways from the packed order to the padded one and to the cache."""

    def __init__(self, lengths: Sequence[int], copies: Sequence[int], row: int, device: torch.device) -> None:
        self.longest, self.row = max(lengths), row
        self.length = torch.tensor(lengths, device=device)
        self.start = self.length.cumsum(0) - self.length
        rows = torch.tensor(copies, device=device)
        self.of = torch.arange(len(lengths), device=device).repeat_interleave(rows)  # new row -> prompt
        place = torch.arange(self.longest, device=device)
        self.real = place < self.length[:, None]  # (P, longest): prompts on the left
        self.padded = (self.start[:, None] + place).clamp_(max=int(self.length.sum()) - 1)
        self.aligned: Tensor | None = None

    def store(self, packed: Tensor, cache: Tensor, first: int, end: int) -> None:
        """Write packed keys or values (1, Hkv, T, D) into slots ``first`` to ``end`` of the new rows.

        Slots before a prompt's first token get that token: masked slots must hold finite numbers.
        """
        if self.aligned is None:
            slot = torch.arange(first - end, 0, device=packed.device) + self.length[:, None]
            self.aligned = (self.start[:, None] + slot.clamp_(min=0))[self.of]  # (new rows, end - first)
        rows = cache[self.row : self.row + len(self.of), :, first:end]
        rows.copy_(_gather(packed, self.aligned))

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scaling: float,
        window: int | None,
        softcap: float | None,
        sinks: Tensor | None,
    ) -> Tensor:
        """Each prompt attends to itself only. Packed (1, H, T, D) to (1, T, H, D).

        Prompts are laid out with padding on the right, which a causal mask hides from every real token.
        """
        query, key, value = (_gather(x, self.padded) for x in (query, key, value))
        hidden: Tensor | None = None
        if window and window < self.longest:
            place = torch.arange(self.longest, device=query.device)
            distance = place[:, None] - place
            hidden = (distance < 0) | (distance >= window)
        if softcap is None and sinks is None:
            seen = None if hidden is None else ~hidden
            group = query.shape[1] != key.shape[1]
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=group
            )
            return out.transpose(1, 2)[self.real][None]
        if hidden is None:
            hidden = torch.ones(self.longest, self.longest, dtype=torch.bool, device=query.device).triu(1)
        mask = torch.zeros(hidden.shape, device=query.device).masked_fill_(hidden, -torch.inf)
        return _attend(query, key, value, mask, scaling, softcap, sinks)[self.real][None]


def _gather(packed: Tensor, index: Tensor) -> Tensor:
    """Tokens (1, H, T, D) by an index (A, B) of packed positions, to (A, H, B, D)."""
    tokens = packed[0].transpose(0, 1).index_select(0, index.flatten())
    return tokens.unflatten(0, index.shape).transpose(1, 2)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Plain attention, (B, H, T, D) to (B, T, H, D); query heads share key heads without copies of the keys.

    ``mask`` is additive and broadcasts to (B, Hkv, T, L). A sink (one logit per head) takes part in the
    softmax and has no value. Two matrix products: one query per row is too little for the fused kernels.
    """
    rows, heads, tokens, size = query.shape
    shared = heads // key.shape[1]
    folded = (query * scaling).reshape(rows, key.shape[1], shared * tokens, size)
    scores = (folded @ key.transpose(2, 3)).float()
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores.unflatten(2, (shared, tokens)).add_(mask.unsqueeze(-3))
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        sink = sinks.float().view(key.shape[1], shared, 1, 1).expand(-1, -1, tokens, 1).flatten(1, 2)
        weights = torch.cat([scores, sink.expand(rows, -1, -1, -1)], -1).softmax(-1)[..., :-1]
    out = weights.to(value.dtype) @ value
    return out.view(rows, heads, tokens, value.shape[-1]).transpose(1, 2)


__all__ = ["CachePlan"]
