"""Advantages: literals, an independent reference, groups without spread, missing rewards."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import TABLE, ObjectiveError
from steerwell.objectives.advantages import (
    ADVANTAGES,
    compute,
    group_mean,
    group_mean_std,
    leave_one_out,
    whiten,
)


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


REWARDS, GROUP = f64(1.0, 7.0, 2.0, 6.0, 10.0), torch.tensor([5, 0, 5, 5, 0])  # 1, 2, 6 and 7, 10


def test_trap_group_std_has_ddof_one() -> None:
    std = math.sqrt(((1 - 3) ** 2 + (2 - 3) ** 2 + (6 - 3) ** 2) / 2), math.sqrt((1.5**2 + 1.5**2) / 1)
    expected = [
        (1 - 3) / (std[0] + 1e-4),
        (7 - 8.5) / (std[1] + 1e-4),
        (2 - 3) / (std[0] + 1e-4),
        (6 - 3) / (std[0] + 1e-4),
        (10 - 8.5) / (std[1] + 1e-4),
    ]
    assert group_mean_std(REWARDS, GROUP).tolist() == pytest.approx(expected, rel=1e-13)


def test_group_mean_and_leave_one_out_literals() -> None:
    assert group_mean(REWARDS, GROUP).tolist() == pytest.approx([-2.0, -1.5, -1.0, 3.0, 1.5])
    expected = [1 - (2 + 6) / 2, 7 - 10, 2 - (1 + 6) / 2, 6 - (1 + 2) / 2, 10 - 7]
    assert leave_one_out(REWARDS, GROUP).tolist() == pytest.approx(expected)


def test_whiten_looks_at_the_whole_step() -> None:
    values = np.array([1.0, 7.0, 2.0, 6.0, 10.0])
    expected = (values - values.mean()) / (values.std(ddof=1) + 1e-8)
    assert whiten(REWARDS, GROUP).tolist() == pytest.approx(expected.tolist(), rel=1e-13)


@pytest.mark.parametrize("seed", range(3))
def test_equal_an_independent_reference(seed: int) -> None:
    g = np.random.default_rng(seed)
    rewards, group = g.normal(2, 3, 40), g.integers(0, 9, 40)
    rewards[g.uniform(size=40) < 0.2] = np.nan
    expected = {name: np.zeros(40) for name in ADVANTAGES}
    for i in range(40):
        peers = [j for j in range(40) if group[j] == group[i] and not math.isnan(rewards[j])]
        others = [rewards[j] for j in peers if j != i]
        if math.isnan(rewards[i]):
            continue
        mine, all_known = rewards[peers], rewards[~np.isnan(rewards)]
        expected["whiten"][i] = (rewards[i] - all_known.mean()) / (np.std(all_known, ddof=1) + 1e-8)
        if others:
            expected["group_mean"][i] = rewards[i] - mine.mean()
            expected["group_mean_std"][i] = (rewards[i] - mine.mean()) / (np.std(mine, ddof=1) + 1e-4)
            expected["leave_one_out"][i] = rewards[i] - sum(others) / len(others)
    for name, values in expected.items():
        got = compute(name, torch.from_numpy(rewards), torch.from_numpy(group))
        np.testing.assert_allclose(got.numpy(), values, rtol=1e-10, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("name", ADVANTAGES)
@pytest.mark.parametrize("value", [0.1, 1e4, -0.7, 1 / 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [3, 6, 7, 8])
def test_trap_groups_without_spread_give_exactly_zero(
    name: str, value: float, dtype: torch.dtype, n: int
) -> None:
    rewards = torch.full((n,), value, dtype=dtype)  # the rounded mean of six 0.1 need not be 0.1
    assert compute(name, rewards, torch.zeros(n, dtype=torch.long)).tolist() == [0.0] * n


@pytest.mark.parametrize("name", ["group_mean_std", "group_mean", "leave_one_out"])
def test_a_group_of_one_gives_zero(name: str) -> None:
    assert compute(name, f64(3.0, 9.0), torch.tensor([0, 1])).tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_missing_reward_is_not_zero(name: str) -> None:
    with_gap = compute(name, f64(1.0, math.nan, 2.0, 6.0), torch.zeros(4, dtype=torch.long))
    without = compute(name, f64(1.0, 2.0, 6.0), torch.zeros(3, dtype=torch.long))
    assert with_gap[1].item() == 0.0
    assert torch.equal(with_gap[[0, 2, 3]], without)
    nothing = compute(name, f64(math.nan, math.nan), torch.zeros(2, dtype=torch.long))
    assert nothing.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("name", ADVANTAGES)
def test_they_sum_to_zero_keep_the_dtype_and_have_no_gradient(name: str) -> None:
    rewards = torch.tensor([1.0, 5.0, 2.0, 2.5], requires_grad=True)
    out = compute(name, rewards, torch.tensor([0, 0, 1, 1]))
    assert out.dtype == torch.float32
    assert not out.requires_grad
    assert out.sum().abs() < 1e-6
    assert compute(name, rewards[:0], torch.zeros(0, dtype=torch.long)).shape == (0,)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_far_rewards_are_finite(name: str) -> None:
    out = compute(name, torch.tensor([1e4, -1e4, 1e4, 1e-4]), torch.tensor([0, 0, 0, 1]))
    assert torch.isfinite(out).all()


def test_wrong_input_is_told() -> None:
    with pytest.raises(ObjectiveError, match="advantages must be one of 'group_mean_std', 'group_mean'"):
        compute("gae", REWARDS, GROUP)
    with pytest.raises(ObjectiveError, match=r"rewards and group must both be \(N,\), got \(5,\), \(2,\)"):
        group_mean(REWARDS, GROUP[:2])
    with pytest.raises(ObjectiveError, match=r"eps must be >= 0, got -1"):
        group_mean_std(REWARDS, GROUP, eps=-1)


def test_objectives_name_advantages_that_exist() -> None:
    named = {fn.advantages for fn in TABLE.values() if "advantages" in fn.__code__.co_varnames}  # type: ignore[attr-defined]
    assert named <= set(ADVANTAGES)
    assert {name: TABLE[name].advantages for name in ("grpo", "rloo")} == {
        "grpo": "group_mean_std",
        "rloo": "leave_one_out",
    }
