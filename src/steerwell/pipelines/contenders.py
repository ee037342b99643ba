"""The contenders of a comparison: objectives by name, with the settings that each gets, checked before any work.

An entry is ``NAME`` or ``NAME:key=value:key=value``: an objective or a mixture, with hyperparameters of its own and,
if it needs another one, its ``learning_rate``. The recipe's hyperparameters go to every contender that has them; in
a mixture, to the one term that has the name and does not set it itself.
"""

from __future__ import annotations

import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import CompletionGroup
from steerwell.objectives.table import Objective, hyperparameters
from steerwell.train.config import Recipe, TrainConfig
from steerwell.train.loop import checked
from steerwell.train.provide import check_mismatch
from steerwell.train.recipe import targets
from steerwell.train.reference import LIVE_NAMES, REFERENCE_NAMES
from steerwell.train.targets import TARGETS
from steerwell.train.terms import Term, check_data, describe, functions_of, needed

#: Settings of ``[train]`` that an entry may have to itself.
OWN_TRAINING = ("learning_rate",)
#: What an objective may take that only data can give.
OF_THE_DATA = frozenset({"pairs", "labels", "ranks", "scores", "rewards", "demonstrations", *TARGETS})


@dataclass(frozen=True)
class Contender:
    """One objective of a comparison. ``name`` is the entry as it was written; ``hyper`` is all it is given."""

    name: str
    objective: str
    hyper: Mapping[str, Any]
    terms: Sequence[Term]
    config: TrainConfig

    @property
    def folder(self) -> str:
        """The name of its run folder: the entry, in characters that every file system takes."""
        return re.sub(r"[^\w.=+-]", "-", self.name)

    @property
    def wants_reference(self) -> bool:
        """Whether it reads a reference model."""
        return bool(needed(self.terms) & (REFERENCE_NAMES | LIVE_NAMES))


def contenders(entries: Sequence[str], recipe: Recipe) -> list[Contender]:
    """The contenders that the entries name.

    Raises :class:`InputError` for an unknown objective or setting, a value out of range, a hyperparameter of the
    recipe that no contender has, two equal contenders, an objective that trains a reward model, and a recipe that
    is online.
    """
    if recipe.judge is not None or recipe.rollouts:
        raise InputError(
            "a comparison trains on recorded data, and the recipe is online",
            mend="Take judge and [rollouts] out of the recipe.",
        )
    found: list[Contender] = []
    for entry in entries:
        name, *words = [part.strip() for part in entry.split(":")]
        found.append(_contender(name, dict(_setting(entry, word) for word in words), recipe))
    _refuse_unused(found, recipe)
    for i, one in enumerate(found):
        for other in found[:i]:
            if (describe(one.terms), one.config) == (describe(other.terms), other.config):
                raise InputError(
                    f"{other.name} and {one.name} are the same contender", mend="Give each of them once."
                )
    return found


def _contender(objective: str, own: dict[str, Any], recipe: Recipe) -> Contender:
    parts = functions_of(objective)
    training = {key: own[key] for key in OWN_TRAINING if key in own}
    mine = {key: value for key, value in own.items() if key not in training}
    known = {"reduction", *(name for fn, _, _ in parts for name in hyperparameters(fn))}
    for key in mine:
        if key not in known:
            raise InputError(
                f"{objective} has no hyperparameter {key!r}", mend=nearest(key, [*known, *OWN_TRAINING])
            )
    hyper = {key: value for key, value in recipe.hyperparameters.items() if key in _open(parts)} | mine
    terms, config = checked(objective, recipe.train, {**hyper, **training})
    if terms[0].kind == "reward":
        raise InputError(
            f"{objective} trains a reward model, and a comparison is of policies", mend="Leave it out."
        )
    label = ":".join([objective, *(f"{key}={value}" for key, value in own.items())])
    return Contender(label, objective, hyper, terms, config)


def _open(parts: Sequence[tuple[Objective, float, Mapping[str, Any]]]) -> set[str]:
    """The hyperparameters that may be given from outside: those that just one term has and does not set itself."""
    having = Counter(name for fn, _, own in parts for name in hyperparameters(fn) if name not in own)
    return {name for name, count in having.items() if count == 1}


def _setting(entry: str, word: str) -> tuple[str, Any]:
    key, equals, value = (part.strip() for part in word.partition("="))
    if not equals or not key or not value:
        raise InputError(
            f"{word!r} in {entry!r} is no key=value", mend="Write, for example, dpo:beta=0.05 or ipo:tau=0.5."
        )
    try:
        return key, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return key, value


def _refuse_unused(found: Sequence[Contender], recipe: Recipe) -> None:
    """A setting that would change nothing is an error."""
    having = {name for one in found for name in _open(functions_of(one.objective))}
    for key in recipe.hyperparameters:
        if key not in having:
            names = ", ".join(one.name for one in found)
            raise InputError(
                f"none of {names} takes the recipe's hyperparameter {key!r}",
                mend=f"{nearest(key, having)} Or take it out." if having else "Take it out of the recipe.",
            )


def groups_for(
    contender: Contender, groups: Sequence[CompletionGroup], rule: str | dict[str, Any], notes: list[str]
) -> list[CompletionGroup]:
    """The groups with the targets that a contender takes, by the recipe's rule.

    An objective that learns from labels gets them from the pairs where the data have none of their own: a completion
    that wins more pairs of its group than it loses is desirable, one that loses more is not, and one that does both
    equally often has no label. So all contenders learn from the same evidence.
    """
    name = rule if isinstance(rule, str) else rule.get("rule", "auto")
    if "labels" not in needed(contender.terms) or name == "labels" or labelled(groups):
        return targets(groups, rule, contender.terms, notes)
    paired = targets(groups, rule, pair_terms(), notes)
    notes.append(f"{contender.name} has its labels from the pairs: chosen is desirable, rejected is not")
    return [replace(group, labels=_labels(group)) for group in paired if group.pairs]


def labelled(groups: Sequence[CompletionGroup]) -> bool:
    """Whether anybody has labelled a completion of the groups."""
    return any(
        any(label is not None for label in group.labels or ())
        or any(a.kind == "label" for a in group.annotations)
        for group in groups
    )


def pair_terms() -> list[Term]:
    """Terms that take pairs and nothing else of the data."""
    return checked("dpo", None, {})[0]


def _labels(group: CompletionGroup) -> tuple[bool | None, ...]:
    balance = [0.0] * len(group.completions)
    for pair in group.pairs:
        sign = (pair.p > 0.5) - (pair.p < 0.5)
        balance[pair.chosen] += sign
        balance[pair.rejected] -= sign
    return tuple(None if points == 0 else points > 0 for points in balance)


def check_contender(
    contender: Contender,
    groups: Sequence[CompletionGroup],
    held_out: Sequence[CompletionGroup],
    reference: str,
) -> None:
    """Raise :class:`InputError`, naming the contender, when the data or the recipe lack what it takes."""
    for those, what in ((groups, "the data"), (held_out, "the held-out data")):
        if not those:
            wanted = " and ".join(sorted(OF_THE_DATA & needed(contender.terms)))
            raise InputError(
                f"{contender.name} needs {wanted}; 0 groups of {what} have them",
                mend="Leave it out, or import data that hold them.",
            )
        check_data(contender.terms, those, f"{what} for {contender.name}")
    if "kl" in needed(contender.terms):
        check_mismatch(cast(Any, groups), contender.config.batch_size)
    if reference == "none" and contender.wants_reference:
        raise InputError(
            f"{contender.name} needs a reference, and reference is none", mend='Say reference = "start".'
        )


__all__ = ["Contender", "check_contender", "contenders", "groups_for", "labelled", "pair_terms"]
