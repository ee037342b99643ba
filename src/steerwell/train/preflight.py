"""Checks before and at the first step that catch silent wrong results: a run starts right, or not at all.

Before it: completions end with the token that a policy stops with, and a packed batch says of each completion
what the model says of it alone. At step 0 the policy is the reference, so log-probs are equal and the DPO loss is
ln 2; and on fresh rollouts the log-probs of the training pass are those that the sampler had. What breaks these
(a wrong mask, other weights in the sampler, dropout) gives finite losses and a useless model. What was found is
in ``run.json`` under ``preflight`` and ``data``.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from collections.abc import Sequence as Seq
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from steerwell.data.errors import InputError
from steerwell.models.batch import build, layout_for, pack
from steerwell.models.forward import per_token_logps, sum_by_owner
from steerwell.models.render import TokenizedGroup, ending
from steerwell.train.items import Item
from steerwell.train.metrics import Totals
from steerwell.train.provide import Provider
from steerwell.train.rundir import TrainingError

#: Nats per token that two passes over the same tokens may differ by.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_HALF = 0.1
#: How much scores may differ by in 16 bits, as a share of their size.
SCORES_HALF = 0.2
LN2 = math.log(2.0)
FIRST_ITEMS, FIRST_GROUPS, FIRST_COMPLETIONS, FIRST_TOKENS = 8, 3, 4, 512


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end a turn by the tokenizer and its template."""
    ids = (tokenizer.eos_token_id, ending(tokenizer).stop_id)
    return tuple(sorted({int(i) for i in ids if i is not None}))  # type: ignore[arg-type]


def check_ends(
    items: Seq[Item], tokenizer: PreTrainedTokenizerBase, stops: Collection[int], *, learns: bool
) -> dict[str, Any]:
    """Count the completions whose last scored token is one of ``stops``, among those that are finished and
    were not cut. Returns figures for ``run.json``, with sentences in ``notes``.

    Raises :class:`InputError` where none does and a policy ``learns`` from them: it could never learn to stop.
    """
    finished = stopped = 0
    for item in items:
        tokens = item.tokens
        for sequence, cut, end in zip(tokens.sequences, tokens.truncated, item.finished, strict=True):
            if not cut and end is not False:
                finished += 1
                outside = any(b == len(sequence.ids) for _, b in sequence.unscored)
                stopped += sequence.ids[-1] in stops and not outside
    name = getattr(tokenizer, "name_or_path", "") or "the tokenizer"
    if learns and finished and not stopped:
        raise InputError(
            f"none of {finished} completions ends with a stop token, so the policy could never learn to stop: the "
            "chat template closes the assistant's turn with none, and the tokenizer has no eos_token to put there",
            file=name,
            mend="Let the template write the end token after the assistant's words, or set the eos_token.",
        )
    notes = []
    if stopped < finished:
        notes.append(
            f"{finished - stopped:,} of {finished:,} finished completions end without a stop token of {name}"
        )
    words = [str(word) for word in tokenizer.convert_ids_to_tokens(sorted(stops))]
    return {"finished": finished, "with_stop_token": stopped, "stop_tokens": words, "notes": notes}


@torch.no_grad()
def check_packing(provider: Provider, items: Seq[Item]) -> dict[str, Any]:
    """Compare some of the first groups, packed as they will be in training, with each of their completions alone.

    Returns what was compared and the largest gap: nats per token, the mean over a completion; for reward models
    the difference of scores as a share of their size. Raises :class:`TrainingError` where that is too large. What
    is not finite is left to the check of the loss, which names the prompts.
    """
    groups = [_first(item.tokens) for item in _few(items)]
    scores = provider.scoring
    packed: dict[int, Tensor] = {}
    layout = provider.layout_of_models()
    for members in pack(groups, provider.max_tokens, layout):
        values = _each(provider, [groups[i] for i in members], layout)
        sizes = [len(groups[i].sequences) for i in members]
        packed |= dict(zip(members, values.split(sizes), strict=True))
    together = torch.cat([packed[i] for i in range(len(groups))])
    singles = [TokenizedGroup([s], g.group, [False]) for g in groups for s in g.sequences]
    rows = layout_for("rows", provider.model)
    alone = torch.cat([_each(provider, [single], rows) for single in singles])
    gap = (together - alone).abs()
    if scores:
        gap = gap / alone.square().mean().sqrt().clamp(min=1e-12)
    else:
        gap = gap / torch.tensor([max(1, len(s.sequences[0].scored())) for s in singles], device=gap.device)
    tolerance = TOLERANCE.get(_computed_in(provider), SCORES_HALF if scores else TOLERANCE_HALF)
    largest = float(gap.max())
    if largest > tolerance:
        worst = groups[_owner(groups, int(gap.argmax()))].group.prompt_id
        raise TrainingError(
            f"packed and alone, a completion of prompt {worst} differs by {largest:.2g} "
            f"{'of the size of the scores' if scores else 'nats per token'}: this model mixes up the rows of a batch"
        )
    return {
        "packed_against_alone": {
            "groups": len(groups),
            "completions": len(singles),
            "largest_gap": largest if math.isfinite(largest) else None,
            "tolerance": tolerance,
        }
    }


def _computed_in(provider: Provider) -> torch.dtype:
    """What log-probs are computed in; weights that are spread over processes may be held in a finer type."""
    if provider.precision:
        return getattr(torch, provider.precision)
    return next(provider.model.parameters()).dtype


def _few(items: Seq[Item]) -> list[Item]:
    """The shortest of the first groups, fewer where they are long: the check must not cost what a step does."""
    shortest = sorted(items[:FIRST_ITEMS], key=lambda item: item.size)
    found = shortest[:2]  # one group alone could not be mixed up with another
    for item in shortest[2:FIRST_GROUPS]:
        if sum(other.size for other in found) + item.size <= FIRST_TOKENS:
            found.append(item)
    return found


def _first(tokens: TokenizedGroup) -> TokenizedGroup:
    some = tokens.sequences[:FIRST_COMPLETIONS]
    return TokenizedGroup(some, tokens.group, tokens.truncated[: len(some)])


def _each(provider: Provider, groups: Seq[TokenizedGroup], layout: Any) -> Tensor:
    """One number per completion: its score, or its summed log-prob."""
    batch = build(groups, layout).to(provider.device)
    if provider.scoring is not None:
        return provider.head_tensors(batch)["scores"]
    logps = per_token_logps(provider.model, batch, temperature=provider.temperature)
    return sum_by_owner(logps.double(), batch.owner, batch.n)


def _owner(groups: Seq[TokenizedGroup], completion: int) -> int:
    """Which group the n-th completion of all belongs to."""
    for i, group in enumerate(groups):
        completion -= len(group.sequences)
        if completion < 0:
            return i
    raise IndexError(completion)


class StartChecks:
    """Watches the tensors of one step. ``fresh``: the completions were sampled by the policy as it is now;
    ``first``: this is step 0 of the run.
    """

    def __init__(self, provider: Provider, *, fresh: bool, first: bool) -> None:
        self.tolerance = TOLERANCE.get(_computed_in(provider), TOLERANCE_HALF)
        self.fresh = fresh
        self.at_start = first and provider.reference.kind == "start"
        self._reference_gap: list[Tensor] = []
        self._sampler_gap: list[Tensor] = []
        self.first = first

    def look(self, tensors: Mapping[str, Tensor], totals: Totals) -> None:
        """Take the differences of one micro-batch; ``sampler/gap`` goes into ``totals``."""
        if self.at_start and "ref_logps" in tensors:
            gap = (tensors["logps"].detach() - tensors["ref_logps"]).abs() / tensors["lengths"].clamp(min=1)
            self._reference_gap.append(gap.max())
        if self.fresh and "old_per_token_logps" in tensors:
            gap = (tensors["per_token_logps"].detach() - tensors["old_per_token_logps"]).abs()
            totals.add("sampler/gap", gap)
            self._sampler_gap.append(gap.mean())

    def conclude(self, losses: Mapping[str, Tensor]) -> dict[str, float]:
        """Raise :class:`TrainingError` if the step did not begin where it should; returns what was compared.

        ``losses`` are those of the terms by name. What is not finite is left to the check of the loss itself,
        which names the prompts.
        """
        found: dict[str, float] = {}
        if self._reference_gap:
            found["reference_gap"] = gap = float(torch.stack(self._reference_gap).max())
            if gap > self.tolerance:
                raise TrainingError(
                    f"the policy differs from its own start by {gap:.2g} nats per token before the first update: "
                    "the reference is not the start of this run"
                )
        if self.at_start and "dpo" in losses:
            found["dpo_loss"] = loss = losses["dpo"].item()
            if abs(loss - LN2) > self.tolerance:
                raise TrainingError(
                    f"the DPO loss of the first step is {loss:.5f} and must be ln 2 = {LN2:.5f}: "
                    "the log-probs of policy and reference do not belong together"
                )
        if self.first and self._sampler_gap:
            found["sampler_gap"] = gap = float(torch.stack(self._sampler_gap).max())
            if gap > self.tolerance:
                raise TrainingError(
                    f"the sampler's log-probs differ from the training pass by {gap:.2g} nats per token: "
                    "the completions do not come from the policy that is trained"
                )
        return {name: value for name, value in found.items() if math.isfinite(value)}


__all__ = ["LN2", "TOLERANCE", "StartChecks", "check_ends", "check_packing", "stop_tokens"]
