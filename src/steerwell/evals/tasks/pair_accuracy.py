"""How often a reward model, or a policy's implicit reward, orders held-out pairs as the annotators did.

The implicit reward of a policy is beta * (logp - reference logp) (DPO, arXiv:2305.18290, equation 5 up to a
term of the prompt alone); beta > 0 does not change the order, so it has no say here. Without a reference the
score is the mean log-probability per token of the completion, and the measure is ``pair_accuracy_logp``: the
two are different numbers and are never subtracted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.evals import stats
from steerwell.evals.measure import Findings, Measure, Task, Trial
from steerwell.evals.pair_scores import MEAN_LOGP, score
from steerwell.evals.winrate import Coverage


def pair_accuracy(groups: Sequence[CompletionGroup], *, reference: Any = None) -> Task:
    """Score the completions of ``groups`` (with resolved ``pairs``) and count the pairs ordered rightly.

    A model with ``.score(groups)`` is a reward model. Any other is scored by its implicit reward against
    ``reference`` (default: the baseline of the evaluation); the reference itself by its mean log-probability.
    Raises :class:`InputError` when no group has a pair.
    """
    held_out = tuple(group for group in groups if group.pairs)
    if not held_out:
        raise InputError(
            f"pair_accuracy needs pairs; 0 of {len(groups)} groups have one",
            mend="Resolve the annotations first, e.g. resolve.majority(groups).",
        )

    def measure(trial: Trial) -> Findings:
        ref = trial.against if reference is None and not trial.is_baseline else reference
        how, scores = score(trial.policy, held_out, None if ref is trial.policy else ref)
        return Findings((accuracy(held_out, scores, how),), held_out)

    return Task("pair_accuracy", (), measure, beside=True)


def accuracy(
    groups: Sequence[CompletionGroup], scores: Sequence[Sequence[float | None]], how: str = "reward"
) -> Measure:
    """Share of pairs whose chosen completion scores higher: ties half, clustered by prompt, missing counted.

    A pair with a soft label p < 0.5 is turned round; p = 0.5 has no right order and is left out and counted.
    Many exact ties are an alarm (a padding or truncation fault gives equal scores): they are in the notes.
    """
    items: list[tuple[str, float | None]] = []
    prompts: list[str] = []
    missing: dict[str, int] = {}
    ties = 0
    for group, found in zip(groups, scores, strict=True):
        for pair in group.pairs:
            one, other = (pair.chosen, pair.rejected) if pair.p >= 0.5 else (pair.rejected, pair.chosen)
            a, b = found[one], found[other]
            outcome: float | None = None
            if pair.p == 0.5:
                missing["no preferred side"] = missing.get("no preferred side", 0) + 1
            elif a is None or b is None:
                missing["no score"] = missing.get("no score", 0) + 1
            else:
                outcome = 0.5 if a == b else float(a > b)
                ties += a == b
            items.append((f"{group.completions[one].id}>{group.completions[other].id}", outcome))
            prompts.append(group.prompt_id)
    values = [value for _, value in items]
    several = len(set(prompts)) < len(prompts)
    coverage = Coverage(len(items), sum(v is not None for v in values), missing)
    return Measure(
        "pair_accuracy_logp" if how == MEAN_LOGP else "pair_accuracy",
        stats.proportion(values, prompts if several else None),
        coverage,
        better="higher",
        items=tuple(items),
        clusters={key: prompt for (key, _), prompt in zip(items, prompts, strict=True)} if several else {},
        notes=(f"by {how}", str(coverage), f"{ties} exact ties, each counted as half"),
    )


__all__ = ["accuracy", "pair_accuracy", "score"]
