"""Model directories on disk: what one must hold, how it is written, and the identity of weights.

A directory is written under another name and then renamed: it is whole or it is not there.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies
from uuid import uuid4

import torch
from huggingface_hub import constants
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as hf_logging

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.models.adapters import scalings
from steerwell.models.sharding import everywhere, own_part, sharded

_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def check_directory(path: str | Path) -> str:
    """What to give ``from_pretrained``; raises :class:`InputError` when the directory lacks something.

    A name like ``owner/model`` goes to the hub, unless a local folder ``owner`` exists: then it is mistyped.
    """
    local = Path(path).expanduser()
    if not local.is_dir():
        text = str(path)
        if isinstance(path, str) and _HUB_NAME.fullmatch(text) and not local.parent.is_dir():
            return text
        raise InputError(
            "not a directory" if local.exists() else "no such model directory",
            file=path,
            mend="Give a directory in the Hugging Face layout, or a hub name like Qwen/Qwen3-0.6B.",
        )
    names = {file.name for file in local.iterdir()}
    if "config.json" not in names:
        if "adapter_config.json" in names:
            what = "an adapter without its base model"
            mend = (
                "Merge the adapter into its base model first; a reward adapter is read by load_reward_model."
            )
        else:
            what, mend = "no config.json in this directory", "Name the directory that holds the model itself."
        raise InputError(what, file=path, mend=mend)
    if not any(n.endswith(".safetensors") for n in names):
        pickles = sorted(n for n in names if n.endswith((".bin", ".pt", ".pth")))
        raise InputError(
            f"the weights are a pickle ({pickles[0]})" if pickles else "no weights in this directory",
            file=path,
            mend="Convert them to safetensors: a pickle can run code when it is read."
            if pickles
            else "Put model.safetensors into it.",
        )
    if not names & {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt"}:
        raise InputError(
            "no tokenizer in this directory",
            file=path,
            mend="Put tokenizer.json and tokenizer_config.json into it.",
        )
    read_json(local / "config.json")
    return str(local)


def from_hub(place: str) -> bool:
    """Whether ``place`` is to be asked for over the network: it is a hub's name, and the hub can be reached.

    Without a network a name is looked up in the local cache alone, at once: the hub's own client would try for
    most of a minute.
    """
    if Path(place).is_dir() or constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(constants.ENDPOINT)
    if getproxies().get(address.scheme):
        return True  # only the proxy knows
    try:
        port = address.port or (443 if address.scheme == "https" else 80)
        socket.create_connection((address.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True


def model_place(path: str | Path) -> str | Path:
    """Where a model lies: a run directory means its ``model``, a directory of sentence-transformers without a model of
    its own means its first module's; any other path or hub name means itself.
    """
    if (Path(path) / "config.json").is_file():
        return path
    inside, modules = Path(path) / "model", Path(path) / "modules.json"
    if modules.is_file():
        inside = Path(path) / _first_module(modules)
    return inside if (inside / "config.json").is_file() else path


def _first_module(file: Path) -> str:
    """The folder of the first module that a ``modules.json`` of sentence-transformers names."""
    try:
        return str(json.loads(file.read_text("utf-8"))[0]["path"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


#: Files that say that a directory is one of ours to replace.
MARKS = ("config.json", "adapter_config.json", "steerwell_ensemble.json")


def save_directory(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    files: Mapping[str, str | bytes] | None = None,
) -> Path:
    """Write a complete model directory aside and rename it into place."""

    def write(fresh: Path) -> None:
        with quiet(), disk_errors():
            model.save_pretrained(fresh, safe_serialization=True)
            tokenizer.save_pretrained(fresh)
        for name, content in (files or {}).items():
            (fresh / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return put_in_place(path, write)


def put_in_place(path: Path, write: Callable[[Path], None]) -> Path:
    """Have a directory written aside, then rename it into place; a model that was there is replaced.

    Raises :class:`InputError` where something else is in the way.
    """
    path = path.expanduser()
    if path.exists() and not (
        path.is_dir() and (any((path / mark).is_file() for mark in MARKS) or not any(path.iterdir()))
    ):
        raise InputError(
            "something that is not a model is in the way",
            file=path,
            mend="Choose another name, or remove it.",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.parent / f".{path.name}.{uuid4().hex[:8]}.new"
    old = fresh.with_suffix(".old")
    try:
        write(fresh)
        if path.exists():
            os.replace(path, old)
        os.replace(fresh, path)
    except BaseException:
        if old.exists() and not path.exists():
            os.replace(old, path)
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
    return path


@contextmanager
def disk_errors() -> Iterator[None]:
    """A full disk is an :class:`OSError` inside, also where safetensors meets it (it has an error of its own)."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and chatter of ``transformers`` inside; put back as they were."""
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; :class:`InputError` for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"not JSON ({first_line(error)})", file=path, mend="Write it again.") from error
    if not isinstance(value, dict):
        raise InputError("not a JSON object", file=path, mend="Write it again.")
    return value


def files_digest(place: str | Path) -> str:
    """Hash of all bytes of the weights of a directory; empty where it is none (a hub's name)."""
    total = hashlib.blake2b(digest_size=12)
    files = sorted(Path(place).glob("*.safetensors")) if Path(place).is_dir() else []
    for file in files:
        total.update(f"{file.name} {file.stat().st_size}\n".encode())
        with file.open("rb") as opened:
            while chunk := opened.read(1 << 24):
                total.update(chunk)
    return total.hexdigest() if files else ""


def weights_digest(
    model: nn.Module | Mapping[str, torch.Tensor], factors: Mapping[str, float] | None = None
) -> str:
    """Hash of all weights (a model's, or named ones) by name, type, shape and bytes, and of what adapters are
    multiplied by (``factors``, read off a model); tied weights count once.
    """
    total = hashlib.blake2b(digest_size=12)
    factors = scalings(model) if isinstance(model, nn.Module) and factors is None else factors
    if factors:
        total.update(json.dumps(factors, sort_keys=True).encode())
    seen: set[int] = set()
    state: Mapping[str, Any] = model.state_dict() if isinstance(model, nn.Module) else model
    for name, value in sorted(state.items()):
        if (
            value.ndim > 1
        ):  # smaller ones (the code book of quantised weights) are shared at the loader's whim
            if value.data_ptr() in seen and value.numel():
                continue
            seen.add(value.data_ptr())
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def remembered_digest(model: nn.Module, known: tuple[Any, str] | None) -> tuple[Any, str]:
    """The digest of a model's weights, computed again only after they changed.

    A model that is spread over processes has a digest of its own kind, made of those of its parts.
    """
    if sharded(model):
        return None, digest("sharded", everywhere(weights_digest(_parts(model))))
    # Fused optimizers write without raising the version of a tensor, so the bits are summed as well.
    state = tuple((p.data_ptr(), p._version, _bit_sum(p)) for p in model.parameters())
    return known if known is not None and known[0] == state else (state, weights_digest(model))


def _parts(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: own_part(p.detach()) for name, p in model.named_parameters()}


def _bit_sum(value: torch.Tensor) -> int:
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[value.element_size()]
    return int(value.detach().view(integers).sum(dtype=torch.int64))


def first_line(error: BaseException) -> str:
    """The first line of an error's message."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


__all__ = [
    "check_directory",
    "disk_errors",
    "files_digest",
    "first_line",
    "from_hub",
    "model_place",
    "put_in_place",
    "quiet",
    "read_json",
    "remembered_digest",
    "save_directory",
    "weights_digest",
]
