"""A reward model on an encoder from the command line: trained, asked as a judge, measured; a policy is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_inputs import write

from tiny_encoders import encoder_dir

PAIRS = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no way {i}"} for i in range(12)]


def test_train_judge_and_measure(run: Any, tmp_path: Path) -> None:
    encoder_dir(tmp_path, "bert").rename(tmp_path / "bert")
    write(tmp_path / "pairs.jsonl", *PAIRS)
    recipe = 'model = "bert"\ndata = "pairs.jsonl"\nobjective = "bradley_terry"\nout = "rm"\n'
    recipe += "[train]\nlearning_rate = 5e-3\nsteps = 12\nbatch_size = 6\nmax_length = 40\n"
    (tmp_path / "rm.toml").write_text(recipe)
    assert run("train", "rm.toml", "--json").json["metrics"]["accuracy"] == 1.0
    assert run("import", "pairs.jsonl", "--to", "prefs.db", "--json").status == 0
    measured = run("eval", "rm", "--tasks", "pair_accuracy", "--data", "prefs.db", "--json")
    assert measured.status == 0, measured.err
    assert '"value": 1.0' in measured.out
    judged = run("judge", "prefs.db", "--with", "rm:rm", "--json")
    assert judged.status == 0, judged.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "dpo.toml"], "an encoder: it reads both ways and cannot write"),
        (["plan", "rm.toml"], "plan knows decoders only"),
        (["sample", "bert", "--prompts", "pairs.jsonl", "-n", "2", "--to", "s.db"], "cannot write"),
        (["judge", "prefs.db", "--with", "rm:bert"], "BertModel, not a reward model"),
    ],
)
def test_what_an_encoder_does_not_do(run: Any, tmp_path: Path, words: list[str], said: str) -> None:
    encoder_dir(tmp_path, "bert").rename(tmp_path / "bert")
    write(tmp_path / "pairs.jsonl", *PAIRS)
    run("import", "pairs.jsonl", "--to", "prefs.db")
    for name, objective in (("rm", "bradley_terry"), ("dpo", "dpo")):
        recipe = f'model = "bert"\ndata = "pairs.jsonl"\nobjective = "{objective}"\nout = "{name}"\n'
        (tmp_path / f"{name}.toml").write_text(recipe)
    done = run(*words)
    assert done.status == 2
    assert said in done.err
    assert done.err.count("\n") <= 2
    assert not (tmp_path / "dpo").exists()
