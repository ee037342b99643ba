"""Win rates: keyed by id, ties half, both orders, and a ledger that adds up."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Annotation, Completion, Source
from steerwell.evals.winrate import Coverage, compare, compare_scores


def completion(prompt: str, text: str, who: str, index: int = 0) -> Completion:
    return Completion(as_messages(prompt), (Message("assistant", text),), Source("model", who, index=index))


def pair(i: int, ours: str = "ours", theirs: str = "theirs") -> tuple[Completion, Completion]:
    return completion(f"prompt {i}", ours, "new"), completion(f"prompt {i}", theirs, "old")


def prefers(first: Completion, second: Completion, value: Any, who: str = "judge") -> Annotation:
    return Annotation("preference", (first.id, second.id), who, value)


def test_a_win_is_keyed_by_the_completion_and_not_by_its_place() -> None:
    a, b = pair(0)
    assert compare([(a, b)], [prefers(a, b, 0)]).estimate.value == 1.0
    assert compare([(a, b)], [prefers(b, a, 1)]).estimate.value == 1.0
    assert compare([(a, b)], [prefers(b, a, 0)]).estimate.value == 0.0


def test_ties_and_both_bad_are_half_and_none_is_counted_not_guessed() -> None:
    pairs = [pair(i) for i in range(5)]
    said = [
        prefers(*pairs[0], 0),
        prefers(*pairs[1], "tie"),
        prefers(*pairs[2], "both_bad"),
        prefers(*pairs[3], None),
    ]
    found = compare(pairs, said)
    assert found.estimate.value == pytest.approx(2 / 3)
    assert (found.wins, found.ties, found.losses, found.estimate.n) == (1, 2, 0, 3)
    assert found.coverage.to_dict() == {
        "expected": 5,
        "judged": 3,
        "missing": {"no verdict": 1, "never judged": 1},
    }


def test_a_judge_that_always_likes_the_first_gives_one_half_and_shows_its_bias() -> None:
    pairs = [pair(i) for i in range(20)]
    said = [a for one, other in pairs for a in (prefers(one, other, 0), prefers(other, one, 0))]
    found = compare(pairs, said)
    assert found.estimate.value == 0.5
    assert found.ties == 20
    assert found.first_shown.value == 1.0
    assert found.first_shown.n == 40
    assert found.orders_agree.value == 0.0


def test_a_fair_judge_shows_no_order_effect() -> None:
    pairs = [pair(i) for i in range(20)]
    said = [a for one, other in pairs for a in (prefers(one, other, 0), prefers(other, one, 1))]
    found = compare(pairs, said)
    assert found.estimate.value == 1.0
    assert found.first_shown.value == 0.5
    assert found.orders_agree.value == 1.0


def test_one_order_alone_is_set_aside_where_the_protocol_is_both_orders() -> None:
    pairs = [pair(i) for i in range(3)]
    said = [
        prefers(*pairs[0], 0),
        prefers(pairs[0][1], pairs[0][0], 1),
        prefers(*pairs[1], 0),
        prefers(pairs[1][1], pairs[1][0], None),  # its other order failed
        prefers(*pairs[2], 1),
        prefers(pairs[2][1], pairs[2][0], 0),
    ]
    found = compare(pairs, said)
    assert found.estimate.value == 0.5
    assert found.coverage.missing == {"one order only": 1}
    single = compare(pairs[1:2], said[2:3])
    assert single.estimate.value == 1.0  # nobody was asked in both orders: one order has to do


def test_both_orders_weigh_equally_however_many_verdicts_each_has() -> None:
    a, b = pair(0)
    said = [prefers(a, b, 0, f"judge {i}") for i in range(3)] + [prefers(b, a, 0)]
    assert compare([(a, b)], said).estimate.value == 0.5


def test_rankings_and_scores_are_read_too() -> None:
    a, b = pair(0)
    other = completion("prompt 0", "third", "someone")
    ranking = Annotation("ranking", (b.id, other.id, a.id), "panel", (2, 3, 1))
    assert compare([(a, b)], [ranking]).estimate.value == 1.0

    def score(c: Completion, value: float | None, who: str = "rm") -> Annotation:
        return Annotation("score", (c.id,), who, value)

    assert compare([(a, b)], [score(a, 1.0), score(b, 1.0)]).estimate.value == 0.5
    assert compare([(a, b)], [score(a, 1.0), score(b, None)]).coverage.missing == {"no verdict": 1}
    # scores of two judges are two scales: never compared with each other
    assert compare([(a, b)], [score(a, 9.0, "x"), score(b, 1.0, "y")]).coverage.missing == {"never judged": 1}


def test_a_criterion_can_be_chosen() -> None:
    a, b = pair(0)
    said = [
        Annotation("score", (c.id,), "judge", value, criterion=criterion)
        for c, criterion, value in ((a, "helpful", 1), (b, "helpful", 0), (a, "brief", 0), (b, "brief", 1))
    ]
    assert compare([(a, b)], said, criterion="brief").estimate.value == 0.0
    assert compare([(a, b)], said).estimate.value == 0.5


def test_equal_texts_are_a_tie_without_a_verdict() -> None:
    found = compare([pair(0, "same", "same"), pair(1)], [prefers(*pair(1), 0)])
    assert found.estimate.value == 0.75
    assert found.identical == 1
    assert found.coverage.complete


def test_each_prompt_counts_once_however_many_samples_it_has() -> None:
    many = [
        (completion("p", f"ours {i}", "new", i), completion("p", f"theirs {i}", "old", i)) for i in range(9)
    ]
    one = pair(1)
    found = compare([*many, one], [*(prefers(*m, 0) for m in many), prefers(*one, 1)])
    assert found.estimate.n == 2
    assert found.estimate.value == 0.5
    assert (found.wins, found.losses) == (9, 1)


def test_paired_scores() -> None:
    found = compare_scores([1.0, 2.0, 3.0, None], [0.0, 2.0, 4.0, 1.0])
    assert (found.wins, found.ties, found.losses) == (1, 1, 1)
    assert found.estimate.value == 0.5
    assert found.coverage.missing == {"no score": 1}
    assert found.to_dict()["n"] == 3
    assert compare_scores([1, 1, 0], [0, 0, 1], ["p", "p", "q"]).estimate.n == 2


def test_repeated_samples_of_a_prompt_do_not_narrow_the_interval_below_its_prompts() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        taste = rng.beta(1, 1, 30)
        wins = rng.random((30, 4)) < taste[:, None]
        found = compare_scores(
            wins.astype(float).ravel().tolist(), [0.5] * 120, [str(i) for i in range(30) for _ in range(4)]
        )
        assert found.estimate.low is not None
        assert found.estimate.high is not None
        covered += found.estimate.low <= 0.5 <= found.estimate.high
    assert 0.91 < covered / 400 < 0.985


def test_bad_input() -> None:
    a, b = pair(0)
    with pytest.raises(InputError, match="two different completions of one prompt"):
        compare([(a, a)], [])
    with pytest.raises(InputError, match="two different completions of one prompt"):
        compare([(a, pair(1)[1])], [])
    with pytest.raises(InputError, match="'left'"):
        compare([(a, b)], [prefers(a, b, "left")])
    with pytest.raises(InputError, match="1 scores against 2"):
        compare_scores([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="does not add up"):
        Coverage(3, 1, {"lost": 1})
