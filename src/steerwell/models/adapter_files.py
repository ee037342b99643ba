"""Adapters of reward models in directories of their own: peft's layout, with the head among the weights.

The base model is named by its path, and the bytes of its weights by their hash: over other weights an adapter means
nothing. Any program that knows peft reads the directory.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from steerwell.data.errors import InputError
from steerwell.models.adapters import is_quantised
from steerwell.models.directory import files_digest, quiet, read_json
from steerwell.models.load import load_parts

CONFIG, WEIGHTS, BASE = "adapter_config.json", "adapter_model.safetensors", "steerwell_base.json"
HEAD = "base_model.model.score.weight"


def is_adapter(place: str | Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    folder = Path(place).expanduser()
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def write_adapter(model: Any, base: str, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter that is switched on, the head and the tokenizer into a new folder; ``base`` is where the
    weights below lie.

    Raises :class:`InputError` for a model without an adapter, over weights in 4 bits, or whose base is nowhere.
    """
    from peft import get_peft_model_state_dict

    if not hasattr(model, "peft_config"):
        raise InputError("this reward model has no adapter", mend="Use save: it writes the whole model.")
    if is_quantised(model):
        raise InputError(
            "this adapter was trained over weights in 4 bits", mend="Use save: it merges the two."
        )
    if not base:
        raise InputError(
            "the weights below this adapter lie in no directory",
            mend="Use save: it merges the two. Or start from a model that was loaded with lora=.",
        )
    name = model.active_adapter
    config = copy.deepcopy(model.peft_config[name])
    local = Path(base).expanduser()
    config.base_model_name_or_path = str(local.resolve()) if local.is_dir() else base
    config.modules_to_save, config.task_type, config.inference_mode = ["score"], "SEQ_CLS", True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    state[HEAD] = model.get_base_model().score.weight
    folder.mkdir(parents=True)
    config.save_pretrained(str(folder))
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in state.items()}, folder / WEIGHTS, {"format": "pt"}
    )
    about = {"base": config.base_model_name_or_path, "weights": files_digest(base)}
    (folder / BASE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    with quiet():
        tokenizer.save_pretrained(folder)


def base_of(folder: Path, base: str | Path | None = None) -> str:
    """Where the base of an adapter lies: as ``base`` says, or as its directory does. Raises :class:`InputError` where
    it is not there, or holds other weights than the adapter was trained over.
    """
    place = str(base or read_json(folder / CONFIG).get("base_model_name_or_path") or "")
    if not place or (Path(place).is_absolute() and not Path(place).is_dir()):
        raise InputError(
            f"the base model of this adapter is not there ({place or 'no name'})",
            file=folder / CONFIG,
            mend="Give its place: load_reward_model(path, base=…), or correct base_model_name_or_path.",
        )
    about = read_json(folder / BASE) if (folder / BASE).is_file() else {}
    now = files_digest(place) if about.get("weights") else ""
    if now and now != about["weights"]:
        raise InputError(
            f"the weights in {place} are not those that this adapter was trained over",
            file=folder,
            mend="Give the place of the right base: load_reward_model(path, base=…).",
        )
    return place


def load_base(
    place: str, outputs: int, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> Any:
    """The network below reward adapters with a head of so many ``outputs`` that is yet to be filled."""
    with torch.random.fork_rng():  # transformers draws the head that it does not find
        model, tokenizer = load_parts(
            AutoModelForSequenceClassification, place, device, dtype, None, labels=outputs
        )
    pad = tokenizer.pad_token_id
    anything: Any = model
    if anything.config.pad_token_id is None:
        anything.config.get_text_config().pad_token_id = anything.config.pad_token_id = pad
    return model


def read_adapter(model: Any, folder: Path, name: str = "default") -> tuple[Any, nn.Parameter]:
    """``model`` (a base, or peft's wrapper of one that has adapters already) with the adapter of a directory under this
    name, switched on, and its head, which is put in place.

    Raises :class:`InputError` where the two do not fit together.
    """
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict

    config: Any = LoraConfig.from_pretrained(str(folder))
    config.modules_to_save, config.task_type, config.inference_mode = None, None, False  # the head is ours
    state = load_file(folder / WEIGHTS)
    if HEAD not in state:
        raise InputError(
            "this adapter has no head, so it is not that of a reward model",
            file=folder,
            mend="Name a directory that RewardModel.save_adapter wrote.",
        )
    head = state.pop(HEAD)
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    score: Any = inner.score
    if head.shape != score.weight.shape:
        raise InputError(
            f"the head has the shape {tuple(head.shape)}, and the base takes {tuple(score.weight.shape)}",
            file=folder,
            mend="Name the directory that the training run wrote.",
        )
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        try:
            if hasattr(model, "peft_config"):
                wrapped = model
                wrapped.add_adapter(name, config)
            else:
                wrapped = get_peft_model(model, config, adapter_name=name)
            told = set_peft_model_state_dict(wrapped, state, adapter_name=name)
        except (RuntimeError, ValueError) as error:
            raise InputError(
                f"the adapter does not fit its base ({str(error).splitlines()[0]})",
                file=folder,
                mend="Give the place of the right base: load_reward_model(path, base=…).",
            ) from error
    if told.unexpected_keys:
        raise InputError(
            f"the base has no place for {told.unexpected_keys[0]}",
            file=folder,
            mend="Give the place of the right base: load_reward_model(path, base=…).",
        )
    wrapped.set_adapter(name)
    score.weight = nn.Parameter(head.to(score.weight.device, score.weight.dtype))
    return wrapped.eval(), score.weight


__all__ = ["base_of", "is_adapter", "load_base", "read_adapter", "write_adapter"]
