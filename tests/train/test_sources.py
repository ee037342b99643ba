"""Rollouts, and the seeded order of data."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from small_runs import LengthJudge, lines, tiny_policy, weights

from steerwell.data.errors import InputError
from steerwell.data.types import Annotation, CompletionGroup, Prompt
from steerwell.train.loop import train
from steerwell.train.sources import Source, derived_seed, rollouts, shuffled, steps_in, with_scores

PROMPTS = [f"go {i}" for i in range(5)]


def test_every_pass_sees_everything_once_and_in_another_order() -> None:
    steps = [shuffled(10, step, 4, seed=0, end=20) for step in range(5)]
    seen = [i for step in steps for i in step]
    assert Counter(seen[:10]) == Counter(seen[10:]) == Counter(range(10))
    assert seen[:10] != seen[10:]
    assert shuffled(10, 3, 4, seed=0, end=20) == steps[3]
    assert shuffled(10, 0, 4, seed=1) != steps[0]


def test_the_last_step_may_be_smaller() -> None:
    assert [len(shuffled(10, step, 4, 0, 10)) for step in range(3)] == [4, 4, 2]
    assert steps_in(10, 4, 1.0) == 3
    assert steps_in(10, 4, 0.4) == 1
    assert steps_in(10, 4, 2.0) == 5


def test_seeds_differ_by_purpose_and_step() -> None:
    made = {derived_seed(seed, what, n) for seed in (0, 1) for what in ("order", "rollout") for n in (0, 1)}
    assert len(made) == 8


def test_a_rollout_is_a_function_of_policy_step_and_seed() -> None:
    source = rollouts(PROMPTS, LengthJudge(), n=3, prompts_per_step=2, max_new_tokens=6)
    assert isinstance(source, Source)
    policy = tiny_policy()
    first, again = source.step(policy, 4, 0), source.step(policy, 4, 0)
    other_step, other_seed = source.step(policy, 5, 0), source.step(policy, 4, 1)
    tokens = [[c.token_ids for g in groups for c in g.completions] for groups in (first, again)]
    assert tokens[0] == tokens[1]
    for other in (other_step, other_seed):
        assert [c.token_ids for g in other for c in g.completions] != tokens[0]
    assert [len(group.completions) for group in first] == [3, 3]
    assert all(
        s == len(c.text) / 10 for g in first for s, c in zip(g.scores or (), g.completions, strict=True)
    )


def test_the_same_prompt_is_sampled_anew_at_every_step() -> None:
    source = rollouts(["go"], LengthJudge(), n=2, prompts_per_step=1, max_new_tokens=6, updates=2)
    policy = tiny_policy()
    steps = [source.step(policy, step, 0)[0].completions for step in (0, 1, 2)]
    tokens = [[c.token_ids for c in completions] for completions in steps]
    assert tokens[0] == tokens[1] != tokens[2]
    assert [c.source.step for c in steps[2]] == [1, 1]


def test_failed_verdicts_are_no_scores() -> None:
    source = rollouts(PROMPTS, LengthJudge(skip=2), n=2, prompts_per_step=2, max_new_tokens=6)
    groups = source.step(tiny_policy(), 0, 0)
    assert [s is None for g in groups for s in g.scores or ()] == [True, False, True, False]
    one = groups[0].completions[0].id
    twice = [
        Annotation("score", (one,), name, value) for name, value in (("a", 1.0), ("b", 2.0), ("c", None))
    ]
    assert with_scores(groups, twice)[0].scores == (1.5, None)


def test_bad_settings_of_rollouts() -> None:
    with pytest.raises(InputError, match="there are none"):
        rollouts([], LengthJudge())
    with pytest.raises(InputError, match="n = 0"):
        rollouts(PROMPTS, LengthJudge(), n=0)
    groups = [CompletionGroup(Prompt(()).messages)]
    assert len(rollouts([*PROMPTS, *PROMPTS, *groups], LengthJudge()).prompts) == 6


def grpo(
    out: Any, skip: int = 0, objective: str = "grpo", steps: int = 6, updates: int = 1, **more: Any
) -> Any:
    source = rollouts(PROMPTS, LengthJudge(skip), n=6, prompts_per_step=4, max_new_tokens=6, updates=updates)
    settings = {"learning_rate": 3e-3, "warmup": 0.0, **more}
    return train(tiny_policy(), source, objective, out=out, steps=steps, **settings)


def test_grpo_raises_the_reward_it_is_given(tmp_path: Any) -> None:
    grpo(tmp_path / "a", steps=30, beta=0.0, schedule="constant", learning_rate=1e-2)
    seen = lines(tmp_path / "a")
    start = sum(line["reward"] for line in seen[:5]) / 5
    end = sum(line["reward"] for line in seen[-5:]) / 5
    assert end > start + 0.1
    assert all(line["sampler/gap"] < 1e-4 for line in seen)
    assert seen[0]["kl/k1"] == pytest.approx(0.0, abs=1e-4)
    assert seen[-1]["kl/k3"] > 0.1
    assert {"reward/std", "reward/group_std", "completions/tokens", "completions/finished"} <= seen[0].keys()


@pytest.mark.parametrize("objective", ["rloo", "reinforce", "ppo_clip", "cispo"])
def test_the_other_policy_gradients_run(tmp_path: Any, objective: str) -> None:
    policy = grpo(tmp_path / "a", objective=objective, steps=2, skip=4)
    seen = lines(tmp_path / "a")
    assert seen[0]["reward/missing"] == pytest.approx(0.25)
    assert seen[0]["sampler/gap"] < 1e-4
    assert policy.name == "a"


def test_steps_follow_from_the_prompts_when_not_given(tmp_path: Any) -> None:
    source = rollouts(PROMPTS, LengthJudge(), n=2, prompts_per_step=2, max_new_tokens=2, updates=2)
    train(tiny_policy(), source, "ppo_clip", out=tmp_path / "a")
    assert [line["step"] for line in lines(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]


def test_several_updates_use_one_set_of_rollouts(tmp_path: Any) -> None:
    grpo(tmp_path / "a", updates=2, steps=4)
    first, second, third, _ = lines(tmp_path / "a")
    assert first["reward"] == second["reward"]
    assert third["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert "sampler/gap" in third
    assert first["ratio"] == pytest.approx(1.0, abs=1e-4)
    assert second["ratio"] != pytest.approx(1.0, abs=1e-4)
    assert "sampler/gap" not in second


def test_the_policy_given_is_not_changed(tmp_path: Any) -> None:
    policy = tiny_policy()
    before = weights(policy.model)
    source = rollouts(PROMPTS, LengthJudge(), n=2, prompts_per_step=2, max_new_tokens=4)
    train(policy, source, "grpo", out=tmp_path / "a", steps=2, learning_rate=1e-2)
    assert all((before[name] == p).all() for name, p in policy.model.named_parameters())


def test_no_verdict_for_anything_stops_the_run(tmp_path: Any) -> None:
    with pytest.raises(InputError, match="0 of 24 completions in the rollouts of step 1 have a score"):
        grpo(tmp_path / "a", skip=1)


def test_the_watcher_is_called_and_its_numbers_are_kept(tmp_path: Any) -> None:
    calls = []

    def watch(step: int, policy: Any, figures: Any) -> dict[str, float]:
        calls.append((step, policy.digest(), dict(figures).get("reward")))
        return {"gold": step / 10}

    grpo(tmp_path / "a", steps=5, watch=watch, watch_every=2)
    assert [step for step, *_ in calls] == [0, 2, 4, 5]
    assert len({digest for _, digest, _ in calls}) == 4
    assert calls[0][2] is None
    assert calls[1][2] is not None
    watched = {line["step"]: line.get("watch/gold") for line in lines(tmp_path / "a")}
    assert watched == {0: 0.0, 1: None, 2: 0.2, 3: None, 4: 0.4, 5: 0.5}
