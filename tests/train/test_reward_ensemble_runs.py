"""Runs of ensembles and of ODIN: the same however a step is cut, members that differ, and length taken away."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import WORDS, largest_difference, lines, pair_groups, text_group, tiny_policy, weights

from steerwell.cli.glossary import METRICS
from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup, Pair
from steerwell.judges import parse
from steerwell.models.load import load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_ensemble import reward_ensemble
from steerwell.models.reward_model import RewardModel
from steerwell.train import rollouts, train
from tiny import tiny_policy_dir

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 8, "steps": 3, "warmup": 0.0}


def run(objective: Any, out: Path, **settings: Any) -> RewardModel:
    policy = tiny_policy()
    policy.model.to(torch.float64)
    found = train(policy, pair_groups(8), objective, out=out, eval_data=pair_groups(4, seed=1),
                  **SETTINGS | settings)  # fmt: skip
    assert isinstance(found, RewardModel)
    return found


@pytest.mark.parametrize("objective", ["ensemble_bradley_terry", "odin"])
def test_cutting_a_step_changes_nothing(tmp_path: Path, objective: str) -> None:
    whole = run(objective, tmp_path / "whole", max_tokens=100_000)
    cut = run(objective, tmp_path / "cut", max_tokens=1)
    assert largest_difference(weights(whole.model), weights(cut.model)) < 1e-9
    assert whole.model.score.weight.shape[0] == {"odin": 2}.get(objective, 4)
    told = lines(tmp_path / "whole")
    for one, other in zip(told, lines(tmp_path / "cut"), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)
    ours = {"disagreement", "corr/quality_length", "corr/length_length"} & told[-1].keys()
    assert len(ours) == (2 if objective == "odin" else 1)
    assert ours <= METRICS.keys()


@pytest.mark.parametrize("objective", ["ensemble_bradley_terry", "odin"])
def test_a_run_that_is_continued_ends_as_a_straight_one(tmp_path: Path, objective: str) -> None:
    class Stop(Exception):
        pass

    def watch(step: int, model: Any, figures: Any) -> None:
        if step == 2:
            raise Stop

    settings = {"checkpoint_every": 1, "watch_every": 1}
    straight = run(objective, tmp_path / "straight", watch=lambda *_: None, **settings)
    with pytest.raises(Stop):
        run(objective, tmp_path / "again", watch=watch, **settings)
    again = run(objective, tmp_path / "again", watch=lambda *_: None, **settings)
    assert largest_difference(weights(straight.model), weights(again.model)) == 0
    assert lines(tmp_path / "straight") == lines(tmp_path / "again")


def test_members_start_apart_and_are_trained_apart(tmp_path: Path) -> None:
    start = RewardModel.from_policy(tiny_policy(), head="members", outputs=("member1", "member2", "member3"))
    rows = start.model.score.weight.detach()
    assert 0.5 < rows.std() * rows.shape[1] ** 0.5 < 1.5
    assert np.abs(np.corrcoef(rows.numpy()) - np.eye(3)).max() < 0.6
    single = RewardModel.from_policy(tiny_policy()).model.score.weight
    assert single.std() * single.shape[1] ** 0.5 < 0.02
    with_draws = run("ensemble_bradley_terry", tmp_path / "draws", members=2)
    without = run("ensemble_bradley_terry", tmp_path / "all", members=2, bootstrap=False)
    assert largest_difference(weights(with_draws.model), weights(without.model)) > 1e-4


def test_the_way_of_combining_is_part_of_the_model(tmp_path: Path) -> None:
    model = run("ensemble_bradley_terry", tmp_path / "run", members=3)
    model.model.float()
    data = pair_groups(6, seed=3)
    raw = [[[*one.values()] for one in own] for own in model.outputs(data)]
    scores = {
        how: np.concatenate(model.with_recipe(combine=how, penalty=0.5).score(data))
        for how in ("mean", "min", "uwo")
    }
    each = np.concatenate(raw)
    assert each.shape == (18, 3)
    np.testing.assert_allclose(scores["mean"], each.mean(1), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(scores["min"], each.min(1), rtol=1e-4, atol=1e-5)
    # numpy divides by the number of members, as the paper does; torch's own default does not
    np.testing.assert_allclose(scores["uwo"], each.mean(1) - 0.5 * each.var(1), rtol=1e-4, atol=1e-5)
    careful = model.with_recipe(combine="uwo", penalty=0.5)
    careful.save(tmp_path / "careful")
    again = load_reward_model(tmp_path / "careful")
    assert again.recipe == careful.recipe
    np.testing.assert_allclose(np.concatenate(again.score(data)), scores["uwo"], rtol=1e-4, atol=1e-5)
    assert careful.digest() != model.digest()
    with pytest.raises(InputError, match="penalty must be >= 0"):
        model.with_recipe(penalty=-1.0)


def test_members_are_brought_to_one_scale(tmp_path: Path) -> None:
    model = RewardModel.from_policy(tiny_policy(), head="members", outputs=("a", "b", "c"))
    with torch.no_grad():
        model.model.score.weight[1] *= 10
    data = pair_groups(10, seed=3)
    each = np.concatenate([[[*one.values()] for one in own] for own in model.outputs(data)])
    level = model.with_recipe(combine="min").normalised(data)
    one_scale = (each - each.mean(0)) / each.std(0)
    expected = one_scale.min(1)
    expected = (expected - expected.mean()) / expected.std()
    np.testing.assert_allclose(np.concatenate(level.score(data)), expected, rtol=1e-4, atol=1e-4)
    again = level.normalised(data)
    np.testing.assert_allclose(np.concatenate(again.score(data)), expected, rtol=1e-4, atol=1e-4)
    assert again.recipe.temperature == pytest.approx(level.recipe.temperature, rel=1e-4)


def padded(n: int, seed: int) -> list[CompletionGroup]:
    """Pairs of a good word and a bad one among filler; the chosen completion is the longer one in 80 %."""
    draw = random.Random(seed)
    groups = []
    for _ in range(n):
        sizes = sorted((draw.randint(1, 4), draw.randint(5, 9)), reverse=draw.random() < 0.8)
        texts = [
            " ".join([*draw.choices(WORDS[:4], k=size), word])
            for size, word in zip(sizes, ("sierra", "tango"), strict=True)
        ]
        groups.append(text_group("say", texts, pairs=(Pair(0, 1, 1.0),)))
    return groups


def test_odin_takes_length_out_of_quality(tmp_path: Path) -> None:
    """Measured here: a correlation of 0.65 with the length for Bradley-Terry's score, -0.32 for ODIN's quality, on
    completions whose last word was in no pair.
    """
    draw = random.Random(0)
    words = [n for n in range(1, 10) for _ in range(6)]
    held_out = [text_group("say", [" ".join([*draw.choices(WORDS[:4], k=n), "golf"])]) for n in words]
    found = {}
    for objective in ("bradley_terry", "odin"):
        model = train(tiny_policy(), padded(64, seed=0), objective, out=tmp_path / objective, batch_size=32,
                      learning_rate=1e-3, steps=20, warmup=0.0)  # fmt: skip
        assert isinstance(model, RewardModel)
        found[objective] = np.corrcoef(np.concatenate(model.score(held_out)), words)[0, 1]
    last = lines(tmp_path / "odin")[-1]
    assert found["bradley_terry"] > 0.55
    assert abs(found["odin"]) < 0.7 * found["bradley_terry"]
    assert last["accuracy"] > 0.75
    assert abs(last["corr/quality_length"]) < 0.3
    assert last["corr/length_length"] > 0.9


def test_a_run_goes_on_from_an_adapter_and_an_ensemble_gives_the_reward(tmp_path: Path) -> None:
    base = tiny_policy_dir(tmp_path, name="base")
    data = pair_groups(4)
    model = train(load_policy(base, lora=2), data, "bradley_terry", out=tmp_path / "first", **SETTINGS)
    assert isinstance(model, RewardModel)
    model.with_recipe(std=0.5).save_adapter(tmp_path / "adapter")
    start = load_reward_model(tmp_path / "adapter")
    further = train(str(tmp_path / "adapter"), data, "bradley_terry", out=tmp_path / "second", **SETTINGS)
    assert isinstance(further, RewardModel)
    moved = {
        name
        for (name, p), q in zip(start.model.named_parameters(), further.model.parameters(), strict=True)
        if not torch.equal(p, q)
    }
    assert moved
    assert all("lora_" in name or name.endswith("score.weight") for name in moved)
    further.with_recipe(std=0.5).save_adapter(tmp_path / "further")
    place = reward_ensemble([tmp_path / "adapter", tmp_path / "further"], "min").save(tmp_path / "both")
    source = rollouts(["go"], parse(f"rm:{place}"), n=3, prompts_per_step=1, max_new_tokens=4)
    train(tiny_policy(), source, "grpo", out=tmp_path / "rl", steps=1, learning_rate=1e-4)
    told = lines(tmp_path / "rl")[-1]
    assert told["reward/missing"] == 0.0
    assert np.isfinite(told["reward"])


def test_training_on_ends_a_posterior(tmp_path: Path) -> None:
    data = pair_groups(6)
    model = RewardModel.from_policy(tiny_policy()).with_uncertainty(data)
    after = train(model, data, "bradley_terry", out=tmp_path / "run", **SETTINGS)
    assert isinstance(after, RewardModel)
    assert model.recipe.uncertainty
    with pytest.raises(InputError, match="no spread"):
        after.score_with_std(data)
