"""Policy-gradient surrogates against literals, a float64 reference, exact expectations, and the KL traps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, cispo, grpo, needs, ppo_clip, reinforce, rloo
from steerwell.objectives.policy_gradient import k3
from steerwell.testing import check_objective


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("reinforce", {}),
        ("rloo", {}),
        ("rloo", {"beta": 0.0}),
        ("ppo_clip", {}),
        ("ppo_clip", {"epsilon": 0.1, "epsilon_high": 0.28}),
        ("cispo", {}),
        ("cispo", {"epsilon_max": 1.1}),
        ("grpo", {}),
        ("grpo", {"beta": 0.0, "epsilon_high": 0.28}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(name: str, hyper: dict[str, float], seed: int) -> None:
    assert {"sign", "extremes", "empty", "microbatches"} <= set(check_objective(name, seed=seed, **hyper))


# --- reinforce ---
def test_reinforce_literal_and_gradient() -> None:
    logps, advantages = f64(-3.0, -2.0).requires_grad_(), f64(0.5, -1.5).requires_grad_()
    losses, _ = reinforce(logps, advantages)
    assert losses.tolist() == [0.5 * 3.0, -1.5 * 2.0]
    losses.sum().backward()
    assert logps.grad is not None
    assert logps.grad.tolist() == [-0.5, 1.5]
    assert advantages.grad is None, "advantages are data"


def test_reinforce_expected_gradient_is_that_of_the_expected_reward() -> None:
    """On three arms, the sum over arms of pi * gradient of the loss equals minus d E[r] / d logits."""
    logits, rewards = f64(0.3, -0.2, 1.0).requires_grad_(), f64(1.0, 0.0, 3.0)
    logps = torch.log_softmax(logits, 0)
    losses, _ = reinforce(logps, rewards)
    got = torch.autograd.grad((logps.detach().exp() * losses).sum(), logits)[0]
    expected = torch.autograd.grad((torch.softmax(logits, 0) * rewards).sum(), logits)[0]
    torch.testing.assert_close(got, -expected)


# --- rloo ---
def test_rloo_puts_the_kl_into_the_reward() -> None:
    rewards, beta = np.array([1.0, 0.0, 4.0]), 0.1
    logps, ref = f64(-1.0, -2.0, -3.0).requires_grad_(), f64(-2.0, -2.5, -1.0)
    plain = f64(1.0 - (0 + 4) / 2, 0.0 - (1 + 4) / 2, 4.0 - (1 + 0) / 2)
    losses, metrics = rloo(logps, plain, torch.zeros(3, dtype=torch.long), ref, beta=beta)
    penalised = rewards - beta * np.array([1.0, 0.5, -2.0])
    expected = [
        penalised[i] - np.mean([penalised[j] for j in range(3) if j != i]) for i in range(3)
    ]  # the leave-one-out advantage of the penalised reward
    losses.sum().backward()
    assert logps.grad is not None
    assert (-logps.grad).tolist() == pytest.approx(expected, rel=1e-13)
    assert losses.tolist() == pytest.approx([-a * lp for a, lp in zip(expected, (-1, -2, -3), strict=True)])
    assert metrics["kl"].tolist() == [1.0, 0.5, -2.0]


def test_rloo_at_beta_zero_is_reinforce_and_needs_no_reference() -> None:
    logps, advantages, group = f64(-1.0, -2.0), f64(1.0, -1.0), torch.zeros(2, dtype=torch.long)
    losses, metrics = rloo(logps, advantages, group, beta=0.0)
    assert torch.equal(losses, reinforce(logps, advantages)[0])
    assert "kl" not in metrics
    assert "ref_logps" not in needs(rloo, {"beta": 0.0})
    assert "ref_logps" in needs(rloo)
    with pytest.raises(ObjectiveError, match=r"rloo needs ref_logps while beta is not 0, and beta is 0\.05"):
        rloo(logps, advantages, group)


# --- ppo_clip ---
@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (1.5, 2.0, -1.3 * 2.0, 0.0),  # clipped above, by epsilon_high
        (0.5, 2.0, -0.5 * 2.0, -1.0),  # a good token that got rarer is not clipped
        (0.5, -2.0, 0.8 * 2.0, 0.0),  # clipped below
        (1.5, -2.0, 1.5 * 2.0, 3.0),  # a bad token that got likelier is not clipped
        (1.5, 0.0, 0.0, 0.0),
    ],
)
def test_ppo_clip_literals(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logps = f64(math.log(ratio)).requires_grad_()
    given = (f64(0.0), f64(0.0, advantage), torch.tensor([1]))
    losses, metrics = ppo_clip(logps, *given, epsilon=0.2, epsilon_high=0.3)
    losses.sum().backward()
    assert logps.grad is not None
    assert losses.item() == pytest.approx(loss)
    assert logps.grad.item() == pytest.approx(slope)
    assert metrics["clipped"].item() == float(slope == 0.0 and advantage != 0.0)
    assert metrics["ratio"].item() == pytest.approx(ratio)


def test_advantages_old_policy_and_reference_of_the_reward_are_data() -> None:
    x, old, advantages = (f64(-1.0, -2.0).requires_grad_() for _ in range(3))
    owner = torch.tensor([0, 1])
    for losses, _ in (
        ppo_clip(x, old, advantages, owner),
        grpo(x, old, advantages, owner, x.detach()),
        cispo(x, old, advantages, owner),
        rloo(x, advantages, torch.tensor([0, 0]), old),
        reinforce(x, advantages),
    ):
        losses.sum().backward()
    assert x.grad is not None
    assert old.grad is None
    assert advantages.grad is None


def test_ppo_clip_without_epsilon_high_is_symmetric() -> None:
    losses, _ = ppo_clip(f64(5.0), f64(0.0), f64(1.0), torch.tensor([0]), epsilon=0.2)
    assert losses.item() == pytest.approx(-1.2)


@pytest.mark.parametrize("value", [-1e4, 1e4])
@pytest.mark.parametrize("advantage", [-1.0, 1.0])
def test_no_nan_at_ten_thousand(value: float, advantage: float) -> None:
    logps = torch.tensor([value], requires_grad=True)
    zero = torch.zeros(1)
    losses, metrics = grpo(logps, zero, torch.tensor([advantage]), torch.tensor([0]), zero)
    losses.sum().backward()
    assert logps.grad is not None
    for x in (losses, logps.grad, *metrics.values()):
        assert torch.isfinite(x).all()
    if value < 0:
        assert logps.grad.item() < -1e6, "far below the reference the pull back must not vanish"


# --- cispo ---
@pytest.mark.parametrize(
    ("ratio", "advantage", "weight"),
    [
        (1.0, 2.0, 1.0),
        (0.01, 2.0, 0.01),  # no lower bound
        (4.9, 2.0, 4.9),
        (7.0, 2.0, 5.0),  # capped, and the token still gets its gradient
        (7.0, -2.0, 5.0),  # whatever the sign of the advantage
        (7.0, 0.0, 5.0),
    ],
)
def test_cispo_literals(ratio: float, advantage: float, weight: float) -> None:
    """loss = -weight A log pi; its gradient is -weight A, as the weight is held constant."""
    logps = f64(-3.0).requires_grad_()
    old = f64(-3.0 - math.log(ratio))
    losses, metrics = cispo(logps, old, f64(0.0, advantage), torch.tensor([1]))
    losses.sum().backward()
    assert logps.grad is not None
    assert losses.item() == pytest.approx(3.0 * weight * advantage, rel=1e-13)
    assert logps.grad.item() == pytest.approx(-weight * advantage, rel=1e-13)
    assert metrics["ratio"].item() == pytest.approx(ratio, rel=1e-13)
    assert metrics["capped"].item() == float(ratio > 5.0)


def test_cispo_equals_an_independent_float64_reference() -> None:
    g = np.random.default_rng(1)
    lp = -g.gamma(2.0, 1.0, 60)
    old = lp + g.normal(0, 0.7, 60)
    owner, advantages = g.integers(0, 6, 60), g.normal(0, 1, 6)
    weights = np.minimum(np.exp(lp) / np.exp(old), 1.5)
    given = [torch.from_numpy(x) for x in (lp, old, advantages, owner)]
    given[0].requires_grad_()
    losses, metrics = cispo(*given, epsilon_max=1.5)
    np.testing.assert_allclose(losses.detach().numpy(), -weights * advantages[owner] * lp, rtol=1e-11)
    (slope,) = torch.autograd.grad(losses.sum(), [given[0]])
    np.testing.assert_allclose(slope.numpy(), -weights * advantages[owner], rtol=1e-11)
    assert 0 < metrics["capped"].sum() < 60, "the example must touch the cap"


def test_cispo_on_its_own_samples_is_reinforce() -> None:
    logps, advantages = f64(-1.0, -2.0, -0.5).requires_grad_(), f64(1.5, -0.5)
    owner = torch.tensor([0, 0, 1])
    (per_token,) = torch.autograd.grad(cispo(logps, logps.detach(), advantages, owner)[0].sum(), [logps])
    sums = torch.zeros(2, dtype=torch.float64).index_add(0, owner, logps)
    (whole,) = torch.autograd.grad(reinforce(sums, advantages)[0].sum(), [logps])
    torch.testing.assert_close(per_token, whole)


def test_trap_cispo_cap_is_the_weight_itself_and_not_its_distance_from_one() -> None:
    """At epsilon_max = 5 a ratio of 5.5 weighs 5; read as a distance from 1 the cap would be 6."""
    given = (f64(math.log(5.5)), f64(0.0), f64(1.0), torch.tensor([0]))
    losses, metrics = cispo(*given, epsilon_max=5.0)
    assert losses.item() == pytest.approx(-5.0 * math.log(5.5), rel=1e-13)
    assert metrics["capped"].item() == 1.0
    with pytest.raises(ObjectiveError, match=r"epsilon_max must be >= 1, got 0\.28"):
        cispo(*given, epsilon_max=0.28)


def test_trap_cispo_cap_leaves_the_gradient_that_ppo_clip_takes_away() -> None:
    logps = f64(math.log(7.0)).requires_grad_()
    given = (f64(0.0), f64(1.0), torch.tensor([0]))
    (kept,) = torch.autograd.grad(cispo(logps, *given)[0].sum(), [logps])
    (lost,) = torch.autograd.grad(ppo_clip(logps, *given)[0].sum(), [logps])
    assert kept.item() == -5.0
    assert lost.item() == 0.0


# --- grpo ---
def test_grpo_literal_of_surrogate_and_kl() -> None:
    logps, old, ref = f64(-1.0, -2.0), f64(-1.1, -2.0), f64(-1.5, -1.5)
    losses, metrics = grpo(logps, old, f64(9.0, 0.5), torch.tensor([1, 1]), ref, beta=0.04)
    kl = [math.exp(-0.5) + 0.5 - 1, math.exp(0.5) - 0.5 - 1]
    expected = [-math.exp(0.1) * 0.5 + 0.04 * kl[0], -0.5 + 0.04 * kl[1]]
    assert losses.tolist() == pytest.approx(expected, rel=1e-13)
    assert metrics["kl"].tolist() == pytest.approx(kl, rel=1e-13)


def test_grpo_equals_an_independent_float64_reference() -> None:
    g = np.random.default_rng(0)
    lp, old, ref = (-g.gamma(2.0, 1.0, 40) for _ in range(3))
    old, ref = lp + 0.3 * (old - lp), lp + 0.3 * (ref - lp)
    owner, advantages = g.integers(0, 6, 40), g.normal(0, 1, 6)
    expected = []
    for t in range(40):
        a, r = advantages[owner[t]], math.exp(lp[t]) / math.exp(old[t])
        kept = min(r, 1.28) if a > 0 else max(r, 0.8)
        q = math.exp(ref[t]) / math.exp(lp[t])
        expected.append(-kept * a + 0.1 * (q - math.log(q) - 1))
    given = map(torch.from_numpy, (lp, old, advantages, owner, ref))
    losses, metrics = grpo(*given, beta=0.1, epsilon=0.2, epsilon_high=0.28)
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-11, atol=1e-12)
    assert 0 < metrics["clipped"].sum() < 40, "the example must touch the clip"


def test_grpo_needs_the_reference_only_while_beta_is_not_zero() -> None:
    assert "ref_per_token_logps" in needs(grpo)
    assert "ref_per_token_logps" not in needs(grpo, {"beta": 0.0})
    given = (f64(-1.0), f64(-1.0), f64(1.0), torch.tensor([0]))
    losses, metrics = grpo(*given, beta=0.0)
    assert losses.tolist() == [-1.0]
    assert "kl" not in metrics
    with pytest.raises(ObjectiveError, match="grpo needs ref_per_token_logps while beta is not 0"):
        grpo(*given)


# --- k3 ---
ARMS, REF = f64(0.5, 0.3, 0.2), f64(0.2, 0.2, 0.6)


def test_k3_is_unbiased_in_value() -> None:
    kl = (ARMS * (ARMS / REF).log()).sum()
    assert (ARMS * k3(ARMS.log(), REF.log())).sum().item() == pytest.approx(kl.item(), rel=1e-13)


def test_trap_k3_differentiated_follows_the_other_kl() -> None:
    """Samples held fixed, the expected gradient of k3 is that of KL(ref || pi), not of KL(pi || ref)."""
    logits = ARMS.log().requires_grad_()
    logps = torch.log_softmax(logits, 0)
    got = torch.autograd.grad((ARMS * k3(logps, REF.log())).sum(), logits, retain_graph=True)[0]
    other = torch.autograd.grad((REF * (REF.log() - logps)).sum(), logits, retain_graph=True)[0]
    named = torch.autograd.grad((logps.exp() * (logps - REF.log())).sum(), logits)[0]
    torch.testing.assert_close(got, other)
    assert (got - named).abs().max() > 0.05


def test_k3_is_zero_at_the_reference_never_negative_and_exact_up_close() -> None:
    assert k3(f64(-2.0), f64(-2.0)).item() == 0.0
    d = torch.linspace(-30, 19, 200, dtype=torch.float64)
    assert (k3(torch.zeros_like(d), d) >= 0).all()
    near = torch.tensor([1e-3])  # float32: 1e-3 squared over two, not the rounding of exp
    assert k3(torch.zeros(1), near).item() == pytest.approx(0.5e-6 + 1e-9 / 6, rel=1e-3)


def test_k3_goes_on_as_a_tangent_beyond_the_limit() -> None:
    values = k3(f64(0.0, 0.0, 0.0), f64(20.0, 21.0, 22.0))
    assert values[0].item() == pytest.approx(math.exp(20) - 21, rel=1e-14)
    steps = values.diff()
    assert steps.tolist() == pytest.approx([math.exp(20) - 1] * 2, rel=1e-12)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, o: ppo_clip(x, x, x, o, epsilon=0.0), "epsilon must be > 0 and < 1, got 0.0"),
        (lambda x, o: ppo_clip(x, x, x, o, epsilon=1), "epsilon must be > 0 and < 1, got 1"),
        (lambda x, o: ppo_clip(x, x, x, o, epsilon_high=-0.2), "epsilon_high must be > 0, got -0.2"),
        (lambda x, o: grpo(x, x, x, o, x, beta=-0.04), "beta must be >= 0, got -0.04"),
        (lambda x, o: rloo(x, x, o, x, beta=-1), "beta must be >= 0, got -1"),
    ],
)
def test_ranges_are_told_in_one_line(call, message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        call(f64(-1.0), torch.tensor([0]))
    assert str(caught.value) == message
