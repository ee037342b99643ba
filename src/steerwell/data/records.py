"""Rows and nouns: how prompts, completions and annotations become rows of a store and come back equal."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, Table, func, select
from sqlalchemy.dialects import postgresql, sqlite

from steerwell.data import schema
from steerwell.data.errors import InputError
from steerwell.data.evidence import as_value, check_annotation
from steerwell.data.messages import Message, Messages, canonical, chain
from steerwell.data.numbers import pack_floats, pack_ints, unpack
from steerwell.data.splits import split_root
from steerwell.data.types import Annotation, Completion, CompletionGroup, Prompt, Source

_CHUNK = 500  # ids in one query: below the limit of every SQLite


class Rows:
    """The rows of one call to ``add``, each once, in the order they came."""

    def __init__(self) -> None:
        self.messages: dict[str, dict[str, Any]] = {}
        self.prompts: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, dict[str, Any]] = {}
        self.completions: dict[str, dict[str, Any]] = {}
        self.annotations: dict[str, Annotation] = {}
        self.named: set[str] = set()

    def take(self, item: CompletionGroup | Prompt) -> None:
        prompt = item.messages if isinstance(item, Prompt) else item.prompt
        prompt_id = self._link(prompt, "")
        if prompt_id not in self.prompts:
            self.prompts[prompt_id] = {"id": prompt_id, "root": split_root(prompt), "meta": _meta(item.meta)}
        if isinstance(item, CompletionGroup):
            for completion in item.completions:
                if completion.prompt is not prompt and completion.prompt != prompt:
                    raise InputError(
                        f"a completion of the group {prompt[-1].content!r:.60} answers another prompt",
                        mend="Put completions of different prompts into different groups.",
                    )
                self._take_completion(completion, prompt_id)
            for annotation in item.annotations:
                self.take_annotation(annotation)

    def _link(self, messages: Messages, parent: str) -> str:
        for message, link in zip(messages, chain(messages, parent), strict=True):
            self.messages[link] = {
                "id": link,
                "parent": parent,
                "role": message.role,
                "content": message.content,
                "extra": message.extra,
            }
            parent = link
        return parent

    def _take_completion(self, completion: Completion, prompt_id: str) -> None:
        # The chain is hashed here anyway; fill the cached property instead of hashing the prompt once more.
        text_id = completion.__dict__.setdefault("text_id", self._link(completion.messages, prompt_id))
        ids, prompt_ids, logps = completion.token_ids, completion.prompt_token_ids, completion.old_logps
        if logps is not None and (ids is None or len(ids) != len(logps)):
            raise InputError(
                f"a completion has {len(logps)} old_logps for {len(ids or ())} token_ids",
                mend="Give one log-probability for each token.",
            )
        blob = None
        if prompt_ids is not None:
            data = pack_ints(prompt_ids)
            blob = hashlib.blake2b(data, digest_size=12).hexdigest()
            self.blobs[blob] = {"id": blob, "data": data}
        source = completion.source
        self.completions.setdefault(
            completion.id,
            {
                "id": completion.id,
                "prompt_id": prompt_id,
                "text_id": text_id,
                "kind": source.kind,
                "name": source.name,
                "revision": source.revision,
                "sampling": source.sampling,
                "seed": source.seed,
                "step": source.step,
                "sample": source.index,
                "token_ids": None if ids is None else pack_ints(ids),
                "prompt_token_ids": blob,
                "old_logps": None if logps is None else pack_floats(logps),
                "finished": completion.finished,
            },
        )

    def take_annotation(self, annotation: Annotation) -> None:
        if not isinstance(annotation, Annotation):
            raise InputError(
                f"annotations must be Annotation, got {type(annotation).__name__}",
                mend="Give what a judge returned.",
            )
        check_annotation(annotation)
        self.annotations.setdefault(annotation.id, annotation)
        self.named.update(annotation.completions)

    def write(self, connection: Connection) -> tuple[int, int, int]:
        """Insert what is new; how many prompts, completions and annotations that were."""
        _insert(connection, schema.messages, self.messages.values())
        _insert(connection, schema.blobs, self.blobs.values())
        prompts = _insert(connection, schema.prompts, self.prompts.values())
        completions = _insert(connection, schema.completions, self.completions.values())
        annotations = _insert(connection, schema.annotations, map(_annotation_row, self.annotations.values()))
        shown = (
            {"annotation_id": a.id, "position": k, "completion_id": c}
            for a in self.annotations.values()
            for k, c in enumerate(a.completions)
        )
        _insert(connection, schema.shown, shown)
        return prompts, completions, annotations


def _insert(connection: Connection, table: Table, rows: Iterable[Mapping[str, Any]]) -> int:
    """Insert the rows that are not there yet; how many. Exact because there is one writer at a time."""
    values = list(rows)
    if not values:
        return 0
    dialect = postgresql if connection.dialect.name == "postgresql" else sqlite
    before = connection.execute(select(func.count()).select_from(table)).scalar_one()
    connection.execute(dialect.insert(table).on_conflict_do_nothing(), values)
    return connection.execute(select(func.count()).select_from(table)).scalar_one() - before


def missing_ids(connection: Connection, table: Table, ids: Iterable[str]) -> set[str]:
    """The ids that a table does not have yet."""
    wanted = sorted(ids)
    missing = set(wanted)
    for start in range(0, len(wanted), _CHUNK):
        query = select(table.c.id).where(table.c.id.in_(wanted[start : start + _CHUNK]))
        missing.difference_update(connection.execute(query).scalars())
    return missing


def _meta(meta: Mapping[str, Any]) -> str:
    try:
        return canonical(dict(meta))
    except (TypeError, ValueError) as error:
        raise InputError(
            f"the meta of a prompt is not JSON ({error})", mend="Keep text, numbers, lists."
        ) from None


def _annotation_row(a: Annotation) -> dict[str, Any]:
    names = ("id", "kind", "annotator", "criterion", "strength", "rationale", "time", "seconds", "cost")
    value = list(a.value) if isinstance(a.value, tuple) else a.value
    return {n: getattr(a, n) for n in names} | {"value": canonical(value), "order_known": a.order_known}


def read_annotation(row: Any, about: Sequence[str]) -> Annotation:
    """An annotation from its row."""
    annotation = Annotation(
        kind=row.kind,
        completions=tuple(about),
        annotator=row.annotator,
        value=as_value(json.loads(row.value)),
        criterion=row.criterion,
        strength=row.strength,
        rationale=row.rationale,
        time=row.time,
        seconds=row.seconds,
        cost=row.cost,
        order_known=row.order_known,
    )
    annotation.__dict__["id"] = row.id  # fills the cached property: no hashing on reading
    return annotation


def read_completion(row: Any, conversations: Conversations, tokens: Mapping[str, tuple]) -> Completion:
    """A completion from its row."""
    completion = Completion(
        prompt=conversations.messages(row.prompt_id),
        messages=conversations.messages(row.text_id, row.prompt_id),
        source=Source(row.kind, row.name, row.revision, row.sampling, row.seed, row.step, row.sample),
        token_ids=None if row.token_ids is None else unpack(row.token_ids),
        prompt_token_ids=None if row.prompt_token_ids is None else tokens[row.prompt_token_ids],
        old_logps=None if row.old_logps is None else unpack(row.old_logps),
        finished=row.finished,
    )
    completion.__dict__.update(id=row.id, text_id=row.text_id)  # cached properties: no hashing on reading
    return completion


class Conversations:
    """Message lists by the id of their last message; equal prefixes share their Message objects."""

    def __init__(self, connection: Connection) -> None:
        rows = connection.execute(select(schema.messages))
        self._links = {i: (parent, Message(role, content, extra)) for i, parent, role, content, extra in rows}
        self._known: dict[tuple[str, str], Messages] = {}

    def messages(self, last: str, after: str = "") -> Messages:
        """The messages from behind ``after`` up to ``last``."""
        if (last, after) not in self._known:
            found, at = [], last
            while at != after:
                at, message = self._links[at]
                found.append(message)
            self._known[last, after] = tuple(reversed(found))
        return self._known[last, after]


__all__ = ["Conversations", "Rows", "missing_ids", "read_annotation", "read_completion"]
