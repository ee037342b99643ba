"""Objectives without a reference: literals, how imitation is normalised, and the traps of public versions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import alpha_po, cpo, orpo, simpo, slic
from steerwell.objectives.reference_free import log1mexp

PAIR = torch.tensor([[0], [1]])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


LOGPS, LENGTHS = f64(-2.0, -12.0), f64(2.0, 4.0)  # means -1 and -3


# --- cpo ---
def test_cpo_literal() -> None:
    losses, metrics = cpo(LOGPS, LENGTHS, PAIR, beta=0.1, alpha=0.5)
    assert losses.item() == pytest.approx(softplus(-0.1 * 10) + 0.5 * 1, rel=1e-14)
    assert metrics["rewards/margins"].item() == pytest.approx(1.0)
    assert metrics["nll/chosen"].item() == 1.0


def test_trap_cpo_preference_is_by_sums_and_imitation_per_token_unless_asked_otherwise() -> None:
    longer = (f64(-4.0, -12.0), f64(4.0, 4.0))  # the same mean over twice the tokens
    mean = [cpo(*given, PAIR, beta=1e-9)[0].item() for given in ((LOGPS, LENGTHS), longer)]
    assert mean == pytest.approx([math.log(2) + 1] * 2)
    total = [cpo(*given, PAIR, beta=1e-9, nll="sum")[0].item() for given in ((LOGPS, LENGTHS), longer)]
    assert total == pytest.approx([math.log(2) + 2, math.log(2) + 4])


def test_cpo_soft_labels_imitate_both_sides_by_their_share() -> None:
    losses, _ = cpo(LOGPS, LENGTHS, PAIR, f64(0.75), beta=0.1)
    preference = 0.75 * softplus(-1.0) + 0.25 * softplus(1.0)
    assert losses.item() == pytest.approx(preference + 0.75 * 1 + 0.25 * 3, rel=1e-14)


# --- orpo ---
def test_trap_orpo_odds_are_of_the_mean_log_probability() -> None:
    losses, metrics = orpo(LOGPS, LENGTHS, PAIR, lam=0.1)
    odds = [math.exp(-x) / (1 - math.exp(-x)) for x in (1, 3)]
    ratio = math.log(odds[0] / odds[1])
    assert losses.item() == pytest.approx(1 + 0.1 * softplus(-ratio), rel=1e-14)
    assert metrics["log_odds_ratio"].item() == pytest.approx(ratio, rel=1e-14)
    assert metrics["nll/chosen"].item() == 1.0
    sums = [math.exp(-x) / (1 - math.exp(-x)) for x in (2, 12)]
    assert ratio != pytest.approx(math.log(sums[0] / sums[1]), rel=0.1)


def test_orpo_at_probabilities_near_one_and_near_zero_in_float32() -> None:
    for a, b in ((0.0, 0.0), (-1e-9, -1e4), (-1e4, -1e-9), (-0.6931, -0.6932)):
        logps = torch.tensor([a, b], requires_grad=True)
        losses, metrics = orpo(logps, torch.ones(2), PAIR)
        losses.sum().backward()
        assert logps.grad is not None
        for x in (losses, logps.grad, *metrics.values()):
            assert torch.isfinite(x).all()


def test_log1mexp_against_arbitrary_care() -> None:
    x = -np.array([1e-12, 1e-6, 0.1, 0.69, 0.70, 2.0, 40.0, 700.0])
    small = np.log(-np.expm1(x[:4]))
    large = np.log1p(-np.exp(x[4:]))
    np.testing.assert_allclose(log1mexp(torch.from_numpy(x)).numpy(), [*small, *large], rtol=1e-13)
    values = torch.tensor([-1e-6, -1e-3, -5.0, -100.0], requires_grad=True)
    log1mexp(values).sum().backward()
    assert values.grad is not None
    exact = [-1 / math.expm1(-v) for v in values.tolist()]
    assert values.grad.tolist() == pytest.approx(exact, rel=1e-5)


# --- slic ---
def test_slic_literal() -> None:
    losses, metrics = slic(f64(-3.0, -2.5), PAIR, delta=1.0, lam=0.1)
    assert losses.item() == pytest.approx(1 + 3 - 2.5 + 0.1 * 3, rel=1e-14)
    assert metrics["nll/chosen"].item() == 3.0


def test_slic_leaves_a_pair_that_is_right_to_imitation_alone() -> None:
    logps = f64(-2.0, -12.0).requires_grad_()
    losses, _ = slic(logps, PAIR)
    assert losses.item() == pytest.approx(0.2)
    losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-0.1, 0.0])


# --- alpha_po ---
def test_trap_alpha_po_gamma_is_the_margin_itself_and_alpha_zero_is_simpo() -> None:
    p = [math.exp(-1), math.exp(-3)]
    margin = 2.5 * ((1 - p[0] ** -0.25) / 0.25 - (1 - p[1] ** -0.25) / 0.25)
    losses, metrics = alpha_po(LOGPS, LENGTHS, PAIR, gamma=0.4)
    assert losses.item() == pytest.approx(softplus(-(margin - 0.4)), rel=1e-13)
    assert losses.item() != pytest.approx(softplus(-(margin - 2.5 * 0.4)), rel=1e-3)
    assert metrics["rewards/margins"].item() == pytest.approx(margin, rel=1e-13)
    plain = simpo(LOGPS, LENGTHS, PAIR, beta=2.5, gamma=0.4)[0]
    assert torch.equal(alpha_po(LOGPS, LENGTHS, PAIR, gamma=0.4, alpha=0.0)[0], plain)
    for alpha in (1e-7, -1e-7):
        near = alpha_po(LOGPS, LENGTHS, PAIR, gamma=0.4, alpha=alpha)[0]
        torch.testing.assert_close(near, plain, rtol=1e-6, atol=0)


def test_trap_alpha_po_is_finite_and_exact_at_minus_120_in_float32() -> None:
    assert torch.exp(torch.tensor(-120.0)).pow(-0.25).isinf(), "the formula as it stands overflows"
    logps = torch.tensor([-120.0, -1.0], requires_grad=True)
    losses, metrics = alpha_po(logps, torch.ones(2), PAIR)
    losses.sum().backward()
    assert logps.grad is not None
    reward = 2.5 * (1 - math.exp(0.25 * 120)) / 0.25
    assert metrics["rewards/chosen"].item() == pytest.approx(reward, rel=1e-5)
    assert logps.grad[0].item() == pytest.approx(-2.5 * math.exp(30), rel=1e-5)
    assert torch.isfinite(logps.grad).all()


def test_alpha_po_keeps_small_differences_in_float32() -> None:
    # (1 - p^-alpha) / alpha by subtraction from 1 loses them: alpha m is 1e-8 here
    _, metrics = alpha_po(torch.tensor([-1e-4, -3e-4]), torch.ones(2), PAIR, beta=1.0, alpha=1e-4)
    assert metrics["rewards/margins"].item() == pytest.approx(2e-4, rel=1e-4)


def test_alpha_po_positive_alpha_raises_an_improbable_chosen_side_harder() -> None:
    pulls = []
    for alpha in (-0.5, 0.0, 0.5):
        logps = f64(-2.0, -2.0).requires_grad_()
        alpha_po(logps, f64(1.0, 1.0), PAIR, alpha=alpha)[0].sum().backward()
        assert logps.grad is not None
        pulls.append(-logps.grad[0].item())
    assert pulls == sorted(pulls)
    assert pulls[2] / pulls[1] == pytest.approx(math.exp(0.5 * 2), rel=1e-12)
