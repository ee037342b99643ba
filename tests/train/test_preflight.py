"""Checks before and at the first step: each has a run in which it fires, and one in which it does not."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import LengthJudge, pair_groups, text_group, tiny_policy

from steerwell.data.errors import InputError
from steerwell.data.types import Pair
from steerwell.models.load import Policy, load_policy
from steerwell.models.reward_model import RewardModel
from steerwell.models.tree_plan import TreePlan
from steerwell.train import TrainingError, preflight, rollouts, train
from steerwell.train.preflight import LN2
from tiny import tiny_llama, tiny_policy_dir, tiny_tokenizer

SETTINGS: dict[str, Any] = {"learning_rate": 1e-4, "batch_size": 4, "steps": 1}
NO_END = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("objective", ["dpo", "sft", "bradley_terry"])
def test_a_run_that_begins_right_says_what_was_found(tmp_path: Path, objective: str, layout: Any) -> None:
    train(tiny_policy(), pair_groups(), objective, out=tmp_path / "a", layout=layout, **SETTINGS)
    found = record(tmp_path / "a")["preflight"]
    packed = found["packed_against_alone"]
    assert (packed["groups"], packed["completions"]) == (3, {"sft": 3}.get(objective, 9))
    assert 0 <= packed["largest_gap"] < packed["tolerance"] == 1e-3
    if objective == "dpo":
        assert found["first_step"]["dpo_loss"] == pytest.approx(LN2, abs=1e-5)
        assert 0 <= found["first_step"]["reference_gap"] < 1e-4
    data = record(tmp_path / "a")["data"]
    assert data["ends"]["with_stop_token"] == data["ends"]["finished"] == data["completions"]
    assert data["ends"]["stop_tokens"] == ["<|end|>"]
    assert (data["notes"], data["left_out"], data["truncated_share"]) == ([], {}, 0.0)


def test_rollouts_and_adapters_are_checked_too(tmp_path: Path) -> None:
    source = rollouts(["go", "on"], LengthJudge(), n=3, prompts_per_step=2, max_new_tokens=5)
    train(tiny_policy(), source, "grpo", out=tmp_path / "a", steps=1, learning_rate=1e-4)
    found = record(tmp_path / "a")["preflight"]
    assert found["packed_against_alone"]["completions"] == 6
    assert 0 <= found["first_step"]["sampler_gap"] < 1e-3
    path = tiny_policy_dir(tmp_path)
    train(path, pair_groups(), "dpo", out=tmp_path / "b", lora=4, **SETTINGS)
    assert record(tmp_path / "b")["preflight"]["first_step"]["reference_gap"] < 1e-4


def test_a_model_that_mixes_up_the_rows_of_a_batch_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def attend(self: Any, module: Any, q: Any, k: Any, v: Any, *, scaling: Any, **_: Any) -> torch.Tensor:
        """It knows nothing of branches: each token sees all before it."""
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=True)
        return out.transpose(1, 2)

    policy, reward = tiny_policy(), RewardModel.from_policy(tiny_policy())
    monkeypatch.setattr(TreePlan, "attend", attend)
    with pytest.raises(TrainingError, match=r"packed and alone, .* nats per token: .* mixes up the rows"):
        train(policy, pair_groups(), "dpo", out=tmp_path / "a", layout="tree", **SETTINGS)
    with pytest.raises(TrainingError, match=r"packed and alone, .* of the size of the scores"):
        train(reward, pair_groups(), "bradley_terry", out=tmp_path / "b", layout="tree", **SETTINGS)
    for name in "ab":
        assert record(tmp_path / name)["status"] == "failed"
        assert not (tmp_path / name / "metrics.jsonl").read_text()
        assert not (tmp_path / name / "model").exists()


def test_the_first_prompts_are_named_by_the_packing_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    true, data, calls = preflight._each, pair_groups(4), []

    def wrong(provider: Any, groups: Any, layout: Any) -> torch.Tensor:
        values = true(provider, groups, layout)
        calls.append(layout)
        if len(calls) == 1:
            values[4] += 1.0  # the second completion of the second group
        return values

    monkeypatch.setattr(preflight, "_each", wrong)
    with pytest.raises(TrainingError) as error:
        train(tiny_policy(), data, "dpo", out=tmp_path / "a", **SETTINGS)
    order = [i for i in range(4) if data[i].prompt_id in str(error.value)]
    assert len(order) == 1
    monkeypatch.undo()
    items: list[Any] = []
    monkeypatch.setattr(
        preflight, "_first", lambda tokens, true=preflight._first: items.append(tokens) or true(tokens)
    )
    train(tiny_policy(), data, "dpo", out=tmp_path / "b", **SETTINGS)
    assert items[1].group.prompt_id == data[order[0]].prompt_id


@pytest.mark.parametrize("objective", ["dpo", "bradley_terry"])
def test_a_policy_that_could_never_learn_to_stop_is_refused(tmp_path: Path, objective: str) -> None:
    policy = Policy(tiny_policy().model, tiny_tokenizer(NO_END), "tiny")
    policy.tokenizer.eos_token = None
    policy.model.generation_config.eos_token_id = None
    policy.tokenizer.name_or_path = "some/model"
    if objective == "bradley_terry":  # it reads a whole text, and writes none
        train(policy, pair_groups(), objective, out=tmp_path / "a", **SETTINGS)
        data = record(tmp_path / "a")["data"]
        assert (data["ends"]["finished"], data["ends"]["with_stop_token"]) == (36, 0)
        assert data["notes"] == ["36 of 36 finished completions end without a stop token of some/model"]
        return
    with pytest.raises(
        InputError, match=r"some/model: none of 36 completions ends with a stop token"
    ) as error:
        train(policy, pair_groups(), objective, out=tmp_path / "a", **SETTINGS)
    assert error.value.mend
    assert not (tmp_path / "a").exists()
    policy.tokenizer.eos_token = "<|end|>"
    train(policy, pair_groups(), objective, out=tmp_path / "a", **SETTINGS)


def test_what_is_cut_and_what_is_left_out_is_counted_with_reasons(tmp_path: Path) -> None:
    told: list[str] = []
    pair = {"pairs": (Pair(0, 1),)}
    data = [
        text_group("short", ["yes it is", "no"], **pair),
        text_group("short too", ["a completion that is much longer than the others here", "no"], **pair),
        text_group("a question that is far too long to be asked here " * 2, ["yes", "no"], **pair),
        text_group("nobody compared", ["these", "two"]),
    ]
    train(
        tiny_policy(), data, "dpo", out=tmp_path / "a", max_length=40, eval_data=data[:2],
        progress=lambda stage, done, total, note: told.append(note) if stage == "data" else None, **SETTINGS,
    )  # fmt: skip
    found = record(tmp_path / "a")["data"]
    assert found["left_out"] == {
        "no target that the objective takes": 1,
        "the prompt leaves no room in max_length=40": 1,
    }
    assert (found["groups"], found["groups_left_out"]) == (2, 2)
    assert (found["truncated_completions"], found["truncated_share"]) == (1, 0.25)
    assert (found["ends"]["finished"], found["ends"]["with_stop_token"]) == (3, 3)
    assert found["notes"] == [
        "left out 1 of 4 groups: no target that the objective takes",
        "left out 1 of 4 groups: the prompt leaves no room in max_length=40",
        "cut 1 of 4 completions (25.0%) to max_length=40: they have lost their end token",
    ]
    assert told[0] == "; ".join(found["notes"])
    assert record(tmp_path / "a")["eval_data"]["truncated_completions"] == 1
    cut = [text_group(f"q{i}", ["many words that go on", "and on and on and on"], **pair) for i in range(4)]
    train(tiny_policy(), cut, "dpo", out=tmp_path / "b", max_length=14, **SETTINGS)
    assert "may not learn to stop" in record(tmp_path / "b")["data"]["notes"][0]


def test_figures_that_are_not_finite_are_left_to_the_check_of_the_loss(tmp_path: Path) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight.fill_(math.nan)
    policy = load_policy(tiny_policy_dir(tmp_path, model=model))
    with pytest.raises(TrainingError, match="the loss of step 1 is not finite; prompts: "):
        train(policy, pair_groups(), "dpo", out=tmp_path / "a", **SETTINGS)
    assert record(tmp_path / "a")["preflight"]["packed_against_alone"]["largest_gap"] is None
