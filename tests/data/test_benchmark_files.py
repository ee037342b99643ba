"""Published files of benchmarks: every format read, every fault named with file, row and mend."""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerwell.data.benchmarks import (
    part_of,
    read_ppe,
    read_rewardbench,
    read_rewardbench2,
    read_rm_bench,
)
from steerwell.data.errors import InputError
from steerwell.data.tables import read_rows

V1 = {"prompt": "q", "chosen": "good", "rejected": "bad", "subset": "hep-cpp", "id": 7}
V2 = {
    "id": "3",
    "prompt": "q",
    "chosen": ["good"],
    "rejected": ["x", "y", "z"],
    "num_correct": 1,
    "total_completions": 4,
    "subset": "Focus",
}
TIED = {
    **V2,
    "id": "tied:5",
    "chosen": ["red", "blue"],
    "rejected": ["dog"],
    "num_correct": 2,
    "subset": "Ties",
}
RM = {"id": 1, "prompt": "q", "chosen": ["a", "aa", "aaa"], "rejected": ["b", "bb", "bbb"], "domain": "chat"}
HUMAN = {
    "prompt": "q",
    "response_1": "one",
    "response_2": "two",
    "winner": "model_b",
    "model_a": "m1",
    "model_b": "m2",
    "hard_prompt": True,
}
RIGHT = {
    "prompt": "q",
    "response_1": "one",
    "response_2": "two",
    "response_3": "",
    "scores": [False, True, False],
    "sampled_conflict_pairs": [[0, 1], [1, 2], [0, 2]],
}


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_json_jsonl_and_gzip_hold_the_same_rows(tmp_path: Path) -> None:
    rows = [V1, {**V1, "prompt": "other\nline"}]
    lines = jsonl(tmp_path / "a.jsonl", *rows)
    array = tmp_path / "b.json"
    array.write_text("\n " + json.dumps(rows, indent=1))
    packed = tmp_path / "c.anything"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    for path in (lines, array, packed):
        assert [dict(row.value) for row in read_rows(path)] == rows
        assert [row.number for row in read_rows(path)] == [1, 2]


def test_parquet(tmp_path: Path) -> None:
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # type: ignore[import-not-found]

    path = tmp_path / "shp-00000-of-00001.parquet"
    rows = [{"prompt": [{"role": "user", "content": "q"}], "chosen": "good", "rejected": "bad"}]
    parquet.write_table(arrow.Table.from_pylist(rows), path)
    assert [dict(row.value) for row in read_rows(path)] == rows
    (item,) = read_rewardbench(path)
    assert (item.part, item.group.prompt[0].content) == ("shp", "q")
    path.write_bytes(b"PAR1 and then nothing")
    with pytest.raises(InputError, match="damaged Parquet"):
        read_rows(path)


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "t.parquet"
    path.write_bytes(b"PAR1....PAR1")
    with pytest.raises(
        InputError, match=r"t\.parquet: .*pyarrow is not installed.*steerwell\[parquet\].*JSONL"
    ):
        read_rows(path)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"[]", "the file is empty"),
        (b'{"a": 1}\n{"a": \n', "row 2: not JSON"),
        (b"[1, 2]", "row 1: expected a JSON object, got int"),
        (b"[{]", "not JSON"),
        (b'{"a": 1}\n\xff\n', "row 2: not text in UTF-8"),
        (gzip.compress(b"x" * 500)[:-9], "damaged gzip"),
    ],
)
def test_files_that_are_no_tables(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=says) as error:
        read_rows(path)
    assert str(path) in str(error.value)


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_rows(tmp_path / "nope.json")
    with pytest.raises(InputError, match="this is a folder"):
        read_rows(tmp_path)


def test_rewardbench(tmp_path: Path) -> None:
    (item,) = read_rewardbench(jsonl(tmp_path / "filtered.jsonl", V1))
    assert [c.text for c in item.group.completions] == ["good", "bad"]
    assert (item.part, item.right, item.key) == ("hep-cpp", 1, "filtered.jsonl:1")


def test_a_prior_set_is_named_by_its_file(tmp_path: Path) -> None:
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    row = {"prompt": messages, "chosen": "good", "rejected": "bad", "subset": "whatever"}
    (item,) = read_rewardbench(jsonl(tmp_path / "anthropic_hhh-00000-of-00001-abc123.jsonl", row))
    assert item.part == "anthropic_hhh"
    assert [m.role for m in item.group.prompt] == ["user", "assistant", "user"]
    assert part_of("x/math_best_of_k.parquet") == "math_best_of_k"
    assert part_of("train-00000-of-00001.jsonl.gz") == "train"


def test_rewardbench2(tmp_path: Path) -> None:
    focus, tied = read_rewardbench2(jsonl(tmp_path / "test.jsonl", V2, TIED))
    assert [c.text for c in focus.group.completions] == ["good", "x", "y", "z"]
    assert (focus.part, focus.right, focus.facts) == ("Focus", 1, {})
    assert (tied.part, tied.right, tied.facts) == ("Ties", 2, {"kind": "tied", "question": "5"})


def test_rm_bench(tmp_path: Path) -> None:
    (item,) = read_rm_bench(jsonl(tmp_path / "total_dataset.json", RM))
    assert [c.text for c in item.group.completions] == ["a", "aa", "aaa", "b", "bb", "bbb"]
    assert (item.part, item.right) == ("chat", 3)


def test_ppe(tmp_path: Path) -> None:
    tie = {**HUMAN, "winner": "tie (bothbad)"}
    (one, other) = read_ppe(jsonl(tmp_path / "human_preference_v1.jsonl", HUMAN, tie))
    assert (one.part, one.facts["winner"], one.facts["models"]) == ("human", 1, ("m1", "m2"))
    assert [c.source.name for c in one.group.completions] == ["m1", "m2"]
    assert other.facts["winner"] is None
    (right,) = read_ppe(jsonl(tmp_path / "math_best_of_k.jsonl", RIGHT))
    assert right.part == "math_best_of_k"
    assert right.facts["scores"] == (0.0, 1.0, 0.0)
    assert right.facts["pairs"] == ((1, 0), (1, 2))  # right first; two wrong ones are no pair
    assert [c.text for c in right.group.completions] == ["one", "two", ""]  # a model may have said nothing


def test_equal_texts_are_told_apart(tmp_path: Path) -> None:
    (item,) = read_rewardbench2(jsonl(tmp_path / "t.jsonl", {**V2, "rejected": ["x", "x", "x"]}))
    assert len({c.id for c in item.group.completions}) == 4


@pytest.mark.parametrize(
    ("read", "row", "says"),
    [
        (read_rewardbench, {k: v for k, v in V1.items() if k != "subset"}, "no 'subset'"),
        (read_rewardbench, {k: v for k, v in V1.items() if k != "prompt"}, "no 'prompt'"),
        (read_rewardbench, {**V1, "chosen": None}, "no 'chosen'"),
        (read_rewardbench, {**V1, "chosen": 3}, "expected text"),
        (read_rewardbench2, {**V2, "num_correct": 2}, "num_correct is 2, but 1"),
        (read_rewardbench2, {**V2, "chosen": ["a", "b"], "num_correct": 2}, "2 completions are chosen"),
        (read_rewardbench2, {**V2, "rejected": []}, "'rejected' is not a list"),
        (read_rewardbench2, {**TIED, "id": "5"}, "names no question"),
        (read_rewardbench2, {**TIED, "chosen": ["red"], "num_correct": 1}, "one right answer"),
        (read_rm_bench, {**RM, "chosen": ["a", "aa"]}, "2 chosen and 3 rejected"),
        (read_rm_bench, {**RM, "domain": ""}, "no 'domain'"),
        (read_ppe, {**HUMAN, "winner": "model_c"}, "unknown winner 'model_c'"),
        (read_ppe, {**HUMAN, "model_a": None}, "no 'model_a'"),
        (read_ppe, {"prompt": "q", "response_1": "a"}, "neither 'winner' nor 'scores'"),
        (read_ppe, {**RIGHT, "scores": "yes"}, "not a list"),
        (read_ppe, {**RIGHT, "scores": [True, 2, False]}, r"outside \[0, 1\]"),
        (read_ppe, {**RIGHT, "scores": [True, False, False, True]}, "no 'response_4'"),
        (read_ppe, {**RIGHT, "sampled_conflict_pairs": [[0, 9]]}, "no pair of responses"),
    ],
)
def test_a_bad_row_is_named(tmp_path: Path, read: Callable, row: dict[str, Any], says: str) -> None:
    good = {read_rewardbench: V1, read_rewardbench2: V2, read_rm_bench: RM, read_ppe: HUMAN}[read]
    path = jsonl(tmp_path / "file.jsonl", good, row)
    with pytest.raises(InputError, match=says) as error:
        read(path)
    assert f"{path}, row 2:" in str(error.value)
    assert error.value.mend
