"""What a reward model knows, on held-out data: not one accuracy, but where it comes from and what it is worth.

accuracy     overall, beside what the length rule gets and what the noise of the labels allows; then by source,
             domain, length and agreement of the annotators
calibration  whether sigmoid(margin / temperature) is how often it is right, as it is and with a fitted temperature
probes       how often it prefers a spoilt completion to the good one that it was made from
best of n    what picking the best of n by it is worth in other scores of the same completions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.evals import stats
from steerwell.evals.best_of_n import best_of_n_measures, has_gold
from steerwell.evals.calibration import calibration_measures
from steerwell.evals.held_out_pairs import (
    LENGTH_RATIOS,
    LENGTH_SIDES,
    VOTE_TIERS,
    HeldOutPair,
    read_pairs,
    share,
    slices,
)
from steerwell.evals.measure import Findings, Measure, Task, Trial
from steerwell.evals.noise_ceiling import noise_ceiling
from steerwell.evals.pair_scores import Scorer, scorer
from steerwell.evals.probes import MEANING, best_completion, probe
from steerwell.evals.winrate import Coverage

SHOWN_SLICES = 12
PROBED = 200


def reward_model(groups: Sequence[CompletionGroup], *, probe_prompts: int = PROBED) -> Task:
    """Measure a reward model on ``groups``: those with resolved ``pairs``, and those with 3 or more completions
    that have scores (``scores``, or score annotations by anyone but the model itself) or ``ranks``.

    A policy beside its reference is measured by its implicit reward with beta = 1. The probes are made from
    the first ``probe_prompts`` prompts; 0 leaves them out. Raises :class:`InputError` when there is no group
    with a pair or with scores enough.
    """
    if probe_prompts < 0:
        raise InputError(f"probe_prompts must be 0 or more, got {probe_prompts}", mend="0: no probes.")
    held_out = tuple(g for g in groups if g.pairs or has_gold(g))
    if not held_out:
        raise InputError(
            f"reward_model needs pairs; 0 of {len(groups)} groups have one",
            mend="Resolve the annotations first, e.g. resolve.majority(groups).",
        )

    def measure(trial: Trial) -> Findings:
        score = scorer(trial)
        scores = score(held_out)
        pairs = read_pairs(held_out, scores)
        carried = float(getattr(getattr(trial.policy, "recipe", None), "temperature", None) or 1.0)
        found = [
            *_accuracy(pairs),
            *_slices(pairs),
            *calibration_measures(pairs, carried),
            *_probes(held_out, score, trial.policy, probe_prompts),
            *best_of_n_measures(held_out, scores, trial.policy),
        ]
        return Findings(tuple(found), held_out)

    return Task("reward_model", (), measure, needs_rewards=True, beside=True)


def _accuracy(pairs: Sequence[HeldOutPair]) -> list[Measure]:
    """Overall, beside the length rule and the ceiling."""
    if not pairs:
        return []
    section = "accuracy, all pairs"
    overall = share("rm_accuracy", pairs, section=section)
    ties = sum(pair.right is not None and pair.margin == 0 for pair in pairs)
    overall = replace(overall, notes=(str(overall.coverage), f"{ties} exact ties, each counted as half"))
    longer = share("longer_wins", pairs, lambda pair: pair.longer, None, section=section)
    shorter = share(
        "shorter_wins",
        pairs,
        lambda pair: None if pair.longer is None else 1 - pair.longer,
        None,
        section=section,
        shown=False,
    )
    over_length = _over_length(pairs, longer, section)
    found = noise_ceiling(pairs)
    missing = found.pairs - found.repeated
    coverage = Coverage(
        found.pairs,
        found.repeated,
        {"have no second annotator, whose votes would show the noise of the labels": missing}
        if missing
        else {},
    )
    notes = [f"{found.repeated} of {found.pairs} pairs have votes by two annotators or more"]
    if found.bounds is None:
        notes.insert(0, "cannot be known: no pair was judged by two annotators")
    else:
        notes.append("p ~ Beta(a, a) with the agreement seen; pairs with one vote taken to be as noisy")
    bounds = (
        ()
        if found.bounds is None
        else (f"whatever the distribution of p: between {found.bounds[0]:.3f} and {found.bounds[1]:.3f}",)
    )
    alike = {"section": section, "coverage": coverage}
    alone = {"items": (), "clusters": {}}  # of the data, not of the model: there is nothing to subtract
    return [
        overall,
        replace(longer, **alone),
        replace(shorter, **alone),
        over_length,
        Measure("rm_ceiling", found.labels, notes=tuple(notes), **alike),
        Measure("rm_ceiling/one_vote", found.single, notes=(*notes, *bounds), shown=False, **alike),
        Measure("rm_agreement", found.agreement, notes=tuple(notes), shown=bool(found.repeated), **alike),
    ]


def _over_length(pairs: Sequence[HeldOutPair], longer: Measure, section: str) -> Measure:
    """Accuracy less that of the better length rule on the same pairs."""
    rule = "longer" if (longer.estimate.value or 0.0) >= 0.5 else "shorter"
    by_rule = [
        None if pair.longer is None else pair.longer if rule == "longer" else 1 - pair.longer
        for pair in pairs
    ]
    right = [pair.right for pair in pairs]
    items = tuple(
        (pair.key, None if a is None or b is None else a - b)
        for pair, a, b in zip(pairs, right, by_rule, strict=True)
    )
    prompts = [pair.prompt for pair in pairs]
    several = len(set(prompts)) < len(prompts)
    judged = sum(v is not None for _, v in items)
    return Measure(
        "rm_over_length",
        stats.paired_difference(right, by_rule, prompts if several else None, shares=True),
        Coverage(
            len(items),
            judged,
            {"no score or no preferred side": len(items) - judged} if judged < len(items) else {},
        ),
        better="higher",
        items=items,
        clusters={pair.key: pair.prompt for pair in pairs} if several else {},
        unit="number",
        notes=(f"rm_accuracy less the accuracy of 'the {rule} one wins', the better rule on these pairs",),
        section=section,
    )


def _slices(pairs: Sequence[HeldOutPair]) -> list[Measure]:
    found = []
    orders = {
        "length": LENGTH_SIDES,
        "length_ratio": LENGTH_RATIOS,
        "votes": VOTE_TIERS,
        "domain": (),
        "source": (),
        "chosen_from": (),
    }
    for tag, order in orders.items():
        part = slices("rm_accuracy", pairs, tag, order, section="accuracy by slice")
        shown = 0 if tag == "length_ratio" else SHOWN_SLICES
        found += [m if i < shown else replace(m, shown=False) for i, m in enumerate(part)]
    return found


def _probes(groups: Sequence[CompletionGroup], score: Scorer, model: Any, count: int) -> list[Measure]:
    possible = [group for group in groups if best_completion(group, model) is not None]
    first = list({group.prompt_id: group for group in possible}.values())[:count]
    if not first:
        return []
    found = []
    for result in probe(first, score, model):
        values = [value for _, value in result.outcomes]
        coverage = Coverage(len(values), sum(v is not None for v in values), result.missing)
        notes = (
            f"share of prompts whose good completion scores lower than it does with: {MEANING[result.name]}",
            f"{len(first)} of {len(possible)} prompts",
        )
        found.append(
            Measure(
                f"probe/{result.name}",
                stats.proportion(values),
                coverage,
                "lower",
                items=result.outcomes,
                notes=notes,
                section="probes: the spoilt one is preferred",
            )
        )
    return found


__all__ = ["reward_model"]
