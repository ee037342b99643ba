"""Ranking objectives against literals, an independent float64 reference, DPO, and ties and gaps in the data."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, dpo, info_nca, nca, plackett_luce
from steerwell.testing import check_objective


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def whole(*values: int) -> Tensor:
    return torch.tensor(values)


NAN = float("nan")
ALONE = whole(0, 0, 0)
ZERO = f64(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("plackett_luce", {}),
        ("plackett_luce", {"beta": 2.0}),
        ("info_nca", {}),
        ("info_nca", {"beta": 1.0, "alpha": 0.2}),
        ("nca", {}),
        ("nca", {"beta": 1.0, "alpha": 0.2}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(name: str, hyper: dict[str, float], seed: int) -> None:
    passed = set(check_objective(name, seed=seed, **hyper))
    assert {"sign", "extremes", "empty", "permutation", "copies", "microbatches", "gradcheck"} <= passed


# --- Plackett-Luce ---
def test_plackett_luce_literal() -> None:
    # r = (ln 2, ln 3, ln 5); the ranking 0 < 1 < 2 has probability 2/10 * 3/8
    rewards = f64(math.log(2), math.log(3), math.log(5))
    losses, metrics = plackett_luce(rewards * 10, ZERO, whole(0, 1, 2), ALONE, beta=0.1)
    torch.testing.assert_close(losses, f64(math.log(5), math.log(8 / 3), 0.0))
    assert metrics["rewards/accuracies"].tolist() == [0.0, 0.0, 0.0]
    torch.testing.assert_close(metrics["rewards/chosen"], rewards[:1])
    torch.testing.assert_close(metrics["logps/rejected"], 10 * rewards[2:])


def test_plackett_luce_gradient_literal() -> None:
    # equal rewards of three: place 0 pulls 1 - 1/3 up and 1/3 down on each other, place 1 then 1/2 and 1/2
    logps = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    plackett_luce(logps, ZERO, whole(0, 1, 2), ALONE, beta=1.0)[0].sum().backward()
    assert logps.grad is not None
    torch.testing.assert_close(logps.grad, f64(-2 / 3, 1 / 3 - 1 / 2, 1 / 3 + 1 / 2))


@pytest.mark.parametrize("seed", range(3))
def test_plackett_luce_of_two_is_dpo(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logps = torch.randn(10, generator=g, dtype=torch.float64) * 9
    ref = torch.randn(10, generator=g, dtype=torch.float64) * 9
    order = torch.randperm(10, generator=g)  # completions of a prompt need not lie side by side
    pairs = order.reshape(2, 5)
    ranks, group = torch.empty(10, dtype=torch.long), torch.empty(10, dtype=torch.long)
    ranks[pairs[0]], ranks[pairs[1]] = 0, 1
    group[pairs[0]] = group[pairs[1]] = torch.arange(5)
    grads, values = [], []
    for losses in (
        lambda x: plackett_luce(x, ref, ranks, group, beta=0.3)[0],
        lambda x: dpo(x, ref, pairs, beta=0.3)[0],
    ):
        leaf = logps.clone().requires_grad_()
        value = losses(leaf)
        values.append(value.detach())
        grads.append(torch.autograd.grad(value.sum(), leaf)[0])
    torch.testing.assert_close(values[0][pairs[0]], values[1], rtol=1e-12, atol=1e-14)
    assert not values[0][pairs[1]].any()
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-12, atol=1e-14)


def test_plackett_luce_adds_up_to_a_distribution_over_orders() -> None:
    logps = f64(-3.0, -1.0, 0.5, -8.0)
    total = 0.0
    for order in itertools.permutations(range(4)):
        ranks = torch.empty(4, dtype=torch.long)
        ranks[list(order)] = torch.arange(4)
        losses, _ = plackett_luce(logps, torch.zeros(4).double(), ranks, whole(0, 0, 0, 0), beta=0.7)
        total += math.exp(-float(losses.sum()))
    assert total == pytest.approx(1.0, rel=1e-12)


def ref_plackett_luce(logps, ref_logps, ranks, group, beta):
    r = beta * (logps - ref_logps)
    out = np.zeros(len(r))
    for k in range(len(r)):
        if ranks[k] < 0:
            continue
        rest = [r[j] for j in range(len(r)) if group[j] == group[k] and ranks[j] > ranks[k]]
        out[k] = math.log(sum(math.exp(x - r[k]) for x in [r[k], *rest]))
    return out


@pytest.mark.parametrize("seed", range(4))
def test_plackett_luce_equals_an_independent_float64_reference(seed: int) -> None:
    g = np.random.default_rng(seed)
    logps, ref = -g.gamma(4.0, 3.0, 15), -g.gamma(4.0, 3.0, 15)
    ranks, group = g.integers(-1, 4, 15), g.integers(0, 4, 15)  # ties and gaps among them
    losses, _ = plackett_luce(*map(torch.from_numpy, (logps, ref, ranks, group)), beta=0.4)
    np.testing.assert_allclose(
        losses.numpy(), ref_plackett_luce(logps, ref, ranks, group, 0.4), rtol=1e-12, atol=1e-14
    )


def test_trap_tied_completions_are_not_ranked_against_each_other() -> None:
    # two at the top, one below: each is weighed against the one below, and against nothing else
    logps = f64(math.log(2), math.log(3), math.log(5)).requires_grad_()
    losses, metrics = plackett_luce(logps, ZERO, whole(0, 0, 1), ALONE, beta=1.0)
    torch.testing.assert_close(losses.detach(), f64(math.log(7 / 2), math.log(8 / 3), 0.0))
    assert len(metrics["rewards/margins"]) == 2
    assert len(metrics["rewards/chosen"]) == 2
    slopes = torch.autograd.grad(losses.sum(), logps)[0]
    torch.testing.assert_close(slopes, f64(-5 / 7, -5 / 8, 5 / 7 + 5 / 8))


def test_all_tied_is_no_loss_and_no_gradient() -> None:
    logps = f64(1.0, 2.0, 3.0).requires_grad_()
    losses, metrics = plackett_luce(logps, ZERO, whole(2, 2, 2), ALONE)
    assert not losses.any()
    assert not torch.autograd.grad(losses.sum(), logps)[0].any()
    assert all(x.numel() == 0 for x in metrics.values())


def test_completions_without_a_rank_are_left_out() -> None:
    logps = f64(-1.0, 5.0, -2.0, -4.0).requires_grad_()
    losses, _ = plackett_luce(logps, f64(0.0, 0.0, 0.0, 0.0), whole(0, -1, 3, 7), whole(4, 4, 4, 4), beta=1.0)
    kept, _ = plackett_luce(f64(-1.0, -2.0, -4.0), ZERO, whole(0, 1, 2), ALONE, beta=1.0)
    torch.testing.assert_close(losses.detach()[[0, 2, 3]], kept)
    assert losses[1] == 0
    assert torch.autograd.grad(losses.sum(), logps)[0][1] == 0


# --- InfoNCA and NCA ---
def test_info_nca_literal() -> None:
    # q = (2/3, 1/3), softmax of r = (1/4, 3/4)
    logps, scores = f64(0.0, math.log(3)), f64(math.log(2), 0.0)
    losses, _ = info_nca(logps, f64(0.0, 0.0), scores, whole(0, 0), beta=1.0, alpha=1.0)
    torch.testing.assert_close(losses, f64(2 / 3 * math.log(4), 1 / 3 * math.log(4 / 3)))


def test_nca_literal() -> None:
    # s(r) = (1/2, 3/4)
    logps, scores = f64(0.0, math.log(3)), f64(math.log(2), 0.0)
    losses, metrics = nca(logps, f64(0.0, 0.0), scores, whole(0, 0), beta=1.0, alpha=1.0)
    expected = f64(
        2 / 3 * math.log(2) + math.log(2) / 2,
        1 / 3 * math.log(4 / 3) + math.log(4) / 2,
    )
    torch.testing.assert_close(losses, expected)
    assert metrics["rewards/accuracies"].tolist() == [0.0]


def ref_info_nca(r, q):
    return -q * np.log(np.exp(r) / np.exp(r).sum())


def ref_nca(r, q):
    s = 1 / (1 + np.exp(-r))
    return -q * np.log(s) - np.log(1 - s) / len(r)


@pytest.mark.parametrize(("ours", "reference"), [(info_nca, ref_info_nca), (nca, ref_nca)])
@pytest.mark.parametrize(("beta", "alpha"), [(0.01, 1.0), (0.5, 0.1), (0.1, 5.0)])
@pytest.mark.parametrize("seed", range(3))
def test_equals_an_independent_float64_reference(ours, reference, beta: float, alpha: float, seed) -> None:
    g = np.random.default_rng(seed)
    logps, ref = -g.gamma(4.0, 3.0, 15), -g.gamma(4.0, 3.0, 15)
    scores, group = g.normal(0, 2, 15), g.integers(0, 4, 15)
    expected = np.zeros(15)
    for prompt in np.unique(group):
        at = group == prompt
        weight = np.exp(scores[at] / alpha - scores[at].max() / alpha)
        expected[at] = reference(beta * (logps - ref)[at], weight / weight.sum())
    losses, _ = ours(*map(torch.from_numpy, (logps, ref, scores, group)), beta=beta, alpha=alpha)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("ours", [info_nca, nca])
def test_a_missing_score_is_not_a_score_of_zero(ours) -> None:
    logps = f64(-1.0, 5.0, -2.0).requires_grad_()
    losses, metrics = ours(logps, ZERO, f64(2.0, NAN, -1.0), ALONE)
    kept, _ = ours(f64(-1.0, -2.0), f64(0.0, 0.0), f64(2.0, -1.0), whole(0, 0))
    torch.testing.assert_close(losses.detach()[[0, 2]], kept)
    assert losses[1] == 0
    slopes = torch.autograd.grad(losses.sum(), logps)[0]
    assert slopes[1] == 0
    assert torch.isfinite(slopes).all()
    assert len(metrics["rewards/margins"]) == 1


def test_a_cold_alpha_makes_the_best_take_all() -> None:
    logps, scores = f64(-1.0, 0.5, -2.0), f64(7.0, 9.0, 8.0)
    losses, _ = info_nca(logps, ZERO, scores, ALONE, beta=1.0, alpha=1e-3)
    torch.testing.assert_close(losses, f64(0.0, float(torch.logsumexp(logps, 0)) - 0.5, 0.0))


def test_trap_info_nca_lets_the_best_fall_and_nca_does_not() -> None:
    """Only differences count in InfoNCA: its gradient is a sum of zero. NCA's lifts the best by itself."""
    logps = ZERO.clone().requires_grad_()
    scores = f64(3.0, 0.0, 0.0)
    relative = torch.autograd.grad(info_nca(logps, ZERO, scores, ALONE, beta=1.0)[0].sum(), logps)[0]
    assert float(relative.sum()) == pytest.approx(0, abs=1e-15)
    fallen = logps.detach() - 4  # all of them less likely: nothing changes for InfoNCA
    same, _ = info_nca(fallen, ZERO, scores, ALONE, beta=1.0)
    torch.testing.assert_close(same, info_nca(logps.detach(), ZERO, scores, ALONE, beta=1.0)[0])
    costs, _ = nca(fallen, ZERO, scores, ALONE, beta=1.0)
    assert float(costs.sum()) > float(nca(logps.detach(), ZERO, scores, ALONE, beta=1.0)[0].sum())


@pytest.mark.parametrize("hyper", [{"beta": 0.0}, {"alpha": 0.0}, {"alpha": -1.0}])
def test_wrong_hyperparameters_are_named(hyper: dict[str, float]) -> None:
    with pytest.raises(ObjectiveError, match=f"^{next(iter(hyper))} must be > 0"):
        nca(f64(-1.0), f64(-1.0), f64(1.0), whole(0), **hyper)
