"""The tasks that ship, one a file, and the look-up by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from steerwell.data.errors import InputError, nearest
from steerwell.data.messages import as_messages
from steerwell.data.types import Prompt
from steerwell.evals.measure import Task

NAMES = {
    "win_rate": "how often a judge prefers this policy's completion to the baseline's",
    "over_refusal": "refusals of benign prompts and compliance with harmful ones, always together",
    "pair_accuracy": "how often held-out preference pairs are ordered as people ordered them",
}


def named(name: str) -> Callable[..., Task]:
    """The maker of a task that ships. Raises :class:`InputError` with the nearest name for any other."""
    if name not in NAMES:
        raise InputError(f"unknown task {name!r}", mend=nearest(name, NAMES))
    from steerwell.evals.tasks.over_refusal import over_refusal
    from steerwell.evals.tasks.pair_accuracy import pair_accuracy
    from steerwell.evals.tasks.win_rate import win_rate

    makers: dict[str, Callable[..., Task]] = {
        "win_rate": win_rate,
        "over_refusal": over_refusal,
        "pair_accuracy": pair_accuracy,
    }
    return makers[name]


def shipped_prompts(name: str) -> tuple[Prompt, ...]:
    """A prompt list that ships with the package: ``assistant``, ``borderline`` or ``harmful``."""
    text = (files("steerwell.evals.tasks") / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line]
    return tuple(
        Prompt(as_messages(row["prompt"]), {"set": name, "category": row["category"]}) for row in rows
    )


__all__ = ["NAMES", "named", "shipped_prompts"]
