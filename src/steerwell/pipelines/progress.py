"""Progress of long work, from any process to whoever shows it.

A progress is a callable ``(stage, done, total, note)``. Stages run in several processes, so a
:class:`Relay` carries the calls of child processes over a queue to the callable of the parent.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from multiprocessing.managers import SyncManager
from typing import Any

Progress = Callable[[str, int, int, str], None]


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    """Show nothing."""


class QueueProgress:
    """The child's end: sends each call over the queue (picklable)."""

    def __init__(self, queue: Any) -> None:
        self.queue = queue

    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None:
        self.queue.put((stage, done, total, note))


class Relay:
    """The parent's end: a thread that hands what children report to ``progress``. A context manager."""

    def __init__(self, manager: SyncManager, progress: Progress) -> None:
        self.queue = manager.Queue()
        self.child = QueueProgress(self.queue)
        self._progress = progress
        self._thread = threading.Thread(target=self._drain, daemon=True)

    def _drain(self) -> None:
        while (item := self.queue.get()) is not None:
            self._progress(*item)

    def __enter__(self) -> Relay:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.queue.put(None)
        except (OSError, EOFError):  # the manager has gone already, as after Ctrl-C
            return
        self._thread.join(timeout=5)


__all__ = ["Progress", "QueueProgress", "Relay", "silent"]
