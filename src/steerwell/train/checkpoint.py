"""Checkpoints that survive a kill at any moment: written aside, flushed, digested, renamed, then verified.

A checkpoint is a folder ``checkpoints/step-000120`` with ``model.safetensors`` (trainable parameters),
``optimizer.safetensors`` (moments), ``state.json`` (step, counters, length of the metrics file) and
``manifest.json`` (the digest of each of these). Of several processes each writes its part of the tensors to
``parts/``, and any number of processes can read them. No pickles. There is no random state to keep: data
order, sampling and dropout are functions of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_parts
from torch.distributed.checkpoint.state_dict_saver import save as save_parts

from steerwell.models.sharding import spread_like
from steerwell.train.ranks import ALONE, Ranks

MANIFEST, PARTS = "manifest.json", "parts"


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Mapping[str, Tensor]],
    state: Mapping[str, Any],
    keep: int,
    ranks: Ranks = ALONE,
) -> Path:
    """Write ``folder/step-N`` and delete all but the ``keep`` newest ones.

    ``tensors`` maps a file stem to named tensors. Of several processes each writes its parts, to a file system
    that all of them see. Raises :class:`OSError` (a full disk) and leaves the earlier checkpoints as they were.
    """
    final = folder / f"step-{step:06d}"
    aside = folder / f".step-{step:06d}.tmp"
    try:
        ranks.first(lambda: _begin(aside))
        if ranks.alone:
            for stem, named in tensors.items():
                save_file(
                    {k: v.detach().contiguous() for k, v in named.items()}, aside / f"{stem}.safetensors"
                )
        else:
            ranks.together(lambda: _save_parts(aside / PARTS, tensors))
        ranks.first(lambda: _finish(aside, final, {"step": step, **state}))
    except BaseException:
        if ranks.writes:
            shutil.rmtree(aside, ignore_errors=True)
        raise
    if ranks.writes:
        for old in checkpoints(folder)[:-keep]:
            shutil.rmtree(old)
    return final


def _begin(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _finish(aside: Path, final: Path, state: Mapping[str, Any]) -> None:
    (aside / "state.json").write_text(json.dumps(state), "utf-8")
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    digests = {file.relative_to(aside).as_posix(): _digest(file) for file in files}
    (aside / MANIFEST).write_text(json.dumps(digests), "utf-8")
    for path in [*aside.rglob("*"), aside]:
        _flush(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(aside, final)
    _flush(final.parent)


def _save_parts(folder: Path, tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    flat = {f"{stem}/{name}": v.detach() for stem, named in tensors.items() for name, v in named.items()}
    try:
        with warnings.catch_warnings():  # of a storage format that torch calls new
            warnings.simplefilter("ignore")
            save_parts(flat, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    except CheckpointException as error:
        disk = [e for e in map(_cause, error.failures.values()) if isinstance(e, OSError)]
        raise disk[0] if disk else error from error


def _cause(failure: Any) -> Any:
    return failure[0] if isinstance(failure, tuple) else failure


def checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first (not verified)."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(
    folder: Path, metrics: Path, usable: Callable[[dict[str, Any]], bool] = lambda state: True
) -> tuple[Path, dict[str, Any], list[Path]] | None:
    """The newest checkpoint whose digests hold, its state, and the torn ones that were passed over.

    A checkpoint also needs the part of the metrics file that was written before it, and what ``usable`` asks
    of its state.
    """
    torn: list[Path] = []
    for path in reversed(checkpoints(folder)):
        state = verified(path)
        if (
            state is not None
            and (metrics.stat().st_size if metrics.exists() else 0) >= state["metrics_bytes"]
            and usable(state)
        ):
            return path, state, torn
        torn.append(path)
    return None


def load_tensors(
    path: Path, stem: str, device: torch.device, like: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The named tensors under one stem of a checkpoint, however many processes wrote it.

    ``like`` are the parameters by name: a tensor that ends in ``/NAME`` (or is called so) and has the shape of
    that parameter is spread over the processes as the parameter is.
    """
    if not (path / PARTS).is_dir():
        named = load_file(path / f"{stem}.safetensors", device=str(device))
        return {
            name: spread_like(value, _model_of(name, value.shape, like, value))
            for name, value in named.items()
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader = HuggingFaceStorageReader(str(path / PARTS))
        known: Any = reader.read_metadata().state_dict_metadata
        into: dict[str, Tensor] = {}
        for key, about in known.items():
            if key.startswith(f"{stem}/"):
                blank = torch.zeros(about.size, dtype=about.properties.dtype, device=device)
                into[key] = torch.zeros_like(_model_of(key, about.size, like, blank), dtype=blank.dtype)
        load_parts(into, storage_reader=reader, no_dist=not dist.is_initialized())
    return {key.removeprefix(f"{stem}/"): value for key, value in into.items()}


def _model_of(name: str, shape: Any, like: Mapping[str, Tensor], otherwise: Tensor) -> Tensor:
    """The parameter that a tensor belongs to and is spread like, if there is one of that shape."""
    parameter = like.get(name.rsplit("/", 1)[-1])
    if parameter is None or parameter.shape != torch.Size(shape):
        return otherwise
    return parameter.detach()


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


def verified(path: Path) -> dict[str, Any] | None:
    """The state of a checkpoint if it is whole: every digest holds; else None."""
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
    "verified",
]
