"""HH's transcripts: turns, pairs that part early, empty ends; the published test file as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from real_data import real_data
from steerwell.data import resolve
from steerwell.data.formats import load
from steerwell.data.store import open_store


def write(path: Path, chosen: str, rejected: str) -> Path:
    path.write_text(json.dumps({"chosen": chosen, "rejected": rejected}) + "\n")
    return path


def test_the_common_turns_are_the_prompt(tmp_path: Path) -> None:
    start = "\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Why?\n\nAssistant:"
    (group,) = resolve.majority(load(write(tmp_path / "h.jsonl", f"{start} Because.", f"{start} No.")))
    assert [(m.role, m.content) for m in group.prompt] == [
        ("user", "Hi"),
        ("assistant", "Hello"),
        ("user", "Why?"),
    ]
    assert group.completions[group.pairs[0].chosen].text == "Because."


def test_a_pair_that_parts_early_has_completions_of_several_turns(tmp_path: Path) -> None:
    loaded = load(
        write(
            tmp_path / "h.jsonl",
            "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: More\n\nAssistant: B",
            "\n\nHuman: Hi\n\nAssistant: C\n\nHuman: Less\n\nAssistant: D",
        )
    )
    assert [len(c.messages) for c in loaded[0].completions] == [3, 3]
    assert any("diverge before the last turn" in what for what in loaded.report.flagged)


def test_the_real_file(tmp_path: Path) -> None:
    loaded = load(real_data("hh-rlhf-harmless-test/harmless-base_test.jsonl.gz"))
    report = loaded.report
    assert (report.rows, report.format) == (2312, "hh")
    assert [reason for _, reason in report.dropped] == ["the last turn is empty"] * 4
    parted = next(rows for what, rows in report.flagged.items() if "diverge before the last turn" in what)
    assert len(parted) == 5
    assert report.annotations == 2308
    with open_store(tmp_path / "hh.db") as store:
        store.set_split({"train": 0.8, "test": 0.2})
        store.add(loaded)
        train, test = store.prompts(split="train"), store.prompts(split="test")
        assert len(train) + len(test) == len(store) == 2306
        first = {p.messages[0] for p in train} & {p.messages[0] for p in test}
        assert not first
        assert sum(len(g.pairs) for g in resolve.majority(store.groups())) == pytest.approx(2308, abs=2)
