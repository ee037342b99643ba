"""Checkpoints that survive a kill at any moment: written aside, flushed, digested, renamed, then verified.

A checkpoint is a folder ``checkpoints/step-000120`` with ``model.safetensors`` (trainable parameters),
``optimizer.safetensors`` (moments), ``state.json`` (step, counters, length of the metrics file) and
``manifest.json`` (the digest of each of these). No pickles. There is no random state to keep: data order,
sampling and dropout are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerwell.models.directory import disk_errors

MANIFEST = "manifest.json"


def save_checkpoint(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int
) -> Path:
    """Write ``folder/step-N`` and delete all but the ``keep`` newest ones.

    ``tensors`` maps a file stem to named tensors. Raises :class:`OSError` (a full disk) and leaves the
    earlier checkpoints as they were.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    aside = folder / f".step-{step:06d}.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    try:
        for stem, named in tensors.items():
            with disk_errors():
                save_file(
                    {k: v.detach().contiguous() for k, v in named.items()}, aside / f"{stem}.safetensors"
                )
        (aside / "state.json").write_text(json.dumps({"step": step, **state}), "utf-8")
        digests = {file.name: _digest(file) for file in sorted(aside.iterdir())}
        (aside / MANIFEST).write_text(json.dumps(digests), "utf-8")
        for file in aside.iterdir():
            _flush(file)
        _flush(aside)
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        _flush(folder)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return final


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first (not verified)."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(folder: Path, metrics: Path) -> tuple[Path, dict[str, Any], list[Path]] | None:
    """The newest checkpoint whose digests hold, its state, and the torn ones that were passed over.

    A checkpoint also needs the part of the metrics file that was written before it.
    """
    torn: list[Path] = []
    for path in reversed(checkpoints(folder)):
        state = _verified(path)
        if (
            state is not None
            and (metrics.stat().st_size if metrics.exists() else 0) >= state["metrics_bytes"]
        ):
            return path, state, torn
        torn.append(path)
    return None


def load_tensors(path: Path, stem: str, device: torch.device) -> dict[str, Tensor]:
    """The named tensors of one file of a checkpoint."""
    return load_file(path / f"{stem}.safetensors", device=str(device))


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """The moments of an optimizer by parameter name: ``exp_avg/NAME`` and so on."""
    return {
        f"{key}/{names[parameter]}": value
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
        if isinstance(value, Tensor)
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Put the moments of :func:`optimizer_tensors` back, as they were, on the devices they were on."""
    by_name = {name: parameter for parameter, name in names.items()}
    for key, value in tensors.items():
        kind, name = key.split("/", 1)
        optimizer.state[by_name[name]][kind] = value


def _verified(path: Path) -> dict[str, Any] | None:
    try:
        digests = json.loads((path / MANIFEST).read_text("utf-8"))
        if any(_digest(path / name) != value for name, value in digests.items()):
            return None
        return json.loads((path / "state.json").read_text("utf-8"))
    except (OSError, ValueError, AttributeError):
        return None


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "blake2b").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


__all__ = [
    "checkpoints",
    "latest_checkpoint",
    "load_tensors",
    "optimizer_tensors",
    "restore_optimizer",
    "save_checkpoint",
]
