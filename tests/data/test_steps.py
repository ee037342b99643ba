"""Steps: where they end, verdicts on them as evidence, labels by votes, and the files that carry them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerwell.data import formats, resolve
from steerwell.data.errors import InputError
from steerwell.data.evidence import check_annotation
from steerwell.data.messages import Message
from steerwell.data.steps import annotate_steps, joined, step_at, step_ends, step_texts, with_steps
from steerwell.data.store import open_store
from steerwell.data.types import Annotation, Completion, CompletionGroup

ASKED = (Message("user", "7 times 8?"),)


def completion(text: str) -> Completion:
    return Completion(ASKED, (Message("assistant", text),))


def group(*texts: str, annotations: tuple[Annotation, ...] = ()) -> CompletionGroup:
    return CompletionGroup(ASKED, tuple(map(completion, texts)), annotations)


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("a\n\nb\n\nc", ["a\n\n", "b\n\n", "c"]),
        ("a", ["a"]),
        ("a\n\n", ["a\n\n"]),
        ("\n\na\n\nb", ["\n\na\n\n", "b"]),
        ("a\n\n \n\nb", ["a\n\n \n\n", "b"]),
        ("a\n\n\nb", ["a\n\n", "\nb"]),
        ("a\nb\n\nc", ["a\nb\n\n", "c"]),
    ],
)
def test_where_steps_end(text: str, steps: list[str]) -> None:
    ends = step_ends(text)
    assert step_texts(text, ends) == steps
    assert "".join(steps) == text
    assert ends[-1] == len(text)


def test_another_separator_and_steps_given_one_by_one() -> None:
    assert step_texts("a\nb\n\nc", step_ends("a\nb\n\nc", "\n")) == ["a\n", "b\n\n", "c"]
    assert joined(["x\n\ny", "z"]) == ("x\n\ny\n\nz", (6, 7))
    assert [step_at((3, 4), i) for i in (0, 2, 3, 4, 9)] == [0, 0, 1, 1, 1]
    assert step_ends("") == (0,)
    with pytest.raises(InputError, match="separator of steps is empty"):
        step_ends("a", "")


@pytest.mark.parametrize(
    "value",
    [
        (),
        True,
        ((3, True, 1),),
        ((3, True), (3, False)),
        ((0, True),),
        ((3, 1.5),),
        ((3, float("nan")),),
        ((3, "yes"),),
        ((True, True),),
    ],
)
def test_a_malformed_verdict_on_steps_is_refused(value: Any) -> None:
    with pytest.raises(InputError, match="value of a steps annotation must be"):
        check_annotation(Annotation("steps", ("c",), "me", value))


def test_a_well_formed_one_is_not() -> None:
    for value in (None, ((3, True), (5, 0.25), (9, None))):
        check_annotation(Annotation("steps", ("c",), "me", value))
    with pytest.raises(InputError, match="2 verdicts for 3 steps"):
        annotate_steps(completion("a\n\nb\n\nc"), [True, False], "me")
    with pytest.raises(InputError, match=r"steps end at .3, 9. in a completion of 7 characters"):
        annotate_steps(completion("a\n\nb\n\nc"), [True, False], "me", ends=(3, 9))


def voted(*votes: tuple[Any, ...], text: str = "a\n\nb\n\nc") -> CompletionGroup:
    made = tuple(annotate_steps(completion(text), vote, f"p{i}") for i, vote in enumerate(votes))
    return group(text, annotations=made)


def labels_of(found: resolve.Resolved) -> Any:
    return found[0].step_labels[0] if found and found[0].step_labels else None


def test_labels_of_steps_are_means_or_majorities_of_votes() -> None:
    one = voted((True, True, None), (True, False, None), (1.0, 0.5, None))
    assert labels_of(resolve.step_labels([one])) == (1.0, 0.5, None)
    assert labels_of(resolve.step_labels([one], votes="majority")) == (1.0, None, None)
    assert labels_of(resolve.step_labels([one], min_votes=4)) is None
    report = resolve.step_labels([one]).report
    assert (report.step_labels, report.used, report.disagreements, report.resolved) == (2, 3, 1, 1)
    assert "2 step labels from 3 annotations in 1 of 1 groups" in str(report)
    assert resolve.step_labels([one])[0].steps == ((3, 6, 7),)


def test_what_is_behind_the_first_error() -> None:
    one = voted((True, False, True))
    assert labels_of(resolve.step_labels([one])) == (1.0, 0.0, 1.0)
    assert labels_of(resolve.step_labels([one], after_first_error="drop")) == (1.0, 0.0, None)
    assert labels_of(resolve.step_labels([one], after_first_error="wrong")) == (1.0, 0.0, 0.0)
    right = voted((True, True, True))
    assert labels_of(resolve.step_labels([right], after_first_error="wrong")) == (1.0, 1.0, 1.0)
    with pytest.raises(InputError, match="unknown after_first_error"):
        resolve.step_labels([one], after_first_error="no")  # type: ignore[arg-type]


def test_a_verdict_about_other_steps_is_no_vote() -> None:
    text = "a\n\nb"
    made = (
        annotate_steps(completion(text), [True, True], "p0"),
        annotate_steps(completion(text), [False], "p1", ends=(4,)),
        annotate_steps(completion(text), [True, False], "p2"),
        Annotation("steps", (completion(text).id,), "p3", None),
    )
    found = resolve.step_labels([group(text, "other", annotations=made)])
    assert labels_of(found) == (1.0, 0.5)
    assert (found.report.other_cuts, found.report.no_verdict) == (1, 1)
    assert found[0].step_labels == ((1.0, 0.5), None)
    assert found[0].steps == ((3, 4), None)
    assert with_steps(found[0]).steps == ((3, 4), (5,))


def test_labels_of_steps_are_no_labels_of_completions() -> None:
    assert resolve.labels([voted((True, True, True))]) == []
    assert resolve.mean([voted((1.0, 1.0, 1.0))]) == []


def test_the_store_gives_verdicts_on_steps_back(tmp_path: Path) -> None:
    one = voted((True, 0.25, None))
    with open_store(tmp_path / "s.db") as store:
        store.add(one)
        store.add(one)
        (back,) = store.groups()
    assert back.annotations == one.annotations
    assert back.annotations[0].value == ((3, True), (6, 0.25), (7, None))
    assert replace(back.annotations[0]).id == back.annotations[0].id  # hashed anew
    formats.save([resolve.step_labels([back])[0]], tmp_path / "n.jsonl")
    (again,) = formats.load(tmp_path / "n.jsonl")
    assert again.annotations == one.annotations
    assert again.steps == ((3, 6, 7),)
    assert again.step_labels == ((1.0, 0.25, None),)
    row = json.loads((tmp_path / "n.jsonl").read_text())
    row["step_labels"] = [[1.0, 0.0]]
    (tmp_path / "n.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=r"row 1.*2 labels for 3 steps"):
        formats.load(tmp_path / "n.jsonl")


def file_of(tmp_path: Path, *rows: dict[str, Any]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def verdicts(found: CompletionGroup) -> list[tuple[str, list[tuple[str, Any]]]]:
    """(annotator, [(step, verdict)]) of each annotation of steps."""
    texts = {c.id: c.text for c in found.completions}
    out = []
    for a in found.annotations:
        if a.kind == "steps":
            ends = tuple(end for end, _ in a.value)
            steps = step_texts(texts[a.completions[0]], ends)
            out.append((a.annotator, [(s.strip(), v) for s, (_, v) in zip(steps, a.value, strict=True)]))
    return out


def test_the_stepwise_type_of_trl_comes_in_and_goes_out(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "9.8 or 9.11?",
            "completions": ["Compare.\n\nCarefully.", "9.11 is more."],
            "labels": [True, False],
        },
        {"prompt": "9.8 or 9.11?", "completions": ["9.8"], "labels": [1], "annotator": "me", "source": "x"},
        {"prompt": "and 2?", "completions": ["a", "b", "c"], "labels": [True, None, 0.2]},
    ]
    loaded = formats.load(file_of(tmp_path, *rows))
    assert loaded.report.format == "trl-stepwise"
    assert [len(g.completions) for g in loaded] == [2, 1]
    assert verdicts(loaded[0]) == [
        ("dataset:rows.jsonl", [("Compare.\n\nCarefully.", True), ("9.11 is more.", False)]),
        ("me", [("9.8", True)]),
    ]
    assert loaded[0].meta == {"source": "x"}
    assert verdicts(loaded[1])[0][1] == [("a", True), ("b", None), ("c", 0.2)]
    resolved = resolve.step_labels(loaded)
    report = formats.save(resolved, tmp_path / "out.jsonl", "trl-stepwise")
    assert "1 labels of steps" in report.lost
    out = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(row["completions"], row["labels"]) for row in out] == [
        (rows[0]["completions"], [True, False]),
        (["9.8"], [True]),
        (["a"], [True]),
    ]
    with pytest.raises(InputError, match=r"no step has a label; derive them first: .*step_labels"):
        formats.save(loaded, tmp_path / "none.jsonl", "trl-stepwise")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": ["a", "b"], "labels": [True]}, "row 2: 1 labels for 2 steps"),
        ({"completions": ["a"], "labels": True}, "row 2: no list of labels for 1 steps"),
        ({"completions": ["a", " "], "labels": [True, True]}, "row 2: step 2 is empty"),
        ({"completions": [], "labels": [True]}, "row 2: 'completions' must be a list of texts"),
        (
            {"completions": ["a"], "labels": ["yes"]},
            "row 2: a label must be true, false, from 0 to 1, or null",
        ),
    ],
)
def test_a_bad_stepwise_row_is_named(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"prompt": "p", "completions": ["a"], "labels": [True]}
    path = file_of(tmp_path, good, {"prompt": "p", **row})
    with pytest.raises(InputError) as error:
        formats.load(path, "trl-stepwise")
    assert message in str(error.value).replace("rows.jsonl, ", "")
    assert len(formats.load(path, "trl-stepwise", on_bad="drop").report.dropped) == 1


def rated(text: str, rating: int | None, flagged: bool | None = None) -> dict[str, Any]:
    return {"text": text, "rating": rating, "flagged": flagged}


def test_prm800k_gives_the_solution_and_its_alternatives(tmp_path: Path) -> None:
    steps = [
        {"completions": [rated("one", 1), rated("uno", 0)], "human_completion": None, "chosen_completion": 0},
        {"completions": [rated("bad", -1)], "human_completion": {"text": "two"}, "chosen_completion": None},
        {"completions": [rated("three", 0, True)], "human_completion": None, "chosen_completion": 0},
        {
            "completions": [rated("four", -1), rated("five", 1)],
            "human_completion": None,
            "chosen_completion": None,
        },
    ]
    found = {
        "labeler": "L1",
        "question": {"problem": "count", "ground_truth_answer": "5"},
        "label": {"steps": steps, "finish_reason": "found_error"},
    }
    whole = {
        "labeler": "L2",
        "question": {"problem": "count"},
        "label": {
            "steps": [{"completions": [rated("done", 1)], "human_completion": None, "chosen_completion": 0}],
            "finish_reason": "solution",
        },
    }
    nothing = {"question": {"problem": "x"}, "label": {"steps": [], "finish_reason": "give_up"}}
    loaded = formats.load(file_of(tmp_path, found, whole, nothing))
    assert loaded.report.format == "prm800k"
    assert loaded.report.dropped == [(3, "no step of the solution is rated")]
    (one,) = loaded
    assert one.meta == {"ground_truth_answer": "5"}
    assert [c.finished for c in one.completions] == [False, False, False, False, None]
    assert verdicts(one) == [
        ("prm800k:L1", [("one", True), ("two", True), ("three", None), ("four", False)]),
        ("prm800k:L1", [("uno", True)]),
        ("prm800k:L1", [("one", None), ("bad", False)]),
        ("prm800k:L1", [("one", None), ("two", None), ("three", None), ("five", True)]),
        ("prm800k:L2", [("done", True)]),
    ]
    steps[0]["completions"][0]["rating"] = 2
    with pytest.raises(InputError, match="row 1: step 1 is rated 2"):
        formats.load(file_of(tmp_path, found))


@pytest.mark.parametrize("card", [False, True])
def test_math_shepherd_gives_a_verdict_for_each_tag(tmp_path: Path, card: bool) -> None:
    tag, good, bad = ("ки ?", "ки +", "ки -") if card else ("ки", "+", "-")
    text = "Buzz ate? Step 1: 5+8 = 13. {0}\nStep 2: half + 1 is 6. {1}\nStep 3: #### 52 {2}"
    row = {"input": text.format(tag, tag, tag), "label": text.format(good, bad, bad), "task": "GSM8K"}
    loaded = formats.load(file_of(tmp_path, row))
    assert loaded.report.format == "math-shepherd"
    assert loaded[0].prompt == (Message("user", "Buzz ate?"),)
    assert loaded[0].meta == {"task": "GSM8K"}
    assert verdicts(loaded[0])[0][1] == [
        ("Step 1: 5+8 = 13.", True),
        ("Step 2: half + 1 is 6.", False),
        ("Step 3: #### 52", False),
    ]


def test_math_shepherd_rows_that_cannot_be_read(tmp_path: Path) -> None:
    good = {"input": "q? Step 1: a ки", "label": "q? Step 1: a +"}
    odd = {"input": "q ки Step 1: a ки", "label": "q + Step 1: a +"}
    loaded = formats.load(file_of(tmp_path, good, odd))
    assert [row for row, _ in loaded.report.dropped] == [2]
    with pytest.raises(InputError, match="row 2: 'label' does not say"):
        formats.load(file_of(tmp_path, good, {"input": "q? Step 1: a ки", "label": "q? Step 1: b +"}))


def test_step_dpo_rows_are_pairs_that_part_in_one_step(tmp_path: Path) -> None:
    row = {
        "dataset": "gsm",
        "prompt": "How many?",
        "initial_reason_steps": "Step 1: two.\nStep 2:",
        "chosen": " so four.",
        "rejected": " so five.",
        "full_chosen": "unread",
        "answer": "4",
    }
    loaded = formats.load(file_of(tmp_path, row, row | {"prompt": "And?", "initial_reason_steps": ""}))
    assert loaded.report.format == "step-dpo"
    pairs = resolve.majority(loaded)
    assert [g.completions[g.pairs[0].chosen].text for g in pairs] == [
        "Step 1: two.\nStep 2: so four.",
        " so four.",
    ]
    assert [with_steps(g).steps for g in pairs] == [((20, 29), (20, 29)), ((9,), (9,))]
    assert verdicts(loaded[0])[1][1] == [("Step 1: two.\nStep 2:", None), ("so five.", False)]
    assert loaded[0].meta == {"answer": "4", "dataset": "gsm"}
    with pytest.raises(InputError, match="row 1: chosen and rejected are equal"):
        formats.load(file_of(tmp_path, row | {"rejected": " so four."}))
