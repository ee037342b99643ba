"""Reward objectives that use how much better, whole rankings, and heads of several outputs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from scipy import special
from torch import Tensor

from steerwell.objectives import (
    ObjectiveError,
    bradley_terry,
    ordinal,
    plackett_luce,
    plackett_luce_reward,
    quantile,
    regression,
    scaled_bradley_terry,
)
from steerwell.objectives.table import check_hyperparameters
from steerwell.testing import check_objective

PAIR = torch.tensor([[0], [1]])
NAN = math.nan


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def minus_log_s(x: float) -> float:
    return math.log1p(math.exp(-x))


@pytest.mark.parametrize(
    ("fn", "hyper"),
    [
        (bradley_terry, {"margin": 0.7, "centering": 0.01}),
        (scaled_bradley_terry, {"centering": 0.1}),
        (ordinal, {}),
        (ordinal, {"cutpoints": (0.2,)}),
        (plackett_luce_reward, {}),
        (regression, {}),
        (quantile, {}),
        (quantile, {"levels": (0.5,)}),
    ],
)
def test_passes_the_exported_checks(fn, hyper) -> None:
    assert "gradcheck" in check_objective(fn, seed=1, **hyper)


# --- margins and weights by strength ---
def test_margin_is_asked_for_by_strength() -> None:
    losses, metrics = bradley_terry(f64(2.0, 0.5), PAIR, None, f64(3.0), margin=0.4)
    assert losses.item() == pytest.approx(minus_log_s(1.5 - 1.2), rel=1e-14)
    assert metrics["margin"].item() == 1.5  # what the scores say, not what is asked


def test_an_unknown_strength_asks_for_no_margin() -> None:
    with_nan, _ = bradley_terry(f64(2.0, 0.5), PAIR, None, f64(NAN), margin=0.4)
    assert with_nan.item() == pytest.approx(minus_log_s(1.5), rel=1e-14)


def test_soft_labels_ask_for_the_margin_on_both_sides() -> None:
    losses, _ = bradley_terry(f64(2.0, 0.5), PAIR, f64(0.7), f64(1.0), margin=0.4)
    expected = 0.7 * minus_log_s(1.5 - 0.4) + 0.3 * minus_log_s(-1.5 - 0.4)
    assert losses.item() == pytest.approx(expected, rel=1e-14)


def test_a_margin_moves_the_optimum_as_its_equation_says() -> None:
    """Known closed form: at the optimum p s(m - x) = (1 - p) s(m + x)."""
    p, m = 0.7, 0.5
    x = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([x], max_iter=200, tolerance_grad=1e-13, tolerance_change=0)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = bradley_terry(torch.cat([x, 0 * x]), PAIR, f64(p), f64(1.0), margin=m)[0].sum()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    found = x.item()
    assert p * special.expit(m - found) == pytest.approx((1 - p) * special.expit(m + found), abs=1e-9)
    assert found > math.log(p / (1 - p)) + 0.05  # further apart than without a margin


def test_a_margin_without_strengths_is_an_error() -> None:
    with pytest.raises(ObjectiveError, match="pair_strengths"):
        bradley_terry(f64(2.0, 0.5), PAIR, margin=0.4)


def test_scaled_loss_is_bradley_terry_times_the_strength() -> None:
    scores, pairs = f64(2.0, 0.5, -1.0), torch.tensor([[0, 1, 0], [1, 2, 2]])
    losses, _ = scaled_bradley_terry(scores, pairs, f64(3.0, 0.0, NAN))
    plain, _ = bradley_terry(scores, pairs)
    assert losses.tolist() == pytest.approx([3 * plain[0].item(), 0.0, plain[2].item()], rel=1e-14)


# --- ordinal ---
CUTS = (0.5, 1.5, 2.5)


def of_verdict(d: float, y: int) -> float:
    """P(y) of a verdict from -3 to 3, from differences of the cumulative probabilities alone."""
    bounds = [-math.inf, *(-c for c in reversed(CUTS)), *CUTS, math.inf]
    k = y + 3
    return float(special.expit(bounds[k + 1] - d) - special.expit(bounds[k] - d))


@pytest.mark.parametrize("d", [-4.0, -0.3, 0.0, 0.8, 2.0, 5.0])
@pytest.mark.parametrize("y", range(-3, 4))
def test_ordinal_equals_the_differences_of_cumulative_probabilities(d: float, y: int) -> None:
    pairs = PAIR if y >= 0 else PAIR.flip(0)
    losses, _ = ordinal(f64(d, 0.0), pairs, f64(abs(y)))
    assert losses.item() == pytest.approx(-math.log(of_verdict(d, y)), rel=1e-10)


@pytest.mark.parametrize("d", [-2.0, 0.0, 3.0])
def test_ordinal_probabilities_sum_to_one(d: float) -> None:
    total = sum(
        math.exp(-ordinal(f64(d, 0.0), PAIR if y >= 0 else PAIR.flip(0), f64(abs(y)))[0].item())
        for y in range(-3, 4)
    )
    assert total == pytest.approx(1.0, abs=1e-12)


def test_ordinal_literal_of_a_tie_at_equal_scores() -> None:
    losses, metrics = ordinal(f64(1.0, 1.0), PAIR, f64(0.0))
    assert losses.item() == pytest.approx(
        -math.log(math.tanh(0.25)), rel=1e-12
    )  # s(1/2) - s(-1/2) = tanh(1/4)
    assert metrics["level"].tolist() == [0.0]


def test_an_unknown_strength_is_any_of_the_better_ones() -> None:
    unknown, metrics = ordinal(f64(0.8, 0.0), PAIR, f64(NAN))
    assert unknown.item() == pytest.approx(-math.log(sum(of_verdict(0.8, y) for y in (1, 2, 3))), rel=1e-12)
    assert metrics["level"].tolist() == []


@pytest.mark.parametrize("bad", [(), (0.0, 1.0), (2.0, 1.0), "abc", (1.0, math.inf), 3])
def test_wrong_cutpoints_are_refused(bad) -> None:
    with pytest.raises(ObjectiveError, match="cutpoints"):
        check_hyperparameters(ordinal, {"cutpoints": bad})


# --- rankings ---
def test_two_completions_give_bradley_terry() -> None:
    losses, _ = plackett_luce_reward(f64(2.0, 0.5), torch.tensor([0, 1]), torch.tensor([0, 0]))
    assert losses.tolist() == pytest.approx([minus_log_s(1.5), 0.0], abs=1e-14)


def test_probabilities_of_all_rankings_sum_to_one() -> None:
    scores, group, total = f64(0.3, -1.0, 2.0, 0.1), torch.zeros(4, dtype=torch.long), 0.0
    for order in itertools.permutations(range(4)):
        losses, _ = plackett_luce_reward(scores, torch.tensor(order), group)
        total += math.exp(-losses.sum().item())
    assert total == pytest.approx(1.0, abs=1e-12)


def test_rankings_of_scores_and_of_log_ratios_are_one_formula() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(6, generator=g, dtype=torch.float64)
    ranks, group = torch.tensor([0, 2, 1, 1, 0, -1]), torch.tensor([0, 0, 0, 1, 1, 1])
    policy, _ = plackett_luce(x, torch.zeros_like(x), ranks, group, beta=1.0)
    torch.testing.assert_close(plackett_luce_reward(x, ranks, group)[0], policy)


# --- heads of several outputs ---
def test_regression_leaves_out_what_nobody_scored() -> None:
    head = torch.tensor([[1.0, 2.0], [0.0, 5.0], [3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    given = torch.tensor([[0.0, 4.0], [1.0, NAN], [NAN, NAN]], dtype=torch.float64)
    losses, metrics = regression(head, given)
    assert losses.tolist() == [(1 + 4) / 2, 1.0, 0.0]
    assert metrics["absolute_error"].tolist() == [1.5, 1.0]
    losses.sum().backward()
    assert head.grad is not None
    assert head.grad.tolist() == [[1.0, -2.0], [-2.0, 0.0], [0.0, 0.0]]


def test_regression_refuses_another_number_of_attributes() -> None:
    with pytest.raises(ObjectiveError, match="2 outputs for 3 attributes"):
        regression(torch.zeros(1, 2), torch.zeros(1, 3))


def test_pinball_literal() -> None:
    losses, metrics = quantile(torch.tensor([[1.0, 3.0]], dtype=torch.float64), f64(2.0), levels=(0.1, 0.8))
    assert losses.item() == pytest.approx((0.1 * 1.0 + 0.2 * 1.0) / 2, rel=1e-14)
    assert metrics["below"].tolist() == [0.5]
    missing, metrics = quantile(torch.zeros(1, 2, dtype=torch.float64), f64(NAN), levels=(0.1, 0.8))
    assert missing.tolist() == [0.0]
    assert metrics["below"].tolist() == []


def test_the_optimum_of_the_pinball_loss_is_the_quantile() -> None:
    """Planted truth: 2,000 draws of an exponential distribution, whose quantiles are -log(1 - t)."""
    g = torch.Generator().manual_seed(0)
    y = -torch.log(torch.rand(2000, generator=g, dtype=torch.float64))
    levels = (0.1, 0.5, 0.9)
    q = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([q], lr=0.02)
    for _ in range(600):
        optimizer.zero_grad()
        quantile(q.expand(2000, 3), y, levels=levels)[0].mean().backward()
        optimizer.step()
    assert q.tolist() == pytest.approx([-math.log(1 - t) for t in levels], abs=0.15)


@pytest.mark.parametrize("bad", [(), (0.5, 0.2), (0.0,), (1.0,), "ab"])
def test_wrong_levels_are_refused(bad) -> None:
    with pytest.raises(ObjectiveError, match="levels"):
        check_hyperparameters(quantile, {"levels": bad})
