"""What ``steerwell eval --data`` means: which task reads which file or store."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerwell.cli import words
from steerwell.data.errors import InputError, nearest

if TYPE_CHECKING:
    from steerwell.data.types import CompletionGroup
    from steerwell.evals.measure import Task


def places(data: Iterable[str], tasks: Iterable[str]) -> dict[str, list[str]]:
    """Task → its files or stores, from words ``PATH`` or ``TASK=PATH``, repeated or with commas.

    A ``PATH`` alone is for every task that reads data and has none of its own. Only benchmarks take several.
    Raises :class:`InputError` for a task that reads no data or was not asked for, for data that no task
    reads, and for a task that reads data and has none.
    """
    from steerwell.evals.tasks import BENCHMARKS

    reading = ("pair_accuracy", "reward_model", *BENCHMARKS)
    wanted = [task for task in tasks if task in reading]
    own: dict[str, list[str]] = {}
    shared: list[str] = []
    for word in data:
        for part in [word] if Path(word).exists() else [p.strip() for p in word.split(",") if p.strip()]:
            name, equals, path = part.partition("=")
            if not equals or not name.isidentifier() or Path(part).exists():
                shared.append(part)
                continue
            if name not in reading:
                raise InputError(f"{name!r} is no task that reads data", mend=nearest(name, reading))
            if name not in wanted:
                raise InputError(
                    f"--data is given for {name}, which is not asked for", mend="Add it to --tasks."
                )
            own.setdefault(name, []).append(path)
    found = {task: own.get(task) or shared for task in wanted}
    for task, paths in found.items():
        if not paths:
            what = f"{task}=FILE, its published file" if task in BENCHMARKS else "STORE"
            raise InputError(f"{task} needs {_needs(task)}", mend=f"Add --data {what}.")
        if len(paths) > 1 and task not in BENCHMARKS:
            raise InputError(
                f"{task} reads one store or file, and {len(paths)} are given",
                mend="Write --data TASK=PATH for the files that belong to one task.",
            )
    if shared and all(task in own for task in wanted):
        raise InputError(f"no task reads {shared[0]!r}", mend="Add a task, or leave it out.")
    return found


def _needs(task: str) -> str:
    from steerwell.evals.tasks import BENCHMARKS

    return "its published file" if task in BENCHMARKS else "judged pairs"


def make_tasks(
    wanted: Iterable[str], found: dict[str, list[str]], split: str, limit: int | None
) -> list[str | Task]:
    """The tasks that read data, made from it; the others by name."""
    from steerwell.evals.tasks import BENCHMARKS, named

    made: list[str | Any] = []
    for task in wanted:
        if task in BENCHMARKS:
            if limit is not None:
                raise InputError(
                    f"--limit would leave out a part of {task}",
                    mend="Leave it out: a benchmark is one whole.",
                )
            made.append(named(task)(found[task]))
        elif task in found:
            made.append(named(task)(held_out(found[task][0], split, limit, scored=task == "reward_model")))
        else:
            made.append(task)
    return made


def held_out(data: str, split: str, limit: int | None, *, scored: bool = False) -> list[CompletionGroup]:
    """The judged pairs of a store (or a file, used whole); with ``scored`` groups that only have scores, too.

    Targets that the groups carry are kept, and pairs derived where there are none.
    """
    from steerwell.data import resolve
    from steerwell.evals.best_of_n import has_gold

    if words.is_store(data):
        with words.existing_store(data) as store:
            groups = store.groups(split=None if split == "all" else split)
    else:
        from steerwell.data.formats import load

        groups = list(load(data))
    if scored:
        derived = [(resolve.majority([group]) or [group])[0] for group in groups]
        found = [group for group in derived if group.pairs or has_gold(group)][:limit]
    else:
        found = [group for group in resolve.majority(groups) if group.pairs][:limit]
    if not found:
        raise InputError(
            f"there are no pairs in the split {split!r}", file=data, mend="Judge them, or --split all."
        )
    return found


__all__ = ["held_out", "make_tasks", "places"]
