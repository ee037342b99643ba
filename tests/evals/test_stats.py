"""Intervals against planted truth, against brute force, and against literals worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from math import comb, sqrt

import numpy as np
import pytest

from steerwell.data.errors import InputError
from steerwell.evals import stats
from steerwell.evals.stats import Estimate

RUNS = 1500


def coverage(draw: Callable[[], Estimate], truth: float, runs: int = RUNS) -> float:
    """The share of ``runs`` intervals that hold the truth."""
    found = [draw() for _ in range(runs)]
    return float(
        np.mean([e.low is not None and e.high is not None and e.low <= truth <= e.high for e in found])
    )


def is_nominal(share: float, runs: int = RUNS, slack: float = 0.01) -> bool:
    """Does an observed coverage fit 95%, within Monte-Carlo error (3 sigma) and a small slack?"""
    return abs(share - 0.95) <= slack + 3 * sqrt(0.95 * 0.05 / runs)


def clustered_normal(
    rng: np.random.Generator, prompts: int, each: int, rho: float
) -> tuple[np.ndarray, np.ndarray]:
    """Values with mean 0 and correlation ``rho`` inside a prompt."""
    c = np.repeat(np.arange(prompts), each)
    return rng.normal(0, sqrt(rho), prompts)[c] + rng.normal(0, sqrt(1 - rho), len(c)), c


def clustered_binary(
    rng: np.random.Generator, prompts: int, each: int, p: float
) -> tuple[np.ndarray, np.ndarray]:
    """Yes/no outcomes with mean ``p``; prompts differ (beta with a sum of 2)."""
    c = np.repeat(np.arange(prompts), each)
    return rng.random(len(c)) < rng.beta(2 * p, 2 * (1 - p), prompts)[c], c


# ---------------------------------------------------------------- literals


def test_estimate_has_four_keys_and_reads_back() -> None:
    e = Estimate(0.5, 0.4, 0.6, 10)
    assert e.to_dict() == {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    assert Estimate.from_dict(e.to_dict()) == e
    assert str(e) == "0.500 [0.400, 0.600]"
    assert str(stats.NOTHING) == "no data"


def test_wilson_by_hand() -> None:
    # 8 of 10, z = 1.959964: centre (0.8 + z^2/20)/(1 + z^2/10), published as 0.4902 to 0.9433
    e = stats.proportion([True] * 8 + [False] * 2)
    assert (e.value, e.n) == (0.8, 10)
    assert e.low == pytest.approx(0.4901625, abs=1e-6)
    assert e.high == pytest.approx(0.9433178, abs=1e-6)


def test_wilson_at_the_ends_keeps_the_value_inside() -> None:
    none, every = stats.proportion([0] * 10), stats.proportion([1] * 10)
    assert none.low == 0.0
    assert none.high == pytest.approx(1.959964**2 / (10 + 1.959964**2), abs=1e-6)
    assert every.high == 1.0
    assert every.low == pytest.approx(1 - (none.high or 0))


def test_mean_by_hand() -> None:
    # 1, 2, 3: sd 1, SE 1/sqrt(3), t(2, .975) = 4.302653
    e = stats.mean([1.0, 2.0, 3.0])
    assert e.value == pytest.approx(2.0)
    assert e.high == pytest.approx(2 + 4.302653 / sqrt(3), abs=1e-5)


def test_paired_difference_by_hand() -> None:
    e = stats.paired_difference([2.0, 4.0, 6.0, None], [1.0, 2.0, 3.0, 9.0])
    assert (e.value, e.n) == (2.0, 3)
    assert e.low == pytest.approx(2 - 4.302653 / sqrt(3), abs=1e-5)


def test_win_rate_counts_ties_as_half() -> None:
    e = stats.win_rate([1, 1, 0.5, 0])
    assert e.value == 0.625
    assert e.n == 4


def test_all_ties_is_not_a_certainty() -> None:
    e = stats.win_rate([0.5] * 100)
    assert e.low is not None
    assert e.high is not None
    # at 100 ties a share of 3% of wins (or losses) is still credible: the rate may be off by 0.015
    assert 0.47 < e.low < 0.49
    assert 0.51 < e.high < 0.53


def test_mcnemar_by_hand() -> None:
    after = [1] * 9 + [0] * 2 + [1] * 5
    before = [0] * 9 + [1] * 2 + [1] * 5
    found = stats.mcnemar(after, before)
    assert (found.gained, found.lost, found.unchanged) == (9, 2, 5)
    assert found.p_value == pytest.approx(2 * sum(comb(11, k) for k in range(3)) / 2**11)
    assert stats.mcnemar([1, 0, None], [1, 0, 1]).p_value == 1.0


def test_clustered_error_equals_its_definition_on_lopsided_clusters() -> None:
    rng = np.random.default_rng(5)
    sizes = [1, 1, 2, 9, 30]
    c = np.repeat(np.arange(5), sizes)
    x = rng.normal(size=len(c)) + c
    residual = x - x.mean()
    brute = sum(residual[i] * residual[j] for i in range(len(c)) for j in range(len(c)) if c[i] == c[j])
    expected = sqrt(5 / 4 * brute) / len(c)
    assert stats.standard_error(x, c) == pytest.approx(expected, rel=1e-12)
    assert stats.mean(x, c).high == pytest.approx(x.mean() + 2.7764451 * expected, rel=1e-7)


def test_singleton_clusters_change_nothing() -> None:
    x = np.random.default_rng(0).normal(size=20)
    assert stats.standard_error(x, np.arange(20)) == pytest.approx(stats.standard_error(x) or 0, rel=1e-12)
    assert stats.standard_error(x) == pytest.approx(x.std(ddof=1) / sqrt(20), rel=1e-12)


def test_repeating_every_row_adds_no_evidence() -> None:
    x = [1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0]
    three = stats.proportion(x * 3, list(range(12)) * 3)
    once = stats.proportion(x, range(12))  # type: ignore[arg-type]
    naive = stats.proportion(x * 3)
    assert three.low == pytest.approx(once.low or 0, abs=1e-9)
    assert (naive.high or 0) - (naive.low or 0) < 0.7 * ((three.high or 0) - (three.low or 0))


# ---------------------------------------------------------------- missing, degenerate and bad input


def test_missing_is_left_out_and_never_zero() -> None:
    assert stats.proportion([None, True, None, True]).value == 1.0
    assert stats.mean([None, 2.0, 4.0]).n == 2
    assert stats.mean([None, None]) == stats.NOTHING == stats.proportion([]) == Estimate(None, None, None, 0)
    assert stats.paired_difference([None], [1.0]) == stats.NOTHING
    assert stats.cluster_bootstrap([], []) == stats.NOTHING


def test_one_unit_has_a_value_but_no_interval() -> None:
    assert stats.mean([3.0]) == Estimate(3.0, None, None, 1)
    assert stats.mean([3.0, 4.0], ["a", "a"]) == Estimate(3.5, None, None, 2)
    assert stats.proportion([True, False], ["a", "a"]) == Estimate(0.5, None, None, 2)
    assert stats.cluster_bootstrap([1.0, 2.0], [0, 0]) == Estimate(1.5, None, None, 2)
    assert stats.standard_error([1.0]) is None


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: stats.mean([1.0, float("nan")]), "value 1 is not a finite number"),
        (lambda: stats.mean([1.0, 2.0], ["a"]), "2 values but 1 clusters"),
        (lambda: stats.mean([1.0, 2.0], ["a", None]), "value 1 has no cluster"),
        (lambda: stats.proportion([0.2, 1.2]), "outside"),
        (lambda: stats.paired_difference([1.0], [1.0, 2.0]), "1 values after but 2 before"),
        (lambda: stats.mcnemar([0.5], [1.0]), "yes/no"),
        (lambda: stats.mean([1.0, 2.0], confidence=95), "confidence"),
    ],
)
def test_bad_input_says_what_and_where(call: Callable[[], object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        call()


# ---------------------------------------------------------------- coverage on planted truth


@pytest.mark.parametrize(("n", "p"), [(20, 0.1), (50, 0.05), (100, 0.3), (300, 0.5)])
def test_wilson_covers_as_its_exact_coverage_says(n: int, p: float) -> None:
    rng = np.random.default_rng(n)
    inside = [
        (e.low or 0) <= p <= (e.high or 0)
        for k in range(n + 1)
        for e in [stats.proportion([1] * k + [0] * (n - k))]
    ]
    exact = sum(comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1) if inside[k])
    assert 0.92 < exact < 0.985
    counts = rng.binomial(n, p, RUNS)
    assert abs(np.mean([inside[k] for k in counts]) - exact) < 3 * sqrt(exact * (1 - exact) / RUNS)


@pytest.mark.parametrize("n", [3, 10, 60])
def test_t_interval_of_a_mean_is_nominal(n: int) -> None:
    rng = np.random.default_rng(n)
    assert is_nominal(coverage(lambda: stats.mean(rng.normal(1, 2, n)), 1), slack=0)


@pytest.mark.parametrize(("prompts", "each"), [(8, 4), (30, 5)])
def test_clustered_mean_is_nominal_and_the_naive_one_is_not(prompts: int, each: int) -> None:
    rng = np.random.default_rng(prompts)
    share = coverage(lambda: stats.mean(*clustered_normal(rng, prompts, each, 0.6)), 0)
    naive = coverage(lambda: stats.mean(clustered_normal(rng, prompts, each, 0.6)[0]), 0)
    assert is_nominal(share)
    assert not is_nominal(naive)
    assert naive < 0.85


@pytest.mark.parametrize(("prompts", "each", "p"), [(20, 4, 0.3), (50, 4, 0.1), (100, 2, 0.6)])
def test_clustered_proportion_is_nominal_and_plain_wilson_is_not(prompts: int, each: int, p: float) -> None:
    rng = np.random.default_rng(prompts)
    share = coverage(lambda: stats.proportion(*clustered_binary(rng, prompts, each, p)), p)
    naive = coverage(lambda: stats.proportion(clustered_binary(rng, prompts, each, p)[0]), p)
    assert is_nominal(share, slack=0.015)
    assert naive < 0.93 < share


@pytest.mark.parametrize(
    ("n", "win", "tie"), [(30, 0.5, 0.2), (100, 0.2, 0.7), (100, 0.03, 0.95), (100, 0.9, 0.08)]
)
def test_win_rate_with_ties_is_nominal(n: int, win: float, tie: float) -> None:
    rng = np.random.default_rng(n)
    odds = [win, tie, 1 - win - tie]
    share = coverage(lambda: stats.win_rate(rng.choice([1, 0.5, 0], n, p=odds)), win + tie / 2)
    assert is_nominal(share, slack=0.015)


def test_paired_difference_is_nominal_and_much_tighter_than_unpaired() -> None:
    rng = np.random.default_rng(3)
    widths: list[tuple[float, float]] = []

    def draw() -> Estimate:
        difficulty = rng.normal(0, 3, 40)
        after, before = difficulty + rng.normal(0.5, 1, 40), difficulty + rng.normal(0, 1, 40)
        e = stats.paired_difference(after, before)
        unpaired = sqrt((stats.standard_error(after) or 0) ** 2 + (stats.standard_error(before) or 0) ** 2)
        widths.append(((e.high or 0) - (e.low or 0), 2 * 1.96 * unpaired))
        return e

    assert is_nominal(coverage(draw, 0.5), slack=0)
    ours, unpaired = np.mean(widths, axis=0)
    assert ours < 0.6 * unpaired


@pytest.mark.parametrize(("n", "before", "after"), [(50, 0.3, 0.5), (100, 0.05, 0.02), (200, 0.4, 0.4)])
def test_paired_difference_of_shares_is_nominal(n: int, before: float, after: float) -> None:
    rng = np.random.default_rng(n)

    def draw() -> Estimate:
        luck = rng.random(n)  # of the item, shared by both sides for half of the items
        own = np.where(rng.random(n) < 0.5, luck, rng.random(n))
        return stats.paired_difference(own < after, luck < before, shares=True)

    share = coverage(draw, after - before)
    assert share > 0.95 - 0.01 - 3 * sqrt(0.95 * 0.05 / RUNS)
    assert share < 0.99


def test_no_change_at_all_is_not_a_certainty() -> None:
    e = stats.paired_difference([0, 1] * 50, [0, 1] * 50, shares=True)
    assert e.value == 0.0
    assert e.low is not None
    assert e.high is not None
    assert -0.05 < e.low < -0.02
    assert 0.02 < e.high < 0.05
    every = stats.paired_difference([0] * 40, [1] * 40, shares=True)
    assert (every.value, every.low) == (-1.0, -1.0)
    assert every.high is not None
    assert -0.9 < every.high < -0.8


@pytest.mark.parametrize("method", ["bca", "percentile"])
def test_cluster_bootstrap_is_nominal_on_symmetric_data(method: str) -> None:
    rng = np.random.default_rng(11)
    share = coverage(
        lambda: stats.cluster_bootstrap(*clustered_normal(rng, 15, 4, 0.6), draws=600, method=method),  # type: ignore[arg-type]
        0,
        600,
    )
    assert is_nominal(share, 600)


def test_bca_is_nominal_on_rare_outcomes_where_percentile_is_short() -> None:
    rng = np.random.default_rng(12)
    samples = [clustered_binary(rng, 50, 4, 0.05) for _ in range(800)]
    shares = []
    for method in ("bca", "percentile"):
        one = iter(samples)
        shares.append(
            coverage(
                lambda one=one, m=method: stats.cluster_bootstrap(*next(one), draws=600, method=m), 0.05, 800
            )  # type: ignore[arg-type]
        )
    assert is_nominal(shares[0], 800)
    assert shares[1] < shares[0] - 0.01


def test_bootstrapping_rows_instead_of_prompts_under_covers() -> None:
    rng = np.random.default_rng(13)

    def rows() -> Estimate:
        x, _ = clustered_normal(rng, 30, 5, 0.6)
        return stats.cluster_bootstrap(x, range(len(x)), draws=500)  # type: ignore[arg-type]

    assert coverage(rows, 0, 400) < 0.85


def test_mcnemar_keeps_its_level() -> None:
    rng = np.random.default_rng(14)
    before = rng.random((RUNS, 60)) < 0.4
    flip = rng.random((RUNS, 60)) < 0.3
    # no difference: the flipped items go either way with equal odds
    fair = np.where(flip, rng.random((RUNS, 60)) < 0.5, before)
    p = np.array([stats.mcnemar(a, b).p_value for a, b in zip(fair, before, strict=True)])
    level = np.mean(p < 0.05)
    assert level < 0.05 + 3 * sqrt(0.05 * 0.95 / RUNS)
    better = np.where(flip, True, before)
    power = np.mean([stats.mcnemar(a, b).p_value < 0.05 for a, b in zip(better, before, strict=True)])
    assert power > 0.9


# ---------------------------------------------------------------- bootstrap mechanics


def test_bootstrap_is_seeded_and_takes_any_statistic() -> None:
    rng = np.random.default_rng(1)
    x, c = clustered_normal(rng, 20, 3, 0.5)
    same = stats.cluster_bootstrap(x, c, seed=4)
    assert same == stats.cluster_bootstrap(x, c, seed=4) != stats.cluster_bootstrap(x, c, seed=5)
    slow = stats.cluster_bootstrap(x, c, lambda rows: float(rows.mean()), seed=4)
    assert slow.low == pytest.approx(same.low or 0)
    assert slow.high == pytest.approx(same.high or 0)


def test_bootstrap_of_a_ratio_of_columns() -> None:
    rng = np.random.default_rng(2)
    rows = np.stack([rng.normal(2, 0.2, 200), rng.normal(4, 0.2, 200)], axis=1)
    e = stats.cluster_bootstrap(
        rows, np.arange(200), lambda r: float(r[:, 0].sum() / r[:, 1].sum()), draws=300
    )
    assert e.low is not None
    assert e.high is not None
    assert e.low < 0.5 < e.high
    assert e.high - e.low < 0.02
    with pytest.raises(InputError, match="statistic"):
        stats.cluster_bootstrap(rows, np.arange(200))


def test_a_weighted_mean_of_independent_shares_covers_and_is_never_certain() -> None:
    by_hand = stats.combined([Estimate(0.8, 0.7, 0.9, 10), Estimate(0.4, 0.1, 0.6, 20)], [3, 1])
    assert by_hand.value == pytest.approx(0.7)
    assert by_hand.low == pytest.approx(0.7 - (0.075**2 + 0.075**2) ** 0.5)
    assert by_hand.high == pytest.approx(0.7 + (0.075**2 + 0.05**2) ** 0.5)
    assert by_hand.n == 30
    sure = stats.combined([stats.proportion([1.0] * 9), stats.proportion([1.0] * 9)], [1, 1])
    assert sure.value == sure.high == 1.0
    assert sure.low is not None
    assert sure.low < 0.85
    rng = np.random.default_rng(0)
    shares, sizes, weights = [0.95, 0.6, 0.8], [30, 50, 20], [1, 1, 2]
    truth, hits = np.average(shares, weights=weights), 0
    for _ in range(1000):
        parts = [
            stats.proportion((rng.random(n) < p).astype(float)) for p, n in zip(shares, sizes, strict=True)
        ]
        found = stats.combined(parts, weights)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.93 <= hits / 1000 <= 0.98


def test_a_weighted_mean_needs_all_its_parts() -> None:
    known, unknown = stats.proportion([1.0, 0.0]), stats.proportion([])
    assert stats.combined([known, unknown], [1, 1]).value is None
    assert stats.combined([known, unknown], [1, 0]).value == 0.5
    assert stats.combined([known, Estimate(0.5, None, None, 1)], [1, 1]).low is None
    with pytest.raises(InputError):
        stats.combined([known], [1, 2])
    with pytest.raises(InputError):
        stats.combined([known], [-1])


def test_a_ratio_of_sums_is_what_the_plain_bootstrap_says() -> None:
    rng = np.random.default_rng(0)
    below = rng.uniform(0.5, 2.0, 60)
    rows = np.column_stack([below * 0.4 + rng.normal(0, 0.3, 60), below])
    prompts = [i // 3 for i in range(60)]
    fast = stats.cluster_bootstrap(rows, prompts, "ratio")
    slow = stats.cluster_bootstrap(rows, prompts, lambda r: float(r[:, 0].sum() / r[:, 1].sum()))
    assert fast.value == pytest.approx(rows[:, 0].sum() / rows[:, 1].sum())
    assert (fast.low, fast.high) == (pytest.approx(slow.low), pytest.approx(slow.high))
    with pytest.raises(InputError, match="need a statistic"):
        stats.cluster_bootstrap(np.ones((3, 3)), [0, 1, 2], "ratio")
