"""Length penalties, length means, shared lengths: literals, and the traps of public versions."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from steerwell.objectives import dpo, ld_dpo, ln_dpo, r_dpo

PAIR = torch.tensor([[0], [1]])


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


GIVEN = (f64(-1.0, -5.0), f64(-2.0, -2.0))  # h_w = 1, h_l = -3
LENGTHS = f64(30.0, 10.0)


# --- r_dpo ---
def test_r_dpo_literal() -> None:
    losses, metrics = r_dpo(*GIVEN, LENGTHS, PAIR, beta=0.5, alpha=0.05)
    assert losses.item() == pytest.approx(softplus(-(0.5 * 4 + 0.05 * 20)), rel=1e-14)
    assert metrics["rewards/margins"].item() == 2.0, "the reward is shown without the price of length"
    assert torch.equal(r_dpo(*GIVEN, LENGTHS, PAIR, alpha=0.0)[0], dpo(*GIVEN, PAIR)[0])


def trained_mean_length(alpha: float) -> float:
    """A policy over four completions of lengths 1 to 4, trained on every pair with labels that follow quality and
    like length a little; the mean length of what it then writes.
    """
    lengths = f64(1.0, 2.0, 3.0, 4.0)
    reward = f64(0.0, 0.4, 0.1, 0.6) + 0.3 * lengths
    pairs = torch.combinations(torch.arange(4)).T.contiguous()
    probs = torch.sigmoid(reward[pairs[0]] - reward[pairs[1]])
    ref = torch.log_softmax(f64(0.3, -0.1, 0.2, 0.0), 0)
    logits = ref.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = r_dpo(torch.log_softmax(logits, 0), ref, lengths, pairs, probs, beta=1.0, alpha=alpha)[
            0
        ].sum()
        value.backward()
        return value

    optimizer.step(loss)
    policy = torch.softmax(logits.detach(), 0)
    optimum = torch.softmax(ref + reward - alpha * lengths, 0)  # ref exp((r - alpha |y|) / beta) / Z
    torch.testing.assert_close(policy, optimum, rtol=1e-5, atol=1e-6)
    return (policy * lengths).sum().item()


def test_trap_r_dpo_sign_shortens() -> None:
    plain, priced, dear = (trained_mean_length(alpha) for alpha in (0.0, 0.3, 1.0))
    assert plain > priced + 0.2
    assert priced > dear + 0.4


def test_trap_r_dpo_pushes_a_long_chosen_completion_less_and_a_short_one_more() -> None:
    def push(lengths: Tensor) -> float:
        logps = GIVEN[0].clone().requires_grad_()
        r_dpo(logps, GIVEN[1], lengths, PAIR, alpha=0.05)[0].sum().backward()
        assert logps.grad is not None
        return -logps.grad[0].item()

    assert push(LENGTHS) < push(f64(20.0, 20.0)) < push(LENGTHS.flip(0))


# --- ln_dpo ---
def test_trap_ln_dpo_takes_the_mean_of_each_side_not_of_the_difference() -> None:
    losses, metrics = ln_dpo(*GIVEN, LENGTHS, PAIR, beta=5.0)
    assert losses.item() == pytest.approx(softplus(-5 * (1 / 30 + 3 / 10)), rel=1e-14)
    assert metrics["rewards/chosen"].item() == pytest.approx(5 / 30)
    assert metrics["rewards/rejected"].item() == pytest.approx(-5 * 3 / 10)


# --- ld_dpo ---
# completion 0: three tokens, d = 1, 0.5, 2; completion 1: one token, d = -1. Tokens lie mixed, in order.
OWNER = torch.tensor([0, 1, 0, 0])
TOKENS, REF = f64(-1.0, -3.0, -0.5, -1.0), f64(-2.0, -2.0, -1.0, -3.0)
COUNTS = f64(3.0, 1.0)


def test_ld_dpo_literal() -> None:
    losses, metrics = ld_dpo(TOKENS, REF, OWNER, COUNTS, PAIR, beta=0.5, alpha=0.3)
    assert losses.item() == pytest.approx(softplus(-0.5 * (1 + 0.3 * 2.5 + 1)), rel=1e-14)
    assert metrics["rewards/chosen"].item() == pytest.approx(0.5 * 1.75)
    assert metrics["logps/chosen"].item() == -2.5, "log-probabilities are shown as plain sums"
    assert metrics["logps/rejected"].item() == -3.0


def test_ld_dpo_is_dpo_at_one_and_cuts_at_zero() -> None:
    whole = dpo(f64(-2.5, -3.0), f64(-6.0, -2.0), PAIR)[0]
    torch.testing.assert_close(ld_dpo(TOKENS, REF, OWNER, COUNTS, PAIR, alpha=1.0)[0], whole)
    tokens = TOKENS.clone().requires_grad_()
    losses, _ = ld_dpo(tokens, REF, OWNER, COUNTS, PAIR, alpha=0.0)
    torch.testing.assert_close(losses, dpo(f64(-1.0, -3.0), f64(-2.0, -2.0), PAIR)[0])
    losses.sum().backward()
    assert tokens.grad is not None
    assert (tokens.grad != 0).tolist() == [True, True, False, False]


def test_trap_ld_dpo_weighs_the_reference_too() -> None:
    start, _ = ld_dpo(TOKENS, TOKENS, OWNER, COUNTS, PAIR, alpha=0.3)
    assert start.item() == pytest.approx(math.log(2), rel=1e-15)


def test_trap_ld_dpo_shared_length_belongs_to_the_pair_not_to_the_batch() -> None:
    # completion 2 is as long as 0: between those two nothing is beyond the shared length
    owner = torch.cat([OWNER, torch.tensor([2, 2, 2])])
    tokens, ref = torch.cat([TOKENS, f64(-1.0, -1.0, -1.0)]), torch.cat([REF, f64(-1.0, -1.5, -1.0)])
    lengths, pairs = f64(3.0, 1.0, 3.0), torch.tensor([[0, 0], [1, 2]])
    losses, _ = ld_dpo(tokens, ref, owner, lengths, pairs, beta=0.5, alpha=0.3)
    expected = [softplus(-0.5 * (1.75 + 1)), softplus(-0.5 * (3.5 - 0.5))]
    assert losses.tolist() == pytest.approx(expected, rel=1e-14)


def test_ld_dpo_takes_completions_without_tokens() -> None:
    losses, _ = ld_dpo(TOKENS, REF, OWNER, f64(3.0, 1.0, 0.0), torch.tensor([[0], [2]]), beta=0.5, alpha=0.3)
    assert losses.item() == pytest.approx(softplus(-0.5 * 0.3 * 3.5), rel=1e-14)
