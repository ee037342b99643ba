"""A judge that compares pairs as a judge that scores completions, so that it can be a reward.

The completions of a group meet in pairs, in both orders, and the verdicts of a group are turned into one number
for each. Such a number says where a completion stands among the others of its group, and nothing else: scores
of two prompts have no common scale.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass, replace
from itertools import combinations
from typing import Any, NamedTuple

from steerwell.data.errors import InputError
from steerwell.data.evidence import comparisons
from steerwell.data.messages import digest
from steerwell.data.types import Annotation, Completion, CompletionGroup
from steerwell.judges.judge import Judge
from steerwell.judges.strengths import bradley_terry, least_squares

DIGITS = (
    9  # of scores after the point: completions that fare alike get equal scores, whatever the fit's rounding
)
FEWEST_OPPONENTS = 2  # with one each, no chain of comparisons would connect the group


class Verdict(NamedTuple):
    """What one annotation says of the completion shown first: its share of the win, or (of a judge with
    ``logprobs``) its log-odds. None: no verdict.
    """

    value: float | None
    seconds: float
    cost: float
    order_known: bool = True


class Meeting(NamedTuple):
    """All verdicts on one pair, as seen by its first member: the mean over both orders, and how many."""

    value: float | None
    verdicts: int
    failed: int
    set_aside: int


Heard = dict[tuple[str, str], list[Verdict]]


@dataclass(frozen=True)
class ScoredJudge:
    """Scores the completions of a group by what another judge says of pairs. Make one with :func:`scored`."""

    judge: Judge
    opponents: int | None = None
    votes: int = 1
    both_orders: bool = True
    prior: float = 0.5

    @property
    def name(self) -> str:
        """``scored:NAME/DIGEST``: the name of the judge of pairs, and a digest of how it is asked."""
        how = digest("bt", self.opponents, self.votes, self.both_orders, self.prior)
        return f"scored:{self.judge.name}/{how[:8]}"

    @property
    def log_odds(self) -> bool:
        """Whether the judge of pairs tells probabilities: it has a true attribute ``logprobs``."""
        return bool(getattr(self.judge, "logprobs", False))

    def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
        """One ``score`` per completion and criterion, centred at 0 in each group; None without any verdict.

        Raises :class:`InputError` when the judge of pairs gives something else than preferences, and what that
        judge raises itself.
        """
        fields = [_distinct(group) for group in groups]
        asked = [self._pairs(group, field) for group, field in zip(groups, fields, strict=True)]
        duels: dict[tuple[str, str], CompletionGroup] = {}
        for group, field, pairs in zip(groups, fields, asked, strict=True):
            for i, j in pairs:
                for one, other in ((i, j), (j, i))[: 1 + self.both_orders]:
                    two = (field[one][0], field[other][0])
                    duels[two[0].id, two[1].id] = CompletionGroup(group.prompt, two, meta=group.meta)
        said = list(self._asking()(list(duels.values()) * self.votes)) if duels else []
        self._check(said)
        heard: dict[str, Heard] = {}
        for annotation in said:
            _hear(heard.setdefault(annotation.criterion, defaultdict(list)), annotation, self.log_odds)
        return [
            annotation
            for group, field, pairs in zip(groups, fields, asked, strict=True)
            for criterion in (heard or {"overall": {}})
            for annotation in self._scores(group, field, pairs, criterion, heard.get(criterion, {}))
        ]

    def calls(self, completions: int) -> int:
        """How many comparisons a group of that many different completions takes."""
        return len(schedule(completions, self.opponents)) * (1 + self.both_orders) * self.votes

    def _asking(self) -> Judge:
        """The judge of pairs, showing each pair once as it is given: the orders are seen to here."""
        inner: Any = self.judge
        turns = is_dataclass(self.judge) and getattr(inner, "both_orders", False)
        return replace(inner, both_orders=False) if turns else inner

    def _pairs(self, group: CompletionGroup, field: list[list[Completion]]) -> list[tuple[int, int]]:
        """The pairs of a group to be compared. With a budget they are drawn by the texts alone, so that neither
        the order of the completions nor other groups have a say.
        """
        drawn = sorted(range(len(field)), key=lambda i: digest(group.prompt_id, field[i][0].text_id))
        found = [(drawn[i], drawn[j]) for i, j in schedule(len(field), self.opponents)]
        return sorted((min(pair), max(pair)) for pair in found)

    def _check(self, said: Sequence[Annotation]) -> None:
        kinds = {annotation.kind for annotation in said}
        if said and not kinds & {"preference", "ranking"}:
            only = ", ".join(sorted(kinds))
            raise InputError(
                f"{self.judge.name} compares nothing: it gives {only} annotations",
                mend="Use it as it is" + (": it scores already." if "score" in kinds else "."),
            )

    def _scores(
        self,
        group: CompletionGroup,
        field: list[list[Completion]],
        pairs: Sequence[tuple[int, int]],
        criterion: str,
        heard: Heard,
    ) -> list[Annotation]:
        met = {
            (i, j): _settle(
                heard.get((field[i][0].id, field[j][0].id), []),
                heard.get((field[j][0].id, field[i][0].id), []),
                self.both_orders,
                self.log_odds,
            )
            for i, j in pairs
        }
        scores = self._strengths(len(field), met)
        own = [[(m, k == i) for (i, j), m in met.items() if k in (i, j)] for k in range(len(field))]
        place = {c.id: k for k, same in enumerate(field) for c in same}
        values = [scores[place[c.id]] for c in group.completions]
        shift = _centre(values) + self._before(group, criterion, values)
        found = []
        for completion, value in zip(group.completions, values, strict=True):
            k = place[completion.id]
            verdicts = [
                v
                for i, j in pairs
                if k in (i, j)
                for a, b in ((i, j), (j, i))
                for v in heard.get((field[a][0].id, field[b][0].id), [])
            ]
            # a verdict's time and cost belong to both of its texts, and to their copies
            share = 2 * len(field[k])
            found.append(
                Annotation(
                    kind="score",
                    completions=(completion.id,),
                    annotator=self.name,
                    value=None if value is None else round(value + shift, DIGITS) + 0.0,
                    criterion=criterion,
                    rationale=_words(own[k], len(field), self.log_odds),
                    seconds=sum(v.seconds for v in verdicts) / share or None,
                    cost=sum(v.cost for v in verdicts) / share or None,
                )
            )
        return found

    def _strengths(self, k: int, met: dict[tuple[int, int], Meeting]) -> list[float | None]:
        """The strengths of the texts that took part in a verdict; None for the others."""
        taking_part = sorted({i for pair, m in met.items() if m.value is not None for i in pair})
        at = {player: n for n, player in enumerate(taking_part)}
        n = len(taking_part)
        known: list[list[float | None]] = [[None] * n for _ in range(n)]
        wins, weights = ([[0.0] * n for _ in range(n)] for _ in range(2))
        for (i, j), meeting in met.items():
            if meeting.value is None:
                continue
            a, b = at[i], at[j]
            known[a][b], weights[a][b] = meeting.value, float(meeting.verdicts)
            if not self.log_odds:
                wins[a][b] = meeting.verdicts * meeting.value
                wins[b][a] = meeting.verdicts * (1.0 - meeting.value)
        found = least_squares(known, weights) if self.log_odds else bradley_terry(wins, self.prior)
        scores: list[float | None] = [None] * k
        for player, strength in zip(taking_part, found, strict=True):
            scores[player] = strength
        return scores

    def _before(self, group: CompletionGroup, criterion: str, values: Sequence[float | None]) -> float:
        """What puts the centred values on the scale of scores that this judge gave to the group before."""
        old = {
            a.completions[0]: float(a.value)
            for a in group.annotations
            if a.kind == "score"
            and a.annotator == self.name
            and a.criterion == criterion
            and a.value is not None
        }
        centre = _centre(values)
        moved = [
            old[c.id] - (value + centre)
            for c, value in zip(group.completions, values, strict=True)
            if c.id in old and value is not None
        ]
        return sum(moved) / len(moved) if moved else 0.0


def schedule(n: int, opponents: int | None = None) -> list[tuple[int, int]]:
    """Who meets whom among ``n``: all n(n-1)/2 pairs, or each ``opponents`` others, ceil(n * opponents / 2) pairs.

    With a budget the players sit in a circle and meet those at the distances 1, n^(1/m), n^(2/m) … (m is half of
    the opponents): distance 1 connects them all, and the long ones keep the chains between any two short. Where
    both numbers are odd one player meets one more.
    """
    if opponents is None or opponents >= n - 1:
        return list(combinations(range(n), 2))
    halves, odd = divmod(opponents, 2)
    farthest = (n - 1) // 2 - (odd and n % 2)
    distances: list[int] = []
    for t in range(halves):
        wanted = round(n ** (t / halves))
        distances.append(min(max(wanted, (distances or [0])[-1] + 1), farthest - (halves - 1 - t)))
    pairs = {tuple(sorted((i, (i + d) % n))) for d in distances for i in range(n)}
    if odd:
        pairs |= {tuple(sorted((i, (i + n // 2) % n))) for i in range((n + 1) // 2)}
    return sorted((a, b) for a, b in pairs)


def _distinct(group: CompletionGroup) -> list[list[Completion]]:
    """The completions by text, in order: equal texts are compared as one and get one score."""
    found: dict[str, list[Completion]] = {}
    for completion in group.completions:
        found.setdefault(completion.text_id, []).append(completion)
    return list(found.values())


def _hear(heard: Heard, annotation: Annotation, log_odds: bool) -> None:
    """Note down what an annotation says of pairs, by the ids in the order shown."""
    if annotation.kind not in ("preference", "ranking"):
        return
    shown, half = annotation.completions, 0.0 if log_odds else 0.5
    spent = (annotation.seconds or 0.0, annotation.cost or 0.0, annotation.order_known)
    if annotation.value is None:
        for one, other in combinations(shown, 2):
            heard[one, other].append(Verdict(None, *spent))
    elif annotation.value == "both_bad":
        heard[shown[0], shown[1]].append(Verdict(half, *spent))
    for first, second, winner in comparisons(annotation):
        if winner is None:
            value = half
        elif log_odds:
            value = (annotation.strength or 0.0) * (1 - 2 * winner)
        else:
            value = float(winner == 0)
        heard[first, second].append(Verdict(value, *spent))


def _settle(straight: list[Verdict], turned: list[Verdict], both_orders: bool, log_odds: bool) -> Meeting:
    """One pair's verdicts as seen by its first member; ``turned`` are those that showed it second.

    Each order counts equally, however many verdicts it has. A pair with verdicts in one order only carries the
    judge's preference for a side: with ``both_orders`` it is set aside.
    """
    ours = [v.value for v in straight if v.value is not None]
    theirs = [(-v.value if log_odds else 1.0 - v.value) for v in turned if v.value is not None]
    failed = sum(v.value is None for v in (*straight, *turned))
    known = all(v.order_known for v in (*straight, *turned))
    count = len(ours) + len(theirs)
    if not count or (both_orders and known and not (ours and theirs)):
        return Meeting(None, 0, failed, count)
    means = [sum(side) / len(side) for side in (ours, theirs) if side]
    return Meeting(sum(means) / len(means), count, failed, 0)


def _centre(values: Sequence[float | None]) -> float:
    """What added to the values makes their mean 0."""
    known = [value for value in values if value is not None]
    return -sum(known) / len(known) if known else 0.0


def _words(own: Sequence[tuple[Meeting, bool]], field: int, log_odds: bool) -> str:
    """The rationale: what the score is made of, or why there is none."""
    if field < 2:
        return "no score: there is no other text to compare with"
    won = sum(m.verdicts * (m.value if first else 1.0 - m.value) for m, first in own if m.value is not None)
    odds = [m.value if first else -m.value for m, first in own if m.value is not None]
    count = sum(m.verdicts for m, _ in own)
    failed, set_aside = sum(m.failed for m, _ in own), sum(m.set_aside for m, _ in own)
    rest = [f"{failed} failed"] * (failed > 0) + [f"{set_aside} in one order only"] * (set_aside > 0)
    if not count:
        return "no score: " + (", ".join(rest) or "no verdict came")
    what = (
        f"mean log-odds {math.fsum(odds) / len(odds):+.3g} in {count} comparisons"
        if log_odds
        else f"{won:.4g} of {count} comparisons won"
    )
    return ", ".join([what, *rest])


def scored(
    judge: Judge,
    *,
    opponents: int | None = None,
    votes: int = 1,
    both_orders: bool = True,
    prior: float = 0.5,
) -> ScoredJudge:
    """A judge of kind ``score`` from one that gives preferences (or rankings), to be used as a reward.

    In each group every completion meets every other, in both orders, and the Bradley–Terry model turns the
    verdicts into log-odds: the logistic function of the difference of two scores is the probability that the
    one is preferred to the other. Ties and "both bad" are half a win. Scores are centred at 0 in each group:
    **scores of different prompts do not compare**. Equal texts are one player. A completion without any verdict
    has the score None. Where a group holds scores of this judge from before (samples were added to a store), the
    new ones are moved by one number, so that the completions scored before keep their mean.

    Where the judge tells probabilities (a true attribute ``logprobs``, with the log-odds of its verdict as
    ``strength``: see :func:`pairwise`), scores are fitted to the log-odds by least squares instead, the mean of
    both orders for each pair.

    Args:
        judge: gives ``preference`` annotations for groups of two. Its own ``both_orders`` is switched off: the
            orders are seen to here.
        opponents: None for all K(K-1)/2 pairs, or how many others each completion meets (at least 2), for large
            K. Who meets whom depends on the texts alone.
        votes: how often each question is asked. Makes sense for judges that sample.
        both_orders: show each pair in both orders and count both equally, so that a preference for a side
            cancels. A pair that has verdicts in one order only is then set aside.
        prior: wins and losses that nobody saw, given to each completion, so that an unbeaten one stays finite
            (see :func:`steerwell.judges.strengths.bradley_terry`). For two completions with w of n comparisons
            won the scores differ by log((w + prior) / (n - w + prior)). Not used with log-odds.

    A group of K takes K(K-1)/2 comparisons, or K * opponents / 2, times 2 for the orders, times ``votes``.

    Raises :class:`InputError` for numbers out of range, and for several votes of an endpoint at temperature 0,
    which would give one answer several times.
    """
    if opponents is not None and opponents < FEWEST_OPPONENTS:
        raise InputError(
            f"opponents must be {FEWEST_OPPONENTS} or more, got {opponents}",
            mend="With fewer, the completions of a group have no common scale.",
        )
    if votes < 1 or not (prior > 0 and math.isfinite(prior)):
        raise InputError(f"votes must be 1 or more and prior above 0, got {votes} and {prior}")
    if votes > 1 and getattr(getattr(judge, "endpoint", None), "temperature", None) == 0:
        raise InputError(
            f"{votes} votes of a model at temperature 0 are one vote said {votes} times",
            mend="Give the judge a temperature, such as 0.7, or leave votes at 1.",
        )
    return ScoredJudge(judge, opponents, votes, both_orders, prior)


__all__ = ["ScoredJudge", "schedule", "scored"]
