"""The loss of process reward models against literals and an independent float64 reference."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steerwell.objectives import denominator, process_reward, reduce
from steerwell.objectives.table import objective
from steerwell.testing import check_objective, made_up

NAN = float("nan")


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(seed: int) -> None:
    assert {"removal", "microbatches", "sign", "gradcheck"} <= set(check_objective(process_reward, seed=seed))


def test_literals_hard_and_soft() -> None:
    losses, metrics = process_reward(f64(0.0, 2.0, 2.0, -1.0), f64(1.0, 1.0, 0.0, 0.25))
    assert losses.tolist() == pytest.approx(
        [
            math.log(2),
            math.log(1 + math.exp(-2)),
            math.log(1 + math.exp(2)),
            0.25 * math.log(1 + math.exp(1)) + 0.75 * math.log(1 + math.exp(-1)),
        ],
        rel=1e-14,
    )
    assert {name: x.tolist() for name, x in metrics.items()} == {
        "accuracy": [0.5, 1.0, 0.0, 1.0],
        "scores/right": [0.0, 2.0],
        "scores/wrong": [2.0, -1.0],
    }


def test_a_step_without_a_label_is_neither_wrong_nor_counted() -> None:
    scores, labels = f64(3.0, -3.0, 1.0).requires_grad_(), f64(1.0, NAN, 0.5)
    losses, metrics = process_reward(scores, labels)
    assert losses.shape == (2,)
    count = denominator("step_mean", {"step_labels": labels})
    assert count == 2.0
    reduce(losses, "step_mean", denominator=count).backward()
    assert scores.grad is not None
    assert scores.grad[1] == 0.0
    assert scores.grad[0].item() == pytest.approx(-(1 - 1 / (1 + math.exp(-3))) / 2)
    assert metrics["accuracy"].tolist() == [1.0], "a label of 0.5 is neither right nor wrong"


def test_the_best_score_of_a_soft_label_is_its_log_odds() -> None:
    scores = f64(math.log(0.7 / 0.3)).requires_grad_()
    process_reward(scores, f64(0.7))[0].sum().backward()
    assert scores.grad is not None
    assert abs(scores.grad.item()) < 1e-15


@pytest.mark.parametrize("seed", range(3))
def test_equals_an_independent_float64_reference(seed: int) -> None:
    g = np.random.default_rng(seed)
    scores, labels = g.normal(0, 3, 20), g.uniform(0, 1, 20)
    labels[g.random(20) < 0.3] = np.nan
    p = 1 / (1 + np.exp(-scores))
    expected = [-y * np.log(q) - (1 - y) * np.log(1 - q) for y, q in zip(labels, p, strict=True) if y == y]
    losses, _ = process_reward(*map(torch.from_numpy, (scores, labels)))
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-10)


def test_made_up_steps_have_every_kind_of_label() -> None:
    batch = made_up(("step_scores", "step_labels"), prompts=3)
    labels, owner = batch["step_labels"], batch["step_owner"]
    assert (labels > 0.5).any()
    assert (labels < 0.5).any()
    assert labels.isnan().any()
    assert torch.equal(owner.unique(), torch.arange(12))
    pairs = torch.stack([batch["owner"], made_up(("steps",), prompts=3)["steps"]]).unique(dim=1)
    assert torch.equal(pairs[0], owner)


def mutant(name: str, loss: Any) -> Any:
    def fn(step_scores: Tensor, step_labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return loss(step_scores, step_labels), {}

    fn.__name__ = name
    return fn


@pytest.mark.parametrize(
    ("name", "loss", "caught_by"),
    [
        ("turned_round", lambda x, y: process_reward(-x, y)[0], "sign"),
        ("missing_is_wrong", lambda x, y: process_reward(x, y.nan_to_num())[0], "shape"),
        ("divides", lambda x, y: process_reward(x, y)[0] / max(1, len(x)), "copies"),
        ("leaks", lambda x, y: process_reward(x + x.mean(), y)[0], "removal"),
    ],
)
def test_the_checks_catch_wrong_step_objectives(
    name: str, loss: Any, caught_by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steerwell.objectives import table

    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))
    fn = objective(unit="step", kind="reward")(mutant(name, loss))
    with pytest.raises(AssertionError, match=rf"(?m)^{caught_by}:"):
        check_objective(fn)
