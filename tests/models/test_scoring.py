"""The scoring recipe: from outputs to scores, saved with the model, and the same wherever it is read."""

from __future__ import annotations

import json
import statistics
from pathlib import Path

import pytest
import torch

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.models.load import load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import SCORING_FILE, ScoringRecipe, combined, read_recipe
from tiny import tiny_policy_dir


def groups() -> list[CompletionGroup]:
    found = []
    for prompt, answers in (("how many", ["one two", "three"]), ("which", ["one", "two three four", "five"])):
        p = as_messages(prompt)
        made = (Completion(p, (Message("assistant", a),), Source(index=i)) for i, a in enumerate(answers))
        found.append(CompletionGroup(p, tuple(made)))
    return found


def attributes_model(path: Path) -> RewardModel:
    model = RewardModel.from_policy(
        load_policy(tiny_policy_dir(path)), head="attributes", outputs=("help", "brief", "true")
    )
    with torch.no_grad():
        model.model.score.weight.copy_(torch.randn(3, model.model.score.in_features))
    return model


HEAD = torch.tensor([[1.0, 2.0, 6.0], [0.0, -3.0, 3.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("recipe", "expected"),
    [
        ({"head": "attributes"}, [3.0, 0.0]),
        ({"head": "attributes", "weights": (1.0, 0.5, 0.0)}, [2.0, -1.5]),
        ({"head": "quantiles"}, [3.0, 0.0]),
        ({"head": "members"}, [3.0, 0.0]),
        ({"head": "members", "combine": "min"}, [1.0, -3.0]),
        ({"head": "members", "combine": "uwo", "penalty": 0.5}, [3.0 - 0.5 * 14 / 3, 0.0 - 0.5 * 6.0]),
        ({"head": "quality_length"}, [1.0, 0.0]),
    ],
)
def test_scores_of_a_head(recipe, expected) -> None:
    made = ScoringRecipe(outputs=("a", "b", "c"), **recipe)
    assert combined(HEAD, made).tolist() == pytest.approx(expected, rel=1e-14)


def test_trap_uwo_divides_the_variance_by_the_number_of_members() -> None:
    """numpy's default and torch's differ; arXiv:2310.02743 divides by k."""
    made = ScoringRecipe(head="members", outputs=("a", "b", "c"), combine="uwo", penalty=1.0)
    of_k, of_k_less_one = HEAD[0].var(correction=0), HEAD[0].var()
    assert combined(HEAD, made)[0].item() == pytest.approx(3.0 - of_k.item())
    assert of_k_less_one > of_k + 1


def test_a_gate_weighs_by_softmax() -> None:
    made = ScoringRecipe(head="attributes", outputs=("a", "b", "c"), gate=True)
    gate = torch.tensor([[0.0, 0.0, 0.0], [50.0, 0.0, 0.0]], dtype=torch.float64)
    assert combined(HEAD, made, gate).tolist() == pytest.approx([3.0, 0.0], abs=1e-12)


def test_recipe_and_head_survive_a_round_trip(tmp_path: Path) -> None:
    model = attributes_model(tmp_path)
    model.recipe = ScoringRecipe(
        "mean", 0.5, 2.0, "attributes", ("help", "brief", "true"), (1.0, -0.5, 0.25), temperature=1.7,
        cutpoints=(0.5, 1.5), template_digest=model.recipe.template_digest, stop=model.recipe.stop,
    )  # fmt: skip
    model.save(tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm")
    assert again.recipe == model.recipe
    assert again.score(groups()) == model.score(groups())
    assert again.outputs(groups()) == model.outputs(groups())
    assert again.digest() == model.digest()
    assert [len(x) for x in again.outputs(groups())] == [2, 3]
    assert list(again.outputs(groups())[0][0]) == ["help", "brief", "true"]


def test_a_gate_starts_as_the_mean_and_survives_a_round_trip(tmp_path: Path) -> None:
    model = attributes_model(tmp_path)
    before = model.score(groups())
    gated = model.with_gate()
    for mine, other in zip(gated.score(groups()), before, strict=True):
        assert mine == pytest.approx(other, abs=1e-6)
    with torch.no_grad():
        gated.model.score.gate[2].weight.normal_()
    changed = gated.score(groups())
    assert changed != before
    gated.save(tmp_path / "rm")
    assert load_reward_model(tmp_path / "rm").score(groups()) == changed
    recipe = json.loads((tmp_path / "rm" / SCORING_FILE).read_text())
    (tmp_path / "rm" / SCORING_FILE).write_text(json.dumps(recipe | {"gate": False}))
    for mine, other in zip(load_reward_model(tmp_path / "rm").score(groups()), before, strict=True):
        assert mine == pytest.approx(other, abs=1e-6)  # the attributes are what they were


def test_a_gate_reads_the_prompt_alone(tmp_path: Path) -> None:
    """All completions of a prompt are weighed alike, in every layout, whatever else is in the batch."""
    from steerwell.models.batch import build
    from steerwell.models.forward import head_outputs

    model = attributes_model(tmp_path).with_gate()
    with torch.no_grad():
        model.model.score.gate[2].weight.normal_()
    tokens = model.tokenize(groups())
    found = []
    for layout in ("tree", "rows"):
        outputs, gate = head_outputs(model.model, build(tokens, layout), "last", gated=True)
        assert gate is not None
        assert torch.allclose(gate[0], gate[1], atol=1e-6)
        assert torch.allclose(gate[2], gate[4], atol=1e-6)
        assert not torch.allclose(gate[0], gate[2], atol=1e-3)
        found.append(torch.cat([outputs, gate], 1))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)


def test_only_attributes_take_a_gate(tmp_path: Path) -> None:
    model = RewardModel.from_policy(load_policy(tiny_policy_dir(tmp_path)))
    with pytest.raises(InputError, match="a gate weighs attributes"):
        model.with_gate()


def test_normalised_scores_have_mean_0_and_deviation_1_and_keep_probabilities(tmp_path: Path) -> None:
    model = attributes_model(tmp_path).with_recipe(temperature=3.0)
    made = model.normalised(groups())
    flat = [s for scores in made.score(groups()) for s in scores]
    assert statistics.fmean(flat) == pytest.approx(0, abs=1e-9)
    assert statistics.pstdev(flat) == pytest.approx(1, abs=1e-9)
    for scores, before in zip(made.score(groups()), model.score(groups()), strict=True):
        assert made.probability(*scores[:2]) == pytest.approx(model.probability(*before[:2]), rel=1e-9)
    assert model.recipe.std == 1.0  # the one it was made from is as it was
    with pytest.raises(InputError, match="have no scale"):
        model.normalised([CompletionGroup(g.prompt, g.completions[:1]) for g in groups()[:1]])


def test_another_template_or_stop_token_is_refused(tmp_path: Path) -> None:
    """Scores under a template that the model was not trained with mean nothing; unchanged files load."""
    attributes_model(tmp_path).save(tmp_path / "rm")
    load_reward_model(tmp_path / "rm")
    template = tmp_path / "rm" / "chat_template.jinja"
    template.write_text(template.read_text() + " ")
    with pytest.raises(InputError, match="the chat template is not the one"):
        load_reward_model(tmp_path / "rm")


def test_recipes_of_older_and_newer_versions(tmp_path: Path) -> None:
    old = read_recipe({"version": 1, "pooling": "mean", "mean": 1.0, "std": 2.0}, "x")
    assert old == ScoringRecipe("mean", 1.0, 2.0)
    with pytest.raises(InputError, match="version 3, this steerwell reads 2"):
        read_recipe({"version": 3}, "x")
    with pytest.raises(InputError, match="unknown name 'poling'"):
        read_recipe({"poling": "last"}, "x")
    with pytest.raises(InputError, match="unknown head 'quantile'"):
        read_recipe({"head": "quantile"}, "x")
    for bad in ({"std": 0.0}, {"temperature": -1.0}, {"weights": [1.0, 2.0]}, {"combine": "max"}):
        with pytest.raises(InputError):
            read_recipe(bad, "x")
