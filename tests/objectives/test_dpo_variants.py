"""Other links on DPO's margin and losses anchored at each side: literals, and the traps of public versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steerwell.objectives import (
    apo_down,
    apo_zero,
    bco_pair,
    cal_dpo,
    discopop,
    dpo,
    dpo_shift,
    dpop,
    exo_pair,
    explain,
    hinge,
    nca_pair,
    objective,
    robust_dpo,
    spin,
    table,
)
from steerwell.testing import check_objective

PAIR = torch.tensor([[0], [1]])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def slopes(fn, h_w: float, h_l: float, **hyper: float) -> list[float]:
    """Gradient of the loss by the log-probability of the chosen and of the rejected completion."""
    logps = f64(h_w, h_l).requires_grad_()
    fn(logps, f64(0.0, 0.0), PAIR, **hyper)[0].sum().backward()
    assert logps.grad is not None
    return logps.grad.tolist()


# h_w = 1, h_l = -3: log-ratios of a chosen completion that rose and a rejected one that fell
GIVEN = (f64(-1.0, -5.0), f64(-2.0, -2.0), PAIR)
# the chosen one fell by 2, the rejected one by 3
DISPLACED = (f64(-4.0, -5.0), f64(-2.0, -2.0), PAIR)


# --- robust_dpo ---
def test_trap_robust_dpo_is_unbiased_under_flips_and_label_smoothing_is_not() -> None:
    e, beta = 0.2, 0.5
    flipped = torch.tensor([[1], [0]])
    clean = dpo(*GIVEN, beta=beta)[0]

    def over_flips(loss) -> Tensor:
        return (1 - e) * loss(PAIR) + e * loss(flipped)

    robust = over_flips(lambda pairs: robust_dpo(*GIVEN[:2], pairs, beta=beta, flip_rate=e)[0])
    smoothed = over_flips(lambda pairs: dpo(*GIVEN[:2], pairs, beta=beta, label_smoothing=e)[0])
    assert robust.item() == pytest.approx(clean.item(), rel=1e-14)
    assert smoothed.item() > clean.item() + 0.5


def test_robust_dpo_literal_and_unbounded_below() -> None:
    losses, metrics = robust_dpo(*GIVEN, beta=0.5, flip_rate=0.25)
    assert losses.item() == pytest.approx((0.75 * softplus(-2) - 0.25 * softplus(2)) / 0.5, rel=1e-14)
    assert metrics["rewards/margins"].item() == 2.0
    far, _ = robust_dpo(f64(1000.0, 0.0), f64(0.0, 0.0), PAIR, beta=1.0, flip_rate=0.25)
    assert far.item() == pytest.approx(-500.0, rel=1e-12)
    assert torch.equal(robust_dpo(*GIVEN, flip_rate=0.0)[0], dpo(*GIVEN)[0])


# --- hinge ---
def test_hinge_literal_and_nothing_beyond_the_margin() -> None:
    assert hinge(*GIVEN, beta=0.1)[0].item() == pytest.approx(1 - 0.4)
    assert hinge(*GIVEN, beta=0.5)[0].item() == 0.0
    assert slopes(hinge, 1.0, -3.0, beta=0.5) == [0.0, 0.0]
    assert slopes(hinge, 1.0, -3.0, beta=0.1) == pytest.approx([-0.1, 0.1])


# --- dpop ---
def test_trap_dpop_penalty_is_inside_the_link_and_times_beta() -> None:
    losses, metrics = dpop(*DISPLACED, beta=0.1, lam=5.0)
    assert losses.item() == pytest.approx(softplus(-0.1 * (-2 + 3 - 5 * 2)), rel=1e-14)
    outside = softplus(-0.1 * 1) + 5 * 2
    assert losses.item() < outside / 2
    assert metrics["penalty"].item() == 10.0
    assert metrics["rewards/chosen"].item() == pytest.approx(-0.2), "the reward is shown without the penalty"


def test_dpop_is_dpo_while_the_chosen_side_is_above_its_start() -> None:
    assert torch.equal(dpop(*GIVEN)[0], dpo(*GIVEN)[0])
    assert torch.equal(dpop(*DISPLACED, lam=0.0)[0], dpo(*DISPLACED)[0])
    up, down = slopes(dpop, -2.0, -3.0, beta=0.1, lam=5.0)
    assert up / down == pytest.approx(-6.0), "lam + 1 times as hard up as the other down"


# --- exo_pair ---
def test_trap_exo_pair_epsilon_zero_is_an_error_not_a_silent_default() -> None:
    with pytest.raises(table.ObjectiveError, match=r"epsilon must be > 0 and < 0\.5, got 0"):
        exo_pair(*GIVEN, epsilon=0)


def test_exo_pair_literal_and_zero_at_its_target() -> None:
    at_start, _ = exo_pair(f64(-1.0, -1.0), f64(-1.0, -1.0), PAIR, epsilon=0.1)
    assert at_start.item() == pytest.approx(0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1))
    margin = math.log(0.9 / 0.1)
    assert exo_pair(f64(margin, 0.0), f64(0.0, 0.0), PAIR, beta=1.0, epsilon=0.1)[0].item() < 1e-15
    assert slopes(exo_pair, margin, 0.0, beta=1.0, epsilon=0.1) == pytest.approx([0.0, 0.0], abs=1e-15)


def test_trap_exo_pair_soft_label_is_the_target_so_its_optimum_is_the_labels_logit() -> None:
    p = 0.7
    logps = f64(math.log(p / (1 - p)), 0.0).requires_grad_()
    losses, _ = exo_pair(logps, f64(0.0, 0.0), PAIR, f64(p), beta=1.0, epsilon=1e-9)
    losses.sum().backward()
    assert logps.grad is not None
    assert losses.item() < 1e-9
    assert logps.grad.abs().max() < 1e-8


# --- discopop ---
def test_discopop_literal_at_the_start_and_its_links_far_away() -> None:
    assert discopop(f64(-1.0, -2.0), f64(-1.0, -2.0), PAIR)[0].item() == pytest.approx((math.log(2) + 1) / 2)
    wrong, _ = discopop(f64(-40.0, 0.0), f64(0.0, 0.0), PAIR)  # x = -2: logistic
    assert wrong.item() == pytest.approx(softplus(2.0), rel=1e-12)
    right, _ = discopop(f64(40.0, 0.0), f64(0.0, 0.0), PAIR)  # x = 2: exponential
    assert right.item() == pytest.approx(math.exp(-2), rel=1e-12)


def test_trap_discopop_rises_at_the_start_and_says_so() -> None:
    tau = 0.05
    up, _ = slopes(discopop, 0.0, 0.0, beta=1.0, tau=tau)
    assert up == pytest.approx((1 - math.log(2)) / (4 * tau) - 0.75)
    assert up > 0
    losses = [
        discopop(f64(x, 0.0), f64(0.0, 0.0), PAIR, beta=1.0, tau=tau)[0].item() for x in (-0.3, -0.1, 0.1)
    ]
    assert losses[1] < losses[0], "a dip at a small negative margin"
    assert losses[1] < losses[2]
    assert slopes(discopop, 0.0, 0.0, beta=1.0, tau=0.11)[0] < 0
    assert "may rise at the start" in explain("discopop")


def test_a_declared_rise_is_no_excuse_for_a_wrong_sign(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))

    @objective(unit="pair", rises_at_start="for the test")
    def turned(logps, ref_logps, pairs):
        return dpo(logps, ref_logps, pairs.flip(0))

    @objective(unit="pair", rises_at_start="for the test")
    def level(logps, ref_logps, pairs):
        return 0.0 * logps[pairs].sum(0), {}

    for wrong in (turned, level):
        with pytest.raises(AssertionError, match="sign: no lower with the better completion far likelier"):
            check_objective(wrong)


def test_without_the_declaration_discopop_fails_the_sign_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))

    @objective(unit="pair")
    def undeclared(logps, ref_logps, pairs):
        return discopop(logps, ref_logps, pairs)

    with pytest.raises(AssertionError, match="sign: the loss rises towards the better completion"):
        check_objective(undeclared)


# --- dpo_shift, spin ---
def test_dpo_shift_literal_and_the_rejected_side_is_pushed_less() -> None:
    losses, metrics = dpo_shift(*GIVEN, beta=0.5, lam=0.8)
    assert losses.item() == pytest.approx(softplus(-0.5 * (1 + 0.8 * 3)), rel=1e-14)
    assert metrics["rewards/rejected"].item() == -1.5, "the reward is shown without lam"
    up, down = slopes(dpo_shift, 1.0, -3.0, lam=0.8)
    assert down / up == pytest.approx(-0.8)
    assert torch.equal(dpo_shift(*GIVEN, lam=1.0)[0], dpo(*GIVEN)[0])


def test_spin_is_the_logistic_loss_of_dpo() -> None:
    assert torch.equal(spin(*GIVEN, beta=0.3)[0], dpo(*GIVEN, beta=0.3)[0])


# --- anchored at each side ---
def test_apo_literals() -> None:
    s = [1 / (1 + math.exp(-x)) for x in (0.5, -1.5, 2.0)]  # r_w, r_l, their difference
    assert apo_zero(*GIVEN, beta=0.5)[0].item() == pytest.approx(1 - s[0] + s[1], rel=1e-14)
    assert apo_down(*GIVEN, beta=0.5)[0].item() == pytest.approx(s[0] + 1 - s[2], rel=1e-14)


def test_trap_apo_zero_raises_the_chosen_side_and_apo_down_lowers_it() -> None:
    up, down = slopes(apo_zero, 0.0, 0.0, beta=0.4)
    assert [up, down] == pytest.approx([-0.1, 0.1])
    at_start = slopes(apo_down, 0.0, 0.0, beta=0.4)
    assert at_start == pytest.approx([0.0, 0.1]), "the two pulls on the chosen side cancel"
    chosen, rejected = slopes(apo_down, 1.0, -3.0, beta=0.4)
    assert chosen > 0, "once the pair is right, the chosen side is lowered"
    assert rejected > 0


def test_nca_pair_literal_and_its_aim_for_a_completion_that_is_always_chosen() -> None:
    losses, _ = nca_pair(*GIVEN, beta=0.5)
    assert losses.item() == pytest.approx(
        softplus(-0.5) + 0.5 * softplus(0.5) + 0.5 * softplus(-1.5), rel=1e-14
    )
    assert slopes(nca_pair, math.log(2), 0.0, beta=1.0)[0] == pytest.approx(0.0, abs=1e-15)
    assert slopes(nca_pair, 0.0, 0.0, beta=1.0) == pytest.approx([-0.25, 0.25])


def test_trap_bco_pair_shift_is_a_constant_and_not_a_mean_of_the_batch() -> None:
    losses, _ = bco_pair(*GIVEN, beta=0.5, delta=0.2)
    assert losses.item() == pytest.approx(softplus(-(0.5 - 0.2)) + softplus(-1.5 - 0.2), rel=1e-14)
    many = bco_pair(f64(-1.0, -5.0, 50.0, 60.0), f64(-2.0, -2.0, 0.0, 0.0), torch.tensor([[0, 2], [1, 3]]))[0]
    assert many[0].item() == bco_pair(*GIVEN)[0].item()


@pytest.mark.parametrize("delta", [-2.0, 0.0, 1.0])
def test_bco_pair_bounds_dpo_from_above(delta: float) -> None:
    for h_w, h_l in ((1.0, -3.0), (-2.0, 4.0), (0.0, 0.0), (9.0, 9.0)):
        given = (f64(h_w, h_l), f64(0.0, 0.0), PAIR)
        assert bco_pair(*given, beta=1.0, delta=delta)[0].item() >= dpo(*given, beta=1.0)[0].item()


def test_trap_cal_dpo_has_beta_in_the_targets_only_and_full_squares() -> None:
    losses, metrics = cal_dpo(*GIVEN, beta=0.25)  # targets 2 and -2
    squares = (1 - 2) ** 2 + (-3 + 2) ** 2
    assert losses.item() == pytest.approx(softplus(-4) + squares, rel=1e-14)
    assert losses.item() != pytest.approx(softplus(-4) + 0.5 * squares, rel=1e-3)
    assert metrics["rewards/margins"].item() == 4.0


def test_cal_dpo_holds_the_chosen_side_up_where_dpo_lets_it_fall() -> None:
    displaced = (-2.0, -9.0)  # DPO is content with a margin of 7 although the chosen side fell
    assert abs(slopes(dpo, *displaced, beta=1.0)[0]) < 1e-3
    assert slopes(cal_dpo, *displaced, beta=0.25)[0] < -7
