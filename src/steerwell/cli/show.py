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
    """A bar on standard error: ``step(done, total, note="")``. No terminal: a line every 10 s."""
    if silent() or not sys.stderr.isatty():
        yield _lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bars:
        bar = bars.add_task(title, total=None, note="")
        yield lambda done, total, note="": bars.update(bar, completed=done, total=total, note=note)


def _lines(title: str) -> Callable[..., None]:
    last = time.monotonic()

    def step(done: int, total: int, text: str = "") -> None:
        nonlocal last
        if time.monotonic() - last >= 10:
            last = time.monotonic()
            note(f"{title}: {done} of {total} {text}".rstrip())

    return step


@contextmanager
def stages() -> Iterator[Callable[[str, int, int, str], None]]:
    """Bars on standard error, one per stage: ``step(stage, done, total, note)``, from any thread.

    Where that is no terminal: a line when a stage begins and when it ends.
    """
    if silent() or not sys.stderr.isatty():
        yield _stage_lines()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=Console(stderr=True)) as bars:
        known: dict[str, TaskID] = {}

        def step(stage: str, done: int, total: int, text: str = "") -> None:
            if stage not in known:
                known[stage] = bars.add_task(stage, total=total, note=text)
            bars.update(known[stage], completed=done, total=total, note=text)

        yield step


def _stage_lines() -> Callable[[str, int, int, str], None]:
    begun: set[str] = set()
    ended: set[str] = set()

    def step(stage: str, done: int, total: int, text: str = "") -> None:
        if done >= total and stage not in ended:
            ended.add(stage)
            note(f"{stage}: done {text}".rstrip())
        elif stage not in begun and done < total:
            begun.add(stage)
            note(f"{stage} …")

    return step


def counted(number: int, one: str, many: str = "") -> str:
    """``1 pair``, ``2 pairs``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


__all__ = ["AsJson", "counted", "note", "progress", "result", "stages"]
