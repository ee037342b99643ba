"""Ctrl-C in real processes: status 130, one line, nothing half-written, and the same command goes on from there.

A command runs in a process of its own that sends itself SIGINT at a chosen point of its work, so that the point
does not depend on the speed of the machine. One test sends it from outside.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from chat_server import ChatServer
from steerwell.data.store import open_store

AGAIN = "interrupted; run the same command again to resume"
# Runs a command line after wrapping a function: at its CALL-th call, after its work is done, Ctrl-C.
WRAP = """
import importlib, os, signal, sys
where, name, call, *words = sys.argv[1:]
module = importlib.import_module(where.partition(":")[0])
owner = getattr(module, where.partition(":")[2]) if ":" in where else module
original, calls = getattr(owner, name), 0
def wrapped(*args, **kwargs):
    global calls
    value = original(*args, **kwargs)
    calls += 1
    if calls == int(call):
        os.kill(os.getpid(), signal.SIGINT)
    return value
setattr(owner, name, wrapped)
from steerwell.cli import main, model_verbs
model_verbs.PER_SAVE = 4
model_verbs.GROUPS_PER_SAVE["rules"] = 2
sys.exit(main(words))
"""


def interrupted(where: str, name: str, call: int, *words: Any, folder: Path) -> str:
    """Run a command that is interrupted there; checks status and last line, returns standard error."""
    command = [sys.executable, "-c", WRAP, where, name, str(call), *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 130, done.stderr
    assert done.stderr.splitlines()[-1] == AGAIN
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def leftovers(folder: Path) -> list[str]:
    """Files that are only there while something is being written."""
    return [
        f.name for f in folder.rglob("*") if f.name.endswith(("-wal", "-journal", "-shm", ".tmp", ".partial"))
    ]


def test_import_adds_all_or_nothing(run: Any, tmp_path: Path, pairs_file: Path) -> None:
    # All rows are written, but the transaction is not committed yet.
    words = ["import", pairs_file, "--to", "prefs.db"]
    interrupted("steerwell.data.records:Rows", "write", 1, *words, folder=tmp_path)
    with open_store(tmp_path / "prefs.db") as store:
        assert (len(store.prompts()), len(store.annotations())) == (0, 0)
    assert leftovers(tmp_path) == []
    assert run(*words, "--json").json["new"] == {"prompts": 10, "completions": 20, "annotations": 10}


def test_judging_goes_on_where_it_stopped(run: Any, tmp_path: Path, pairs_file: Path) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    words = ["judge", "prefs.db", "--with", "rules:max_words:3"]
    # Two groups (four completions) at a time: the seventh verdict is in the second lot, which is lost.
    interrupted("steerwell.judges.rules:RulesJudge", "judge", 7, *words, folder=tmp_path)
    with open_store(tmp_path / "prefs.db") as store:
        assert len([a for a in store.annotations() if a.annotator.startswith("rules:")]) == 4
    found = run(*words, "--json").json
    assert (found["there_already"], found["new_annotations"]) == (2, 16)
    assert leftovers(tmp_path) == []


def test_sampling_goes_on_where_it_stopped(run: Any, tmp_path: Path, tiny_dir: Path) -> None:
    words = ["sample", tiny_dir, "--prompts", "world:6", "-n", "2", "--max-new-tokens", "6", "--to"]
    # Two prompts at a time: the second lot is sampled and not yet written down.
    interrupted("steerwell.models.load:Policy", "sample", 2, *words, "w.db", folder=tmp_path)
    with open_store(tmp_path / "w.db") as store:
        assert [len(g.completions) for g in store] == [2, 2]
    found = run(*words, "w.db", "--json").json
    assert (found["there_already"], found["new_completions"]) == (2, 8)
    run(*words, "straight.db")
    with open_store(tmp_path / "w.db") as one, open_store(tmp_path / "straight.db") as other:
        assert [[c.id for c in g.completions] for g in one] == [[c.id for c in g.completions] for g in other]
        assert [[c.text for c in g.completions] for g in one] == [
            [c.text for c in g.completions] for g in other
        ]
    assert leftovers(tmp_path) == []


RECIPE = """
model = "{model}"
data = "prefs.db"
objective = "dpo"
out = "{out}"
[train]
steps = 4
learning_rate = 1e-3
batch_size = 4
"""


def test_training_goes_on_where_it_stopped(
    run: Any, tmp_path: Path, tiny_dir: Path, pairs_file: Path
) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    for out in ("run", "straight"):
        (tmp_path / f"{out}.toml").write_text(RECIPE.format(model=tiny_dir, out=out))
    interrupted("steerwell.train.fit", "_step", 2, "train", "run.toml", folder=tmp_path)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"
    assert not (tmp_path / "run" / "model").exists()
    assert leftovers(tmp_path) == []
    found = run("train", "run.toml", "--json").json
    straight = run("train", "straight.toml", "--json").json
    assert found["status"] == "done"
    assert found["metrics"] == straight["metrics"]
    metrics = [(tmp_path / out / "metrics.jsonl").read_bytes() for out in ("run", "straight")]
    assert metrics[0] == metrics[1]
    assert len(metrics[0].splitlines()) >= 4


def test_evaluation_leaves_nothing(tmp_path: Path, tiny_dir: Path, pairs_file: Path) -> None:
    words = ["eval", tiny_dir, "--tasks", "over_refusal", "--max-new-tokens", "2", "--to", "eval.db"]
    interrupted("steerwell.models.load:Policy", "sample", 1, *words, folder=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == [pairs_file.name]


def test_a_signal_from_outside_does_not_wait_for_an_endpoint(
    run: Any, tmp_path: Path, pairs_file: Path
) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    asked, release = threading.Event(), threading.Event()

    def hang(request: Any) -> str:
        asked.set()
        release.wait(60)
        return "too late"

    with ChatServer(hang) as server:
        words = ["judge", "prefs.db", "--with", "openai:m", "--base-url", server.url]
        process = subprocess.Popen(
            [sys.executable, "-m", "steerwell", *words],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "NO_PROXY": "127.0.0.1"},
        )
        try:
            assert asked.wait(60)
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=30)  # the request itself would hang for a minute
        finally:
            process.kill()
            release.set()
    assert process.returncode == 130
    assert (out, err.splitlines()[-1]) == ("", AGAIN)
    with open_store(tmp_path / "prefs.db") as store:
        assert [a for a in store.annotations() if a.annotator.startswith("openai:")] == []


def test_an_error_that_a_library_makes_of_an_interruption_is_one(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def swallowing(word: str) -> None:
        try:
            os.kill(os.getpid(), signal.SIGINT)
        except KeyboardInterrupt:
            raise ImportError("half loaded") from None

    monkeypatch.setattr("steerwell.cli.words.existing_store", swallowing)
    outcome = run("judge", "s.db", "--with", "refusal")
    assert (outcome.status, outcome.err) == (130, AGAIN + "\n")
