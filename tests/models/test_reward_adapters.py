"""Reward adapters in directories: head and adapter come back exactly, peft reads them, and a wrong base is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models.adapter_files import is_adapter
from steerwell.models.load import load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from tiny import tiny_policy_dir


def groups(n: int = 4) -> list[CompletionGroup]:
    found = []
    for i in range(n):
        asked = (Message("user", f"say {i}"),)
        texts = ("yes", "no no no", f"maybe {i * i}")
        found.append(
            CompletionGroup(asked, tuple(Completion(asked, (Message("assistant", t),)) for t in texts))
        )
    return found


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy_dir(tmp_path_factory.mktemp("base"))


def trained(model: RewardModel, seed: int = 1) -> RewardModel:
    """All that an adapter run trains, moved by noise."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=g)
    return model


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_head_and_adapter_survive_save_and_load(base: Path, tmp_path: Path, kind: str) -> None:
    policy = load_policy(base, lora=4, adapter=kind)  # type: ignore[arg-type]
    model = RewardModel.from_policy(policy, head="members", outputs=("a", "b"))
    plain = model.score(groups())
    model = trained(model).with_recipe(combine="min", mean=0.5, std=2.0)
    scores = model.score(groups())
    assert np.abs(np.array(scores) - np.array(plain)).max() > 0.1
    place = model.save_adapter(tmp_path / "rm")
    assert is_adapter(place)
    assert not is_adapter(base)
    assert sum(file.stat().st_size for file in place.glob("*.safetensors")) < 100_000
    again = load_reward_model(place)
    assert again.score(groups()) == scores  # bit for bit
    assert again.recipe == model.recipe
    assert again.digest() == model.digest()
    again.save_adapter(tmp_path / "twice")
    one, two = (load_file(p / "adapter_model.safetensors") for p in (place, tmp_path / "twice"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    merged = load_reward_model(again.save(tmp_path / "whole"))
    np.testing.assert_allclose(np.array(merged.score(groups())), np.array(scores), atol=1e-4)
    trains = {name for name, p in again.model.named_parameters() if p.requires_grad}
    assert trains == {name for name, p in model.model.named_parameters() if p.requires_grad}


def test_an_adapter_over_a_reward_model(base: Path, tmp_path: Path) -> None:
    whole = RewardModel.from_policy(load_policy(base)).save(tmp_path / "whole")
    model = trained(load_reward_model(whole, lora=2))
    scores = model.score(groups())
    model.save_adapter(tmp_path / "adapter")
    again = load_reward_model(tmp_path / "adapter")
    assert again.score(groups()) == scores
    with pytest.raises(InputError, match="has an adapter already"):
        load_reward_model(tmp_path / "adapter", lora=2)
    with pytest.raises(InputError, match="base is given, and this is no adapter"):
        load_reward_model(whole, base=whole)


def test_peft_reads_it(base: Path, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForSequenceClassification

    model = trained(RewardModel.from_policy(load_policy(base, lora=4)))
    model.save_adapter(tmp_path / "rm")
    below = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(below, str(tmp_path / "rm")).eval()
    for group, scores in zip(model.tokenize(groups()), model.score(groups()), strict=True):
        for sequence, score in zip(group.sequences, scores, strict=True):
            logits = loaded(input_ids=torch.tensor([list(sequence.ids)])).logits
            assert logits.item() == pytest.approx(score, abs=1e-4)


def test_what_cannot_be_saved_or_read_says_why(base: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no adapter"):
        RewardModel.from_policy(load_policy(base)).save_adapter(tmp_path / "x")
    policy = load_policy(base, lora=2)
    with torch.no_grad():  # a trained one is merged into what lies nowhere
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter += 0.1
    with pytest.raises(InputError, match="lie in no directory"):
        RewardModel.from_policy(policy).save_adapter(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    own = tiny_policy_dir(tmp_path, name="own")
    place = RewardModel.from_policy(load_policy(own, lora=2)).save_adapter(tmp_path / "rm")
    moved = own.rename(tmp_path / "moved")
    with pytest.raises(InputError, match="the base model of this adapter is not there"):
        load_reward_model(place)
    assert load_reward_model(place, base=moved).base == str(moved)
    weights = load_file(moved / "model.safetensors")
    save_file({name: x + 0.01 for name, x in weights.items()}, moved / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="are not those that this adapter was trained over"):
        load_reward_model(place, base=moved)
    (place / "steerwell_base.json").unlink()
    headless = load_file(place / "adapter_model.safetensors")
    del headless["base_model.model.score.weight"]
    save_file(headless, place / "adapter_model.safetensors")
    with pytest.raises(InputError, match="has no head"):
        load_reward_model(place, base=moved)
