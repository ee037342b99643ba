"""What a command shows: its result on standard output, everything else on standard error."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated, Any

import typer

from steerwell.cli.app import silent

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on standard output.")]
Step = Callable[[int, int], None]


def result(value: Mapping[str, Any], as_json: bool, text: str | Callable[[], str]) -> None:
    """Print the result of a command: as one JSON object, or as text for people."""
    if silent():
        return
    if as_json:
        print(json.dumps(_plain(value), ensure_ascii=False, indent=1, default=str, allow_nan=False))
    else:
        print(text if isinstance(text, str) else text())


def _plain(value: Any) -> Any:
    """The value with numbers that JSON does not know (infinite, not a number) as null: nothing was measured."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def note(line: str) -> None:
    """A line for people, on standard error."""
    if not silent():
        print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str) -> Iterator[Callable[..., None]]:
    """One bar on standard error: ``step(done, total, note="")``. Where that is no terminal: see :func:`stages`,
    without a line for the beginning and the end.
    """
    with stages(ends=False) as step:
        yield lambda done, total, note="": step(title, done, total, note)


@contextmanager
def stages(*, ends: bool = True) -> Iterator[Callable[[str, int, int, str], None]]:
    """Bars on standard error, one per stage: ``step(stage, done, total, note)``, from any thread, with the time
    left (and, when a stage is done, the time it took).

    Where that is no terminal: a line when a stage begins (``ends``) and when it ends, and one now
    and then between, the rarer the longer it takes.
    """
    if silent():
        yield lambda *told: None
        return
    if not sys.stderr.isatty():
        yield _Lines(ends)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

    left = TimeRemainingColumn(compact=True, elapsed_when_finished=True)
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), left)
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bars:
        known: dict[str, TaskID] = {}

        def step(stage: str, done: int, total: int, text: str = "") -> None:
            if (
                stage not in known
            ):  # where a stage is continued, what was done before says nothing of its speed
                known[stage] = bars.add_task(stage, total=total, completed=done, note=text)
            bars.update(known[stage], completed=done, total=total, note=text)

        yield step


EVERY = 10.0  # seconds between two lines of a stage, at least
SHARE = 0.1  # of the time since its beginning: a day has fewer than a hundred lines


class _Lines:
    """Progress in plain lines, few of them."""

    def __init__(self, ends: bool) -> None:
        self.ends = ends
        self.begun: dict[str, tuple[float, int]] = {}  # when a stage began, and what had been done by then
        self.ended: set[str] = set()
        self.last = time.monotonic()

    def __call__(self, stage: str, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if stage not in self.begun:
            self.begun[stage] = now, done
            if self.ends and done < total:
                note(f"{stage} …" + (f" {done} of {total} {text}".rstrip() if done else ""))
        elif done < total and now - self.last >= max(EVERY, SHARE * (now - self.begun[stage][0])):
            note(f"{stage}: {done} of {total}{self._left(stage, done, total, now)}  {text}".rstrip())
            self.last = now
        if self.ends and done >= total and stage not in self.ended:
            self.ended.add(stage)
            note(f"{stage}: done {text}".rstrip())

    def _left(self, stage: str, done: int, total: int, now: float) -> str:
        began, before = self.begun[stage]
        if done <= before or now <= began:
            return ""
        return f", {clock((total - done) * (now - began) / (done - before))} left"


def clock(seconds: float) -> str:
    """``0:42``, ``3:05``, ``2:14:00``: hours, minutes, seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def counted(number: int, one: str, many: str = "") -> str:
    """``1 pair``, ``2 pairs``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


__all__ = ["AsJson", "clock", "counted", "note", "progress", "result", "stages"]
