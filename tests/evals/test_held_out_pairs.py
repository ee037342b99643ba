"""Pairs, votes and slices by hand."""

from __future__ import annotations

import pytest

from steerwell.data import resolve
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair, Source
from steerwell.evals.held_out_pairs import (
    HeldOutPair,
    length_ratio,
    length_side,
    read_pairs,
    share,
    slices,
    vote_tier,
    votes_by_pair,
)


def group(
    texts: list[str], votes: list[tuple[int, int, str, object]] = (), **meta: object
) -> CompletionGroup:  # type: ignore[assignment]
    prompt = as_messages("a prompt")
    made = tuple(
        Completion(prompt, (Message("assistant", t),), Source(name=f"m{i}")) for i, t in enumerate(texts)
    )
    notes = tuple(
        Annotation("preference", (made[a].id, made[b].id), who, value) for a, b, who, value in votes
    )
    return CompletionGroup(prompt, made, notes, meta=meta)


def test_a_pair_is_turned_to_its_preferred_side() -> None:
    one = group(["one two", "one two three four"])
    pairs = (Pair(0, 1), Pair(0, 1, 0.2), Pair(0, 1, 0.5))
    both, turned, neither = read_pairs(
        [CompletionGroup(one.prompt, one.completions, pairs=pairs)], [[3.0, 1.0]]
    )
    assert (both.margin, both.p, both.words, both.right, both.longer) == (2.0, 1.0, (2, 4), 1.0, 0.0)
    assert (turned.margin, turned.p, turned.words, turned.right, turned.longer) == (
        -2.0,
        0.8,
        (4, 2),
        0.0,
        1.0,
    )
    assert (neither.right, neither.longer) == (None, None)
    assert (
        read_pairs([CompletionGroup(one.prompt, one.completions, pairs=pairs[:1])], [[None, 1.0]])[0].right
        is None
    )
    tied = read_pairs([CompletionGroup(one.prompt, one.completions, pairs=pairs[:1])], [[1.0, 1.0]])[0]
    assert tied.right == 0.5


def test_an_annotator_has_one_vote_on_a_pair() -> None:
    votes = [
        (0, 1, "ann", 0),
        (1, 0, "ann", 1),  # the same again, shown the other way round
        (1, 0, "bob", 0),
        (0, 1, "cy", 0),
        (1, 0, "cy", 0),  # said both: no vote
        (0, 1, "di", "tie"),
        (0, 1, "ed", None),
    ]
    assert votes_by_pair(group(["a", "b"], votes)) == {(0, 1): (1, 1), (1, 0): (1, 1)}


def test_votes_come_with_the_pair_they_are_about() -> None:
    votes = [(0, 1, who, 1) for who in ("ann", "bob", "cy")] + [(0, 1, "di", 0)]
    (pair,) = read_pairs(resolve.majority([group(["a", "b"], votes)]), [[0.0, 1.0]])
    assert pair.votes == (3, 1)
    assert pair.tags["votes"] == "3/4 or more"
    assert pair.tags["chosen_from"] == "m1"


@pytest.mark.parametrize(
    ("votes", "tier"),
    [
        ((1, 0), "one vote"),
        ((0, 0), "no vote kept"),
        ((3, 0), "all agree"),
        ((3, 1), "3/4 or more"),
        ((2, 1), "under 3/4"),
    ],
)
def test_tiers_of_agreement(votes: tuple[int, int], tier: str) -> None:
    assert vote_tier(*votes) == tier


@pytest.mark.parametrize(
    ("words", "side", "ratio"),
    [
        ((10, 10), "about equal", "0.9 to 1.1"),
        ((9, 10), "about equal", "0.9 to 1.1"),
        ((10, 9), "about equal", "0.9 to 1.1"),
        ((8, 10), "chosen shorter", "1/2 to 0.9"),
        ((5, 10), "chosen shorter", "1/2 to 0.9"),
        ((4, 10), "chosen shorter", "under 1/2"),
        ((10, 5), "chosen longer", "1.1 to 2"),
        ((11, 5), "chosen longer", "over 2"),
        ((3, 0), "chosen longer", "over 2"),
        ((0, 0), "about equal", "0.9 to 1.1"),
    ],
)
def test_lengths(words: tuple[int, int], side: str, ratio: str) -> None:
    assert length_side(*words) == side
    assert length_ratio(*words) == ratio


def pair(i: int, margin: float | None, domain: str, prompt: str = "") -> HeldOutPair:
    return HeldOutPair(f"k{i}", prompt or f"p{i}", 1.0, margin, (1, 1), (1, 0), {"domain": domain})


def test_every_slice_is_shown_with_what_it_does_not_know() -> None:
    pairs = [pair(i, 1.0, "big") for i in range(20)] + [pair(20, -1.0, "small"), pair(21, None, "small")]
    big, small = slices("rm_accuracy", pairs, "domain")
    assert (big.name, big.estimate.value, big.estimate.n) == ("rm_accuracy/domain=big", 1.0, 20)
    assert (small.name, small.estimate.value, small.estimate.n) == ("rm_accuracy/domain=small", 0.0, 1)
    assert small.coverage.missing == {"no score": 1}
    assert small.estimate.high is not None
    assert small.estimate.high > 0.7  # one pair knows almost nothing
    assert slices("rm_accuracy", pairs[:20], "domain") == []  # one value is no slice
    assert [m.name for m in slices("x", pairs, "domain", ("small",))] == ["x/domain=small", "x/domain=big"]


def test_pairs_of_one_prompt_are_not_independent() -> None:
    alone = share("a", [pair(i, 1.0 if i % 4 else -1.0, "d") for i in range(80)]).estimate
    together = share(
        "a", [pair(i, 1.0 if (i // 20) % 4 else -1.0, "d", f"p{i // 20}") for i in range(80)]
    ).estimate
    assert alone.value == together.value == 0.75
    assert alone.low is not None
    assert together.low is not None
    assert together.low < alone.low - 0.2
