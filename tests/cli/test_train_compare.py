"""``steerwell train --compare``: what it prints for people and for programs, doing it again, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_bad_input import fails

RECIPE = """
model = "{model}"
data = "prefs.db"
objective = "dpo"
out = "compared"
[hyperparameters]
beta = 0.2
[train]
steps = 2
learning_rate = 1e-2
batch_size = 4
"""
FEW = ["--samples", "2", "--max-new-tokens", "4"]


@pytest.fixture
def recipe(run: Any, tmp_path: Path, tiny_dir: Path, pairs_file: Path) -> str:
    """A recipe on a store of ten pairs, five of them held out."""
    run("import", pairs_file, "--to", "prefs.db", "--test-fraction", "0.4")
    (tmp_path / "r.toml").write_text(RECIPE.format(model=tiny_dir))
    return "r.toml"


def test_compared_objectives_for_people_and_for_programs(run: Any, tmp_path: Path, recipe: str) -> None:
    words = ["train", recipe, "--compare", "dpo, ipo:reduction=sum,kto", *FEW]
    first = run(*words)
    assert first.status == 0, first.err
    names = ["dpo", "ipo:reduction=sum", "kto"]
    rows = [
        line.split()[0] for line in first.out.splitlines() if line.strip().startswith(("dpo ", "ipo", "kto "))
    ]
    assert rows == names
    assert "pair accuracy" in first.out
    assert "note: kto has its labels from the pairs" in first.out
    assert "page: compared/compare.html" in first.out
    assert "dpo: done" in first.err
    runs = {f: f.read_bytes() for f in tmp_path.glob("compared/*/*") if f.is_file()}
    assert len(runs) >= 9
    again = run(*words, "--json")
    found = again.json
    assert [row["name"] for row in found["contenders"]] == names
    assert [row["settings"]["dpo"]["beta"] for row in found["contenders"][:1]] == [0.2]
    assert found == json.loads((tmp_path / "compared" / "compare.json").read_text())
    assert "nothing was trained" in again.err
    assert {f: f.read_bytes() for f in runs} == runs
    assert (tmp_path / "compared" / "ipo-reduction=sum" / "model" / "model.safetensors").exists()
    load = run(
        "eval", "compared/dpo", "--against", "compared/kto", "--tasks", "pair_accuracy", "--data", "prefs.db"
    )
    assert load.status == 0, load.err


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--compare", "dpo,dppo"], ["unknown objective 'dppo'", "Did you mean 'dpo'?"]),
        (["--compare", "dpo,ipo:beta=1"], ["ipo has no hyperparameter 'beta'"]),
        (["--compare", "ipo,sft"], ["none of ipo, sft takes the recipe's hyperparameter 'beta'"]),
        (["--compare", "dpo,odpo"], ["odpo needs", "scores"]),
        (["--compare", " , "], ["no objective given"]),
        (["--compare", "dpo", "--set", "model=nowhere"], ["nowhere", "no such model directory"]),
        (["--compare", "dpo", "--set", "eval_split=tets"], ["'test'"]),
        (["--compare", "dpo", "--set", "judge=refusal"], ["recorded data"]),
        (["--compare", "dpo", "--set", "out=r.toml"], ["r.toml", "out is a file"]),
        (["--samples", "3"], ["--samples", "for --compare"]),
    ],
)
def test_bad_comparisons(run: Any, tmp_path: Path, recipe: str, words: list[str], parts: list[str]) -> None:
    fails(run("train", recipe, *words), *parts)
    assert not (tmp_path / "compared").exists()


def test_a_file_without_held_out_pairs(run: Any, tmp_path: Path, tiny_dir: Path, pairs_file: Path) -> None:
    (tmp_path / "r.toml").write_text(RECIPE.format(model=tiny_dir).replace("prefs.db", pairs_file.name))
    fails(run("train", "r.toml", "--compare", "dpo"), "needs held-out pairs", "Give eval_data")
    assert not (tmp_path / "compared").exists()
