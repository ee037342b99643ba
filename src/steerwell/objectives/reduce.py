"""The one owner of denominators.

An objective never divides. The loop asks :func:`denominator` for the counts of every micro-batch (and rank)
of a step, adds them up *before* any backward, and then calls :func:`reduce` with that global figure. So one
step over a batch has the same gradient however the batch is cut.

======================  =====================================================================
pair_mean               every pair weighs the same
completion_mean         every completion weighs the same
token_mean              every token weighs the same (long completions weigh more)
sequence_mean           mean over the tokens of each completion, then over completions
sequence_sum            sum over the tokens of each completion, mean over completions
step_mean               every step with a label weighs the same
step_sequence_mean      mean over the labelled steps of each completion, then over completions
======================  =====================================================================
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from steerwell.objectives.table import ObjectiveError, one_of

REDUCTIONS: tuple[str, ...] = (
    "pair_mean",
    "completion_mean",
    "token_mean",
    "sequence_mean",
    "sequence_sum",
    "step_mean",
    "step_sequence_mean",
)
#: Reductions that need to know which completion each loss belongs to.
BY_OWNER: tuple[str, ...] = ("sequence_mean", "step_sequence_mean")
#: What is counted, where that is not ``lengths``.
_COUNTED: Mapping[str, tuple[str, ...]] = {
    "pair_mean": ("pairs",),
    "step_mean": ("step_labels",),
    "step_sequence_mean": ("step_labels", "step_owner"),
}


def denominator(reduction: str, tensors: Mapping[str, Tensor], *, mask: str | None = None) -> float:
    """How many units a (micro-)batch counts; no forward pass is needed for it.

    ``tensors`` holds ``pairs`` (2, M) for "pair_mean", ``step_labels`` (U,) for the two of steps, with
    ``step_owner`` (U,) for "step_sequence_mean", and ``lengths`` (N,) for the others. ``mask`` names
    the bool tensor (N,) that selects completions (an objective's ``.mask``); completions outside it do not
    count, and neither do completions without a token in "sequence_mean" and "sequence_sum", steps whose label
    is NaN, and completions without a labelled step in "step_sequence_mean".
    Raises ObjectiveError for an unknown reduction or a missing tensor.
    """
    one_of("reduction", reduction, REDUCTIONS)
    wanted = _COUNTED.get(reduction) or ("lengths", *([mask] if mask else []))
    for name in wanted:
        if name not in tensors:
            raise ObjectiveError(f"the denominator of {reduction} needs {name}")
    if reduction == "pair_mean":
        return float(tensors["pairs"].shape[1])
    if "step_labels" in wanted:
        known = ~tensors["step_labels"].isnan()
        return float(
            known.sum() if reduction == "step_mean" else tensors["step_owner"][known].unique().numel()
        )
    lengths = tensors["lengths"]
    if mask is not None:
        lengths = lengths[tensors[mask]]
    if reduction == "token_mean":
        return float(lengths.double().sum())
    by_sequence = reduction in ("sequence_mean", "sequence_sum")
    return float((lengths > 0).sum()) if by_sequence else float(lengths.numel())


def reduce(losses: Tensor, reduction: str, *, denominator: float, owner: Tensor | None = None) -> Tensor:
    """Sum of the weighted losses over the step's global denominator: a scalar to call backward on.

    losses: one entry per unit. owner: long, of the shape of ``losses``; which completion each token or step
    belongs to, needed by "sequence_mean" and "step_sequence_mean" (each then weighs 1 / those of its completion in
    ``losses``, so the tokens of one completion must come in one micro-batch).
    An empty micro-batch gives 0 with a gradient of 0, whatever the denominator.
    Raises ObjectiveError if the losses are not unreduced, ``owner`` does not fit, or the denominator is not
    > 0.
    """
    one_of("reduction", reduction, REDUCTIONS)
    if losses.dim() != 1:
        raise ObjectiveError(f"losses must be unreduced, of shape (units,), got {tuple(losses.shape)}")
    if losses.numel() == 0:
        return losses.sum()
    if not denominator > 0:
        raise ObjectiveError(f"the denominator must be > 0, got {denominator!r}")
    if reduction in BY_OWNER:
        if owner is None or owner.shape != losses.shape:
            found = None if owner is None else tuple(owner.shape)
            raise ObjectiveError(f"{reduction} needs owner of shape {tuple(losses.shape)}, got {found}")
        losses = losses / torch.bincount(owner)[owner].to(losses.dtype)
    return losses.sum() / denominator


__all__ = ["BY_OWNER", "REDUCTIONS", "denominator", "reduce"]
