"""Reward-model losses against literals and an independent float64 reference."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, bradley_terry
from steerwell.testing import check_objective

PAIR = torch.tensor([[0], [1]])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("hyper", [{}, {"centering": 0.01}, {"centering": 1.0}])
@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(hyper: dict[str, float], seed: int) -> None:
    assert "removal" in check_objective(bradley_terry, seed=seed, **hyper)


def test_equal_scores_give_ln_2_and_half_accuracy() -> None:
    losses, metrics = bradley_terry(f64(3.0, 3.0), PAIR)
    assert losses.item() == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["accuracy"].item() == 0.5


def test_literal_with_centering_and_metrics() -> None:
    losses, metrics = bradley_terry(f64(2.0, 0.5), PAIR, centering=0.1)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-1.5)) + 0.1 * 2.5**2, rel=1e-14)
    assert {name: x.item() for name, x in metrics.items()} == {
        "accuracy": 1.0,
        "margin": 1.5,
        "scores/chosen": 2.0,
        "scores/rejected": 0.5,
    }
    assert bradley_terry(f64(0.5, 2.0), PAIR)[1]["accuracy"].item() == 0.0


def test_soft_label_literal_and_optimum() -> None:
    losses, _ = bradley_terry(f64(2.0, 0.5), PAIR, f64(0.7))
    expected = 0.7 * math.log(1 + math.exp(-1.5)) + 0.3 * math.log(1 + math.exp(1.5))
    assert losses.item() == pytest.approx(expected, rel=1e-14)
    scores = f64(math.log(0.7 / 0.3), 0.0).requires_grad_()
    bradley_terry(scores, PAIR, f64(0.7))[0].sum().backward()
    assert scores.grad is not None
    assert scores.grad.abs().max() < 1e-15


def test_centering_pulls_the_level_to_zero_and_leaves_the_difference_alone() -> None:
    plain, centred = (f64(2.0, 0.5).requires_grad_() for _ in range(2))
    bradley_terry(plain, PAIR)[0].sum().backward()
    bradley_terry(centred, PAIR, centering=0.1)[0].sum().backward()
    assert plain.grad is not None
    assert centred.grad is not None
    assert (centred.grad - plain.grad).tolist() == pytest.approx([2 * 0.1 * 2.5] * 2)


@pytest.mark.parametrize("seed", range(3))
def test_equals_an_independent_float64_reference(seed: int) -> None:
    g = np.random.default_rng(seed)
    scores, pairs, probs = g.normal(0, 3, 8), g.integers(0, 8, (2, 10)), g.uniform(0, 1, 10)
    wins = np.exp(scores[pairs[0]]) / (np.exp(scores[pairs[0]]) + np.exp(scores[pairs[1]]))
    expected = -probs * np.log(wins) - (1 - probs) * np.log(1 - wins) + 0.02 * scores[pairs].sum(0) ** 2
    losses, _ = bradley_terry(*map(torch.from_numpy, (scores, pairs, probs)), centering=0.02)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-10)


def test_far_scores_are_finite_and_still_teach() -> None:
    scores = torch.tensor([-1e4, 1e4], requires_grad=True)
    losses, _ = bradley_terry(scores, PAIR)
    losses.sum().backward()
    assert scores.grad is not None
    assert losses.item() == 2e4
    assert scores.grad.tolist() == [-1.0, 1.0]


def test_negative_centering_is_refused() -> None:
    with pytest.raises(ObjectiveError, match=r"^centering must be >= 0, got -0\.1$"):
        bradley_terry(f64(1.0, 0.0), PAIR, centering=-0.1)
