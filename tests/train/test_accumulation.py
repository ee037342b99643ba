"""One step of eight groups is eight steps of one, added up; held-out figures do not know of batches."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import LengthJudge, largest_difference, lines, pair_groups, tiny_policy, weights

from steerwell.data.types import CompletionGroup
from steerwell.train import rollouts, train
from steerwell.train.sources import with_scores

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 8, "steps": 3, "warmup": 0.0}


def sampled(n: int, seed: int = 0) -> list[CompletionGroup]:
    """Recorded rollouts of the start policy with the scores of a judge."""
    groups = tiny_policy().sample([f"go {i}" for i in range(n)], 3, max_new_tokens=6, seed=seed)
    return with_scores(groups, LengthJudge()(groups))


@pytest.mark.parametrize("objective", ["grpo", "cispo", "rloo", "ppo_clip", "reinforce"])
def test_cutting_a_step_on_samples_changes_nothing(tmp_path: Path, objective: str) -> None:
    data, held_out = sampled(8), sampled(4, seed=1)
    made = {}
    for name, size in (("whole", 100_000), ("cut", 1)):
        policy = tiny_policy()
        policy.model.to(torch.float64)
        made[name] = train(policy, data, objective, out=tmp_path / name, eval_data=held_out, max_tokens=size,
                           **SETTINGS)  # fmt: skip
    start = weights(tiny_policy().model.double())
    assert largest_difference(weights(made["whole"].model), start) > 1e-3
    assert largest_difference(weights(made["whole"].model), weights(made["cut"].model)) < 1e-12
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert one == pytest.approx(other, rel=1e-6, abs=1e-6)


def test_cutting_fresh_rollouts_changes_nothing(tmp_path: Path) -> None:
    made = {}
    for name, size in (("whole", 100_000), ("cut", 1)):
        source = rollouts([f"go {i}" for i in range(4)], LengthJudge(), n=4, prompts_per_step=4,
                          max_new_tokens=5)  # fmt: skip
        made[name] = train(tiny_policy(), source, "grpo", out=tmp_path / name, learning_rate=1e-4, steps=1,
                           max_tokens=size, warmup=0.0)  # fmt: skip
    assert largest_difference(weights(made["whole"].model), weights(made["cut"].model)) < 1e-6
    whole, cut = (lines(tmp_path / name)[0] for name in ("whole", "cut"))
    assert whole == pytest.approx(cut, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    "objective", ["dpo", "simpo", "bradley_terry", [("dpo", 1.0), ("sft", 0.2)]], ids=str
)
def test_held_out_figures_do_not_depend_on_batches(tmp_path: Path, objective: Any, dtype: str) -> None:
    settings = {"steps": 1, "learning_rate": 1e-9, "dtype": dtype, "reference_cache": "off"}
    for size, groups in ((64, 1), (8192, 4)):
        train(tiny_policy(), pair_groups(4), objective, out=tmp_path / str(size), max_tokens=size,
              batch_size=groups, eval_data=pair_groups(9, seed=2), **settings)  # fmt: skip
    small, large = (lines(tmp_path / str(size))[0] for size in (64, 8192))
    assert any(name.startswith("eval/") for name in small)
    if dtype == "float32":
        assert small == pytest.approx(large, rel=1e-5, abs=1e-5)
    else:  # the head rounds to bfloat16, in matrix products of another shape
        names = [name for name in small if not name.endswith(("accuracies", "accuracy"))]
        assert [small[name] for name in names] == pytest.approx(
            [large[name] for name in names], rel=0.02, abs=0.02
        )


def test_a_held_out_mean_weighs_pairs_not_groups(tmp_path: Path) -> None:
    many, few = pair_groups(1, k=4), pair_groups(1, seed=5, k=2)
    few = [replace(few[0], pairs=few[0].pairs[:1])]
    settings = {"steps": 1, "learning_rate": 1e-9, "reference": tiny_policy(seed=3)}
    found = []
    for name, held_out in (("many", many), ("few", few), ("both", many + few)):
        train(
            tiny_policy(),
            pair_groups(4),
            "dpo",
            out=tmp_path / name,
            eval_data=held_out,
            max_tokens=1,
            **settings,
        )
        found.append(lines(tmp_path / name)[0]["eval/rewards/margins"])
    assert abs(found[0] - found[1]) > 0.01
    assert found[2] == pytest.approx((3 * found[0] + found[1]) / 4, rel=1e-4)
