"""Checks at the first step that catch silent wrong results: a run starts exactly at its start, or not at all.

At step 0 the policy is the reference, so log-probs are equal and the DPO loss is ln 2; and on fresh
rollouts the log-probs of the training pass are those that the sampler had. What breaks these (a wrong mask,
other weights in the sampler, dropout) gives finite losses and a useless model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from steerwell.train.metrics import Totals
from steerwell.train.provide import Provider
from steerwell.train.rundir import TrainingError

#: Nats per token that two passes over the same tokens may differ by.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
TOLERANCE_HALF = 0.1
LN2 = math.log(2.0)


class StartChecks:
    """Watches the tensors of one step. ``fresh``: the completions were sampled by the policy as it is now;
    ``first``: this is step 0 of the run.
    """

    def __init__(self, provider: Provider, *, fresh: bool, first: bool) -> None:
        dtype = next(provider.model.parameters()).dtype
        self.tolerance = TOLERANCE.get(dtype, TOLERANCE_HALF)
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

    def conclude(self, losses: Mapping[str, Tensor]) -> None:
        """Raise :class:`TrainingError` if the step did not begin where it should.

        ``losses`` are those of the terms by name. What is not finite is left to the check of the loss itself,
        which names the prompts.
        """
        if self._reference_gap and (gap := float(torch.stack(self._reference_gap).max())) > self.tolerance:
            raise TrainingError(
                f"the policy differs from its own start by {gap:.2g} nats per token before the first update: "
                "the reference is not the start of this run"
            )
        if self.at_start and "dpo" in losses and abs(loss := losses["dpo"].item() - LN2) > self.tolerance:
            raise TrainingError(
                f"the DPO loss of the first step is {loss + LN2:.5f} and must be ln 2 = {LN2:.5f}: "
                "the log-probs of policy and reference do not belong together"
            )
        if self.first and self._sampler_gap:
            gap = float(torch.stack(self._sampler_gap).max())
            if gap > self.tolerance:
                raise TrainingError(
                    f"the sampler's log-probs differ from the training pass by {gap:.2g} nats per token: "
                    "the completions do not come from the policy that is trained"
                )


__all__ = ["LN2", "TOLERANCE", "StartChecks"]
