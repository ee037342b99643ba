"""Every pair objective: the exported checks, an independent float64 reference, soft labels, extremes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from pair_papers import Side, paper
from torch import Tensor

from steerwell.objectives import ObjectiveError, check_hyperparameters, explain, get, needs, optional
from steerwell.testing import check_objective

CASES: list[tuple[str, dict[str, Any]]] = [
    ("robust_dpo", {}),
    ("robust_dpo", {"beta": 1.0, "flip_rate": 0.4}),
    ("robust_dpo", {"flip_rate": 0.0}),
    ("hinge", {}),
    ("hinge", {"beta": 0.7}),
    ("dpop", {}),
    ("dpop", {"beta": 0.3, "lam": 5.0}),
    ("discopop", {}),
    ("discopop", {"beta": 0.5, "tau": 1.0}),
    ("dpo_shift", {}),
    ("dpo_shift", {"beta": 1.0, "lam": 0.5}),
    ("exo_pair", {}),
    ("exo_pair", {"beta": 1.0, "epsilon": 0.2}),
    ("spin", {}),
    ("spin", {"beta": 5.0}),
    ("apo_zero", {}),
    ("apo_zero", {"beta": 1.0}),
    ("apo_down", {}),
    ("apo_down", {"beta": 1.0}),
    ("nca_pair", {}),
    ("nca_pair", {"beta": 1.0}),
    ("bco_pair", {}),
    ("bco_pair", {"beta": 0.5, "delta": -1.5}),
    ("cal_dpo", {}),
    ("cal_dpo", {"beta": 0.5}),
    ("f_dpo", {}),
    ("f_dpo", {"divergence": "forward_kl", "beta": 0.5}),
    ("f_dpo", {"divergence": "js", "beta": 1.0}),
    ("f_dpo", {"divergence": "alpha"}),
    ("f_dpo", {"divergence": "alpha", "alpha": 0.2}),
    ("f_dpo", {"divergence": "chi2"}),
    ("chi_po", {}),
    ("chi_po", {"beta": 0.5, "r_max": 1.0}),
    ("r_dpo", {}),
    ("r_dpo", {"beta": 1.0, "alpha": 0.3}),
    ("ln_dpo", {}),
    ("ln_dpo", {"beta": 0.5}),
    ("ld_dpo", {}),
    ("ld_dpo", {"beta": 1.0, "alpha": 0.3}),
    ("ld_dpo", {"alpha": 0.0}),
    ("odpo", {}),
    ("odpo", {"beta": 1.0, "alpha": 0.5}),
    ("rebel", {}),
    ("rebel", {"eta": 0.2}),
    ("sppo", {}),
    ("sppo", {"eta": 2.0}),
    ("cpo", {}),
    ("cpo", {"beta": 1.0, "alpha": 0.3, "nll": "sum"}),
    ("orpo", {}),
    ("orpo", {"lam": 2.0}),
    ("slic", {}),
    ("slic", {"delta": 10.0, "lam": 0.5}),
    ("alpha_po", {}),
    ("alpha_po", {"alpha": -0.5, "beta": 1.0, "gamma": 1.0}),
    ("alpha_po", {"alpha": 0.0}),
]
NAMES = sorted({name for name, _ in CASES})
#: A soft label has no meaning: the label is certain by definition, or is in the scores.
HARD = {"spin", "odpo", "rebel"}


@pytest.mark.parametrize(("name", "hyper"), CASES)
@pytest.mark.parametrize("seed", range(3))
def test_passes_the_exported_checks(name: str, hyper: dict[str, Any], seed: int) -> None:
    assert len(check_objective(name, seed=seed, **hyper)) == 9


def example(seed: int) -> tuple[dict[str, Tensor], list[tuple[Side, Side]]]:
    """Seven completions and twelve pairs of them, as tensors and as plain numbers; tokens lie mixed up."""
    g = np.random.default_rng(seed)
    size = g.integers(1, 9, 7)
    owner = g.permutation(np.repeat(np.arange(7), size))
    tokens = -g.gamma(1.5, 0.8, len(owner)) - 0.02
    ref = tokens + g.normal(0, 0.4, len(owner))
    score = g.normal(0, 2, 7)
    sides = [
        Side(
            tokens[owner == i].sum(), ref[owner == i].sum(), float(size[i]), score[i], tokens[owner == i],
            ref[owner == i],
        )
        for i in range(7)
    ]  # fmt: skip
    pairs = np.stack([g.permutation(7)[:2] for _ in range(12)], axis=1)
    arrays = {
        "logps": np.array([y.lp for y in sides]),
        "ref_logps": np.array([y.ref for y in sides]),
        "lengths": size.astype(float),
        "scores": score,
        "pairs": pairs,
        "pair_probs": g.uniform(0, 1, 12),
        "per_token_logps": tokens,
        "ref_per_token_logps": ref,
        "owner": owner,
    }
    tensors = {name: torch.from_numpy(np.asarray(x)) for name, x in arrays.items()}
    return tensors, [(sides[w], sides[r]) for w, r in pairs.T]


@pytest.mark.parametrize(
    ("name", "hyper", "soft"),
    [(name, hyper, soft) for name, hyper in CASES for soft in (False, True) if not (soft and name in HARD)],
)
@pytest.mark.parametrize("seed", range(3))
def test_equals_the_paper(name: str, hyper: dict[str, Any], soft: bool, seed: int) -> None:
    tensors, sides = example(seed)
    fn = get(name)
    given = {key: tensors[key] for key in needs(fn, hyper)}
    probs: list[float | None] = [None] * len(sides)
    if soft:
        given["pair_probs"] = tensors["pair_probs"]
        probs = tensors["pair_probs"].tolist()
    losses, metrics = fn(**given, **hyper)
    expected = [paper(name, w, r, p, **hyper) for (w, r), p in zip(sides, probs, strict=True)]
    np.testing.assert_allclose(losses.numpy(), expected, rtol=1e-11, atol=1e-12)
    w, r = ([pair[i].lp for pair in sides] for i in (0, 1))
    np.testing.assert_allclose(metrics["logps/chosen"].numpy(), w, rtol=1e-12)
    np.testing.assert_allclose(metrics["logps/rejected"].numpy(), r, rtol=1e-12)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in HARD])
def test_a_soft_label_of_one_is_the_hard_label_and_of_zero_the_pair_turned_round(name: str) -> None:
    tensors, _ = example(5)
    fn = get(name)
    given = {key: tensors[key] for key in needs(fn)}
    ones = torch.ones_like(tensors["pair_probs"])
    hard = fn(**given)[0]
    torch.testing.assert_close(fn(**given, pair_probs=ones)[0], hard, rtol=1e-12, atol=1e-12)
    turned = fn(**{**given, "pairs": given["pairs"].flip(0)})[0]
    torch.testing.assert_close(fn(**given, pair_probs=0 * ones)[0], turned, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_soft_labels_are_taken_where_they_mean_something(name: str) -> None:
    assert ("pair_probs" in optional(get(name))) == (name not in HARD)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("far", [-1e4, 1e4])
def test_finite_in_float32_when_the_sides_are_ten_thousand_nats_apart(name: str, far: float) -> None:
    logps = torch.tensor([min(far, 0.0), min(-far, 0.0)])
    learnt = "per_token_logps" if name == "ld_dpo" else "logps"
    given = {
        "logps": logps, "ref_logps": logps.flip(0), "lengths": torch.ones(2), "scores": torch.tensor([2.0, 0.5]),
        "pairs": torch.tensor([[0], [1]]), "per_token_logps": logps, "ref_per_token_logps": logps.flip(0),
        "owner": torch.arange(2),
    }  # fmt: skip
    given[learnt] = logps.clone().requires_grad_()
    losses, metrics = get(name)(**{key: given[key] for key in needs(get(name))})
    losses.sum().backward()
    grad = given[learnt].grad
    assert grad is not None
    for x in (losses, grad, *metrics.values()):
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("name", NAMES)
def test_its_page_says_what_it_is_and_how_it_fails(name: str) -> None:
    page = explain(name)
    for heading in ("Formula", "Source", "Hyperparameters", "Gives", "Failure modes", "Use when"):
        assert f"\n{heading}\n" in page
    assert "arXiv:" in page


@pytest.mark.parametrize(
    ("name", "hyper", "message"),
    [
        ("robust_dpo", {"flip_rate": 0.5}, "robust_dpo: flip_rate must be >= 0 and < 0.5, got 0.5"),
        ("robust_dpo", {"label_smoothing": 0.1}, "robust_dpo has no hyperparameter 'label_smoothing'."),
        ("exo_pair", {"epsilon": 0}, "exo_pair: epsilon must be > 0 and < 0.5, got 0"),
        ("discopop", {"tau": 1.5}, "discopop: tau must be > 0 and <= 1, got 1.5"),
        ("dpop", {"lam": -1}, "dpop: lam must be >= 0, got -1"),
        ("dpo_shift", {"lam": 1.01}, "dpo_shift: lam must be > 0 and <= 1, got 1.01"),
        ("bco_pair", {"delta": math.inf}, "bco_pair: delta must be finite, got inf"),
        ("f_dpo", {"divergence": "tv"}, "f_dpo: divergence must be one of 'reverse_kl', "),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.0}, "f_dpo: alpha must be > 0 and < 1, got 1.0"),
        (
            "f_dpo",
            {"divergence": "js", "alpha": 0.3},
            "f_dpo: alpha is used by divergence 'alpha' only, and divergence is 'js'",
        ),
        (
            "f_dpo",
            {"alpha": 0.5},
            "f_dpo: alpha is used by divergence 'alpha' only, and divergence is 'reverse_kl'",
        ),
        ("cpo", {"alpha": 0, "nll": "mean"}, "cpo: nll is used while alpha is not 0, and alpha is 0"),
        (
            "tdpo",
            {"alpha": 0.0, "stop_gradient": False},
            "tdpo: stop_gradient is used while alpha is not 0, and alpha is 0.0",
        ),
        ("chi_po", {"r_max": 0.0}, "chi_po: r_max must be > 0, got 0.0"),
        ("r_dpo", {"alpha": -0.01}, "r_dpo: alpha must be >= 0, got -0.01"),
        ("ld_dpo", {"alpha": 1.5}, "ld_dpo: alpha must be >= 0 and <= 1, got 1.5"),
        ("rebel", {"eta": 0}, "rebel: eta must be > 0, got 0"),
        ("cpo", {"nll": "token"}, "cpo: nll must be one of 'mean', 'sum', got 'token'"),
        ("orpo", {"beta": 0.1}, "orpo has no hyperparameter 'beta'."),
        ("slic", {"delta": -1.0}, "slic: delta must be >= 0, got -1.0"),
        ("alpha_po", {"alpha": math.nan}, "alpha_po: alpha must be finite, got nan"),
    ],
)
def test_a_wrong_hyperparameter_is_told_in_one_line(name: str, hyper: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_hyperparameters(get(name), hyper)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", [name for name in NAMES if "beta" in check_hyperparameters(get(name), {})])
def test_beta_must_be_positive(name: str) -> None:
    for beta in (0, -0.1, math.nan):
        with pytest.raises(ObjectiveError, match="beta must be > 0"):
            check_hyperparameters(get(name), {"beta": beta})
