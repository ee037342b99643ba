"""A brief audit of preference data: how much there is, how far annotators agree, and which biases show.

Nothing here changes data. Every share says out of how many, and an annotation without a verdict is counted as
that and as nothing else.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

from steerwell.data.evidence import Comparison, comparisons, unique
from steerwell.data.types import CompletionGroup

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Share:
    """A share with its 95% Wilson interval; all None when there was nothing to count."""

    value: float | None
    low: float | None
    high: float | None
    n: int

    @classmethod
    def of(cls, hits: float, n: int) -> Share:
        """``hits`` of ``n``; half hits are ties."""
        if not n:
            return cls(None, None, None, 0)
        p, z2 = hits / n, Z95**2
        centre = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = Z95 * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return cls(p, max(0.0, centre - half), min(1.0, centre + half), n)


@dataclass(frozen=True)
class Audit:
    """What :func:`audit` found.

    ``agreement`` is the share of pairs of verdicts by different annotators on the same two completions that
    say the same; ``alpha`` is Krippendorff's alpha for nominal values on them (1 perfect, 0 chance, None when
    no two annotators met or nobody ever varied). ``first_shown`` and ``longer`` are the shares of decided
    comparisons won by the completion shown first, and by the one with more words (equal lengths left out).
    ``contradictions`` counts annotators who said opposite things about the same two completions.
    """

    prompts: int
    completions: int
    annotations: int
    no_verdict: int
    comparisons: int
    ties: int
    duplicates: int
    contradictions: int
    overlapping: int
    agreement: Share
    alpha: float | None
    first_shown: Share
    longer: Share
    by_annotator: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return asdict(self)


def audit(groups: Iterable[CompletionGroup]) -> Audit:
    """Audit groups with their annotations.

    ``duplicates`` counts completions beyond the first with equal text after the same prompt; ``overlapping``
    the pairs of completions that more than one annotator compared.
    """
    groups = list(groups)
    annotations = unique(a for group in groups for a in group.annotations)
    words = {c.id: len(c.text.split()) for group in groups for c in group.completions}
    texts = Counter(c.text_id for group in groups for c in group.completions)
    votes: dict[frozenset[str], dict[str, list[str | None]]] = defaultdict(lambda: defaultdict(list))
    found: list[Comparison] = []
    sides: list[bool] = []  # whether the first shown won, where it is known which was shown first
    for annotation in annotations:
        for comparison in comparisons(annotation):
            found.append(comparison)
            if annotation.order_known and comparison.winner is not None:
                sides.append(comparison.winner == 0)
            shown = (comparison.first, comparison.second)
            winner = None if comparison.winner is None else shown[comparison.winner]
            pair = frozenset(shown)
            votes[pair][annotation.annotator].append(winner)
    decided = [c for c in found if c.winner is not None]
    unequal = [c for c in decided if words.get(c.first, 0) != words.get(c.second, 0)]
    units = [[said[-1] for said in by.values()] for by in votes.values() if len(by) > 1]
    return Audit(
        prompts=len({group.prompt_id for group in groups}),
        completions=len(words),
        annotations=len(annotations),
        no_verdict=sum(a.value is None for a in annotations),
        comparisons=len(found),
        ties=len(found) - len(decided),
        duplicates=sum(texts.values()) - len(texts),
        contradictions=sum(
            len({w for w in said if w is not None}) > 1 for by in votes.values() for said in by.values()
        ),
        overlapping=len(units),
        agreement=_agreement(units),
        alpha=krippendorff_alpha([[_side(pair, w) for w in unit] for pair, unit in _met(votes)]),
        first_shown=Share.of(sum(sides), len(sides)),
        longer=Share.of(
            sum((c.winner == 0) == (words.get(c.first, 0) > words.get(c.second, 0)) for c in unequal),
            len(unequal),
        ),
        by_annotator=dict(Counter(a.annotator for a in annotations).most_common()),
    )


def _met(
    votes: dict[frozenset[str], dict[str, list[str | None]]],
) -> Iterable[tuple[frozenset[str], list[str | None]]]:
    """The pairs that several annotators compared, with the last verdict of each."""
    return ((pair, [said[-1] for said in by.values()]) for pair, by in votes.items() if len(by) > 1)


def _side(pair: frozenset[str], winner: str | None) -> str:
    """A verdict as a value that means the same on every pair: the winner's place by id, or a tie.

    Ids are hashes, so the place carries no meaning of its own and chance agreement is one half.
    """
    return "tie" if winner is None else str(sorted(pair).index(winner))


def _agreement(units: Sequence[Sequence[str | None]]) -> Share:
    meetings = [a == b for unit in units for a, b in combinations(unit, 2)]
    return Share.of(sum(meetings), len(meetings))


def krippendorff_alpha(units: Iterable[Sequence[str]]) -> float | None:
    """Krippendorff's alpha for nominal values: 1 − observed over expected disagreement.

    ``units`` has the values that each thing was given; things with fewer than two are left out. With o_cc' the
    coincidences (each ordered pair of values of a unit counts 1/(m − 1)) and n_c their margins,
    alpha = 1 − (n − 1)·Σ_{c≠c'} o_cc' / Σ_{c≠c'} n_c·n_c' (Krippendorff 2011, nominal metric). None when
    nothing can be paired or only one value was ever used.
    """
    margins: Counter[str] = Counter()
    observed = 0.0
    for unit in units:
        if len(unit) < 2:
            continue
        counts = Counter(unit)
        margins.update(counts)
        observed += sum(c * (len(unit) - c) for c in counts.values()) / (len(unit) - 1)
    n = sum(margins.values())
    expected = n * n - sum(c * c for c in margins.values())
    return None if not expected else 1 - (n - 1) * observed / expected


__all__ = ["Audit", "Share", "audit", "krippendorff_alpha"]
