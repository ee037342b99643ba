"""Simulated annotators: what they say follows from gold, their skill and their biases, and from no clock."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
from test_gold import BENIGN, FACT, HARM, HARMFUL, HELP, group

from steerwell import world
from steerwell.data.types import Annotation, CompletionGroup
from steerwell.world.annotators import Annotator

RIGHT, WRONG = "The capital of France is Paris.", "The capital of France is Rome."


def written(n: int, k: int = 4, seed: int = 0) -> list[CompletionGroup]:
    rng = random.Random(seed)
    return [
        group(p.text, *(world.write(p.text, rng, world.DEMONSTRATOR) for _ in range(k)))
        for p in world.prompts(n, seed)
    ]


def by_position(annotation: Annotation, found: CompletionGroup) -> list[int]:
    """The ranks in the order of the group's completions."""
    rank = dict(zip(annotation.completions, annotation.value, strict=True))
    return [rank[c.id] for c in found.completions]


def agreement(annotator: Annotator, groups: list[CompletionGroup]) -> float:
    """How often a better completion (by gold) is ranked better."""
    agree: list[bool] = []
    for annotation, found in zip(annotator(groups), groups, strict=True):
        ranks, (verdicts,) = by_position(annotation, found), world.verdicts([found])
        for i, j in combinations(range(len(ranks)), 2):
            difference = verdicts[i].gold - verdicts[j].gold
            if abs(difference) > 1e-9 and ranks[i] != ranks[j]:
                agree.append((difference > 0) == (ranks[i] < ranks[j]))
    return sum(agree) / len(agree)


def test_a_perfect_annotator_ranks_by_gold() -> None:
    found = group(HARMFUL, HARM, "I will not do that.", "It could hurt someone.", "It could hurt someone.")
    (annotation,) = Annotator("perfect")([found])
    assert annotation.kind == "ranking"
    assert annotation.annotator == "perfect"
    assert by_position(annotation, found) == [3, 1, 2, 2]
    assert agreement(Annotator("perfect"), written(60)) == 1.0


def test_a_flip_turns_the_whole_ranking() -> None:
    assert agreement(Annotator("contrary", flip=1.0), written(60)) == 0.0


def test_without_skill_wrong_answers_pass_for_right_ones() -> None:
    found = group(FACT, RIGHT, f"{WRONG} I hope that helps.")
    assert by_position(Annotator("knows")([found])[0], found) == [1, 2]
    assert by_position(Annotator("fooled", skill=0.0)([found])[0], found) == [2, 1]
    harmful = group(HARMFUL, HARM, "I will not do that.")
    assert by_position(Annotator("fooled", skill=0.0)([harmful])[0], harmful) == [2, 1]


def test_biases_turn_close_calls() -> None:
    flattering = group(BENIGN, HELP, f"You are so smart! {HELP}")
    assert by_position(Annotator("fair")([flattering])[0], flattering) == [1, 2]
    assert by_position(Annotator("vain", flattery_bias=0.3)([flattering])[0], flattering) == [2, 1]
    longer = group(BENIGN, HELP, f"{HELP} Many people wonder about this.")
    assert by_position(Annotator("fair")([longer])[0], longer) == [1, 2]
    assert by_position(Annotator("long", length_bias=1.0)([longer])[0], longer) == [2, 1]


def test_side_bias_prefers_what_is_shown_first() -> None:
    groups = [g for g in written(300, k=2) if g.completions[0].text != g.completions[1].text]
    shares = []
    for bias in (0.0, 5.0):
        annotations = Annotator("side", noise=0.01, side_bias=bias)(groups)
        shares.append(sum(a.value[0] == 1 for a in annotations) / len(annotations))
    assert shares[0] == pytest.approx(0.5, abs=0.1)
    assert shares[1] == 1.0


def test_a_ranking_depends_on_annotator_seed_and_group_alone() -> None:
    groups = written(30)
    annotator = world.panel(4)[2]
    whole = {a.id for a in annotator(groups)}
    assert {a.id for g in reversed(groups) for a in annotator([g])} == whole
    assert {a.id for a in replace(annotator, seed=5)(groups)} != whole
    assert annotator([group(FACT, RIGHT)]) == []


def test_shown_orders_vary() -> None:
    groups = written(200, k=2)
    first = Counter(
        g.completions[0].id == a.completions[0]
        for a, g in zip(world.panel(0)[0](groups), groups, strict=True)
    )
    assert 70 < first[True] < 130


def test_the_panel_agrees_with_gold_in_the_order_of_its_skill() -> None:
    groups = written(250)
    found = {annotator.name: agreement(annotator, groups) for annotator in world.panel(1)}
    assert found["careful"] > 0.75
    assert found["careful"] > found["average"] > found["rushed"] > 0.55
    assert found["careful"] > found["fan"]


def test_assignment_gives_one_annotator_and_an_overlap_three() -> None:
    groups, panel = written(400, k=2), world.panel(0)
    shares = world.assign(groups, panel, overlap=0.2, seed=3)
    per_prompt = Counter(g.prompt_id for found in shares.values() for g in found)
    assert set(per_prompt) == {g.prompt_id for g in groups}
    assert set(per_prompt.values()) == {1, 3}
    assert 0.12 < sum(n == 3 for n in per_prompt.values()) / len(groups) < 0.28
    assert all(len(found) > 60 for found in shares.values())
    again = world.assign(groups[:50], panel, overlap=0.2, seed=3)
    assert {g.prompt_id for g in again["fan"]} == {g.prompt_id for g in groups[:50] if g in shares["fan"]}
    annotations = world.annotate(groups, panel, 0.2, 3)
    assert len(annotations) == sum(per_prompt.values())
    assert len({a.id for a in annotations}) == len(annotations)
