"""Process reward models end to end: planted wrong steps are found, scores depend on nothing else, recipes carry on."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import largest_difference, lines, step_groups, text_group, tiny_policy, weights

from steerwell.data import resolve
from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.steps import SEPARATOR, annotate_steps
from steerwell.data.types import Completion, CompletionGroup, Pair
from steerwell.models.batch import build
from steerwell.models.forward import hidden_states
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import ScoringRecipe, made_for
from steerwell.models.step_scores import AGGREGATES, aggregate, step_scores
from steerwell.models.step_tokens import token_steps
from steerwell.train.loop import train

RIGHT = ["alpha", "bravo", "delta", "echo", "golf"]
WRONG = ["kilo", "lima", "mike", "oscar", "papa"]


def step(draw: random.Random, right: bool) -> str:
    return " ".join(draw.choices(RIGHT if right else WRONG, k=2))


def solutions(n: int, seed: int, *, middle: bool = False) -> list[CompletionGroup]:
    """Groups of two solutions of three steps with verdicts. ``middle``: the second is wrong in its middle step only."""
    draw = random.Random(seed)
    groups = []
    for i in range(n):
        truths = [[draw.random() < 0.6 for _ in range(3)] for _ in range(2)]
        if middle:
            truths = [[True, True, True], [True, False, True]]
        group = text_group(f"solve {i}", [SEPARATOR.join(step(draw, t) for t in own) for own in truths])
        made = [annotate_steps(c, own, "truth") for c, own in zip(group.completions, truths, strict=True)]
        groups.append(replace(group, annotations=tuple(made)))
    return groups


def auc(right: list[float], wrong: list[float]) -> float:
    wins = [(a > b) + (a == b) / 2 for a in right for b in wrong]
    return sum(wins) / len(wins)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[RewardModel, Path]:
    out = tmp_path_factory.mktemp("prm") / "run"
    model = train(
        tiny_policy(),
        resolve.step_labels(solutions(160, 0)),
        "process_reward",
        out=out,
        eval_data=resolve.step_labels(solutions(16, 1)),
        learning_rate=3e-3,
        batch_size=16,
        epochs=4,
    )
    return model, out


def test_wrong_steps_are_found_on_held_out_data(trained: tuple[RewardModel, Path]) -> None:
    model, out = trained
    held_out = resolve.step_labels(solutions(40, 2))
    right, wrong = [], []
    for group, found in zip(held_out, model.score_steps(held_out), strict=True):
        for labels, probabilities in zip(group.step_labels or (), found, strict=True):
            for label, p in zip(labels or (), probabilities, strict=True):
                (right if label == 1.0 else wrong).append(p)
    assert auc(right, wrong) > 0.95
    assert all(0 <= p <= 1 for p in (*right, *wrong))
    first, last = lines(out)[0], lines(out)[-1]
    assert first["eval/loss"] == pytest.approx(math.log(2), abs=0.02)
    assert last["eval/loss"] < first["eval/loss"] / 2
    assert last["eval/scores/right"] > 0 > last["eval/scores/wrong"]


def test_the_worst_step_tells_what_the_last_one_does_not(trained: tuple[RewardModel, Path]) -> None:
    model, _ = trained
    groups = solutions(40, 3, middle=True)
    found = {}
    for name in AGGREGATES:
        scored = replace(model, recipe=replace(model.recipe, aggregate=name)).score(groups)
        found[name] = auc([own[0] for own in scored], [own[1] for own in scored])
    assert found["min"] > 0.95
    assert found["prod"] > 0.95
    assert found["min"] > found["last"] + 0.1


def test_what_is_saved_scores_as_what_was_trained(trained: tuple[RewardModel, Path]) -> None:
    model, out = trained
    asked = ScoringRecipe("last", aggregate="min", step_separator="\n\n")
    assert model.recipe == made_for(model.tokenizer, asked)
    loaded = load_reward_model(out / "model")
    assert loaded.recipe == model.recipe
    groups = solutions(3, 4)
    assert loaded.score(groups) == model.score(groups)
    assert loaded.score_steps(groups) == model.score_steps(groups)
    raw = model.score_steps(groups)
    expected = [[min(math.log(p) for p in own) for own in each] for each in raw]
    for scores, wanted in zip(model.score(groups), expected, strict=True):
        assert scores == pytest.approx(wanted, abs=1e-9)
    other = replace(model, recipe=replace(model.recipe, aggregate="prod", mean=-1.0, std=2.0))
    again = [[(sum(math.log(p) for p in own) + 1) / 2 for own in each] for each in raw]
    for scores, wanted in zip(other.score(groups), again, strict=True):
        assert scores == pytest.approx(wanted, abs=1e-9)
    assert other.digest() != model.digest()


def test_what_is_said_of_steps_changes_no_other_reward_model() -> None:
    assert ScoringRecipe(step_separator="\n\n").digest() == ScoringRecipe().digest()
    assert ScoringRecipe(aggregate="min").digest() != ScoringRecipe().digest()
    plain = RewardModel.from_policy(tiny_policy())
    with pytest.raises(InputError, match="is no process reward model"):
        plain.score_steps(solutions(1, 0))
    with pytest.raises(InputError, match=r"unknown aggregate 'mean'"):
        ScoringRecipe(aggregate="mean")


def test_aggregates_literally() -> None:
    def log_odds(p: float) -> float:
        return math.log(p / (1 - p))

    steps = [log_odds(0.9), log_odds(0.5), log_odds(0.8)]
    assert aggregate("min", steps) == pytest.approx(math.log(0.5))
    assert aggregate("prod", steps) == pytest.approx(math.log(0.9 * 0.5 * 0.8))
    assert aggregate("last", steps) == pytest.approx(math.log(0.8))
    assert aggregate("prod", [60.0, 50.0]) < aggregate("prod", [60.0, 60.0]) < 0, "near 1 still told apart"
    assert aggregate("prod", [-2000.0] * 3) == -6000.0, "and near 0 no product underflows"


@pytest.mark.parametrize("layout", ["tree", "rows", "padded"])
def test_scores_of_steps_are_those_of_each_completion_alone(layout: Any) -> None:
    model = RewardModel.from_policy(tiny_policy(), name="rm")
    torch.nn.init.normal_(model.model.score.weight, std=1.0, generator=torch.Generator().manual_seed(0))
    groups = [*solutions(3, 5), text_group("p", ["one\n\ntwo\n\n漢字 three", "x"])]
    tokens = model.tokenize(groups)
    own = [token_steps(model.tokenizer, g, t) for g, t in zip(groups, tokens, strict=True)]
    flat = torch.tensor([s for group in own for steps in group for s in steps])
    with torch.no_grad():
        scores, owner = step_scores(model.model, build(tokens, layout), flat)
        expected, owners, n = [], [], 0
        for group_steps, made in zip(own, tokens, strict=True):
            for steps, sequence in zip(group_steps, made.sequences, strict=True):
                alone = build([replace_sequences(made, [sequence])], "rows")
                states = hidden_states(model.model, alone)
                for k in sorted(set(steps)):
                    last = sequence.n_prompt + max(i for i, s in enumerate(steps) if s == k)
                    expected.append(float(states[last] @ model.model.score.weight[0]))
                    owners.append(n)
                n += 1
    assert owner.tolist() == owners
    assert scores.tolist() == pytest.approx(expected, abs=1e-4)


def replace_sequences(made: Any, sequences: list[Any]) -> Any:
    return type(made)(sequences, made.group, [False] * len(sequences))


def test_the_cut_of_a_step_changes_nothing(tmp_path: Path) -> None:
    """Micro-batches, and the mean by completion, whose unlabelled steps and completions count nothing."""
    groups = resolve.step_labels(solutions(8, 6))
    holes = [
        replace(g, step_labels=(None if i % 3 == 0 else (None, *g.step_labels[0][1:]), g.step_labels[1]))
        for i, g in enumerate(groups)
        if g.step_labels is not None and g.step_labels[0] is not None
    ]
    for reduction in ("step_mean", "step_sequence_mean"):
        made = [
            train(
                tiny_policy(),
                holes,
                "process_reward",
                out=tmp_path / f"{reduction}{tokens}",
                reduction=reduction,
                batch_size=8,
                steps=2,
                learning_rate=1e-3,
                max_tokens=tokens,
            )
            for tokens in (100_000, 100)
        ]
        assert largest_difference(weights(made[0].model), weights(made[1].model)) < 2e-6
    ends = [lines(tmp_path / f"{r}100000")[-1]["loss"] for r in ("step_mean", "step_sequence_mean")]
    assert ends[0] != ends[1]


def test_a_run_that_was_stopped_ends_with_the_same_bytes(tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    def run(out: Path, stop_at: int | None = None) -> Path:
        def progress(stage: str, done: int, total: int, note: str) -> None:
            if stage == "train" and done == stop_at:
                raise Stopped

        train(
            tiny_policy(),
            step_groups(),
            "process_reward",
            out=out,
            steps=5,
            batch_size=3,
            checkpoint_every=2,
            progress=progress,
        )
        return out / "model" / "model.safetensors"

    with pytest.raises(Stopped):
        run(tmp_path / "stopped", 3)
    assert run(tmp_path / "stopped").read_bytes() == run(tmp_path / "straight").read_bytes()


def test_the_recipe_says_how_steps_are_cut_and_put_together(tmp_path: Path) -> None:
    group = text_group("p", ["one\ntwo", "three\nfour"])
    made = [annotate_steps(c, [True, False], "me", separator="\n") for c in group.completions]
    groups = resolve.step_labels([replace(group, annotations=tuple(made))])
    model = train(
        tiny_policy(),
        groups,
        "process_reward",
        out=tmp_path / "a",
        steps=1,
        batch_size=1,
        aggregate="prod",
        step_separator="\n",
    )
    assert [len(own) for own in model.score_steps([text_group("p", ["one\ntwo\nthree"])])[0]] == [3]
    assert model.recipe.aggregate == "prod"
    with pytest.raises(InputError, match="a process reward model keeps its step_separator"):
        train(model, groups, "process_reward", out=tmp_path / "b", step_separator="\n\n")
    again = train(model, groups, "process_reward", out=tmp_path / "c", steps=1, batch_size=1)
    assert again.recipe == model.recipe
    pairs = [replace(group, pairs=(Pair(0, 1),))]
    settings: dict[str, Any] = {"aggregate": "min", "step_separator": "\n"}
    for name in settings:
        with pytest.raises(InputError, match=f"{name} is not used by bradley_terry"):
            train(tiny_policy(), pairs, "bradley_terry", out=tmp_path / "d", **{name: settings[name]})


def test_data_without_labels_of_steps_are_refused(tmp_path: Path) -> None:
    with pytest.raises(
        InputError,
        match=r"process_reward needs step_labels; 0 of 2 completions in the data have one.*resolve",
    ):
        train(tiny_policy(), solutions(1, 0), "process_reward", out=tmp_path / "x")


def test_labels_and_ends_that_do_not_fit_are_named(tmp_path: Path) -> None:
    group = text_group("p", ["one\n\ntwo"])
    bad = {
        "3 labels for 2 steps of 'one": replace(group, step_labels=((1.0, 0.0, 0.0),)),
        "must be from 0 to 1, got 2.0": replace(group, step_labels=((1.0, 2.0),)),
        r"steps end at \(3, 9\) in a completion of 8": replace(
            group, steps=((3, 9),), step_labels=((1.0, 0.0),)
        ),
    }
    for message, wrong in bad.items():
        with pytest.raises(InputError, match=rf"{message}.*prompt .*'p'"):
            train(tiny_policy(), [wrong], "process_reward", out=tmp_path / "x")


def history_in_prompt(turn: str, chosen: str, rejected: str) -> tuple[CompletionGroup, CompletionGroup]:
    """One pair twice: its first step within the completions, and at the end of the prompt's tokens."""
    within = text_group("p", [turn + chosen, turn + rejected], pairs=(Pair(0, 1),))
    tokenizer = tiny_policy().tokenizer
    asked = tokenizer("<|user|>p<|end|><|assistant|>" + turn, add_special_tokens=False)["input_ids"]
    before = tuple(
        Completion(
            within.prompt,
            (Message("assistant", words),),
            token_ids=tuple(tokenizer(words + "<|end|>", add_special_tokens=False)["input_ids"]),
            prompt_token_ids=tuple(asked),
        )
        for words in (chosen, rejected)
    )
    return within, replace(within, completions=before)


def test_step_dpo_trains_and_does_not_care_where_the_history_is(tmp_path: Path) -> None:
    within, before = history_in_prompt("first the echo\n\n", "then golf\n\nalpha", "then lima\n\npapa")
    made, told = [], []
    for name, group in (("within", within), ("before", before)):
        out = tmp_path / name
        model = train(tiny_policy(), [group], "step_dpo", out=out, steps=3, batch_size=1, learning_rate=1e-3)
        made.append(weights(model.model))
        told.append(lines(out))
    assert largest_difference(*made) < 2e-5
    assert told[0][0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert told[0][-1]["loss"] < told[0][0]["loss"]
    for a, b in zip(*told, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
        assert a["logps/chosen"] == pytest.approx(b["logps/chosen"], abs=1e-4)
    plain = train(
        tiny_policy(), [within], "dpo", out=tmp_path / "dpo", steps=3, batch_size=1, learning_rate=1e-3
    )
    assert largest_difference(weights(plain.model), made[0]) > 1e-4, "the step after the one that counts"
