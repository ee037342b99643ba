"""Tokenised groups in a file: a process's memory does not grow with its data set.

A process keeps where each item begins and how many tokens it has (16 bytes an item, 24 with a reference); the rest
lies in a file without a name, which the system takes away with the process, however that ends. Items are read
when they are asked for, each time as new objects: what is changed in one is not kept, apart from the log-probs of
the reference, which :meth:`ItemFile.keep_reference` writes. Of the group itself only the prompt's id is there.

The file is read by ``pread``, not mapped: pages of a mapped file would count as this process's memory.
"""

from __future__ import annotations

import json
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from struct import Struct
from typing import overload

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.render import Sequence as TokenSequence
from steerwell.models.render import TokenizedGroup
from steerwell.train.items import Item

WRITE_AT_ONCE = 1 << 20
NOT_YET = -1
FINISHED = (False, True, None)
# size, then how many there are of: sequences, lengths, pairs, pair_probs, labels, rewards, demonstrations, old
# log-probs, advantages, finished, bytes of the prompt's id, of the names of further targets, numbers of 4 bytes
_HEAD = Struct("=14i")
_REFERENCE = Struct("=2i")  # sums by completion, values by token


class ItemFile(Sequence[Item]):
    """Items in a file without a name in ``folder``, or in the system's folder for such files where that one takes
    none. Raises :class:`InputError` where the disk has no room for them.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._file, self.place = _nameless(folder)
        self._close = weakref.finalize(self, os.close, self._file)
        self._waiting = bytearray()  # taken, but not in the file yet
        self._end = 0  # of the file
        self._starts, self._bytes, self._references = array("q"), array("i"), array("q")
        self.sizes = array("i")  # of each item: tokens that the model reads for it

    def append(self, item: Item) -> None:
        """Put an item at the end."""
        record = _packed(item)
        self._starts.append(self._write(record))
        self._bytes.append(len(record))
        self.sizes.append(item.size)
        if item.ref_logps:
            self.keep_reference(len(self) - 1, item)

    def keep_reference(self, i: int, item: Item) -> None:
        """Give item ``i`` the log-probs of the reference that ``item`` has."""
        self._references.extend([NOT_YET] * (len(self) - len(self._references)))
        values = array("d", [*item.ref_logps, *item.ref_per_token_logps]).tobytes()
        head = _REFERENCE.pack(len(item.ref_logps), len(item.ref_per_token_logps))
        self._references[i] = self._write(head + values)

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, i: int) -> Item: ...

    @overload
    def __getitem__(self, i: slice) -> list[Item]: ...

    def __getitem__(self, i: int | slice) -> Item | list[Item]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        start, i = self._starts[i], i % len(self)
        if self._waiting:
            self._flush()
        item = _unpacked(self._read(start, self._bytes[i]))
        if i < len(self._references) and self._references[i] != NOT_YET:
            start = self._references[i]
            sums, tokens = _REFERENCE.unpack(self._read(start, _REFERENCE.size))
            values = array("d", self._read(start + _REFERENCE.size, 8 * (sums + tokens))).tolist()
            item.ref_logps, item.ref_per_token_logps = values[:sums], values[sums:]
        return item

    def __iter__(self) -> Iterator[Item]:
        return (self[i] for i in range(len(self)))

    def _write(self, record: bytes) -> int:
        start = self._end + len(self._waiting)
        self._waiting += record
        if len(self._waiting) >= WRITE_AT_ONCE:
            self._flush()
        return start

    def _flush(self) -> None:
        whole, written = bytes(self._waiting), 0
        try:
            while written < len(whole):
                written += os.pwrite(self._file, whole[written:], self._end + written)
        except OSError as error:
            raise InputError(
                f"the tokenised data could not be written ({error.strerror})",
                file=self.place,
                mend="Make room on this disk, or give an out on another one.",
            ) from error
        self._end += len(whole)
        self._waiting.clear()

    def _read(self, start: int, length: int) -> bytes:
        found = os.pread(self._file, length, start)
        while len(found) < length:
            more = os.pread(self._file, length - len(found), start + len(found))
            if not more:
                raise EOFError(f"the file of the tokenised data in {self.place} has become shorter")
            found += more
        return found


class Chosen(Sequence[Item]):
    """Items at ``places`` of one sequence, and after them all of another; nothing is copied."""

    def __init__(self, items: Sequence[Item], places: Sequence[int], rest: Sequence[Item] = ()) -> None:
        self._items, self._places, self._rest = items, places, rest

    def __len__(self) -> int:
        return len(self._places) + len(self._rest)

    @overload
    def __getitem__(self, i: int) -> Item: ...

    @overload
    def __getitem__(self, i: slice) -> list[Item]: ...

    def __getitem__(self, i: int | slice) -> Item | list[Item]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        items, place = self._at(i)
        return items[place]

    def keep_reference(self, i: int, item: Item) -> None:
        """As :meth:`ItemFile.keep_reference`, where the item came from."""
        items, place = self._at(i)
        keep_reference(items, place, item)

    def _at(self, i: int) -> tuple[Sequence[Item], int]:
        if not 0 <= i < len(self):
            raise IndexError(i)
        n = len(self._places)
        return (self._items, self._places[i]) if i < n else (self._rest, i - n)


def keep_reference(items: Sequence[Item], i: int, item: Item) -> None:
    """Give item ``i`` of ``items`` the log-probs of the reference that ``item`` has. A list has kept them already."""
    if isinstance(items, ItemFile | Chosen):
        items.keep_reference(i, item)


def sizes(items: Sequence[Item]) -> Sequence[int]:
    """Tokens that the model reads for each item."""
    return items.sizes if isinstance(items, ItemFile) else [item.size for item in items]


def _nameless(folder: Path | None) -> tuple[int, Path]:
    """A new file that has no name any more, and the folder it is in."""
    for place in (folder, Path(tempfile.gettempdir())):
        if place is not None:
            with suppress(OSError):
                file, name = tempfile.mkstemp(prefix=".items-", dir=place)
                os.unlink(name)
                return file, place
    raise InputError(
        "no file can be made for the tokenised data",
        file=tempfile.gettempdir(),
        mend="Give an out that can be written.",
    )


def _packed(item: Item) -> bytes:
    """All of an item but the reference's log-probs. Prompt tokens that sequences share are written once."""
    sequences, truncated = item.tokens.sequences, item.tokens.truncated
    numbers: list[int] = [*item.lengths, *item.labels, *item.demonstrations]
    numbers += [FINISHED.index(end) for end in item.finished]
    for pair in item.pairs:
        numbers += pair
    words: list[int] = []
    prompt: list[int] | None = None
    for sequence, cut in zip(sequences, truncated, strict=True):
        n, ids = sequence.n_prompt, sequence.ids
        shared = prompt is not None and ids[:n] == prompt
        numbers += (len(ids), n, cut, shared, len(sequence.unscored))
        for span in sequence.unscored:
            numbers += span
        words += ids[n:] if shared else ids
        prompt = ids[:n] if prompt is None else prompt
    prompt_id = item.prompt_id.encode()
    names = (
        json.dumps({name: len(values) for name, values in item.extra.items()}).encode() if item.extra else b""
    )
    ints = array("i", numbers)
    ints.extend(words)
    head = _HEAD.pack(
        item.size,
        len(sequences),
        len(item.lengths),
        len(item.pairs),
        len(item.pair_probs),
        len(item.labels),
        len(item.rewards),
        len(item.demonstrations),
        len(item.old_per_token_logps),
        len(item.advantages),
        len(item.finished),
        len(prompt_id),
        len(names),
        len(ints),
    )
    floats = array("d", [*item.pair_probs, *item.rewards, *item.old_per_token_logps, *item.advantages])
    for values in item.extra.values():
        floats.extend(values)
    return b"".join((head, prompt_id, names, ints.tobytes(), floats.tobytes()))


def _unpacked(record: bytes) -> Item:
    """What :func:`_packed` made bytes of."""
    (
        size,
        sequences,
        lengths,
        pairs,
        probs,
        labels,
        rewards,
        demos,
        old,
        advantages,
        finished,
        id_bytes,
        name_bytes,
        ints,
    ) = _HEAD.unpack_from(record)
    at = _HEAD.size + id_bytes
    prompt_id = record[_HEAD.size : at].decode()
    names = json.loads(record[at : at + name_bytes]) if name_bytes else {}
    at += name_bytes
    numbers = array("i", record[at : at + 4 * ints]).tolist()
    floats = iter(array("d", record[at + 4 * ints :]))
    rest = iter(numbers)
    item = Item(
        tokens=TokenizedGroup([], _named(prompt_id), []),
        prompt_id=prompt_id,
        size=size,
        lengths=list(islice(rest, lengths)),
        labels=[bool(x) for x in islice(rest, labels)],
        demonstrations=[bool(x) for x in islice(rest, demos)],
        finished=[FINISHED[x] for x in islice(rest, finished)],
        pairs=[(next(rest), next(rest)) for _ in range(pairs)],
        pair_probs=list(islice(floats, probs)),
        rewards=list(islice(floats, rewards)),
        old_per_token_logps=list(islice(floats, old)),
        advantages=list(islice(floats, advantages)),
        extra={name: list(islice(floats, n)) for name, n in names.items()},
    )
    shapes: list[tuple[int, int, int, tuple[tuple[int, int], ...]]] = []
    for _ in range(sequences):
        n_ids, n, cut, shared, spans = islice(rest, 5)
        item.tokens.truncated.append(bool(cut))
        shapes.append((n_ids, n, shared, tuple((next(rest), next(rest)) for _ in range(spans))))
    at = ints - sum(n_ids - n * shared for n_ids, n, shared, _ in shapes)
    prompt: list[int] | None = None
    for n_ids, n, shared, unscored in shapes:
        end = at + n_ids - n * shared
        ids = numbers[at:end] if not shared or prompt is None else prompt + numbers[at:end]
        prompt = ids[:n] if prompt is None else prompt
        item.tokens.sequences.append(TokenSequence(ids, n, unscored))
        at = end
    return item


def _named(prompt_id: str) -> CompletionGroup:
    """A group of which nothing is left but the id of its prompt."""
    group = CompletionGroup(())
    group.__dict__["prompt_id"] = prompt_id  # fills the cached property
    return group


__all__ = ["Chosen", "ItemFile", "keep_reference", "sizes"]
