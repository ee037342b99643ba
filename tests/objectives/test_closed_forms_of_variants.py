"""Minima of DPO's variants where they are known, on the bandit of bandit.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from bandit import (
    REF,
    REWARD,
    SAMPLERS,
    all_pairs,
    bradley_terry_wins,
    close,
    converged,
    f64,
    stepped,
    tilted,
    weights,
)  # fmt: skip
from scipy.optimize import brentq
from scipy.special import lambertw
from torch import Tensor

from steerwell.objectives import (
    bco,
    chi_po,
    dpo,
    f_dpo,
    info_nca,
    nca,
    nca_pair,
    plackett_luce,
    r_dpo,
    rebel,
    robust_dpo,
)  # fmt: skip

WINS = bradley_terry_wins(REWARD)
PAIRS = all_pairs(5)


# --- NCA ---
def test_nca_on_pairs_reaches_twice_the_reference_times_the_win_rate() -> None:
    """At beta = 1 and pairs of the reference's own samples pi(y) = 2 ref(y) p(y beats ref), which sums to 1."""
    seen, rates = weights(REF, WINS), WINS @ REF
    found = converged(lambda logps: (seen * nca_pair(logps, REF.log(), PAIRS, beta=1.0)[0]).sum(), REF.log())
    close(found.exp(), 2 * REF * rates)
    close((2 * REF * rates).sum(), f64(1.0)[0], 1e-12)


def test_nca_on_pairs_keeps_a_certain_winner_where_dpo_gives_it_everything() -> None:
    """Arm 0 always wins: 2 ref p of it is 2 ref - ref^2, while DPO's margin has no end."""
    wins = torch.full((2, 2), 0.5, dtype=torch.float64)
    wins[0, 1], wins[1, 0] = 1.0, 0.0
    ref, pairs = f64(0.3, 0.7), all_pairs(2)
    seen = weights(ref, wins)
    found = converged(lambda logps: (seen * nca_pair(logps, ref.log(), pairs, beta=1.0)[0]).sum(), ref.log())
    close(found.exp()[0], f64(2 * 0.3 - 0.3**2)[0])


def test_info_nca_tilts_the_reference_by_the_scores_and_nca_gives_the_scores_softmax() -> None:
    """Over all arms: ref exp(score / (alpha beta)); from a uniform reference at beta = 1: softmax(score / alpha)."""
    group, uniform = torch.zeros(5, dtype=torch.long), SAMPLERS["uniform"]

    def of(fn: Callable[..., tuple[Tensor, object]], ref: Tensor, **hyper: float) -> Tensor:
        return converged(lambda logps: fn(logps, ref.log(), REWARD, group, **hyper)[0].sum(), ref.log())

    close(of(info_nca, REF, beta=0.5, alpha=2.0), tilted(REF, REWARD / (2.0 * 0.5)))
    close(of(nca, uniform, beta=1.0, alpha=2.0), (REWARD / 2.0).log_softmax(0))


# --- other divergences ---
def by_first_order(inverse: Callable[[np.ndarray], np.ndarray], beta: float, floor: float) -> Tensor:
    """Log-probabilities with ref inverse((r - c) / beta), c such that they sum to 1: beta f'(u) = r - c of every arm.

    ``floor``: c lies between this and far above it.
    """
    ref, reward = REF.numpy(), REWARD.numpy()

    def excess(c: float) -> float:
        return float((ref * inverse((reward - c) / beta)).sum() - 1)

    c = brentq(excess, floor, floor + 200.0, xtol=1e-14)
    return torch.from_numpy(np.log(ref * inverse((reward - c) / beta)))


def lambert(x: np.ndarray) -> np.ndarray:
    return lambertw(np.exp(x)).real


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_chi_po_reaches_the_lambert_optimum_from_any_sampler(sampler: str, beta: float) -> None:
    """arXiv:2407.13399: u + log u = (r - c) / beta, so pi = ref W(exp((r - c) / beta))."""
    seen = weights(SAMPLERS[sampler], WINS)
    found = converged(lambda logps: (seen * chi_po(logps, REF.log(), PAIRS, beta=beta)[0]).sum(), REF.log())
    close(found, by_first_order(lambert, beta, -50.0))


def test_chi_po_lets_a_bad_arm_win_less_mass_than_dpo() -> None:
    """A rare arm with a high reward: DPO puts more than half on it, chi-PO little, as its ratio costs itself."""
    ref, reward, pairs = f64(0.01, 0.99), f64(2.5, 0.0), all_pairs(2)
    seen = weights(f64(0.5, 0.5), bradley_terry_wins(reward))
    of = {
        fn: converged(lambda logps, fn=fn: (seen * fn(logps, ref.log(), pairs, beta=0.5)[0]).sum(), ref.log())
        for fn in (dpo, chi_po)
    }
    assert of[dpo].exp()[0] > 0.5
    assert of[chi_po].exp()[0] < 0.1


INVERSES: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    # the inverse of f', and the lower end of c at beta = 1, where the best arm's ratio has no bound
    "reverse_kl": (np.exp, -50.0),
    "forward_kl": (lambda x: -1 / x, 1.6 + 1e-9),
    "js": (lambda x: np.exp(x) / (2 - np.exp(x)), 1.6 - np.log(2) + 1e-9),
    "alpha": (lambda x: (1 - 0.5 * x) ** -2.0, 1.6 - 2.0 + 1e-9),
}


@pytest.mark.parametrize("divergence", INVERSES)
def test_f_dpo_reaches_the_optimum_of_its_divergence(divergence: str) -> None:
    """arXiv:2309.16240: f'(pi / ref) = (r - c) / beta."""
    seen, (inverse, floor) = weights(SAMPLERS["uniform"], WINS), INVERSES[divergence]
    found = converged(
        lambda logps: (seen * f_dpo(logps, REF.log(), PAIRS, beta=1.0, divergence=divergence)[0]).sum(),
        REF.log(),
    )
    close(found, by_first_order(inverse, 1.0, floor))


# --- flipped labels ---
def test_robust_dpo_on_flipped_labels_has_the_optimum_of_dpo_on_true_ones_and_cdpo_has_not() -> None:
    rate = 0.2
    flipped = weights(SAMPLERS["uniform"], (1 - rate) * WINS + rate * WINS.T)
    clean = weights(SAMPLERS["uniform"], WINS)

    def spread(loss: Callable[[Tensor], Tensor], seen: Tensor) -> tuple[Tensor, float]:
        found = converged(lambda logps: (seen * loss(logps)).sum(), REF.log())
        h = found - REF.log()
        return found, float(h.max() - h.min())

    def plain(logps: Tensor) -> Tensor:
        return dpo(logps, REF.log(), PAIRS, beta=1.0)[0]

    def smoothed(logps: Tensor) -> Tensor:
        return dpo(logps, REF.log(), PAIRS, beta=1.0, label_smoothing=rate)[0]

    def robust(logps: Tensor) -> Tensor:
        return robust_dpo(logps, REF.log(), PAIRS, beta=1.0, flip_rate=rate)[0]

    truth = tilted(REF, REWARD)
    close(spread(plain, clean)[0], truth)
    mended, whole = spread(robust, flipped)
    close(mended, truth)
    # what is left uncorrected shrinks the margins, and smoothing the labels shrinks them once more
    shrunk, twice = spread(plain, flipped)[1], spread(smoothed, flipped)[1]
    assert whole == pytest.approx(2.4, abs=1e-6)  # 1.6 + 0.8, the rewards' own
    assert shrunk < 0.7 * whole
    assert twice < 0.7 * shrunk
    assert spread(smoothed, clean)[1] == pytest.approx(shrunk, abs=1e-6), "smoothing is what flipping does"


# --- rankings ---
def test_plackett_luce_over_two_is_dpo_in_value_and_optimum() -> None:
    """Each pair as a group of two: rank 0 is the winner."""
    two, seen = PAIRS.T.flatten(), weights(SAMPLERS["skewed"], WINS)
    ranks, group = torch.tensor([0, 1]).repeat(25), torch.arange(25).repeat_interleave(2)

    def listed(logps: Tensor, beta: float) -> Tensor:
        return plackett_luce(logps[two], REF.log()[two], ranks, group, beta=beta)[0].reshape(25, 2).sum(1)

    logps = f64(0.3, -1.0, 0.2, 2.0, -0.4).log_softmax(0)
    close(listed(logps, 0.7), dpo(logps, REF.log(), PAIRS, beta=0.7)[0], 1e-12)
    close(converged(lambda logps: (seen * listed(logps, 0.5)).sum(), REF.log()), tilted(REF, REWARD / 0.5))


def test_plackett_luce_over_rankings_of_four_has_the_optimum_of_dpo() -> None:
    """All 24 orders of four arms, each as often as Plackett-Luce draws it."""
    ref, reward = f64(0.4, 0.3, 0.2, 0.1), f64(0.5, -0.7, 0.0, 1.2)
    orders = list(itertools.permutations(range(4)))
    often = torch.stack([
        torch.stack([reward[order[k]] - reward[list(order[k:])].logsumexp(0) for k in range(4)]).sum().exp()
        for order in orders
    ])  # fmt: skip
    close(often.sum(), f64(1.0)[0], 1e-12)
    arms = torch.tensor(orders).flatten()
    ranks, group = torch.arange(4).repeat(24), torch.arange(24).repeat_interleave(4)

    def loss(logps: Tensor) -> Tensor:
        losses, _ = plackett_luce(logps[arms], ref.log()[arms], ranks, group, beta=0.5)
        return (often * losses.reshape(24, 4).sum(1)).sum()

    close(converged(loss, ref.log()), tilted(ref, reward / 0.5))


# --- rewards with more in them ---
def test_rebel_tilts_the_reference_by_the_scores() -> None:
    seen = weights(SAMPLERS["skewed"], torch.ones(5, 5).double())
    found = converged(
        lambda logps: (seen * rebel(logps, REF.log(), REWARD, PAIRS, eta=2.0)[0]).sum(), REF.log()
    )
    close(found, tilted(REF, 2.0 * REWARD))


def test_r_dpo_takes_the_price_of_length_off_the_reward() -> None:
    """pi proportional to ref exp((r - alpha |y|) / beta): the policy of the reward without length."""
    lengths, seen = f64(3, 10, 25, 1, 40), weights(SAMPLERS["uniform"], WINS)
    found = converged(
        lambda logps: (seen * r_dpo(logps, REF.log(), lengths, PAIRS, beta=0.5, alpha=0.02)[0]).sum(),
        REF.log(),
    )
    close(found, tilted(REF, (REWARD - 0.02 * lengths) / 0.5))
    assert (found.exp() * lengths).sum() < (tilted(REF, REWARD / 0.5).exp() * lengths).sum() - 5


# --- BCO: ten desirable completions for one that is not ---
# Which arms the classes consist of is (5, 4, 1) of ten and (1, 4, 5) of ten; the reference is the second.
BAD = f64(0.1, 0.4, 0.5)
GOOD = f64(0.5, 0.4, 0.1)


def seen_by_bco(times: int) -> tuple[Tensor, Tensor]:
    """Arms and labels of a batch with ``times`` desirable completions for one undesirable."""
    arms, good, bad = torch.arange(3), torch.tensor([5, 4, 1]), torch.tensor([1, 4, 5])
    both = torch.cat([arms.repeat_interleave(times * good), arms.repeat_interleave(bad)])
    return both, torch.arange(len(both)) < 10 * times


def bco_push(logps: Tensor, times: int, **hyper: Any) -> tuple[Tensor, float]:
    """Minus the gradient of the mean loss by each arm's log-probability, and delta."""
    logps = logps.clone().requires_grad_()
    arms, labels = seen_by_bco(times)
    losses, metrics = bco(logps[arms], BAD.log()[arms], labels, beta=1.0, **hyper)
    (slope,) = torch.autograd.grad(losses.mean(), [logps])
    return -slope, float(metrics["delta"][0])


def test_bco_delta_does_not_move_with_the_imbalance() -> None:
    """At pi = GOOD, r = log(GOOD / BAD): the class means are +-0.4 ln 5 whatever the counts, and delta is 0."""
    for times in (1, 10):
        assert bco_push(GOOD.log(), times)[1] == pytest.approx(0.0, abs=1e-12)
    pooled = (10 - 1) / 11 * 0.4 * np.log(5)
    assert pooled > 0.5, "the mean over all completions would lie far inside the desirable class"


def test_bco_with_ten_to_one_lifts_what_is_mostly_undesirable_and_weights_mend_it() -> None:
    """At the start all rewards are 0: the push is (10 GOOD - BAD) / 22, above 0 for every arm."""
    plain, _ = bco_push(BAD.log(), 10)
    close(plain, (10 * GOOD - BAD) / 22, 1e-12)
    assert (plain > 0).all()
    balanced, _ = bco_push(BAD.log(), 1)
    for weighed in ({"desirable_weight": 0.1}, {"undesirable_weight": 10.0}):
        mended, _ = bco_push(BAD.log(), 10, **weighed)
        assert mended[2] < 0
        close(mended / mended[0], balanced / balanced[0], 1e-12)


def test_bco_reaches_the_ratio_of_the_classes() -> None:
    """s(r - delta) is the share of the desirable at each arm: with balanced weights pi = ref GOOD / BAD, here GOOD."""
    arms, labels = seen_by_bco(10)

    def loss(logps: Tensor) -> Tensor:
        return bco(logps[arms], BAD.log()[arms], labels, beta=1.0, desirable_weight=0.1)[0].mean()

    close(stepped(loss, BAD.log(), steps=1500, rate=5.0).exp(), GOOD, 1e-6)
    push, _ = bco_push(GOOD.log(), 10, desirable_weight=0.1)
    close(push, torch.zeros(3).double(), 1e-12)
    unweighted, _ = bco_push(GOOD.log(), 10)
    assert unweighted[2] > 0.03, "without weights the mostly undesirable arm is still pushed up there"
