"""The reference: the frozen model that log-ratios are taken against, and what it once said, kept on disk.

A reference log-prob depends on the reference's weights, on the tokens of its group and on the temperature and
the number type it is computed in; on nothing else. So :class:`Kept` files it under these, and a second run on
the same data, with another learning rate, seed, batch size or folder, computes nothing again.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.models.load import weights_digest
from steerwell.models.render import TokenizedGroup

REFERENCE_NAMES = frozenset({"ref_logps", "ref_per_token_logps"})
#: Tensors that the reference itself is read for in every step; what it once said is not enough.
LIVE_NAMES = frozenset({"kl", "per_token_kl"})
#: What the shared file may grow to; then the references that were not used for longest are dropped.
LIMIT = 4 * 2**30
_AT_ONCE = 500


@dataclass(frozen=True)
class Reference:
    """The frozen model that log-ratios are taken against. With ``adapter_off`` it is the model in training
    with its adapter switched off; else ``model`` is one of its own. ``kind`` and ``digest`` go into
    ``run.json``; ``weights`` says which weights speak, adapters left out where they are off.
    """

    kind: str  # start | policy | none
    digest: str = ""
    model: Any = None
    adapter_off: bool = False
    weights: str = ""

    @contextmanager
    def active(self) -> Iterator[Any]:
        """The model, without gradient, while it is used as the reference."""
        off = self.model.disable_adapter() if self.adapter_off else nullcontext()
        with torch.no_grad(), off:
            yield self.model


def base_digest(model: torch.nn.Module) -> str:
    """The digest of a model's weights without its adapters, under the names that the plain model has."""
    if not hasattr(model, "peft_config"):
        return weights_digest(model)
    return weights_digest(
        {
            name.removeprefix("base_model.model.").replace(".base_layer", ""): value
            for name, value in model.state_dict().items()
            if "lora_" not in name
        }
    )


def reference_key(weights: str, temperature: float, dtype: Any) -> str:
    """What decides a reference log-prob besides the tokens."""
    return digest("reference-1", weights, float(temperature), str(dtype))


def group_key(group: TokenizedGroup) -> bytes:
    """A hash of a group's token ids and of which of them are scored."""
    state = hashlib.blake2b(digest_size=16)
    for sequence in group.sequences:
        head = [len(sequence.ids), sequence.n_prompt, len(sequence.unscored)]
        state.update(array("q", [*head, *(i for span in sequence.unscored for i in span)]).tobytes())
        state.update(array("i", sequence.ids).tobytes())
    return state.digest()


class Kept:
    """Reference log-probs in one SQLite file, each with a checksum: what is torn is as if it were not there.

    Several processes may use the file at once. Nothing here stops a run: a file that cannot be read is set
    aside under ``NAME.broken`` and a new one begun, and one that cannot be written is done without;
    ``trouble`` says so in a sentence.
    """

    def __init__(self, path: str | Path, limit: int = LIMIT) -> None:
        self.path = Path(path).expanduser()
        self.limit = limit
        self.trouble = ""

    def get(self, reference: str, groups: Sequence[bytes]) -> dict[bytes, list[float]]:
        """The log-probs of all scored tokens of each group that is known for this reference."""
        if not self.path.exists():
            return {}
        try:
            return self._get(reference, groups)
        except sqlite3.Error as error:
            self._set_aside(error)
            return {}

    def put(self, reference: str, values: Mapping[bytes, Sequence[float]], *, more: bool = False) -> None:
        """Keep log-probs by group (in fp32, as they were computed). ``more`` will follow: the file's limit waits
        for the last.
        """
        if not values:
            return
        try:
            self._put(reference, values, more)
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):  # a full disk, a lock, a folder without rights
                self.trouble = f"reference log-probs were not kept in {self.path} ({error})"
                return
            self._set_aside(error)
            try:
                self._put(reference, values, more)
            except sqlite3.Error:
                return
        except OSError as error:
            self.trouble = f"reference log-probs were not kept in {self.path} ({error.strerror})"

    def _get(self, reference: str, groups: Sequence[bytes]) -> dict[bytes, list[float]]:
        found: dict[bytes, list[float]] = {}
        with closing(self._open()) as file:
            for start in range(0, len(groups), _AT_ONCE):
                part = groups[start : start + _AT_ONCE]
                marks = ",".join("?" * len(part))
                query = f"SELECT key, logps, checksum FROM logps WHERE reference = ? AND key IN ({marks})"
                for key, blob, checksum in file.execute(query, (reference, *part)):
                    if checksum == _checksum(key, blob):
                        values = array("f")
                        values.frombytes(blob)
                        found[key] = values.tolist()
            with file:
                file.execute("UPDATE used SET at = ? WHERE reference = ?", (time.time(), reference))
        return found

    def _put(self, reference: str, values: Mapping[bytes, Sequence[float]], more: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with closing(self._open()) as file, file:
            file.execute("INSERT OR REPLACE INTO used VALUES (?, ?)", (reference, time.time()))
            file.executemany("INSERT OR REPLACE INTO logps VALUES (?, ?, ?, ?)", _rows(reference, values))
            if not more:
                self._make_room(file, reference)

    def _make_room(self, file: sqlite3.Connection, current: str) -> None:
        total = file.execute("SELECT coalesce(sum(length(logps)), 0) FROM logps").fetchone()[0]
        if total <= self.limit:
            return
        for (old,) in file.execute(
            "SELECT reference FROM used WHERE reference != ? ORDER BY at", (current,)
        ).fetchall():
            total -= file.execute(
                "SELECT coalesce(sum(length(logps)), 0) FROM logps WHERE reference = ?", (old,)
            ).fetchone()[0]
            file.execute("DELETE FROM logps WHERE reference = ?", (old,))
            file.execute("DELETE FROM used WHERE reference = ?", (old,))
            if total <= self.limit:
                return

    def _open(self) -> sqlite3.Connection:
        file = sqlite3.connect(self.path, timeout=30)
        file.execute(
            "CREATE TABLE IF NOT EXISTS logps (reference TEXT, key BLOB, logps BLOB, checksum BLOB, "
            "PRIMARY KEY (reference, key)) WITHOUT ROWID"
        )
        file.execute("CREATE TABLE IF NOT EXISTS used (reference TEXT PRIMARY KEY, at REAL)")
        return file

    def _set_aside(self, error: Exception) -> None:
        self.trouble = f"{self.path} could not be read ({error}): set aside, computed again"
        with suppress(OSError):
            os.replace(self.path, self.path.with_name(self.path.name + ".broken"))


def _rows(
    reference: str, values: Mapping[bytes, Sequence[float]]
) -> Iterable[tuple[str, bytes, bytes, bytes]]:
    for key, logps in values.items():
        blob = array("f", logps).tobytes()
        yield reference, key, blob, _checksum(key, blob)


def _checksum(key: bytes, blob: bytes) -> bytes:
    return hashlib.blake2b(key + blob, digest_size=8).digest()


def cache_path(setting: str) -> Path | None:
    """The shared file that ``reference_cache`` names: a path, "auto" (STEERWELL_CACHE or the user's cache
    folder), or None for "off".
    """
    if setting == "off":
        return None
    if setting != "auto":
        path = Path(setting).expanduser()
        if path.is_dir():
            raise InputError("reference_cache is a folder", file=path, mend="Give a file, or off.")
        return path
    folder = os.environ.get("STEERWELL_CACHE")
    if folder:
        return Path(folder).expanduser() / "reference.db"
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "steerwell" / "reference.db"


__all__ = [
    "REFERENCE_NAMES",
    "Kept",
    "Reference",
    "base_digest",
    "cache_path",
    "group_key",
    "reference_key",
]
