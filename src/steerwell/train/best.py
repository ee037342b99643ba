"""The best weights of a run: which figure says so, where they lie meanwhile, and when to stop.

A run with ``best_metric`` ends with the weights at which that figure was best, and with ``patience`` it stops
when the figure has not become better for so many measurements. Both are decided from the figures alone, and
their state travels with every checkpoint, so a run that was killed decides as one that was not.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from steerwell.data.errors import InputError, nearest
from steerwell.train.checkpoint import checkpoints, save_checkpoint
from steerwell.train.config import TrainConfig
from steerwell.train.ranks import ALONE, Ranks

#: Figures whose better direction is known, by their name without ``eval/`` or ``watch/``.
DIRECTIONS: dict[str, Literal["max", "min"]] = {
    "loss": "min",
    "rewards/accuracies": "max",
    "rewards/margins": "max",
    "accuracy": "max",
    "reward": "max",
    "win_rate": "max",
    "pair_accuracy": "max",
    "gold": "max",
}


def check_best(config: TrainConfig, *, evaluated: bool, watched: bool) -> None:
    """What can be said about these settings before a model is loaded; raises :class:`InputError`."""
    metric = config.best_metric
    if metric is None:
        for name in ("patience", "best_mode"):
            if getattr(config, name) is not None:
                raise InputError(
                    f"{name} is given without best_metric",
                    mend='Say, for example, best_metric = "eval/loss".',
                )
        return
    kind, _, rest = metric.partition("/")
    if kind not in ("eval", "watch") or not rest:
        raise InputError(
            f"best_metric = {metric!r} is no held-out figure",
            mend="Name a figure of eval/… (with eval_data) or of watch/… (with watch).",
        )
    if kind == "eval" and not evaluated:
        raise InputError(f"best_metric = {metric!r} is given without eval_data", mend="Give eval_data.")
    if kind == "watch" and not watched:
        raise InputError(f"best_metric = {metric!r} is given without watch", mend="Give watch=callable.")
    if kind == "eval" and config.patience is not None and config.eval_every is None:
        raise InputError(
            "patience is given, but nothing is measured between start and end", mend="Give eval_every."
        )
    if config.best_mode is None and direction(metric) is None:
        raise InputError(
            f"whether more of {metric!r} is better is not known", mend='Give best_mode = "max" or "min".'
        )


def direction(metric: str) -> Literal["max", "min"] | None:
    """Which way a figure is better: by its name, with or without the name of its term; None: not known."""
    name = metric.partition("/")[2]
    if name.startswith("loss/"):
        return "min"
    for known, way in DIRECTIONS.items():
        if name == known or name.endswith(f"/{known}"):
            return way
    return None


@dataclass
class Best:
    """The best measurement so far. ``folder`` holds the weights: one checkpoint per step that is needed."""

    folder: Path
    metric: str
    mode: Literal["max", "min"]
    patience: int | None = None
    value: float | None = None
    step: int | None = None
    since: int = 0  # measurements after the best one

    @classmethod
    def of(cls, config: TrainConfig, folder: Path) -> Best | None:
        """What the settings ask for, with nothing measured yet; None when they ask for the last weights."""
        if config.best_metric is None:
            return None
        mode = config.best_mode or direction(config.best_metric)
        assert mode is not None  # check_best
        return cls(folder, config.best_metric, mode, config.patience)

    def look(self, step: int, figures: Mapping[str, Any]) -> bool:
        """Take a measurement if there is one among the figures of ``step``; whether it is the best so far.

        A figure that is not finite is a measurement without improvement. An equal one is no improvement. Raises
        :class:`InputError` when the figure is not there at the very first measurement.
        """
        if self.metric not in figures:
            if step == 0:
                known = [name for name in figures if name.startswith(("eval/", "watch/"))]
                raise InputError(
                    f"best_metric = {self.metric!r} is not measured in this run",
                    mend=nearest(self.metric, known),
                )
            return False
        value = float(figures[self.metric])
        better = math.isfinite(value) and (
            self.value is None or (value > self.value if self.mode == "max" else value < self.value)
        )
        if better:
            self.value, self.step, self.since = value, step, 0
        else:
            self.since += 1
        return better

    @property
    def stops(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.since >= self.patience

    @property
    def path(self) -> Path | None:
        """Where the best weights lie; None while nothing was measured."""
        return None if self.step is None else self.folder / f"step-{self.step:06d}"

    def save(self, tensors: Mapping[str, Tensor], ranks: Ranks = ALONE) -> None:
        """Keep the weights of the best step (written aside and renamed). Raises :class:`OSError`."""
        assert self.step is not None
        about = {"metric": self.metric, "value": self.value, "metrics_bytes": 0}
        save_checkpoint(self.folder, self.step, {"model": tensors}, about, sys.maxsize, ranks)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {"value": self.value, "step": self.step, "since": self.since}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state`."""
        self.value, self.step, self.since = state["value"], state["step"], state["since"]

    def prune(self, kept: Path) -> None:
        """Delete the weights that neither this state nor a checkpoint in ``kept`` goes back to."""
        needed = {self.step}
        for path in checkpoints(kept):
            try:
                needed.add(json.loads((path / "state.json").read_text("utf-8"))["best"]["step"])
            except (OSError, ValueError, KeyError, TypeError):  # torn: it will be passed over
                continue
        for path in checkpoints(self.folder):
            if int(path.name.removeprefix("step-")) not in needed:
                shutil.rmtree(path)

    def about(self) -> dict[str, Any]:
        """What ``run.json`` says about it at the end."""
        if self.stops:
            why = f"not better in {self.since} measurements"
        else:
            why = "all steps done"
        return {
            "metric": self.metric,
            "mode": self.mode,
            "step": self.step,
            "value": self.value,
            "stopped": why,
        }


__all__ = ["DIRECTIONS", "Best", "check_best", "direction"]
