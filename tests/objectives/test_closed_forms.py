"""What the first objectives converge to, where the answer is known; test_closed_forms_of_variants.py has the others."""

from __future__ import annotations

import pytest
import torch
from bandit import (
    LOSS,
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
from torch import Tensor

from steerwell.objectives import bradley_terry, cal_dpo, dpo, dpop, ipo, kto, sft


# --- DPO ---
@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_dpo_reaches_the_tilted_reference_from_any_sampler(sampler: str, beta: float) -> None:
    """arXiv:2305.18290, equation 4: pi proportional to ref exp(r / beta), whoever drew the pairs."""
    pairs, seen = all_pairs(5), weights(SAMPLERS[sampler], bradley_terry_wins(REWARD))
    found = converged(lambda logps: (seen * dpo(logps, REF.log(), pairs, beta=beta)[0]).sum(), REF.log())
    close(found, tilted(REF, REWARD / beta))


def test_dpo_on_vote_shares_has_the_optimum_of_dpo_on_votes() -> None:
    pairs, wins = torch.combinations(torch.arange(5)).T, bradley_terry_wins(REWARD)
    share = wins[pairs[0], pairs[1]]
    found = converged(lambda logps: dpo(logps, REF.log(), pairs, share)[0].sum(), REF.log())
    close(found, tilted(REF, REWARD / 0.1), 1e-6)


def test_a_sampler_that_never_draws_an_arm_leaves_its_share_free() -> None:
    """Full support is needed: arms that are seen get the right odds among themselves, the rest stays anywhere."""
    sampler, pairs = f64(0.4, 0.3, 0.3, 0.0, 0.0), all_pairs(5)
    seen = weights(sampler, bradley_terry_wins(REWARD))
    found = converged(lambda logps: (seen * dpo(logps, REF.log(), pairs, beta=1.0)[0]).sum(), REF.log())
    right = tilted(REF, REWARD)
    close(found[:3] - found[0], right[:3] - right[0])
    assert (found[3:].logsumexp(0) - right[3:].logsumexp(0)).abs() > 0.3


def test_label_smoothing_bounds_the_margin_of_certain_labels() -> None:
    """cDPO: logit(1 - e) / beta, where plain DPO has no minimum."""
    ref, pair = f64(0.5, 0.5).log(), torch.tensor([[0], [1]])
    found = converged(lambda logps: dpo(logps, ref, pair, beta=0.5, label_smoothing=0.1)[0].sum(), ref)
    close(found[0] - found[1], torch.logit(f64(0.9))[0] / 0.5)


# --- IPO against DPO on certain preferences (arXiv:2310.12036, section 5) ---
CERTAIN = f64(0.5, 1, 1, 0, 0.5, 1, 0, 0, 0.5).reshape(3, 3)  # arm 0 beats arm 1 beats arm 2, always
THREE = f64(0.2, 0.5, 0.3)


@pytest.mark.parametrize("sampler", ["uniform", "skewed"])
@pytest.mark.parametrize("tau", [0.3, 1.0, 5.0])
def test_ipo_has_a_graded_optimum_on_certain_preferences(tau: float, sampler: str) -> None:
    """pi proportional to ref exp(p(y beats the sampler) / tau): finite, and held by tau."""
    drawn = {"uniform": f64(1 / 3, 1 / 3, 1 / 3), "skewed": f64(0.1, 0.2, 0.7)}[sampler]
    pairs, seen, ones = all_pairs(3), weights(drawn, CERTAIN), torch.ones(3, dtype=torch.float64)
    found = converged(
        lambda logps: (seen * ipo(logps, THREE.log(), ones, pairs, tau=tau)[0]).sum(), THREE.log()
    )
    close(found, tilted(THREE, CERTAIN @ drawn / tau))


@pytest.mark.parametrize("beta", [0.1, 1.0, 5.0])
def test_dpo_collapses_on_certain_preferences_whatever_beta(beta: float) -> None:
    """The order alone decides: in units of beta the margins grow alike for every beta, and nothing stops them."""
    pairs, seen = all_pairs(3), weights(f64(1 / 3, 1 / 3, 1 / 3), CERTAIN)

    def margins(beta: float, steps: int) -> Tensor:
        def loss(logps: Tensor) -> Tensor:
            return (seen * dpo(logps, THREE.log(), pairs, beta=beta)[0]).sum()

        h = stepped(loss, THREE.log(), steps=steps, rate=20 / beta**2) - THREE.log()
        return h[0] - h[1:]

    early, late = margins(beta, 30), margins(beta, 300)
    assert (beta * late > beta * early + 1.5).all()
    assert beta * late[1] > 9.0
    close(beta * late, margins(1.0, 300), 1e-9)


# --- KTO: ten desirable completions for one that is not ---
DESIRED, UNDESIRED = f64(0.5, 0.4, 0.1), f64(0.1, 0.4, 0.5)  # which arms the two classes consist of


def kto_push(n_desirable: float, n_undesirable: float, *, desirable: float, undesirable: float) -> Tensor:
    """Minus the gradient of the mean loss by each arm's log-probability at the start, where kl is 0."""
    logps = THREE.log().requires_grad_()
    both = torch.arange(3).repeat(2)
    labels = torch.arange(6) < 3
    losses, _ = kto(
        logps[both],
        THREE.log()[both],
        labels,
        f64(0.0)[0],
        desirable_weight=desirable,
        undesirable_weight=undesirable,
    )
    share = torch.cat([n_desirable * DESIRED, n_undesirable * UNDESIRED]) / (n_desirable + n_undesirable)
    (slope,) = torch.autograd.grad((share * losses).sum(), [logps])
    return -slope


def test_kto_with_ten_to_one_lifts_what_is_mostly_undesirable() -> None:
    """Arm 2 is five times as common among the undesirable, and yet unweighted KTO makes it likelier."""
    balanced = kto_push(1, 1, desirable=1.0, undesirable=1.0)
    close(balanced, 0.025 * f64(0.2, 0.0, -0.2))
    plain = kto_push(10, 1, desirable=1.0, undesirable=1.0)
    close(plain, 0.025 * f64(4.9, 3.6, 0.5) / 11)
    assert (plain > 0).all()


@pytest.mark.parametrize(("desirable", "undesirable"), [(1.0, 10.0), (0.1, 1.0)])
def test_kto_weights_mend_the_imbalance(desirable: float, undesirable: float) -> None:
    """With weights against the counts the push is that of balanced data, up to one factor for all arms."""
    balanced = kto_push(1, 1, desirable=1.0, undesirable=1.0)
    mended = kto_push(10, 1, desirable=desirable, undesirable=undesirable)
    assert mended[2] < 0
    close(mended / mended[0], balanced / balanced[0], 1e-12)


# --- likelihood displacement: arms that share parameters ---
# Chosen, rejected and a bystander. What tells chosen from rejected lifts the bystander three times as much.
FEATURES = f64(1, 0, 0, 0, 3, 1).reshape(3, 2)
PAIR = torch.tensor([[0], [1]])
START = torch.zeros(2, dtype=torch.float64)
AT_START = (FEATURES @ START).log_softmax(-1)


def trained(loss: LOSS, *, steps: int = 200, rate: float = 0.5) -> tuple[float, float]:
    """How far the chosen arm's log-probability and the margin have moved after ``steps``."""
    found = stepped(loss, START, steps=steps, rate=rate, by=lambda x: FEATURES @ x)
    moved = found - AT_START
    return float(moved[0]), float(moved[0] - moved[1])


def test_dpo_lets_the_chosen_fall_where_arms_share_parameters() -> None:
    """The margin grows and the loss falls, and the chosen arm gets less likely all the while."""
    chosen, margin = trained(lambda logps: dpo(logps, AT_START, PAIR)[0].sum())
    assert margin > 1.0
    assert chosen < -1.0
    _, metrics = dpo((FEATURES @ f64(1.0, 0.0)).log_softmax(-1), AT_START, PAIR)
    assert metrics["rewards/accuracies"] == 1
    assert metrics["logps/chosen"] < AT_START[0]


def test_an_sft_term_mends_the_displacement() -> None:
    only_chosen = torch.tensor([True, False, False])

    def loss(logps: Tensor) -> Tensor:
        imitation, _ = sft(logps, torch.arange(3), only_chosen)
        return dpo(logps, AT_START, PAIR)[0].sum() + imitation.sum()

    chosen, margin = trained(loss)
    assert chosen > 0.5
    assert margin > 1.0


def test_dpo_positive_mends_the_displacement() -> None:
    """The penalty is a wall at the chosen arm's start: in the run in which DPO's falls by a nat it stays there."""
    fallen, _ = trained(lambda logps: dpo(logps, AT_START, PAIR)[0].sum(), steps=2000, rate=0.01)
    chosen, margin = trained(lambda logps: dpop(logps, AT_START, PAIR)[0].sum(), steps=2000, rate=0.01)
    assert fallen < -1.0
    assert chosen > -0.01
    assert margin > 0.3


def test_cal_dpo_mends_the_displacement() -> None:
    """Each side has a target of its own, +1 and -1 at beta = 1/2, and both are met to a few hundredths."""
    chosen, margin = trained(lambda logps: cal_dpo(logps, AT_START, PAIR, beta=0.5)[0].sum())
    assert chosen == pytest.approx(1.0, abs=0.1)
    assert margin == pytest.approx(2.0, abs=0.01)


# --- reward models ---
def test_bradley_terry_recovers_the_rewards_up_to_their_level() -> None:
    pairs, seen = all_pairs(5), weights(SAMPLERS["skewed"], bradley_terry_wins(REWARD))
    found = converged(lambda scores: (seen * bradley_terry(scores, pairs)[0]).sum(), torch.zeros(5).double())
    close(found - found.mean(), REWARD - REWARD.mean(), 1e-6)
