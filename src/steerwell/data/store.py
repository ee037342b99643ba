"""The store: prompts, completions and annotations in one SQLite file (or a Postgres URL).

store = open_store("prefs.db")
store.add(load("preferences.jsonl"))          # all or nothing; adding it again adds nothing
for group in store.groups(split="train"): ...

Messages are stored once per link of their hash chain, evidence is only ever added (triggers refuse anything
else), and whatever was stored comes back equal: texts to the last space, token ids, log-probabilities.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, func, select
from sqlalchemy.exc import DBAPIError

from steerwell.data import schema
from steerwell.data.errors import InputError, nearest
from steerwell.data.messages import digest
from steerwell.data.numbers import unpack
from steerwell.data.records import Conversations, Rows, missing_ids, read_annotation, read_completion
from steerwell.data.splits import DEFAULT_SPLIT, split_of
from steerwell.data.types import Annotation, Completion, CompletionGroup, Prompt


@dataclass(frozen=True)
class AddReport:
    """How many rows were new. ``elsewhere``: prompts whose conversation already was in another split."""

    prompts: int = 0
    completions: int = 0
    annotations: int = 0
    elsewhere: int = 0

    def __str__(self) -> str:
        stays = f" ({self.elsewhere} prompts stay in the split they had)" if self.elsewhere else ""
        return (
            f"new: {self.prompts} prompts, {self.completions} completions, {self.annotations} annotations"
            + stays
        )


def open_store(url_or_path: str | Path, *, create: bool = True) -> Store:
    """Open a store, or make a new one. ``:memory:`` keeps it in memory; ``scheme://…`` is a database URL.

    Raises :class:`InputError` for a folder, a missing parent folder, a file that is not a steerwell store, a
    store of a newer version, and (with ``create=False``) for a missing file.
    """
    name = str(url_or_path)
    if "://" not in name and name != ":memory:":
        path = Path(url_or_path)
        if path.is_dir():
            raise InputError("this is a folder", file=name, mend="Give the file name of a store.")
        if not path.parent.is_dir():
            raise InputError(f"there is no folder {path.parent}", file=name, mend="Make it first.")
        if not create and not path.exists():
            raise InputError("no such store", file=name, mend="Make one: steerwell import FILE --to STORE.")
    engine = schema.connect(name)
    try:
        if "://" in name:
            name = engine.url.render_as_string()  # without the password, for messages
        schema.prepare(engine, name)
    except BaseException:
        engine.dispose()
        raise
    return Store(engine, name)


class Store:
    """Evidence about completions in a database. Made by :func:`open_store`; close it or use ``with``."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine, self.name = engine, name

    # ---- adding
    def add(
        self,
        groups: CompletionGroup | Prompt | Iterable[CompletionGroup | Prompt] = (),
        annotations: Annotation | Iterable[Annotation] = (),
        *,
        split: str | None = None,
    ) -> AddReport:
        """Add groups (with their ``.annotations``), prompts and further annotations, in one transaction.

        What is there already is left as it was: the first of two equal ids stays, and so does the first
        ``meta`` of a prompt. Targets (pairs, scores, labels) are not stored. With ``split`` the prompts go
        to that split by name instead of by hash, except those whose conversation already is in another one.

        Raises :class:`InputError`, and adds nothing, when an annotation is malformed or names a completion
        that is neither in the store nor among ``groups``.
        """
        items = [groups] if isinstance(groups, CompletionGroup | Prompt) else list(groups)
        extra = [annotations] if isinstance(annotations, Annotation) else list(annotations)
        rows = Rows()
        for item in items:
            if not isinstance(item, CompletionGroup | Prompt):
                raise InputError(
                    f"a store takes groups and prompts, got {type(item).__name__}",
                    mend="Make a Prompt(as_messages(text)), or load a file: steerwell.load(path).",
                )
            if not (item.messages if isinstance(item, Prompt) else item.prompt):
                raise InputError("a prompt has no message", mend="Give each prompt at least one message.")
            rows.take(item)
        for annotation in extra:
            rows.take_annotation(annotation)
        with self._transaction(write=True) as connection:
            elsewhere = self._place(connection, rows, split) if split is not None else 0
            unknown = missing_ids(connection, schema.completions, rows.named - rows.completions.keys())
            if unknown:
                about = next(a for a in rows.annotations.values() if unknown & {*a.completions})
                raise InputError(
                    f"an annotation by {about.annotator} is about the unknown completion {min(unknown)} "
                    f"({len(unknown)} unknown in all)",
                    file=self.name,
                    mend="Add the completions first, or in the same call.",
                )
            return AddReport(*rows.write(connection), elsewhere=elsewhere)

    def _place(self, connection: Connection, rows: Rows, split: str) -> int:
        """Send the roots of new prompts to a split by name; how many prompts stay in another one."""
        fractions, seed = self._split_settings(connection)
        assigned = connection.execute(select(schema.splits.c.root, schema.splits.c.name))
        named = {row.root: row.name for row in assigned}
        present = set(connection.execute(select(schema.prompts.c.root)).scalars())
        new, elsewhere = {}, 0
        for row in rows.prompts.values():
            root = row["root"]
            if root in named or root in present:
                elsewhere += named.get(root, split_of(root, fractions, seed)) != split
            else:
                new[root] = {"root": root, "name": split}
        if new:
            connection.execute(schema.splits.insert(), list(new.values()))
        return elsewhere

    # ---- splits
    def set_split(self, fractions: Mapping[str, float], *, seed: int = 0, force: bool = False) -> None:
        """Set the names and shares of the splits, ``{"train": 0.8, "test": 0.2}`` (default 0.9 and 0.1).

        A conversation's split is a pure function of its first user message (with the system message before
        it), the shares and the seed: it does not depend on what else is stored. Raises :class:`InputError`
        when a split of this store has been read before under other shares, unless ``force``: what was
        trained on would leak into the test split.
        """
        wrong = not fractions or any(not name or not share > 0 for name, share in fractions.items())
        if wrong or abs(sum(fractions.values()) - 1.0) > 1e-9:
            raise InputError(
                f"the shares of the splits must be positive and sum to 1, got {dict(fractions)}",
                mend='Write {"train": 0.9, "test": 0.1}.',
            )
        with self._transaction(write=True) as connection:
            old = self._split_settings(connection)
            same = (list(fractions.items()), seed) == (list(old[0].items()), old[1])
            if not same and not force and self._setting(connection, "split_read"):
                raise InputError(
                    f"this store has been split before: {old[0]}, seed {old[1]}",
                    file=self.name,
                    mend="Keep that split, or move prompts between splits knowingly with force=True.",
                )
            # A list keeps the order of the names, which the split depends on.
            self._set(connection, "split", json.dumps([list(fractions.items()), seed]))

    @property
    def split_names(self) -> list[str]:
        """The names that ``split=`` takes."""
        with self._transaction() as connection:
            return self._split_names(connection)

    def _split_names(self, connection: Connection) -> list[str]:
        explicit = connection.execute(select(schema.splits.c.name).distinct().order_by("name")).scalars()
        return list(dict.fromkeys([*self._split_settings(connection)[0], *explicit]))

    def _split_settings(self, connection: Connection) -> tuple[dict[str, float], int]:
        stored = self._setting(connection, "split")
        if stored is None:
            return DEFAULT_SPLIT, 0
        fractions, seed = json.loads(stored)
        return dict(fractions), seed

    def _setting(self, connection: Connection, key: str) -> str | None:
        return connection.execute(
            select(schema.settings.c.value).where(schema.settings.c.key == key)
        ).scalar()

    def _set(self, connection: Connection, key: str, value: str) -> None:
        connection.execute(schema.settings.delete().where(schema.settings.c.key == key))
        connection.execute(schema.settings.insert(), {"key": key, "value": value})

    def _chooser(self, connection: Connection, split: str | None) -> Callable[[str], bool]:
        """Whether a root is in the split asked for."""
        if split is None:
            return lambda root: True
        names = self._split_names(connection)
        if split not in names:
            raise InputError(f"no split {split!r} in this store", file=self.name, mend=nearest(split, names))
        fractions, seed = self._split_settings(connection)
        assigned = connection.execute(select(schema.splits.c.root, schema.splits.c.name))
        named = {row.root: row.name for row in assigned}
        return lambda root: named.get(root, split_of(root, fractions, seed)) == split

    def _note_split_read(self, split: str | None) -> None:
        if split is None:
            return
        with self._transaction() as connection:
            if self._setting(connection, "split_read"):
                return
        with self._transaction(write=True) as connection:
            self._set(connection, "split_read", "yes")

    # ---- reading
    def split_sizes(self) -> dict[str, int]:
        """How many prompts each split has. Counting them is not reading them: the split may still be set."""
        with self._transaction() as connection:
            fractions, seed = self._split_settings(connection)
            assigned = connection.execute(select(schema.splits.c.root, schema.splits.c.name))
            named = {row.root: row.name for row in assigned}
            sizes = dict.fromkeys(self._split_names(connection), 0)
            for root in connection.execute(select(schema.prompts.c.root)).scalars():
                sizes[named.get(root) or split_of(root, fractions, seed)] += 1
            return sizes

    def prompts(self, split: str | None = None) -> list[Prompt]:
        """All prompts (of one split), in the order they were added."""
        with self._transaction() as connection:
            found, conversations = self._prompts(connection, split), Conversations(connection)
            result = [Prompt(conversations.messages(i), meta) for i, meta in found.items()]
        self._note_split_read(split if result else None)
        return result

    def groups(self, split: str | None = None) -> list[CompletionGroup]:
        """A group for each prompt (of one split) with completions: all of them and all that was said.

        Order of adding throughout. An annotation about completions of several prompts is in each of their
        groups. There are no targets: ``resolve`` derives them.
        """
        c, s = schema.completions.c, schema.shown.c
        with self._transaction() as connection:
            prompts = self._prompts(connection, split)
            conversations = Conversations(connection)
            tokens = {row.id: unpack(row.data) for row in connection.execute(select(schema.blobs))}
            by_prompt: dict[str, list[Completion]] = defaultdict(list)
            prompt_of: dict[str, str] = {}
            for row in connection.execute(select(schema.completions).order_by(c.seq)):
                if row.prompt_id in prompts:
                    by_prompt[row.prompt_id].append(read_completion(row, conversations, tokens))
                    prompt_of[row.id] = row.prompt_id
            known = {a.id: a for a in self._annotations(connection)}
            evidence: dict[str, dict[str, Annotation]] = defaultdict(dict)
            query = (
                select(s.annotation_id, s.completion_id)
                .join(schema.annotations, schema.annotations.c.id == s.annotation_id)
                .order_by(schema.annotations.c.seq, s.position)
            )
            for annotation_id, completion_id in connection.execute(query):
                if completion_id in prompt_of:
                    evidence[prompt_of[completion_id]][annotation_id] = known[annotation_id]
            result = [
                CompletionGroup(
                    conversations.messages(i), tuple(by_prompt[i]), tuple(evidence[i].values()), meta=meta
                )
                for i, meta in prompts.items()
                if i in by_prompt
            ]
        self._note_split_read(split if result else None)
        return result

    def annotations(self) -> list[Annotation]:
        """All annotations in the order they were added."""
        with self._transaction() as connection:
            return self._annotations(connection)

    def _prompts(self, connection: Connection, split: str | None) -> dict[str, dict[str, Any]]:
        chosen = self._chooser(connection, split)
        rows = connection.execute(select(schema.prompts).order_by(schema.prompts.c.seq))
        return {row.id: json.loads(row.meta) for row in rows if chosen(row.root)}

    def _annotations(self, connection: Connection) -> list[Annotation]:
        s = schema.shown.c
        about: dict[str, list[str]] = defaultdict(list)
        query = select(s.annotation_id, s.completion_id).order_by(s.annotation_id, s.position)
        for annotation_id, completion_id in connection.execute(query):
            about[annotation_id].append(completion_id)
        rows = connection.execute(select(schema.annotations).order_by(schema.annotations.c.seq))
        return [read_annotation(row, about[row.id]) for row in rows]

    def __iter__(self) -> Iterator[CompletionGroup]:
        return iter(self.groups())

    def __len__(self) -> int:
        """Groups: prompts that have a completion."""
        with self._transaction() as connection:
            query = select(func.count(func.distinct(schema.completions.c.prompt_id)))
            return connection.execute(query).scalar_one()

    def __bool__(self) -> bool:
        return True

    def digest(self) -> str:
        """A hash of all that is stored (ids and the split), whatever order it was added in."""
        with self._transaction() as connection:
            parts: list[Any] = [self._split_settings(connection)]
            for table in (schema.prompts, schema.completions, schema.annotations):
                parts.append(sorted(connection.execute(select(table.c.id)).scalars()))
            parts.append(sorted(list(row) for row in connection.execute(select(schema.splits))))
            return digest(parts)

    # ---- housekeeping
    @contextmanager
    def _transaction(self, *, write: bool = False) -> Iterator[Connection]:
        """One transaction: committed at the end, rolled back by any exception, Ctrl-C included."""
        try:
            with self._engine.connect().execution_options(write=write) as connection, connection.begin():
                if write:
                    schema.lock_for_writing(connection)
                yield connection
        except DBAPIError as error:
            raise InputError(
                f"the store refused: {str(error.orig).splitlines()[0]}",
                file=self.name,
                mend="Nothing was changed. Is another program writing, the disk full, or the file read-only?",
            ) from error

    def close(self) -> None:
        """Close the database. A file store is then one file again (SQLite merges its ``-wal`` file)."""
        self._engine.dispose()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Store({self.name!r})"


__all__ = ["AddReport", "Store", "open_store"]
