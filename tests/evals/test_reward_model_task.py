"""The whole task on made-up models whose truth is known."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest

from steerwell.cli.glossary import METRICS
from steerwell.data import resolve
from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source
from steerwell.evals.task import Evaluation, evaluate
from steerwell.evals.tasks.reward_model import reward_model


def worth(completion: Completion) -> float:
    """What a completion says it is worth; one that says nothing is worth little."""
    found = re.search(r"worth (-?\d+\.\d+)", completion.text)
    return float(found[1]) if found else -9.0


@dataclass
class Knows:
    """Scores by the true worth, in its own units; ``length`` adds a liking for words."""

    name: str = "knows"
    scale: float = 1.0
    length: float = 0.0

    def score(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return [
            [self.scale * worth(c) + self.length * len(c.text.split()) for c in g.completions] for g in groups
        ]


def data(n: int, annotators: int = 3, seed: int = 0) -> list[CompletionGroup]:
    """Pairs judged by annotators who follow Bradley and Terry, and lengths that mean nothing."""
    rng = np.random.default_rng(seed)
    found = []
    for i in range(n):
        prompt = as_messages(f"prompt {i}")
        texts = [f"worth {rng.normal(0, 2):.3f} " + "word " * int(rng.integers(1, 30)) for _ in range(4)]
        made = tuple(
            Completion(prompt, (Message("assistant", t),), Source(name=f"m{j % 2}"))
            for j, t in enumerate(texts)
        )
        chance = 1 / (1 + np.exp(worth(made[1]) - worth(made[0])))
        votes = tuple(
            Annotation("preference", (made[0].id, made[1].id), f"a{k}", int(rng.random() > chance))
            for k in range(annotators)
        )
        gold = tuple(Annotation("score", (c.id,), "gold", worth(c)) for c in made)
        meta = {"domain": "even" if i % 2 == 0 else "odd"}
        found.append(CompletionGroup(prompt, made, votes + gold, meta=meta))
    return list(resolve.majority(found))


def value(found: Evaluation, metric: str, policy: str = "knows") -> float:
    number = found.get(policy, metric).measure.estimate.value
    assert number is not None
    return number


def test_a_model_that_knows_the_truth_is_at_the_ceiling_and_calibrated() -> None:
    groups = data(1500)
    found = evaluate([Knows()], ["reward_model"], pairs=groups)
    ceiling = found.get("knows", "rm_ceiling").measure.estimate
    assert ceiling.value is not None
    assert value(found, "rm_accuracy") == pytest.approx(ceiling.value, abs=0.03)
    assert value(found, "rm_ceiling/one_vote") < ceiling.value
    assert value(found, "rm_accuracy") < 0.95  # and yet it knows all there is
    assert value(found, "rm_accuracy/votes=all agree") > value(found, "rm_accuracy/votes=under 3/4") + 0.1
    assert value(found, "longer_wins") == pytest.approx(0.5, abs=0.05)
    assert value(found, "longer_wins") + value(found, "shorter_wins") == pytest.approx(1)
    assert value(found, "rm_over_length") > 0.3
    assert value(found, "bon_recovered") == pytest.approx(1.0)
    assert value(found, "bon_gold/n=1") == pytest.approx(0.0, abs=0.1)
    names = {r.measure.name for r in found.results}
    assert {"rm_accuracy/domain=even", "rm_accuracy/chosen_from=m0", "rm_reliability/1"} <= names
    assert {name.partition("/")[0] for name in names} <= set(METRICS)  # every figure can be explained


def test_margins_are_calibrated_against_single_votes_and_the_temperature_finds_the_scale() -> None:
    groups = data(1500, annotators=1)
    for scale in (1.0, 3.0):
        found = evaluate([Knows(scale=scale)], ["reward_model"], pairs=groups)
        assert value(found, "rm_temperature") == pytest.approx(scale, rel=0.12)
        assert value(found, "rm_ece/fitted") < 2.5 * value(found, "rm_ece/by_chance")
        assert (value(found, "rm_ece") > 3 * value(found, "rm_ece/by_chance")) is (scale == 3.0)


def test_a_temperature_that_the_model_carries_is_used() -> None:
    @dataclass
    class Recipe:
        temperature: float = 3.0

    class Calibrated(Knows):
        recipe = Recipe()

    groups = data(800, annotators=1)
    found = evaluate([Calibrated(scale=3.0)], ["reward_model"], pairs=groups)
    assert value(found, "rm_ece") < 2.5 * value(found, "rm_ece/by_chance")
    assert "the temperature of the model" in found.get("knows", "rm_ece").measure.notes[0]
    assert "/ 3)" in found.get("knows", "rm_ece").measure.notes[0]


def test_without_repeated_votes_the_ceiling_is_not_a_number() -> None:
    found = evaluate([Knows()], ["reward_model"], pairs=data(30, annotators=1))
    result = found.get("knows", "rm_ceiling")
    assert result.measure.estimate.value is None
    assert "cannot be known" in result.measure.notes[0]
    assert "have no second annotator" in str(found)


def test_a_liking_for_words_shows() -> None:
    groups = data(400)
    found = evaluate([Knows(), Knows("wordy", 0.01, 1.0)], ["reward_model"], pairs=groups)
    assert value(found, "rm_accuracy/length=chosen longer", "wordy") > 0.95
    assert value(found, "rm_accuracy/length=chosen shorter", "wordy") < 0.05
    assert value(found, "probe/repeated", "wordy") == 1.0
    assert value(found, "probe/repeated") == 0.5  # the same worth, an equal score
    assert value(found, "bon_recovered", "wordy") < 0.3
    change = found.get("wordy", "rm_accuracy").difference
    assert change is not None
    assert change.high is not None
    assert change.high < 0
    assert "change" in str(found)


def test_the_table_is_grouped_and_leaves_detail_to_json() -> None:
    found = evaluate([Knows()], ["reward_model"], pairs=data(60))
    table = str(found)
    lines = table.splitlines()
    assert any("accuracy, all pairs" in line for line in lines)
    assert any("probes" in line for line in lines)
    assert "rm_reliability" not in table
    assert "change" not in table.split("↑ higher")[0]
    assert "more figures" in table
    assert len(lines) < 65
    assert max(map(len, lines)) <= 110
    assert len(found.to_dict()["results"]) > len(lines)


def test_probes_can_be_fewer_or_left_out() -> None:
    groups = data(12)
    few = evaluate([Knows()], [reward_model(groups, probe_prompts=5)])
    assert few.get("knows", "probe/looped").measure.estimate.n == 5
    assert "5 of 12 prompts" in few.get("knows", "probe/looped").measure.notes
    none = evaluate([Knows()], [reward_model(groups, probe_prompts=0)])
    assert not any(r.measure.name.startswith("probe") for r in none.results)


class Policy:
    def __init__(self, name: str, scale: float) -> None:
        self.name, self.scale = name, scale

    def logps(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return [[s - 5 for s in scores] for scores in Knows(scale=self.scale).score(groups)]


def test_a_policy_is_measured_by_its_implicit_reward() -> None:
    groups = data(200)
    base, tuned = Policy("base", 1.0), Policy("tuned", 3.0)
    found = evaluate([tuned], ["reward_model"], pairs=groups, against=base)
    twin = evaluate([Knows()], ["reward_model"], pairs=groups)
    assert value(found, "rm_accuracy", "tuned") == value(twin, "rm_accuracy")
    with pytest.raises(InputError, match=r"measures rewards, and base has none.*--against"):
        evaluate([base, tuned], ["reward_model"], pairs=groups)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="0 of 1 groups"):
        reward_model([CompletionGroup(as_messages("x"))])
    with pytest.raises(InputError, match="needs held-out pairs"):
        evaluate([Knows()], ["reward_model"])
    with pytest.raises(InputError, match="probe_prompts"):
        reward_model(data(3), probe_prompts=-1)


def test_a_baseline_that_is_not_asked_for_gives_the_difference_and_no_rows() -> None:
    groups = data(200)
    for task in ("reward_model", "pair_accuracy"):
        apart = evaluate([Knows("wordy", 0.01, 1.0)], [task], pairs=groups, against=Knows())
        beside = evaluate([Knows(), Knows("wordy", 0.01, 1.0)], [task], pairs=groups)
        assert {r.policy for r in apart.results} == {"wordy"}
        assert set(apart.groups) == {(task, "wordy")}
        assert [r.difference for r in apart.results] == [
            r.difference for r in beside.results if r.policy == "wordy"
        ]
        metric = "rm_accuracy" if task == "reward_model" else "pair_accuracy"
        assert apart.get("wordy", metric).difference is not None


def test_the_brier_score_has_a_paired_difference() -> None:
    found = evaluate([Knows(), Knows("loud", 5.0)], ["reward_model"], pairs=data(300, annotators=1))
    difference = found.get("loud", "rm_brier").difference
    assert difference is not None
    assert difference.value == pytest.approx(value(found, "rm_brier", "loud") - value(found, "rm_brier"))
    assert difference.low is not None
    assert difference.low > 0
