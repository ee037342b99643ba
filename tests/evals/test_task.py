"""Evaluations of made-up policies whose truth is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair, Prompt, Source
from steerwell.evals.measure import Task
from steerwell.evals.task import evaluate
from steerwell.evals.tasks import NAMES, named, shipped_prompts
from steerwell.evals.tasks.over_refusal import over_refusal
from steerwell.evals.tasks.pair_accuracy import accuracy
from steerwell.judges.refusal import refusal


@dataclass
class Speaker:
    """A policy that says ``text`` (or what ``text`` gives for a prompt and an index)."""

    name: str
    text: Any = "Certainly, here it is."
    asked: list[dict[str, Any]] = field(default_factory=list)

    def sample(self, prompts: Sequence[Prompt], n: int = 1, **settings: Any) -> list[CompletionGroup]:
        self.asked.append({"prompts": len(prompts), "n": n, **settings})
        return [
            CompletionGroup(
                p.messages,
                tuple(
                    Completion(
                        p.messages,
                        (Message("assistant", self.text(p, i) if callable(self.text) else self.text),),
                        Source("model", self.name, index=i),
                    )
                    for i in range(n)
                ),
            )
            for p in prompts
        ]


class Words:
    """A judge that scores by the number of words."""

    name = "words"

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[Annotation]:
        return [
            Annotation("score", (c.id,), self.name, len(c.text.split()))
            for g in groups
            for c in g.completions
        ]


def test_win_rate_over_the_first_policy() -> None:
    short, long = Speaker("short", "One."), Speaker("long", "One two three.")
    found = evaluate([short, long], ["win_rate"], judge=Words(), seed=7, max_new_tokens=9)
    assert [r.policy for r in found.results] == ["long"]
    result = found.get("long", "win_rate")
    assert result.measure.estimate.value == 1.0
    assert result.measure.estimate.n == len(shipped_prompts("assistant"))
    assert result.against == "short"
    assert short.asked == long.asked
    assert short.asked[0] == {
        "prompts": 40,
        "n": 1,
        "max_new_tokens": 9,
        "temperature": 1.0,
        "greedy": False,
        "seed": 7,
    }


def test_every_number_leads_back_to_texts_and_verdicts() -> None:
    long = Speaker("long", lambda p, i: f"{i} " * (i + 2))
    found = evaluate([Speaker("short", "One."), long], ["win_rate"], judge=Words(), prompts=["a?", "b?"], n=2)
    groups = found.groups["win_rate", "long"]
    assert len(groups) == 4
    for group in groups:
        ours, theirs = group.completions
        assert ours.source.name == "long"
        assert {a.completions[0] for a in group.annotations} == {ours.id, theirs.id}
    outcomes = found.get("long", "win_rate").measure.detail.comparisons
    assert {c.completion for c in outcomes} == {g.completions[0].id for g in groups}


def test_against_another_policy_and_policies_of_one_name() -> None:
    a, b = Speaker("run", "One two."), Speaker("run", "One.")
    found = evaluate([a], ["win_rate"], judge=Words(), against=b, prompts=["x?"])
    assert [(r.policy, r.against) for r in found.results] == [("run", "run (2)")]
    assert found.results[0].measure.estimate.value == 1.0


def test_refusing_everything_is_seen_as_over_refusal_and_complying_with_all_as_harm() -> None:
    mute, meek = Speaker("mute", "I'm sorry, but I can't help with that."), Speaker("meek")
    found = evaluate([mute, meek], ["over_refusal"])
    assert found.get("mute", "over_refusal").measure.estimate.value == 1.0
    assert found.get("mute", "harmful_compliance").measure.estimate.value == 0.0
    assert found.get("meek", "over_refusal").measure.estimate.value == 0.0
    assert found.get("meek", "harmful_compliance").measure.estimate.value == 1.0
    change = found.get("meek", "over_refusal").difference
    assert change is not None
    assert (change.value, change.n) == (-1.0, 50)
    assert found.get("mute", "over_refusal").difference is None
    assert found.get("meek", "harmful_compliance").measure.estimate.n == 30


@pytest.mark.parametrize("criterion", ["refusal", "compliance"])
def test_undecided_verdicts_are_counted_and_are_no_refusals(criterion: str) -> None:
    class Unsure:
        name = "unsure"

        def __call__(self, groups: Sequence[CompletionGroup]) -> list[Annotation]:
            said = {"yes": criterion == "refusal", "no": criterion != "refusal", "hm": None}
            return [
                Annotation("label", (c.id,), self.name, said[c.text], criterion=criterion)
                for g in groups
                for c in g.completions
            ]

    benign = [Prompt(as_messages(f"benign {i}")) for i in range(4)]
    harmful = [Prompt(as_messages(f"harmful {i}")) for i in range(3)]
    refused = dict(
        zip((p.id for p in benign + harmful), ("yes", "yes", "no", "hm", "no", "no", "yes"), strict=True)
    )
    policy = Speaker("p", lambda p, i: refused[p.id])
    found = evaluate([policy], [over_refusal(benign, harmful, judge=Unsure())])
    measure = found.get("p", "over_refusal").measure
    assert measure.estimate.value == pytest.approx(2 / 3)
    assert measure.coverage.to_dict() == {"expected": 4, "judged": 3, "missing": {"undecided": 1}}
    assert found.get("p", "harmful_compliance").measure.estimate.value == pytest.approx(2 / 3)
    assert "3 of 4 judged (1 undecided)" in str(found)


def test_samples_of_one_prompt_are_clustered() -> None:
    policy = Speaker("p", lambda p, i: "I can't help with that." if len(p.text) % 2 else "Sure.")
    one = evaluate([policy], ["over_refusal"]).get("p", "over_refusal").measure.estimate
    four = evaluate([policy], ["over_refusal"], n=4).get("p", "over_refusal").measure.estimate
    assert four.n == 4 * one.n
    assert one.low is not None
    assert four.low is not None
    assert four.low == pytest.approx(one.low, abs=0.01)


class Scorer:
    name = "rm"

    def __init__(self, scores: list[list[float | None]]) -> None:
        self.scores = scores

    def score(self, groups: Sequence[CompletionGroup]) -> list[list[float | None]]:
        return self.scores[: len(groups)]


@dataclass
class Sequence_:
    ids: list[int]
    n_prompt: int


@dataclass
class Tokenized:
    sequences: list[Sequence_]


class Likelihoods:
    def __init__(self, name: str, logps: list[list[float]]) -> None:
        self.name, self.values = name, logps

    def logps(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return self.values

    def tokenize(self, groups: Sequence[CompletionGroup]) -> list[Tokenized]:
        # the second completion is four times as long as the first
        return [Tokenized([Sequence_([0] * 3, 2), Sequence_([0] * 6, 2)]) for _ in groups]


def pairs(n: int, p: float = 1.0) -> list[CompletionGroup]:
    found = []
    for i in range(n):
        prompt = as_messages(f"prompt {i}")
        both = tuple(Completion(prompt, (Message("assistant", t),), Source(name=t)) for t in ("good", "bad"))
        found.append(CompletionGroup(prompt, both, pairs=(Pair(0, 1, p),)))
    return found


def test_pair_accuracy_counts_ties_as_half_and_missing_scores_not_at_all() -> None:
    scorer = Scorer([[2.0, 1.0], [1.0, 1.0], [0.0, 1.0], [None, 1.0], [5.0, 1.0]])
    result = evaluate([scorer], ["pair_accuracy"], pairs=pairs(5)).get("rm", "pair_accuracy")
    assert result.measure.estimate.value == pytest.approx(2.5 / 4)
    assert result.measure.coverage.missing == {"no score": 1}
    assert "1 exact ties, each counted as half" in result.measure.notes


def test_soft_labels_turn_the_pair_round_or_leave_it_out() -> None:
    assert accuracy(pairs(3, 0.2), [[0.0, 1.0]] * 3).estimate.value == 1.0
    undecided = accuracy(pairs(3, 0.5), [[0.0, 1.0]] * 3)
    assert undecided.estimate.value is None
    assert undecided.coverage.missing == {"no preferred side": 3}


def test_pairs_of_one_prompt_are_clustered() -> None:
    prompt = as_messages("one prompt")
    texts = tuple(Completion(prompt, (Message("assistant", str(i)),)) for i in range(11))
    group = CompletionGroup(prompt, texts, pairs=tuple(Pair(0, i) for i in range(1, 11)))
    few = accuracy([group, *pairs(2)], [[1.0, *[0.0] * 10], [1.0, 0.0], [1.0, 0.0]]).estimate
    assert few.n == 12
    assert few.low is not None
    assert few.low < 0.5  # three prompts, not twelve facts


def test_the_difference_of_two_reward_models_is_clustered_too() -> None:
    prompt = as_messages("one prompt")
    texts = tuple(Completion(prompt, (Message("assistant", str(i)),)) for i in range(41))
    group = CompletionGroup(prompt, texts, pairs=tuple(Pair(0, i) for i in range(1, 41)))
    good = Scorer([[1.0, *[0.0] * 40], [1.0, 0.0], [0.0, 1.0]])
    bad = Scorer([[0.0, *[1.0] * 40], *[[1.0, 0.0]] * 2])
    good.name = "good"
    difference = evaluate([bad, good], ["pair_accuracy"], pairs=[group, *pairs(2)]).results[1].difference
    assert difference is not None
    assert difference.n == 42
    assert difference.value == pytest.approx(39 / 42)
    assert difference.low is not None
    assert difference.low < 0.5  # three prompts, not 42 facts


def test_a_policy_is_scored_by_its_implicit_reward_and_the_baseline_by_mean_log_probability() -> None:
    base = Likelihoods("base", [[-2.0, -4.0]] * 3)  # per token: -2 and -1, the bad one is likelier
    tuned = Likelihoods("tuned", [[-1.9, -5.0]] * 3)
    found = evaluate([base, tuned], ["pair_accuracy"], pairs=pairs(3))
    assert found.get("base", "pair_accuracy_logp").measure.estimate.value == 0.0
    assert found.get("tuned", "pair_accuracy").measure.estimate.value == 1.0
    assert found.get("tuned", "pair_accuracy").measure.notes[0] == "by implicit reward"
    assert found.get("tuned", "pair_accuracy").difference is None


def test_a_task_of_ones_own_is_a_plain_object() -> None:
    from steerwell.evals.measure import Findings, Measure, Trial
    from steerwell.evals.stats import mean
    from steerwell.evals.winrate import Coverage

    def length(trial: Trial) -> Findings:
        items = tuple((g.prompt_id, float(len(c.text))) for g in trial.groups for c in g.completions)
        estimate = mean([v for _, v in items], [k for k, _ in items])
        coverage = Coverage(len(items), len(items))
        return Findings((Measure("length", estimate, coverage, items=items, unit="number"),), trial.groups)

    task = Task("length", tuple(Prompt(as_messages(t)) for t in ("a", "b", "c")), length)
    found = evaluate([Speaker("x", "four"), Speaker("y", lambda p, i: "sixsix")], [task], n=2)
    assert found.get("x", "length").measure.estimate.value == 4.0
    difference = found.get("y", "length").difference
    assert difference is not None
    assert (difference.value, difference.n) == (2.0, 3)


def test_it_prints_as_a_table_and_as_json() -> None:
    found = evaluate([Speaker("base", "No."), Speaker("tuned")], judge=Words())
    table = str(found)
    for word in ("win_rate", "over_refusal", "harmful_compliance", "tuned", "95% interval", "change"):
        assert word in table
    assert max(len(line) for line in table.splitlines()) <= 90
    back = json.loads(json.dumps(found.to_dict()))
    assert back["settings"]["judge"] == "words"
    assert {r["metric"] for r in back["results"]} == {"win_rate", "over_refusal", "harmful_compliance"}
    assert {"value", "low", "high", "n", "coverage", "difference"} <= set(back["results"][0])


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"policies": []}, "no policy"),
        ({"tasks": ["win_rat"]}, "Did you mean 'win_rate'"),
        ({"tasks": ["win_rate"], "judge": None}, "win_rate needs a judge"),
        ({"tasks": ["pair_accuracy"]}, "needs held-out pairs"),
        ({"tasks": ["pair_accuracy"], "pairs": [CompletionGroup(as_messages("x"))]}, "0 of 1 groups"),
        ({"policies": [Speaker("a")], "tasks": ["win_rate"]}, "only one is the baseline"),
        ({"policies": [Scorer([])], "tasks": ["over_refusal"]}, "can't be sampled"),
        ({"prompts": ["a", "a"]}, "asks 'a' twice"),
        ({"n": 0}, "at least 1"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_sampled(arguments: dict[str, Any], says: str) -> None:
    policies = [Speaker("a"), Speaker("b")]
    given = {"policies": policies, "tasks": ["win_rate", "over_refusal"], "judge": Words(), **arguments}
    with pytest.raises(InputError, match=says):
        evaluate(**given)
    assert policies[0].asked == []


def test_a_policy_that_returns_too_few_completions_is_an_error() -> None:
    class Lazy(Speaker):
        def sample(self, prompts: Sequence[Prompt], n: int = 1, **settings: Any) -> list[CompletionGroup]:
            return super().sample(prompts, n, **settings)[1:]

    with pytest.raises(InputError, match="lazy returned 79 completions for 80 prompts"):
        evaluate([Lazy("lazy")], ["over_refusal"])


def test_shipped_prompts() -> None:
    sets = {name: shipped_prompts(name) for name in ("assistant", "borderline", "harmful")}
    assert {name: len(prompts) for name, prompts in sets.items()} == {
        "assistant": 40,
        "borderline": 50,
        "harmful": 30,
    }
    ids = [p.id for prompts in sets.values() for p in prompts]
    assert len(set(ids)) == 120
    assert all(p.meta["category"] for prompts in sets.values() for p in prompts)
    for name in NAMES:
        assert callable(named(name))


def test_the_default_refusal_judge_says_what_the_task_reads() -> None:
    groups = Speaker("x", "I'm sorry, but I can't help with that.").sample([Prompt(as_messages("hi"))])
    [annotation] = refusal()(groups)
    assert annotation.criterion == "refusal"
    assert annotation.value is True
