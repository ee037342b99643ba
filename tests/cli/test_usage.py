"""Help, usage errors and exit statuses: one line, the nearest name, nothing heavy loaded."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from steerwell.cli import app as cli_app
from steerwell.cli import main
from steerwell.data.errors import InputError

VERBS = ("demo", "import", "export", "sample", "judge", "plan", "train", "eval", "explain")


def one_line(outcome: Any) -> str:
    """The only line on standard error, which is an error; standard output is empty."""
    assert outcome.status == 2, outcome
    assert outcome.out == ""
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.startswith("error: ")
    return outcome.err.removeprefix("error: ").rstrip("\n")


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help_with_an_example(run: Any, verb: str) -> None:
    outcome = run(verb, "--help")
    assert outcome.status == 0
    assert re.search(rf"Example: steerwell {verb}\b", outcome.out)
    assert "--json" in outcome.out
    assert outcome.err == ""


def test_the_example_of_each_command_parses(run: Any, tmp_path: Path) -> None:
    """Its words are known: what it then complains about is a file that is not there."""
    (tmp_path / "runs").mkdir()  # so that runs/dpo is a folder that is missing, and not a name on the hub
    for verb in set(VERBS) - {"demo", "explain"}:
        example = " ".join(run(verb, "--help").out.split("Example: steerwell ")[1].split())
        line = one_line(run(*example.split()))
        assert "No such" not in line
        assert "Missing" not in line


def test_help_without_a_command_names_all(run: Any) -> None:
    outcome = run()
    assert outcome.status == 0
    listed = outcome.out.split("Commands:")[1]
    assert re.findall(r"^  (\w+)  ", listed, re.MULTILINE) == list(VERBS)


def test_help_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'sqlalchemy', 'httpx', 'matplotlib'}"
    show = f"main(['train', '--help']); print({heavy} & set(sys.modules))"
    code = f"import sys; from steerwell.cli import main; {show}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_version_and_module(run: Any) -> None:
    outcome = run("--version")
    assert outcome.out.startswith("steerwell ")
    done = subprocess.run(
        [sys.executable, "-m", "steerwell", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == outcome.out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["explian"], ["No such command 'explian'", "Did you mean 'explain'?", "steerwell --help"]),
        (["zzz"], ["No such command 'zzz'", "Known: demo"]),
        (["sample", "--promts", "x"], ["No such option --promts", "'--prompts'", "steerwell sample --help"]),
        (["sample"], ["Missing argument 'MODEL'"]),
        (["sample", "m"], ["Missing option", "--prompts"]),
        (["sample", "m", "--prompts", "p", "--to", "s", "-n", "0"], ["-n", "1"]),
        (["sample", "m", "--prompts", "p", "--to", "s", "-n", "many"], ["-n"]),
        (["judge", "s", "--with"], ["--with"]),
        (["export", "a", "b", "--format", "x", "--to", "y"], ["unexpected", "b"]),
    ],
)
def test_usage_errors_are_one_line(run: Any, words: list[str], parts: list[str]) -> None:
    line = one_line(run(*words))
    assert [part for part in parts if part not in line] == []


def test_debug_shows_the_traceback_and_its_absence_does_not(run: Any) -> None:
    assert "Traceback" not in run("import", "nope.jsonl", "--to", "s.db").err
    for words in (
        ["--debug", "import", "nope.jsonl", "--to", "s.db"],
        ["import", "--debug", "nope.jsonl", "--to", "s"],
    ):
        outcome = run(*words)
        assert outcome.status == 2
        assert "Traceback" in outcome.err
        assert outcome.err.splitlines()[-1].startswith("error: nope.jsonl: no such file")


def test_an_error_of_ours_is_one_line_too(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(text: str) -> None:
        raise KeyError("two\nlines")

    monkeypatch.setattr("steerwell.cli.words.existing_store", broken)
    outcome = run("judge", "s.db", "--with", "refusal")
    assert outcome.status == 1
    assert outcome.err.count("\n") == 1
    assert "this should not have happened: KeyError" in outcome.err
    assert "--debug" in outcome.err


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (InputError("a is wrong", file="f", row=3, mend="Mend a."), 2, "f, row 3: a is wrong. Mend a."),
        (FileNotFoundError(2, "No such file or directory", "x.txt"), 2, "x.txt: No such file or directory."),
        (OSError(28, "No space left on device"), 2, "No space left on device."),
        (RuntimeError(), 1, "this should not have happened: RuntimeError"),
    ],
)
def test_what_becomes_of_errors(error: BaseException, status: int, line: str) -> None:
    said, code = cli_app.explain_error(error)
    assert code == status
    assert said.startswith(line)


def test_errors_of_other_rooms_have_their_status() -> None:
    from steerwell.objectives import ObjectiveError
    from steerwell.train.rundir import TrainingError

    assert cli_app.explain_error(ObjectiveError("beta must be > 0")) == ("beta must be > 0", 2)
    assert cli_app.explain_error(TrainingError("the loss is nan")) == ("the loss is nan", 1)


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m steerwell explain | head -c 5 >/dev/null; echo $?",
        shell=True,
        capture_output=True,
        text=True,
        check=True,
    )
    assert "Traceback" not in done.stderr
    assert "should not have happened" not in done.stderr


def test_threads_are_asked_for_by_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("STEERWELL_THREADS", raising=False)
    assert cli_app.threads() == 1
    monkeypatch.setenv("STEERWELL_THREADS", "3")
    assert cli_app.threads() == 3
    for wrong in ("0", "many", "-1", ""):
        monkeypatch.setenv("STEERWELL_THREADS", wrong)
        with pytest.raises(InputError, match="STEERWELL_THREADS"):
            cli_app.threads()


def test_explain(run: Any) -> None:
    listed = run("explain", "--json").json
    assert list(listed) == ["objective", "judge", "rule", "task", "metric"]
    assert "dpo" in listed["objective"]
    assert "win_rate" in listed["task"]
    for kind, known in listed.items():
        for name in known:
            found = run("explain", name, "--json").json
            assert found["kind"] == kind
            assert len(found["text"]) > 25, name
    text = run("explain", "dpo").out
    assert "arXiv:2305.18290" in text
    assert "beta" in text
    assert "Did you mean 'dpo'?" in one_line(run("explain", "dppo"))
    assert json.loads(run("explain", "rewards/margins", "--json").out)["kind"] == "metric"


def test_main_leaves_signals_as_they_were() -> None:
    import signal

    before = signal.getsignal(signal.SIGINT)
    main(["--version"])
    assert signal.getsignal(signal.SIGINT) is before
