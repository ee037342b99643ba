"""Preference losses against literals, an independent float64 reference, and the traps of public versions."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, dpo, ipo, kto, sft, simpo
from steerwell.testing import check_objective


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


PAIR = torch.tensor([[0], [1]])


# --- every preference loss ---
@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("sft", {}),
        ("dpo", {}),
        ("dpo", {"beta": 2.0, "label_smoothing": 0.2}),
        ("ipo", {}),
        ("ipo", {"tau": 0.5, "reduction": "sum"}),
        ("simpo", {}),
        ("simpo", {"gamma": 0.0}),
        ("kto", {}),
        ("kto", {"desirable_weight": 1.5, "undesirable_weight": 0.0}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(name: str, hyper: dict[str, float | str], seed: int) -> None:
    assert {"sign", "extremes", "empty", "permutation", "copies"} <= set(
        check_objective(name, seed=seed, **hyper)
    )


def example(seed: int = 0) -> dict[str, np.ndarray]:
    g = np.random.default_rng(seed)
    return {
        "logps": -g.gamma(4.0, 3.0, 9),
        "ref_logps": -g.gamma(4.0, 3.0, 9),
        "lengths": g.integers(1, 30, 9).astype(float),
        "pairs": g.integers(0, 9, (2, 12)),
        "pair_probs": g.uniform(0, 1, 12),
        "labels": g.uniform(0, 1, 9) > 0.4,
        "kl": np.array(0.7),
    }


def ref_dpo(logps, ref_logps, pairs, pair_probs, beta, label_smoothing):
    out = []
    for (w, r), p in zip(pairs.T, pair_probs, strict=True):
        odds = (logps[w] + ref_logps[r]) - (logps[r] + ref_logps[w])
        right = p * (1 - label_smoothing) + (1 - p) * label_smoothing
        out.append(right * np.logaddexp(0, -beta * odds) + (1 - right) * np.logaddexp(0, beta * odds))
    return np.array(out)


def ref_ipo(logps, ref_logps, lengths, pairs, pair_probs, tau, reduction):
    out = []
    for (w, r), p in zip(pairs.T, pair_probs, strict=True):
        n = (lengths[w], lengths[r]) if reduction == "mean" else (1, 1)
        m = (logps[w] / n[0] - ref_logps[w] / n[0]) - (logps[r] / n[1] - ref_logps[r] / n[1])
        # p (m - a)^2 + (1 - p) (m + a)^2 multiplied out, with a = 1 / (2 tau)
        out.append(m**2 + 1 / (4 * tau**2) - (2 * p - 1) * m / tau)
    return np.array(out)


def ref_simpo(logps, lengths, pairs, pair_probs, beta, gamma):
    per_token = logps / lengths
    out = []
    for (w, r), p in zip(pairs.T, pair_probs, strict=True):
        m = beta * per_token[w] - beta * per_token[r]
        out.append(p * np.logaddexp(0, gamma - m) + (1 - p) * np.logaddexp(0, gamma + m))
    return np.array(out)


def ref_kto(logps, ref_logps, labels, kl, beta, desirable_weight, undesirable_weight):
    out = []
    for lp, ref, good in zip(logps, ref_logps, labels, strict=True):
        z = max(0.0, float(kl))
        if good:
            out.append(desirable_weight - desirable_weight / (1 + math.exp(-beta * (lp - ref - z))))
        else:
            out.append(undesirable_weight - undesirable_weight / (1 + math.exp(-beta * (z - lp + ref))))
    return np.array(out)


@pytest.mark.parametrize(
    ("ours", "reference", "hyper"),
    [
        (dpo, ref_dpo, {"beta": 0.1, "label_smoothing": 0.0}),
        (dpo, ref_dpo, {"beta": 0.7, "label_smoothing": 0.3}),
        (ipo, ref_ipo, {"tau": 0.1, "reduction": "mean"}),
        (ipo, ref_ipo, {"tau": 0.4, "reduction": "sum"}),
        (simpo, ref_simpo, {"beta": 2.5, "gamma": 1.375}),
        (simpo, ref_simpo, {"beta": 10.0, "gamma": 3.0}),
        (kto, ref_kto, {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}),
        (kto, ref_kto, {"beta": 0.5, "desirable_weight": 1.33, "undesirable_weight": 0.5}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_an_independent_float64_reference(
    ours: Callable, reference: Callable, hyper: dict, seed: int
) -> None:
    arrays = example(seed)
    names = [n for n in arrays if n in reference.__code__.co_varnames[: reference.__code__.co_argcount]]
    expected = reference(**{n: arrays[n] for n in names}, **hyper)
    losses, _ = ours(**{n: torch.from_numpy(np.asarray(arrays[n])) for n in names}, **hyper)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize("name", ["dpo", "ipo", "simpo", "kto"])
def test_no_nan_at_ten_thousand(name: str, value: float) -> None:
    logps = torch.tensor([value, -value], requires_grad=True)
    given = {
        "dpo": lambda: dpo(logps, torch.zeros(2), PAIR, label_smoothing=0.1),
        "ipo": lambda: ipo(logps, torch.zeros(2), torch.ones(2), PAIR),
        "simpo": lambda: simpo(logps, torch.ones(2), PAIR),
        "kto": lambda: kto(logps, torch.zeros(2), torch.tensor([True, False]), torch.tensor(value)),
    }
    losses, metrics = given[name]()
    losses.sum().backward()
    assert logps.grad is not None
    for x in (losses, logps.grad, *metrics.values()):
        assert torch.isfinite(x).all()


# --- sft ---
def test_sft_is_the_negative_log_probability_of_demonstrated_tokens_only() -> None:
    logps = f64(-1.0, -2.0, -math.inf, -4.0).requires_grad_()
    owner = torch.tensor([0, 2, 1, 0])
    losses, metrics = sft(logps, owner, torch.tensor([True, False, True]))
    assert losses.tolist() == [1.0, 2.0, 4.0]
    assert metrics == {}
    losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [-1.0, -1.0, 0.0, -1.0]


# --- dpo ---
def test_dpo_at_the_start_is_ln_2_whatever_beta_and_labels() -> None:
    logps = f64(-3.0, -50.0)
    for beta in (0.01, 0.1, 5.0):
        for smoothing in (0.0, 0.3):
            losses, metrics = dpo(logps, logps, PAIR, f64(0.7), beta=beta, label_smoothing=smoothing)
            assert losses.item() == pytest.approx(math.log(2), abs=1e-15)
    assert metrics["rewards/accuracies"].item() == 0.5  # a tie is half right
    assert metrics["rewards/margins"].item() == 0.0


def test_dpo_literal_with_metrics() -> None:
    # h_w = -1 + 2 = 1, h_l = -5 + 2 = -3, beta (h_w - h_l) = 0.5 * 4
    losses, metrics = dpo(f64(-1.0, -5.0), f64(-2.0, -2.0), PAIR, beta=0.5)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-2)), rel=1e-14)
    assert {name: x.item() for name, x in metrics.items()} == {
        "rewards/chosen": 0.5 * 1,
        "rewards/rejected": 0.5 * -3,
        "rewards/margins": 2.0,
        "rewards/accuracies": 1.0,
        "logps/chosen": -1.0,
        "logps/rejected": -5.0,
    }


def test_dpo_gradient_is_beta_times_the_doubt() -> None:
    logps = f64(-1.0, -5.0).requires_grad_()
    dpo(logps, f64(-2.0, -2.0), PAIR, beta=0.5)[0].sum().backward()
    doubt = 1 / (1 + math.exp(2))
    assert logps.grad is not None
    assert logps.grad.tolist() == pytest.approx([-0.5 * doubt, 0.5 * doubt], rel=1e-14)


def test_dpo_label_smoothing_literal_and_equal_to_soft_labels() -> None:
    given = (f64(-1.0, -5.0), f64(-2.0, -2.0), PAIR)
    smooth, _ = dpo(*given, beta=0.5, label_smoothing=0.1)
    expected = 0.9 * math.log(1 + math.exp(-2)) + 0.1 * math.log(1 + math.exp(2))
    assert smooth.item() == pytest.approx(expected, rel=1e-14)
    assert dpo(*given, f64(0.9), beta=0.5)[0].item() == pytest.approx(expected, rel=1e-14)
    # both: q = 0.8 * 0.9 + 0.2 * 0.1 = 0.74
    both, _ = dpo(*given, f64(0.8), beta=0.5, label_smoothing=0.1)
    expected = 0.74 * math.log(1 + math.exp(-2)) + 0.26 * math.log(1 + math.exp(2))
    assert both.item() == pytest.approx(expected, rel=1e-14)


def test_dpo_label_smoothing_stops_the_margin_at_its_logit() -> None:
    e, beta = 0.2, 0.1
    margin = math.log((1 - e) / e) / beta
    for offset, sign in ((-0.5, -1), (0.0, 0), (0.5, 1)):
        logps = f64(margin + offset, 0.0).requires_grad_()
        dpo(logps, f64(0.0, 0.0), PAIR, beta=beta, label_smoothing=e)[0].sum().backward()
        assert logps.grad is not None
        slope = logps.grad[0].item()
        assert (abs(slope) < 1e-15) if sign == 0 else (slope * sign > 0)


def test_dpo_pair_probs_zero_is_the_pair_turned_round() -> None:
    given = (f64(-1.0, -5.0), f64(-2.0, -3.0))
    turned = dpo(*given, torch.tensor([[1], [0]]))[0]
    assert dpo(*given, PAIR, f64(0.0))[0].item() == pytest.approx(turned.item(), rel=1e-15)


def test_dpo_pairs_are_indices_not_halves() -> None:
    logps, ref = f64(-1.0, -2.0, -4.0), f64(-1.5, -1.0, -1.0)
    losses, _ = dpo(logps, ref, torch.tensor([[2, 0, 0], [0, 1, 2]]), beta=1.0)
    h = [0.5, -1.0, -3.0]
    expected = [math.log(1 + math.exp(-(h[w] - h[r]))) for w, r in ((2, 0), (0, 1), (0, 2))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)


# --- ipo ---
def test_trap_ipo_mean_is_per_token_and_sum_is_per_completion() -> None:
    logps, ref, lengths = f64(-2.0, -9.0), f64(-6.0, -4.0), f64(2.0, 5.0)
    mean, _ = ipo(logps, ref, lengths, PAIR, tau=0.25)
    total, _ = ipo(logps, ref, lengths, PAIR, tau=0.25, reduction="sum")
    assert mean.item() == pytest.approx((4 / 2 - (-5 / 5) - 1 / (2 * 0.25)) ** 2)
    assert total.item() == pytest.approx((4 - (-5) - 1 / (2 * 0.25)) ** 2)
    assert mean.item() == pytest.approx(1.0)
    assert total.item() == pytest.approx(49.0)
    default, _ = ipo(logps, ref, lengths, PAIR)
    assert default.item() == pytest.approx((3 - 5) ** 2), "the default is mean, tau 0.1"


def test_ipo_at_the_start_and_at_its_aim() -> None:
    start, _ = ipo(f64(-3.0, -4.0), f64(-3.0, -4.0), f64(3.0, 4.0), PAIR, tau=0.1)
    assert start.item() == pytest.approx(1 / (4 * 0.1**2))
    for margin, sign in ((4.9, -1), (5.0, 0), (5.1, 1)):
        logps = f64(margin, 0.0).requires_grad_()
        losses, metrics = ipo(logps, f64(0.0, 0.0), f64(1.0, 1.0), PAIR, tau=0.1)
        losses.sum().backward()
        assert logps.grad is not None
        assert np.sign(round(logps.grad[0].item(), 12)) == sign
        assert metrics["rewards/margins"].item() == pytest.approx(0.1 * margin)


def test_ipo_soft_labels_aim_at_the_preference_gap() -> None:
    # the optimum of p (m - a)^2 + (1 - p) (m + a)^2 is (2 p - 1) a
    p, tau = 0.8, 0.1
    logps = f64((2 * p - 1) / (2 * tau), 0.0).requires_grad_()
    ipo(logps, f64(0.0, 0.0), f64(1.0, 1.0), PAIR, f64(p), tau=tau)[0].sum().backward()
    assert logps.grad is not None
    assert logps.grad.abs().max() < 1e-12


# --- simpo ---
def test_trap_simpo_gamma_is_the_margin_itself_not_its_ratio_to_beta() -> None:
    logps, lengths = f64(-2.0, -12.0), f64(2.0, 4.0)  # means -1 and -3
    losses, metrics = simpo(logps, lengths, PAIR, beta=2.0, gamma=1.5)
    assert losses.item() == pytest.approx(math.log(1 + math.exp(-(2.0 * (-1 + 3) - 1.5))), rel=1e-14)
    as_ratio = math.log(1 + math.exp(-2.0 * ((-1 + 3) - 1.5)))
    assert losses.item() != pytest.approx(as_ratio, rel=1e-3)
    assert metrics["rewards/chosen"].item() == -2.0
    assert metrics["rewards/margins"].item() == 4.0, "the margin is shown before gamma is taken off"
    # the default: 1.375 / 2.5 = 0.55
    at_target, _ = simpo(f64(0.55, 0.0), f64(1.0, 1.0), PAIR)
    assert at_target.item() == pytest.approx(math.log(2), rel=1e-14)


def test_trap_simpo_soft_labels_ask_for_the_margin_on_both_sides() -> None:
    losses, _ = simpo(f64(-1.0, -3.0), f64(1.0, 1.0), PAIR, f64(0.75), beta=1.0, gamma=0.5)
    expected = 0.75 * math.log(1 + math.exp(-(2 - 0.5))) + 0.25 * math.log(1 + math.exp(-(-2 - 0.5)))
    assert losses.item() == pytest.approx(expected, rel=1e-14)


# --- kto ---
GOOD_BAD = torch.tensor([True, False])


def test_kto_literal() -> None:
    # h = 2 and -3, z = 0.5
    losses, metrics = kto(
        f64(-1.0, -5.0), f64(-3.0, -2.0), GOOD_BAD, f64(0.5)[0], beta=0.2, undesirable_weight=1.5
    )
    expected = [1 - 1 / (1 + math.exp(-0.2 * (2 - 0.5))), 1.5 * (1 - 1 / (1 + math.exp(-0.2 * (0.5 + 3))))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)
    assert metrics["rewards/chosen"].tolist() == pytest.approx([0.2 * 2])
    assert metrics["rewards/rejected"].tolist() == pytest.approx([0.2 * -3])
    assert metrics["kl"].tolist() == [0.5, 0.5]


def test_kto_at_the_start_is_half_the_weight() -> None:
    logps = f64(-4.0, -7.0)
    losses, _ = kto(logps, logps, GOOD_BAD, f64(0.0)[0], desirable_weight=1.2)
    assert losses.tolist() == pytest.approx([0.6, 0.5])


def test_trap_kto_negative_kl_counts_as_zero() -> None:
    given = (f64(-1.0, -5.0), f64(-3.0, -2.0), GOOD_BAD)
    below, metrics = kto(*given, f64(-2.0)[0])
    assert torch.equal(below, kto(*given, f64(0.0)[0])[0])
    assert metrics["kl"].tolist() == [0.0, 0.0]
    assert not torch.equal(below, kto(*given, f64(2.0)[0])[0])


def test_trap_kto_kl_gets_no_gradient() -> None:
    logps, kl = f64(-1.0, -5.0).requires_grad_(), f64(0.5).requires_grad_()
    kto(logps, f64(-3.0, -2.0), GOOD_BAD, kl[0])[0].sum().backward()
    assert logps.grad is not None
    assert kl.grad is None
    # a kl that was computed from the policy itself changes nothing either
    again = f64(-1.0, -5.0).requires_grad_()
    kto(again, f64(-3.0, -2.0), GOOD_BAD, again.sum() * 0 + 0.5)[0].sum().backward()
    assert again.grad is not None
    assert torch.equal(again.grad, logps.grad)


@pytest.mark.parametrize("label", [True, False])
def test_trap_kto_with_one_class_absent_is_finite(label: bool) -> None:
    losses, metrics = kto(f64(-1.0, -5.0), f64(-3.0, -2.0), torch.tensor([label] * 2), f64(0.1)[0])
    assert torch.isfinite(losses).all()
    assert metrics["rewards/rejected" if label else "rewards/chosen"].numel() == 0


def test_kto_parts_with_the_step_wide_kl_add_up() -> None:
    logps, ref = f64(-1.0, -5.0, -2.0), f64(-3.0, -2.0, -2.5)
    labels, kl = torch.tensor([True, False, True]), f64(0.4)[0]
    whole, _ = kto(logps, ref, labels, kl)
    parts = [kto(logps[i : i + 1], ref[i : i + 1], labels[i : i + 1], kl)[0] for i in range(3)]
    assert torch.equal(whole, torch.cat(parts))


# --- ranges ---
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dpo(x, x, PAIR, beta=-1), "beta must be > 0, got -1"),
        (lambda x: dpo(x, x, PAIR, beta=0), "beta must be > 0, got 0"),
        (lambda x: dpo(x, x, PAIR, beta=math.nan), "beta must be > 0, got nan"),
        (lambda x: dpo(x, x, PAIR, beta=math.inf), "beta must be > 0, got inf"),
        (lambda x: dpo(x, x, PAIR, beta=cast(Any, "0.1")), "beta must be a number, got '0.1'"),
        (lambda x: dpo(x, x, PAIR, beta=True), "beta must be a number, got True"),
        (lambda x: dpo(x, x, PAIR, label_smoothing=0.5), "label_smoothing must be >= 0 and < 0.5, got 0.5"),
        (lambda x: ipo(x, x, x, PAIR, tau=-0.1), "tau must be > 0, got -0.1"),
        (lambda x: ipo(x, x, x, PAIR, reduction="avg"), "reduction must be one of 'mean', 'sum', got 'avg'"),
        (lambda x: simpo(x, x, PAIR, gamma=-1.0), "gamma must be >= 0, got -1.0"),
        (lambda x: simpo(x, x, PAIR, beta=0.0), "beta must be > 0, got 0.0"),
        (
            lambda x: kto(x, x, x > 0, x[0], desirable_weight=-0.5),
            "desirable_weight must be >= 0, got -0.5",
        ),
    ],
)
def test_ranges_are_told_in_one_line(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        call(f64(-1.0, -2.0))
    assert str(caught.value) == message
