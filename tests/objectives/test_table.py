"""The table: what a signature says, unknown names, ranges before any work, and what explain prints."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

import steerwell.objectives as objectives
from steerwell.objectives import (
    TABLE,
    TENSORS,
    ObjectiveError,
    check_hyperparameters,
    dpo,
    explain,
    get,
    grpo,
    hyperparameters,
    ipo,
    kto,
    needs,
    objective,
    optional,
    table,
)
from steerwell.objectives.advantages import ADVANTAGES
from steerwell.objectives.reduce import REDUCTIONS
from steerwell.objectives.table import docstring_parts

FIRST = {"sft", "dpo", "ipo", "simpo", "kto", "bradley_terry", "reinforce", "ppo_clip", "grpo", "rloo"}


@pytest.fixture
def own_table(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A copy of the table, so that a test can enter functions."""
    copy = dict(TABLE)
    monkeypatch.setattr(table, "TABLE", copy)
    return copy


def test_the_first_objectives_are_there_and_public() -> None:
    assert set(TABLE) >= FIRST
    for name in FIRST:
        assert getattr(objectives, name) is get(name) is TABLE[name]
        assert name in objectives.__all__


def test_signatures_are_the_configuration() -> None:
    assert hyperparameters(dpo) == {"beta": 0.1, "label_smoothing": 0.0}
    assert hyperparameters(ipo) == {"tau": 0.1, "reduction": "mean"}
    assert hyperparameters(kto) == {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0}
    assert hyperparameters(get("simpo")) == {"beta": 2.5, "gamma": 1.375}
    assert hyperparameters(get("bradley_terry")) == {"centering": 0.0, "margin": 0.0}
    assert hyperparameters(get("sft")) == {} == hyperparameters(get("reinforce"))
    assert needs(dpo) == ("logps", "ref_logps", "pairs")
    assert optional(dpo) == ("pair_probs",)
    assert needs(kto) == ("logps", "ref_logps", "labels", "kl")
    assert needs(get("sft")) == ("per_token_logps", "owner", "demonstrations")


def test_what_is_needed_depends_on_the_hyperparameters() -> None:
    first = ("per_token_logps", "old_per_token_logps", "advantages", "owner")
    assert needs(grpo) == needs(grpo, {"beta": 0.1}) == (*first, "ref_per_token_logps")
    assert needs(grpo, {"beta": 0.0}) == needs(grpo, {"beta": 0}) == first
    assert optional(grpo) == ()


def test_only_kto_couples_the_batch() -> None:
    assert {name for name in FIRST if not TABLE[name].decomposable} == {"kto"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("dpoo", "unknown objective 'dpoo'. Did you mean 'dpo'?"),
        ("grop", "unknown objective 'grop'. Did you mean 'grpo'?"),
        ("bradleyterry", "unknown objective 'bradleyterry'. Did you mean 'bradley_terry'?"),
    ],
)
def test_an_unknown_objective_gets_the_nearest_name(name: str, message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        get(name)
    assert str(caught.value) == message


def test_a_far_name_gets_the_list() -> None:
    with pytest.raises(ObjectiveError) as caught:
        get("zzz")
    assert str(caught.value) == f"unknown objective 'zzz'. Known: {', '.join(sorted(TABLE))}."
    assert {"bradley_terry", "dpo", "grpo"} <= set(TABLE)


def test_a_plain_function_is_no_objective() -> None:
    with pytest.raises(ObjectiveError, match=r"<lambda> is not an objective: decorate it with @objective"):
        get(lambda logps: logps)


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("dpo", {"bta": 0.1}, "dpo has no hyperparameter 'bta'. Did you mean 'beta'?"),
        ("ipo", {"beta": 0.1}, "ipo has no hyperparameter 'beta'. Did you mean 'tau'?"),
        ("sft", {"beta": 0.1}, "sft has no hyperparameter 'beta'. It has none."),
        ("dpo", {"beta": -1}, "dpo: beta must be > 0, got -1"),
        ("dpo", {"label_smoothing": 0.6}, "dpo: label_smoothing must be >= 0 and < 0.5, got 0.6"),
        ("ipo", {"reduction": "avg"}, "ipo: reduction must be one of 'mean', 'sum', got 'avg'"),
        ("grpo", {"beta": "x"}, "grpo: beta must be a number, got 'x'"),
        ("grpo", {"epsilon": 2}, "grpo: epsilon must be > 0 and < 1, got 2"),
        ("kto", {"desirable_weight": None}, "kto: desirable_weight must be a number, got None"),
        ("bradley_terry", {"centering": -0.1}, "bradley_terry: centering must be >= 0, got -0.1"),
    ],
)
def test_hyperparameters_are_checked_before_any_work(name: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ObjectiveError) as caught:
        check_hyperparameters(get(name), given)
    assert str(caught.value) == message


def test_checked_hyperparameters_come_back_complete() -> None:
    assert check_hyperparameters(dpo, {"beta": 0.5}) == {"beta": 0.5, "label_smoothing": 0.0}
    assert check_hyperparameters(grpo, {"beta": 0.0})["epsilon"] == 0.2


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_objective_is_fully_described(name: str) -> None:
    """Holds for objectives that come later too: facts that exist, and a docstring with every section."""
    fn = TABLE[name]
    parts = docstring_parts(fn)
    assert set(parts) <= {"", "Formula", "Hyperparameters", "Returns", "Differs", "Use when", "Failure modes"}
    assert parts["Formula"]
    assert parts["Returns"].startswith("losses (")
    assert parts["Use when"]
    assert parts["Failure modes"]
    assert "\n" not in parts[""], "the opening is one line"
    assert fn.source
    assert fn.reduction in REDUCTIONS
    assert set(needs(fn)) | set(optional(fn)) <= set(TENSORS)
    assert (fn.advantages in ADVANTAGES) == (fn.kind == "policy_gradient") == ("advantages" in needs(fn))
    assert ("Hyperparameters" in parts) == bool(hyperparameters(fn))
    check_hyperparameters(fn, {})
    page = explain(name)
    assert "not described" not in page
    assert "your own tensor" not in page
    assert max(map(len, page.splitlines())) <= 112


def test_explain_is_a_page_one_can_read() -> None:
    page = explain("dpo")
    assert page.startswith("dpo: Direct preference optimisation: ")
    headings = [line for line in page.splitlines() if line and not line.startswith(" ")][1:]
    assert headings == ["Formula", "Source", "Needs", "Hyperparameters", "Gives", "Use when", "Failure modes"]
    for line in (
        "  arXiv:2305.18290, equation 7; label smoothing: cDPO (Mitchell 2023)",
        "  ref_logps (N): the same under the frozen reference model",
        "  pairs (2, M): completion indices: row 0 preferred, row 1 not preferred",
        "  beta = 0.1: how strongly the policy is held to the reference; larger holds more",
        "  reduction: pair_mean",
    ):
        assert line in page.splitlines()
    assert "pair_probs (M): probability that row 0 is indeed preferred (vote share); used when" in page


def test_explain_tells_the_rest() -> None:
    assert (
        "ref_per_token_logps (S): the same under the frozen reference model; only if beta is not 0"
        in explain("grpo")
    )
    assert "advantages: group_mean_std" in explain(grpo)
    assert "couples the batch's completions" in explain("kto")
    assert "couples" not in explain("dpo")
    assert "in nats per token" in " ".join(explain("ipo").split())
    assert "\nHyperparameters\n  none\n" in explain("sft")
    assert "not the ratio gamma / beta that some trainers call gamma_beta_ratio" in " ".join(
        explain("simpo").split()
    )
    with pytest.raises(ObjectiveError, match="Did you mean 'dpo'"):
        explain("dpo2")


def test_your_own_objective(own_table: dict[str, Any]) -> None:
    @objective(unit="pair", source="our own")
    def margin(logps: Tensor, pairs: Tensor, *, scale: float = 2.0) -> tuple[Tensor, dict[str, Tensor]]:
        """Linear in the margin."""
        return scale * (logps[pairs[1]] - logps[pairs[0]]), {}

    assert own_table["margin"] is margin
    fn = get(margin)
    assert (fn.unit, fn.reduction, fn.kind, fn.decomposable) == ("pair", "pair_mean", "policy", True)
    assert margin(torch.tensor([1.0, 3.0]), torch.tensor([[0], [1]]))[0].tolist() == [4.0]
    page = explain("margin")
    assert "scale = 2.0: not described" in page
    assert "one loss per pair" in page
    assert "margin" not in TABLE, "the copy was used"


def test_a_tensor_of_your_own_is_allowed(own_table: dict[str, Any]) -> None:
    @objective(unit="pair")
    def judged(logps, pairs, distance, *, scale=2.0):
        return logps[pairs[0]] * distance * scale, {}

    assert "distance: your own tensor" in explain(judged)
    assert check_hyperparameters(judged, {"scale": 3.0}) == {"scale": 3.0}


def rule_breakers() -> list[tuple[Any, dict[str, Any], str]]:
    def star(*tensors):
        return tensors

    def no_default(logps, *, beta):
        return logps, beta

    def number_default(logps, beta=0.1):
        return logps, beta

    def plain(logps, *, beta=0.1):
        return logps, beta

    return [
        (star, {}, "star takes only plain positional tensors"),
        (no_default, {}, "no_default needs a default for every hyperparameter"),
        (number_default, {}, "number_default can have only None as a tensor's default"),
        (
            plain,
            {"reduction": "token_mean"},
            "plain gives one loss per pair, which 'token_mean' cannot reduce",
        ),
        (plain, {"mask": "demonstrations"}, "plain is masked by 'demonstrations', which it does not take"),
        (plain, {"only_if": {"ref_logps": "beta"}}, "plain names an unknown tensor or hyperparameter"),
    ]


@pytest.mark.parametrize(("fn", "facts", "message"), rule_breakers())
def test_signatures_that_break_the_rules(
    own_table: dict[str, Any], fn: Any, facts: dict[str, Any], message: str
) -> None:
    with pytest.raises(ObjectiveError, match=message):
        objective(unit="pair", **facts)(fn)
    assert fn.__name__ not in own_table


def test_a_name_is_taken_once(own_table: dict[str, Any]) -> None:
    def dpo(logps):
        return logps, {}

    with pytest.raises(ObjectiveError, match="there is already an objective 'dpo'"):
        objective(unit="completion")(dpo)


def test_the_room_imports_torch_and_itself_only() -> None:
    code = (
        "import sys, steerwell.objectives; "
        "print(sorted({m.split('.')[1] for m in sys.modules if m.startswith('steerwell.')}))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "['objectives']"
