"""Ensembles and ODIN: literals, independent references, and what the bootstrap's hash must be."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import (
    ObjectiveError,
    bradley_terry,
    check_hyperparameters,
    ensemble_bradley_terry,
    explain,
    needs,
    odin_pairs,
    orthogonal_heads,
)
from steerwell.objectives.reward_ensemble import correlation, poisson_weights
from steerwell.testing import check_objective

PAIR = torch.tensor([[0], [1]])


def f64(values: list) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("hyper", [{"members": 6}, {"bootstrap": False, "centering": 0.1}])
def test_the_ensemble_passes_the_exported_checks(hyper: dict) -> None:
    done = check_objective(ensemble_bradley_terry, **hyper)
    assert {"microbatches", "removal", "gradcheck"} <= set(done)


def test_odin_passes_the_exported_checks() -> None:
    assert "microbatches" not in check_objective(odin_pairs)
    assert "removal" in check_objective(odin_pairs, seed=1, length_weight=0.3)
    assert {"microbatches", "gradcheck"} <= set(check_objective(orthogonal_heads))


def test_the_ensemble_is_the_mean_of_its_members_losses() -> None:
    scores = f64([[2.0, 0.0], [0.5, 1.0]])
    losses, metrics = ensemble_bradley_terry(scores, PAIR, members=2, bootstrap=False)
    expected = (math.log(1 + math.exp(-1.5)) + math.log(1 + math.exp(1.0))) / 2
    assert losses.item() == pytest.approx(expected, rel=1e-14)
    assert metrics["margin"].item() == 0.25
    assert metrics["disagreement"].item() == 1.25  # of 1.5 and -1, divided by their number: not 1.77
    soft, _ = ensemble_bradley_terry(scores, PAIR, f64([0.7]), members=2, bootstrap=False, centering=0.1)
    each = [bradley_terry(scores[:, i], PAIR, f64([0.7]), centering=0.1)[0].item() for i in (0, 1)]
    assert soft.item() == pytest.approx(sum(each) / 2, rel=1e-14)


def test_each_member_sees_its_own_resample() -> None:
    g = torch.Generator().manual_seed(0)
    scores, draws = torch.randn(8, 3, generator=g).double(), torch.randint(0, 2**48, (4,), generator=g)
    pairs = torch.arange(8).view(2, 4)
    weights = poisson_weights(draws, 3).double()
    assert len({tuple(column) for column in weights.T.tolist()}) > 1
    losses, _ = ensemble_bradley_terry(scores, pairs, None, draws, members=3)
    each = torch.stack([bradley_terry(scores[:, k], pairs)[0] for k in range(3)], dim=1)
    torch.testing.assert_close(losses, (weights * each).mean(1), rtol=1e-14, atol=0)


def test_the_weights_are_poisson_independent_and_always_the_same() -> None:
    draws = torch.arange(20_000) * 7  # counters are no worse than random numbers
    found = poisson_weights(draws, 3)
    for k in range(5):
        share, expected = (found == k).double().mean().item(), math.exp(-1) / math.factorial(k)
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / found.numel())
    between = np.corrcoef(np.vstack([found.T.numpy(), [*found[1:, 0].tolist(), 1]]))
    assert np.abs(between - np.eye(4)).max() < 4 / math.sqrt(len(draws))
    high = poisson_weights(torch.arange(2_000) << 32, 1)  # the upper bits count as well
    assert 0.9 < high.double().mean() < 1.1
    assert 0.8 < high.double().var() < 1.2
    # written down once: runs made before must go on as they were
    ends = [0, 1, 2**48 - 1]
    assert poisson_weights(torch.tensor(ends), 4).tolist() == [[1, 0, 1, 3], [1, 0, 2, 0], [1, 1, 1, 0]]
    assert poisson_weights(torch.tensor(ends), 4).tolist() == [[plain(x, k) for k in range(4)] for x in ends]
    assert torch.equal(poisson_weights(draws[5:9], 3), found[5:9])


def plain(draw: int, member: int) -> int:
    """The same weight with Python's integers and floats."""

    def mixed(x: int) -> int:
        x = (x ^ x >> 16) * 0x7FEB352D % 2**32
        x = (x ^ x >> 15) * 0x846CA68B % 2**32
        return x ^ x >> 16

    noise = mixed(draw % 2**32 ^ mixed((member + 1) * 0x9E3779B9 % 2**32 ^ draw >> 32))
    share, k, below = noise / 2**32, 0, math.exp(-1)
    while share >= below:
        k += 1
        below += math.exp(-1) / math.factorial(k)
    return k


def test_settings_of_the_ensemble() -> None:
    assert "pair_draws" in needs(ensemble_bradley_terry)
    assert "pair_draws" not in needs(ensemble_bradley_terry, {"bootstrap": False})
    with pytest.raises(ObjectiveError, match="members must be >= 2 and <= 64, got 1"):
        check_hyperparameters(ensemble_bradley_terry, {"members": 1})
    with pytest.raises(ObjectiveError, match=r"members must be a whole number, got 2\.5"):
        check_hyperparameters(ensemble_bradley_terry, {"members": 2.5})
    with pytest.raises(ObjectiveError, match="the head has 2 outputs for 4 members"):
        ensemble_bradley_terry(f64([[1.0, 0.0], [0.0, 1.0]]), PAIR, bootstrap=False)
    with pytest.raises(ObjectiveError, match="length_weight must be >= 0, got -1"):
        check_hyperparameters(odin_pairs, {"length_weight": -1})
    assert "1 × orthogonal_heads" in explain("odin")


def test_odin_by_hand() -> None:
    """q = (1, 0, 2, 1), l = (0, 1, 1, 0), lengths (3, 1, 5, 3): corr(q, len) = 1, corr(l, len) = 0."""
    heads = f64([[1.0, 0.0], [0.0, 1.0], [2.0, 1.0], [1.0, 0.0]])
    lengths, pairs = f64([3.0, 1.0, 5.0, 3.0]), torch.tensor([[0, 2], [1, 3]])
    losses, metrics = odin_pairs(heads, lengths, pairs, length_weight=0.5)
    both = 0.5 * (1.0 + 1.0 - 0.0)
    assert losses.tolist() == pytest.approx([math.log(2) + both, math.log(1 + math.exp(-2)) + both])
    assert metrics["corr/quality_length"].tolist() == pytest.approx([1.0, 1.0])
    assert metrics["corr/length_length"].tolist() == pytest.approx([0.0, 0.0], abs=1e-15)
    assert metrics["margin"].tolist() == [0.0, 2.0]


@pytest.mark.parametrize("seed", range(3))
def test_odin_equals_an_independent_float64_reference(seed: int) -> None:
    g = np.random.default_rng(seed)
    heads, lengths = g.normal(0, 2, (8, 2)), g.integers(1, 90, 8).astype(float)
    pairs, probs = g.permutation(8).reshape(2, 4), g.uniform(0, 1, 4)
    d = heads.sum(1)[pairs[0]] - heads.sum(1)[pairs[1]]
    ranking = probs * np.log1p(np.exp(-d)) + (1 - probs) * np.log1p(np.exp(d))
    corr = [np.corrcoef(heads[:, i], lengths)[0, 1] for i in (0, 1)]
    losses, metrics = odin_pairs(*map(torch.from_numpy, (heads, lengths, pairs, probs)))
    np.testing.assert_allclose(losses.numpy(), ranking + abs(corr[0]) + 1 - corr[1], rtol=1e-12)
    assert metrics["corr/quality_length"][0].item() == pytest.approx(corr[0], rel=1e-12)


def test_what_does_not_vary_has_no_correlation_and_no_gradient() -> None:
    x = torch.zeros(4, requires_grad=True)
    found = correlation(x, torch.arange(4.0))
    found.backward()
    assert found.item() == 0.0
    assert x.grad is not None
    assert not x.grad.any()
    assert correlation(torch.arange(4.0), torch.full((4,), 7.0)).item() == 0.0
    assert correlation(torch.arange(4.0) * 1e-25, torch.arange(4.0) * 1e25).item() == pytest.approx(1.0)


def test_orthogonal_heads_by_hand() -> None:
    weights = f64([[1.0, 2.0, 0.0], [3.0, -2.0, 5.0]]).requires_grad_()
    losses, _ = orthogonal_heads(weights, f64([4.0, 4.0, 9.0]))
    assert losses.tolist() == [1.0, 1.0, 1.0]
    losses.mean().backward()
    assert weights.grad is not None
    assert weights.grad.tolist() == [[-3.0, 2.0, -5.0], [-1.0, -2.0, 0.0]]  # the product is -1
