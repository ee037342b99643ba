"""Pairs with scores or win rates: literals, optima, and the traps of public versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, dpo, needs, odpo, rebel, sppo
from steerwell.testing import made_up

PAIR = torch.tensor([[0], [1]])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


GIVEN = (f64(-1.0, -5.0), f64(-2.0, -2.0))  # h_w = 1, h_l = -3


# --- odpo ---
def test_odpo_literal() -> None:
    losses, metrics = odpo(*GIVEN, f64(7.0, 4.0), PAIR, beta=0.5, alpha=2.0)
    assert losses.item() == pytest.approx(softplus(-(0.5 * 4 - 2 * math.log(3))), rel=1e-14)
    assert metrics["offsets"].item() == pytest.approx(2 * math.log(3))
    assert metrics["scores/agree"].item() == 1.0


def test_trap_odpo_offset_is_the_logarithm_of_the_gap_and_negative_below_one() -> None:
    assert odpo(*GIVEN, f64(5.0, 4.0), PAIR)[0].item() == dpo(*GIVEN, PAIR)[0].item(), (
        "a gap of 1 asks nothing"
    )
    assert odpo(*GIVEN, f64(0.9, 0.4), PAIR)[0] < dpo(*GIVEN, PAIR)[0]


def test_odpo_pairs_against_the_scores_teach_nothing_and_are_counted() -> None:
    logps = f64(-1.0, -5.0, -2.0).requires_grad_()
    pairs = torch.tensor([[0, 0, 1], [1, 2, 2]])
    losses, metrics = odpo(logps, f64(-2.0, -2.0, -2.0), f64(1.0, 3.0, 1.0), pairs)
    assert losses[:2].tolist() == [0.0, 0.0]
    assert losses[2].item() > 0
    assert metrics["scores/agree"].tolist() == [0.0, 0.0, 1.0]
    losses[:2].sum().backward()
    assert logps.grad is not None
    assert not logps.grad.any()
    # the limit of a closing gap, so nothing jumps at a tie
    assert odpo(*GIVEN, f64(1e-12, 0.0), PAIR)[0].item() < 1e-11


# --- rebel ---
def test_rebel_literal_and_its_optimum() -> None:
    losses, metrics = rebel(*GIVEN, f64(2.0, 0.5), PAIR, eta=2.0)
    assert losses.item() == pytest.approx((4 / 2 - 1.5) ** 2, rel=1e-14)
    assert metrics["rewards/margins"].item() == 2.0
    eta, scores, ref = 0.7, f64(2.0, 0.5, -1.0), torch.log_softmax(f64(0.2, 0.0, 0.5), 0)
    best = torch.log_softmax(ref + eta * scores, 0)  # ref exp(eta r) / Z
    pairs = torch.tensor([[0, 0, 1], [1, 2, 2]])
    assert rebel(best, ref, scores, pairs, eta=eta)[0].max() < 1e-28


def test_trap_rebel_does_not_depend_on_which_side_is_called_preferred() -> None:
    scores = f64(0.5, 2.0)  # the labels of the pair say the opposite
    turned = rebel(*GIVEN, scores, PAIR.flip(0))[0]
    assert rebel(*GIVEN, scores, PAIR)[0].item() == pytest.approx(turned.item(), rel=1e-15)


# --- sppo ---
def test_trap_sppo_is_half_the_sum_of_its_two_squares() -> None:
    losses, metrics = sppo(*GIVEN, PAIR, eta=10.0)
    whole = (1 - 5) ** 2 + (-3 + 5) ** 2
    assert losses.item() == pytest.approx(whole / 2, rel=1e-14)
    assert metrics["rewards/margins"].item() == pytest.approx(0.4)
    start, _ = sppo(f64(-1.0, -2.0), f64(-1.0, -2.0), PAIR)
    assert start.item() == 1000.0**2 / 4


def test_sppo_soft_labels_are_win_probabilities() -> None:
    losses, _ = sppo(*GIVEN, PAIR, f64(0.8), eta=10.0)
    assert losses.item() == pytest.approx(((1 - 3) ** 2 + (-3 + 3) ** 2) / 2, rel=1e-14)
    even, _ = sppo(f64(0.0, 0.0), f64(0.0, 0.0), PAIR, f64(0.5))
    assert even.item() == 0.0


def test_trap_sppo_soft_target_and_expected_loss_have_one_gradient() -> None:
    p, gradients = 0.8, []
    for soft in (True, False):
        logps = GIVEN[0].clone().requires_grad_()
        if soft:
            value = sppo(logps, GIVEN[1], PAIR, f64(p), eta=10.0)[0]
        else:
            sides = [sppo(logps, GIVEN[1], pair, eta=10.0)[0] for pair in (PAIR, PAIR.flip(0))]
            value = p * sides[0] + (1 - p) * sides[1]
        value.sum().backward()
        gradients.append(logps.grad)
    torch.testing.assert_close(*gradients)


def test_sppo_win_rates_from_scores() -> None:
    assert "scores" not in needs(sppo)
    assert "scores" in needs(sppo, {"scores_are_win_rates": True})
    losses, _ = sppo(*GIVEN, PAIR, scores=f64(0.7, 0.4), eta=10.0, scores_are_win_rates=True)
    assert losses.item() == pytest.approx(((1 - 2) ** 2 + (-3 + 1) ** 2) / 2, rel=1e-14)
    assert torch.equal(sppo(*GIVEN, PAIR, scores=f64(0.7, 0.4))[0], sppo(*GIVEN, PAIR)[0]), "unless asked for"


def test_sppo_win_rates_must_be_there_and_be_rates() -> None:
    with pytest.raises(ObjectiveError, match="needs scores while scores_are_win_rates is true"):
        sppo(*GIVEN, PAIR, scores_are_win_rates=True)
    with pytest.raises(ObjectiveError, match="needs scores from 0 to 1, got -3 to 7"):
        sppo(*GIVEN, PAIR, scores=f64(7.0, -3.0), scores_are_win_rates=True)
    with pytest.raises(ObjectiveError, match="needs scores from 0 to 1"):
        sppo(*GIVEN, PAIR, scores=f64(0.5, math.nan), scores_are_win_rates=True)


def test_sppo_with_win_rates_has_the_gradient_of_its_formula() -> None:
    batch = made_up(("logps", "ref_logps", "pairs", "scores"), seed=2)
    rates = torch.sigmoid(batch["scores"])

    def losses(logps: Tensor) -> Tensor:
        given = (batch["ref_logps"], batch["pairs"])
        return sppo(logps, *given, scores=rates, eta=3.0, scores_are_win_rates=True)[0]

    torch.autograd.gradcheck(losses, [batch["logps"].requires_grad_()])
