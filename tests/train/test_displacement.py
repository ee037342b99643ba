"""The displacement meter: zero at the start, what was planted at the end, and a warning only where the chosen fell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from small_runs import lines, pair_groups, tiny_policy

from steerwell.train import train
from steerwell.train.displacement import conclusion

SETTINGS: dict[str, Any] = {"batch_size": 6, "steps": 12, "warmup": 0.0, "learning_rate": 3e-3}


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())["displacement"]


@pytest.mark.parametrize("objective", ["dpo", "simpo"])  # over each step's pairs, and over the probe
def test_the_figures_are_those_of_the_log_probs(tmp_path: Path, objective: str) -> None:
    data, start = pair_groups(6, k=2), tiny_policy()
    made = train(start, data, objective, out=tmp_path / "run", eval_data=data, **SETTINGS)
    last = lines(tmp_path / "run")[-1]
    before, after = start.logps(data), made.logps(data)
    shifts = [b[0] - a[0] for a, b in zip(before, after, strict=True)]
    assert abs(sum(shifts)) > 0.1
    if objective == "simpo":  # the probe reads the weights after the last step
        assert last["displacement/chosen"] == pytest.approx(sum(shifts) / 6, abs=1e-3)
        assert last["displacement/fell"] == sum(shift < -1e-3 for shift in shifts) / 6
        assert [x["step"] for x in lines(tmp_path / "run") if "displacement/fell" in x] == [3, 6, 9, 12]
    else:  # a step's pairs are measured before its update, as all of its figures are
        first = lines(tmp_path / "run")[1]
        assert abs(first["displacement/chosen"]) < 1e-3
        assert first["displacement/fell"] == 0
        assert last["displacement/chosen"] == pytest.approx(sum(shifts) / 6, rel=0.5)


def test_it_warns_where_the_chosen_fell_and_anchors_mend_it(tmp_path: Path) -> None:
    data = pair_groups(12, k=2)
    demonstrated = {"batch_size": 12, "steps": 40, "learning_rate": 1e-2}
    start = train(tiny_policy(), data, "sft", out=tmp_path / "sft", **demonstrated)
    told: list[str] = []
    settings = {**SETTINGS, "steps": 20, "progress": lambda stage, done, total, note: told.append(note)}
    found = {}
    for name, what in (("dpo", "dpo"), ("mixture", [("dpo", 1.0), ("sft", 0.3)]), ("dpop", "dpop")):
        train(start, data, what, out=tmp_path / name, beta=0.1, **settings)
        found[name] = record(tmp_path / name)
    assert found["dpo"]["fell"] > 0.9
    assert found["dpo"]["chosen"] < -3
    warning = found["dpo"]["warning"]
    assert "likelihood displacement: the chosen completions of 100% of the pairs" in warning
    assert "dpop" in warning
    assert "cal_dpo" in warning
    assert told.count(warning) == 1
    for anchored in ("mixture", "dpop"):
        assert found[anchored]["warning"] is None
        assert found[anchored]["chosen"] > -0.5


@pytest.mark.parametrize("objective", ["kto", "plackett_luce"])
def test_labels_and_rankings_are_measured_too(tmp_path: Path, objective: str) -> None:
    """The desirable completions, and the best of each ranking: those at place 0."""
    data = [replace(g, labels=(True, False), ranks=(0, 1), pairs=()) for g in pair_groups(6, k=2)]
    start = tiny_policy()
    made = train(start, data, objective, out=tmp_path / "run", **SETTINGS)
    shifts = [b[0] - a[0] for a, b in zip(start.logps(data), made.logps(data), strict=True)]
    first, last = lines(tmp_path / "run")[0], lines(tmp_path / "run")[-1]
    assert abs(first["displacement/chosen"]) < 1e-3
    assert abs(sum(shifts)) > 0.1
    assert last["displacement/chosen"] == pytest.approx(
        sum(shifts) / 6, rel=0.5
    )  # measured before the last update


def test_what_fell_is_named_by_what_tells_the_chosen() -> None:
    line = {
        "step": 1,
        "displacement/chosen": -9.0,
        "displacement/chosen_per_token": -0.5,
        "displacement/fell": 0.75,
    }
    said = {by: conclusion([line], 1, by)["warning"] for by in ("pairs", "labels", "ranks")}
    assert "the chosen completions of 75% of the pairs" in said["pairs"]
    assert "75% of the desirable completions" in said["labels"]
    assert "the best completions of 75% of the rankings" in said["ranks"]
    assert all("sft term" in warning for warning in said.values())
    assert "dpop" not in said["labels"]  # it takes pairs


@pytest.mark.parametrize("objective", ["sft", "bradley_terry"])
def test_runs_without_a_policy_on_pairs_have_no_meter(tmp_path: Path, objective: str) -> None:
    train(tiny_policy(), pair_groups(4), objective, out=tmp_path / "run", **{**SETTINGS, "steps": 1})
    assert record(tmp_path / "run") == {}


def test_a_conclusion_is_of_the_last_tenth() -> None:
    names = ("displacement/chosen", "displacement/chosen_per_token", "displacement/fell")
    metrics = [
        {"step": s, **dict(zip(names, (-float(s), -s / 100, float(s > 5)), strict=True))}
        for s in range(1, 21)
    ]
    found = conclusion(metrics, 20)
    assert (found["chosen"], found["fell"]) == (-19.5, 1.0)
    assert found["chosen_per_token"] == pytest.approx(-0.195)
    assert "19.5 nats on average (0.20 per token)" in found["warning"]
    assert conclusion(metrics[:4], 20)["chosen"] == -4.0  # the last that was measured
    assert conclusion([{"step": 1}], 1) == {}
