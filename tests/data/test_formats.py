"""Reading and writing files: every row type by example, every bad row with file, row and mend, round trips."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from steerwell.data import resolve
from steerwell.data.errors import InputError
from steerwell.data.formats import load, save


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), "utf-8")
    return path


def said(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PREFERENCE = {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}
CHAT = {
    "prompt": [said("system", "be right"), said("user", "2 + 2?")],
    "chosen": [said("assistant", "4")],
    "rejected": [said("assistant", "5")],
}
IMPLICIT = {
    "chosen": [said("user", "2 + 2?"), said("assistant", "4")],
    "rejected": [said("user", "2 + 2?"), said("assistant", "5")],
}


@pytest.mark.parametrize("row", [PREFERENCE, CHAT, IMPLICIT], ids=["standard", "conversational", "implicit"])
def test_preferences_in_every_spelling(tmp_path: Path, row: dict[str, Any]) -> None:
    loaded = load(write(tmp_path / "p.jsonl", row))
    assert loaded.report.format == "trl-preference"
    (group,) = resolve.majority(loaded)
    ((chosen, rejected, p),) = group.pairs
    assert group.completions[chosen].text == "4"
    assert group.completions[rejected].text == "5"
    assert p == 1.0
    assert group.prompt[-1].content == "2 + 2?"
    assert loaded[0].annotations[0].annotator == "dataset:p.jsonl"


def test_one_completion_that_begins_like_the_other_is_not_cut(tmp_path: Path) -> None:
    row = {"prompt": "sky?", "chosen": "The sky is blue", "rejected": "The sky is blue and vast"}
    (group,) = load(write(tmp_path / "p.jsonl", row))
    assert [c.text for c in group.completions] == ["The sky is blue", "The sky is blue and vast"]


def test_rows_about_one_prompt_become_one_group(tmp_path: Path) -> None:
    rows = [PREFERENCE, {**PREFERENCE, "rejected": "22"}, {**PREFERENCE, "chosen": "5", "rejected": "22"}]
    (group,) = resolve.majority(load(write(tmp_path / "p.jsonl", *rows)))
    assert [c.text for c in group.completions] == ["4", "5", "22"]
    assert sorted((p.chosen, p.rejected) for p in group.pairs) == [(0, 1), (0, 2), (1, 2)]


def test_labels_demonstrations_and_prompts(tmp_path: Path) -> None:
    unpaired = load(write(tmp_path / "u.jsonl", {"prompt": "q", "completion": "a", "label": False}))
    assert unpaired.report.format == "trl-unpaired"
    assert resolve.labels(unpaired)[0].labels == (False,)
    demo = load(write(tmp_path / "d.jsonl", {"prompt": "q", "completion": "a"}))
    assert demo.report.format == "trl-prompt-completion"
    assert demo[0].completions[0].text == "a"
    prompts = load(write(tmp_path / "q.jsonl", {"prompt": "q"}))
    assert (prompts.report.format, prompts[0].completions) == ("trl-prompt-only", ())
    messages = load(write(tmp_path / "m.jsonl", {"messages": [said("user", "q"), said("assistant", "a")]}))
    assert messages.report.format == "trl-messages"
    assert messages[0].completions[0].text == "a"


BAD = {
    "not JSON": ("{oops", "JSON"),
    "no prompt": ({"completion": "a", "label": True}, "prompt"),
    "equal sides": ({**PREFERENCE, "rejected": "4"}, "equal|same"),
    "unknown role": ({**CHAT, "prompt": [said("usr", "hi")]}, "unknown role 'usr'"),
    "empty completion": ({**PREFERENCE, "chosen": ""}, "empty"),
    "a number": ({**PREFERENCE, "chosen": 4}, "expected text"),
    "no object": ("[1, 2]", "object"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_names_file_row_and_mend(tmp_path: Path, name: str) -> None:
    row, words = BAD[name]
    file = write(
        tmp_path / "p.jsonl",
        PREFERENCE if name != "no prompt" else {"prompt": "q", "completion": "a", "label": True},
        row,
    )
    with pytest.raises(InputError, match=words) as error:
        load(file)
    assert "p.jsonl, row 2:" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [n for n in BAD if n != "no prompt"])
def test_bad_rows_can_be_dropped_and_are_listed(tmp_path: Path, name: str) -> None:
    loaded = load(write(tmp_path / "p.jsonl", PREFERENCE, BAD[name][0]), on_bad="drop")
    assert len(loaded) == 1
    assert [row for row, _ in loaded.report.dropped] == [2]


def test_files_that_are_no_data(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match=r"folder|directory"):
        load(tmp_path)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="empty"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(InputError, match=r"unknown format 'trl-preferences'.*'trl-preference'"):
        load(write(tmp_path / "p.jsonl", PREFERENCE), "trl-preferences")


def test_gzip_is_read(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(PREFERENCE).encode()))
    assert len(load(path)) == 1


@pytest.mark.parametrize("row", [PREFERENCE, CHAT])
def test_exported_preferences_read_back_the_same(tmp_path: Path, row: dict[str, Any]) -> None:
    groups = resolve.majority(load(write(tmp_path / "p.jsonl", row)))
    save(groups, tmp_path / "out.jsonl", "trl-preference")
    again = resolve.majority(load(tmp_path / "out.jsonl"))
    assert [g.prompt for g in again] == [g.prompt for g in groups]
    assert [[c.messages for c in g.completions] for g in again] == [
        [c.messages for c in g.completions] for g in groups
    ]
    assert [g.pairs for g in again] == [g.pairs for g in groups]


def test_our_own_format_loses_nothing(tmp_path: Path) -> None:
    groups = list(load(write(tmp_path / "p.jsonl", CHAT, PREFERENCE)))
    save(groups, tmp_path / "out.jsonl", "native")
    assert list(load(tmp_path / "out.jsonl")) == groups


def test_a_failing_export_leaves_the_old_file(tmp_path: Path) -> None:
    out = write(tmp_path / "out.jsonl", "precious")
    with pytest.raises(InputError):
        save(load(write(tmp_path / "q.jsonl", {"prompt": "q"})), out, "trl-preference")
    assert out.read_text() == "precious\n"
    assert not list(tmp_path.glob("*.tmp*"))
