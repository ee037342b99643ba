"""The store: what goes in comes out, once; evidence is never changed; a failure leaves nothing behind."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.splits import split_of, split_root
from steerwell.data.store import open_store
from steerwell.data.types import Annotation, Completion, CompletionGroup, Prompt, Source

ASK = (Message("system", "be brief"), Message("user", "why is the sky blue?"))


def completion(text: str, index: int = 0, prompt: tuple[Message, ...] = ASK) -> Completion:
    source = Source("model", "m", "r1", '{"temperature":1.0}', 7, 3, index)
    return Completion(
        prompt, (Message("assistant", text),), source, (5, 6, 1), (2, 3), (-0.5, -1.25, -1e-7), True
    )


def group(*texts: str, prompt: tuple[Message, ...] = ASK, meta: dict | None = None) -> CompletionGroup:
    made = tuple(completion(text, i, prompt) for i, text in enumerate(texts))
    return CompletionGroup(prompt, made, meta=meta or {})


def test_everything_comes_back_exactly(tmp_path: Path) -> None:
    given = group("because", "because", "rayleigh", meta={"source": "unit", "n": 3})
    a, b, c = given.completions
    notes = [
        Annotation(
            "preference", (b.id, a.id), "ann", 1, strength=2.0, rationale="ä", time="2026-01-01T00:00:00Z"
        ),
        Annotation("ranking", (c.id, a.id, b.id), "bob", (1, 2, 2)),
        Annotation("score", (c.id,), "judge", None, "honest", seconds=0.5, cost=0.01),
    ]
    with open_store(tmp_path / "s.db") as store:
        report = store.add([given], notes)
        assert (report.prompts, report.completions, report.annotations) == (1, 3, 3)
    with open_store(tmp_path / "s.db") as store:
        (found,) = store.groups()
        assert found.prompt == ASK
        assert found.completions == given.completions
        assert {x.id: x for x in found.annotations} == {x.id: x for x in notes}
        assert dict(found.meta) == {"source": "unit", "n": 3}
        assert store.prompts() == [Prompt(ASK)]
        assert found.completions[0].token_ids == (5, 6, 1)
        assert found.completions[0].old_logps == (-0.5, -1.25, -1e-7)


def test_adding_again_adds_nothing(tmp_path: Path) -> None:
    given = group("a", "b")
    note = Annotation("preference", tuple(c.id for c in given.completions), "ann", 0)
    with open_store(tmp_path / "s.db") as store:
        store.add([given], [note])
        before = store.digest()
        again = store.add([given], [note])
        assert (again.prompts, again.completions, again.annotations) == (0, 0, 0)
        assert store.digest() == before


def test_a_shared_history_is_stored_once(tmp_path: Path) -> None:
    longer = (*ASK, Message("assistant", "because"), Message("user", "and at dusk?"))
    with open_store(tmp_path / "s.db") as store:
        store.add([group("because"), group("red", prompt=longer)])
    rows = sqlite3.connect(tmp_path / "s.db").execute("select count(*) from messages").fetchone()[0]
    assert rows == 5  # system, user, "because", "and at dusk?", "red"


def test_texts_that_differ_in_white_space_stay_apart(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        store.add([group("a", "a ")])
        assert [c.text for c in store.groups()[0].completions] == ["a", "a "]


@pytest.mark.parametrize("sql", ["update annotations set value = '0'", "delete from annotations"])
def test_evidence_cannot_be_changed(tmp_path: Path, sql: str) -> None:
    given = group("a", "b")
    with open_store(tmp_path / "s.db") as store:
        store.add([given], [Annotation("preference", tuple(c.id for c in given.completions), "ann", 1)])
    raw = sqlite3.connect(tmp_path / "s.db")
    with pytest.raises(sqlite3.DatabaseError, match="append"):
        raw.execute(sql)
    raw.close()


def test_an_annotation_of_unknown_completions_is_refused_and_nothing_is_kept(tmp_path: Path) -> None:
    given = group("a", "b")
    stray = Annotation("preference", (given.completions[0].id, "c1-nowhere"), "ann", 0)
    with open_store(tmp_path / "s.db") as store:
        with pytest.raises(InputError, match="c1-nowhere"):
            store.add([given], [stray])
        assert len(store) == 0


def test_a_failure_in_the_middle_leaves_the_store_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from steerwell.data import records

    with open_store(tmp_path / "s.db") as store:
        store.add([group("old")])
        before = store.digest()
        original = records.Rows.write

        def interrupted(self: records.Rows, connection: object) -> object:
            original(self, connection)  # type: ignore[arg-type]
            raise KeyboardInterrupt

        monkeypatch.setattr(records.Rows, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            store.add([group("new", prompt=(Message("user", "other"),))])
        assert store.digest() == before


def test_splits_are_by_conversation_root_and_hold(tmp_path: Path) -> None:
    prompts = [(Message("user", f"question {i}"),) for i in range(400)]
    later = [(*p, Message("assistant", "yes"), Message("user", "more")) for p in prompts]
    with open_store(tmp_path / "s.db") as store:
        store.add([group("x", prompt=p) for p in [*prompts, *later]])
        test = {p.messages[0].content for p in store.prompts(split="test")}
        train = {p.messages[0].content for p in store.prompts(split="train")}
        assert not test & train
        assert len(test) + len(train) == 400
        assert 20 <= len(test) <= 60  # a tenth, by a fixed hash
        with pytest.raises(InputError, match="split"):
            store.prompts(split="tset")


def test_counting_the_prompts_of_splits_is_not_reading_them(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        store.add([group("x", prompt=(Message("user", f"q{i}"),)) for i in range(40)])
        store.add([group("x", prompt=(Message("user", "named"),))], split="extra")
        sizes = store.split_sizes()
        store.set_split({"train": 0.5, "test": 0.5})  # nothing has been read yet
        halves = store.split_sizes()
        assert halves == {name: len(store.prompts(split=name)) for name in ("train", "test", "extra")}
        assert sizes != halves
        assert sum(sizes.values()) == sum(halves.values()) == 41
        assert halves["extra"] == 1
        with pytest.raises(InputError, match="has been split before"):
            store.set_split({"train": 0.9, "test": 0.1})


def test_split_of_is_a_pure_function() -> None:
    root = split_root(ASK)
    assert root == split_root((*ASK, Message("assistant", "x"), Message("user", "y")))
    assert split_of(root, {"train": 0.9, "test": 0.1}) == split_of(root, {"train": 0.9, "test": 0.1})
    names = [split_of(str(i), {"a": 0.25, "b": 0.75}) for i in range(2000)]
    assert names.count("a") == pytest.approx(500, abs=70)


def test_a_named_split_wins(tmp_path: Path) -> None:
    with open_store(tmp_path / "s.db") as store:
        store.add([group("x", prompt=(Message("user", f"q{i}"),)) for i in range(9)], split="test")
        assert len(store.prompts(split="test")) == 9


def test_files_that_are_no_store(tmp_path: Path) -> None:
    text = tmp_path / "notes.db"
    text.write_text("these are my notes, and they are longer than a header of SQLite would be. " * 20)
    with pytest.raises(InputError, match=r"notes\.db"):
        open_store(text)
    assert "my notes" in text.read_text()
    other = tmp_path / "other.db"
    raw = sqlite3.connect(other)
    raw.execute("create table cats (name text)")
    raw.commit()
    raw.close()
    with pytest.raises(InputError, match="store"):
        open_store(other)
    with pytest.raises(InputError, match="no such"):
        open_store(tmp_path / "missing.db", create=False)


def test_bad_evidence_is_refused(tmp_path: Path) -> None:
    given = group("a", "b")
    one, two = (c.id for c in given.completions)
    bad = [
        Annotation("preference", (one, two), "ann", 2),
        Annotation("preference", (one,), "ann", 0),
        Annotation("ranking", (one, two), "ann", (1,)),
        Annotation("score", (one,), "ann", float("nan")),
        Annotation("label", (one,), "ann", "yes"),
        Annotation("score", (one,), "", 1.0),
    ]
    with open_store(tmp_path / "s.db") as store:
        for note in bad:
            with pytest.raises(InputError):
                store.add([given], [note])
        assert store.annotations() == []
