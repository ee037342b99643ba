"""Figures by example, and the file they go to.

Every figure is a sum and a count over examples, so that a mean does not depend on how the examples were cut
into batches. ``metrics.jsonl`` has one JSON object a line.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


class Totals:
    """Running (sum, count) per name, kept as tensors; numbers are fetched once, in :meth:`means`."""

    def __init__(self) -> None:
        self._sums: dict[str, list[Tensor]] = {}
        self._counts: dict[str, int] = {}

    def add(self, name: str, values: Tensor) -> None:
        """Add one value per example (any shape; an empty tensor adds nothing)."""
        count = values.numel()
        if count:
            self._sums.setdefault(name, []).append(values.detach().double().sum())
            self._counts[name] = self._counts.get(name, 0) + count

    def state(self) -> dict[str, tuple[float, int]]:
        """(sum, count) per name, as plain numbers that can be sent to another process."""
        return {
            name: (torch.stack(parts).sum().item(), self._counts[name]) for name, parts in self._sums.items()
        }

    def merge(self, states: Sequence[Mapping[str, tuple[float, int]]]) -> None:
        """Be the sum of what several processes have, this one's own among them."""
        self._sums, self._counts = {}, {}
        for state in states:
            for name, (total, count) in state.items():
                self._sums.setdefault(name, []).append(torch.tensor(total, dtype=torch.float64))
                self._counts[name] = self._counts.get(name, 0) + count

    def means(self) -> dict[str, float]:
        """The mean per name over all examples, in the order of first use. One transfer for all of them."""
        if not self._sums:
            return {}
        each = [torch.stack(parts).sum() for parts in self._sums.values()]
        if len({value.device for value in each}) > 1:  # some came from other processes
            each = [value.cpu() for value in each]
        sums = torch.stack(each).tolist()
        return {
            name: total / max(1, self._counts[name]) for (name, total) in zip(self._sums, sums, strict=True)
        }


class Sink(Protocol):
    """A further place for figures; see :mod:`steerwell.train.sinks`."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Take the figures of a step; steps rise."""
        ...

    def close(self, *, done: bool) -> None:
        """The run has ended; ``done``: as it should."""
        ...


class MetricsFile:
    """``metrics.jsonl``: appended line by line; cut back to a known length when a run is continued.

    Of several processes the first alone ``writes``; the files of the others swallow what they are given.
    """

    def __init__(self, path: Path, length: int = 0, *, writes: bool = True) -> None:
        """Open ``path`` and drop everything behind byte ``length`` (lines that no checkpoint covers)."""
        if not writes:
            path, length = Path(os.devnull), 0
        self.sinks: list[Sink] = []  # that get every line too
        self._file = open(path, "ab")  # noqa: SIM115  (closed by close)
        if writes:
            self._file.truncate(length)
            self._file.seek(length)
        self._writes = writes

    def write(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line. Values that are not finite are written as null: JSON has no NaN."""
        line = {"step": step, **{name: _plain(value) for name, value in values.items()}}
        self._file.write((json.dumps(line) + "\n").encode())
        self._file.flush()
        if self.sinks:
            figures = finite(line)
            for sink in self.sinks:
                sink.write(step, figures)

    def sync(self) -> int:
        """Force what was written to disk; returns the length of the file in bytes."""
        self._file.flush()
        if self._writes:
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file; a second call does nothing."""
        self._file.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """All lines of a ``metrics.jsonl``."""
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines() if line]


def finite(line: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a line, without its step and without those that were not finite."""
    return {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value


__all__ = ["MetricsFile", "Sink", "Totals", "finite", "read_metrics"]
