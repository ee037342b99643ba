"""The ceiling from label noise: literals, quadrature, planted truth and the coverage of the interval."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import integrate, special, stats

from steerwell.data.errors import InputError
from steerwell.evals.held_out_pairs import HeldOutPair
from steerwell.evals.noise_ceiling import ceiling_bounds, majority_ceiling, noise_ceiling, vote_agreement


def pair(i: int, votes: tuple[int, int], p: float = 1.0) -> HeldOutPair:
    return HeldOutPair(f"k{i}", f"prompt {i}", p, 1.0, (1, 1), votes)


def test_agreement_of_votes_by_hand() -> None:
    assert vote_agreement(2, 0) == 1.0
    assert vote_agreement(1, 1) == 0.0
    assert vote_agreement(2, 1) == pytest.approx(1 / 3)
    assert vote_agreement(3, 2) == pytest.approx((6 + 2) / 20)
    with pytest.raises(InputError):
        vote_agreement(1, 0)


@pytest.mark.parametrize("p", [0.5, 0.7, 0.95])
@pytest.mark.parametrize("votes", [2, 3, 5])
def test_agreement_is_unbiased_and_the_winning_share_is_not(p: float, votes: int) -> None:
    k = np.arange(votes + 1)
    chance = stats.binom.pmf(k, votes, p)
    assert chance @ [vote_agreement(int(i), votes - int(i)) for i in k] == pytest.approx(p * p + (1 - p) ** 2)
    assert chance @ np.maximum(k, votes - k) / votes > max(p, 1 - p)  # what a plug-in would say


@pytest.mark.parametrize("shape", [0.2, 1.0, 4.0])
@pytest.mark.parametrize("votes", [1, 2, 3, 4, 5, 9])
def test_the_ceiling_is_the_integral(shape: float, votes: int) -> None:
    agreement = (shape + 1) / (2 * shape + 1)
    k = [i for i in range(votes + 1) if 2 * i > votes]

    def wins(p: float) -> float:
        return sum(special.comb(votes, i) * p**i * (1 - p) ** (votes - i) for i in k)

    # twice the upper half; 1 - p = u^(1/shape) takes the pole at p = 1 away
    def upper(u: float) -> float:
        p = 1 - u ** (1 / shape)
        return wins(p) * p ** (shape - 1) / (shape * special.beta(shape, shape))

    won = 2 * integrate.quad(upper, 0.0, 0.5**shape)[0]
    tied = special.comb(votes, votes // 2) * special.beta(shape + votes / 2, shape + votes / 2)
    decided = 1 - (tied / special.beta(shape, shape) if votes % 2 == 0 else 0)
    assert majority_ceiling(agreement, votes) == pytest.approx(won / decided, rel=1e-6)


def test_ceilings_by_hand() -> None:
    assert majority_ceiling(2 / 3, 1) == pytest.approx(0.75)  # p uniform: E max(p, 1 - p)
    assert majority_ceiling(2 / 3, 3) == pytest.approx(
        2 * (1 - 1 / 2 - (1 / 16 - 1 / 32)) - 0.125 + 0.0, abs=0.1
    )
    assert majority_ceiling(1.0, 3) == 1.0
    assert majority_ceiling(0.4, 3) == 0.5
    assert ceiling_bounds(0.58) == pytest.approx((0.58, 0.7))  # all pairs at 0.7: 0.49 + 0.09 agree
    assert ceiling_bounds(0.3) == (0.5, 0.5)


def test_no_repeated_votes_no_number() -> None:
    found = noise_ceiling([pair(i, (1, 0)) for i in range(50)])
    assert (found.labels.value, found.single.value, found.agreement.value) == (None, None, None)
    assert found.bounds is None
    assert (found.repeated, found.pairs) == (0, 50)


def simulate(rng: np.random.Generator, n: int, votes: int, shape: float) -> list[HeldOutPair]:
    p = rng.beta(shape, shape, n)
    k = rng.binomial(votes, p)
    return [pair(i, (max(a, votes - a), min(a, votes - a))) for i, a in enumerate(k.tolist())]


def test_it_recovers_what_an_oracle_reaches() -> None:
    rng = np.random.default_rng(0)
    p = rng.beta(0.8, 0.8, 40000)
    k = rng.binomial(3, p)
    pairs = [pair(i, (max(a, 3 - a), min(a, 3 - a))) for i, a in enumerate(k.tolist())]
    reached = float(np.mean((p > 0.5) == (k > 1.5)))  # the oracle against the majority of three
    one = float(np.mean((p > 0.5) == (rng.random(40000) < p)))
    found = noise_ceiling(pairs)
    assert found.labels.value == pytest.approx(reached, abs=0.01)
    assert found.single.value == pytest.approx(one, abs=0.01)
    plug_in = float(np.mean(np.maximum(k, 3 - k) / 3))
    assert plug_in > one + 0.05  # the share of the winning side would promise too much


def test_single_votes_are_judged_by_the_pairs_with_several() -> None:
    rng = np.random.default_rng(3)
    several = simulate(rng, 3000, 2, 0.5)
    ones = [pair(10000 + i, (1, 0)) for i in range(7000)]
    found = noise_ceiling([*several, *ones])
    agreement = found.agreement.value
    assert agreement is not None
    assert found.labels.value == pytest.approx(
        0.3 * majority_ceiling(agreement, 2) + 0.7 * majority_ceiling(agreement, 1)
    )


@pytest.mark.parametrize(("shape", "votes"), [(0.4, 2), (1.5, 3)])
def test_the_interval_covers(shape: float, votes: int) -> None:
    rng = np.random.default_rng(7)
    truth = majority_ceiling((shape + 1) / (2 * shape + 1), 1)
    hits = 0
    for _ in range(300):
        found = noise_ceiling(simulate(rng, 150, votes, shape)).single
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    assert 0.92 <= hits / 300 <= 0.985


def test_the_bounds_hold_whatever_the_distribution() -> None:
    rng = np.random.default_rng(5)
    coin = rng.random(20000) < 0.4  # some pairs a coin toss, the others certain: the lower bound
    for p in (np.where(coin, 0.5, 1.0), np.full(20000, 0.8), rng.choice([0.6, 0.9], 20000)):
        k = rng.binomial(2, p)
        pairs = [pair(i, (max(a, 2 - a), min(a, 2 - a))) for i, a in enumerate(k.tolist())]
        found = noise_ceiling(pairs)
        assert found.bounds is not None
        truth = float(np.maximum(p, 1 - p).mean())
        assert found.bounds[0] - 0.02 <= truth <= found.bounds[1] + 0.02
