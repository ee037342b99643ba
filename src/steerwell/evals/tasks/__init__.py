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
    "reward_model": "a reward model on held-out pairs: accuracy by slice beside its ceiling, calibration, probes",
    "rewardbench": "RewardBench (arXiv:2403.13787) from its published file",
    "rewardbench2": "RewardBench 2 (arXiv:2506.01937) from its published file: best of 4, and ties",
    "rm_bench": "RM-Bench (arXiv:2410.16184) from its published file: substance against style",
    "ppe": "PPE (arXiv:2410.14872) from its published files: human preference, and correctness best of k",
}
BENCHMARKS = ("rewardbench", "rewardbench2", "rm_bench", "ppe")  # read a file of their own


def named(name: str) -> Callable[..., Task]:
    """The maker of a task that ships. Raises :class:`InputError` with the nearest name for any other."""
    if name not in NAMES:
        raise InputError(f"unknown task {name!r}", mend=nearest(name, NAMES))
    from steerwell.evals.tasks.over_refusal import over_refusal
    from steerwell.evals.tasks.pair_accuracy import pair_accuracy
    from steerwell.evals.tasks.ppe import ppe
    from steerwell.evals.tasks.reward_model import reward_model
    from steerwell.evals.tasks.rewardbench import rewardbench
    from steerwell.evals.tasks.rewardbench2 import rewardbench2
    from steerwell.evals.tasks.rm_bench import rm_bench
    from steerwell.evals.tasks.win_rate import win_rate

    makers: dict[str, Callable[..., Task]] = {
        "win_rate": win_rate,
        "over_refusal": over_refusal,
        "pair_accuracy": pair_accuracy,
        "reward_model": reward_model,
        "rewardbench": rewardbench,
        "rewardbench2": rewardbench2,
        "rm_bench": rm_bench,
        "ppe": ppe,
    }
    return makers[name]


def shipped_prompts(name: str) -> tuple[Prompt, ...]:
    """A prompt list that ships with the package: ``assistant``, ``borderline`` or ``harmful``."""
    text = (files("steerwell.evals.tasks") / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8")
    rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines() if line]
    return tuple(
        Prompt(as_messages(row["prompt"]), {"set": name, "category": row["category"]}) for row in rows
    )


__all__ = ["BENCHMARKS", "NAMES", "named", "shipped_prompts"]
