"""Checks that every objective must pass, for ours and for yours.

>>> from steerwell.objectives import dpo
>>> from steerwell.testing import check_objective
>>> "permutation" in check_objective(dpo, beta=0.5)
True

The batches are those of :mod:`steerwell.objectives.made_up`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerwell.objectives.made_up import PER_PROMPT, Batch, made_up, take
from steerwell.objectives.reduce import reduce
from steerwell.objectives.table import (
    TENSORS,
    UNIT_LETTER,
    Objective,
    ObjectiveError,
    get,
    hyperparameters,
    needs,
    optional,
)

FAR = 1e4
APART = 100.0  # nats between two completions that are far apart, still within the exact range of every loss
RTOL, ATOL = 1e-9, 1e-11
PAIRED = [name for name, facts in TENSORS.items() if facts.shape[-1:] == ("M",)]


class _Outcome(NamedTuple):
    losses: Tensor
    metrics: dict[str, Tensor]
    gradients: dict[str, Tensor]  # of the plain sum of the losses, by learnt tensor


def check_objective(fn: Callable[..., Any] | str, *, seed: int = 0, **hyper: Any) -> tuple[str, ...]:
    """Run every check that applies and return their names.

    Each is run with the optional tensors and without.

    shape: one loss per unit, nothing reduced, dtype kept, metrics detached and (units,), inputs unchanged.
    sign: from the start, making the good completion likelier and the bad one less so lowers the loss; if the
    objective is declared to rise there, it does so once the two are far apart.
    extremes: log-probabilities of -1e4 and 0, scores of +-1e4: losses, gradients and metrics stay finite.
    empty: no completions, or none that counts, gives a sum of 0 that has a gradient, and it is 0.
    permutation: the order of completions and of pairs does not matter.
    copies: a batch beside its own copy gives twice the sum, so nothing was divided by a batch size.
    microbatches: parts (whole prompts each) add up to the whole in value and gradient, if it is decomposable.
    removal: completions that are masked, in no pair or without a labelled step get no gradient and can be left out.
    gradcheck: float64 gradients equal finite differences, unless the objective is declared a surrogate.

    ``fn`` is an objective or its name and ``hyper`` its hyperparameters. Raises AssertionError that lists
    every check that failed; ObjectiveError if ``fn`` is no objective or takes a tensor unknown to the table.
    """
    objective = get(fn)
    required = needs(objective, hyper)
    wanted = (*required, *optional(objective))
    unknown = [name for name in wanted if name not in TENSORS]
    if unknown:
        raise ObjectiveError(f"check_objective cannot make up {unknown[0]!r}; it knows {', '.join(TENSORS)}")
    if not _learnt(objective, wanted):
        raise ObjectiveError(
            f"{objective.__name__} takes none of logps, per_token_logps, scores, step_scores to learn"
        )
    checks: dict[str, Callable[..., None]] = {
        "shape": _check_shape,
        "sign": _check_sign,
        "extremes": _check_extremes,
        "empty": _check_empty,
        "permutation": _check_permutation,
        "copies": _check_copies,
    }
    if objective.decomposable:
        checks["microbatches"] = _check_microbatches
    if objective.mask or {"pairs", "step_labels"} & set(wanted):
        checks["removal"] = _check_removal
    if not objective.surrogate:
        checks["gradcheck"] = _check_gradients
    failures = []
    for name, check in checks.items():
        try:
            for names in dict.fromkeys((required, wanted)):
                check(objective, names, hyper, seed)
        except (AssertionError, RuntimeError, IndexError, ValueError, TypeError) as error:
            failures.append(f"{name}: {' '.join(str(error).split())}")
    if failures:
        raise AssertionError(
            f"{objective.__name__} fails {len(failures)} of the checks\n" + "\n".join(failures)
        )
    return tuple(checks)


def batch_for(objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], **how: Any) -> Batch:
    """:func:`made_up`, with as many outputs of the head as the objective asks of a reward model."""
    values = {"levels": (), "members": 2, **hyperparameters(objective), **hyper}
    heads = {"quantiles": len(values["levels"]), "members": values["members"]}.get(objective.head, 2)
    return made_up(names, heads=heads, **how)


def _rows(name: str, taken: Mapping[str, Tensor]) -> Any:
    """Where the rows of a tensor went; all of them, if they are nothing of a completion's or a pair's."""
    return taken.get(TENSORS[name].shape[0], slice(None))


def _of_units(batch: Batch, name: str) -> Tensor:
    """Which completion each entry of a tensor belongs to."""
    owners = {"S": "owner", "U": "step_owner"}
    letter = TENSORS[name].shape[0]
    return batch[owners[letter]] if letter in owners else torch.arange(len(batch["lengths"]))


def _learnt(objective: Objective, names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(
        name
        for name in (
            ("scores", "head_scores", "head_weights", "step_scores")
            if objective.kind == "reward"
            else ("logps", "per_token_logps", "per_token_kl")
        )
        if name in names
    )


def _evaluate(
    objective: Objective, names: tuple[str, ...], batch: Batch, hyper: Mapping[str, Any]
) -> _Outcome:
    given = {name: batch[name].clone() for name in names}
    learnt = {name: given[name].requires_grad_() for name in _learnt(objective, names)}
    losses, metrics = objective(**given, **hyper)
    gradients = torch.autograd.grad(losses.sum(), list(learnt.values()), allow_unused=True)
    named = {
        name: torch.zeros_like(x) if gradient is None else gradient
        for (name, x), gradient in zip(learnt.items(), gradients, strict=True)
    }
    return _Outcome(losses.detach(), metrics, named)


def _close(actual: Tensor, expected: Tensor, what: str) -> None:
    torch.testing.assert_close(actual, expected, rtol=RTOL, atol=ATOL, msg=lambda text: f"{what}: {text}")


def _counted(objective: Objective, batch: Batch) -> Tensor:
    """Positions of the units that the losses stand for, in the objective's unit."""
    if objective.unit == "pair":
        return torch.arange(batch["pairs"].shape[1])
    if objective.unit == "step":
        return torch.nonzero(~batch["step_labels"].isnan()).flatten()
    within = torch.ones(len(batch["lengths"]), dtype=torch.bool)
    if objective.mask:
        within = batch[objective.mask]
    return torch.nonzero(within if objective.unit == "completion" else within[batch["owner"]]).flatten()


def _check_shape(objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int) -> None:
    batch = batch_for(objective, names, hyper, seed=seed)
    given = {name: batch[name].clone() for name in names}
    for name in _learnt(objective, names):
        given[name].requires_grad_()
    losses, metrics = objective(**given, **hyper)
    count = len(_counted(objective, batch))
    assert losses.shape == (count,), (
        f"losses must have shape ({count},), one per {objective.unit}, got {tuple(losses.shape)}"
    )
    assert losses.dtype == torch.float64, f"float64 in, {losses.dtype} out"
    assert losses.requires_grad, "the losses have no gradient"
    for name, metric in metrics.items():
        assert metric.dim() == 1, f"metric {name} must be unreduced, got shape {tuple(metric.shape)}"
        assert not metric.requires_grad, f"metric {name} must be detached"
        assert torch.isfinite(metric).all(), f"metric {name} is not finite"
    for name in names:
        assert torch.equal(given[name].nan_to_num(), batch[name].nan_to_num()), f"{name} was changed in place"


def _check_sign(objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int) -> None:
    whole = batch_for(objective, names, hyper, prompts=4, seed=seed, at_start=True)
    place = torch.arange(len(whole["lengths"])) % PER_PROMPT
    batch, _ = take(whole, torch.nonzero(place < 2).flatten())
    n = len(batch["lengths"])
    if "pair_probs" in batch:  # a soft label may be content with less than the margin of the batch
        batch["pair_probs"] = torch.ones_like(batch["pair_probs"])
    if objective.kind == "reward" and "scores" in batch:  # a reward model that knows nothing yet
        batch["scores"] = torch.zeros_like(batch["scores"])
    if "pair_strengths" in batch:  # ties have no better completion
        batch["pair_strengths"] = batch["pair_strengths"].clamp(min=1)
    if "step_labels" in batch:
        batch["step_labels"] = batch["step_labels"].round()
    if objective.rises_at_start:
        _check_far_apart(objective, names, batch, hyper)
        return
    slope = torch.zeros(n, dtype=torch.float64)
    for name, gradient in _evaluate(objective, names, batch, hyper).gradients.items():
        if name in ("per_token_kl", "head_weights"):  # what holds the model itself prefers no completion
            continue
        own = gradient.flatten(1).sum(1) if gradient.dim() > 1 else gradient
        slope.index_add_(0, _of_units(batch, name), own)
    if not slope.any() and _learnt(objective, names) == ("head_weights",):
        return
    good, bad = slope[0::2], slope[1::2]
    assert (good - bad < 0).all(), f"the loss rises towards the better completion: slopes {good - bad}"
    if "pairs" not in names and {"labels", "advantages", "demonstrations", "step_labels"} & set(names):
        assert (good <= 0).all(), f"the loss rises when a good completion gets likelier: slopes {good}"
        assert (bad >= 0).all(), f"the loss falls when a bad completion gets likelier: slopes {bad}"


def _check_far_apart(
    objective: Objective, names: tuple[str, ...], batch: Batch, hyper: Mapping[str, Any]
) -> None:
    n = len(batch["lengths"])
    shift = torch.where(
        torch.arange(n) % 2 == 0, APART / 2, -APART / 2
    ).double()  # good ones are at even places
    by_token = (shift / batch["lengths"])[batch["owner"]]

    def losses(way: float) -> Tensor:
        moved = {
            name: batch[name] + way * (by_token if TENSORS[name].shape == ("S",) else shift)
            for name in _learnt(objective, names)
        }
        return objective(**{name: moved.get(name, batch[name]) for name in names}, **hyper)[0]

    right, start, wrong = losses(1.0), losses(0.0), losses(-1.0)
    assert (right < start).all(), f"no lower with the better completion far likelier: {right} against {start}"
    assert (start < wrong).all(), f"no higher with the worse completion far likelier: {wrong} against {start}"


def _check_extremes(
    objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int
) -> None:
    for turn in range(3):
        batch = batch_for(objective, names, hyper, prompts=8, seed=seed + turn)
        g = torch.Generator().manual_seed(seed + turn)
        for name, x in batch.items():
            coin = torch.rand(x.shape, generator=g) < 0.5
            if name.endswith("logps"):
                batch[name] = torch.where(coin, -FAR, 0.0).float()
            elif (
                name in ("scores", "head_scores", "head_weights", "step_scores")
                and objective.kind == "reward"
            ):
                batch[name] = torch.where(coin, -FAR, FAR).float()
            elif name == "kl":
                batch[name] = torch.tensor([FAR, -FAR, 0.0][turn])
            elif x.is_floating_point():
                batch[name] = x.float()
        outcome = _evaluate(objective, names, batch, hyper)
        assert torch.isfinite(outcome.losses).all(), "a loss is not finite"
        for name, x in outcome.gradients.items():
            assert torch.isfinite(x).all(), f"the gradient of {name} is not finite"
        for name, x in outcome.metrics.items():
            assert torch.isfinite(x).all(), f"metric {name} is not finite"


def _check_empty(objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int) -> None:
    batch = batch_for(objective, names, hyper, seed=seed)
    nothing, _ = take(batch, torch.zeros(0, dtype=torch.long))
    batches = [nothing]
    if objective.mask:
        batches.append({**batch, objective.mask: torch.zeros_like(batch[objective.mask])})
    if "step_labels" in batch:
        batches.append({**batch, "step_labels": torch.full_like(batch["step_labels"], torch.nan)})
    if objective.unit == "pair":
        batches.append({name: x[..., :0] if name in PAIRED else x for name, x in batch.items()})
    for empty in batches:
        outcome = _evaluate(objective, names, empty, hyper)
        assert outcome.losses.numel() == 0, f"losses for nothing: {outcome.losses}"
        for name, gradient in outcome.gradients.items():
            assert not gradient.any(), f"nothing counts, yet {name} gets a gradient"


def _check_permutation(
    objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int
) -> None:
    batch = batch_for(objective, names, hyper, seed=seed)
    before = _evaluate(objective, names, batch, hyper)
    g = torch.Generator().manual_seed(seed)
    shuffled, taken = take(batch, torch.randperm(len(batch["lengths"]), generator=g))
    if "pairs" in batch:
        order = torch.randperm(batch["pairs"].shape[1], generator=g)
        taken["M"] = taken["M"][order]
        shuffled |= {name: x[..., order] for name, x in shuffled.items() if name in PAIRED}
    after = _evaluate(objective, names, shuffled, hyper)
    for name, gradient in before.gradients.items():
        moved = gradient[_rows(name, taken)]
        _close(after.gradients[name], moved, f"gradient of {name} after a permutation")
    if objective.decomposable:
        place = torch.zeros(int(taken[UNIT_LETTER[objective.unit]].numel()), dtype=torch.long)
        counted = _counted(objective, batch)
        place[counted] = torch.arange(len(counted))
        origin = taken[UNIT_LETTER[objective.unit]][_counted(objective, shuffled)]
        _close(after.losses, before.losses[place[origin]], "losses after a permutation")
    else:
        _close(after.losses.sum(), before.losses.sum(), "sum of losses after a permutation")


def _check_copies(objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int) -> None:
    batch = batch_for(objective, names, hyper, seed=seed)
    n = len(batch["lengths"])
    double: Batch = {}
    for name, x in batch.items():
        shift = n if name in ("pairs", "owner", "step_owner", "group") else 0
        double[name] = (
            torch.cat([x, x + shift if shift else x], dim=1 if name == "pairs" else 0)
            if TENSORS[name].shape and name != "head_weights"
            else x
        )
    once = _evaluate(objective, names, batch, hyper).losses.sum()
    twice = _evaluate(objective, names, double, hyper).losses.sum()
    _close(twice, 2 * once, "sum of a batch beside its copy")


def _check_microbatches(
    objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int
) -> None:
    batch = batch_for(objective, names, hyper, prompts=4, seed=seed)

    def step(part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        given = {name: part[name].clone() for name in names}
        learnt = {name: given[name].requires_grad_() for name in _learnt(objective, names)}
        losses, _ = objective(**given, **hyper)
        of = {"token": "owner", "step": "step_owner"}.get(objective.unit)
        owner = part[of][_counted(objective, part)] if of else None
        value = reduce(losses, objective.reduction, owner=owner, denominator=7.0)
        gradients = torch.autograd.grad(value, list(learnt.values()))
        return value.detach(), dict(zip(learnt, gradients, strict=True))

    value, gradients = step(batch)
    total = torch.zeros((), dtype=torch.float64)
    gathered = {name: torch.zeros_like(x) for name, x in gradients.items()}
    for prompts in ([0], [3, 1], [2]):
        index = torch.cat([torch.nonzero(batch["group"] == p).flatten() for p in prompts])
        part, taken = take(batch, index)
        part_value, part_gradients = step(part)
        total = total + part_value
        for name, x in part_gradients.items():
            gathered[name][_rows(name, taken)] += x
    _close(total, value, "sum over micro-batches")
    for name, x in gradients.items():
        _close(gathered[name], x, f"gradient of {name} over micro-batches")


def _check_removal(objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int) -> None:
    batch = batch_for(objective, names, hyper, seed=seed)
    idle = torch.ones(len(batch["lengths"]), dtype=torch.bool)
    if "pairs" in names:
        idle[batch["pairs"].flatten()] = False
    if "step_labels" in names:
        idle[batch["step_owner"][~batch["step_labels"].isnan()]] = False
    if objective.mask:
        idle &= ~batch[objective.mask]
    outcome = _evaluate(objective, names, batch, hyper)
    for name, gradient in outcome.gradients.items():
        if name == "head_weights":
            continue
        masked = idle[_of_units(batch, name)]
        assert not gradient[masked].any(), f"{name} of completions that do not count gets a gradient"
    fewer, _ = take(batch, torch.nonzero(~idle).flatten())
    _close(
        _evaluate(objective, names, fewer, hyper).losses,
        outcome.losses,
        "losses without the idle completions",
    )


def _check_gradients(
    objective: Objective, names: tuple[str, ...], hyper: Mapping[str, Any], seed: int
) -> None:
    batch = batch_for(objective, names, hyper, prompts=2, seed=seed)
    learnt = _learnt(objective, names)

    def losses(*values: Tensor) -> Tensor:
        given = {name: batch[name] for name in names} | dict(zip(learnt, values, strict=True))
        return objective(**given, **hyper)[0]

    inputs = [batch[name].clone().requires_grad_() for name in learnt]
    torch.autograd.gradcheck(losses, inputs, eps=1e-6, atol=1e-6, rtol=1e-5)


__all__ = ["check_objective", "made_up", "take"]
