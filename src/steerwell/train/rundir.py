"""The folder of a run: ``run.json``, ``metrics.jsonl``, ``checkpoints/``, ``model/``.

Who may write into it, and what it says about the run: settings, digests, versions, revision, seconds, status.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.train.ranks import ALONE, Ranks

RUN_FORMAT = "steerwell-run-1"
PACKAGES = ("steerwell", "torch", "transformers", "tokenizers", "peft", "safetensors", "numpy")


class TrainingError(RuntimeError):
    """A run that cannot go on (a loss that is not finite, a failed check). ``str(error)`` is one line."""


class RunDir:
    """One run's folder. ``identity`` is all that decides the numbers of the run, as a flat table.

    Of several processes the first alone writes; the others know the paths and the record.
    """

    def __init__(self, out: str | Path, ranks: Ranks = ALONE) -> None:
        """Make the folder and see that it can be written; raises :class:`InputError` if it can't or is
        alien.
        """
        self.ranks = ranks
        self.path = Path(out)
        self.metrics = self.path / "metrics.jsonl"
        self.checkpoints = self.path / "checkpoints"
        self.model = self.path / "model"
        self._lock: int | None = None
        self._made: list[Path] = []
        self._started = (time.monotonic(), time.process_time())
        self.record: dict[str, Any] = ranks.first(self._take) or {}
        self._before = (self.record.get("wall_seconds", 0.0), self.record.get("cpu_seconds", 0.0))

    def _take(self) -> dict[str, Any]:
        """Make the folder; what its ``run.json`` says."""
        if self.path.exists() and not self.path.is_dir():
            raise InputError("out is a file", file=self.path, mend="Give a folder.")
        try:
            missing = [folder for folder in (self.path, *self.path.parents) if not folder.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._made = missing
            probe = self.path / ".write-test"
            probe.write_text("")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"out cannot be written ({error.strerror})", file=self.path, mend="Give another folder."
            ) from None
        record = self._read()
        if not record and any(not file.name.startswith(".") for file in self.path.iterdir()):
            raise InputError(
                "out is not empty and holds no run", file=self.path, mend="Give a new or an empty folder."
            )
        return record

    def open(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> str:
        """Take the folder for this run. Returns "new", "resume" or "done".

        Raises :class:`InputError`, naming the settings that differ, when the folder holds another run, and
        when another process is writing to it.
        """
        return self.ranks.first(lambda: self._open(identity, about))

    def _open(self, identity: Mapping[str, Any], about: Mapping[str, Any]) -> str:
        self._take_lock()
        flat = flatten(identity)
        if self.record:
            there = self.record.get("identity", {})
            differing = [name for name in {**there, **flat} if there.get(name) != flat.get(name)]
            if differing:
                shown = "; ".join(
                    f"{n}: {_brief(there.get(n))} there, {_brief(flat.get(n))} here" for n in differing
                )
                raise InputError(
                    f"out holds another run ({shown})",
                    file=self.path,
                    mend="Give another out, set these back to continue that run, or delete the folder.",
                )
            if self.record.get("status") == "done" and self.model.exists():
                return "done"
            self.write(status="running")
            return "resume"
        self.record = {
            "format": RUN_FORMAT,
            "status": "running",
            "identity": flat,
            "identity_digest": digest(flat),
            **about,
            "versions": _versions(),
            "machine": {"python": platform.python_version(), "system": platform.platform()},
            "git_revision": _git_revision(),
            "started": _now(),
        }
        self.write()
        return "new"

    def write(self, **changes: Any) -> None:
        """Change ``run.json`` (written aside and renamed). Seconds add up over interrupted sittings."""
        if not self.ranks.writes:
            return
        wall, cpu = self._before
        self.record.update(changes)
        self.record["wall_seconds"] = round(wall + time.monotonic() - self._started[0], 3)
        self.record["cpu_seconds"] = round(cpu + time.process_time() - self._started[1], 3)
        self.record["updated"] = _now()
        aside = self.path / ".run.json.tmp"
        with open(aside, "w", encoding="utf-8") as file:
            file.write(json.dumps(self.record, indent=2, ensure_ascii=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, self.path / "run.json")

    def close(self) -> None:
        """Let other processes have the folder; a second call does nothing. Folders that were made here and
        that no run came into are taken away again.
        """
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None
        try:
            for folder in self._made:
                folder.rmdir()
        except OSError:  # there is a run in it
            pass
        self._made = []

    def _read(self) -> dict[str, Any]:
        file = self.path / "run.json"
        if not file.exists():
            return {}
        try:
            return json.loads(file.read_text("utf-8"))
        except ValueError:
            raise InputError("not JSON", file=file, mend="Give another out, or delete the folder.") from None

    def _take_lock(self) -> None:
        try:
            import fcntl
        except ImportError:  # no such locks on Windows
            return
        self._lock = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.close()
            raise InputError(
                "another process is training into out",
                file=self.path,
                mend="Wait for it, or give another out.",
            ) from None


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one table with dotted names, in a form that JSON gives back unchanged."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = json.loads(json.dumps(value))
    return flat


def _brief(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:37] + "…"


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _git_revision() -> str | None:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


__all__ = ["RunDir", "TrainingError", "flatten"]
