"""Strengths from comparisons: closed forms, an independent fit, planted truth, and what has no comparison."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.optimize import minimize

from steerwell.judges.strengths import bradley_terry, least_squares


@pytest.mark.parametrize(
    ("w", "n", "prior"), [(2, 2, 0.5), (1, 2, 0.5), (3.5, 4, 0.5), (0, 7, 1.0), (2, 3, 0.01)]
)
def test_two_players_have_the_log_odds_of_the_smoothed_share(w: float, n: float, prior: float) -> None:
    one, other = bradley_terry([[0, w], [n - w, 0]], prior)
    assert one - other == pytest.approx(math.log((w + prior) / (n - w + prior)), abs=1e-9)
    assert one + other == pytest.approx(0.0, abs=1e-12)


def test_a_winner_of_both_orders_by_hand() -> None:
    assert bradley_terry([[0, 2], [0, 0]]) == pytest.approx([math.log(5) / 2, -math.log(5) / 2])


def table(strengths: np.ndarray, games: int, rng: random.Random) -> list[list[float]]:
    k = len(strengths)
    wins = [[0.0] * k for _ in range(k)]
    for i in range(k):
        for j in range(i + 1, k):
            p = 1 / (1 + math.exp(strengths[j] - strengths[i]))
            won = sum(rng.random() < p for _ in range(games))
            wins[i][j], wins[j][i] = float(won), float(games - won)
    return wins


def reference(wins: list[list[float]], prior: float) -> np.ndarray:
    """The same likelihood, minimised by a general method without derivatives of ours."""
    k = len(wins)
    counts = np.array(wins) + prior / (k - 1)

    def loss(free: np.ndarray) -> float:
        s = np.append(free, 0.0)
        return sum(
            counts[i, j] * math.log1p(math.exp(s[j] - s[i])) for i in range(k) for j in range(k) if i != j
        )

    found = np.append(minimize(loss, np.zeros(k - 1), tol=1e-12).x, 0.0)
    return found - found.mean()


@pytest.mark.parametrize("seed", range(4))
def test_equal_to_an_independent_fit(seed: int) -> None:
    rng = random.Random(seed)
    wins = table(np.array([rng.gauss(0, 2) for _ in range(5)]), 4, rng)
    assert bradley_terry(wins) == pytest.approx(reference(wins, 0.5), abs=1e-4)


def test_planted_strengths_are_recovered_without_bias_and_are_probabilities() -> None:
    truth = np.array([-1.5, -0.5, 0.0, 0.4, 1.6])
    fits = np.array([bradley_terry(table(truth, 40, random.Random(seed))) for seed in range(300)])
    error = fits - truth
    assert np.abs(error.mean(axis=0)).max() < 0.04  # the means have standard errors of 0.012 at most
    assert np.sqrt((error**2).mean()) < 0.2
    single = np.array(bradley_terry(table(truth, 4000, random.Random(7))))
    predicted = 1 / (1 + np.exp(single[None, :] - single[:, None]))
    true = 1 / (1 + np.exp(truth[None, :] - truth[:, None]))
    assert np.abs(predicted - true).max() < 0.02


def test_an_unbeaten_player_is_finite_and_a_clear_order_stays_one() -> None:
    k = 30
    wins = [
        [float(i > j) * 2 for j in range(k)] for i in range(k)
    ]  # separated: without a prior there is no optimum
    found = bradley_terry(wins)
    assert found == sorted(found)
    assert all(math.isfinite(s) for s in found)
    assert sum(found) == pytest.approx(0.0, abs=1e-9)
    again = bradley_terry([[wins[k - 1 - i][k - 1 - j] for j in range(k)] for i in range(k)])
    assert again[::-1] == pytest.approx(found, abs=1e-8)


@pytest.mark.parametrize("seed", range(40))
def test_counts_of_very_different_sizes_are_fitted_to_the_end(seed: int) -> None:
    """At the optimum each player's expected wins are its wins."""
    rng = np.random.default_rng(seed)
    k, prior = int(rng.integers(2, 12)), 10 ** rng.uniform(-4, 0)
    wins = np.where(rng.random((k, k)) < 0.6, 0.0, 10 ** rng.uniform(-2, 5, (k, k)))
    np.fill_diagonal(wins, 0.0)
    s = np.array(bradley_terry(wins.tolist(), prior))
    counts = wins + prior / (k - 1) * (1 - np.eye(k))
    expected = (counts + counts.T) * (0.5 + 0.5 * np.tanh((s[:, None] - s[None, :]) / 2))
    np.fill_diagonal(expected, 0.0)
    assert np.abs((counts - expected).sum(axis=1)).max() < 1e-6 * (1 + counts.max())


def test_a_smaller_prior_shrinks_less() -> None:
    wins = [[0, 3, 3], [1, 0, 3], [1, 1, 0]]
    spreads = [np.std(bradley_terry(wins, prior)) for prior in (10.0, 1.0, 0.1)]
    assert spreads == sorted(spreads)


def test_parts_that_never_met_are_drawn_together() -> None:
    wins = np.zeros((4, 4))
    wins[0, 1] = wins[2, 3] = 50
    found = bradley_terry(wins.tolist())
    assert found[0] == pytest.approx(found[2], abs=1e-8)
    assert found[1] == pytest.approx(found[3], abs=1e-8)
    assert found[0] - found[1] > 3


def test_nothing_to_fit() -> None:
    assert bradley_terry([]) == []
    assert bradley_terry([[0]]) == [0.0]
    assert bradley_terry([[0] * 3] * 3) == pytest.approx([0.0] * 3)
    assert least_squares([], []) == []
    for wrong in ([[0, 1]], [[0, -1], [1, 0]]):
        with pytest.raises(ValueError, match="must"):
            bradley_terry(wrong)
    with pytest.raises(ValueError, match="prior"):
        bradley_terry([[0, 1], [1, 0]], 0.0)


def test_least_squares_by_hand_and_in_parts() -> None:
    ones = [[1.0] * 3 for _ in range(3)]
    circle = [[None, 2.0, -1.0], [None, None, 2.0], [None, None, None]]
    # the mean over all three, itself with 0: (2 - 1) / 3, (-2 + 2) / 3, (1 - 2) / 3
    assert least_squares(circle, ones) == pytest.approx([1 / 3, 0.0, -1 / 3])
    assert least_squares([[None, 3.0], [None, None]], [[0, 1.0], [0, 0]]) == pytest.approx([1.5, -1.5])
    apart = [[None, 2.0, None, None], [None] * 4, [None, None, None, 6.0], [None] * 4]
    assert least_squares(apart, [[1.0] * 4] * 4) == pytest.approx([1.0, -1.0, 3.0, -3.0])
    weights = [[0, 1.0, 3.0], [0, 0, 1.0], [0, 0, 0]]
    s = least_squares(circle, weights)
    gradient = [
        1 * (s[0] - s[1] - 2) + 3 * (s[0] - s[2] + 1),
        -1 * (s[0] - s[1] - 2) + 1 * (s[1] - s[2] - 2),
    ]
    assert gradient == pytest.approx([0.0, 0.0], abs=1e-9)
