"""The loop: what a step computes does not depend on how it is cut, and it computes the right thing."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import largest_difference, lines, pair_groups, text_group, tiny_policy, weights

from steerwell.data.store import open_store
from steerwell.data.types import Annotation, Pair
from steerwell.models.load import Policy, load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.objectives.table import TABLE, objective
from steerwell.train import Recipe, TrainConfig, TrainingError, run_recipe, train
from steerwell.train.schedule import rate
from tiny import tiny_policy_dir

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "batch_size": 8,
    "steps": 3,
    "warmup": 0.0,
    "reference_cache": "off",
}
OBJECTIVES: list[Any] = ["sft", "dpo", "ipo", "simpo", "kto", "bradley_terry", [("dpo", 1.0), ("sft", 0.2)]]


def names(objective: Any) -> str:
    return objective if isinstance(objective, str) else "mixture"


@pytest.mark.parametrize("objective", OBJECTIVES, ids=names)
def test_cutting_a_step_changes_nothing(tmp_path: Path, objective: Any) -> None:
    # In double precision, so that Adam does not blow rounding up where a gradient is almost 0.
    runs = {
        "whole": {"max_tokens": 100_000},
        "cut": {"max_tokens": 1},
        "rows": {"max_tokens": 150, "layout": "rows"},
    }
    trained = {name: cut_run(tmp_path / name, objective, torch.float64, **s) for name, s in runs.items()}
    assert largest_difference(trained["whole"], weights(_start(objective).double())) > 1e-3
    assert largest_difference(trained["whole"], trained["cut"]) < 1e-12
    assert largest_difference(trained["whole"], trained["rows"]) < 2e-5  # log-probs come in single precision
    for name in ("cut", "rows"):
        for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / name), strict=True):
            assert one.keys() == other.keys()
            for key in one.keys() - {"tokens"}:
                assert one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-4), key


@pytest.mark.parametrize("objective", ["dpo", "kto"])
def test_cutting_a_step_in_single_precision(tmp_path: Path, objective: str) -> None:
    whole, cut, rows = (
        cut_run(tmp_path / name, objective, torch.float32, learning_rate=1e-4, **settings)
        for name, settings in {
            "whole": {"max_tokens": 100_000},
            "cut": {"max_tokens": 1},
            "rows": {"layout": "rows"},
        }.items()
    )
    assert largest_difference(whole, weights(tiny_policy().model)) > 1e-4
    assert largest_difference(whole, cut) < 1e-6
    assert largest_difference(whole, rows) < 1e-6


def cut_run(out: Path, objective: Any, dtype: torch.dtype, **settings: Any) -> dict[str, torch.Tensor]:
    """The weights after three steps of eight groups."""
    policy = tiny_policy()
    policy.model.to(dtype)
    data, held_out = pair_groups(12), pair_groups(5, seed=1)
    return weights(train(policy, data, objective, out=out, eval_data=held_out, **(SETTINGS | settings)).model)


def _start(objective: Any) -> torch.nn.Module:
    policy = tiny_policy()
    return RewardModel.from_policy(policy).model if objective == "bradley_terry" else policy.model


@pytest.mark.parametrize("objective", ["sft", "kto", "dpo", "bradley_terry"])
def test_evaluation_does_not_depend_on_the_batch(tmp_path: Path, objective: str) -> None:
    for size in (64, 8192):
        train(
            tiny_policy(),
            pair_groups(4),
            objective,
            out=tmp_path / str(size),
            eval_data=pair_groups(9, seed=2),
            steps=1,
            learning_rate=1e-9,
            max_tokens=size,
            reference_cache="off",
        )
    small, large = (lines(tmp_path / str(size))[0] for size in (64, 8192))
    assert small["step"] == 0
    assert any(name.startswith("eval/") for name in small)
    assert small == pytest.approx(large, rel=1e-5, abs=1e-5)


def test_a_step_of_dpo_against_plain_torch(tmp_path: Path) -> None:
    data, policy, reference = pair_groups(3, k=2), tiny_policy(), tiny_policy(seed=1)
    trained = train(
        policy, data, "dpo", out=tmp_path / "a", reference=reference, beta=0.3,
        steps=1, batch_size=3, learning_rate=1e-3, warmup=0.0, max_grad_norm=None, weight_decay=0.1,
    )  # fmt: skip
    plain = tiny_policy().model
    plain.set_attn_implementation("eager")
    reference.model.set_attn_implementation("eager")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    decayed = [p for p in plain.parameters() if p.ndim >= 2]
    loss = torch.zeros(())
    for group in policy.tokenize(data):
        ratios = []
        for sequence in group.sequences:
            ids = torch.tensor([sequence.ids])
            logps = [
                m(ids)
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(1, ids[0, 1:, None])[sequence.n_prompt - 1 :]
                .sum()
                for m in (plain, reference.model)
            ]
            ratios.append(logps[0] - logps[1].detach())
        loss = loss - F.logsigmoid(0.3 * (ratios[0] - ratios[1])) / len(data)
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), math.inf)
    with torch.no_grad():
        for p in decayed:
            p.mul_(1 - 1e-3 * 0.1)
    optimizer.step()
    line = lines(tmp_path / "a")[0]
    assert line["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert line["loss"] != pytest.approx(math.log(2), abs=0.01)
    # AdamW's first step is the sign of the gradient where that is not tiny: compare the bulk.
    for (name, p), q in zip(trained.model.named_parameters(), plain.parameters(), strict=True):
        assert (p - q).abs().median() < 1e-6, name


def test_the_policy_given_is_left_alone_and_the_result_is_on_disk(tmp_path: Path) -> None:
    policy = tiny_policy()
    before = weights(policy.model)
    trained = train(policy, pair_groups(), "dpo", out=tmp_path / "run", **SETTINGS)
    assert largest_difference(before, weights(policy.model)) == 0.0
    again = load_policy(tmp_path / "run" / "model")
    assert largest_difference(weights(trained.model), weights(again.model)) == 0.0
    assert (trained.name, trained.path) == ("run", str(tmp_path / "run" / "model"))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "done"
    assert record["identity"]["reference.kind"] == "start"
    assert record["identity"]["reference.digest"] == policy.digest()
    assert record["data"]["pairs"] == 24
    assert record["versions"]["torch"]
    assert record["cpu_seconds"] > 0


def test_a_finished_run_is_given_back_without_training(tmp_path: Path) -> None:
    out, said = tmp_path / "run", []
    first = train(tiny_policy(), pair_groups(), "dpo", out=out, **SETTINGS)
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    again = train(
        tiny_policy(), pair_groups(), "dpo", out=out, progress=lambda *told: said.append(told), **SETTINGS
    )
    assert largest_difference(weights(first.model), weights(again.model)) == 0.0
    assert before == {p: p.stat().st_mtime_ns for p in out.rglob("*") if p.is_file()}
    assert "nothing was trained" in said[-1][3]


def test_a_reward_model_learns_and_loads(tmp_path: Path) -> None:
    data = [text_group(f"q{i}", ["good", "bad"], pairs=(Pair(0, 1),)) for i in range(8)]
    model = train(
        tiny_policy(), data, "bradley_terry", out=tmp_path / "rm", epochs=6, batch_size=4, learning_rate=1e-3,
        pooling="mean", eval_data=data,
    )  # fmt: skip
    assert isinstance(model, RewardModel)
    assert model.recipe.pooling == "mean"
    assert lines(tmp_path / "rm")[-1]["eval/accuracy"] == 1.0
    again = load_reward_model(tmp_path / "rm" / "model")
    assert again.score(data[:2]) == model.score(data[:2])
    more = train(again, data, "bradley_terry", out=tmp_path / "more", steps=1)
    assert more.recipe.pooling == "mean"
    with pytest.raises(ValueError, match="a reward model keeps its pooling"):
        train(again, data, "bradley_terry", out=tmp_path / "no", pooling="last")
    with pytest.raises(ValueError, match="dpo trains a policy"):
        train(again, data, "dpo", out=tmp_path / "no")


def test_dpo_starts_at_ln_2_and_a_wrong_start_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", **SETTINGS)
    assert lines(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)

    from steerwell.train import provide

    true = provide.per_token_logps
    monkeypatch.setattr(
        provide, "per_token_logps", lambda *a, **k: true(*a, **k) + (0.5 if torch.is_grad_enabled() else 0.0)
    )
    with pytest.raises(TrainingError, match=r"differs from its own start by 0\.5 nats per token"):
        train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "b", **SETTINGS)
    assert json.loads((tmp_path / "b" / "run.json").read_text())["status"] == "failed"
    assert not (tmp_path / "b" / "model").exists()


def test_a_loss_that_is_not_finite_names_the_prompts(tmp_path: Path) -> None:
    data = pair_groups(8)
    poisoned = data[5].prompt_id

    @objective(unit="pair", source="a test")
    def poison(logps, pairs, pair_probs=None, *, threshold: float = 0.0):
        """A loss with a hole in it.

        Hyperparameters:
            threshold: pairs whose probability is below it give NaN
        """
        hole = 0.0 if pair_probs is None else torch.where(pair_probs < threshold, torch.nan, 0.0)
        return logps[pairs[1]] - logps[pairs[0]] + hole, {}

    try:
        marked = list(data)
        marked[5] = replace(marked[5], pairs=(Pair(0, 1, 0.1),))
        with pytest.raises(TrainingError) as error:
            train(
                tiny_policy(), marked, poison, out=tmp_path / "a", threshold=0.2, batch_size=2, epochs=1,
                learning_rate=1e-3, checkpoint_every=100,
            )  # fmt: skip
    finally:
        TABLE.pop("poison", None)
    assert "is not finite; prompts: " + poisoned in str(error.value)
    assert str(error.value).count(",") == 0
    record = json.loads((tmp_path / "a" / "run.json").read_text())
    assert record["status"] == "failed"
    done = int(str(error.value).split("step ")[1].split(" ")[0]) - 1
    kept = [path.name for path in (tmp_path / "a" / "checkpoints").glob("*")]
    assert kept == ([f"step-{done:06d}"] if done else [])


def test_lora_trains_the_adapter_against_the_model_without_it(tmp_path: Path) -> None:
    path = tiny_policy_dir(tmp_path)
    trained = train(path, pair_groups(), "dpo", out=tmp_path / "a", lora=4, **SETTINGS)
    assert lines(tmp_path / "a")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert lines(tmp_path / "a")[-1]["rewards/margins"] > 0.01
    base = load_policy(path)
    merged = load_policy(tmp_path / "a" / "model")
    assert largest_difference(weights(base.model), weights(merged.model)) > 1e-4
    groups = pair_groups(2)
    assert trained.logps(groups)[0] == pytest.approx(merged.logps(groups)[0], abs=1e-3)
    # the adapter is drawn from the seed: another loading of the policy is the same run
    again = train(load_policy(path, lora=4), pair_groups(), "dpo", out=tmp_path / "b", **SETTINGS)
    assert largest_difference(weights(trained.model), weights(again.model)) == 0.0
    # going on with an adapter that has been trained starts at where it is, not at the base model
    further = train(again, pair_groups(), "kto", out=tmp_path / "c", **SETTINGS)
    assert lines(tmp_path / "c")[0]["loss"] == pytest.approx(0.5, abs=1e-5)
    assert isinstance(further, Policy)


def test_a_run_directory_is_a_model(tmp_path: Path) -> None:
    train(tiny_policy(), pair_groups(), "sft", out=tmp_path / "sft", **SETTINGS)
    train(
        tmp_path / "sft", pair_groups(), "dpo", out=tmp_path / "dpo", reference=tmp_path / "sft", **SETTINGS
    )
    assert lines(tmp_path / "dpo")[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_dropout_is_off_unless_wanted_and_then_repeatable(tmp_path: Path) -> None:
    def run(name: str, **settings: Any) -> dict[str, torch.Tensor]:
        policy = tiny_policy(attention_dropout=0.5)
        return weights(train(policy, pair_groups(), "sft", out=tmp_path / name, **SETTINGS, **settings).model)

    off = run("off")
    assert largest_difference(off, run("off again")) == 0.0
    state = torch.get_rng_state()
    on = run("on", dropout=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert largest_difference(on, run("on again", dropout=True)) == 0.0
    assert largest_difference(on, off) > 1e-4


def test_learning_rate_schedules() -> None:
    config = TrainConfig(warmup=0.2, final_lr=0.1)
    linear = [rate(step, 10, config) for step in range(10)]
    assert linear[:3] == pytest.approx([0.5, 1.0, 1.0])
    assert linear[9] == pytest.approx(0.1 + 0.9 / 8)
    cosine = [rate(step, 10, TrainConfig(warmup=0.0, schedule="cosine")) for step in range(10)]
    assert cosine[0] == 1.0
    assert cosine[5] == pytest.approx(0.5)
    assert {rate(step, 10, TrainConfig(warmup=0.0, schedule="constant")) for step in range(10)} == {1.0}
    assert rate(0, 1, TrainConfig()) == 1.0


def test_evaluation_and_progress_come_when_they_should(tmp_path: Path) -> None:
    told: list[tuple[str, int, int, str]] = []
    train(
        tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", eval_data=pair_groups(3, seed=1),
        progress=lambda *args: told.append(args), eval_every=2, **{**SETTINGS, "steps": 5},
    )  # fmt: skip
    assert [line["step"] for line in lines(tmp_path / "a") if "eval/loss" in line] == [0, 2, 4, 5]
    assert {stage for stage, *_ in told} == {"tokenize", "reference", "train"}
    assert [done for stage, done, *_ in told if stage == "train"] == [1, 2, 3, 4, 5]


def test_a_short_run_asks_the_reference_about_what_it_reaches_only(tmp_path: Path) -> None:
    told: list[tuple[str, int, int, str]] = []
    train(
        tiny_policy(), pair_groups(12), "dpo", out=tmp_path / "a", eval_data=pair_groups(2, seed=1), steps=2,
        batch_size=3, progress=lambda *args: told.append(args),
    )  # fmt: skip
    assert [total for stage, _, total, _ in told if stage == "reference"][-1] == 6 + 2
    assert lines(tmp_path / "a")[1]["loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_recipe_from_store_to_model(tmp_path: Path) -> None:
    tiny_policy_dir(tmp_path, name="base")
    groups = pair_groups(30, k=2)
    with open_store(tmp_path / "prefs.db") as store:
        store.set_split({"train": 0.7, "test": 0.3})
        for group in groups:
            first, second = (c.id for c in group.completions)
            store.add([group], [Annotation("preference", (first, second), "ann", 0)])
    (tmp_path / "dpo.toml").write_text(
        f'model = "{tmp_path}/base"\ndata = "{tmp_path}/prefs.db"\n'
        f'objective = "dpo"\nout = "{tmp_path}/out"\n'
        "[hyperparameters]\nbeta = 0.2\n[train]\nsteps = 2\nlearning_rate = 1e-3\n"
    )
    done = run_recipe(Recipe.from_toml(tmp_path / "dpo.toml"))
    assert done.record["status"] == "done"
    assert done.record["identity"]["objective.dpo.beta"] == 0.2
    assert done.record["data"]["pairs"] + done.record["eval_data"]["pairs"] == 30
    assert done.figures["step"] == 2
    assert "eval/rewards/accuracies" in done.figures
    assert any("pairs" in note for note in done.notes)
    with pytest.raises(ValueError, match="no split 'tset'"):
        run_recipe(Recipe.from_toml(tmp_path / "dpo.toml", [f"out={tmp_path}/b", "eval_split=tset"]))
    with pytest.raises(ValueError, match=r"unknown rule resolve = 'majorty'.*'majority'"):
        run_recipe(Recipe.from_toml(tmp_path / "dpo.toml", [f"out={tmp_path}/b", "resolve=majorty"]))
    kto = [f"out={tmp_path}/kto", "objective=kto", "resolve.rule=labels", "resolve.from_preferences=true"]
    assert run_recipe(Recipe.from_toml(tmp_path / "dpo.toml", kto)).figures["eval/kl"] >= 0
