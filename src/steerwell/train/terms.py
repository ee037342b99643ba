"""What a run optimises: one objective or a weighted mixture, told as terms, and what the data must offer.

All of it is checked on plain groups, before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import CompletionGroup
from steerwell.objectives import table
from steerwell.objectives.mixtures import MIXTURES
from steerwell.objectives.table import Objective
from steerwell.train.targets import TARGETS

Spec = str | Callable[..., Any] | Sequence[Any]

#: Tensors that the loop can make from recorded data or rollouts. ``scores`` are a reward model's outputs.
PROVIDED = frozenset(
    {
        "logps",
        "ref_logps",
        "old_logps",
        "lengths",
        "pairs",
        "pair_probs",
        "labels",
        "rewards",
        "scores",
        "group",
        "per_token_logps",
        "ref_per_token_logps",
        "old_per_token_logps",
        "owner",
        "advantages",
        "kl",
        "demonstrations",
        "per_token_kl",
        "per_token_collision",
        "head_scores",
        "head_weights",
        "step_scores",
        *TARGETS,
    }
)


@dataclass(frozen=True)
class Term:
    """One objective of a mixture with its weight and its hyperparameters (all of them, defaults filled
    in).
    """

    name: str
    function: Objective
    weight: float
    hyper: Mapping[str, Any]
    tensors: tuple[str, ...]  # required and optional ones, as far as the loop provides them
    kind: str  # policy | reward | policy_gradient
    unit: str  # pair | completion | token | step
    reduction: str
    decomposable: bool
    advantages: str | None
    mask: str | None


def functions_of(objective: Spec) -> list[tuple[Objective, float, dict[str, Any]]]:
    """The functions of an objective: a name, a function, or a list of (name or function, weight[, hyper]). The name
    of a mixture stands for its list.

    Raises :class:`InputError` for an unknown name, a function that is no objective, or a malformed mixture.
    """
    if isinstance(objective, str) and objective in MIXTURES:
        objective = MIXTURES[objective].terms
    if isinstance(objective, str) or callable(objective):
        return [(_function(objective), 1.0, {})]
    parts: list[tuple[Objective, float, dict[str, Any]]] = []
    for each in objective:
        part: tuple[Any, ...] = (each, 1.0) if isinstance(each, str) or callable(each) else tuple(each)
        if not 2 <= len(part) <= 3 or not isinstance(part[1], int | float):
            raise InputError(
                f"a mixture is a list of (objective, weight), got {part!r}",
                mend='Write, for example, [("dpo", 1.0), ("sft", 0.1)].',
            )
        parts.append((_function(part[0]), float(part[1]), dict(part[2]) if len(part) == 3 else {}))
    if not parts:
        raise InputError("the mixture has no objective", mend='Write [("dpo", 1.0), ("sft", 0.1)].')
    return parts


def make_terms(
    parts: Sequence[tuple[Objective, float, dict[str, Any]]], hyper: Mapping[str, Any]
) -> list[Term]:
    """Terms from functions and the hyperparameters that were given by name.

    In a mixture a name given from outside goes to the one term that has it; where several have it, it must
    be given with its term. Raises :class:`InputError` for that, for unknown names, and for mixtures of
    kinds that do not train the same model.
    """
    terms: list[Term] = []
    for name in hyper:
        having = [
            fn.__name__ for fn, _, own in parts if name in table.hyperparameters(fn) and name not in own
        ]
        if len(having) > 1:
            raise InputError(
                f"{name!r} is a hyperparameter of {' and of '.join(having)}",
                mend=f'Give it with its term: ("{having[0]}", 1.0, {{"{name}": …}}).',
            )
    if "reduction" in hyper and not any("reduction" in table.hyperparameters(fn) for fn, _, _ in parts):
        parts = _reduced(parts, hyper["reduction"])
    for fn, weight, own in parts:
        defaults = table.hyperparameters(fn)
        given = {k: v for k, v in hyper.items() if k in defaults} | own
        reduction = fn.reduction
        if "reduction" in given and "reduction" not in defaults:
            reduction = _reduction(fn, given.pop("reduction"))
        try:
            full = table.check_hyperparameters(fn, given)
        except table.ObjectiveError as error:
            raise InputError(str(error)) from None
        required = table.needs(fn, full)
        missing = [name for name in required if name not in PROVIDED]
        if missing:
            raise InputError(f"{fn.__name__} needs {missing[0]!r}, which the loop cannot make")
        terms.append(
            Term(
                name=_free_name(fn.__name__, [term.name for term in terms]),
                function=fn,
                weight=weight,
                hyper=full,
                tensors=required + tuple(n for n in table.optional(fn) if n in PROVIDED),
                kind=fn.kind,
                unit=fn.unit,
                reduction=reduction,
                decomposable=fn.decomposable,
                advantages=fn.advantages,
                mask=fn.mask,
            )
        )
    if len({term.kind == "reward" for term in terms}) > 1:
        raise InputError("a mixture trains one model: either reward objectives or policy objectives")
    return terms


def describe(terms: Sequence[Term]) -> dict[str, dict[str, Any]]:
    """The terms as plain values for ``run.json``."""
    return {
        term.name: {
            "weight": term.weight,
            **({} if term.reduction == term.function.reduction else {"reduced by": term.reduction}),
            **term.hyper,
        }
        for term in terms
    }


def needed(terms: Sequence[Term]) -> set[str]:
    """The names of all tensors that the terms take. Scores of steps are read where steps end, and counted by whose
    they are.
    """
    names = {name for term in terms for name in term.tensors}
    return names | ({"steps", "step_owner"} if "step_scores" in names else set())


def check_data(terms: Sequence[Term], groups: Sequence[CompletionGroup], what: str = "the data") -> None:
    """Raise :class:`InputError` when the groups lack what an objective takes: "kto needs labels; 0 of …"."""
    if not groups:
        raise InputError(f"{what} is empty", mend="Give at least one group with completions.")
    for term in terms:
        names = term.tensors
        if "pairs" in names and not any(group.pairs for group in groups):
            raise InputError(
                f"{term.name} needs pairs; 0 of {len(groups)} groups in {what} have one",
                mend="Resolve the annotations first: steerwell.resolve.majority(groups).",
            )
        if "labels" in names and not any(_known(group.labels) for group in groups):
            raise InputError(
                f"{term.name} needs labels; 0 of {_completions(groups)} completions have one",
                mend="Resolve label annotations first: steerwell.resolve.labels(groups).",
            )
        if ("rewards" in names or "advantages" in names) and not any(_known(g.scores) for g in groups):
            raise InputError(
                f"{term.name} needs rewards; 0 of {_completions(groups)} completions in {what} have a score",
                mend="Resolve score annotations first: steerwell.resolve.mean(groups), or train on rollouts.",
            )
        if "pair_strengths" in targets_of(term) and not any(_known(g.pair_strengths) for g in groups):
            raise InputError(
                f"{term.name} needs pair_strengths; no pair in {what} has one",
                mend="Resolve preferences with a strength first: steerwell.resolve.strengths(groups).",
            )
        if "attributes" in targets_of(term):
            _check_attributes(groups, term.name)
        for name in TARGETS.keys() & targets_of(term):
            known = TARGETS[name].known
            if known is not None and not any(any(known(group)) for group in groups):
                raise InputError(
                    f"{term.name} needs {name}; 0 of {_completions(groups)} completions in {what} have one",
                    mend=TARGETS[name].lacking,
                )
        if "old_per_token_logps" in names and not any(
            completion.old_logps is not None for group in groups for completion in group.completions
        ):
            raise InputError(
                f"{term.name} needs sampled completions with old_logps; 0 of {_completions(groups)} in {what} "
                "have them",
                mend="Sample with policy.sample, or train on steerwell.rollouts.",
            )


def _check_attributes(groups: Sequence[CompletionGroup], name: str) -> None:
    """Raise :class:`InputError` where two groups have other attributes, or in another order."""
    seen: tuple[str, ...] | None = None
    for group in groups:
        if group.attributes:
            seen = seen or tuple(group.attributes)
            if tuple(group.attributes) != seen:
                raise InputError(
                    f"{name} needs the same attributes everywhere; prompt {group.prompt_id} has "
                    f"{', '.join(group.attributes)}, others {', '.join(seen)}",
                    mend="Resolve all groups in one call: steerwell.resolve.attributes(groups).",
                )


def targets_of(term: Term) -> set[str]:
    """The tensors of a term that data must hold: without the scores that a reward model gives itself."""
    return set(table.needs(term.function, term.hyper)) - ({"scores"} if term.kind == "reward" else set())


def _completions(groups: Sequence[CompletionGroup]) -> int:
    return sum(len(group.completions) for group in groups)


def demonstrations(group: CompletionGroup) -> list[bool]:
    """Which completions ``sft`` imitates.

    With pairs: those that are chosen in one and rejected in none (in a circle: all that are chosen); else
    with labels: those labelled good; else all.
    """
    places = range(len(group.completions))
    if group.pairs:
        chosen = {pair.chosen for pair in group.pairs}
        best = chosen - {pair.rejected for pair in group.pairs} or chosen
        return [i in best for i in places]
    if group.labels is not None and _known(group.labels):
        return [label is True for label in group.labels]
    return [True] * len(group.completions)


def prune(group: CompletionGroup, terms: Sequence[Term]) -> CompletionGroup | None:
    """The group without the completions that no term reads; None when nothing is left.

    Where pairs are taken together with a target of completions (their scores), a pair stays if both of its
    completions have one.
    """
    names = needed(terms)
    wanted: set[int] = set()
    strengths = group.pair_strengths or (None,) * len(group.pairs)
    if len(strengths) != len(group.pairs):
        raise InputError(
            f"prompt {group.prompt_id} has {len(strengths)} pair_strengths for {len(group.pairs)} pairs",
            mend="Give one for each pair, or None where nobody said.",
        )
    graded = list(zip(group.pairs, strengths, strict=True))
    edges = graded if "pairs" in names else []
    for name in {name for term in terms for name in targets_of(term)} & TARGETS.keys():
        if (of := TARGETS[name].known) is not None:
            known = of(group)
            edges = [(p, s) for p, s in edges if known[p.chosen] and known[p.rejected]]
            wanted |= {i for i, there in enumerate(known) if there and "pairs" not in names}
    wanted |= {i for pair, _ in edges for i in (pair.chosen, pair.rejected)}
    if "labels" in names and group.labels is not None:
        wanted |= {i for i, label in enumerate(group.labels) if label is not None}
    if names & {"rewards", "advantages"} and group.scores is not None:
        wanted |= {i for i, score in enumerate(group.scores) if score is not None}
    if "demonstrations" in names:
        wanted |= {i for i, good in enumerate(demonstrations(group)) if good}
    if not wanted:
        return None
    if len(wanted) == len(group.completions) and (len(edges) == len(graded) or "pairs" not in names):
        return group
    keep = sorted(wanted)
    place = {old: new for new, old in enumerate(keep)}

    def kept(values: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
        return None if values is None else tuple(values[i] for i in keep)

    edges = [
        (p, s)
        for p, s in (edges if "pairs" in names else graded)
        if p.chosen in place and p.rejected in place
    ]
    return replace(
        group,
        completions=tuple(group.completions[i] for i in keep),
        pairs=tuple(p._replace(chosen=place[p.chosen], rejected=place[p.rejected]) for p, _ in edges),
        pair_strengths=None if group.pair_strengths is None else tuple(s for _, s in edges),
        attributes=None
        if group.attributes is None
        else {name: tuple(column[i] for i in keep) for name, column in group.attributes.items()},
        scores=kept(group.scores),
        labels=kept(group.labels),
        ranks=kept(group.ranks),
        token_weights=kept(group.token_weights),
        steps=kept(group.steps),
        step_labels=kept(group.step_labels),
    )


def _reduced(
    parts: Sequence[tuple[Objective, float, dict[str, Any]]], reduction: Any
) -> list[tuple[Objective, float, dict[str, Any]]]:
    """The parts with a reduction that was given from outside, at the one that has a choice."""
    choices = [fn for fn, _, _ in parts if len(table.UNIT_REDUCTIONS[fn.unit]) > 1]
    if len(choices) > 1:
        raise InputError("several objectives of the mixture have a reduction", mend="Give it with its term.")
    at = (choices or [parts[0][0]])[0]
    return [(fn, w, {"reduction": reduction} | own if fn is at else own) for fn, w, own in parts]


def _reduction(fn: Objective, asked: Any) -> str:
    known = table.UNIT_REDUCTIONS[fn.unit]
    if asked not in known:
        raise InputError(
            f"{fn.__name__} cannot be reduced by {asked!r}: it gives one loss per {fn.unit}",
            mend=f"Choose {' or '.join(known)}, or leave reduction out ({fn.reduction}).",
        )
    return str(asked)


def _free_name(name: str, taken: Sequence[str]) -> str:
    """The name, with a number behind it where a mixture has the same objective again."""
    times = sum(other.split("#")[0] == name for other in taken)
    return f"{name}#{times + 1}" if times else name


def _known(values: Sequence[Any] | None) -> bool:
    return values is not None and any(value is not None for value in values)


def _function(objective: Any) -> Objective:
    try:
        return table.get(objective)
    except table.ObjectiveError as error:
        if isinstance(objective, str) and objective not in table.TABLE:
            raise InputError(
                f"unknown objective {objective!r}", mend=nearest(objective, [*table.TABLE, *MIXTURES])
            ) from None
        raise InputError(str(error)) from None


__all__ = [
    "PROVIDED",
    "Spec",
    "Term",
    "check_data",
    "demonstrations",
    "describe",
    "functions_of",
    "make_terms",
    "needed",
    "prune",
]
