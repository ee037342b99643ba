"""From a batch to the tensors that objectives ask for by name: log-probs or scores of the model in training,
log-probs of the reference, the targets of the items, and KTO's estimate over mismatched completions.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.models.batch import Layout, build, layout_for, pack
from steerwell.models.distribution import collision, divergence, predicting
from steerwell.models.encoder import score_layer
from steerwell.models.forward import head_outputs, per_token_logps, sum_by_owner, token_logps, unwrap
from steerwell.models.render import Sequence as TokenSequence
from steerwell.models.render import TokenizedGroup
from steerwell.models.scoring import ScoringRecipe, combined
from steerwell.models.sharding import inside, whole_to_train
from steerwell.models.step_scores import step_scores
from steerwell.train.item_file import keep_reference
from steerwell.train.items import Item, gather, scored_tokens
from steerwell.train.ranks import ALONE, Ranks
from steerwell.train.reference import REFERENCE_NAMES, Kept, Reference, group_key, reference_key

#: Tensors that are read off the policy's whole distribution at a position.
DISTRIBUTION_NAMES = frozenset({"per_token_kl", "per_token_collision"})
#: Items whose reference log-probs are in memory at once.
REFERENCE_AT_ONCE = 1024


@dataclass(frozen=True)
class MicroBatch:
    """Items that go through the model together. One that is not ``live`` keeps this process in step with others
    that have more to do: its results count nothing.
    """

    items: list[Item]
    live: bool = True


@dataclass(frozen=True)
class Provider:
    """Makes named tensors for micro-batches. ``temperature`` divides the logits of every log-prob alike."""

    model: Any
    names: frozenset[str]
    reference: Reference
    max_tokens: int
    layout: Any
    device: torch.device
    temperature: float = 1.0
    limit: int | None = None  # most tokens of prompt and completion together
    ranks: Ranks = ALONE
    precision: str = ""  # what log-probs are computed in; part of what they are filed under
    scoring: ScoringRecipe | None = None  # of a reward model in training

    def micro_batches(self, items: Sequence[Item]) -> list[MicroBatch]:
        """This process's share of the items, cut under the token budget: whole groups, an over-long one alone.

        Every process gets equally many.
        """
        mine = [items[i] for i in self.ranks.share([item.size for item in items])]
        packed = pack([item.tokens for item in mine], self.max_tokens, self.layout_of_models())
        found = [MicroBatch([mine[i] for i in members]) for members in packed]
        if not self.ranks.alone and items:
            idle = MicroBatch([min(items, key=lambda item: item.size)], live=False)
            found += [idle] * (max(self.ranks.gather(len(found))) - len(found))
        return found

    def targets(self, items: Sequence[Item]) -> dict[str, Tensor]:
        """What the items hold, as tensors; enough to count denominators before any forward pass."""
        # A sum over a completion, rounded to float32, is off by a millionth of a nat: too much beside float64.
        fine = torch.float64 if self.precision == "float64" else torch.float32
        return gather(items, set(self.names), self.device, fine)

    def tensors(self, items: Sequence[Item], targets: dict[str, Tensor]) -> dict[str, Tensor]:
        """The targets and everything that takes a forward pass, for one micro-batch."""
        batch = self.batch(items)
        out = dict(targets)
        if self.scoring is not None:
            if "step_scores" in self.names:
                out["step_scores"], _ = step_scores(self.model, batch, targets["steps"])
            if "step_scores" not in self.names or self.names & {"scores", "head_scores", "head_weights"}:
                out |= self.head_tensors(batch)
            return out
        logps = (
            self._policy(batch, out) if self.names & DISTRIBUTION_NAMES else self._logps(self.model, batch)
        )
        out["per_token_logps"], out["owner"] = logps, batch.owner
        out["logps"] = sum_by_owner(logps, batch.owner, batch.n)
        if "old_logps" in self.names:
            out["old_logps"] = sum_by_owner(targets["old_per_token_logps"], batch.owner, batch.n)
        if self.names & REFERENCE_NAMES and not REFERENCE_NAMES & targets.keys():
            with self.reference.active() as model:
                ref = self._logps(model, batch)
            out["ref_per_token_logps"] = ref
            out["ref_logps"] = sum_by_owner(ref, batch.owner, batch.n)
        return out

    def head_tensors(self, batch: Any) -> dict[str, Tensor]:
        """What a reward model's head says of a batch: ``head_scores`` (N, H) and ``scores`` (N,); where they are asked
        for also its weights.
        """
        assert self.scoring is not None
        found, gate = head_outputs(self.model, batch, self.scoring.pooling, gated=self.scoring.gate)
        out = {"head_scores": found, "scores": combined(found, self.scoring, gate)}
        if "head_weights" in self.names:
            layer = score_layer(unwrap(self.model))
            out["head_weights"] = inside(self.model, lambda: whole_to_train(layer.weight).float().clone())
        return out

    def logps(self, items: Sequence[Item]) -> tuple[Tensor, Tensor]:
        """Log-probs of the scored tokens under the model in training, and whose they are, (S,) each."""
        batch = self.batch(items)
        return self._logps(self.model, batch), batch.owner

    def _logps(self, model: Any, batch: Any) -> Tensor:
        return per_token_logps(model, batch, temperature=self.temperature)

    def _policy(self, batch: Any, out: dict[str, Tensor]) -> Tensor:
        """Log-probs of the policy; what is asked of its whole distribution goes into ``out``."""
        heat = self.temperature

        def run() -> Tensor:
            hidden, on = predicting(self.model, batch)
            if "per_token_collision" in self.names:
                out["per_token_collision"] = collision(hidden, on, temperature=heat)
            if "per_token_kl" in self.names:
                with self.reference.active() as model:
                    ref = predicting(model, batch)
                out["per_token_kl"] = inside(
                    self.reference.model, lambda: divergence(hidden, on, *ref, temperature=heat)
                )
            return token_logps(hidden, on, batch.target, temperature=heat)

        return inside(self.model, run)

    def fill_reference(
        self, items: Sequence[Item], files: Sequence[Kept] = (), progress: Any = None
    ) -> dict[str, int]:
        """Give recorded items the log-probs of the reference: from the first of ``files`` that knows them, else
        computed; then all files know them. Returns how many different groups there are and how many were computed.

        It goes by parts, so that no more than a part is in memory. A group that several items of a part have is
        computed once; with ``files``, one of an earlier part too.
        """
        filed = reference_key(self.reference.weights, self.temperature, self.precision)
        seen, computed = array("Q"), 0  # eight bytes of each key tell groups apart well enough to count them
        for start in range(0, len(items), REFERENCE_AT_ONCE):
            rest = max(0, len(items) - start - REFERENCE_AT_ONCE)
            told = None if progress is None else _further(progress, computed, rest)
            keys, todo = self._fill_part(items, start, filed, files, told, more=rest > 0)
            seen.frombytes(b"".join(key[:8] for key in keys))
            computed += todo
        return {"groups": len(np.unique(np.frombuffer(seen, dtype=np.uint64))), "computed": computed}

    def _fill_part(
        self,
        items: Sequence[Item],
        start: int,
        filed: str,
        files: Sequence[Kept],
        progress: Any,
        *,
        more: bool,
    ) -> tuple[list[bytes], int]:
        """Fill the items from ``start`` on; returns their keys, and how many groups were computed."""
        part = items[start : start + REFERENCE_AT_ONCE]
        keys = [group_key(item.tokens) for item in part]
        of = dict(zip(keys, part, strict=True))
        known = self.ranks.first(lambda: _look_up(files, filed, of))
        todo = [key for key in of if key not in known]
        for found in self.ranks.gather(self._reference_logps([of[key] for key in todo], progress)):
            known |= found
        if self.ranks.writes:
            for file in files:
                file.put(filed, known, more=more)
        for i, (key, item) in enumerate(zip(keys, part, strict=True), start):
            item.ref_logps = [math.fsum(own) for own in _cut(known[key], item.lengths)]
            item.ref_per_token_logps = known[key] if "ref_per_token_logps" in self.names else []
            keep_reference(items, i, item)
        return keys, len(todo)

    def _reference_logps(self, items: Sequence[Item], progress: Any) -> dict[bytes, list[float]]:
        """By group, the reference's log-probs of the scored tokens of this process's share of ``items``."""
        found: dict[bytes, list[float]] = {}
        with self.reference.active() as model:
            for part in self.micro_batches(items):
                # in the type that files keep, so that a run that computes them and one that reads them agree
                logps = self._logps(model, self.batch(part.items)).float().tolist()
                if part.live:
                    for item, own in zip(
                        part.items, _cut(logps, [sum(i.lengths) for i in part.items]), strict=True
                    ):
                        found[group_key(item.tokens)] = own
                    if progress is not None:
                        progress("reference", min(len(items), len(found) * self.ranks.size), len(items), "")
        return found

    def mismatched_kl(self, items: Sequence[Item]) -> Tensor:
        """KTO's reference point (arXiv:2402.01306, section 4.1): the mean log-ratio of completions under the
        prompt of the next group with another prompt, over the whole step, without gradient, at least 0.

        0 where all groups of the step have one and the same prompt. Differs from the paper in that the mean
        is over an optimizer step instead of a micro-batch.
        """
        moved = _mismatch(items, self.limit)
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self.micro_batches(moved):
            batch = self.batch(part.items)
            with torch.no_grad():
                mine = per_token_logps(self.model, batch, temperature=self.temperature)
            with self.reference.active() as model:
                ref = per_token_logps(model, batch, temperature=self.temperature)
            if part.live:
                total += (mine - ref).double().sum()
        if not self.ranks.alone:
            total = torch.tensor(sum(self.ranks.gather(total.item())), device=self.device)
        count = sum(len(item.lengths) for item in moved)
        return (total / max(1, count)).clamp(min=0).float()

    def batch(self, items: Sequence[Item]) -> Any:
        """The items packed in one batch, on the device of the model."""
        return build([item.tokens for item in items], self.layout_of_models()).to(self.device)

    def layout_of_models(self) -> Layout:
        """The layout that the model in training and the reference can both take."""
        reference = self.reference.model
        return layout_for(self.layout, self.model, *(() if reference is None else (reference,)))


def _further(progress: Any, before: int, rest: int) -> Any:
    """Progress of a part, told as that of the whole: ``before`` were done before it, at most ``rest`` come after."""
    return lambda stage, done, total, note: progress(stage, before + done, before + total + rest, note)


def _look_up(files: Sequence[Kept], reference: str, items: Mapping[bytes, Item]) -> dict[bytes, list[float]]:
    """What the files know; a value of another length than the group's scored tokens is not believed."""
    found: dict[bytes, list[float]] = {}
    for file in files:
        found |= file.get(reference, [key for key in items if key not in found])
    return {key: values for key, values in found.items() if len(values) == sum(items[key].lengths)}


def _cut(values: list[float], lengths: Sequence[int]) -> Iterator[list[float]]:
    """A list cut into consecutive parts."""
    start = 0
    for length in lengths:
        yield values[start : start + length]
        start += length


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


__all__ = ["MicroBatch", "Provider", "check_mismatch"]
