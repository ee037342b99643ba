"""Training of reward models with other heads than one score, on planted truth; their scale and temperature."""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import text_group, tiny_policy

import steerwell as sw
from steerwell.models.reward_model import RewardModel

torch.set_num_threads(1)
WORDS = ("red", "blue", "green", "gold")
SETTINGS: dict[str, Any] = {"steps": 40, "batch_size": 8, "learning_rate": 1e-2, "pooling": "mean"}


def graded(n: int = 24) -> list[sw.CompletionGroup]:
    """What is worth something: red in "helpfulness", blue in "brevity", by how often it is said; one is unscored
    here and there. The better of each two completions has more red.
    """
    found = []
    for i in range(n):
        reds, blues = (i % 4, (i + 1 + i % 3) % 4), ((i + 2) % 4, (2 * i + 1) % 4)
        texts = [
            " ".join(["red"] * r + ["blue"] * b + ["green"] * (1 + i % 2))
            for r, b in zip(reds, blues, strict=True)
        ]
        if texts[0] == texts[1]:
            continue
        chosen = 0 if reds[0] > reds[1] else 1
        found.append(
            replace(
                text_group(
                    f"{WORDS[i % 4]} {WORDS[(i // 4) % 4]}", texts, pairs=(sw.Pair(chosen, 1 - chosen),)
                ),
                pair_strengths=(float(abs(reds[0] - reds[1])),),
                attributes={
                    "helpfulness": (float(reds[0]), None if i % 5 == 0 else float(reds[1])),
                    "brevity": (-float(blues[0]), -float(blues[1])),
                },
                scores=tuple(float(r) for r in reds),
                ranks=(1 - chosen, chosen)[::-1] if chosen else (0, 1),
            )
        )
    return found


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


def right(model: RewardModel, groups: list[sw.CompletionGroup]) -> float:
    scores = model.score(groups)
    return statistics.fmean(
        float(own[p.chosen] > own[p.rejected]) for g, own in zip(groups, scores, strict=True) for p in g.pairs
    )


@pytest.mark.parametrize(
    ("objective", "hyper"),
    [
        ("bradley_terry", {"margin": 0.5}),
        ("scaled_bradley_terry", {}),
        ("ordinal", {"cutpoints": (0.5, 1.5)}),
        ("plackett_luce_reward", {}),
        ("quantile", {"levels": (0.2, 0.5, 0.8)}),
    ],
)
def test_a_planted_order_is_learnt_saved_and_read_back(tmp_path: Path, objective: str, hyper: dict) -> None:
    data = graded()
    model = sw.train(tiny_policy(), data, objective, out=tmp_path / "run", **SETTINGS, **hyper)
    assert right(model, data) > 0.9
    again = sw.load_reward_model(tmp_path / "run" / "model")
    assert again.recipe == model.recipe
    assert again.score(data) == model.score(data)
    if objective == "ordinal":
        assert again.recipe.cutpoints == (0.5, 1.5)


def test_attributes_are_learnt_by_name_and_a_gate_by_pairs(tmp_path: Path) -> None:
    data = graded()
    first = sw.train(tiny_policy(), data, "regression", out=tmp_path / "attributes", **SETTINGS)
    assert first.recipe.outputs == ("helpfulness", "brevity")
    outputs = first.outputs(data)
    for name in first.recipe.outputs:
        both = [
            (given, found[name])
            for group, rows in zip(data, outputs, strict=True)
            for given, found in zip((group.attributes or {})[name], rows, strict=True)
            if given is not None
        ]
        assert statistics.correlation(*zip(*both, strict=True)) > 0.8, name
    gated = sw.train(
        str(tmp_path / "attributes"), data, "bradley_terry", out=tmp_path / "gate", train_only="gate",
        steps=40, batch_size=8, learning_rate=1e-2,
    )  # fmt: skip
    assert gated.recipe.gate
    assert gated.outputs(data) == outputs  # the gate alone was trained
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "gate" / "metrics.jsonl").read_text().splitlines()[1:]
    ]
    assert statistics.fmean(losses[-5:]) < statistics.fmean(losses[:5]) - 0.02
    again = sw.load_reward_model(tmp_path / "gate" / "model")
    assert again.score(data) == gated.score(data)


def test_the_head_alone(tmp_path: Path) -> None:
    start = tiny_policy()
    model = sw.train(start, graded(), "bradley_terry", out=tmp_path / "run", train_only="head", **SETTINGS)
    before = dict(start.model.named_parameters())
    for name, parameter in model.model.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]), name
    assert model.model.score.weight.abs().max() > 0.05


@pytest.mark.parametrize("objective", ["regression", "plackett_luce_reward"])
def test_one_step_is_the_same_however_it_is_cut(tmp_path: Path, objective: str) -> None:
    settings = SETTINGS | {"steps": 2, "batch_size": 16}
    whole = sw.train(tiny_policy(), graded(), objective, out=tmp_path / "one", **settings)
    cut = sw.train(tiny_policy(), graded(), objective, out=tmp_path / "many", max_tokens=40, **settings)
    for a, b in zip(whole.score(graded()), cut.score(graded()), strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_scale_and_temperature_are_found_before_the_model_is_saved(tmp_path: Path) -> None:
    data = graded(48)
    train, held_out = (
        data[:32],
        [replace(g, pairs=tuple(p._replace(p=0.8) for p in g.pairs)) for g in data[32:]],
    )
    plain = sw.train(tiny_policy(), train, "bradley_terry", out=tmp_path / "plain", **SETTINGS)
    model = sw.train(
        tiny_policy(), train, "bradley_terry", out=tmp_path / "run", eval_data=held_out, normalise=True,
        calibrate=True, **SETTINGS,
    )  # fmt: skip
    found = record(tmp_path / "run")["scoring"]
    flat = [s for own in model.score(train) for s in own]
    assert statistics.fmean(flat) == pytest.approx(0, abs=1e-5)
    assert statistics.pstdev(flat) == pytest.approx(1, abs=1e-5)
    assert found["calibration"]["status"] == "fitted"
    assert found["temperature"] == model.recipe.temperature

    def log_loss(m: RewardModel) -> float:
        total = [
            -0.8 * math.log(m.probability(own[p.chosen], own[p.rejected]))
            - 0.2 * math.log(m.probability(own[p.rejected], own[p.chosen]))
            for g, own in zip(held_out, m.score(held_out), strict=True)
            for p in g.pairs
        ]
        return statistics.fmean(total)

    best = log_loss(model)
    assert best < log_loss(plain) - 0.01
    for factor in (0.9, 1.1):
        assert log_loss(model.with_recipe(temperature=model.recipe.temperature * factor)) > best
    order = [sorted(range(len(own)), key=own.__getitem__) for own in plain.score(data)]
    assert order == [sorted(range(len(own)), key=own.__getitem__) for own in model.score(data)]
    assert sw.load_reward_model(tmp_path / "run" / "model").recipe == model.recipe


def test_a_temperature_that_does_not_exist_is_said_and_left(tmp_path: Path) -> None:
    data = graded()
    model = sw.train(
        tiny_policy(),
        data,
        "bradley_terry",
        out=tmp_path / "run",
        eval_data=data[:2],
        calibrate=True,
        **SETTINGS,
    )
    assert record(tmp_path / "run")["scoring"]["calibration"]["status"] == "separable"
    assert model.recipe.temperature == 1.0


def refused(out: Path, data: Any, objective: Any, start: Any = None, **settings: Any) -> str:
    with pytest.raises(sw.InputError) as error:
        sw.train(start or tiny_policy(), data, objective, out=out, **settings)
    assert not out.exists()
    return str(error.value)


def test_what_cannot_be_trained_is_said_before_any_work(tmp_path: Path) -> None:
    data, out = graded(), tmp_path / "no"
    bare = [replace(g, pair_strengths=None, attributes=None) for g in data]
    assert "ordinal needs pair_strengths" in refused(out, bare, "ordinal")
    assert "bradley_terry needs pair_strengths" in refused(out, bare, "bradley_terry", margin=1.0)
    assert "regression needs attributes" in refused(out, bare, "regression")
    mixed = [data[0], replace(data[1], attributes={"other": (1.0, 2.0)})]
    short = [replace(data[0], pair_strengths=(1.0, 2.0)), *data[1:]]
    assert "2 pair_strengths for 1 pairs" in refused(out, short, "ordinal")
    assert "the same attributes everywhere" in refused(out, mixed, "regression")
    both = refused(out, data, [("regression", 1.0), ("quantile", 1.0)])
    assert "learn different heads" in both
    assert "train_only is not used by dpo" in refused(out, data, "dpo", train_only="head")
    assert "calibrate is given without eval_data" in refused(out, data, "bradley_terry", calibrate=True)
    assert "has no gate" in refused(out, data, "bradley_terry", train_only="gate")
    sw.train(tiny_policy(), data, "regression", out=tmp_path / "rm", **SETTINGS | {"steps": 1})
    other = refused(out, data, "quantile", start=str(tmp_path / "rm"))
    assert "this reward model has one output for each named attribute" in other


def test_members_are_on_one_level_and_scale_when_they_are_saved(tmp_path: Path) -> None:
    data = graded()
    settings = SETTINGS | {"steps": 20}
    model = sw.train(
        tiny_policy(), data, "ensemble_bradley_terry", out=tmp_path / "run", members=3, normalise=True,
        eval_data=[replace(g, pairs=tuple(p._replace(p=0.9) for p in g.pairs)) for g in data], calibrate=True,
        **settings,
    )  # fmt: skip
    columns = zip(*(each.values() for own in model.outputs(data) for each in own), strict=True)
    for column, level, scale in zip(
        columns, model.recipe.levels or (), model.recipe.scales or (), strict=True
    ):
        assert statistics.fmean(column) == pytest.approx(level, abs=1e-4)
        assert statistics.pstdev(column) == pytest.approx(scale, abs=1e-4)
    flat = [s for own in model.score(data) for s in own]
    assert statistics.fmean(flat) == pytest.approx(0, abs=1e-4)
    assert statistics.pstdev(flat) == pytest.approx(1, abs=1e-4)
    assert model.recipe.scales == pytest.approx(model.normalised(data).recipe.scales, rel=1e-4)
    assert record(tmp_path / "run")["scoring"]["temperature"] == model.recipe.temperature
