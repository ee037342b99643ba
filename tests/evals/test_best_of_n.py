"""Best of n, exactly: every subset written out, ties, oracle and chance, and planted gains."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source
from steerwell.evals.best_of_n import (
    best_of_n,
    best_of_n_measures,
    chances,
    gold_scores,
    has_gold,
    kl_bound,
    recovered,
)


def by_subsets(scores: list[float], gold: list[float], n: int) -> float:
    """The mean over all subsets, a tie broken evenly: an independent way to the same number."""
    means = []
    for subset in combinations(range(len(scores)), n):
        top = max(scores[i] for i in subset)
        best = [gold[i] for i in subset if scores[i] == top]
        means.append(sum(best) / len(best))
    return sum(means) / len(means)


def test_by_hand() -> None:
    # Order by score: gold 5, 1, 3. Of the 3 pairs the first is in two, the second wins one.
    assert best_of_n([0.9, 0.5, 0.1], [5.0, 1.0, 3.0]).tolist() == pytest.approx([3.0, 11 / 3, 5.0])
    assert chances(3).tolist() == [
        pytest.approx([1 / 3] * 3),
        pytest.approx([2 / 3, 1 / 3, 0]),
        [1.0, 0.0, 0.0],
    ]


@pytest.mark.parametrize("seed", range(6))
def test_it_is_the_mean_over_all_subsets(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, 7).astype(float).tolist()  # with ties
    gold = rng.normal(size=7).tolist()
    curve = best_of_n(scores, gold)
    assert curve.tolist() == pytest.approx([by_subsets(scores, gold, n) for n in range(1, 8)])
    assert curve[0] == pytest.approx(np.mean(gold))
    assert best_of_n(gold, gold)[-1] == pytest.approx(max(gold))
    assert (best_of_n(gold, gold) >= curve - 1e-12).all()
    assert best_of_n([1.0] * 7, gold).tolist() == pytest.approx([np.mean(gold)] * 7)


def test_many_completions_do_not_overflow() -> None:
    curve = best_of_n(np.arange(1024.0), np.arange(1024.0))
    assert curve[511] == pytest.approx(1025 * 512 / 513 - 1)  # the expected maximum of 512 of 0 … 1023


def test_the_bound_on_kl() -> None:
    assert kl_bound(1) == 0.0
    assert kl_bound(4) == pytest.approx(math.log(4) - 0.75)
    for bad in (
        lambda: kl_bound(0),
        lambda: best_of_n([1.0], [1.0, 2.0]),
        lambda: best_of_n([math.nan], [1.0]),
    ):
        with pytest.raises(InputError):
            bad()


def group(i: int, gold: list[float | None], annotator: str = "gold", ranks: bool = False) -> CompletionGroup:
    prompt = as_messages(f"prompt {i}")
    texts = tuple(
        Completion(prompt, (Message("assistant", f"t{j}"),), Source(index=j)) for j in range(len(gold))
    )
    if ranks:
        return CompletionGroup(prompt, texts, ranks=tuple(None if g is None else int(g) for g in gold))
    notes = tuple(Annotation("score", (c.id,), annotator, g) for c, g in zip(texts, gold, strict=True))
    return CompletionGroup(prompt, texts, notes)


class Model:
    name = "rm"

    def digest(self) -> str:
        return "0123456789abcdef"


def test_a_models_own_scores_are_no_gold() -> None:
    own = group(0, [1.0, 2.0, 3.0], "rm:x@0123456789")
    assert gold_scores(own, Model()) == [None, None, None]
    assert gold_scores(own) == [1.0, 2.0, 3.0]
    assert gold_scores(group(1, [0, 2, None], ranks=True)) == [0.0, -2.0, None]
    assert not has_gold(group(1, [0, 2, None], ranks=True))


def test_measures_are_on_the_same_prompts_and_leave_missing_scores_out() -> None:
    groups = [group(i, [3.0, 2.0, 1.0, 0.0]) for i in range(3)] + [group(3, [1.0, 0.0, 2.0])]
    scores: list[list[float | None]] = [[4.0, 3.0, 2.0, 1.0]] * 3 + [[1.0, 2.0, 3.0]]
    found = {m.name: m for m in best_of_n_measures(groups, scores)}
    assert found["bon_gold/n=4"].estimate.value == 3.0
    assert found["bon_gold/n=1"].estimate.value == 1.5
    assert found["bon_recovered"].estimate.value == 1.0
    assert found["bon_gold/n=4"].coverage.missing == {"have fewer than 4 completions": 1}
    assert found["bon_kl_bound/n=4"].estimate.value == pytest.approx(kl_bound(4))
    lost: list[list[float | None]] = [[4.0, None, 2.0, 1.0]] * 3
    assert "bon_gold/n=3" in {m.name for m in best_of_n_measures(groups[:3], lost)}
    assert best_of_n_measures(groups[:1], [[1.0, None, None, 2.0]]) == []


def test_the_share_recovered_covers_the_truth() -> None:
    """Scores are gold with noise: the share that is recovered is known from many prompts."""
    rng = np.random.default_rng(0)

    def draw(n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        gold = rng.normal(size=(n, 4))
        noisy = gold + rng.normal(size=(n, 4))
        return gold[np.arange(n), noisy.argmax(1)], gold.max(1), gold.mean(1)

    model, oracle, chance = draw(200000)
    truth = (model.mean() - chance.mean()) / (oracle.mean() - chance.mean())
    hits = 0
    for _ in range(25):
        found = recovered(*draw(80), [f"p{i}" for i in range(80)])
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert hits >= 21
    assert recovered(np.ones(3), np.ones(3), np.ones(3), ["a", "b", "c"]).value is None
