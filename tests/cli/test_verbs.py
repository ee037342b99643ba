"""The verbs on small data: what they do, what they print for people and for programs, and doing it again."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from small_inputs import PAIRS, write

from chat_server import ChatServer
from real_data import real_data
from steerwell.cli import demo_verb, model_verbs, show
from steerwell.cli.glossary import METRICS
from steerwell.data.formats import load
from steerwell.data.store import open_store


def test_import_says_what_it_took(run: Any, pairs_file: Path) -> None:
    found = run("import", pairs_file, "--to", "prefs.db", "--test-fraction", "0.4", "--json").json
    assert found["files"][0]["format"] == "trl-preference"
    assert found["files"][0]["rows"] == 10
    assert found["new"] == {"prompts": 10, "completions": 20, "annotations": 10}
    assert sum(found["splits"].values()) == 10
    assert set(found["splits"]) == {"train", "test"}
    again = run("import", pairs_file, "--to", "prefs.db", "--json").json
    assert again["new"] == {"prompts": 0, "completions": 0, "annotations": 0}
    assert again["splits"] == found["splits"]
    text = run("import", pairs_file, "--to", "prefs.db").out
    assert "10 rows of format trl-preference" in text
    assert "prompts by split: train" in text


def test_import_into_a_named_split(run: Any, tmp_path: Path, pairs_file: Path) -> None:
    write(tmp_path / "more.jsonl", {"prompt": "New?", "chosen": "Yes.", "rejected": "No."})
    run("import", pairs_file, "--to", "prefs.db")
    found = run("import", "more.jsonl", "--to", "prefs.db", "--split", "held", "--json").json
    assert found["splits"]["held"] == 1


def test_import_of_the_real_harmless_test_set(run: Any) -> None:
    path = real_data("hh-rlhf-harmless-test/harmless-base_test.jsonl.gz")
    found = run("import", path, "--to", "hh.db", "--json").json["files"][0]
    assert found["rows"] == 2312
    assert len(found["dropped"]) == 4
    assert [len(rows) for what, rows in found["flagged"].items() if "diverge" in what] == [5]


@pytest.mark.parametrize("format", ["trl-preference", "native"])
def test_export_and_import_again(run: Any, tmp_path: Path, pairs_file: Path, format: str) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    found = run("export", "prefs.db", "--format", format, "--to", "out.jsonl", "--json").json
    assert found["rows"] == found["groups"] == 10
    assert bool(found["not_carried"]) == (format != "native")
    groups = load(tmp_path / "out.jsonl")
    with open_store(tmp_path / "prefs.db") as store:
        assert [g.prompt for g in groups] == [g.prompt for g in store]
        assert [[c.text for c in g.completions] for g in groups] == [
            [c.text for c in g.completions] for g in store
        ]
    assert run("export", "prefs.db", "--format", format, "--to", "out.jsonl").status == 2
    assert run("export", "prefs.db", "--format", format, "--to", "out.jsonl", "--force").status == 0


def test_export_of_labels_by_criterion(run: Any, pairs_file: Path) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    run("judge", "prefs.db", "--with", "refusal")
    words = ["export", "prefs.db", "--format", "trl-unpaired", "--to", "o.jsonl", "--criterion"]
    assert run(*words, "refusal", "--json").json["rows"] == 20
    assert "0 of 10 groups" in run(*words, "kindness", "--force").err


def test_judging_again_adds_nothing_and_new_samples_are_judged(
    run: Any, tmp_path: Path, pairs_file: Path
) -> None:
    run("import", pairs_file, "--to", "prefs.db")
    first = run("judge", "prefs.db", "--with", "rules:max_words:3", "--limit", "4", "--json").json
    assert (first["groups"], first["new_annotations"], first["verdicts"]) == (4, 8, {"score": 8})
    second = run("judge", "prefs.db", "--with", "rules:max_words:3", "--json").json
    assert (second["there_already"], second["new_annotations"]) == (4, 12)
    third = run("judge", "prefs.db", "--with", "rules:max_words:3", "--json").json
    assert (third["there_already"], third["new_annotations"]) == (10, 0)
    write(tmp_path / "more.jsonl", {**PAIRS[0], "chosen": "Something new."})
    run("import", "more.jsonl", "--to", "prefs.db")
    fourth = run("judge", "prefs.db", "--with", "rules:max_words:3", "--json").json
    assert (fourth["there_already"], fourth["new_annotations"]) == (9, 2)
    assert "had been judged already" in run("judge", "prefs.db", "--with", "rules:max_words:3").out


def test_a_failed_verdict_is_asked_again_and_the_others_are_not(
    run: Any, pairs_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    healed = False

    def reply(request: Any) -> Any:
        first = request.part("first completion")
        if "Here is brick" in first and not healed:
            return (400, "too long")
        winner = "first" if first.startswith("Here") else "second"
        return f"Request {request.number}: {request.verdict(overall=winner)}"

    run("import", pairs_file, "--to", "prefs.db")
    with ChatServer(reply) as server:
        words = ["judge", "prefs.db", "--with", "openai:m", "--base-url", server.url]
        found = run(*words, "--json").json
        assert (found["no_verdict"], found["verdicts"]) == (1, {"preference": 19})
        assert list(found["reasons"]) == ["no verdict: status 400: too long"]
        text = run(*words).out
        assert "no verdict in 1" in text
        healed = True
        before = len(server.requests)
        found = run(*words, "--json").json
        assert (found["no_verdict"], found["new_annotations"]) == (0, 1)  # of two asked again, one was known
        assert len(server.requests) - before == 2
        assert run(*words, "--json").json["new_annotations"] == 0
    with open_store(tmp_path / "prefs.db") as store:
        mine = [a for a in store.annotations() if a.annotator.startswith("openai:") and a.value is not None]
    assert len(mine) == len({a.completions for a in mine}) == 20


def test_sample_judge_and_sample_again(run: Any, tmp_path: Path, tiny_dir: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(model_verbs, "PER_SAVE", 6)
    words = [
        "sample",
        tiny_dir,
        "--prompts",
        "world:5",
        "--to",
        "w.db",
        "--max-new-tokens",
        "8",
        "--seed",
        "3",
    ]
    found = run(*words, "-n", "2", "--json").json
    assert (found["prompts"], found["new_completions"]) == (5, 10)
    assert 0 <= found["finished"] <= 10
    assert run(*words, "-n", "2", "--json").json["new_completions"] == 0
    more = run(*words, "-n", "3", "--json").json
    assert (more["new_completions"], more["there_already"]) == (5, 0)
    with open_store(tmp_path / "w.db") as store:
        groups = store.groups()
    assert [len(g.completions) for g in groups] == [3] * 5
    assert {c.source.name for g in groups for c in g.completions} == {str(tiny_dir)}
    assert all(c.token_ids and c.old_logps for g in groups for c in g.completions)
    assert run("judge", "w.db", "--with", "world:gold", "--json").json["new_annotations"] == 15


def test_sample_from_a_store_and_a_file_gives_the_same(run: Any, tmp_path: Path, tiny_dir: Path) -> None:
    write(tmp_path / "p.jsonl", *({"prompt": f"Say {i}."} for i in range(3)))
    run("import", "p.jsonl", "--to", "prompts.db")
    for source, store in (("p.jsonl", "a.db"), ("prompts.db", "b.db")):
        assert (
            run("sample", tiny_dir, "--prompts", source, "--to", store, "--max-new-tokens", "4").status == 0
        )
    with open_store(tmp_path / "a.db") as a, open_store(tmp_path / "b.db") as b:
        assert [c.id for g in a for c in g.completions] == [c.id for g in b for c in g.completions]


RECIPE = """
model = "{model}"
data = "prefs.db"
objective = "{objective}"
out = "{objective}"
[train]
steps = 2
learning_rate = 1e-3
batch_size = 4
"""


@pytest.fixture
def trained(run: Any, tmp_path: Path, tiny_dir: Path, pairs_file: Path) -> dict[str, Any]:
    """A store, a reward model and a policy made by the commands; what training printed as JSON."""
    run("import", pairs_file, "--to", "prefs.db", "--test-fraction", "0.4")
    found = {}
    for objective in ("bradley_terry", "dpo"):
        (tmp_path / f"{objective}.toml").write_text(RECIPE.format(model=tiny_dir, objective=objective))
        found[objective] = run("train", f"{objective}.toml", "--json").json
    return found


def test_the_whole_way_on_own_data(run: Any, tiny_dir: Path, trained: dict[str, Any]) -> None:
    assert trained["dpo"]["status"] == "done"
    assert trained["dpo"]["model"] == "dpo/model"
    for made in trained.values():
        unknown = [name for name in made["metrics"] if name.removeprefix("eval/") not in METRICS]
        assert unknown == []  # what training writes down can be explained
    assert run("explain", "eval/loss").status == 0
    pairs = ["--tasks", "pair_accuracy", "--data", "prefs.db"]
    found = run("eval", "dpo", "bradley_terry", "--against", tiny_dir, *pairs, "--json").json
    assert {(r["policy"], r["metric"]) for r in found["results"]} == {
        ("dpo", "pair_accuracy"),
        ("bradley_terry", "pair_accuracy"),
    }
    assert all(0 <= r["low"] <= r["value"] <= r["high"] <= 1 for r in found["results"])
    table = run("eval", "dpo", "--against", tiny_dir, *pairs, "--split", "all").out
    assert "pair_accuracy" in table
    rm = ["--with", "rm:bradley_terry"]
    assert run("judge", "prefs.db", *rm, "--json").json["verdicts"] == {"score": 20}


def test_eval_by_samples_keeps_the_texts(
    run: Any, tmp_path: Path, tiny_dir: Path, trained: dict[str, Any]
) -> None:
    words = ["--tasks", "win_rate", "--judge", "rules:max_words:4", "--prompts", "prefs.db", "--limit", "3"]
    words += ["--max-new-tokens", "6", "--to", "eval.db", "--json"]
    outcome = run("eval", "dpo", "--against", tiny_dir, *words)
    assert outcome.err.splitlines() == ["win_rate …", "win_rate: done"]
    found = outcome.json
    assert found["settings"]["judge"] == "rules:max_words:4"
    (result,) = found["results"]
    assert result["n"] == 3
    with open_store(tmp_path / "eval.db") as store:
        assert {c.source.name for g in store for c in g.completions} == {"dpo", str(tiny_dir)}


def test_a_finished_run_is_left_alone_and_overrides_are_read(run: Any, trained: dict[str, Any]) -> None:
    again = run("train", "dpo.toml", "--json").json
    assert again["metrics"] == trained["dpo"]["metrics"]
    other = run("train", "dpo.toml", "--set", "out=other", "--set", "hyperparameters.beta=0.7", "--json").json
    assert other["out"] == "other"
    assert other["metrics"]["rewards/margins"] != trained["dpo"]["metrics"]["rewards/margins"]
    text = run("train", "dpo.toml").out
    assert "majority:" in text
    assert "rewards/margins" in text
    assert "model: dpo/model" in text


def test_progress_goes_to_standard_error_and_the_result_to_standard_output(
    run: Any, trained: dict[str, Any]
) -> None:
    outcome = run("train", "dpo.toml", "--set", "out=third", "--json")
    json.loads(outcome.out)
    assert "train: done" in outcome.err


def test_a_slow_command_without_a_terminal_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(show.time, "monotonic", lambda: now)
    with show.progress("sample") as step:
        for i in range(5):
            now += 4.0
            step(i + 1, 5)
    assert capsys.readouterr().err == "sample: 3 of 5, 0:08 left\n"


def test_stages_without_a_terminal_are_few_lines_with_the_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 0.0
    monkeypatch.setattr(show.time, "monotonic", lambda: now)
    with show.stages() as step:
        # a run that is continued: what was done before says nothing of its speed
        for done in range(600, 1001):
            step("train", done, 1000, f"loss {done / 1000:.2f}")
            now += 5.0
    told = capsys.readouterr().err.splitlines()
    assert told[0] == "train … 600 of 1000 loss 0.60"
    assert told[1] == "train: 602 of 1000, 33:10 left  loss 0.60"
    assert told[-1] == "train: done loss 1.00"
    assert 20 < len(told) < 60
    assert show.clock(8040.4) == "2:14:00"


def test_a_bar_in_a_terminal_shows_the_time_left(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(show.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with show.stages() as step:
        step("train", 3, 8, "loss 0.69  1,200 tokens/s")
        step("train", 8, 8, "loss 0.31  1,300 tokens/s")
    assert "3/8" in screen.getvalue()
    assert "loss 0.31  1,300 tokens/s" in screen.getvalue()


def test_json_has_no_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    show.result({"a": float("nan"), "b": [1.5, float("inf")], "c": {"d": (True, "x")}}, True, "")
    assert json.loads(capsys.readouterr().out) == {"a": None, "b": [1.5, None], "c": {"d": [True, "x"]}}


def test_the_demo_prints_its_table(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    one = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}
    result = {
        "before": dict.fromkeys(demo_verb.FIGURES, one),
        "after": {**dict.fromkeys(demo_verb.FIGURES, one), "flattery": {**one, "value": None}},
        "win_rate": one,
        "reward_model": {"accuracy_annotators": 0.8, "accuracy_gold": 0.7, "ceiling": 0.9},
        "overoptimization": dict.fromkeys(
            ("gold_start", "gold_peak", "gold_end", "proxy_start", "proxy_end", "kl_at_peak"), 1.25
        ),
        "seconds": {"sft": 1.0},
    }
    asked: list[Any] = []

    def run_demo(out: Path, seed: int, from_scratch: bool, progress: Any) -> dict[str, Any]:
        asked.append((out, seed, from_scratch))
        progress("sft", 0, 2, "")
        progress("sft", 2, 2, "")
        return result

    monkeypatch.setattr("steerwell.pipelines.demo.run_demo", run_demo)
    outcome = run("demo", "--seed", "3", "--out", "d", "--from-scratch")
    assert asked == [(Path("d"), 3, True)]
    assert "win rate against SFT" in outcome.out
    assert "0.50 (0.40 … 0.60)" in outcome.out
    assert next(line for line in outcome.out.splitlines() if line.startswith("flattery")).endswith("–")
    assert "d/report/index.html" in outcome.out
    assert outcome.err == "sft …\nsft: done\n"
    assert run("demo", "--json").json == result
