"""Targets that policies make: weights of tokens from two of them (TIS-DPO), pairs with one's own answers (SPIN)."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import lines, pair_groups, text_group, tiny_policy

from steerwell.data.errors import InputError
from steerwell.data.types import Pair
from steerwell.models.self_play import self_play_pairs
from steerwell.models.token_weights import contrast_weights
from steerwell.train import train


def plain(policy, group):  # log-probs of each completion's tokens, one sequence at a time
    found = []
    policy.model.set_attn_implementation("eager")
    for sequence in policy.tokenize([group])[0].sequences:
        with torch.no_grad():
            logps = policy.model(torch.tensor([sequence.ids])).logits[0].double().log_softmax(-1)
        found.append([logps[i - 1, sequence.ids[i]].item() for i in sequence.scored()])
    policy.model.set_attn_implementation("steerwell")
    return found


def test_weights_by_hand() -> None:
    up, down = tiny_policy(seed=1), tiny_policy(seed=2)
    groups = pair_groups(3, k=3)
    groups[1] = replace(groups[1], pairs=(Pair(0, 1), Pair(1, 0)))  # neither: chosen as often as rejected
    made = contrast_weights(groups, up, down, mu=0.8, low=-0.1, high=0.2, scale=1.5, max_tokens=64)
    seen: set[str] = set()
    for group, got in zip(groups, made, strict=True):
        for k, (a, b) in enumerate(zip(plain(up, group), plain(down, group), strict=True)):
            m = 0.8 * (1 if k == 0 else -1)
            m = 0.0 if group is groups[1] else m
            want = [1.5 * math.exp(m * min(max(x - y, -0.1), 0.2)) for x, y in zip(a, b, strict=True)]
            assert got.token_weights is not None
            assert got.token_weights[k] == pytest.approx(want, abs=1e-5)
            seen |= {
                "low" if x - y < -0.1 else "high" if x - y > 0.2 else "within"
                for x, y in zip(a, b, strict=True)
            }
    assert seen == {"low", "high", "within"}


def test_one_policy_under_two_system_prompts() -> None:
    policy, groups = tiny_policy(), pair_groups(2, k=2)
    made = contrast_weights(groups, (policy, "be kind"), (policy, "be rude"))
    assert any(abs(w - 1) > 1e-4 for w in made[0].token_weights[0])  # type: ignore[index, union-attr]
    same = contrast_weights(groups, (policy, "be kind"), (policy, "be kind"))
    assert {w for own in same[0].token_weights for w in own} == {1.0}  # type: ignore[union-attr]


def test_weights_reach_the_objective(tmp_path: Path) -> None:
    groups = pair_groups(4, k=2)
    with pytest.raises(InputError, match="tis_dpo needs token_weights; 0 of 8 completions"):
        train(tiny_policy(), groups, "tis_dpo", out=tmp_path / "none", steps=1)
    weighted = contrast_weights(groups, tiny_policy(seed=1), tiny_policy(seed=2))
    settings = {"steps": 3, "learning_rate": 1e-2, "batch_size": 4, "warmup": 0.0}
    train(tiny_policy(), weighted, "tis_dpo", out=tmp_path / "tis", **settings)
    train(tiny_policy(), groups, "dpo", out=tmp_path / "dpo", **settings)
    ones = [replace(g, token_weights=tuple((1.0,) * len(w) for w in g.token_weights or ())) for g in weighted]
    train(tiny_policy(), ones, "tis_dpo", out=tmp_path / "ones", **settings)
    tis, dpo, plain_ones = ([x["loss"] for x in lines(tmp_path / n)] for n in ("tis", "dpo", "ones"))
    assert plain_ones == pytest.approx(dpo, abs=1e-6)
    assert tis[-1] != pytest.approx(dpo[-1], abs=1e-4)


def test_weights_need_pairs() -> None:
    with pytest.raises(InputError, match="need pairs"):
        contrast_weights([text_group("a", ["b"])], tiny_policy(), tiny_policy())


def test_self_play_puts_demonstrations_above_samples(tmp_path: Path) -> None:
    shown = [text_group(f"say {i}", [f"kilo lima {i}"], labels=(True,)) for i in range(4)]
    groups = self_play_pairs(tiny_policy(), shown, n=2, max_new_tokens=6, seed=3)
    assert [len(g.completions) for g in groups] == [3] * 4
    assert groups[0].pairs == (Pair(0, 1), Pair(0, 2))
    assert groups[0].completions[0].text == "kilo lima 0"
    assert groups[0].completions[1].token_ids is not None
    assert groups[0].labels is None
    settings = {"steps": 4, "learning_rate": 1e-2, "batch_size": 4, "warmup": 0.0}
    train(tiny_policy(), groups, "spin", out=tmp_path / "run", **settings)
    told = lines(tmp_path / "run")
    assert told[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert told[-1]["rewards/margins"] > 0.1


def test_self_play_ends_when_the_policy_says_the_same() -> None:
    policy = tiny_policy()
    own = policy.sample(["say it"], 1, max_new_tokens=5, greedy=True)
    with pytest.raises(InputError, match="nothing left to teach"):
        self_play_pairs(policy, own, max_new_tokens=5, greedy=True)
    with pytest.raises(InputError, match="has no demonstration"):
        self_play_pairs(policy, [replace(own[0], completions=())])
