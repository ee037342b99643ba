"""Objectives of a whole batch against literals, an independent float64 reference, and the traps of public versions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, alpha_dpo, aot, aot_unpaired, bco, beta_dpo, dpo
from steerwell.objectives.batchwise import SMALLEST_BETA
from steerwell.objectives.table import TABLE, Running, check_hyperparameters, needs, optional
from steerwell.testing import check_objective


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def move(name: str, running: Tensor | None, **given: Any) -> Tensor:
    how: Running | None = TABLE[name].running
    assert how is not None
    return how(running, **given)


def zeros(n: int) -> Tensor:
    return torch.zeros(n, dtype=torch.float64)


def side_by_side(m: int) -> Tensor:
    """Pairs (2, m): completions 0, 2, 4 ... preferred to 1, 3, 5 ..."""
    return torch.arange(2 * m).reshape(m, 2).T.contiguous()


def slope(losses: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(losses.sum(), leaf)[0]


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("bco", {}),
        ("bco", {"beta": 1.0, "desirable_weight": 0.5, "undesirable_weight": 2.0}),
        ("aot", {}),
        ("aot", {"beta": 1.5}),
        ("aot_unpaired", {}),
        ("aot_unpaired", {"beta": 1.5}),
        ("beta_dpo", {}),
        ("beta_dpo", {"beta": 0.5, "alpha": 0.05, "filtered": 0.0}),
        ("alpha_dpo", {}),
        ("alpha_dpo", {"beta": 1.0, "gamma": 0.0, "alpha": 2.0}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(name: str, hyper: dict[str, float], seed: int) -> None:
    passed = set(check_objective(name, seed=seed, **hyper))
    assert {"sign", "extremes", "empty", "permutation", "copies"} <= passed
    assert "microbatches" not in passed
    assert ("gradcheck" in passed) == name.startswith("aot")


@pytest.mark.parametrize("name", ["bco", "beta_dpo", "alpha_dpo"])
def test_what_is_carried_is_the_loops_business(name: str) -> None:
    fn = TABLE[name]
    assert not fn.decomposable
    assert fn.surrogate
    assert fn.running is not None
    assert "running" not in (*needs(fn), *optional(fn))
    with pytest.raises(ObjectiveError, match="momentum must be >= 0 and < 1"):
        check_hyperparameters(fn, {"momentum": 1.0})


# --- BCO ---
def ref_bco(logps, ref_logps, labels, beta, wd, wu):
    r = beta * (logps - ref_logps)
    delta = (r[labels].mean() + r[~labels].mean()) / 2
    return np.array(
        [
            wd * math.log(1 + math.exp(delta - x)) if good else wu * math.log(1 + math.exp(x - delta))
            for x, good in zip(r, labels, strict=True)
        ]
    )


@pytest.mark.parametrize(("beta", "wd", "wu"), [(0.1, 1.0, 1.0), (0.6, 0.3, 2.0)])
@pytest.mark.parametrize("seed", range(3))
def test_bco_equals_an_independent_float64_reference(beta: float, wd: float, wu: float, seed: int) -> None:
    g = np.random.default_rng(seed)
    logps, ref, labels = -g.gamma(4, 3, 9), -g.gamma(4, 3, 9), np.arange(9) % 3 == 0
    losses, _ = bco(
        *map(torch.from_numpy, (logps, ref, labels)), beta=beta, desirable_weight=wd, undesirable_weight=wu
    )
    np.testing.assert_allclose(losses.numpy(), ref_bco(logps, ref, labels, beta, wd, wu), rtol=1e-12)


def test_bco_literal() -> None:
    # r = (2, 0): delta = 1, both are ln(1 + e) - 1 away from their side
    losses, metrics = bco(f64(2.0, 0.0), zeros(2), torch.tensor([True, False]), beta=1.0)
    torch.testing.assert_close(losses, f64(math.log1p(math.e) - 1, math.log1p(math.e) - 1))
    assert metrics["delta"].tolist() == [1.0, 1.0]


def ten_to_one() -> tuple[Tensor, Tensor]:
    """Ten desirable completions with reward 2, one undesirable with reward -2."""
    return torch.cat([2 * torch.ones(10), -2 * torch.ones(1)]).double(), torch.arange(11) < 10


def test_trap_bco_shift_is_balanced_over_classes_not_pooled() -> None:
    logps, labels = ten_to_one()
    _, metrics = bco(logps, zeros(11), labels, beta=1.0)
    assert float(metrics["delta"][0]) == 0.0  # in the middle of 2 and -2
    pooled = float(logps.mean())
    assert pooled == pytest.approx(18 / 11)  # what a mean over all completions would make of it: 1.64
    losses, _ = bco(logps, zeros(11), labels, beta=1.0)
    torch.testing.assert_close(losses, torch.full((11,), math.log1p(math.exp(-2.0))).double())


def test_bco_gives_no_gradient_to_its_shift() -> None:
    logps, labels = ten_to_one()
    leaf = logps.clone().requires_grad_()
    losses, _ = bco(leaf, zeros(11), labels, beta=1.0)
    away = 1 / (1 + math.exp(2.0))  # s(-2)
    expected = torch.where(labels, -away, away).double()
    torch.testing.assert_close(slope(losses, leaf), expected)


def test_bco_carries_each_class_mean_by_itself() -> None:
    given = {"ref_logps": zeros(3), "beta": 1.0, "momentum": 0.9}
    first = move("bco", None, logps=f64(1.0, 3.0, -4.0), labels=torch.tensor([True, True, False]), **given)
    assert first.tolist() == [2.0, -4.0]
    assert first.dtype == torch.float64
    second = move("bco", first, logps=f64(12.0, 12.0, 12.0), labels=torch.ones(3).bool(), **given)
    torch.testing.assert_close(second, f64(3.0, -4.0))  # a class that is absent keeps its mean
    losses, metrics = bco(f64(5.0), zeros(1), torch.tensor([True]), second, beta=1.0)
    assert metrics["delta"].tolist() == [-0.5]  # as carried, whatever this batch holds
    torch.testing.assert_close(losses, f64(math.log1p(math.exp(-5.5))))


def test_bco_with_one_class_alone_is_finite() -> None:
    given = {"logps": f64(1.0, 3.0), "ref_logps": zeros(2), "labels": torch.ones(2).bool()}
    carried = move("bco", None, **given, beta=1.0, momentum=0.9)
    assert carried[0] == 2.0
    assert carried[1].isnan()
    _, metrics = bco(given["logps"], given["ref_logps"], given["labels"], beta=1.0)
    assert metrics["delta"].tolist() == [2.0, 2.0]
    later = move(
        "bco",
        carried,
        logps=f64(-6.0),
        ref_logps=zeros(1),
        labels=torch.zeros(1).bool(),
        beta=1.0,
        momentum=0.9,
    )
    assert later.tolist() == [2.0, -6.0]  # the first value is taken whole, not a tenth of it


# --- AOT ---
def ref_aot(logps, ref_logps, pairs, beta):
    u = np.sort(logps[pairs[0]] - logps[pairs[1]])[::-1]  # downwards: the order must not matter
    v = np.sort(ref_logps[pairs[0]] - ref_logps[pairs[1]])[::-1]
    return np.log1p(np.exp(-beta * (u - v)))


@pytest.mark.parametrize("seed", range(3))
def test_aot_equals_an_independent_float64_reference(seed: int) -> None:
    g = np.random.default_rng(seed)
    logps, ref, pairs = -g.gamma(4, 3, 9), -g.gamma(4, 3, 9), g.integers(0, 9, (2, 7))
    losses, _ = aot(*map(torch.from_numpy, (logps, ref, pairs)), beta=0.4)
    np.testing.assert_allclose(
        np.sort(losses.numpy()), np.sort(ref_aot(logps, ref, pairs, 0.4)), rtol=1e-12, atol=1e-14
    )


def test_aot_literal_and_each_loss_lies_at_its_pair() -> None:
    # u = (3, 1, 2), v = (0, 5, 1): sorted u 1 2 3 meets v 0 1 5; pair 0 (u = 3) meets 5
    logps, ref = f64(3.0, 0.0, 1.0, 0.0, 2.0, 0.0), f64(0.0, 0.0, 5.0, 0.0, 1.0, 0.0)
    losses, metrics = aot(logps, ref, side_by_side(3), beta=1.0)
    expected = f64(math.log1p(math.exp(2)), math.log1p(math.exp(-1)), math.log1p(math.exp(-1)))
    torch.testing.assert_close(losses, expected)
    assert metrics["rewards/margins"].tolist() == [
        3.0,
        -4.0,
        1.0,
    ]  # of the pairs themselves, not of the quantiles


def test_trap_aot_sorts_policy_and_reference_by_themselves() -> None:
    logps, ref = f64(3.0, 0.0, 1.0, 0.0), f64(0.0, 0.0, 9.0, 0.0)
    ours = aot(logps, ref, side_by_side(2), beta=1.0)[0]
    together = dpo(logps, ref, side_by_side(2), beta=1.0)[0]  # the order of the pairs kept: plain DPO
    assert float(together.sum() - ours.sum()) > 1


def test_trap_aot_of_one_pair_is_dpo_so_micro_batches_change_it() -> None:
    logps, ref = f64(3.0, 0.0, 1.0, 0.0, 2.0, 0.0), f64(0.0, 0.0, 5.0, 0.0, 1.0, 0.0)
    pairs = side_by_side(3)
    one_by_one = torch.cat([aot(logps, ref, pairs[:, [k]], beta=1.0)[0] for k in range(3)])
    torch.testing.assert_close(one_by_one, dpo(logps, ref, pairs, beta=1.0)[0])
    at_once = aot(logps, ref, pairs, beta=1.0)[0]
    assert abs(float(at_once.sum() - one_by_one.sum())) > 1
    assert not TABLE["aot"].decomposable
    assert not TABLE["aot_unpaired"].decomposable


def test_aot_unpaired_of_equal_numbers_sorts_both_kinds() -> None:
    # desirable h = (4, 1), undesirable h = (0, 3): 1 meets 0 and 4 meets 3, each loss ln(1 + e^-1)
    labels = torch.tensor([True, False, False, True])
    losses, metrics = aot_unpaired(f64(4.0, 0.0, 3.0, 1.0), zeros(4), labels, beta=1.0)
    torch.testing.assert_close(losses, torch.full((4,), math.log1p(math.exp(-1))).double())
    assert metrics["rewards/chosen"].tolist() == [4.0, 1.0]


def ref_aot_unpaired(h, labels, beta):
    """Both kinds repeated to a common number, so that quantiles can be laid side by side."""
    good, bad = np.sort(h[labels]), np.sort(h[~labels])
    good, bad = np.repeat(good, (~labels).sum()), np.repeat(bad, labels.sum())
    return np.log1p(np.exp(-beta * (good - bad))).mean()


@pytest.mark.parametrize("n_good", [1, 3, 4, 7, 9])
@pytest.mark.parametrize("seed", range(2))
def test_aot_unpaired_equals_an_independent_float64_reference(n_good: int, seed: int) -> None:
    g = np.random.default_rng(seed)
    logps, ref = -g.gamma(4, 3, 10), -g.gamma(4, 3, 10)
    labels = g.permutation(10) < n_good
    losses, _ = aot_unpaired(*map(torch.from_numpy, (logps, ref, labels)), beta=0.4)
    assert float(losses.mean()) == pytest.approx(ref_aot_unpaired(logps - ref, labels, 0.4), rel=1e-12)
    good = losses[torch.from_numpy(labels)]
    assert float(good.mean()) == pytest.approx(float(losses.mean()), rel=1e-12)  # each kind carries it alike


def test_aot_unpaired_of_one_kind_has_no_loss() -> None:
    leaf = f64(1.0, 2.0).requires_grad_()
    losses, _ = aot_unpaired(leaf, zeros(2), torch.ones(2).bool())
    assert not losses.any()
    assert not slope(losses, leaf).any()


# --- beta-DPO ---
def margins_only(*values: float) -> tuple[Tensor, Tensor, Tensor]:
    """Completions whose pairs have these margins: logps, ref_logps, pairs."""
    logps = torch.stack([f64(*values), zeros(len(values))], dim=1).flatten()
    return logps, zeros(len(logps)), side_by_side(len(values))


def test_beta_dpo_literal() -> None:
    # M_0 = 1 as carried; the nearest four of five are 0 2 3 -1 (9 is set aside): their mean is 1, so b = beta
    logps, ref, pairs = margins_only(0.0, 2.0, 3.0, -1.0, 9.0)
    losses, metrics = beta_dpo(logps, ref, pairs, f64(1.0), beta=0.5, alpha=0.6, filtered=0.2)
    assert metrics["kept"].tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]
    torch.testing.assert_close(metrics["beta"], torch.full((5,), 0.5).double())
    expected = [math.log1p(math.exp(-0.5 * m)) for m in (0.0, 2.0, 3.0, -1.0)]
    torch.testing.assert_close(losses, f64(*expected, 0.0))


def test_beta_dpo_follows_the_mean_of_the_kept() -> None:
    logps, ref, pairs = margins_only(2.0, 4.0, 40.0)
    _, metrics = beta_dpo(logps, ref, pairs, f64(1.0), beta=0.1, alpha=0.5, filtered=0.34)
    torch.testing.assert_close(metrics["beta"][:1], f64(0.1 * (1 + 0.5 * (3 - 1))))


def test_trap_beta_dpo_has_a_floor() -> None:
    """Margins that fall far below their usual mean would turn b, and with it every gradient, round."""
    logps, ref, pairs = margins_only(-50.0, -52.0)
    leaf = logps.clone().requires_grad_()
    losses, metrics = beta_dpo(leaf, ref, pairs, f64(0.0), beta=0.1, alpha=0.6, filtered=0.0)
    assert 0.1 * (1 + 0.6 * -51) < 0
    assert metrics["beta"].tolist() == [SMALLEST_BETA, SMALLEST_BETA] == [1e-3, 1e-3]
    assert (slope(losses, leaf)[pairs[0]] < 0).all()


def test_beta_dpo_gives_no_gradient_to_its_beta() -> None:
    logps, ref, pairs = margins_only(2.0, 4.0)
    leaf = logps.clone().requires_grad_()
    losses, metrics = beta_dpo(leaf, ref, pairs, f64(1.0), beta=0.1, alpha=0.5, filtered=0.0)
    b = float(metrics["beta"][0])
    expected = torch.stack(
        [-b * torch.sigmoid(-b * f64(2.0, 4.0)), b * torch.sigmoid(-b * f64(2.0, 4.0))], dim=1
    )
    torch.testing.assert_close(slope(losses, leaf), expected.flatten())


def test_beta_dpo_pairs_set_aside_count_with_nothing() -> None:
    """What is set aside stays in the denominator: 1 - filtered of the authors' step, and no surprise in the counts."""
    logps, ref, pairs = margins_only(*range(10))
    losses, metrics = beta_dpo(logps, ref, pairs, f64(4.4), beta=0.1, alpha=0.0, filtered=0.2)
    assert losses.shape == (10,)
    assert int(metrics["kept"].sum()) == 8
    assert metrics["kept"].tolist() == [0.0] + [1.0] * 8 + [0.0]
    torch.testing.assert_close(losses[1:9], dpo(logps, ref, pairs, beta=0.1)[0][1:9])


@pytest.mark.parametrize("filtered", [0.1, 0.3, 0.5, 0.7, 0.9])
def test_beta_dpo_keeps_the_share_it_says(filtered: float) -> None:
    logps, ref, pairs = margins_only(*(1.1**k for k in range(10)))
    _, metrics = beta_dpo(logps, ref, pairs, filtered=filtered)
    assert int(metrics["kept"].sum()) == round(10 * (1 - filtered))


def test_beta_dpo_without_spread_keeps_all() -> None:
    """The first step of a run, policy and reference one and the same: the authors' code divides 0 by 0 here."""
    logps, ref, pairs = margins_only(0.0, 0.0, 0.0)
    losses, metrics = beta_dpo(logps, ref, pairs)
    assert metrics["kept"].tolist() == [1.0, 1.0, 1.0]
    torch.testing.assert_close(losses, torch.full((3,), math.log(2)).double())


def test_beta_dpo_carries_the_mean_margin() -> None:
    logps, ref, pairs = margins_only(1.0, 3.0)
    given = {"ref_logps": ref, "pairs": pairs, "beta": 0.1, "alpha": 0.6, "filtered": 0.2, "momentum": 0.75}
    first = move("beta_dpo", None, logps=logps, **given)
    assert first.tolist() == [2.0]
    second = move("beta_dpo", first, logps=3 * logps, **given)
    assert second.tolist() == [0.75 * 2 + 0.25 * 6]
    empty = {**given, "ref_logps": ref[:0], "pairs": pairs[:, :0]}
    assert move("beta_dpo", second, logps=logps[:0], **empty).tolist() == second.tolist()


def test_plain_dpo_is_beta_dpo_without_its_two_ideas() -> None:
    g = torch.Generator().manual_seed(0)
    logps, ref = (torch.randn(12, generator=g, dtype=torch.float64) * 5 for _ in range(2))
    pairs = side_by_side(6)
    ours = beta_dpo(logps, ref, pairs, beta=0.3, alpha=0.0, filtered=0.0)[0]
    torch.testing.assert_close(ours, dpo(logps, ref, pairs, beta=0.3)[0])


# --- alpha-DPO ---
def ref_alpha_dpo(logps, ref_logps, lengths, pairs, beta, gamma, alpha):
    per, per_ref = logps / lengths, ref_logps / lengths
    u = per[pairs[0]] - per[pairs[1]]
    m = u - (per_ref[pairs[0]] - per_ref[pairs[1]])
    z = (m - m.mean()) / m.std()
    return np.log1p(np.exp(-(beta * u - gamma - alpha * z)))


@pytest.mark.parametrize(("beta", "gamma", "alpha"), [(2.5, 1.5, 0.5), (1.0, 0.0, 2.0)])
@pytest.mark.parametrize("seed", range(3))
def test_alpha_dpo_equals_an_independent_float64_reference(
    beta: float, gamma: float, alpha: float, seed: int
) -> None:
    g = np.random.default_rng(seed)
    logps, ref, lengths = -g.gamma(4, 3, 9), -g.gamma(4, 3, 9), g.integers(1, 30, 9).astype(float)
    pairs = g.integers(0, 9, (2, 7))
    losses, _ = alpha_dpo(
        *map(torch.from_numpy, (logps, ref, lengths, pairs)), beta=beta, gamma=gamma, alpha=alpha
    )
    expected = ref_alpha_dpo(logps, ref, lengths, pairs, beta, gamma, alpha)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-11)


def test_alpha_dpo_literal_and_no_gradient_through_the_target() -> None:
    # margins per token m = (1, 3): mean 2, standard deviation 1, z = (-1, 1); the reference is 0, so u = beta m
    logps, ref, pairs = margins_only(2.0, 6.0)
    lengths = 2 * torch.ones(4).double()
    leaf = logps.clone().requires_grad_()
    losses, metrics = alpha_dpo(leaf, ref, lengths, pairs, beta=2.0, gamma=1.0, alpha=0.5)
    torch.testing.assert_close(metrics["target"], f64(0.5, 1.5))
    torch.testing.assert_close(losses, f64(math.log1p(math.exp(-1.5)), math.log1p(math.exp(-4.5))))
    expected = -2.0 / 2 * torch.sigmoid(-f64(1.5, 4.5))
    torch.testing.assert_close(slope(losses, leaf)[pairs[0]], expected)


def test_trap_alpha_dpo_gamma_and_alpha_are_in_units_of_the_reward() -> None:
    """The authors' code multiplies both by beta: its ratio of 0.6 and alpha of 0.2 are ours of 1.5 and 0.5."""
    logps, ref, pairs = margins_only(1.0, 3.0)
    ones = torch.ones(4).double()
    ours = alpha_dpo(logps, ref, ones, pairs, beta=2.5, gamma=1.5, alpha=0.5)[0]
    theirs = torch.log1p(torch.exp(-2.5 * (f64(1.0, 3.0) - (0.6 + 0.2 * f64(-1.0, 1.0)))))
    torch.testing.assert_close(ours, theirs)


def test_alpha_dpo_carries_mean_and_deviation() -> None:
    logps, ref, pairs = margins_only(1.0, 3.0)
    given = {"ref_logps": ref, "pairs": pairs, "lengths": torch.ones(4).double(), "momentum": 0.5}
    first = move("alpha_dpo", None, logps=logps, **given)
    assert first.tolist() == [2.0, 1.0]
    second = move("alpha_dpo", first, logps=3 * logps, **given)
    assert second.tolist() == [4.0, 2.0]
    _, metrics = alpha_dpo(logps, ref, torch.ones(4).double(), pairs, second, gamma=1.0, alpha=2.0)
    assert metrics["target"].tolist() == [1 - 2 * 1.5, 1 - 2 * 0.5]


def test_alpha_dpo_without_spread_is_simpo() -> None:
    logps, ref, pairs = margins_only(0.0, 0.0)
    losses, metrics = alpha_dpo(logps, ref, torch.ones(4).double(), pairs, gamma=1.5)
    assert metrics["target"].tolist() == [1.5, 1.5]
    torch.testing.assert_close(losses, torch.full((2,), math.log1p(math.exp(1.5))).double())
