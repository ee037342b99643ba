"""What head a reward model gets: read off the objective, its hyperparameters and the data, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import HEADS
from steerwell.train.terms import Term


class AskedHead(NamedTuple):
    """What the outputs of a head are (:data:`steerwell.models.scoring.HEADS`), their names, and the cut points that the
    objective compares scores with, if it does.
    """

    kind: str = "score"
    outputs: tuple[str, ...] = ("score",)
    cutpoints: tuple[float, ...] | None = None


def asked_head(terms: Sequence[Term], groups: Sequence[CompletionGroup]) -> AskedHead:
    """The head that the terms of a reward objective learn.

    Raises :class:`InputError` for a mixture of terms that learn different heads.
    """
    kinds = {term.function.head: term for term in terms if term.function.head != "score"}
    if len(kinds) > 1:
        names = " and ".join(term.name for term in kinds.values())
        raise InputError(f"{names} learn different heads", mend="Train them one by one.")
    cuts = next((tuple(term.hyper["cutpoints"]) for term in terms if "cutpoints" in term.hyper), None)
    if not kinds:
        return AskedHead(cutpoints=cuts)
    ((kind, term),) = kinds.items()
    return AskedHead(kind, _outputs(kind, term, groups), cuts)


def _outputs(kind: str, term: Term, groups: Sequence[CompletionGroup]) -> tuple[str, ...]:
    if kind == "attributes":
        return next(tuple(group.attributes) for group in groups if group.attributes)
    if kind == "quantiles":
        return tuple(f"q{level:g}" for level in term.hyper["levels"])
    if kind == "members":
        return tuple(f"member{i + 1}" for i in range(int(term.hyper["members"])))
    return {"quality_length": ("quality", "length")}[kind]


def fitted_head(model: RewardModel, asked: AskedHead) -> RewardModel:
    """A reward model that the objective can go on with: as it is, or with a gate where scores are learnt from its
    attributes. The network is changed in place.

    Raises :class:`InputError` where its head is another one than the objective learns.
    """
    recipe = model.recipe
    if asked.kind == "score":
        model = model.with_gate() if recipe.head == "attributes" and recipe.weights is None else model
    elif (recipe.head, recipe.outputs) != (asked.kind, asked.outputs):
        raise InputError(
            f"the objective learns {HEADS[asked.kind]} ({', '.join(asked.outputs)}), and this reward model has "
            f"{HEADS[recipe.head]} ({', '.join(recipe.outputs)})",
            mend="Start from a policy.",
        )
    # a posterior is that of the weights it was made with
    return model.with_recipe(cutpoints=asked.cutpoints or model.recipe.cutpoints, uncertainty="")


__all__ = ["AskedHead", "asked_head", "fitted_head"]
