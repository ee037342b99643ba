"""Token-level pair objectives against literals, an independent float64 reference, DPO, and public traps."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import ObjectiveError, dmpo, dpo, step_dpo, tdpo, tis_dpo, wpo
from steerwell.testing import check_objective


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def whole(*values: int) -> Tensor:
    return torch.tensor(values)


PAIR = torch.tensor([[0], [1]])


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("tdpo", {}),
        ("tdpo", {"beta": 1.0, "alpha": 1.0, "stop_gradient": False}),
        ("wpo", {}),
        ("wpo", {"beta": 1.0, "clamp": False}),
        ("tis_dpo", {}),
        ("tis_dpo", {"beta": 1.0}),
        ("step_dpo", {}),
        ("step_dpo", {"beta": 1.0}),
        ("dmpo", {}),
        ("dmpo", {"beta": 1.0, "gamma": 0.0}),
        ("dmpo", {"beta": 1.0, "gamma": 1.0}),
    ],
)
@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(name: str, hyper: dict[str, float], seed: int) -> None:
    passed = set(check_objective(name, seed=seed, **hyper))
    always = {"sign", "extremes", "empty", "permutation", "copies", "microbatches", "removal"}
    assert always <= passed
    assert ("gradcheck" in passed) == (name not in ("tdpo", "wpo"))


def example(seed: int = 0) -> dict[str, np.ndarray]:
    """Six completions, the tokens of different completions mixed up (each completion's own in their order)."""
    g = np.random.default_rng(seed)
    lengths = g.integers(2, 7, 6)
    owner = g.permutation(np.repeat(np.arange(6), lengths))
    place = np.array([(owner[:i] == c).sum() for i, c in enumerate(owner)])
    tokens = -g.gamma(1.0, 1.0, (2, len(owner)))
    policy, ref = tokens
    return {
        "logps": np.array([policy[owner == c].sum() for c in range(6)]),
        "ref_logps": np.array([ref[owner == c].sum() for c in range(6)]),
        "per_token_logps": policy,
        "ref_per_token_logps": ref,
        "per_token_kl": g.gamma(1.0, 1.0, len(owner)),
        "per_token_collision": -g.gamma(1.0, 1.0, len(owner)),
        "token_weights": g.uniform(0, 2, len(owner)),
        "owner": owner,
        "lengths": lengths.astype(float),
        "turns": place // 2,
        "steps": place // 3,
        "pairs": g.integers(0, 6, (2, 9)),
        "shared_tokens": g.integers(0, 4, 9),
        "pair_probs": g.uniform(0, 1, 9),
    }


def log_odds_loss(margin: float, p: float) -> float:
    return p * math.log(1 + math.exp(-margin)) + (1 - p) * math.log(1 + math.exp(margin))


def of(a: dict[str, np.ndarray], name: str, c: int) -> np.ndarray:
    return a[name][a["owner"] == c]


def ref_tdpo(a, beta, alpha, stop_gradient):
    del stop_gradient  # it changes no value
    out = []
    for (w, r), p in zip(a["pairs"].T, a["pair_probs"], strict=True):
        u = beta * (a["logps"][w] - a["ref_logps"][w]) - beta * (a["logps"][r] - a["ref_logps"][r])
        delta = beta * of(a, "per_token_kl", r).sum() - beta * of(a, "per_token_kl", w).sum()
        out.append(log_odds_loss(u - alpha * delta, p))
    return out


def ref_wpo(a, beta, clamp):
    def weight(c):
        ratios = np.exp(of(a, "per_token_logps", c)) / np.exp(of(a, "per_token_collision", c))
        return np.prod(ratios) ** (1 / len(ratios))  # the geometric mean

    out = []
    for (w, r), p in zip(a["pairs"].T, a["pair_probs"], strict=True):
        margin = beta * (a["logps"][w] - a["ref_logps"][w] - a["logps"][r] + a["ref_logps"][r])
        both = weight(w) * weight(r)
        out.append((min(1.0, both) if clamp else both) * log_odds_loss(margin, p))
    return out


def ref_tis_dpo(a, beta):
    out = []
    for (w, r), p in zip(a["pairs"].T, a["pair_probs"], strict=True):
        side = [
            sum(of(a, "token_weights", c) * (of(a, "per_token_logps", c) - of(a, "ref_per_token_logps", c)))
            for c in (w, r)
        ]
        out.append(log_odds_loss(beta * (side[0] - side[1]), p))
    return out


def ref_step_dpo(a, beta):
    out = []
    for (w, r), shared, p in zip(a["pairs"].T, a["shared_tokens"], a["pair_probs"], strict=True):
        nexts = [steps[shared] for c in (w, r) if len(steps := of(a, "steps", c)) > shared]
        if not nexts:
            out.append(math.log(2))
            continue
        h = [
            (of(a, "per_token_logps", c) - of(a, "ref_per_token_logps", c))[
                of(a, "steps", c) == min(nexts)
            ].sum()
            for c in (w, r)
        ]
        out.append(log_odds_loss(beta * (h[0] - h[1]), p))
    return out


def ref_dmpo(a, beta, gamma):
    """From the derivation: the discounted mean over turns of the log-ratio of all that was done up to each turn."""

    def reward(c):
        h = of(a, "per_token_logps", c) - of(a, "ref_per_token_logps", c)
        turns = of(a, "turns", c)
        discounts = np.array([gamma**t for t in range(turns.max() + 1)])
        so_far = np.array([h[turns <= t].sum() for t in range(turns.max() + 1)])
        return beta * (discounts * so_far).sum() / discounts.sum()

    return [
        log_odds_loss(reward(w) - reward(r), p)
        for (w, r), p in zip(a["pairs"].T, a["pair_probs"], strict=True)
    ]


@pytest.mark.parametrize(
    ("ours", "reference", "hyper"),
    [
        (tdpo, ref_tdpo, {"beta": 0.1, "alpha": 0.5, "stop_gradient": True}),
        (tdpo, ref_tdpo, {"beta": 0.8, "alpha": 1.0, "stop_gradient": False}),
        (wpo, ref_wpo, {"beta": 0.1, "clamp": True}),
        (wpo, ref_wpo, {"beta": 0.8, "clamp": False}),
        (tis_dpo, ref_tis_dpo, {"beta": 0.4}),
        (step_dpo, ref_step_dpo, {"beta": 0.4}),
        (dmpo, ref_dmpo, {"beta": 0.1, "gamma": 0.7}),
        (dmpo, ref_dmpo, {"beta": 0.8, "gamma": 0.2}),
        (dmpo, ref_dmpo, {"beta": 0.8, "gamma": 1.0}),
        (dmpo, ref_dmpo, {"beta": 0.8, "gamma": 0.0}),
    ],
)
@pytest.mark.parametrize("seed", range(4))
def test_equals_an_independent_float64_reference(
    ours: Callable[..., Any], reference: Callable[..., Any], hyper: dict[str, Any], seed: int
) -> None:
    arrays = example(seed)
    count = ours.__code__.co_argcount
    names = ours.__code__.co_varnames[:count]
    losses, metrics = ours(**{name: torch.from_numpy(arrays[name]) for name in names}, **hyper)
    np.testing.assert_allclose(losses.numpy(), reference(arrays, **hyper), rtol=1e-11, atol=1e-13)
    assert all(len(x) == 9 for x in metrics.values())


# --- TDPO ---
def test_tdpo_literal() -> None:
    # h = (2, 1), D = (3, 5): margin 0.5 (2 - 1) - 0.5 * 0.5 (5 - 3) = 0
    losses, metrics = tdpo(f64(2.0, 1.0), f64(0.0, 0.0), f64(1.0, 2.0, 5.0), whole(0, 0, 1), PAIR, beta=0.5)
    torch.testing.assert_close(losses, f64(math.log(2)))
    assert metrics["kl/chosen"].tolist() == [3.0]
    assert metrics["kl/rejected"].tolist() == [5.0]


def tdpo_slopes(pair_probs: Tensor | None = None, **hyper: Any) -> tuple[Tensor, Tensor]:
    logps, kl = f64(2.0, 1.0).requires_grad_(), f64(1.0, 2.0, 5.0).requires_grad_()
    losses, _ = tdpo(logps, f64(0.0, 0.0), kl, whole(0, 0, 1), PAIR, pair_probs, **hyper)
    by_logps, by_kl = torch.autograd.grad(losses.sum(), (logps, kl))
    return by_logps, by_kl


def test_trap_tdpo_stops_the_gradient_on_the_chosen_side() -> None:
    by_logps, by_kl = tdpo_slopes(beta=0.5, alpha=0.5)
    torch.testing.assert_close(by_logps, f64(-0.25, 0.25))
    torch.testing.assert_close(by_kl, f64(0.0, 0.0, 0.125))  # only the rejected side is held to the reference
    _, by_kl = tdpo_slopes(beta=0.5, alpha=0.5, stop_gradient=False)
    torch.testing.assert_close(
        by_kl, f64(-0.125, -0.125, 0.125)
    )  # the chosen side is rewarded for leaving it


def test_tdpo_with_a_soft_label_stops_the_side_that_is_taken_for_preferred() -> None:
    _, by_kl = tdpo_slopes(f64(0.75), beta=0.5, alpha=0.5)
    torch.testing.assert_close(by_kl, f64(0.25 * 0.125, 0.25 * 0.125, 0.75 * 0.125))


def test_tdpo1_is_exactly_differentiable() -> None:
    def losses(logps: Tensor, kl: Tensor) -> Tensor:
        return tdpo(
            logps, f64(0.5, -1.0), kl, whole(0, 0, 1), PAIR, beta=0.5, alpha=1.0, stop_gradient=False
        )[0]

    inputs = (f64(2.0, 1.0).requires_grad_(), f64(1.0, 2.0, 5.0).requires_grad_())
    assert torch.autograd.gradcheck(losses, inputs)


def test_tdpo_without_alpha_is_dpo() -> None:
    a = {name: torch.from_numpy(x) for name, x in example().items()}
    ours = tdpo(a["logps"], a["ref_logps"], a["per_token_kl"], a["owner"], a["pairs"], alpha=0.0)[0]
    torch.testing.assert_close(ours, dpo(a["logps"], a["ref_logps"], a["pairs"])[0])


# --- WPO ---
def wpo_of(collision: Tensor, **hyper: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    logps = f64(-1.0, -3.0, -2.0).requires_grad_()
    lengths = f64(2.0, 1.0)
    losses, metrics = wpo(logps, f64(-1.0, -3.0, -2.0), collision, whole(0, 0, 1), lengths, PAIR, **hyper)
    return losses.detach(), metrics, torch.autograd.grad(losses.sum(), logps)[0]


def test_wpo_literal() -> None:
    # mean alignment (-1 - 3 + 0.5 + 1.5) / 2 = -1 of the chosen, -2 + 1.5 = -0.5 of the rejected
    losses, metrics, slopes = wpo_of(f64(-0.5, -1.5, -1.5), beta=0.1)
    torch.testing.assert_close(metrics["weights"], f64(math.exp(-1.5)))
    torch.testing.assert_close(losses, f64(math.exp(-1.5) * math.log(2)))
    # the weight is held constant: only DPO's own gradient, times the weight
    torch.testing.assert_close(slopes, math.exp(-1.5) * f64(-0.05, -0.05, 0.05))


def test_trap_wpo_clamps_the_product_of_the_weights() -> None:
    collision = f64(-2.0, -4.0, -1.0)  # alignment 1 of the chosen, -1 of the rejected: product 1
    assert wpo_of(collision)[1]["weights"].tolist() == [1.0]
    collision = f64(
        -3.0, -5.0, -1.5
    )  # alignment 2 and -0.5: e^1.5; each weight clamped by itself would give e^-0.5
    torch.testing.assert_close(wpo_of(collision)[1]["weights"], f64(1.0))
    torch.testing.assert_close(wpo_of(collision, clamp=False)[1]["weights"], f64(math.exp(1.5)))


# --- TIS-DPO ---
def test_tis_dpo_literal() -> None:
    # h = 2 * 1 + 0 * 7 = 2 of the chosen, -1 * 3 of the rejected
    losses, metrics = tis_dpo(
        f64(1.0, 7.0, 3.0),
        f64(0.0, 0.0, 0.0),
        f64(2.0, 0.0, -1.0),
        whole(0, 0, 1),
        f64(2.0, 1.0),
        PAIR,
        beta=0.2,
    )
    torch.testing.assert_close(losses, f64(math.log1p(math.exp(-1))))
    assert metrics["logps/chosen"].tolist() == [8.0]


def test_tis_dpo_with_weights_of_one_is_dpo() -> None:
    a = {name: torch.from_numpy(x) for name, x in example().items()}
    ours = tis_dpo(
        a["per_token_logps"],
        a["ref_per_token_logps"],
        torch.ones_like(a["token_weights"]),
        a["owner"],
        a["lengths"],
        a["pairs"],
    )[0]
    torch.testing.assert_close(ours, dpo(a["logps"], a["ref_logps"], a["pairs"])[0])


# --- Step-DPO ---
def step_example(shared: int) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """Two solutions of three steps; step 0 (two tokens) is the same, in step 1 one token more is."""
    chosen, rejected = [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0], [-1.0, -2.0, -3.0, -8.0, -9.0]
    logps = f64(*chosen, *rejected).requires_grad_()
    losses, metrics = step_dpo(
        logps,
        torch.zeros(11).double(),
        whole(*[0] * 6, *[1] * 5),
        f64(6.0, 5.0),
        whole(0, 0, 1, 1, 1, 2, 0, 0, 1, 1, 2),
        PAIR,
        whole(shared),
        beta=0.1,
    )
    return losses.detach(), metrics, torch.autograd.grad(losses.sum(), logps)[0]


def test_step_dpo_counts_only_the_step_in_which_they_part() -> None:
    losses, metrics, slopes = step_example(shared=3)
    torch.testing.assert_close(losses, f64(math.log1p(math.exp(-0.1 * (-12 + 11)))))
    assert metrics["logps/chosen"].tolist() == [-12.0]
    assert metrics["logps/rejected"].tolist() == [-11.0]
    pull = 0.1 / (1 + math.exp(-0.1))  # beta s(-margin), with a margin of -0.1
    expected = [0, 0, -pull, -pull, -pull, 0, 0, 0, pull, pull, 0]
    torch.testing.assert_close(slopes, f64(*expected))


def test_step_dpo_with_the_history_in_the_prompt_is_the_same() -> None:
    """The paper's data: the prompt holds step 0, the completions begin with the step in question."""
    losses, _ = step_dpo(
        f64(-3.0, -4.0, -5.0, -3.0, -8.0),
        torch.zeros(5).double(),
        whole(0, 0, 0, 1, 1),
        f64(3.0, 2.0),
        whole(0, 0, 0, 0, 0),
        PAIR,
        whole(0),
        beta=0.1,
    )
    torch.testing.assert_close(losses, step_example(shared=3)[0])
    torch.testing.assert_close(losses, step_example(shared=2)[0])  # where in the step they part is all one


def test_step_dpo_where_one_step_goes_on_and_the_other_is_over() -> None:
    # tokens 0 and 1 are shared; the chosen one's step 0 has a third token, the rejected one is in step 1 by then
    losses, metrics = step_dpo(
        f64(-1.0, -1.0, -2.0, -1.0, -1.0, -7.0),
        torch.zeros(6).double(),
        whole(0, 0, 0, 1, 1, 1),
        f64(3.0, 3.0),
        whole(0, 0, 0, 0, 0, 1),
        PAIR,
        whole(2),
        beta=1.0,
    )
    torch.testing.assert_close(losses, f64(math.log1p(math.exp(4 - 2))))
    assert metrics["logps/rejected"].tolist() == [-2.0]


def test_step_dpo_of_identical_completions_teaches_nothing() -> None:
    logps = f64(-1.0, -2.0, -1.0, -2.0).requires_grad_()
    zero = torch.zeros(4)
    losses, _ = step_dpo(
        logps, zero.double(), whole(0, 0, 1, 1), f64(2.0, 2.0), whole(0, 1, 0, 1), PAIR, whole(2)
    )
    torch.testing.assert_close(losses.detach(), f64(math.log(2)))
    assert not torch.autograd.grad(losses.sum(), logps)[0].any()


# --- DMPO ---
def dmpo_weights(turns: Tensor, gamma: float) -> list[float]:
    """phi of each token: the slope of the chosen completion's reward at beta = 1."""
    tokens = len(turns)
    logps = torch.zeros(tokens + 1, dtype=torch.float64, requires_grad=True)
    owner = torch.cat([torch.zeros(tokens), torch.ones(1)]).long()
    every = torch.cat([turns, whole(0)])
    losses, _ = dmpo(
        logps, torch.zeros(tokens + 1).double(), owner, f64(tokens, 1.0), every, PAIR, beta=1.0, gamma=gamma
    )
    return (-2 * torch.autograd.grad(losses.sum(), logps)[0][:-1]).tolist()  # s(0) = 1/2


def test_trap_dmpo_normalises_the_discount_by_the_number_of_turns() -> None:
    """phi(t, T) is not gamma^t, and begins with 1 however long the conversation."""
    assert dmpo_weights(whole(0, 0, 1), 0.5) == pytest.approx([1.0, 1.0, 1 / 3])
    assert dmpo_weights(whole(0, 1, 2, 2), 0.5) == pytest.approx([1.0, 3 / 7, 1 / 7, 1 / 7])
    assert dmpo_weights(whole(0, 1, 2), 1.0) == pytest.approx([1.0, 2 / 3, 1 / 3])
    assert dmpo_weights(whole(0, 1, 2), 0.0) == [1.0, 0.0, 0.0]
    assert dmpo_weights(whole(0, 1, 2), 1 - 1e-12) == pytest.approx([1.0, 2 / 3, 1 / 3], rel=1e-9)


def test_dmpo_of_one_turn_is_dpo() -> None:
    a = {name: torch.from_numpy(x) for name, x in example().items()}
    ours = dmpo(
        a["per_token_logps"],
        a["ref_per_token_logps"],
        a["owner"],
        a["lengths"],
        torch.zeros_like(a["turns"]),
        a["pairs"],
    )[0]
    torch.testing.assert_close(ours, dpo(a["logps"], a["ref_logps"], a["pairs"])[0])


@pytest.mark.parametrize("gamma", [-0.1, 1.1])
def test_dmpo_discount_has_a_range(gamma: float) -> None:
    with pytest.raises(ObjectiveError, match=r"^gamma must be >= 0 and <= 1"):
        dmpo_weights(whole(0), gamma)
