"""From evidence to targets: what a training run aims at, derived from annotations by a rule one can name.

majority  pairs, by most votes (preferences and rankings)
soft      pairs with the share of votes as probability
mean      scores, the mean of each completion's scores
labels    labels, by most votes (or from preferences)
ranks     ranks, by the votes that each completion wins against the others of its prompt
strengths pairs by the sign of the votes' mean strength, with that strength
attributes scores by criterion: one column for each
step_labels  a probability for each step, by the votes on it

Each returns a list of groups with a ``.report`` of what was counted. An annotation without a verdict never
counts as anything. Groups that get no target are left out, and the report says how many. The inputs are not
changed; targets that a group already has stay, so that the rules can be applied one after another.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from steerwell.data.ballots import (
    ballots,
    by_criterion,
    graded_votes,
    step_verdicts,
    values_of,
    with_evidence,
)
from steerwell.data.errors import InputError, nearest
from steerwell.data.resolve_report import Resolved, ResolveReport
from steerwell.data.types import Annotation, CompletionGroup, Pair

Ties = Literal["drop", "half"]
AfterError = Literal["keep", "drop", "wrong"]


def majority(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    ties: Ties = "drop",
    criterion: str | None = None,
    pairs: Literal["all", "best_worst"] = "all",
) -> Resolved:
    """Pairs by most votes: ``p`` is 1 for the winner.

    Every preference is a vote, every ranking a vote on each of its pairs (``pairs="best_worst"``: only on its
    best against its worst). A tied vote counts for neither side. Where the sides get equally many votes, the
    pair is left out (``ties="drop"``) or kept with p = 0.5 (``ties="half"``).

    ``annotations`` are used instead of the groups' own, ``criterion`` takes only annotations of that
    criterion, and pairs with fewer than ``min_votes`` votes (tied ones count) are left out.
    """
    _check(min_votes, ties=ties, pairs=pairs)
    report = ResolveReport("majority")
    result = []
    for group, votes in ballots(groups, annotations, criterion, pairs == "best_worst", report):
        edges = []
        for (i, j), (for_i, for_j, tied) in votes.items():
            if not _enough(for_i, for_j, tied, min_votes, report):
                continue
            if for_i == for_j:
                report.undecided += 1
                if ties == "half":
                    edges.append(Pair(i, j, 0.5))
            else:
                edges.append(Pair(i, j) if for_i > for_j else Pair(j, i))
        _keep(result, group, edges, report)
    return Resolved(result, report)


def soft(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    ties: Ties = "half",
    criterion: str | None = None,
    pairs: Literal["all", "best_worst"] = "all",
    smoothing: float = 0.0,
) -> Resolved:
    """Pairs with ``p`` = (votes for chosen + ``smoothing``) / (votes + 2 ``smoothing``), at least 0.5.

    A tied vote counts half for each side (``ties="half"``) or not at all (``ties="drop"``). ``smoothing=1``
    is Laplace's rule: one vote for one side says 2/3, not 1. Pairs at exactly 0.5 are kept. The other
    arguments are those of :func:`majority`.
    """
    _check(min_votes, ties=ties, pairs=pairs)
    if not smoothing >= 0:
        raise InputError(f"smoothing must be 0 or more, got {smoothing}", mend="1 is Laplace's rule.")
    report = ResolveReport("soft")
    result = []
    for group, votes in ballots(groups, annotations, criterion, pairs == "best_worst", report):
        edges = []
        for (i, j), (for_i, for_j, tied) in votes.items():
            if not _enough(for_i, for_j, 0 if ties == "drop" else tied, max(min_votes, 1), report):
                continue
            report.undecided += for_i == for_j
            half = tied / 2 if ties == "half" else 0.0
            total = for_i + for_j + 2 * half + 2 * smoothing
            p = (for_i + half + smoothing) / total
            edges.append(Pair(i, j, p) if for_i >= for_j else Pair(j, i, 1.0 - p))
        _keep(result, group, edges, report)
    return Resolved(result, report)


def mean(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    criterion: str | None = None,
) -> Resolved:
    """Scores: the mean of each completion's score annotations; None where fewer than ``min_votes`` gave one.

    Scores of several criteria are averaged alike: name a ``criterion`` where they have different scales.
    """
    _check(min_votes)
    report = ResolveReport("mean")
    result = []
    for group, values in values_of(groups, annotations, "score", criterion, report):
        scores = []
        for given in values:
            report.too_few += 0 < len(given) < min_votes
            scores.append(sum(given) / len(given) if len(given) >= min_votes else None)
        made = sum(s is not None for s in scores)
        if made:
            report.scores += made
            report.resolved += 1
            result.append(replace(group, scores=tuple(scores)))
    return Resolved(result, report)


def attributes(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    criteria: Sequence[str] | None = None,
) -> Resolved:
    """Scores by name: for each criterion the mean of each completion's score annotations, None where fewer than
    ``min_votes`` gave one.

    ``criteria`` names the columns and their order; by default all criteria that some score annotation has, sorted.
    Groups without any are left out. Raises :class:`InputError` for a criterion that no score annotation has.
    """
    _check(min_votes)
    report = ResolveReport("attributes")
    given = [
        (group, [list(by_criterion(group, c)) for c in group.completions])
        for group in with_evidence(groups, annotations)
    ]
    report.groups = len(given)
    found = {name for _, rows in given for row in rows for name, _ in row}
    names = sorted(found) if criteria is None else list(criteria)
    for name in names:
        if name not in found:
            raise InputError(f"no score annotation has the criterion {name!r}", mend=nearest(name, found))
    result = []
    for group, rows in given:
        table: dict[str, tuple[float | None, ...]] = {}
        for name in names:
            votes = [[value for own, value in row if own == name] for row in rows]
            report.used += sum(map(len, votes))
            report.too_few += sum(0 < len(v) < min_votes for v in votes)
            table[name] = tuple(sum(v) / len(v) if len(v) >= min_votes else None for v in votes)
        if any(value is not None for values in table.values() for value in values):
            report.resolved += 1
            result.append(replace(group, attributes=table))
    report.attributes = len(names)
    return Resolved(result, report)


def strengths(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    ties: Ties = "half",
    criterion: str | None = None,
) -> Resolved:
    """Pairs with how much better the chosen one is: the mean over the preferences of ``strength``, taken as negative
    where the other side is preferred and as 0 for a tie. The side that it favours is chosen.

    ``p`` is 1; a pair at strength 0 has p = 0.5 and is kept (``ties="half"``) or left out (``ties="drop"``).
    Preferences without a strength say which side, not how much: a pair with no other kind is decided by most votes
    and has no strength (None).
    """
    _check(min_votes, ties=ties)
    report = ResolveReport("strengths")
    result = []
    for group in with_evidence(groups, annotations):
        report.groups += 1
        edges: list[Pair] = []
        sizes: list[float | None] = []
        for (i, j), votes in graded_votes(group, criterion, report).items():
            signs, graded = [sign for sign, _ in votes], [s for _, s in votes if s is not None]
            for_i, for_j = signs.count(1), signs.count(-1)
            if not _enough(for_i, for_j, signs.count(0), min_votes, report):
                continue
            mean = sum(graded) / len(graded) if any(s for _, s in votes if s is not None) else None
            lean = for_i - for_j if mean is None else mean
            report.undecided += lean == 0
            report.strengths += mean is not None
            size = None if mean is None else abs(mean)
            if lean != 0 or ties == "half":
                edges.append(Pair(i, j, 0.5) if lean == 0 else Pair(i, j) if lean > 0 else Pair(j, i))
                sizes.append(0.0 if mean is None and not (for_i or for_j) else size)
        _keep(result, group, edges, report, sizes)
    return Resolved(result, report)


def labels(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    criterion: str | None = None,
    from_preferences: bool = False,
) -> Resolved:
    """Labels by most votes; None where the votes are equal or fewer than ``min_votes``.

    ``from_preferences`` counts preferences and rankings instead of labels: each comparison that a completion
    wins is a vote for True, each that it loses one for False. So KTO can learn from pairs.
    """
    _check(min_votes)
    report = ResolveReport("labels")
    if from_preferences:
        read = ballots(groups, annotations, criterion, False, report)
        votes_of = ((group, _wins_and_losses(len(group.completions), votes)) for group, votes in read)
    else:
        votes_of = values_of(groups, annotations, "label", criterion, report)
    result = []
    for group, votes in votes_of:
        decided = [_label(given, min_votes, report) for given in votes]
        made = sum(label is not None for label in decided)
        if made:
            report.labels += made
            report.resolved += 1
            result.append(replace(group, labels=tuple(decided)))
    return Resolved(result, report)


def ranks(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    criterion: str | None = None,
) -> Resolved:
    """Ranks from rankings and preferences, 0 is best: completions are ordered by their mean share of the votes
    against each other one that they were compared with (half of a tied vote each), as in Borda's count. Equal
    shares are equal ranks. None where a completion has fewer than ``min_votes`` votes.
    """
    _check(min_votes)
    report = ResolveReport("ranks")
    result = []
    for group, votes in ballots(groups, annotations, criterion, False, report):
        shares: list[list[float]] = [[] for _ in group.completions]
        counts = [0] * len(group.completions)
        for (i, j), (for_i, for_j, tied) in votes.items():
            total = for_i + for_j + tied
            report.disagreements += for_i > 0 and for_j > 0
            for place, won in ((i, for_i), (j, for_j)):
                shares[place].append((won + tied / 2) / total)
                counts[place] += total
        report.too_few += sum(0 < count < min_votes for count in counts)
        points = [
            sum(own) / len(own) if own and count >= min_votes else None
            for own, count in zip(shares, counts, strict=True)
        ]
        order = sorted({point for point in points if point is not None}, reverse=True)
        made = sum(point is not None for point in points)
        if made > 1:
            report.ranks += made
            report.resolved += 1
            placed = tuple(None if point is None else order.index(point) for point in points)
            result.append(replace(group, ranks=placed))
    return Resolved(result, report)


def step_labels(
    groups: Iterable[CompletionGroup],
    *,
    annotations: Iterable[Annotation] | None = None,
    min_votes: int = 1,
    criterion: str | None = None,
    votes: Literal["mean", "majority"] = "mean",
    after_first_error: AfterError = "keep",
) -> Resolved:
    """Steps with labels: the mean of the verdicts on each step (right is 1, wrong 0), or with ``votes="majority"``
    1 or 0 by most of them, a verdict of exactly 0.5 being for neither side. None where fewer than ``min_votes`` gave a
    verdict, and where a majority is undecided.

    A completion gets the steps that most of its annotations cut it into. ``after_first_error`` says what becomes of
    the labels behind the first one below 0.5: they stay ("keep"), are None ("drop": nobody can say what a step is
    worth that builds on a wrong one; annotators of PRM800K stopped there), or are 0 ("wrong").
    """
    _check(min_votes)
    if votes not in ("mean", "majority"):
        raise InputError(f"unknown count of votes {votes!r}", mend="Write 'mean' or 'majority'.")
    if after_first_error not in ("keep", "drop", "wrong"):
        raise InputError(
            f"unknown after_first_error {after_first_error!r}", mend="Write 'keep', 'drop' or 'wrong'."
        )
    report = ResolveReport("step_labels")
    result = []
    for group, cuts, verdicts in step_verdicts(groups, annotations, criterion, report):
        decided = [
            None if own is None else _after_error(_decided(own, votes, min_votes, report), after_first_error)
            for own in verdicts
        ]
        made = sum(label is not None for own in decided for label in own or ())
        if made:
            report.step_labels += made
            report.resolved += 1
            result.append(replace(group, steps=tuple(cuts), step_labels=tuple(decided)))
    return Resolved(result, report)


def _decided(
    verdicts: Sequence[Sequence[float]], votes: str, min_votes: int, report: ResolveReport
) -> tuple[float | None, ...]:
    found: list[float | None] = []
    for own in verdicts:
        if votes == "majority":
            label = _label([v > 0.5 for v in own if v != 0.5], min_votes, report)
            found.append(None if label is None else float(label))
            continue
        report.disagreements += len({v > 0.5 for v in own if v != 0.5}) > 1
        report.too_few += 0 < len(own) < min_votes
        found.append(sum(own) / len(own) if len(own) >= min_votes else None)
    return tuple(found)


def _after_error(labels: tuple[float | None, ...], rule: AfterError) -> tuple[float | None, ...]:
    first = next((i for i, label in enumerate(labels) if label is not None and label < 0.5), len(labels))
    if rule == "keep":
        return labels
    return labels[: first + 1] + (None if rule == "drop" else 0.0,) * (len(labels) - first - 1)


def _check(min_votes: int, *, ties: str = "drop", pairs: str = "all") -> None:
    if min_votes < 1:
        raise InputError(f"min_votes must be at least 1, got {min_votes}", mend="1 takes every vote.")
    if ties not in ("drop", "half"):
        raise InputError(f"unknown policy for ties {ties!r}", mend="Write 'drop' or 'half'.")
    if pairs not in ("all", "best_worst"):
        raise InputError(f"unknown choice of pairs {pairs!r}", mend="Write 'all' or 'best_worst'.")


def _label(given: Sequence[bool], min_votes: int, report: ResolveReport) -> bool | None:
    good = sum(given)
    bad = len(given) - good
    report.disagreements += bool(good and bad)
    if len(given) < min_votes:
        report.too_few += bool(given)
        return None
    report.undecided += good == bad
    return None if good == bad else good > bad


def _wins_and_losses(n: int, votes: dict[tuple[int, int], list[int]]) -> list[list[bool]]:
    result: list[list[bool]] = [[] for _ in range(n)]
    for (i, j), (for_i, for_j, _) in votes.items():
        result[i] += [True] * for_i + [False] * for_j
        result[j] += [True] * for_j + [False] * for_i
    return result


def _enough(for_i: int, for_j: int, tied: int, min_votes: int, report: ResolveReport) -> bool:
    report.disagreements += bool(for_i and for_j)
    enough = for_i + for_j + tied >= min_votes
    report.too_few += not enough
    return enough


def _keep(
    result: list[CompletionGroup],
    group: CompletionGroup,
    edges: list[Pair],
    report: ResolveReport,
    strengths: list[float | None] | None = None,
) -> None:
    """The group with these pairs, if there are any; strengths of pairs that it had before are not theirs."""
    if edges:
        report.pairs += len(edges)
        report.resolved += 1
        own = None if strengths is None else tuple(strengths)
        result.append(replace(group, pairs=tuple(edges), pair_strengths=own))


__all__ = [
    "ResolveReport",
    "Resolved",
    "attributes",
    "labels",
    "majority",
    "mean",
    "ranks",
    "soft",
    "step_labels",
    "strengths",
]
