"""Settings, recipes, and the errors that come before any work."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_runs import LengthJudge, pair_groups, text_group, tiny_policy

import steerwell
from steerwell.data.errors import InputError
from steerwell.data.types import Pair
from steerwell.train import Recipe, TrainConfig, rollouts
from steerwell.train.config import FREE_SETTINGS
from steerwell.train.loop import checked, train

RECIPE = """
model = "base"
data = "prefs.db"
objective = "dpo"
out = "runs/dpo"
[hyperparameters]
beta = 0.2
[train]
learning_rate = 5e-7
"""


class Untouchable:
    """Stands where a model is expected, and fails the test when anything looks at it."""

    def __getattribute__(self, name: str) -> object:
        if name == "__class__":
            return object
        raise AssertionError(f"the model was touched ({name}) before the settings were checked")


def refused(tmp_path: Path, data: object, objective: object, **settings: object) -> str:
    with pytest.raises(InputError) as error:
        train(Untouchable(), data, objective, out=tmp_path / "out", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)
    return str(error.value)


def test_unknown_names_are_refused_with_the_nearest_one(tmp_path: Path) -> None:
    data = pair_groups()
    assert "Did you mean 'dpo'?" in refused(tmp_path, data, "dpoo")
    assert "Did you mean 'learning_rate'?" in refused(tmp_path, data, "dpo", learning_rte=1e-3)
    assert "Did you mean 'beta'?" in refused(tmp_path, data, "dpo", betta=0.1)
    assert "neither the loop nor the objective has it" in refused(tmp_path, data, "dpo", gamma=1.0)
    assert "beta" in refused(tmp_path, data, "dpo", beta=-1.0)
    assert "batch_size = 0" in refused(tmp_path, data, "dpo", batch_size=0)
    assert not any(tmp_path.iterdir())


def test_data_that_lack_what_the_objective_takes(tmp_path: Path) -> None:
    plain = [text_group(f"q{i}", ["one", "two"]) for i in range(3)]
    assert "kto needs labels; 0 of 6 completions have one" in refused(tmp_path, plain, "kto")
    assert "dpo needs pairs; 0 of 3 groups" in refused(tmp_path, plain, "dpo")
    assert "reinforce needs rewards; 0 of 6" in refused(tmp_path, plain, "reinforce")
    scored = [text_group("q", ["one", "two"], scores=(1.0, 0.0))]
    assert "ppo_clip needs sampled completions with old_logps" in refused(tmp_path, scored, "ppo_clip")
    assert "the data is empty" in refused(tmp_path, [], "sft")
    data = pair_groups()
    assert "the evaluation data" in refused(tmp_path, data, "dpo", eval_data=plain)


def test_settings_that_would_change_nothing_are_refused(tmp_path: Path) -> None:
    data, source = pair_groups(), rollouts(["a", "b"], LengthJudge())
    assert "steps and epochs" in refused(tmp_path, data, "dpo", steps=3, epochs=2)
    assert "eval_every is given without eval_data" in refused(tmp_path, data, "dpo", eval_every=2)
    assert "watch_every is given without watch" in refused(tmp_path, data, "dpo", watch_every=2)
    assert "pooling is not used by dpo" in refused(tmp_path, data, "dpo", pooling="mean")
    assert "batch_size is not used with rollouts" in refused(tmp_path, source, "grpo", batch_size=2)
    assert "eval_data is not used with rollouts" in refused(tmp_path, source, "grpo", eval_data=data)
    assert "dpo cannot learn from rollouts" in refused(tmp_path, source, "dpo")
    assert "needs a reference" in refused(tmp_path, data, "dpo", reference=None)
    assert "needs a reference" in refused(tmp_path, data, "kto", reference="none")
    assert "simpo takes no reference" in refused(tmp_path, data, "simpo", reference="somewhere")
    assert "lora is for a policy given as a path" in refused(tmp_path, data, "dpo", lora=4)


def test_settings_out_of_range_are_refused(tmp_path: Path) -> None:
    data = pair_groups()
    for name, value in {
        "dtype": "float16",
        "gradient_checkpointing": "sometimes",
        "compile": "fast",
        "patience": 0,
        "best_mode": "up",
    }.items():
        assert f"{name} = {value}" in refused(tmp_path, data, "dpo", **{name: value})
    assert not any(tmp_path.iterdir())


def test_mixtures(tmp_path: Path) -> None:
    terms, _ = checked([("dpo", 1.0), ("sft", 0.2)], None, {"beta": 0.3})
    assert [(t.name, t.weight, t.hyper.get("beta")) for t in terms] == [("dpo", 1.0, 0.3), ("sft", 0.2, None)]
    terms, _ = checked([("dpo", 1.0, {"beta": 0.5}), ("dpo", 1.0, {"beta": 0.1})], None, {})
    assert [t.name for t in terms] == ["dpo", "dpo#2"]
    data = pair_groups()
    assert "beta' is a hyperparameter of dpo and of simpo" in refused(
        tmp_path, data, [("dpo", 1.0), ("simpo", 1.0)], beta=0.1
    )
    assert "one model" in refused(tmp_path, data, [("dpo", 1.0), ("bradley_terry", 1.0)])
    assert "a mixture is a list" in refused(tmp_path, data, [("dpo", "much")])
    assert "has no objective" in refused(tmp_path, data, [])


def test_equal_pairs_are_refused_by_their_tokens(tmp_path: Path) -> None:
    same = text_group("which", ["as it is", "as it is"], pairs=(Pair(0, 1),))
    with pytest.raises(InputError, match=r"chosen and rejected are equal: 'as it is' \(prompt .*'which'\)"):
        train(tiny_policy(), [*pair_groups(), same], "dpo", out=tmp_path / "a")
    cut = text_group(
        "which", ["a long beginning, then one", "a long beginning, then two"], pairs=(Pair(0, 1),)
    )
    with pytest.raises(InputError, match=r"after they were cut to max_length.*Raise max_length"):
        train(tiny_policy(), [cut], "dpo", out=tmp_path / "b", max_length=24)
    assert not any(tmp_path.iterdir())  # nothing is left behind


def test_a_row_that_is_too_long_for_the_model(tmp_path: Path) -> None:
    long = text_group("q", ["word " * 30, "other"], pairs=(Pair(0, 1),))
    policy = tiny_policy(max_position_embeddings=40)
    with pytest.raises(InputError, match=r"tokens; the model reads 40 .* Give max_length = 40 or less"):
        train(policy, [long], "dpo", out=tmp_path / "a")
    train(policy, [long], "dpo", out=tmp_path / "a", max_length=40)
    assert '"truncated_completions": 1' in (tmp_path / "a" / "run.json").read_text()


def test_kto_needs_two_prompts_in_a_step(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no step has two prompts"):
        train(tiny_policy(), pair_groups(), "kto", out=tmp_path / "a", batch_size=1)


def test_an_out_that_cannot_be_used(tmp_path: Path) -> None:
    data = pair_groups()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out is a file"):
        train(tiny_policy(), data, "dpo", out=tmp_path / "file")
    with pytest.raises(InputError, match="out cannot be written"):
        train(tiny_policy(), data, "dpo", out=tmp_path / "file" / "below")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="holds no run"):
        train(tiny_policy(), data, "dpo", out=tmp_path / "full")
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["thesis.txt"]


def test_another_run_in_out_is_named_by_what_differs(tmp_path: Path) -> None:
    data, out = pair_groups(), tmp_path / "out"
    train(tiny_policy(), data, "dpo", out=out, steps=1, learning_rate=1e-3)
    with pytest.raises(InputError) as error:
        train(tiny_policy(), data, "dpo", out=out, steps=1, learning_rate=2e-3, beta=0.2)
    assert "train.learning_rate: 0.001 there, 0.002 here" in str(error.value)
    assert "objective.dpo.beta: 0.1 there, 0.2 here" in str(error.value)
    assert "seed" not in str(error.value)
    with pytest.raises(InputError, match=r"\(model: "):
        train(tiny_policy(seed=1), data, "dpo", out=out, steps=1, learning_rate=1e-3, reference=tiny_policy())
    with pytest.raises(InputError, match=r"\(data: "):
        train(tiny_policy(), data[1:], "dpo", out=out, steps=1, learning_rate=1e-3)
    free = {"checkpoint_every", "keep_checkpoints", "reference_cache", "gradient_checkpointing", "sinks"}
    assert set(FREE_SETTINGS) == free
    train(tiny_policy(), data, "dpo", out=out, steps=1, learning_rate=1e-3, checkpoint_every=7)


def test_learning_rates_by_kind(tmp_path: Path) -> None:
    train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "dpo", steps=1)
    assert '"train.learning_rate": 1e-06' in (tmp_path / "dpo" / "run.json").read_text()
    train(tiny_policy(), pair_groups(), "sft", out=tmp_path / "sft", steps=1)
    assert '"train.learning_rate": 2e-05' in (tmp_path / "sft" / "run.json").read_text()


def test_a_recipe_and_its_overrides(tmp_path: Path) -> None:
    path = tmp_path / "dpo.toml"
    path.write_text(RECIPE)
    recipe = Recipe.from_toml(
        path, ["train.epochs=2", "seed=3", "out=runs/other", "hyperparameters.beta=0.3"]
    )
    assert recipe.train == TrainConfig(learning_rate=5e-7, epochs=2, seed=3)
    assert (recipe.out, recipe.hyperparameters, recipe.reference) == ("runs/other", {"beta": 0.3}, "start")
    path.write_text(RECIPE.replace('"dpo"', '[["dpo", 1.0], ["sft", 0.1, {}]]'))
    assert Recipe.from_toml(path).objective == [("dpo", 1.0), ("sft", 0.1, {})]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (RECIPE.replace("learning_rate", "learning_rat"), "Did you mean 'learning_rate'?"),
        (RECIPE.replace("data =", "dada ="), "Did you mean 'data'?"),
        (RECIPE.replace('model = "base"\n', ""), "'model' is missing"),
        (RECIPE.replace("5e-7", '"fast"'), "train.learning_rate = fast"),
        (RECIPE + "=", "not a TOML file"),
    ],
)
def test_broken_recipes(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(InputError) as error:
        Recipe.from_toml(path)
    assert said in str(error.value)
    assert str(path) in str(error.value)


def test_broken_overrides_and_a_missing_recipe(tmp_path: Path) -> None:
    path = tmp_path / "dpo.toml"
    with pytest.raises(InputError, match="no such recipe"):
        Recipe.from_toml(path)
    path.write_text(RECIPE)
    assert Recipe.from_toml(path, ["beta=0.5"]).hyperparameters == {"beta": 0.5}
    with pytest.raises(InputError, match=r"Did you mean 'train\.learning_rate'"):
        Recipe.from_toml(path, ["lerning_rate=1e-5"])
    with pytest.raises(InputError, match="is no key=value"):
        Recipe.from_toml(path, ["beta"])
    with pytest.raises(InputError, match="'model' is a value, not a table"):
        Recipe.from_toml(path, ["model.name=x"])


def test_the_room_is_the_verb() -> None:
    assert callable(steerwell.train)
    assert steerwell.train.TrainConfig is TrainConfig
