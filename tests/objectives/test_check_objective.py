"""check_objective must fail on broken objectives: each mutant is caught, by the check meant for it."""

from __future__ import annotations

import doctest
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import steerwell.testing
from steerwell.objectives import TABLE, ObjectiveError, grpo, needs, objective, optional, table
from steerwell.testing import check_objective, made_up, take

ALL = {"shape", "sign", "extremes", "empty", "permutation", "copies", "microbatches", "removal", "gradcheck"}


@pytest.fixture(autouse=True)
def own_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))


def failed(fn: Callable[..., Any], **facts: Any) -> set[str]:
    """Names of the checks that the function fails, once decorated."""
    unique = {"unit": "pair", **facts}
    try:
        check_objective(objective(**unique)(fn))
    except AssertionError as error:
        return set(re.findall(r"^(\w+): ", str(error), flags=re.MULTILINE))
    return set()


def margins(logps: Tensor, ref_logps: Tensor, pairs: Tensor) -> Tensor:
    h = logps - ref_logps
    return 0.1 * (h[pairs[0]] - h[pairs[1]])


# --- sound objectives pass: the checks are not so strict that only ours could pass ---
def sound(logps, ref_logps, pairs):
    return F.softplus(-margins(logps, ref_logps, pairs)), {}


def hinge_link(logps, ref_logps, pairs):
    return F.relu(1 - margins(logps, ref_logps, pairs)), {}


def odds_ratio(per_token_logps, owner, lengths, pairs):
    mean = torch.zeros_like(lengths).index_add(0, owner, per_token_logps) / lengths
    log_odds = mean - torch.log(-torch.expm1(mean.clamp(max=-1e-6)))
    return F.softplus(-(log_odds[pairs[0]] - log_odds[pairs[1]])), {}


def listwise(logps, ref_logps, group, ranks):
    s = 0.1 * (logps - ref_logps)
    behind = (group[:, None] == group) & (ranks >= ranks[:, None])
    return torch.logsumexp(torch.where(behind, s, -torch.inf), 1) - s, {}


def test_sound_objectives_pass() -> None:
    assert failed(sound) == set()
    assert failed(hinge_link) == set()
    assert failed(odds_ratio) == set()
    assert failed(listwise, unit="completion") == set()


def test_a_coupled_objective_must_say_so() -> None:
    def batch_shift(logps, ref_logps, labels):
        h = logps - ref_logps
        shift = h.detach().sum() / max(len(h), 1)
        return torch.sigmoid(torch.where(labels, shift - h, h - shift)), {}

    assert "microbatches" in failed(batch_shift, unit="completion", surrogate=True)
    ran = check_objective(
        objective(unit="completion", decomposable=False, surrogate=True)(batch_shift), seed=3
    )
    assert "microbatches" not in ran
    assert "gradcheck" not in ran
    assert "copies" in ran


# --- mutants: (broken function, facts, the check that must catch it) ---
def wrong_sign(logps, ref_logps, pairs):
    return F.softplus(margins(logps, ref_logps, pairs)), {}


def wrong_sign_for_labels(logps, ref_logps, labels):
    h = logps - ref_logps
    return torch.sigmoid(torch.where(labels, -h, -0.5 * h)), {}


def wrong_sign_of_advantages(logps, advantages):
    return advantages * logps, {}


def divides_by_batch(logps, ref_logps, pairs):
    losses = F.softplus(-margins(logps, ref_logps, pairs))
    return losses / max(len(losses), 1), {}


def reduced(logps, ref_logps, pairs):
    return F.softplus(-margins(logps, ref_logps, pairs)).sum(), {}


def breaks_on_nothing(logps, ref_logps, pairs):
    losses = F.softplus(-margins(logps, ref_logps, pairs))
    return losses.clamp(max=losses.detach().max().item()), {}


def chosen_half_rejected_half(logps, ref_logps, pairs):
    m, h = pairs.shape[1], logps - ref_logps
    return F.softplus(0.1 * (h[1 : m + 1] - h[:m])), {}


def position_in_batch(logps, ref_logps, pairs):
    weight = torch.linspace(1, 2, pairs.shape[1], dtype=logps.dtype)
    return weight * F.softplus(-margins(logps, ref_logps, pairs)), {}


def log_of_sigmoid(logps, ref_logps, pairs):
    return -torch.log(torch.sigmoid(margins(logps, ref_logps, pairs))), {}


def ratio_overflows(per_token_logps, old_per_token_logps, advantages, owner):
    return -torch.exp(per_token_logps - old_per_token_logps) * advantages[owner], {}


def hidden_nan_in_gradient(logps, ref_logps, pairs):
    m = margins(logps, ref_logps, pairs)
    return torch.where(m > -80, torch.log1p(torch.exp(-m)), -m), {}


def ignores_the_mask(per_token_logps, owner, demonstrations):
    return -per_token_logps * (1.0 + 0 * demonstrations[owner]), {}


def mask_by_a_factor(per_token_logps, owner, demonstrations):
    kept = torch.where(demonstrations[owner], 1.0, 0.1).double()[demonstrations[owner]]
    return (
        -per_token_logps[demonstrations[owner]] * kept - 0.1 * per_token_logps[~demonstrations[owner]].sum(),
        {},
    )


def baseline_over_all(logps, ref_logps, pairs):
    h = logps - ref_logps
    return F.softplus(0.1 * (h.sum() - h[pairs[0]] + h[pairs[1]])), {}


def half_precision(logps, ref_logps, pairs):
    return F.softplus(-margins(logps, ref_logps, pairs)).float(), {}


def wrong_gradient(logps, ref_logps, pairs):
    m = margins(logps, ref_logps, pairs)
    return F.softplus(-m.detach()) + (m.detach() - m), {}


def metric_with_graph(logps, ref_logps, pairs):
    m = margins(logps, ref_logps, pairs)
    return F.softplus(-m), {"margin": m}


def metric_reduced(logps, ref_logps, pairs):
    m = margins(logps, ref_logps, pairs)
    return F.softplus(-m), {"margin": m.detach().sum()}


def metric_overflows(logps, ref_logps, pairs):
    m = margins(logps, ref_logps, pairs)
    return F.softplus(-m), {"odds": m.detach().exp()}


def no_gradient(logps, ref_logps, pairs):
    return F.softplus(-margins(logps.detach(), ref_logps, pairs)), {}


def changes_its_input(logps, ref_logps, pairs):
    ref_logps.add_(1.0)
    return F.softplus(-margins(logps, ref_logps, pairs)), {}


def breaks_without_soft_labels(logps, ref_logps, pairs, pair_probs: Any = None):
    m = margins(logps, ref_logps, pairs)
    return pair_probs * F.softplus(-m) + (1 - pair_probs) * F.softplus(m), {}


def ignores_soft_label_order(logps, ref_logps, pairs, pair_probs=None):
    p = torch.ones_like(logps[pairs[0]]) if pair_probs is None else pair_probs.sort().values
    return p * F.softplus(-margins(logps, ref_logps, pairs)), {}


TOKEN = {"unit": "token"}
SFT = {"unit": "token", "mask": "demonstrations"}
COMPLETION = {"unit": "completion"}
MUTANTS: list[tuple[Callable[..., Any], dict[str, Any], set[str]]] = [
    (wrong_sign, {}, {"sign"}),
    (wrong_sign_for_labels, COMPLETION, {"sign"}),
    (wrong_sign_of_advantages, COMPLETION, {"sign"}),
    (divides_by_batch, {}, {"copies", "microbatches"}),
    (divides_by_batch, {"decomposable": False}, {"copies"}),
    (reduced, {}, {"shape"}),
    (breaks_on_nothing, {}, {"empty"}),
    (chosen_half_rejected_half, {}, {"permutation", "removal"}),
    (position_in_batch, {}, {"permutation", "microbatches"}),
    (log_of_sigmoid, {}, {"extremes"}),
    (ratio_overflows, TOKEN, {"extremes"}),
    (hidden_nan_in_gradient, {}, {"extremes"}),
    (ignores_the_mask, SFT, {"shape", "removal"}),
    (mask_by_a_factor, SFT, {"removal"}),
    (baseline_over_all, {}, {"removal", "microbatches"}),
    (half_precision, {}, {"shape"}),
    (wrong_gradient, {}, {"gradcheck"}),
    (metric_with_graph, {}, {"shape"}),
    (metric_reduced, {}, {"shape"}),
    (metric_overflows, {}, {"extremes"}),
    (no_gradient, {}, {"shape"}),
    (changes_its_input, {}, {"shape"}),
    (breaks_without_soft_labels, {}, {"shape"}),
    (ignores_soft_label_order, {}, {"permutation"}),
]


@pytest.mark.parametrize(
    ("fn", "facts", "caught_by"), MUTANTS, ids=[f"{fn.__name__}-{len(facts)}" for fn, facts, _ in MUTANTS]
)
def test_a_mutant_is_caught(fn: Callable[..., Any], facts: dict[str, Any], caught_by: set[str]) -> None:
    assert failed(fn, **facts) >= caught_by


def test_every_check_is_the_one_that_catches_some_mutant() -> None:
    assert set.union(*(caught for *_, caught in MUTANTS)) == ALL


def test_some_mutants_are_caught_by_one_check_only() -> None:
    """Else a check could be dropped and nobody would notice."""
    assert failed(wrong_sign) == {"sign"}
    assert failed(wrong_gradient) == {"gradcheck"}
    assert failed(log_of_sigmoid) == {"extremes"}
    assert failed(divides_by_batch, decomposable=False) == {"copies"}
    assert failed(breaks_on_nothing) == {"empty"}
    assert failed(metric_reduced) == {"shape"}


def test_the_failure_lists_every_check_and_why() -> None:
    with pytest.raises(AssertionError) as caught:
        check_objective(objective(unit="pair")(divides_by_batch))
    lines = str(caught.value).splitlines()
    assert lines[0] == "divides_by_batch fails 2 of the checks"
    assert lines[1].startswith("copies: sum of a batch beside its copy")
    assert lines[2].startswith("microbatches: sum over micro-batches")


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_objective_of_the_table_passes_all_that_applies(name: str) -> None:
    """At its defaults; objectives that come later are covered too."""
    fn = TABLE[name]
    paired = fn.mask or {"pairs", "step_labels"} & {*needs(fn), *optional(fn)}
    applies = {"microbatches": fn.decomposable, "removal": bool(paired), "gradcheck": not fn.surrogate}
    assert set(check_objective(name)) == ALL - {check for check, does in applies.items() if not does}


def test_names_of_the_checks_come_back() -> None:
    assert set(check_objective("dpo", beta=0.3)) == ALL
    assert set(check_objective(grpo)) == ALL - {"removal"}


def test_what_it_cannot_check_is_told() -> None:
    def stranger(logps, distance):
        return logps * distance, {}

    def learns_nothing(ref_logps, pairs):
        return ref_logps[pairs[0]], {}

    with pytest.raises(ObjectiveError, match="check_objective cannot make up 'distance'; it knows logps"):
        check_objective(objective(unit="completion")(stranger))
    with pytest.raises(ObjectiveError, match="learns_nothing takes none of logps, per_token_logps, scores"):
        check_objective(objective(unit="pair")(learns_nothing))
    with pytest.raises(ObjectiveError, match="unknown objective 'dpp'"):
        check_objective("dpp")


def test_wrong_hyperparameters_fail_the_checks() -> None:
    with pytest.raises(AssertionError, match="beta must be > 0, got -1"):
        check_objective("dpo", beta=-1)


def test_made_up_batches_are_consistent() -> None:
    names = tuple(
        name for name in table.TENSORS if name != "running"
    )  # what is carried is no part of a batch
    batch = made_up(names, prompts=2, seed=1)
    assert set(batch) == set(names)
    sums = torch.zeros(8, dtype=torch.float64).index_add(0, batch["owner"], batch["per_token_logps"])
    assert torch.equal(sums, batch["logps"])
    assert torch.equal(torch.bincount(batch["owner"]).double(), batch["lengths"])
    assert torch.equal(batch["group"][batch["pairs"][0]], batch["group"][batch["pairs"][1]])
    assert set(range(8)) - set(batch["pairs"].flatten().tolist()) == {3, 7}
    better = batch["rewards"][batch["pairs"][0]] > batch["rewards"][batch["pairs"][1]]
    assert better.all()
    part, taken = take(batch, torch.tensor([6, 4, 5]))
    assert part["pairs"].tolist() == [[1, 1, 0], [2, 0, 2]]
    assert torch.equal(part["logps"], batch["logps"][[6, 4, 5]])
    sums = torch.zeros(3, dtype=torch.float64).index_add(0, part["owner"], part["per_token_logps"])
    assert torch.equal(sums, part["logps"])
    assert torch.equal(part["pair_probs"], batch["pair_probs"][taken["M"]])
    at_start = made_up(names, at_start=True)
    assert torch.equal(at_start["logps"], at_start["ref_logps"])
    assert at_start["kl"].item() == 0.0


def test_the_example_in_the_docstring() -> None:
    result = doctest.testmod(steerwell.testing)
    assert (result.failed, result.attempted) == (0, 3)
