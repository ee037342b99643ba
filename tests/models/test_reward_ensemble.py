"""Ensembles of whole models and of adapters: the formulas, one network for all adapters, and best-of-n on planted
errors.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_reward_adapters import groups, trained

import steerwell as sw
from steerwell.data.errors import InputError
from steerwell.models.load import load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_ensemble import load_scorer
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import by_members
from tiny import NEWLINE_TEMPLATE, tiny_policy_dir, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three LoRA adapters and a DoRA on one base, and two whole models."""
    folder = tmp_path_factory.mktemp("members")
    base = tiny_policy_dir(folder, name="base")
    for i in range(4):
        policy = load_policy(base, lora=2, adapter="dora" if i == 3 else "lora")
        model = trained(RewardModel.from_policy(policy), seed=i)
        model.normalised(groups()).save_adapter(folder / f"adapter{i}")
    for i in range(2):
        model = trained(RewardModel.from_policy(load_policy(base)), seed=i)
        model.with_recipe(mean=0.1 * i, std=1.0 + i).save(folder / f"whole{i}")
    return folder


def apart(folder: Path, names: list[str]) -> np.ndarray:
    """(completions, members): the scores of each, loaded by itself."""
    return np.stack([np.concatenate(load_reward_model(folder / n).score(groups())) for n in names], 1)


@pytest.mark.parametrize(
    "names", [["adapter0", "adapter1", "adapter3"], ["whole0", "whole1"], ["adapter2", "whole1"]]
)
def test_members_become_one_score(folder: Path, names: list[str]) -> None:
    each = apart(folder, names)
    mean = sw.reward_ensemble([folder / name for name in names])
    np.testing.assert_allclose(np.concatenate(mean.each(groups())), each, atol=1e-6)
    np.testing.assert_allclose(np.concatenate(mean.score(groups())), each.mean(1), atol=1e-6)
    with_std = np.concatenate(mean.score_with_std(groups()))
    np.testing.assert_allclose(with_std, np.stack([each.mean(1), each.std(1)], 1), atol=1e-6)
    if "whole0" in names:
        with pytest.raises(
            InputError, match=r"compares the levels of its members' scores, and whole0 has none"
        ):
            mean.with_recipe(combine="min")
        return
    least = mean.with_recipe(combine="min")
    np.testing.assert_allclose(np.concatenate(least.score(groups())), each.min(1), atol=1e-6)
    careful = mean.with_recipe(combine="uwo", penalty=0.3)
    expected = each.mean(1) - 0.3 * each.var(1)  # numpy divides by the number of members
    np.testing.assert_allclose(np.concatenate(careful.score(groups())), expected, atol=1e-6)
    assert len({mean.digest(), least.digest(), careful.digest()}) == 3


def test_adapters_share_one_network(folder: Path) -> None:
    names = ["adapter0", "adapter1", "adapter2"]
    found = sw.reward_ensemble([folder / name for name in names])
    first, second, _ = found.members
    assert first.model is second.model
    assert len([n for n, _ in first.model.named_parameters() if "embed_tokens" in n]) == 1
    # asked one after the other and in turns, each is itself
    alone = apart(folder, names)
    for _ in range(2):
        for i in (2, 0, 1):
            assert np.concatenate(found.members[i].score(groups())).tolist() == alone[:, i].tolist()
    assert [m.digest() for m in found.members] == [load_reward_model(folder / n).digest() for n in names]
    whole = found.members[1].save(folder / "merged1")
    np.testing.assert_allclose(
        np.concatenate(load_reward_model(whole).score(groups())), alone[:, 1], atol=1e-4
    )


def test_an_ensemble_survives_save_and_load_and_is_a_judge(folder: Path, tmp_path: Path) -> None:
    made = sw.reward_ensemble([folder / "adapter0", load_reward_model(folder / "whole1")], "uwo", 0.1)
    place = made.save(tmp_path / "ensemble")
    assert json.loads((place / "steerwell_ensemble.json").read_text())["members"] == ["member1", "member2"]
    assert not (place / "member1" / "config.json").exists()  # an adapter stays one
    again = load_scorer(place)
    assert again.score(groups()) == made.score(groups())
    assert again.digest() == made.digest()
    made.save(tmp_path / "ensemble")  # over itself
    judge = sw.judges.parse(f"rm:{place}")
    told = [a.value for a in judge(groups())]
    assert told == pytest.approx(np.concatenate(made.score(groups())).tolist())
    other = sw.judges.parse(f"rm:{place}?combine=mean")
    assert judge.name != other.name
    assert judge.name.startswith("rm:ensemble@")
    rated = sw.judges.reward_model(made)
    assert [a.value for a in rated(groups())] == told
    from steerwell.cli.words import load_model

    assert load_model(str(place)).score(groups()) == made.score(groups())  # type: ignore[union-attr]


def test_a_reference_set_brings_members_to_one_scale(folder: Path) -> None:
    each = apart(folder, ["whole0", "whole1"])
    each = (each - each.mean(0)) / each.std(0)
    found = sw.reward_ensemble([folder / "whole0", folder / "whole1"], "min", reference=groups())
    np.testing.assert_allclose(np.concatenate(found.score(groups())), each.min(1), atol=1e-4)


def test_what_does_not_belong_together(folder: Path, tmp_path: Path) -> None:
    other = tiny_policy_dir(tmp_path, name="other", tokenizer=tiny_tokenizer(NEWLINE_TEMPLATE))
    RewardModel.from_policy(load_policy(other)).save(tmp_path / "rm")
    with pytest.raises(InputError, match="rm has another chat template than whole0"):
        sw.reward_ensemble([folder / "whole0", tmp_path / "rm"])
    with pytest.raises(InputError, match="an ensemble of 1 reward models"):
        sw.reward_ensemble([folder / "whole0"])
    with pytest.raises(InputError, match="unknown combine 'max'"):
        sw.reward_ensemble([folder / "whole0", folder / "whole1"], "max")
    with pytest.raises(InputError, match="no ensemble in this directory"):
        sw.reward_ensemble(folder / "whole0")


def picked(errors: np.ndarray, gold: np.ndarray, combine: str, penalty: float = 0.5) -> float:
    """The mean gold of the best of n by members with these errors: (prompts, n, members)."""
    each = torch.from_numpy(gold[..., None] + errors)
    flat = by_members(each.flatten(0, 1), combine, penalty).view(gold.shape)
    return float(np.take_along_axis(gold, flat.argmax(1).numpy()[:, None], 1).mean())


def test_careful_ensembles_resist_a_member_that_is_fooled() -> None:
    """Best of 64 by four members, one of which takes 5 % of the completions for very good (arXiv:2310.02743)."""
    draw = np.random.default_rng(0)
    gold = draw.normal(0, 1, (400, 64))
    noise = 0.3 * draw.normal(0, 1, (400, 64, 4))
    fooled = np.where(draw.uniform(size=(400, 64)) < 0.05, 12.0, 0.0)
    one = noise.copy()
    one[..., 0] += fooled
    found = {how: picked(one, gold, how) for how in ("mean", "min", "uwo")}
    assert found["mean"] < 1.2  # it is led by the one
    assert found["min"] > 2.1  # the best there is has 2.32
    assert found["uwo"] > 2.1
    # Without a fooled member care costs little.
    clean = {how: picked(noise, gold, how) for how in ("mean", "min", "uwo")}
    assert min(clean.values()) > clean["mean"] - 0.2
    # What all are fooled by, none resists (arXiv:2312.09244).
    alike = {how: picked(noise + fooled[..., None], gold, how) for how in ("mean", "min", "uwo")}
    assert max(alike.values()) < 1.2
