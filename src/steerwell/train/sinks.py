"""TensorBoard and Weights & Biases as further places for a run's figures. ``metrics.jsonl`` stays the record.

A sink gets the figures and the settings of the run and nothing else: no code, no command line, no names of
machines. The packages are optional and loaded only when a run asks for them. A run that is continued has
every step once: what a sink lost, or knew too early, is made good from ``metrics.jsonl``.
"""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.train.metrics import Sink, finite

#: What each sink is loaded from, and the extra of this package that brings it.
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}


def check_sinks(names: Sequence[str]) -> None:
    """Raise :class:`InputError` for a sink whose package is not there, before a model is loaded."""
    for name in names:
        _module(name)


def open_sinks(
    names: Sequence[str], folder: Path, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]
) -> list[Sink]:
    """The sinks of a run whose ``run.json`` is ``record``; ``history``: the lines of its metrics so far."""
    return [_MAKERS[name](folder, record, history) for name in names]


class TensorBoard:
    """Event files in ``tensorboard/`` of the run's folder: ``tensorboard --logdir FOLDER``."""

    def __init__(self, folder: Path, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        place = folder / "tensorboard"
        shutil.rmtree(place, ignore_errors=True)  # written anew, so that no step is there twice
        self._writer = _module("tensorboard").SummaryWriter(log_dir=str(place), purge_step=0)
        settings = [f"    {name} = {value}" for name, value in record.get("identity", {}).items()]
        self._writer.add_text("settings", "\n".join(settings), 0)
        for line in history:
            self.write(line["step"], finite(line))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One scalar per figure."""
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self, *, done: bool) -> None:
        """Close the event file."""
        self._writer.close()


#: Settings of W&B under which it sends the figures and the settings of the run, and nothing of its own accord.
PRIVATE = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "host": "unnamed",
    "save_code": False,
    "x_disable_machine_info": True,
    "x_disable_meta": True,
    "x_disable_stats": True,
    "x_save_requirements": False,
}


class WeightsAndBiases:
    """A run of W&B. Offline, in ``wandb/`` of the run's folder (``wandb sync`` sends it), unless the user's
    environment says ``WANDB_MODE=online``; project and entity are those of the environment too.
    """

    def __init__(self, folder: Path, record: Mapping[str, Any], history: Sequence[Mapping[str, Any]]) -> None:
        wandb = _module("wandb")
        mode = os.environ.get("WANDB_MODE") or "offline"
        if mode == "offline":
            shutil.rmtree(folder / "wandb", ignore_errors=True)  # written anew, as nothing there can go on
        known = getattr(wandb.Settings, "model_fields", PRIVATE)
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "steerwell",
                name=folder.resolve().name,
                id=digest(record.get("identity_digest"), record.get("started"))[:16],
                dir=str(folder),
                config=dict(record.get("identity", {})),
                mode=mode,
                resume="allow" if mode == "online" else None,
                settings=wandb.Settings(**{name: value for name, value in PRIVATE.items() if name in known}),
            )
        except wandb.Error as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise InputError(
                f"wandb could not start ({reason})", mend="Log in, say WANDB_MODE=offline, or leave it out."
            ) from None
        self._next = int(self._run.step) if mode == "online" else 0  # what is there already is not sent again
        for line in history:
            self.write(line["step"], finite(line))

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """One line of history."""
        if step >= self._next:
            self._run.log(dict(figures), step=step)

    def close(self, *, done: bool) -> None:
        """End the run; one that did not end well is marked as failed."""
        self._run.finish(exit_code=0 if done else 1)


_MAKERS: dict[str, Any] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}


def _module(name: str) -> Any:
    if name == "wandb":  # its reports of its own errors go out even from offline runs
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    try:
        return importlib.import_module(MODULES[name])
    except ImportError:
        raise InputError(
            f"the sink {name!r} needs the package {name}",
            mend=f"Install it: pip install 'steerwell[{name}]'.",
        ) from None


__all__ = ["TensorBoard", "WeightsAndBiases", "check_sinks", "open_sinks"]
