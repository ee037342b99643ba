"""Held-out pairs with what a model says of them, and the accuracy on any part of them.

A pair is turned so that ``margin`` is the score of the side that the labels prefer less that of the other.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from steerwell.data.evidence import comparisons
from steerwell.data.types import CompletionGroup
from steerwell.evals import stats
from steerwell.evals.measure import Better, Measure
from steerwell.evals.winrate import Coverage

DOMAIN_KEYS = ("domain", "category", "subset", "section", "task_category")
NOT_NAMED = "not named"
LENGTH_SIDES = ("chosen longer", "about equal", "chosen shorter")
LENGTH_RATIOS = ("under 1/2", "1/2 to 0.9", "0.9 to 1.1", "1.1 to 2", "over 2")
VOTE_TIERS = ("all agree", "3/4 or more", "under 3/4", "one vote", "no vote kept")


@dataclass(frozen=True)
class HeldOutPair:
    """One labelled pair of a group. ``p`` >= 0.5 is the probability that the preferred side is the better one.

    ``margin`` is None where a score is missing. ``words`` are the lengths (preferred, other) in words.
    ``votes`` (for, against) count annotators, each once: decided votes only.
    """

    key: str
    prompt: str
    p: float
    margin: float | None
    words: tuple[int, int]
    votes: tuple[int, int]
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def right(self) -> float | None:
        """1 where the preferred side scores higher, 0.5 for equal scores, None where it can't be said."""
        if self.margin is None or self.p == 0.5:
            return None
        return 0.5 if self.margin == 0 else float(self.margin > 0)

    @property
    def longer(self) -> float | None:
        """1 where the preferred side has more words, 0.5 for as many, None where neither is preferred."""
        one, other = self.words
        return None if self.p == 0.5 else 0.5 if one == other else float(one > other)


def read_pairs(
    groups: Sequence[CompletionGroup], scores: Sequence[Sequence[float | None]]
) -> list[HeldOutPair]:
    """The pairs of ``groups`` with the margins of ``scores`` (one score per completion of each group)."""
    found = []
    for group, given in zip(groups, scores, strict=True):
        votes = votes_by_pair(group)
        for pair in group.pairs:
            one, other = (pair.chosen, pair.rejected) if pair.p >= 0.5 else (pair.rejected, pair.chosen)
            a, b = given[one], given[other]
            first, second = group.completions[one], group.completions[other]
            cast = votes.get((one, other), (0, 0))
            words = len(first.text.split()), len(second.text.split())
            found.append(
                HeldOutPair(
                    f"{first.id}>{second.id}",
                    group.prompt_id,
                    max(pair.p, 1 - pair.p),
                    None if a is None or b is None else float(a) - float(b),
                    words,
                    cast,
                    _tags(group, first.source.name, words, cast),
                )
            )
    return found


def votes_by_pair(group: CompletionGroup) -> dict[tuple[int, int], tuple[int, int]]:
    """Decided votes ``{(i, j): (for i, for j)}``, both ways round, each annotator once for a pair.

    An annotator who judged a pair several times (in both orders, by several criteria) gives one vote for the
    side preferred more often, and none where the sides come out equal: repeats by one are no second opinion.
    """
    place = {c.id: i for i, c in enumerate(group.completions)}
    lean: dict[tuple[int, int], Counter[str]] = {}
    for annotation in group.annotations:
        for first, second, winner in comparisons(annotation):
            if first not in place or second not in place or winner is None:
                continue
            i, j = place[first], place[second]
            sign = (1 if winner == 0 else -1) * (1 if i < j else -1)
            lean.setdefault((min(i, j), max(i, j)), Counter())[annotation.annotator] += sign
    found = {}
    for (i, j), by in lean.items():
        for_i, for_j = sum(v > 0 for v in by.values()), sum(v < 0 for v in by.values())
        found[i, j], found[j, i] = (for_i, for_j), (for_j, for_i)
    return found


def _tags(
    group: CompletionGroup, source: str, words: tuple[int, int], votes: tuple[int, int]
) -> dict[str, str]:
    domain = next((str(group.meta[key]) for key in DOMAIN_KEYS if group.meta.get(key) is not None), NOT_NAMED)
    return {
        "domain": domain,
        "source": str(group.meta.get("source") or NOT_NAMED),
        "chosen_from": source or NOT_NAMED,
        "length": length_side(*words),
        "length_ratio": length_ratio(*words),
        "votes": vote_tier(*votes),
    }


def length_side(preferred: int, other: int) -> str:
    """``about equal`` where the shorter side has at least 9 words for 10 of the longer one."""
    if min(preferred, other) >= 0.9 * max(preferred, other):
        return LENGTH_SIDES[1]
    return LENGTH_SIDES[0] if preferred > other else LENGTH_SIDES[2]


def length_ratio(preferred: int, other: int) -> str:
    """The bin of preferred / other, in words; the middle one is what :func:`length_side` calls equal."""
    if length_side(preferred, other) == "about equal":
        return LENGTH_RATIOS[2]
    if preferred < other:
        return LENGTH_RATIOS[0 if preferred < other / 2 else 1]
    return LENGTH_RATIOS[4 if preferred > 2 * other else 3]


def vote_tier(for_it: int, against: int) -> str:
    """How far the annotators of a pair agree on the preferred side."""
    total = for_it + against
    if total < 2:
        return "one vote" if total else "no vote kept"
    if against == 0 or for_it == 0:
        return "all agree"
    return "3/4 or more" if max(for_it, against) >= 0.75 * total else "under 3/4"


def share(
    name: str,
    pairs: Iterable[HeldOutPair],
    value: Callable[[HeldOutPair], float | None] = lambda pair: pair.right,
    better: Better = "higher",
    **also: object,
) -> Measure:
    """The share of pairs by ``value`` (in [0, 1]; None is left out and counted), clustered by prompt."""
    pairs = list(pairs)
    items = tuple((pair.key, value(pair)) for pair in pairs)
    missing = Counter(
        "no preferred side" if pair.p == 0.5 else "no score"
        for pair, (_, v) in zip(pairs, items, strict=True)
        if v is None
    )
    prompts = [pair.prompt for pair in pairs]
    several = len(set(prompts)) < len(prompts)
    values = [v for _, v in items]
    return Measure(
        name,
        stats.proportion(values, prompts if several else None),
        Coverage(len(items), sum(v is not None for v in values), dict(missing)),
        better=better,
        items=items,
        clusters={pair.key: pair.prompt for pair in pairs} if several else {},
        **also,  # type: ignore[arg-type]
    )


def slices(
    prefix: str, pairs: Sequence[HeldOutPair], tag: str, order: Sequence[str] = (), **also: object
) -> list[Measure]:
    """The accuracy on each value of a tag, in ``order`` or the largest first; none where all have one value.

    A slice of three pairs is shown like any other: its interval says how little it knows.
    """
    found: dict[str, list[HeldOutPair]] = {}
    for pair in pairs:
        found.setdefault(pair.tags[tag], []).append(pair)
    if len(found) < 2:
        return []
    names = [name for name in order if name in found]
    names += sorted(found.keys() - set(names), key=lambda name: (-len(found[name]), name))
    return [share(f"{prefix}/{tag}={name}", found[name], **also) for name in names]  # type: ignore[arg-type]


__all__ = [
    "DOMAIN_KEYS",
    "LENGTH_RATIOS",
    "LENGTH_SIDES",
    "NOT_NAMED",
    "VOTE_TIERS",
    "HeldOutPair",
    "length_ratio",
    "length_side",
    "read_pairs",
    "share",
    "slices",
    "vote_tier",
    "votes_by_pair",
]
