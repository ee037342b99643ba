"""Named mixtures are their terms written out; a term of tokens may say how it is reduced."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
import torch

from steerwell.data.errors import InputError
from steerwell.objectives import explain
from steerwell.objectives.mixtures import MIXTURES, mixture_page, written
from steerwell.objectives.reduce import denominator, reduce
from steerwell.train.config import Recipe
from steerwell.train.loop import checked


@pytest.mark.parametrize("name", MIXTURES)
def test_a_name_stands_for_its_terms(name: str) -> None:
    terms, _ = checked(name, None, {})
    again = tomllib.loads(written(name))["losses"]
    spelt, _ = checked([tuple(part) for part in again], None, {})
    assert [(t.name, t.weight, t.hyper, t.reduction) for t in terms] == [
        (t.name, t.weight, t.hyper, t.reduction) for t in spelt
    ]
    assert explain(name) == mixture_page(name)
    assert MIXTURES[name].source in explain(name)


def test_the_published_weights() -> None:
    assert [(n, w) for n, w, _ in MIXTURES["mpo"].terms] == [("dpo", 0.8), ("bco_pair", 0.2), ("sft", 1.0)]
    terms, _ = checked("rpo", None, {})
    assert terms[0].hyper["beta"] == 0.01
    assert (terms[1].weight, terms[1].reduction) == (0.005, "sequence_sum")
    assert checked("irpo", None, {})[0][1].reduction == "sequence_mean"


def test_a_sum_over_tokens_and_a_mean_over_completions() -> None:
    losses, owner = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 0, 0, 2])
    lengths = torch.tensor([3.0, 0.0, 1.0])
    count = denominator("sequence_sum", {"lengths": lengths})
    assert count == 2
    assert reduce(losses, "sequence_sum", denominator=count).item() == 5.0
    assert reduce(losses, "sequence_mean", denominator=count, owner=owner).item() == 3.0


def test_a_reduction_from_outside_goes_where_there_is_a_choice() -> None:
    assert checked("sft", None, {"reduction": "sequence_mean"})[0][0].reduction == "sequence_mean"
    terms, _ = checked([("dpo", 1.0), ("sft", 0.1)], None, {"reduction": "sequence_sum"})
    assert [t.reduction for t in terms] == ["pair_mean", "sequence_sum"]
    terms, _ = checked([("ipo", 1.0), ("sft", 0.1)], None, {"reduction": "sum"})  # a hyperparameter of ipo
    assert (terms[0].hyper["reduction"], terms[1].reduction) == ("sum", "token_mean")
    with pytest.raises(InputError, match="dpo cannot be reduced by 'token_mean': it gives one loss per pair"):
        checked("dpo", None, {"reduction": "token_mean"})
    with pytest.raises(InputError, match="unknown objective 'mpos'") as error:
        checked("mpos", None, {})
    assert "'mpo'" in str(error.value)


def test_a_recipe_says_losses_or_an_objective(tmp_path: Path) -> None:
    file = tmp_path / "r.toml"
    head = 'model = "m"\ndata = "d.db"\nout = "o"\n'
    file.write_text(head + written("mpo") + "\n")
    recipe = Recipe.from_toml(file)
    assert [t.name for t in checked(recipe.objective, recipe.train, {})[0]] == ["dpo", "bco_pair", "sft"]
    file.write_text(head + 'objective = "dpo"\nlosses = [["sft", 1.0]]\n')
    with pytest.raises(InputError, match="objective and losses are both given"):
        Recipe.from_toml(file)
