"""``steerwell eval --data``: which task reads what, and reward models evaluated from the command line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_inputs import write

from steerwell.cli.eval_data import make_tasks, places
from steerwell.data.errors import InputError
from steerwell.data.formats import save
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source

RB2 = {
    "id": "0",
    "prompt": "What is two and two?",
    "chosen": ["Four."],
    "rejected": ["Five.", "Six.", "Three."],
    "subset": "Math",
}


@pytest.fixture(scope="module")
def reward_dir(tmp_path_factory: pytest.TempPathFactory, tiny_dir: Path) -> Path:
    """A tiny reward model as a directory."""
    from steerwell.models.load import load_policy
    from steerwell.models.reward_model import RewardModel

    model = RewardModel.from_policy(load_policy(tiny_dir), pooling="mean")
    return model.save(tmp_path_factory.mktemp("rm") / "rm")


@pytest.mark.parametrize(
    ("data", "tasks", "found"),
    [
        (["a.db"], ["pair_accuracy"], {"pair_accuracy": ["a.db"]}),
        (["a.db"], ["pair_accuracy", "win_rate"], {"pair_accuracy": ["a.db"]}),
        (["a.db"], ["pair_accuracy", "reward_model"], {"pair_accuracy": ["a.db"], "reward_model": ["a.db"]}),
        (
            ["a.db,rm_bench=b.json"],
            ["reward_model", "rm_bench"],
            {"reward_model": ["a.db"], "rm_bench": ["b.json"]},
        ),
        (
            ["reward_model=c.db", "a.db"],
            ["pair_accuracy", "reward_model"],
            {"pair_accuracy": ["a.db"], "reward_model": ["c.db"]},
        ),
        (["f.json"], ["rewardbench2"], {"rewardbench2": ["f.json"]}),
        (["ppe=a.json", "ppe=b.json"], ["ppe"], {"ppe": ["a.json", "b.json"]}),
        (["postgresql://h/d?x=1"], ["pair_accuracy"], {"pair_accuracy": ["postgresql://h/d?x=1"]}),
        ([], ["win_rate"], {}),
    ],
)
def test_which_task_reads_what(data: list[str], tasks: list[str], found: dict[str, list[str]]) -> None:
    assert places(data, tasks) == found


def test_a_file_that_is_there_is_meant_as_it_is_spelt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a,b.db", "rm_bench=x.db"):
        (tmp_path / name).touch()
        assert places([name], ["pair_accuracy"]) == {"pair_accuracy": [name]}


@pytest.mark.parametrize(
    ("data", "tasks", "says"),
    [
        ([], ["reward_model"], r"reward_model needs judged pairs.*--data STORE"),
        ([], ["rm_bench"], r"rm_bench needs its published file.*--data rm_bench=FILE"),
        (["rm_bnch=x"], ["rm_bench"], "Did you mean 'rm_bench'"),
        (["rm_bench=x"], ["reward_model"], "given for rm_bench, which is not asked for"),
        (["a.db", "b.db"], ["pair_accuracy"], "reads one store or file, and 2 are given"),
        (["rm_bench=x", "a.db"], ["rm_bench"], "no task reads 'a.db'"),
        (["a.db"], ["win_rate"], "no task reads 'a.db'"),
    ],
)
def test_data_that_fits_nothing(data: list[str], tasks: list[str], says: str) -> None:
    with pytest.raises(InputError, match=says):
        places(data, tasks)


def test_a_benchmark_is_one_whole(tmp_path: Path) -> None:
    path = str(write(tmp_path / "rb2.jsonl", RB2))
    with pytest.raises(InputError, match="--limit would leave out a part"):
        make_tasks(["rewardbench2"], {"rewardbench2": [path]}, "test", 1)


def test_a_reward_model_from_the_command_line(
    run: Any, tmp_path: Path, pairs_file: Path, reward_dir: Path, tiny_dir: Path
) -> None:
    run("import", pairs_file, "--to", "prefs.db", "--test-fraction", "0.4")
    bench = write(tmp_path / "rb2.jsonl", RB2)
    words = ["--tasks", "reward_model,rewardbench2,pair_accuracy", "--data", "prefs.db", "--split", "all"]
    words += ["--data", f"rewardbench2={bench}"]
    found = run("eval", reward_dir, *words, "--json").json
    metrics = {r["metric"]: r for r in found["results"]}
    assert metrics["rm_accuracy"]["value"] == metrics["pair_accuracy"]["value"]
    assert metrics["rm_accuracy"]["n"] == 10
    assert metrics["rm_ceiling"]["value"] is None
    assert metrics["probe/empty"]["coverage"]["missing"] == {"refused by the model": 10}
    assert metrics["probe/repeated"]["n"] == 10
    assert metrics["rewardbench2/subset=Math"]["n"] == 1
    table = run("eval", reward_dir, *words).out
    assert "accuracy, all pairs" in table
    assert "rm_reliability" not in table
    policy = run("eval", tiny_dir, "--tasks", "reward_model", "--data", "prefs.db", "--split", "all")
    assert policy.status == 2
    assert "--against" in policy.err


def test_a_file_with_scores_only_gives_best_of_n(run: Any, tmp_path: Path, reward_dir: Path) -> None:
    groups = []
    for i in range(4):
        prompt = as_messages(f"prompt {i}")
        made = tuple(
            Completion(prompt, (Message("assistant", f"text {j}"),), Source(index=j)) for j in range(3)
        )
        notes = tuple(Annotation("score", (c.id,), "judge", float(j)) for j, c in enumerate(made))
        groups.append(CompletionGroup(prompt, made, notes))
    save(groups, tmp_path / "scored.jsonl")
    found = run("eval", reward_dir, "--tasks", "reward_model", "--data", "scored.jsonl", "--json").json
    metrics = {r["metric"]: r["value"] for r in found["results"]}
    assert metrics["bon_gold/n=1"] == 1.0
    assert metrics["bon_oracle/n=3"] == 2.0
    assert "rm_accuracy" not in metrics


def test_a_bad_benchmark_file_is_named_before_a_model_is_loaded(run: Any, tmp_path: Path) -> None:
    bad = tmp_path / "rb2.jsonl"
    bad.write_text(json.dumps(RB2) + "\n" + json.dumps({**RB2, "chosen": []}) + "\n")
    found = run("eval", "no/model", "--tasks", "rewardbench2", "--data", bad)
    assert found.status == 2
    assert "rb2.jsonl, row 2" in found.err
    assert len(found.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("reward_model", "best of n"),
        ("rewardbench2", "tanh"),
        ("rm_accuracy/domain=math", "By slice"),
        ("probe/empty", "spoilt"),
        ("rm_ece", "by_chance"),
    ],
)
def test_every_figure_can_be_explained(run: Any, name: str, says: str) -> None:
    found = run("explain", name)
    assert found.status == 0
    assert says in found.out
