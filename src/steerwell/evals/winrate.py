"""How often one policy's completions are preferred to another's, from scores or from verdicts.

A win is keyed by the id of the completion that won, never by the place where it was shown. The order effect
is reported beside the rate, and every comparison is accounted for: expected = judged + missing, by reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.messages import conversation_id
from steerwell.data.types import Annotation, Completion
from steerwell.evals import stats
from steerwell.evals.stats import NOTHING, Estimate


@dataclass(frozen=True)
class Coverage:
    """The ledger of one number: what was expected, what was judged, and why the rest is missing."""

    expected: int
    judged: int
    missing: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.expected != self.judged + sum(self.missing.values()):
            raise ValueError(f"the ledger does not add up: {self}")

    @property
    def complete(self) -> bool:
        """Was everything judged that should have been?"""
        return self.expected == self.judged

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {"expected": self.expected, "judged": self.judged, "missing": dict(self.missing)}

    def __str__(self) -> str:
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.missing.items())
        return f"{self.judged} of {self.expected} judged" + (f" ({reasons})" if reasons else "")


@dataclass(frozen=True)
class Comparison:
    """One completion against another: 1 a win of ``completion``, 0 a loss, 0.5 a tie, None not judged.

    Between these lie means over several verdicts. ``why`` names the reason where ``outcome`` is None.
    """

    prompt_id: str
    completion: str
    against: str
    outcome: float | None
    verdicts: int = 0
    why: str = ""


@dataclass(frozen=True)
class WinRate:
    """A win rate with everything that is needed to doubt it."""

    estimate: Estimate  # over prompts: comparisons of one prompt are averaged first
    wins: int
    ties: int
    losses: int
    coverage: Coverage
    comparisons: tuple[Comparison, ...]
    identical: int = 0  # ties because the two texts are equal
    first_shown: Estimate = NOTHING  # share of decided verdicts won by the completion shown first
    orders_agree: Estimate = NOTHING  # share of comparisons shown in both orders with the same winner

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the comparisons."""
        return {
            **self.estimate.to_dict(),
            "wins": self.wins,
            "ties": self.ties,
            "losses": self.losses,
            "identical": self.identical,
            "first_shown": self.first_shown.to_dict(),
            "orders_agree": self.orders_agree.to_dict(),
            "coverage": self.coverage.to_dict(),
        }


def compare_scores(
    scores: Sequence[float | None], against: Sequence[float | None], prompts: Sequence[str] | None = None
) -> WinRate:
    """Win rate from paired scores of one scale: item i of ``scores`` against item i of ``against``.

    ``prompts`` are the prompt ids of the items (several items may share one); without it each item is a
    prompt of its own. A None on either side is a missing comparison.
    """
    if len(scores) != len(against) or (prompts is not None and len(prompts) != len(scores)):
        raise InputError(
            f"{len(scores)} scores against {len(against)}", mend="Give the same items in the same order."
        )
    found = []
    for i, (ours, theirs) in enumerate(zip(scores, against, strict=True)):
        outcome = None if ours is None or theirs is None else _beats(ours, theirs)
        prompt = str(i) if prompts is None else prompts[i]
        judged = outcome is not None
        found.append(Comparison(prompt, "", "", outcome, int(judged), "" if judged else "no score"))
    return summarise(found)


def compare(
    pairs: Sequence[tuple[Completion, Completion]],
    annotations: Iterable[Annotation],
    *,
    criterion: str | None = None,
) -> WinRate:
    """Win rate of the first completion of each pair over the second, from what annotators said about them.

    Read, in this order of precedence per pair: ``preference`` and ``ranking`` annotations that showed both
    completions, else ``score`` annotations of both by the same annotator and criterion. Several verdicts on a
    pair are averaged; a tie and "both bad" are half a win. Failed verdicts (None) are counted, never guessed.
    Where any pair was shown in both orders, the protocol is "both orders": a pair with verdicts in one order
    only is set aside and counted, as a single order carries the annotator's side bias. Equal texts are a tie
    without asking anybody.

    Raises :class:`InputError` when a pair compares a completion with itself or with one of another prompt.
    """
    for ours, theirs in pairs:
        if ours.prompt != theirs.prompt or ours.id == theirs.id:
            raise InputError(
                "a pair must hold two different completions of one prompt",
                mend="Name the policies differently, so that their samples can be told apart.",
            )
    shown, scored = _index(annotations, criterion)
    verdicts = [_verdicts(ours, theirs, shown, scored) for ours, theirs in pairs]
    both = any({v.order for v in found} >= {0, 1} for found in verdicts)
    comparisons = [
        _comparison(ours, theirs, found, both) for (ours, theirs), found in zip(pairs, verdicts, strict=True)
    ]
    identical = sum(ours.text_id == theirs.text_id for ours, theirs in pairs)
    first, agree = _order_effect(comparisons, verdicts)
    return summarise(comparisons, identical=identical, first_shown=first, orders_agree=agree)


def summarise(
    comparisons: Sequence[Comparison],
    *,
    identical: int = 0,
    first_shown: Estimate = NOTHING,
    orders_agree: Estimate = NOTHING,
) -> WinRate:
    """The win rate of a list of comparisons. Each prompt counts once: its comparisons are averaged first."""
    by_prompt: dict[str, list[float]] = {}
    for c in comparisons:
        if c.outcome is not None:
            by_prompt.setdefault(c.prompt_id, []).append(c.outcome)
    outcomes = [c.outcome for c in comparisons if c.outcome is not None]
    return WinRate(
        estimate=stats.win_rate([sum(found) / len(found) for found in by_prompt.values()]),
        wins=sum(o > 0.5 for o in outcomes),
        ties=sum(o == 0.5 for o in outcomes),
        losses=sum(o < 0.5 for o in outcomes),
        coverage=Coverage(
            len(comparisons), len(outcomes), dict(Counter(c.why for c in comparisons if c.outcome is None))
        ),
        comparisons=tuple(comparisons),
        identical=identical,
        first_shown=first_shown,
        orders_agree=orders_agree,
    )


@dataclass(frozen=True, slots=True)
class _Verdict:
    """What one judgement says of a pair. ``order``: 0 ours was shown first, 1 theirs was, None neither."""

    outcome: float | None
    order: int | None


_Shown = dict[frozenset[str], list[Annotation]]
_Scored = dict[str, dict[tuple[str, str], float | None]]


def _beats(ours: float, theirs: float) -> float:
    return 0.5 if ours == theirs else float(ours > theirs)


def _index(annotations: Iterable[Annotation], criterion: str | None) -> tuple[_Shown, _Scored]:
    """Annotations by the pairs of completions they showed, and scores by completion."""
    shown: _Shown = {}
    scored: _Scored = {}
    for a in annotations:
        if criterion is not None and a.criterion != criterion:
            continue
        if a.kind == "score":
            scored.setdefault(a.completions[0], {})[(a.annotator, a.criterion)] = a.value
        elif a.kind == "preference":
            shown.setdefault(frozenset(a.completions), []).append(a)
        elif a.kind == "ranking":
            for i, one in enumerate(a.completions):
                for other in a.completions[i + 1 :]:
                    shown.setdefault(frozenset((one, other)), []).append(a)
    return shown, scored


def _verdicts(ours: Completion, theirs: Completion, shown: _Shown, scored: _Scored) -> list[_Verdict]:
    """All that was said about one pair, as outcomes of ``ours``."""
    annotations = shown.get(frozenset((ours.id, theirs.id)), [])
    if annotations:
        return [_read(a, ours.id, theirs.id) for a in annotations]
    mine, other = scored.get(ours.id, {}), scored.get(theirs.id, {})
    found = []
    for key in mine.keys() & other.keys():
        a, b = mine[key], other[key]
        found.append(_Verdict(None if a is None or b is None else _beats(a, b), None))
    return found


def _read(a: Annotation, ours: str, theirs: str) -> _Verdict:
    """One preference or ranking as an outcome of ``ours``, keyed by id."""
    mine, other = a.completions.index(ours), a.completions.index(theirs)
    order = int(mine > other)
    if a.value is None:
        return _Verdict(None, order)
    if a.kind == "ranking":
        return _Verdict(_beats(-a.value[mine], -a.value[other]), order)
    if a.value in ("tie", "both_bad"):
        return _Verdict(0.5, order)
    if isinstance(a.value, str) or a.value not in (0, 1):
        raise InputError(
            f"a preference has the value {a.value!r}", mend="It must be 0, 1, 'tie', 'both_bad' or None."
        )
    return _Verdict(float(a.completions[int(a.value)] == ours), order)


def _comparison(ours: Completion, theirs: Completion, found: list[_Verdict], both: bool) -> Comparison:
    """Settle one pair: the mean verdict, or the reason why there is none."""
    usable = [v for v in found if v.outcome is not None]
    orders = {v.order for v in usable if v.order is not None}
    outcome, why = None, ""
    if ours.text_id == theirs.text_id:
        outcome = 0.5
    elif not found:
        why = "never judged"
    elif not usable:
        why = "no verdict"
    elif both and len(orders) == 1:
        why = "one order only"
    else:
        # orders weigh equally, however many verdicts each has
        means = [
            _mean([v.outcome for v in usable if v.order == order]) for order in {v.order for v in usable}
        ]
        outcome = _mean(means)
    return Comparison(conversation_id(ours.prompt), ours.id, theirs.id, outcome, len(usable), why)


def _mean(values: Sequence[float | None]) -> float:
    numbers = [v for v in values if v is not None]
    return sum(numbers) / len(numbers)


def _order_effect(
    comparisons: Sequence[Comparison], verdicts: Sequence[Sequence[_Verdict]]
) -> tuple[Estimate, Estimate]:
    """Share of decided verdicts won by the side shown first, and share of pairs whose two orders agree."""
    first: list[float] = []
    prompts: list[str] = []
    agree: list[bool] = []
    agree_prompts: list[str] = []
    for c, found in zip(comparisons, verdicts, strict=True):
        for v in found:
            if v.order is not None and v.outcome in (0.0, 1.0):
                first.append(float((v.outcome == 1.0) == (v.order == 0)))
                prompts.append(c.prompt_id)
        means = [
            _mean(said)
            for order in (0, 1)
            if (said := [v.outcome for v in found if v.order == order and v.outcome is not None])
        ]
        if len(means) == 2:
            one, other = means
            agree.append((one > 0.5, one < 0.5) == (other > 0.5, other < 0.5))
            agree_prompts.append(c.prompt_id)
    return stats.proportion(first, prompts), stats.proportion(agree, agree_prompts)


__all__ = ["Comparison", "Coverage", "WinRate", "compare", "compare_scores", "summarise"]
