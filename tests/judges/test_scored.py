"""A judge of pairs as one that scores: planted strengths, orders, budgets, failures, and where it is used."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from noisy_judge import Noisy, group, same_order, scores

from steerwell.data.errors import InputError
from steerwell.data.evidence import check_annotation
from steerwell.data.messages import as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup
from steerwell.judges import Judge, rules, scored
from steerwell.judges.scored import schedule

TRUTH = (-1.5, 0.2, 1.4, -0.6, 0.5)
STRONG = group(*map(str, TRUTH))


def test_planted_strengths_are_recovered() -> None:
    judge = scored(Noisy(), votes=200)
    found = judge([STRONG])
    assert isinstance(judge, Judge)
    for a in found:
        check_annotation(a)
    assert [a.completions for a in found] == [(c.id,) for c in STRONG.completions]
    assert {(a.kind, a.annotator, a.criterion) for a in found} == {("score", judge.name, "overall")}
    values = np.array(scores(found, STRONG), dtype=float)
    assert values.sum() == pytest.approx(0.0, abs=1e-9)
    assert np.abs(values - np.array(TRUTH)).max() < 0.3  # standard errors of some 0.08
    assert sum(a.seconds or 0 for a in found) == pytest.approx(10 * 2 * 200)  # shared out, and all of it
    assert sum(a.cost or 0 for a in found) == pytest.approx(10 * 2 * 200 * 0.5)


def test_scores_are_calibrated_on_verdicts_that_they_have_not_seen() -> None:
    rng = random.Random(0)
    data = [group(*(f"{rng.gauss(0, 1.5):.4f}" for _ in range(6)), prompt=str(i)) for i in range(40)]
    by_id = {a.completions[0]: a.value for a in scored(Noisy(), votes=10)(data)}
    predicted, happened = [], []
    fresh = Noisy(seed=1)
    for g in data:
        for i, one in enumerate(g.completions):
            for other in g.completions[i + 1 :]:
                for _ in range(5):
                    predicted.append(1 / (1 + math.exp(by_id[other.id] - by_id[one.id])))
                    happened.append(fresh.judge(one, other).value == 0)
    p, y = np.array(predicted), np.array(happened, dtype=float)
    for low in (0.0, 0.2, 0.4, 0.6, 0.8):
        inside = (p >= low) & (p < low + 0.2)
        assert inside.sum() > 200
        assert abs(p[inside].mean() - y[inside].mean()) < 0.05


def test_two_completions_differ_by_the_log_odds_of_the_smoothed_share() -> None:
    low, high = scores(scored(Noisy(certain=True))([group("1", "2")]), group("1", "2"))
    assert high == pytest.approx(math.log(2.5 / 0.5) / 2)
    assert low == pytest.approx(-math.log(5) / 2)
    found = scored(Noisy(certain=True), votes=3, prior=1.0)([group("1", "2")])
    assert found[1].value == pytest.approx(math.log(7 / 1) / 2)
    assert [a.rationale for a in found] == ["0 of 6 comparisons won", "6 of 6 comparisons won"]


def test_a_preference_for_the_first_side_cancels() -> None:
    """30 % of the verdicts name the first side: in one order that shows as a lead, in both it does not."""
    equal = [group("0", "0.0", prompt=f"p{i}") for i in range(300)]

    def lead(both_orders: bool) -> tuple[float, float]:
        found = scored(Noisy(first=0.3), both_orders=both_orders)(equal)
        ahead = np.array([a.value for a in found[::2]])
        return float(ahead.mean()), float(ahead.std() / len(ahead) ** 0.5)

    mean, error = lead(True)
    assert abs(mean) < 3 * error
    mean, error = lead(False)
    assert mean > 5 * error

    judge = scored(Noisy(first=0.3), votes=200)
    values = np.array(scores(judge([STRONG]), STRONG), dtype=float)
    assert np.argsort(values).tolist() == np.argsort(TRUTH).tolist()
    # what is left of the bias is that the side's verdicts are noise: the scale shrinks, no one gains
    slope = float(np.dot(values, TRUTH) / np.dot(TRUTH, TRUTH))
    assert 0.5 < slope < 0.9
    assert np.abs(values - slope * np.array(TRUTH)).max() < 0.25


def test_it_is_deterministic_and_the_order_of_the_completions_does_not_matter() -> None:
    one, again = (scored(Noisy(), opponents=2)([STRONG]) for _ in range(2))
    assert one == again
    turned = replace(STRONG, completions=tuple(STRONG.completions[i] for i in (2, 0, 4, 1, 3)))
    other = {a.completions[0]: a.value for a in scored(Noisy(), opponents=2)([turned])}
    assert [other[a.completions[0]] for a in one] == pytest.approx([a.value for a in one], abs=1e-8)
    beside = scored(Noisy(), opponents=2)([group("5", "6", "7", "8", prompt="another"), STRONG])
    assert beside[4:] == one


@pytest.mark.parametrize("n", [2, 3, 5, 6, 9, 16, 33])
@pytest.mark.parametrize("opponents", [None, 2, 3, 4, 5, 8])
def test_who_meets_whom(n: int, opponents: int | None) -> None:
    pairs = schedule(n, opponents)
    assert len(set(pairs)) == len(pairs)
    assert all(0 <= i < j < n for i, j in pairs)
    if opponents is None or opponents >= n - 1:
        assert len(pairs) == n * (n - 1) // 2
        return
    assert len(pairs) == math.ceil(n * opponents / 2)
    met = Counter(i for pair in pairs for i in pair)
    assert sorted(met.values()) == sorted(
        [opponents] * (n - n * opponents % 2) + [opponents + 1] * (n * opponents % 2)
    )
    part = list(range(n))
    for i, j in pairs:
        part = [part[i] if p == part[j] else p for p in part]
    assert len(set(part)) == 1  # everybody is connected with everybody


def test_a_budget_bounds_the_calls_and_still_finds_the_order() -> None:
    rng = random.Random(3)
    large = group(*(f"{rng.gauss(0, 2):.4f}" for _ in range(32)))
    cheap, whole = Noisy(), Noisy()
    few, all_pairs = scored(cheap, opponents=6, votes=2), scored(whole)
    values = scores(few([large]), large)
    everyone = scores(all_pairs([large]), large)
    assert cheap.calls.total() == few.calls(32) == 32 * 6 // 2 * 2 * 2
    assert whole.calls.total() == all_pairs.calls(32) == 32 * 31
    truth = [float(c.text) for c in large.completions]
    assert same_order(values, truth) > 0.85
    assert same_order(everyone, truth) > 0.95
    assert max(Counter(i for pair in cheap.calls for i in pair).values()) == 12


def test_a_failed_verdict_is_left_out_and_one_without_any_has_no_score() -> None:
    judge = scored(Noisy(certain=True, fails=lambda one, other: "9" in (one, other)))
    data = group("1", "2", "9", "3")
    found = judge([data])
    values = scores(found, data)
    assert values[2] is None
    assert found[2].rationale == "no score: 6 failed"
    assert found[0].rationale == "0 of 4 comparisons won, 2 failed"
    without = scores(scored(Noisy(certain=True))([group("1", "2", "3")]), group("1", "2", "3"))
    assert [values[0], values[1], values[3]] == pytest.approx(without)  # as if it had not been there
    for a in found:
        check_annotation(a)


def test_a_pair_seen_in_one_order_only_is_set_aside() -> None:
    def one_way(one: str, other: str) -> bool:
        return (one, other) == ("1", "3")

    data = group("1", "2", "3")
    found = scored(Noisy(certain=True, fails=one_way))([data])
    assert found[0].rationale == "0 of 2 comparisons won, 1 failed, 1 in one order only"
    assert found[1].rationale == "2 of 4 comparisons won"
    alone = group("1", "3")
    assert scores(scored(Noisy(certain=True, fails=one_way))([alone]), alone) == [None, None]
    loose = scored(Noisy(certain=True, fails=lambda one, other: one_way(other, one)), both_orders=False)(
        [alone]
    )
    assert loose[0].value == pytest.approx(math.log(0.5 / 1.5) / 2)


def test_ties_and_both_bad_are_half_a_win() -> None:
    class Says:
        name = "says"

        def __init__(self, *values: Any) -> None:
            self.values = values

        def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
            pairs = [tuple(c.id for c in g.completions) for g in groups]
            return [
                Annotation("preference", p, self.name, v) for p, v in zip(pairs, self.values, strict=True)
            ]

    data = group("a", "b")
    assert [a.value for a in scored(Says("tie", "tie"))([data])] == [0.0, 0.0]
    assert [a.value for a in scored(Says("both_bad", "both_bad"))([data])] == [0.0, 0.0]
    found = scored(Says(0, "tie"))([data])
    assert found[0].value == pytest.approx(math.log(2 / 1) / 2)  # 1.5 of 2
    assert found[0].rationale == "1.5 of 2 comparisons won"
    circle = group("a", "b", "c")  # a beats b, b beats c, c beats a: intransitive, and nobody stands out
    found = scored(Says(0, 1, 1, 0, 0, 1))([circle])
    assert [a.value for a in found] == pytest.approx([0.0] * 3, abs=1e-9)


@pytest.mark.parametrize("seed", range(5))
def test_completions_that_fare_alike_have_equal_scores(seed: int) -> None:
    """Exactly: a last digit of rounding must not become a win."""

    class Length(Noisy):
        def judge(self, one: Completion, other: Completion) -> Annotation:
            value = "tie" if len(one.text) == len(other.text) else int(len(one.text) < len(other.text))
            return Annotation("preference", (one.id, other.id), self.name, value)

    rng = random.Random(seed)
    texts = [rng.choice("abcd") + "x" * rng.randrange(4) for _ in range(9)]
    found = scored(Length())([group(*texts)])
    by_length = {len(text): a.value for text, a in zip(texts, found, strict=True)}
    assert [a.value for a in found] == [by_length[len(text)] for text in texts]
    assert [by_length[n] for n in sorted(by_length)] == sorted(by_length.values())


def test_rankings_of_two_are_read_too() -> None:
    class Ranks:
        name = "ranks"

        def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
            found = []
            for g in groups:
                one, other = g.completions
                value = (
                    (1, 1) if one.text[0] == other.text[0] else (1, 2) if one.text > other.text else (2, 1)
                )
                found.append(Annotation("ranking", (one.id, other.id), self.name, value))
            return found

    data = group("1", "2", "2b")
    found = scored(Ranks())([data])
    assert [a.rationale for a in found] == [f"{n} of 4 comparisons won" for n in (0, 3, 3)]
    assert found[1].value == pytest.approx(found[2].value)


def test_equal_texts_are_one_player_and_one_text_alone_has_no_score() -> None:
    judge = Noisy(certain=True)
    data = group("1", "2", "1", "1")
    found = scored(judge)([data])
    assert judge.calls.total() == 2
    assert found[0].value == found[2].value == found[3].value == pytest.approx(-math.log(5) / 4)
    assert sum(a.value for a in found) == pytest.approx(0.0)
    assert sum(a.seconds or 0 for a in found) == pytest.approx(2.0)
    found = scored(judge)([group("1"), group("2", "2"), CompletionGroup(as_messages("x"))])
    assert [a.value for a in found] == [None] * 3
    assert {a.rationale for a in found} == {"no score: there is no other text to compare with"}
    assert judge.calls.total() == 2


def test_each_criterion_has_its_own_scores() -> None:
    class Two(Noisy):
        def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
            found = super().__call__(groups)
            turned = [replace(a, value=1 - a.value, criterion="short") for a in found]
            return [*found, *turned]

    data = group("1", "2", "3")
    found = scored(Two(certain=True))([data])
    by = {c: [a.value for a in found if a.criterion == c] for c in ("overall", "short")}
    assert by["overall"] == pytest.approx([-v for v in by["short"]])
    assert by["overall"][0] < by["overall"][1] < by["overall"][2]


def test_new_samples_of_a_group_are_put_on_the_scale_of_the_old_ones() -> None:
    judge = scored(Noisy(certain=True))
    before = group("1", "2", "3")
    first = judge([before])
    more = replace(group("1", "2", "3", "9"), annotations=tuple(first))
    after = judge([more])
    old, new = [a.value for a in first], [a.value for a in after]
    assert sum(new[:3]) == pytest.approx(sum(old), abs=1e-9)
    assert new[3] > max(new[:3])
    assert sum(a.value for a in judge([replace(more, annotations=())])) == pytest.approx(0.0, abs=1e-9)


def test_the_name_changes_with_all_that_changes_the_scores() -> None:
    base = Noisy()
    others = [
        scored(base),
        scored(base, opponents=4),
        scored(base, votes=2),
        scored(base, both_orders=False),
        scored(base, prior=1.0),
        scored(Noisy(name="other")),
    ]
    assert len({judge.name for judge in others}) == len(others)
    assert others[0].name.startswith("scored:noisy/")


def test_what_cannot_be_asked() -> None:
    with pytest.raises(InputError, match="opponents must be 2 or more"):
        scored(Noisy(), opponents=1)
    refused: list[dict[str, Any]] = [{"votes": 0}, {"prior": 0.0}, {"prior": math.inf}]
    for wrong in refused:
        with pytest.raises(InputError, match="votes must be 1 or more and prior above 0"):
            scored(Noisy(), **wrong)
    with pytest.raises(InputError, match="it scores already"):
        scored(rules("max_words:3"))([group("1", "2")])


def test_as_the_judge_of_a_win_rate() -> None:
    from steerwell.evals.winrate import compare

    pairs = [tuple(group("1", "2", prompt=str(i)).completions[:: 1 if i < 3 else -1]) for i in range(4)]
    groups = [CompletionGroup(a.prompt, (a, b)) for a, b in pairs]
    found = compare([(a, b) for a, b in pairs], scored(Noisy(certain=True))(groups))
    assert (found.wins, found.losses, found.coverage.complete) == (1, 3, True)


def test_as_the_judge_of_rollouts(tmp_path: Any) -> None:
    from steerwell.models.load import load_policy
    from steerwell.train.sources import rollouts
    from tiny import tiny_policy_dir

    class Longer(Noisy):
        def judge(self, one: Completion, other: Completion) -> Annotation:
            value = "tie" if len(one.text) == len(other.text) else int(len(one.text) < len(other.text))
            return Annotation("preference", (one.id, other.id), self.name, value)

    source = rollouts(
        ["a", "b"], scored(Longer()), n=4, prompts_per_step=2, max_new_tokens=8, temperature=2.0
    )
    assert source.identity()["judge"].startswith("scored:noisy/")
    for g in source.step(load_policy(tiny_policy_dir(tmp_path)), 0, seed=0):
        assert g.scores is not None
        assert sum(s for s in g.scores if s is not None) == pytest.approx(0.0, abs=1e-9)
        lengths = [len(c.text) for c in g.completions]
        assert len(set(lengths)) > 1
        assert same_order(g.scores, lengths) == pytest.approx(1.0)
