"""f-DPO and chi-PO: literals, limits, optima, and the traps of public versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, chi_po, dpo, f_dpo

PAIR = torch.tensor([[0], [1]])
ZERO = torch.zeros(2, dtype=torch.float64)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_reverse_kl_is_dpo() -> None:
    given = (f64(-1.0, -5.0), f64(-2.0, -2.0), PAIR)
    assert torch.equal(f_dpo(*given, beta=0.3)[0], dpo(*given, beta=0.3)[0])


def test_f_dpo_literals() -> None:
    h = f64(math.log(2), math.log(0.5))  # u = 2 and 1 / 2
    margins = {
        "forward_kl": -1 / 2 + 2,
        "js": math.log(4 / 3) - math.log(2 / 3),
        "alpha": (1 - 2**-0.5) / 0.5 - (1 - 2**0.5) / 0.5,
        "chi2": 2 * (2 - 1) - 2 * (0.5 - 1),
    }
    for divergence, margin in margins.items():
        losses, metrics = f_dpo(h, ZERO, PAIR, beta=1.0, divergence=divergence)
        assert losses.item() == pytest.approx(softplus(-margin), rel=1e-14)
        assert metrics["rewards/margins"].item() == pytest.approx(margin, rel=1e-14)


def test_trap_f_dpo_alpha_is_the_papers_and_not_one_minus_it() -> None:
    h, alpha = f64(math.log(2), math.log(0.5)), 0.2

    def loss(a: float) -> float:  # f'(u) = (1 - u^-a) / a
        return softplus(-((1 - 2**-a) / a - (1 - 2**a) / a))

    losses, _ = f_dpo(h, ZERO, PAIR, beta=1.0, divergence="alpha", alpha=alpha)
    assert losses.item() == pytest.approx(loss(alpha), rel=1e-13)
    assert losses.item() != pytest.approx(loss(1 - alpha), rel=1e-2)


def test_f_dpo_alpha_is_one_half_unless_given() -> None:
    h = f64(0.7, -1.1)
    usual = f_dpo(h, ZERO, PAIR, divergence="alpha")[0]
    given = f_dpo(h, ZERO, PAIR, divergence="alpha", alpha=0.5)[0]
    assert torch.equal(usual, given)
    assert not torch.allclose(usual, f_dpo(h, ZERO, PAIR, divergence="alpha", alpha=0.4)[0])


@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "chi2"])
def test_trap_f_dpo_alpha_is_an_error_where_it_is_not_used_even_if_it_is_the_usual_one(
    divergence: str,
) -> None:
    with pytest.raises(ObjectiveError, match="alpha is used by divergence 'alpha' only"):
        f_dpo(ZERO, ZERO, PAIR, divergence=divergence, alpha=0.5)


def test_f_dpo_alpha_goes_from_reverse_to_forward_kl() -> None:
    h = f64(0.7, -1.1)
    ends = {1e-7: "reverse_kl", 1 - 1e-7: "forward_kl"}
    for alpha, divergence in ends.items():
        near = f_dpo(h, ZERO, PAIR, divergence="alpha", alpha=alpha)[0]
        torch.testing.assert_close(near, f_dpo(h, ZERO, PAIR, divergence=divergence)[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("divergence", ["forward_kl", "alpha", "chi2", "js"])
def test_trap_f_dpo_does_not_overflow_and_keeps_a_gradient_in_float32(divergence: str) -> None:
    for h_w, h_l in ((-200.0, 0.0), (0.0, 200.0), (-500.0, -500.0), (-1e4, 1e4)):
        logps = torch.tensor([h_w, h_l], requires_grad=True)
        losses, metrics = f_dpo(logps, torch.zeros(2), PAIR, divergence=divergence)
        losses.sum().backward()
        assert logps.grad is not None
        for x in (losses, logps.grad, *metrics.values()):
            assert torch.isfinite(x).all()
        wrong = metrics["rewards/margins"].item() < -1
        steep = {"forward_kl": 0, "alpha": 0, "chi2": 1, "js": 0}[divergence]  # the side that its f' feels
        if wrong and (h_w < -40 if steep == 0 else h_l > 40):
            assert logps.grad[steep].abs() > 0, "cut off at a cap the gradient would be 0"


def test_forward_kl_is_exact_at_forty_nats_where_one_over_u_is_huge() -> None:
    _, metrics = f_dpo(f64(0.0, -39.0), ZERO, PAIR, beta=1e-15, divergence="forward_kl")
    assert metrics["rewards/rejected"].item() == pytest.approx(-1e-15 * math.expm1(39.0), rel=1e-13)


def test_rewards_are_zero_at_the_start_whatever_the_divergence() -> None:
    for divergence in ("reverse_kl", "forward_kl", "js", "alpha", "chi2"):
        losses, metrics = f_dpo(f64(-3.0, -7.0), f64(-3.0, -7.0), PAIR, divergence=divergence)
        assert losses.item() == pytest.approx(math.log(2), rel=1e-15)
        assert metrics["rewards/chosen"].item() == pytest.approx(0.0, abs=1e-15)
    losses, metrics = chi_po(f64(-3.0, -7.0), f64(-3.0, -7.0), PAIR)
    assert losses.item() == pytest.approx(math.log(2), rel=1e-15)
    assert metrics["rewards/chosen"].item() == 0.0


def test_js_bounds_the_chosen_reward_and_chi2_the_rejected_one() -> None:
    far = f64(1000.0, -1000.0)
    _, js = f_dpo(far, ZERO, PAIR, beta=1.0, divergence="js")
    assert js["rewards/chosen"].item() == pytest.approx(math.log(2))
    assert js["rewards/rejected"].item() == pytest.approx(math.log(2) - 1000)
    _, chi2 = f_dpo(far, ZERO, PAIR, beta=1.0, divergence="chi2")
    assert chi2["rewards/rejected"].item() == pytest.approx(-2.0)


# --- chi_po ---
def test_chi_po_literal() -> None:
    h = f64(math.log(2), math.log(0.5))
    margin = (2 + math.log(2)) - (0.5 + math.log(0.5))
    losses, metrics = chi_po(h, ZERO, PAIR, beta=0.3)
    assert losses.item() == pytest.approx(softplus(-0.3 * margin), rel=1e-14)
    assert metrics["rewards/margins"].item() == pytest.approx(0.3 * margin, rel=1e-14)


def test_chi_po_clips_the_margin_at_twice_r_max_and_no_gradient_is_left_there() -> None:
    for h_w, clipped in ((2.0, True), (0.1, False)):
        logps = f64(h_w, -1.0).requires_grad_()
        losses, _ = chi_po(logps, ZERO, PAIR, beta=1.0, r_max=1.0)
        losses.sum().backward()
        assert logps.grad is not None
        assert bool((logps.grad == 0).all()) == clipped
        if clipped:
            assert losses.item() == pytest.approx(softplus(-2.0))


def test_chi_po_keeps_the_kl_part_where_the_ratio_is_nothing() -> None:
    # chi-squared alone has no gradient by h below some -40 nats; log u still has beta
    logps = f64(0.0, -60.0).requires_grad_()
    chi_po(logps, ZERO, torch.tensor([[1], [0]]), beta=0.1)[0].sum().backward()
    assert logps.grad is not None
    assert logps.grad[1].item() == pytest.approx(-0.1 / (1 + math.exp(-0.1 * (1 + 60))), rel=1e-6)
