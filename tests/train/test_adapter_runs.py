"""Runs with an adapter: they start at the model below it, learn, can be continued, and save what they trained."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from small_runs import largest_difference, lines, pair_groups, weights

from steerwell.data.errors import InputError
from steerwell.data.store import open_store
from steerwell.data.types import Annotation
from steerwell.models.load import load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.train import Recipe, run_recipe, train
from tiny import tiny_llama, tiny_policy_dir

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 8, "steps": 3, "warmup": 0.0}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy_dir(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dpo_starts_at_the_model_below_the_adapter(path: Path, tmp_path: Path, kind: Any) -> None:
    settings = {**SETTINGS, "lora": 4, "adapter": kind}
    trained = train(path, pair_groups(), "dpo", out=tmp_path / "a", **settings)
    assert lines(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines(tmp_path / "a")[-1]["rewards/margins"] > 0.01
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["identity"]["reference.kind"] == "start"
    saved = load_policy(tmp_path / "a" / "model")
    groups = pair_groups(2)
    assert saved.logps(groups)[0] == pytest.approx(trained.logps(groups)[0], abs=1e-3)
    assert largest_difference(weights(saved.model), weights(load_policy(path).model)) > 1e-4
    given = load_policy(path, lora=4, adapter=kind)
    again = train(given, pair_groups(), "dpo", out=tmp_path / "b", **SETTINGS)
    assert largest_difference(weights(trained.model), weights(again.model)) == 0.0


def test_a_reward_model_learns_through_an_adapter_and_its_head(path: Path, tmp_path: Path) -> None:
    data = pair_groups(16, k=2)
    settings = {**SETTINGS, "steps": 12, "learning_rate": 1e-2, "lora": 4, "pooling": "mean"}
    model = train(path, data, "bradley_terry", out=tmp_path / "a", eval_data=data, **settings)
    assert isinstance(model, RewardModel)
    first, last = lines(tmp_path / "a")[0], lines(tmp_path / "a")[-1]
    assert last["eval/loss"] < first["eval/loss"] - 0.1
    below = load_policy(path)
    start = RewardModel.from_policy(below, pooling="mean")
    found = model.model.get_base_model()
    assert (found.score.weight - start.model.score.weight).abs().max() > 1e-3
    frozen = {name: p for name, p in found.named_parameters() if not p.requires_grad}
    assert len(frozen) == len(list(below.model.base_model.parameters()))
    assert all(
        (p == below.model.base_model.get_parameter(n.replace(".base_layer", "").removeprefix("model."))).all()
        for n, p in frozen.items()
    )
    again = load_reward_model(tmp_path / "a" / "model")  # merged, with the trained head
    for one, other in zip(again.score(data), model.score(data), strict=True):
        assert one == pytest.approx(other, abs=1e-4)
    given = RewardModel.from_policy(load_policy(path, lora=4), pooling="mean")
    del settings["lora"], settings["pooling"]
    same = train(given, data, "bradley_terry", out=tmp_path / "b", **settings)
    assert largest_difference(weights(model.model), weights(same.model)) == 0.0
    settings |= {"lora": 2, "steps": 1, "learning_rate": 1e-9}
    further = train(tmp_path / "a", data, "bradley_terry", out=tmp_path / "c", **settings)
    assert further.recipe.pooling == "mean"
    assert further.score(data)[0] == pytest.approx(again.score(data)[0], abs=1e-4)


def test_a_reward_model_with_an_adapter_resumes_exactly(path: Path, tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def crash(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == 2:
            raise Crash

    settings = {**SETTINGS, "lora": 4, "adapter": "dora", "checkpoint_every": 1}
    train(path, pair_groups(), "bradley_terry", out=tmp_path / "straight", **settings)
    with pytest.raises(Crash):
        train(path, pair_groups(), "bradley_terry", out=tmp_path / "broken", progress=crash, **settings)
    train(path, pair_groups(), "bradley_terry", out=tmp_path / "broken", **settings)
    for name in ("model/model.safetensors", "metrics.jsonl"):
        straight, broken = (tmp_path / out / name for out in ("straight", "broken"))
        assert straight.read_bytes() == broken.read_bytes()


def test_what_an_adapter_is_like_is_part_of_a_run(path: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "steps": 1, "lora": 4}
    train(path, pair_groups(), "sft", out=tmp_path / "a", **settings)
    changes: list[dict[str, Any]] = [
        {"lora": 2}, {"adapter": "dora"}, {"lora_alpha": 4}, {"lora_targets": ["q_proj"]},
    ]  # fmt: skip
    for change in changes:
        with pytest.raises(InputError, match="out holds another run"):
            train(path, pair_groups(), "sft", out=tmp_path / "a", **settings | change)
    train(path, pair_groups(), "sft", out=tmp_path / "a", lora_alpha=8, **settings)  # what it was


def test_refusals_leave_no_folder(path: Path, tmp_path: Path) -> None:
    for settings, what in (
        ({"lora": 4, "adapter": "qlora", "out": tmp_path / "a" / "b"}, "CUDA"),
        ({"adapter": "dora", "out": tmp_path / "c"}, "without lora"),
        ({"lora": 4, "lora_targets": ["nothing"], "out": tmp_path / "d"}, "no linear layer"),
    ):
        with pytest.raises(InputError, match=what):
            train(path, pair_groups(), "sft", **settings)
    assert list(tmp_path.iterdir()) == []


def test_a_recipe_with_an_adapter(tmp_path: Path) -> None:
    tiny_policy_dir(tmp_path, name="base", model=tiny_llama())
    with open_store(tmp_path / "prefs.db") as store:
        for group in pair_groups(8, k=2):
            first, second = (c.id for c in group.completions)
            store.add([group], [Annotation("preference", (first, second), "ann", 0)], split="train")
    (tmp_path / "rm.toml").write_text(
        f'model = "{tmp_path}/base"\ndata = "{tmp_path}/prefs.db"\nobjective = "bradley_terry"\n'
        f'out = "{tmp_path}/out"\nlora = 4\nadapter = "dora"\nlora_alpha = 4\nlora_targets = ["q_proj"]\n'
        "[train]\nsteps = 1\n"
    )
    model = run_recipe(Recipe.from_toml(tmp_path / "rm.toml")).model
    trained = [name for name, p in model.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 3 + 1
    with pytest.raises(InputError, match="adapter = drora"):
        Recipe.from_toml(tmp_path / "rm.toml", ["adapter=drora"])
