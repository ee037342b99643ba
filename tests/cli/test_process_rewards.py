"""From a file with labels of steps to a process reward model, by commands alone."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from small_inputs import write

from conftest import Run
from steerwell.data.messages import Message
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models.load_reward_model import load_reward_model


def rows() -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {
            "prompt": f"solve {i}",
            "completions": [" ".join(draw.choices(["alpha", "kilo"], k=2)) for _ in range(3)],
            "labels": [draw.random() < 0.6 for _ in range(3)],
        }
        for i in range(12)
    ]


def recipe(path: Path, model: Path, data: str, out: str) -> Path:
    path.write_text(
        f'model = "{model}"\ndata = "{data}"\nobjective = "process_reward"\nout = "{out}"\n'
        'resolve = {rule = "step_labels", after_first_error = "drop"}\n'
        '[train]\nsteps = 2\nbatch_size = 4\naggregate = "prod"\n'
    )
    return path


def test_a_file_becomes_a_process_reward_model(run: Run, tmp_path: Path, tiny_dir: Path) -> None:
    write(tmp_path / "steps.jsonl", *rows())
    done = run("train", recipe(tmp_path / "a.toml", tiny_dir, "steps.jsonl", "run"))
    assert done.status == 0, done.err
    model = load_reward_model(tmp_path / "run" / "model")
    assert model.recipe.aggregate == "prod"
    asked = (Message("user", "p"),)
    group = CompletionGroup(asked, (Completion(asked, (Message("assistant", "a\n\nb"),)),))
    assert len(model.score_steps([group])[0][0]) == 2


def test_a_store_keeps_verdicts_on_steps_and_gives_them_back(
    run: Run, tmp_path: Path, tiny_dir: Path
) -> None:
    given = rows()
    write(tmp_path / "steps.jsonl", *given)
    said = run("import", "steps.jsonl", "--to", "s.db")
    assert said.status == 0, said.err
    assert "trl-stepwise" in said.out
    assert run("export", "s.db", "--format", "trl-stepwise", "--to", "out.jsonl").status == 0
    back = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(r["completions"], r["labels"]) for r in back] == [(r["completions"], r["labels"]) for r in given]
    done = run("train", recipe(tmp_path / "b.toml", tiny_dir, "s.db", "stored"), "--json")
    assert done.status == 0, done.err


def test_a_row_with_too_few_labels_is_named(run: Run, tmp_path: Path, tiny_dir: Path) -> None:
    given = rows()
    given[4]["labels"] = [True]
    write(tmp_path / "steps.jsonl", *given)
    done = run("train", recipe(tmp_path / "c.toml", tiny_dir, "steps.jsonl", "run"))
    assert done.status == 2
    assert "row 5" in done.err
    assert "1 labels for 3 steps" in done.err
    assert not (tmp_path / "run").exists()
