"""Calibration of reward models: a table by hand, planted truth, what chance alone shows, and held-out fits."""

from __future__ import annotations

import math

import numpy as np
import pytest

from steerwell.evals.calibration import calibration, calibration_measures, cross_fitted
from steerwell.evals.held_out_pairs import HeldOutPair


def pair(
    i: int, margin: float | None, p: float = 1.0, prompt: str = "", side: str = "about equal"
) -> HeldOutPair:
    return HeldOutPair(f"k{i}", prompt or f"prompt {i}", p, margin, (3, 3), (1, 0), {"length": side})


def planted(rng: np.random.Generator, n: int, temperature: float, per_prompt: int = 1) -> list[HeldOutPair]:
    """Pairs for which sigmoid(margin / temperature) is the truth."""
    m = rng.normal(0, 2, n)
    won = rng.random(n) < 1 / (1 + np.exp(-m / temperature))
    return [
        pair(i, float(x if w else -x), prompt=f"p{i // per_prompt}")
        for i, (x, w) in enumerate(zip(m, won, strict=True))
    ]


def test_by_hand() -> None:
    three, one = math.log(3), math.log(9)  # confidence 3/4 and 9/10
    pairs = [pair(0, three), pair(1, -three), pair(2, one), pair(3, one), pair(4, None)]
    found = calibration(pairs, bins=2)
    assert [b.confidence for b in found.bins] == pytest.approx([0.75, 0.9])
    assert [b.right.value for b in found.bins] == [0.5, 1.0]
    assert found.ece.value == pytest.approx((2 * 0.25 + 2 * 0.1) / 4)
    assert found.brier.value == pytest.approx((0.25**2 + 0.75**2 + 2 * 0.1**2) / 4)
    assert found.floor == pytest.approx(
        math.sqrt(2 / math.pi) * (math.sqrt(2 * 3 / 16) + math.sqrt(2 * 0.09)) / 4
    )
    assert found.ece.n == 4


def test_soft_labels_and_equal_scores() -> None:
    found = calibration([pair(0, math.log(3), p=0.8), pair(1, 0.0)], bins=1)
    assert found.bins[0].right.value == pytest.approx((0.8 + 0.5) / 2)
    assert found.brier.value == pytest.approx((0.05**2 + 0.5**2) / 2)


def test_nothing_to_look_at() -> None:
    found = calibration([pair(0, None)])
    assert (found.bins, found.ece.value, found.brier.value, found.floor) == ((), None, None, None)


def test_a_calibrated_model_shows_what_chance_shows() -> None:
    rng = np.random.default_rng(0)
    errors, floors = [], []
    for _ in range(200):
        found = calibration(planted(rng, 300, 1.0))
        assert found.ece.value is not None
        errors.append(found.ece.value)
        floors.append(found.floor)
    assert np.mean(errors) == pytest.approx(np.mean(floors), rel=0.05)
    assert np.mean(floors) > 0.05  # on 300 pairs "no error" looks like 5 points


def test_a_model_that_promises_too_much_is_found_out_and_mended() -> None:
    rng = np.random.default_rng(1)
    pairs = planted(rng, 6000, 4.0)
    before = calibration(pairs)
    fitted = cross_fitted(pairs)
    assert fitted.per_pair is not None
    assert set(np.round(fitted.per_pair, 0)) == {4.0}
    after = calibration(pairs, fitted.per_pair)
    assert before.ece.value is not None
    assert after.ece.value is not None
    assert after.floor is not None
    assert before.ece.value > 0.15
    assert after.ece.value < 2 * after.floor
    assert (after.brier.value or 1) < (before.brier.value or 0)


def test_the_interval_of_the_error_covers() -> None:
    rng = np.random.default_rng(2)
    truth = calibration(planted(rng, 200000, 3.0), bins=10).ece.value
    assert truth is not None
    hits = 0
    for _ in range(100):
        found = calibration(planted(rng, 800, 3.0), bins=10).ece
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert 88 <= hits <= 99


@pytest.mark.parametrize("per_prompt", [1, 4])
def test_the_interval_of_the_temperature_covers(per_prompt: int) -> None:
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(200):
        found = cross_fitted(planted(rng, 400, 2.0, per_prompt)).overall
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 2.0 <= found.high
    assert 0.91 <= hits / 200 <= 0.985


def test_each_half_is_fitted_without_itself() -> None:
    """Were a pair in its own fit, turning its label would change its own temperature."""
    rng = np.random.default_rng(5)
    pairs = planted(rng, 100, 1.0)
    fitted = cross_fitted(pairs).per_pair
    turned = [pair(0, -float(pairs[0].margin or 0), prompt=pairs[0].prompt), *pairs[1:]]
    again = cross_fitted(turned).per_pair
    assert fitted is not None
    assert again is not None
    assert again[0] == fitted[0]
    assert any(a != b for a, b in zip(fitted, again, strict=True))


def test_separable_pairs_are_said_to_be_so() -> None:
    fitted = cross_fitted([pair(i, 1.0 + i) for i in range(40)])
    assert fitted.per_pair is None
    assert "separable" in fitted.why
    measures = {m.name: m for m in calibration_measures([pair(i, 1.0 + i) for i in range(40)], 1.0)}
    assert measures["rm_temperature"].estimate.value is None
    assert measures["rm_ece/fitted"].coverage.missing == {
        "no temperature (half of the prompts: separable)": 40
    }
    assert measures["rm_ece"].estimate.value is not None


def test_by_length_each_part_is_its_own() -> None:
    rng = np.random.default_rng(6)
    good, bad = planted(rng, 1500, 1.0), planted(rng, 1500, 6.0)
    mixed = [
        HeldOutPair(f"a{i}", f"a{i}", p.p, p.margin, (9, 3), (1, 0), {"length": "chosen longer"})
        for i, p in enumerate(good)
    ]
    mixed += [
        HeldOutPair(f"b{i}", f"b{i}", p.p, p.margin, (3, 9), (1, 0), {"length": "chosen shorter"})
        for i, p in enumerate(bad)
    ]
    found = {m.name: m for m in calibration_measures(mixed, 1.0)}
    assert (found["rm_ece/length=chosen longer"].estimate.value or 1) < 0.06
    assert (found["rm_ece/length=chosen shorter"].estimate.value or 0) > 0.15
    assert found["rm_reliability/length=chosen longer/1"].estimate.value is not None
