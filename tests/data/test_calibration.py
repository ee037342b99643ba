"""Temperatures: literals by hand, an independent maximiser, planted truth, and data without a maximum."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import optimize

from steerwell.data.calibration import fit_temperature, win_probability
from steerwell.data.errors import InputError


def test_the_temperature_by_hand() -> None:
    # All margins 2, right 3 times of 4: sigmoid(2/T) = 3/4, so T = 2 / ln 3.
    found = fit_temperature([2.0, 2.0, 2.0, -2.0], [1, 1, 1, 1])
    assert found.status == "fitted"
    assert found.value == pytest.approx(2 / math.log(3), rel=1e-10)
    assert found.log_loss == pytest.approx(-(0.75 * math.log(0.75) + 0.25 * math.log(0.25)))
    assert found.log_loss_before == pytest.approx(
        (3 * math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 4
    )
    assert found.to_dict()["n"] == 4


def test_a_soft_label_is_a_share_of_votes() -> None:
    one = fit_temperature([1.5], [0.8])
    many = fit_temperature([1.5] * 5, [1, 1, 1, 1, 0])
    assert one.value == pytest.approx(1.5 / math.log(4), rel=1e-10)
    assert many.value == pytest.approx(one.value, rel=1e-10)


@pytest.mark.parametrize("temperature", [0.2, 1.0, 7.0])
def test_it_is_the_maximum_of_the_likelihood_and_finds_planted_truth(temperature: float) -> None:
    rng = np.random.default_rng(1)
    margins = rng.normal(0.3, 2.0, 20000)
    outcomes = (rng.random(20000) < 1 / (1 + np.exp(-margins / temperature))).astype(float)
    found = fit_temperature(margins, outcomes).value
    assert found == pytest.approx(temperature, rel=0.06)

    def loss(log_t: float) -> float:
        z = margins / math.exp(log_t)
        return float(-np.mean(outcomes * -np.log1p(np.exp(-z)) + (1 - outcomes) * -np.log1p(np.exp(z))))

    best = optimize.minimize_scalar(loss, bounds=(-4, 4), method="bounded", options={"xatol": 1e-9})
    assert found == pytest.approx(math.exp(best.x), rel=1e-4)


def test_units_and_orientation_do_not_matter() -> None:
    margins, outcomes = np.array([0.5, -1.0, 2.0, 0.1, -0.3]), np.array([1, 0, 1, 0, 1.0])
    value = fit_temperature(margins, outcomes).value
    assert value is not None
    assert fit_temperature(margins * 1e6, outcomes).value == pytest.approx(value * 1e6)
    assert fit_temperature(-margins, 1 - outcomes).value == pytest.approx(value)


@pytest.mark.parametrize(
    ("margins", "outcomes", "status"),
    [
        ([1.0, -2.0, 3.0], [1, 0, 1], "separable"),
        ([1.0, -2.0, 0.0], [1, 0, 1], "separable"),
        ([1.0, -2.0], [0, 1], "no signal"),
        ([1.0, -1.0], [1, 1], "no signal"),
        ([0.0, 0.0], [1, 0], "no data"),
        ([], [], "no data"),
    ],
)
def test_data_without_a_best_temperature_are_named(margins: list, outcomes: list, status: str) -> None:
    found = fit_temperature(margins, outcomes)
    assert (found.value, found.status, found.log_loss) == (None, status, None)


@pytest.mark.parametrize(
    ("margins", "outcomes"),
    [([1.0], [1, 0]), ([math.nan], [1]), ([math.inf], [1]), ([1.0], [1.5]), ([1.0], [math.nan])],
)
def test_bad_input(margins: list, outcomes: list) -> None:
    with pytest.raises(InputError):
        fit_temperature(margins, outcomes)


def test_win_probabilities() -> None:
    assert win_probability([0.0, math.log(3)]).tolist() == pytest.approx([0.5, 0.75])
    assert win_probability([2 * math.log(3)], 2.0).tolist() == pytest.approx([0.75])
    with pytest.raises(InputError, match="positive"):
        win_probability([1.0], 0.0)
