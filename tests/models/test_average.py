"""Averages of weights: the numbers, the file's bytes, and what has no average."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_reward_adapters import groups, trained

import steerwell as sw
from steerwell.data.errors import InputError
from steerwell.models.directory import files_digest
from steerwell.models.load import load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from tiny import tiny_llama, tiny_policy_dir


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("average")
    base = tiny_policy_dir(folder, name="base")
    for i in range(3):
        model = trained(RewardModel.from_policy(load_policy(base)), seed=i)
        (model.normalised(groups()) if i else model).save(folder / f"rm{i}")
    return folder


def test_the_average_is_that_of_numpy(folder: Path, tmp_path: Path) -> None:
    places = [folder / f"rm{i}" for i in range(3)]
    out = sw.average_weights(places, tmp_path / "out", weights=[1, 1, 2])
    each = [load_file(p / "model.safetensors") for p in places]
    found = load_file(out / "model.safetensors")
    assert found.keys() == each[0].keys()
    for name, value in found.items():
        expected = np.average([own[name].double().numpy() for own in each], axis=0, weights=[1, 1, 2])
        np.testing.assert_allclose(value.double().numpy(), expected, rtol=1e-5, atol=1e-7)
    about = json.loads((out / "steerwell_average.json").read_text())
    assert [m["share"] for m in about["members"]] == [0.25, 0.25, 0.5]
    assert [m["weights"] for m in about["members"]] == [files_digest(p) for p in places]
    assert "normalise the average again" in about["notes"][0]
    model = load_reward_model(out)
    assert (model.recipe.mean, model.recipe.std) == (0.0, 1.0)
    assert model.recipe.temperature == pytest.approx(1.0)  # that of all raw scores
    assert np.isfinite(np.concatenate(model.score(groups()))).all()
    again = sw.average_weights(places, out, weights=[1, 1, 2])
    assert load_reward_model(again).digest() == model.digest()


def test_a_model_averaged_with_itself_is_itself_in_its_own_type(folder: Path, tmp_path: Path) -> None:
    policy = load_policy(folder / "base", dtype="bfloat16")
    policy.model.save_pretrained(tmp_path / "half", max_shard_size="40KB")  # several files
    policy.tokenizer.save_pretrained(tmp_path / "half")
    out = sw.average_weights([tmp_path / "half"] * 2, tmp_path / "out")
    files = sorted(p.name for p in (tmp_path / "half").glob("*.safetensors"))
    assert len(files) > 1
    for name in files:
        one, two = load_file(tmp_path / "half" / name), load_file(out / name)
        assert all(
            torch.equal(one[k], two[k]) and one[k].dtype == two[k].dtype == torch.bfloat16 for k in one
        )
    assert load_policy(out).digest() == load_policy(tmp_path / "half").digest()
    assert not (out / "steerwell_scoring.json").exists()


def test_sums_are_finer_than_the_type_of_the_weights(folder: Path, tmp_path: Path) -> None:
    """The mean of 1 and three times 1 + 2^-7 is nearer to 1 + 2^-7, the next bfloat16; sums in bfloat16 lose it."""
    for i, value in enumerate((1.0, 1.0078125, 1.0078125, 1.0078125)):
        shutil.copytree(folder / "rm0", tmp_path / f"m{i}")
        own = load_file(tmp_path / f"m{i}" / "model.safetensors")
        save_file({k: torch.full_like(x, value).bfloat16() for k, x in own.items()},
                  tmp_path / f"m{i}" / "model.safetensors", {"format": "pt"})  # fmt: skip
    out = sw.average_weights([tmp_path / f"m{i}" for i in range(4)], tmp_path / "out")
    found = load_file(out / "model.safetensors")
    assert {x.flatten()[0].item() for x in found.values()} == {1.0078125}


def test_what_has_no_average_says_what_differs(folder: Path, tmp_path: Path) -> None:
    first = folder / "rm0"

    def changed(name: str, file: str, **changes: object) -> Path:
        place = tmp_path / name
        shutil.copytree(folder / "rm1", place)
        text = json.loads((place / file).read_text())
        (place / file).write_text(json.dumps({**text, **changes}))
        return place

    wide = tiny_policy_dir(tmp_path, name="wide", model=tiny_llama(intermediate_size=64))
    for place, what in (
        (wide, r"architectures is \['LlamaForCausalLM'\], and \['LlamaForSequenceClassification'\]"),
        (changed("eps", "config.json", rms_norm_eps=0.1), r"rms_norm_eps is 0\.1, and 1e-06"),
        (
            changed("pool", "steerwell_scoring.json", pooling="mean"),
            "pooling of the scoring recipe is 'mean', and 'last'",
        ),
        (changed("words", "tokenizer.json", padding={}), r"tokenizer\.json is another one"),
    ):
        with pytest.raises(InputError, match=what):
            sw.average_weights([first, place], tmp_path / "out")
    place = changed("less", "config.json")
    own = load_file(place / "model.safetensors")
    del own["score.weight"]
    save_file(own, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"only one of the models has the weight score\.weight"):
        sw.average_weights([first, place], tmp_path / "out")
    save_file({**own, "score.weight": torch.zeros(2, 32)}, place / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=r"score\.weight has the shape \[2, 32\], and \[1, 32\]"):
        sw.average_weights([first, place], tmp_path / "out")
    adapter = RewardModel.from_policy(load_policy(folder / "base", lora=2)).save_adapter(tmp_path / "adapter")
    with pytest.raises(InputError, match="this is an adapter"):
        sw.average_weights([first, adapter], tmp_path / "out")
    with pytest.raises(InputError, match="an average of 1 models"):
        sw.average_weights([first], tmp_path / "out", weights=[1, 2])
    with pytest.raises(InputError, match="weights must be at least 0"):
        sw.average_weights([first, first], tmp_path / "out", weights=[1, -1])
    assert not (tmp_path / "out").exists()
