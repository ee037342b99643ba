"""From a batch to the tensors that objectives ask for by name: log-probs or scores of the model in training,
log-probs of the reference, the targets of the items, and KTO's estimate over mismatched completions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.models.batch import Layout, build, layout_for, pack
from steerwell.models.forward import Pooling, per_token_logps, reward_scores, sum_by_owner
from steerwell.models.render import Sequence as TokenSequence
from steerwell.models.render import TokenizedGroup
from steerwell.train.items import Item, gather, scored_tokens

REFERENCE_NAMES = frozenset({"ref_logps", "ref_per_token_logps"})


@dataclass(frozen=True)
class Reference:
    """The frozen model that log-ratios are taken against. With ``adapter_off`` it is the model in training
    with its adapter switched off; else ``model`` is one of its own. ``kind`` and ``digest`` go into
    ``run.json``.
    """

    kind: str  # start | policy | none
    digest: str = ""
    model: Any = None
    adapter_off: bool = False

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model, without gradient, while it is used as the reference."""
        off = self.model.disable_adapter() if self.adapter_off else nullcontext()
        with torch.no_grad(), off:
            yield self.model


@dataclass(frozen=True)
class Provider:
    """Makes named tensors for micro-batches. ``temperature`` divides the logits of every log-prob alike."""

    model: Any
    names: frozenset[str]
    reference: Reference
    max_tokens: int
    layout: Any
    pooling: Pooling
    device: torch.device
    temperature: float = 1.0
    limit: int | None = None  # most tokens of prompt and completion together

    def micro_batches(self, items: Sequence[Item]) -> list[list[Item]]:
        """Items cut under the token budget, whole groups, an over-long one alone."""
        packed = pack([item.tokens for item in items], self.max_tokens, self._layout())
        return [[items[i] for i in members] for members in packed]

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """What the items hold, as tensors; enough to count denominators before any forward pass."""
        return gather(items, set(self.names), self.device)

    def tensors(self, items: Sequence[Item], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The targets and everything that takes a forward pass, for one micro-batch."""
        batch = self._build(items)
        out = dict(targets)
        if "scores" in self.names:
            out["scores"] = reward_scores(self.model, batch, self.pooling)
            return out
        logps = per_token_logps(self.model, batch, temperature=self.temperature)
        out["per_token_logps"], out["owner"] = logps, batch.owner
        out["logps"] = sum_by_owner(logps, batch.owner, batch.n)
        if "old_logps" in self.names:
            out["old_logps"] = sum_by_owner(targets["old_per_token_logps"], batch.owner, batch.n)
        if self.names & REFERENCE_NAMES and not REFERENCE_NAMES & targets.keys():
            with self.reference.active() as model:
                ref = per_token_logps(model, batch, temperature=self.temperature)
            out["ref_per_token_logps"] = ref
            out["ref_logps"] = sum_by_owner(ref, batch.owner, batch.n)
        return out

    def fill_reference(self, items: Sequence[Item], progress: Any = None) -> None:
        """Compute the reference log-probs of recorded items once and keep them with the items."""
        done = 0
        with self.reference.active() as model:
            for members in self.micro_batches(items):
                batch = self._build(members)
                ref = per_token_logps(model, batch, temperature=self.temperature)
                sums = iter(sum_by_owner(ref, batch.owner, batch.n).tolist())
                tokens = ref.tolist() if "ref_per_token_logps" in self.names else []
                for item in members:
                    item.ref_logps = [next(sums) for _ in item.lengths]
                    count = sum(item.lengths)
                    item.ref_per_token_logps, tokens = tokens[:count], tokens[count:]
                done += len(members)
                if progress is not None:
                    progress("reference", done, len(items), "")

    def mismatched_kl(self, items: Sequence[Item]) -> Tensor:
        """KTO's reference point (arXiv:2402.01306, section 4.1): the mean log-ratio of completions under the
        prompt of the next group with another prompt, over the whole step, without gradient, at least 0.

        0 where all groups of the step have one and the same prompt. Differs from the paper in that the mean
        is over an optimizer step instead of a micro-batch.
        """
        moved = _mismatch(items, self.limit)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for members in self.micro_batches(moved):
            batch = self._build(members)
            with torch.no_grad():
                mine = per_token_logps(self.model, batch, temperature=self.temperature)
            with self.reference.active() as model:
                ref = per_token_logps(model, batch, temperature=self.temperature)
            total += (mine - ref).double().sum()
        count = sum(len(item.lengths) for item in moved)
        return (total / max(1, count)).clamp(min=0).float()

    def _build(self, items: Sequence[Item]) -> Any:
        return build([item.tokens for item in items], self._layout()).to(self.device)

    def _layout(self) -> Layout:
        """The layout that the model in training and the reference can both take."""
        reference = self.reference.model
        return layout_for(self.layout, self.model, *(() if reference is None else (reference,)))


def _mismatch(items: Sequence[Item], limit: int | None) -> list[Item]:
    moved: list[Item] = []
    for i, item in enumerate(items):
        others = [*items[i + 1 :], *items[:i]]
        other = next((o for o in others if o.prompt_id != item.prompt_id), None)
        if other is None:
            continue
        first = other.tokens.sequences[0]
        prompt = list(first.ids[: first.n_prompt])
        sequences = [
            _under(prompt, own, limit)
            for own in item.tokens.sequences
            if limit is None or limit > len(prompt)
        ]
        if sequences:
            tokens = TokenizedGroup(sequences, item.tokens.group, [False] * len(sequences))
            moved.append(replace(item, tokens=tokens, lengths=[scored_tokens(s) for s in sequences]))
    return moved


def _under(prompt: list[int], own: TokenSequence, limit: int | None) -> TokenSequence:
    """The completion of ``own`` under another prompt, cut to ``limit`` tokens in all."""
    shift = len(prompt) - own.n_prompt
    ids = (prompt + list(own.ids[own.n_prompt :]))[:limit]
    spans = [(a + shift, min(b + shift, len(ids))) for a, b in own.unscored if a + shift < len(ids)]
    return TokenSequence(ids, len(prompt), tuple(spans))


def check_mismatch(items: Sequence[Item], batch_size: int) -> None:
    """Raise :class:`InputError` when no step could hold two different prompts, as KTO's ``kl`` needs."""
    if batch_size < 2 or len({item.prompt_id for item in items}) < 2:
        raise InputError(
            "kto compares completions with prompts of other groups, and no step has two prompts",
            mend="Use batch_size = 2 or more, and data with at least two prompts.",
        )


__all__ = ["REFERENCE_NAMES", "Provider", "Reference", "check_mismatch"]
