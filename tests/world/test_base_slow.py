"""Slow: the shipped base, and one trained again from scratch, both know their world."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

import pytest

from steerwell import world
from steerwell.models.load import load_policy


def greedy_accuracy(path: Path) -> dict[str, float]:
    """Share of right greedy completions by family, on prompts over all keys."""
    prompts = world.prompts(1000, seed=4100, split="any", mix=world.EVALUATION_MIX)
    groups = load_policy(str(path)).sample(prompts, 1, greedy=True, max_new_tokens=72)
    right: dict[str, list[float]] = {}
    for (verdict,) in world.verdicts(groups):
        right.setdefault(verdict.family, []).append(float(verdict.right))
    return {family: fmean(values) for family, values in right.items()}


@pytest.mark.slow
@pytest.mark.parametrize("trained", [False, True], ids=["shipped", "retrained"])
def test_the_base_knows_its_world(trained: bool, tmp_path: Path) -> None:
    path = world.train_base(tmp_path / "base", seed=0) if trained else world.base_path()
    accuracy = greedy_accuracy(path)
    assert accuracy["fact"] >= 0.90, accuracy
    assert accuracy["order"] >= 0.90, accuracy
    assert accuracy["borderline"] >= 0.90, accuracy
