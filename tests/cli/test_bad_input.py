"""Bad input through the command line: one line that says what and how to mend it, status 2, nothing left behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from small_inputs import PAIRS, write

GOOD = PAIRS[0]
RECIPE = """
model = "{model}"
data = "prefs.db"
objective = "{objective}"
out = "run"
split = "train"
[hyperparameters]
{hyper}
[train]
steps = 1
learning_rate = 1e-3
"""


def fails(outcome: Any, *parts: str) -> None:
    """Status 2, nothing on standard output, one line on standard error that holds the parts."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    lines = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, outcome.err
    assert outcome.err.endswith(lines[0] + "\n")
    assert "Traceback" not in outcome.err
    assert [part for part in parts if part not in lines[0]] == [], lines[0]


def chat(role: str) -> dict[str, Any]:
    """A conversational row whose prompt has this role."""
    return {
        "prompt": [{"role": role, "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "Hello."}],
        "rejected": [{"role": "assistant", "content": "No."}],
    }


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([GOOD, "{not json"], ["row 2", "not JSON", "Write one JSON object a line"]),
        ([GOOD, {"chosen": "a", "rejected": "b", "prompt": 3}], ["row 2", "got int"]),
        ([{"text": "no prompt here"}], ["row 1", "prompt"]),
        ([GOOD, {"prompt": "Q", "chosen": "same", "rejected": "same"}], ["row 2", "chosen", "rejected"]),
        ([chat("user"), chat("usr")], ["row 2", "unknown role 'usr'", "Did you mean 'user'?"]),
        ([GOOD, {"prompt": "Q", "chosen": "a", "rejected": ""}], ["row 2", "empty"]),
        ([GOOD, {"prompt": "Q", "chosen": "", "rejected": "b"}], ["row 2", "empty"]),
        (["[1, 2]"], ["row 1", "JSON object"]),
        ([], ["empty"]),
    ],
)
def test_bad_rows(run: Any, tmp_path: Path, rows: list[Any], parts: list[str]) -> None:
    write(tmp_path / "bad.jsonl", *rows)
    fails(run("import", "bad.jsonl", "--to", "prefs.db"), "bad.jsonl", *parts)
    assert [file.name for file in tmp_path.iterdir()] == ["bad.jsonl"]


def test_a_bad_row_adds_nothing_of_any_file(run: Any, tmp_path: Path, pairs_file: Path) -> None:
    write(tmp_path / "bad.jsonl", GOOD, "{")
    fails(run("import", pairs_file, "bad.jsonl", "--to", "prefs.db"), "bad.jsonl", "row 2")
    assert not (tmp_path / "prefs.db").exists()
    run("import", pairs_file, "--to", "prefs.db")
    before = (tmp_path / "prefs.db").read_bytes()
    fails(run("import", "bad.jsonl", "--to", "prefs.db"), "row 2")
    assert (tmp_path / "prefs.db").read_bytes() == before


def test_bad_rows_can_be_dropped_and_are_counted(run: Any, tmp_path: Path) -> None:
    write(tmp_path / "bad.jsonl", GOOD, "{", {"prompt": "Q", "chosen": "same", "rejected": "same"})
    found = run("import", "bad.jsonl", "--to", "prefs.db", "--on-bad", "drop", "--json").json
    assert [row for row, _ in found["files"][0]["dropped"]] == [2, 3]
    assert found["new"] == {"prompts": 1, "completions": 2, "annotations": 1}
    text = run("import", "bad.jsonl", "--to", "prefs.db", "--on-bad", "drop").out
    assert "dropped 1 (row 2)" in text
    assert "new: 0 prompts" in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["import", "nope.jsonl", "--to", "s.db"], ["nope.jsonl: no such file", "Check the path"]),
        (["import", ".", "--to", "s.db"], ["folder"]),
        (["import", "pairs.jsonl", "--to", "no/such/s.db"], ["no folder"]),
        (["import", "pairs.jsonl", "--to", "pairs.jsonl"], ["pairs.jsonl", "no store"]),
        (["import", "pairs.jsonl", "--to", "s.db", "--format", "trl-prefrence"], ["'trl-preference'"]),
        (["import", "pairs.jsonl", "--to", "s.db", "--on-bad", "dorp"], ["Did you mean 'drop'?"]),
        (["import", "pairs.jsonl", "--to", "s.db", "--test-fraction", "1.5"], ["between 0 and 1"]),
        (["import", "pairs.jsonl", "--to", "s.db", "--split", "a", "--test-fraction", "0.5"], ["exclude"]),
        (["export", "nope.db", "--format", "native", "--to", "o.jsonl"], ["nope.db", "no such store"]),
        (["export", "pairs.jsonl", "--format", "native", "--to", "o"], ["no store", "steerwell import"]),
        (["export", "prefs.db", "--format", "natve", "--to", "o"], ["Did you mean 'native'?"]),
        (["export", "prefs.db", "--format", "native", "--to", "pairs.jsonl"], ["there already", "--force"]),
        (["export", "prefs.db", "--format", "native", "--to", "no/o"], ["no folder"]),
        (["export", "prefs.db", "--format", "trl-unpaired", "--to", "o"], ["0 of 10 groups"]),
        (["export", "prefs.db", "--format", "native", "--to", "o", "--split", "tets"], ["'test'"]),
        (["judge", "nope.db", "--with", "refusal"], ["no such store"]),
        (["judge", "prefs.db", "--with", "refusl"], ["Did you mean 'refusal'?"]),
        (["judge", "prefs.db", "--with", "rules:max_wrds:5"], ["Did you mean 'max_words'?"]),
        (["judge", "prefs.db", "--with", "world:silver"], ["world:gold"]),
        (["judge", "prefs.db", "--with", "refusal", "--criteria", "a"], ["takes no setting criteria"]),
        (["judge", "prefs.db", "--with", "refusal", "--split", "tets"], ["'test'"]),
        (["judge", "prompts.db", "--with", "refusal"], ["no completions to judge"]),
        (["sample", "m", "--prompts", "nope.jsonl", "--to", "s.db"], ["nope.jsonl: no such file"]),
        (["sample", "m", "--prompts", "nope.db", "--to", "s.db"], ["no such store"]),
        (["sample", "m", "--prompts", "world:many", "--to", "s.db"], ["world:200"]),
        (["sample", "m", "--prompts", "pairs.jsonl", "--split", "test", "--to", "s.db"], ["for stores"]),
        (["sample", "m", "--prompts", "pairs.jsonl", "--to", "pairs.jsonl"], ["no store"]),
        (["sample", "world:bas", "--prompts", "pairs.jsonl", "--to", "s.db"], ["world:base"]),
        (["eval", "m", "--tasks", "winrate"], ["unknown task", "Did you mean 'win_rate'?"]),
        (["eval", "m", "--tasks", "win_rate"], ["needs a judge", "--judge"]),
        (["eval", "m", "--tasks", ","], ["no task given"]),
        (["eval", "m", "--tasks", "over_refusal", "--to", "pairs.jsonl"], ["no store"]),
        (["eval", "m", "--tasks", "pair_accuracy"], ["--data"]),
        (["eval", "m", "--tasks", "pair_accuracy", "--data", "prompts.db"], ["no pairs"]),
        (["train", "nope.toml"], ["nope.toml: no such recipe"]),
        (["train", "pairs.jsonl"], ["not a TOML file"]),
    ],
)
def test_words_that_name_nothing(
    run: Any, tmp_path: Path, pairs_file: Path, words: list[str], parts: list[str]
) -> None:
    assert run("import", pairs_file, "--to", "prefs.db").status == 0
    write(tmp_path / "asked.jsonl", {"prompt": "Only a question?"})
    assert run("import", "asked.jsonl", "--to", "prompts.db").status == 0
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    fails(run(*words), *parts)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def _without(tiny: Path, target: Path, *names: str) -> Path:
    shutil.copytree(tiny, target)
    for name in names:
        (target / name).unlink(missing_ok=True)
    return target


def _no_tokenizer(tiny: Path, target: Path) -> Path:
    return _without(tiny, target, "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def _no_template(tiny: Path, target: Path) -> Path:
    _without(tiny, target, "chat_template.jinja")
    config = target / "tokenizer_config.json"
    config.write_text(
        json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "chat_template"})
    )
    return target


def _no_config(tiny: Path, target: Path) -> Path:
    return _without(tiny, target, "config.json")


def _no_weights(tiny: Path, target: Path) -> Path:
    return _without(tiny, target, "model.safetensors")


def _torn_weights(tiny: Path, target: Path) -> Path:
    _without(tiny, target)
    file = target / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return target


def _other_weights(tiny: Path, target: Path) -> Path:
    import torch

    _without(tiny, target)
    save_file({"something.else": torch.zeros(3)}, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize(
    ("spoil", "parts"),
    [
        (_no_tokenizer, ["tokenizer"]),
        (_no_template, ["no chat template"]),
        (_no_config, ["no config.json"]),
        (_no_weights, ["no weights"]),
        (_torn_weights, ["could not be loaded"]),
        (_other_weights, ["weights"]),
        (lambda tiny, target: target, ["no such model directory"]),
    ],
)
def test_model_directories_that_lack_something(
    run: Any, tmp_path: Path, tiny_dir: Path, pairs_file: Path, spoil: Any, parts: list[str]
) -> None:
    path = spoil(tiny_dir, tmp_path / "model")
    fails(run("sample", path, "--prompts", pairs_file, "--to", "s.db"), str(path), *parts)
    fails(run("eval", path, "--tasks", "over_refusal"), str(path), *parts)
    assert not (tmp_path / "s.db").exists()


def test_a_policy_is_no_reward_model(run: Any, tiny_dir: Path, pairs_file: Path) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    fails(run("judge", "prefs.db", "--with", f"rm:{tiny_dir}"), "not a reward model")


@pytest.mark.parametrize(
    ("objective", "hyper", "words", "parts"),
    [
        ("dppo", "", [], ["unknown objective 'dppo'", "Did you mean 'dpo'?"]),
        ("dpo", "betta = 0.1", [], ["'betta'", "Did you mean 'beta'?"]),
        ("dpo", "gamma = 0.1", [], ["'gamma'"]),
        ("dpo", "beta = -1", [], ["beta must be > 0"]),
        ("dpo", "", ["--set", "train.learnin_rate=1"], ["learning_rate"]),
        ("dpo", "", ["--set", "objectiv=1"], ["'objective'"]),
        ("dpo", "", ["--set", "train.steps=many"], ["train.steps"]),
        ("dpo", "", ["--set", "nonsense"], ["no key=value"]),
        ("dpo", "", ["--set", "data=nope.db"], ["nope.db", "no such store"]),
        ("dpo", "", ["--set", "split=tets"], ["'test'"]),
        ("dpo", "", ["--set", "model=nowhere"], ["nowhere", "no such model directory"]),
        ("dpo", "", ["--set", "judge=refusl"], ["Did you mean 'refusal'?"]),
        ("kto", "", ["--set", "resolve=none"], ["kto needs labels", "0 of"]),
    ],
)
def test_recipes(
    run: Any,
    tmp_path: Path,
    tiny_dir: Path,
    pairs_file: Path,
    objective: str,
    hyper: str,
    words: list[str],
    parts: list[str],
) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    (tmp_path / "r.toml").write_text(RECIPE.format(model=tiny_dir, objective=objective, hyper=hyper))
    fails(run("train", "r.toml", *words), *parts)
    run_dir = tmp_path / "run"
    assert not run_dir.exists() or not any(f for f in run_dir.iterdir() if not f.name.startswith("."))


def test_a_recipe_with_a_missing_key_or_broken_toml(run: Any, tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('model = "m"\n')
    fails(run("train", "r.toml"), "r.toml", "'data' is missing")
    (tmp_path / "r.toml").write_text("model = \n")
    fails(run("train", "r.toml"), "r.toml", "not a TOML file")


def test_a_folder_that_holds_another_run_or_something_else(
    run: Any, tmp_path: Path, tiny_dir: Path, pairs_file: Path
) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    (tmp_path / "r.toml").write_text(RECIPE.format(model=tiny_dir, objective="dpo", hyper=""))
    assert run("train", "r.toml").status == 0
    before = {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()}
    fails(run("train", "r.toml", "--set", "hyperparameters.beta=0.5"), "run", "another run", "0.1", "0.5")
    assert {f: f.read_bytes() for f in (tmp_path / "run").rglob("*") if f.is_file()} == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.txt").write_text("meow")
    fails(run("train", "r.toml", "--set", "out=photos"), "photos", "not empty and holds no run")
    fails(run("demo", "--out", "photos"), "photos", "not empty")
    assert [f.name for f in (tmp_path / "photos").iterdir()] == ["cat.txt"]


def test_an_endpoint_without_a_key(run: Any, pairs_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    run("import", pairs_file, "--to", "prefs.db")
    fails(run("judge", "prefs.db", "--with", "openai:gpt"), "OPENAI_API_KEY is not set")
    fails(run("judge", "prefs.db", "--with", "openai:m", "--base-url", "localhost"), "is no address")
