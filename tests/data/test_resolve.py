"""From evidence to targets: votes by hand, ties by policy, rankings, and failed verdicts that count as nothing."""

from __future__ import annotations

import pytest

from steerwell.data import resolve
from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair, Source

ASK = (Message("user", "q"),)
A, B, C = (Completion(ASK, (Message("assistant", t),), Source(index=i)) for i, t in enumerate("abc"))


def group(*notes: Annotation) -> CompletionGroup:
    return CompletionGroup(ASK, (A, B, C), notes)


def prefers(first: Completion, second: Completion, value: object, by: str = "x") -> Annotation:
    return Annotation("preference", (first.id, second.id), by, value)


def test_majority_by_hand_whatever_the_order_shown() -> None:
    (found,) = resolve.majority([group(prefers(A, B, 0), prefers(B, A, 1, "y"), prefers(A, B, 1, "z"))])
    assert found.pairs == (Pair(0, 1, 1.0),)
    assert found.annotations


def test_an_even_vote_is_dropped_or_half() -> None:
    even = group(prefers(A, B, 0), prefers(A, B, 1, "y"))
    dropped = resolve.majority([even])
    assert list(dropped) == []
    assert dropped.report.undecided == 1
    (half,) = resolve.majority([even], ties="half")
    assert half.pairs == (Pair(0, 1, 0.5),)


def test_soft_labels_are_vote_shares() -> None:
    votes = group(prefers(A, B, 0), prefers(A, B, 0, "y"), prefers(A, B, 1, "z"))
    assert resolve.soft([votes])[0].pairs == (Pair(0, 1, pytest.approx(2 / 3)),)
    assert resolve.soft([votes], smoothing=1)[0].pairs == (Pair(0, 1, pytest.approx(3 / 5)),)
    tied = group(prefers(A, B, 0), prefers(A, B, "tie", "y"))
    assert resolve.soft([tied])[0].pairs == (Pair(0, 1, pytest.approx(0.75)),)


def test_a_failed_verdict_is_no_vote() -> None:
    found = resolve.majority([group(prefers(A, B, None), prefers(A, B, "both_bad", "y"))])
    assert list(found) == []
    assert (found.report.no_verdict, found.report.both_bad, found.report.pairs) == (1, 1, 0)


def test_rankings_imply_pairs_or_only_best_against_worst() -> None:
    ranking = Annotation("ranking", (C.id, A.id, B.id), "x", (2, 1, 3))
    (every,) = resolve.majority([group(ranking)])
    assert sorted((p.chosen, p.rejected) for p in every.pairs) == [(0, 1), (0, 2), (2, 1)]
    (ends,) = resolve.majority([group(ranking)], pairs="best_worst")
    assert ends.pairs == (Pair(0, 1, 1.0),)


def test_scores_are_means_and_missing_is_none() -> None:
    notes = [Annotation("score", (A.id,), by, value) for by, value in (("x", 1.0), ("y", 2.0), ("z", None))]
    (found,) = resolve.mean([group(*notes)])
    assert found.scores == (1.5, None, None)


def test_labels_by_vote() -> None:
    notes = [
        Annotation("label", (A.id,), by, value) for by, value in (("x", True), ("y", True), ("z", False))
    ]
    (found,) = resolve.labels([group(*notes, Annotation("label", (B.id,), "x", False))])
    assert found.labels == (True, False, None)


def test_min_votes_and_criterion() -> None:
    one = group(prefers(A, B, 0))
    assert list(resolve.majority([one], min_votes=2)) == []
    other = Annotation("preference", (A.id, B.id), "x", 1, "honest")
    (found,) = resolve.majority([group(prefers(A, B, 0), other)], criterion="honest")
    assert found.pairs == (Pair(1, 0, 1.0),)


def test_bad_settings() -> None:
    with pytest.raises(InputError):
        resolve.majority([], ties="maybe")  # type: ignore[arg-type]


# --- ranks ---
def test_ranks_are_shares_of_votes_won() -> None:
    ranking = Annotation("ranking", (C.id, A.id, B.id), "x", (2, 1, 3))
    (found,) = resolve.ranks([group(ranking)])
    assert found.ranks == (0, 2, 1)
    other = Annotation("ranking", (A.id, B.id, C.id), "y", (3, 2, 1))
    # A wins 1 of 2 against B and 1 of 2 against C; B 1 of 2 and 0 of 2; C 1 of 2 and 2 of 2
    both = resolve.ranks([group(ranking, other)])
    assert both[0].ranks == (1, 2, 0)
    assert both.report.disagreements == 2
    assert both.report.ranks == 3


def test_ranks_leave_out_what_was_never_compared_and_tie_equals() -> None:
    (found,) = resolve.ranks([group(prefers(A, B, "tie"))])
    assert found.ranks == (0, 0, None)
    assert list(resolve.ranks([group(prefers(A, B, None))])) == []
    assert list(resolve.ranks([group(prefers(A, B, 0))], min_votes=2)) == []
