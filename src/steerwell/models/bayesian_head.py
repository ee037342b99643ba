"""How sure the head of a reward model is: the posterior of its weights, in closed form, over fixed hidden states.

Pairs give the Laplace approximation of Bradley-Terry at the trained weights w: the precision is
alpha I + sum over pairs of s(m) (1 - s(m)) d d^T, with d the difference of the two hidden states and m = w . d
(MacKay 1992; for last layers arXiv:2106.14806). Given scores, linear regression gives the exact posterior precision,
alpha I + sum of h h^T / (noise variance). The variance of a score difference is d^T precision^-1 d.

The trained weights stay what they are. They are the mode only as far as training found it; where it stopped early, the
spread is that of the mode's shape at w.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.forward import pooled_states, unwrap
from steerwell.models.load import batches, evaluating
from steerwell.models.scoring import ScoringRecipe

if TYPE_CHECKING:
    from steerwell.models.reward_model import RewardModel

UNCERTAINTY_FILE = "steerwell_uncertainty.safetensors"


@dataclass(frozen=True, eq=False)
class Posterior:
    """Normal posteriors of the rows of a head. ``factors`` (H, D, D), float64: lower Cholesky factors of the
    precisions; ``centre`` (D,), float64: taken off a hidden state before the variance of a single score is read;
    ``prior_precision`` (H,): alpha.

    Pairs say nothing of the level of scores, so that the variance of a single one is that of its difference from the
    mean completion of the data: ``centre`` is their mean hidden state. With given scores it is 0.
    """

    centre: Tensor
    factors: Tensor
    prior_precision: Tensor

    def variances(self, x: Tensor) -> Tensor:
        """Variance of w . x for each row w of the head, (N, H) float64, at x (N, D): differences of two hidden states,
        or hidden states less the centre.
        """
        x = x.to(self.centre).T.expand(len(self.factors), -1, -1)
        return torch.linalg.solve_triangular(self.factors, x, upper=False).square().sum(1).T

    def digest(self) -> str:
        """A hash of all that it says."""
        state = hashlib.blake2b(digest_size=12)
        for value in (self.centre, self.factors, self.prior_precision):
            state.update(f"{tuple(value.shape)}".encode() + value.contiguous().numpy().tobytes())
        return state.hexdigest()

    def to_bytes(self) -> bytes:
        """The contents of :data:`UNCERTAINTY_FILE`."""
        return save({"centre": self.centre, "factors": self.factors, "prior_precision": self.prior_precision})


def read_posterior(file: Path, digest: str) -> Posterior:
    """The posterior of a file. Raises :class:`InputError` where there is none, or another than the recipe names."""
    if not file.is_file():
        raise InputError(
            "the scoring recipe names a posterior, and there is none",
            file=file,
            mend="Copy the whole directory, or make it again: model.with_uncertainty(groups).",
        )
    with safe_open(file, framework="pt") as read:
        found = Posterior(*(read.get_tensor(name) for name in ("centre", "factors", "prior_precision")))
    if found.digest() != digest:
        raise InputError(
            "this is not the posterior that the scoring recipe names",
            file=file,
            mend="Copy the whole directory, or make it again: model.with_uncertainty(groups).",
        )
    return found


def factored(information: Tensor, alpha: float) -> Tensor:
    """Lower Cholesky factor (D, D) of alpha I + information, both float64."""
    eye = torch.eye(len(information), dtype=information.dtype, device=information.device)
    return torch.linalg.cholesky(information + alpha * eye)


def pair_information(differences: Tensor, weights: Tensor, temperature: float = 1.0) -> Tensor:
    """What pairs say of the weights, (D, D) float64: sum of s(m / T) (1 - s(m / T)) / T^2 d d^T at m = weights . d, for
    differences (M, D) of hidden states. It does not depend on which of the two was preferred.
    """
    d = differences.double()
    share = torch.sigmoid(d @ weights.double() / temperature)
    return (d * (share * (1 - share) / temperature**2)[:, None]).T @ d


def likeliest_precision(information: Tensor, weights: Tensor, *, rounds: int = 200) -> float:
    """The prior precision at which the marginal likelihood is stationary: alpha = gamma / |w|^2, with gamma the sum of
    l / (l + alpha) over the eigenvalues l of ``information`` (MacKay 1992), by iteration from alpha = D / |w|^2, with
    weights and information held fixed.
    """
    values = torch.linalg.eigvalsh(information).clamp(min=0)
    size = float(weights.double().square().sum())
    if size == 0 or not values.any():
        raise InputError(
            "weights of 0, or data without a difference, say nothing of a prior",
            mend="Give prior_precision a number.",
        )
    alpha = len(values) / size
    for _ in range(rounds):
        alpha = float((values / (values + alpha)).sum()) / size
    return alpha


def with_posterior(
    model: RewardModel,
    groups: Iterable[CompletionGroup],
    prior_precision: float | Literal["likeliest"],
    max_tokens: int,
) -> RewardModel:
    """See :meth:`~steerwell.models.reward_model.RewardModel.with_uncertainty`."""
    if prior_precision != "likeliest" and not (
        isinstance(prior_precision, int | float) and prior_precision > 0
    ):
        raise InputError(
            f"prior_precision must be a number above 0 or 'likeliest', got {prior_precision!r}",
            mend="Use prior_precision=1.0.",
        )
    recipe = model.recipe
    if recipe.head not in ("score", "attributes") or recipe.gate:
        raise InputError(
            f"a posterior takes a head with one score, or with attributes and no gate; this one gives {recipe.head}",
            mend="An ensemble and quantiles have a spread of their own: score_with_std.",
        )
    data = _Data.of(recipe.head, list(groups), recipe.outputs)
    head: Any = unwrap(model.model).score
    weights = head.weight.detach().double()
    temperature = recipe.temperature * recipe.std if data.kind == "pairs" else 1.0
    found = _gather(model, data, weights, temperature, max_tokens)
    alphas = [
        likeliest_precision(own, row) if prior_precision == "likeliest" else float(prior_precision)
        for own, row in zip(found.information, weights, strict=True)
    ]
    factors = torch.stack([factored(own, a) for own, a in zip(found.information, alphas, strict=True)])
    centre = found.total / found.count if data.kind == "pairs" else torch.zeros_like(found.total)
    posterior = Posterior(centre.cpu(), factors.cpu(), torch.tensor(alphas, dtype=torch.float64))
    return replace(model, recipe=replace(recipe, uncertainty=posterior.digest()), _posterior=posterior)


@dataclass(frozen=True)
class _Data:
    """What groups say, and of which kind it is."""

    kind: Literal["pairs", "scores"]
    groups: Sequence[CompletionGroup]
    targets: list[list[list[float]]]  # by group, completion and output; NaN: not known

    @classmethod
    def of(cls, head: str, groups: list[CompletionGroup], outputs: tuple[str, ...]) -> _Data:
        if head == "score" and any(group.pairs for group in groups):
            return cls("pairs", [group for group in groups if group.pairs], [])
        nan = float("nan")
        kept, targets = [], []
        for group in groups:
            columns = {"score": group.scores} if head == "score" else group.attributes or {}
            rows = [columns.get(name) or (None,) * len(group.completions) for name in outputs]
            if any(value is not None for row in rows for value in row):
                kept.append(group)
                targets.append(
                    [[nan if v is None else float(v) for v in of] for of in zip(*rows, strict=True)]
                )
        if not kept:
            what = "pairs and no scores" if head == "score" else f"scores of {', '.join(outputs)}"
            raise InputError(
                f"the {len(groups)} groups have no {what}",
                mend="Give the data that the model was trained with, or held-out data of the same kind.",
            )
        return cls("scores", kept, targets)


@dataclass
class _Sums:
    information: Tensor  # (H, D, D)
    total: Tensor  # (D,) of hidden states
    count: int


@torch.no_grad()
def _gather(model: RewardModel, data: _Data, weights: Tensor, temperature: float, max_tokens: int) -> _Sums:
    """What the data say of the weights, batch by batch: states are never all in memory."""
    heads, width = weights.shape
    sums = _Sums(weights.new_zeros(heads, width, width), weights.new_zeros(width), 0)
    squares, known = weights.new_zeros(heads), weights.new_zeros(heads)
    with evaluating(model.model):
        for members, batch in batches(model.tokenize(data.groups), model.model, max_tokens):
            states = pooled_states(model.model, batch, model.recipe.pooling).double()
            sums.total += states.sum(0)
            sums.count += len(states)
            if data.kind == "pairs":
                first, second = pair_places(members, data.groups)
                sums.information[0] += pair_information(
                    states[first] - states[second], weights[0], temperature
                )
                continue
            given = states.new_tensor([row for i in members for row in data.targets[i]])
            for h in range(heads):
                own = ~given[:, h].isnan()
                sums.information[h] += states[own].T @ states[own]
                squares[h] += (given[own, h] - states[own] @ weights[h]).square().sum()
                known[h] += own.sum()
    if data.kind == "scores":
        if not (known > 0).all() or not (squares > 0).all():
            raise InputError(
                "an output has no given score, or is without any error, so that its noise is not known",
                mend="Give groups with scores of every attribute.",
            )
        sums.information /= (squares / known)[:, None, None]  # the noise variance, of the residuals
    return sums


def pair_places(members: Sequence[int], groups: Sequence[CompletionGroup]) -> tuple[list[int], list[int]]:
    """Where the two completions of each pair lie in a batch of these groups."""
    first: list[int] = []
    second: list[int] = []
    start = 0
    for i in members:
        first += [start + pair.chosen for pair in groups[i].pairs]
        second += [start + pair.rejected for pair in groups[i].pairs]
        start += len(groups[i].completions)
    return first, second


def score_variances(posterior: Posterior, x: Tensor, recipe: ScoringRecipe) -> Tensor:
    """Variance (N,) of the raw score, put together from those of its outputs; ``x`` as for
    :meth:`Posterior.variances`.
    """
    each = posterior.variances(x)
    weights = recipe.weights or [1 / len(recipe.outputs)] * len(recipe.outputs)
    return each @ each.new_tensor(weights).square()


__all__ = [
    "UNCERTAINTY_FILE",
    "Posterior",
    "factored",
    "likeliest_precision",
    "pair_information",
    "pair_places",
    "read_posterior",
    "score_variances",
    "with_posterior",
]
