"""A first look at evidence: how much there is, do annotators agree, what gives their verdicts away.

print(audit(store.groups()))

Agreement needs two verdicts about the same pair of completions under the same criterion; preferences and the
pairs implied by rankings count alike. Intervals are Wilson's at 95 %.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from steerwell.data.evidence import Comparison, comparisons, unique
from steerwell.data.types import Completion, CompletionGroup

_Z95 = 1.959963984540054


class Share(NamedTuple):
    """A proportion with its 95 % interval and the number of observations."""

    value: float
    low: float
    high: float
    n: int


def wilson(value: float, n: int) -> Share:
    """The share ``value`` of ``n`` observations with Wilson's score interval (Wilson 1927)."""
    z2 = _Z95 * _Z95 / n
    middle = (value + z2 / 2) / (1 + z2)
    half = _Z95 * math.sqrt(value * (1 - value) / n + z2 / (4 * n)) / (1 + z2)
    return Share(value, max(0.0, middle - half), min(1.0, middle + half), n)


@dataclass(frozen=True)
class Agreement:
    """Agreement over pairs of completions with two verdicts or more.

    ``observed``: of two verdicts about one pair, how often they are the same. ``alpha``: Krippendorff's
    alpha for nominal values (win, loss, tie), 1 is full agreement and 0 is chance. None where no pair has
    two verdicts, or (alpha) where all verdicts are ties.
    """

    observed: float | None
    alpha: float | None
    pairs: int  # pairs of completions with at least two verdicts
    verdicts: int  # verdicts about them


@dataclass(frozen=True)
class AnnotatorAudit:
    """What one annotator did."""

    annotations: int
    no_verdict: int
    first_shown: Share | None  # preferred the completion shown first
    longer: Share | None  # preferred the longer completion
    contradictions: int  # pairs where it preferred each side at least once


@dataclass(frozen=True)
class Audit:
    """Counts, agreement and signs of trouble. None where nothing can be said: never 0 for "not measured".

    ``first_shown`` (only where the order shown is known) and ``longer`` (by characters, equal lengths left
    out) are shares of untied verdicts. The pairs of one ranking are not independent, so their intervals
    count each annotation once.
    """

    prompts: int
    completions: int
    annotations: int
    no_verdict: Share | None
    kinds: dict[str, int]
    agreement: Agreement
    first_shown: Share | None
    longer: Share | None
    duplicate_completions: int  # completions with the text of an earlier one of the same prompt
    equal_texts: int  # untied verdicts between two samples with the same text: noise
    contradictions: int  # annotator, pair and criterion with verdicts both ways
    annotators: dict[str, AnnotatorAudit] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-like values; a share is ``{"value", "low", "high", "n"}``."""
        return _plain(asdict(self))

    def __str__(self) -> str:
        def share(s: Share | None) -> str:
            return "not measured" if s is None else f"{s.value:.3f} [{s.low:.3f}, {s.high:.3f}], n = {s.n}"

        a = self.agreement
        if a.observed is None:
            agree = "not measured (no pair has two verdicts)"
        else:
            alpha = "undefined" if a.alpha is None else f"{a.alpha:.3f}"
            agree = f"{a.observed:.3f} observed, alpha {alpha}, {a.pairs} pairs with {a.verdicts} verdicts"
        return "\n".join(
            [
                f"{self.prompts} prompts, {self.completions} completions, {self.annotations} annotations by "
                f"{len(self.annotators)} annotators",
                f"no verdict: {share(self.no_verdict)}",
                f"agreement: {agree}",
                f"first shown preferred: {share(self.first_shown)}",
                f"longer preferred: {share(self.longer)}",
                f"{self.duplicate_completions} duplicate completions, {self.contradictions} contradictions, "
                f"{self.equal_texts} verdicts between equal texts",
            ]
        )


def _plain(value: Any) -> Any:
    if isinstance(value, Share):
        return value._asdict()
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    return value


class _Tally:
    """Verdicts that can be about the side or the length: wins, and how many annotations they come from."""

    def __init__(self) -> None:
        self.wins = self.verdicts = self.annotations = 0

    def add(self, outcomes: Sequence[bool]) -> None:
        self.wins += sum(outcomes)
        self.verdicts += len(outcomes)
        self.annotations += bool(outcomes)

    def share(self) -> Share | None:
        return wilson(self.wins / self.verdicts, self.annotations) if self.verdicts else None


def audit(groups: Iterable[CompletionGroup]) -> Audit:
    """Look at the annotations of the groups. See :class:`Audit` for what is measured."""
    groups = list(groups)
    completions = {c.id: c for g in groups for c in g.completions}
    annotations = unique(a for g in groups for a in g.annotations)
    first: dict[str, _Tally] = defaultdict(_Tally)
    longer: dict[str, _Tally] = defaultdict(_Tally)
    every = ""  # no annotator has an empty name: the tally over all of them
    verdicts: dict[tuple[str, str, str], list[tuple[str, str | None]]] = defaultdict(list)
    equal_texts = 0
    for annotation in annotations:
        stated = list(comparisons(annotation))
        for c in stated:
            key = (annotation.criterion, *sorted((c.first, c.second)))
            winner = None if c.winner is None else (c.first, c.second)[c.winner]
            verdicts[key[0], key[1], key[2]].append((annotation.annotator, winner))
        untied = [c for c in stated if c.winner is not None]
        equal_texts += sum(_equal(c, completions) for c in untied)
        for tally in (first[annotation.annotator], first[every]):
            tally.add([c.winner == 0 for c in untied] if annotation.order_known else [])
        won = [w for c in untied if (w := _longer_won(c, completions)) is not None]
        for tally in (longer[annotation.annotator], longer[every]):
            tally.add(won)
    contradictions = _contradictions(verdicts)
    counts, missing = Counter(a.annotator for a in annotations), Counter()
    missing.update(a.annotator for a in annotations if a.value is None)
    return Audit(
        prompts=len({g.prompt for g in groups}),
        completions=len(completions),
        annotations=len(annotations),
        no_verdict=wilson(missing.total() / len(annotations), len(annotations)) if annotations else None,
        kinds=dict(Counter(a.kind for a in annotations)),
        agreement=_agreement([[winner for _, winner in given] for given in verdicts.values()]),
        first_shown=first[every].share(),
        longer=longer[every].share(),
        duplicate_completions=len(completions) - len({c.text_id for c in completions.values()}),
        equal_texts=equal_texts,
        contradictions=contradictions.total(),
        annotators={
            name: AnnotatorAudit(
                n, missing[name], first[name].share(), longer[name].share(), contradictions[name]
            )
            for name, n in counts.most_common()
        },
    )


def _equal(c: Comparison, completions: dict[str, Completion]) -> bool:
    a, b = completions.get(c.first), completions.get(c.second)
    return a is not None and b is not None and a.text_id == b.text_id


def _longer_won(c: Comparison, completions: dict[str, Completion]) -> bool | None:
    """Whether the longer completion won; None when they are equally long or one is not at hand."""
    a, b = completions.get(c.first), completions.get(c.second)
    if a is None or b is None or len(a.text) == len(b.text):
        return None
    return (len(b.text) > len(a.text)) == (c.winner == 1)


def _contradictions(verdicts: dict[tuple[str, str, str], list[tuple[str, str | None]]]) -> Counter[str]:
    """For each annotator, the pairs (under one criterion) that it decided both ways."""
    found: Counter[str] = Counter()
    for given in verdicts.values():
        sides: dict[str, set[str]] = defaultdict(set)
        for annotator, winner in given:
            if winner is not None:
                sides[annotator].add(winner)
        found.update(annotator for annotator, winners in sides.items() if len(winners) > 1)
    return found


def _agreement(units: Iterable[Sequence[str | None]]) -> Agreement:
    """Observed agreement and Krippendorff's alpha (Krippendorff 2011, nominal) of units of winners or ties.

    Which completion of a pair is called the first is arbitrary, so each unit counts in both orientations: the
    expected share of wins equals that of losses, and the figure does not depend on ids.
    """
    same = different = 0
    disagreement = 0.0  # of ordered pairs of verdicts within a unit, divided by (verdicts - 1)
    pairs = verdicts = ties = 0
    for unit in units:
        m = len(unit)
        if m < 2:
            continue
        equal = sum(a == b for a, b in combinations(unit, 2))
        unequal = m * (m - 1) // 2 - equal
        same, different = same + equal, different + unequal
        disagreement += 2 * unequal / (m - 1)
        pairs, verdicts, ties = pairs + 1, verdicts + m, ties + sum(w is None for w in unit)
    if not pairs:
        return Agreement(None, None, 0, 0)
    # Both orientations: twice the verdicts, each decided one a win once and a loss once.
    n, decided, tied = 2 * verdicts, verdicts - ties, 2 * ties
    expected = n * n - 2 * decided * decided - tied * tied  # ordered pairs of unequal values
    alpha = None if expected == 0 else 1 - (n - 1) * 2 * disagreement / expected
    return Agreement(same / (same + different), alpha, pairs, verdicts)


__all__ = ["Agreement", "AnnotatorAudit", "Audit", "Share", "audit", "wilson"]
