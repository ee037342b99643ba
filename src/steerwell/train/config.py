"""Settings of a training run, and the recipe file that holds them.

:class:`TrainConfig` is what the loop can be told; the hyperparameters of an objective (``beta``, ``tau``,
…) are the keyword-only names of its function. :func:`split_settings` tells the two apart by name. A name
that nobody knows is an :class:`InputError` with the nearest known one, before any work is done.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from steerwell.data.errors import InputError, nearest
from steerwell.objectives.table import TABLE, hyperparameters

#: Learning rates used when none is given. They suit pretrained models of 0.1 to 10 billion parameters that
#: are tuned in full; with LoRA they are multiplied by :data:`LORA_FACTOR`. A model trained from scratch
#: takes more.
LEARNING_RATES = {"sft": 2e-5, "policy": 1e-6, "reward": 1e-5, "policy_gradient": 1e-6}
LORA_FACTOR = 10.0
#: When the head of a reward model is trained alone.
HEAD_RATE = 1e-3


class TrainConfig(BaseModel):
    """What the loop can be told. Every field is a keyword of ``train`` and a key of ``[train]`` in a recipe.

    A *step* is one optimizer step over ``batch_size`` groups (one prompt with its completions is one group).
    It is worked off in micro-batches of at most ``max_tokens`` tokens; how it is cut changes no result beyond
    rounding, as every denominator is counted over the whole step.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    learning_rate: float | None = Field(
        default=None, gt=0, description="peak rate; None: by kind, see LEARNING_RATES"
    )
    epochs: float = Field(default=1.0, gt=0, description="passes over the data; ignored when steps is given")
    steps: int | None = Field(default=None, ge=1, description="optimizer steps; needed for rollouts")
    batch_size: int = Field(default=32, ge=1, description="groups (prompts) per optimizer step")
    max_tokens: int = Field(default=8192, ge=1, description="tokens per micro-batch, prompts counted once")
    max_length: int | None = Field(
        default=None, ge=2, description="prompt plus completion; the rest is cut off the end"
    )
    warmup: float = Field(
        default=0.1, ge=0, le=1, description="share of the steps over which the rate rises from 0"
    )
    schedule: Literal["linear", "cosine", "constant"] = Field(
        default="linear", description="after the warm-up"
    )
    final_lr: float = Field(default=0.0, ge=0, le=1, description="rate at the end as a share of the peak")
    weight_decay: float = Field(default=0.0, ge=0, description="decoupled, on matrices only")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's moments")
    max_grad_norm: float | None = Field(
        default=1.0, gt=0, description="clip the gradient to this norm; None: never"
    )
    seed: int = Field(
        default=0, ge=0, description="data order, sampling and dropout are functions of (seed, step)"
    )
    layout: Literal["auto", "tree", "rows"] = Field(default="auto", description="how a batch shares prompts")
    dropout: bool = Field(
        default=False, description="use the model's dropout; off, a run starts exactly at its start"
    )
    pooling: Literal["last", "mean", "cls"] = Field(
        default="last",
        description="where a reward model reads its score: last or mean; on an encoder cls (the default there) or mean",
    )
    train_only: Literal["head", "gate"] | None = Field(
        default=None,
        description="of a reward model: its head alone, or the gate of its head; None: all of it",
    )
    normalise: bool = Field(
        default=False,
        description="of a reward model: scores of mean 0 and deviation 1 over the training completions",
    )
    calibrate: bool = Field(
        default=False,
        description="of a reward model: the temperature of its probabilities, fitted to the evaluation pairs",
    )
    aggregate: Literal["min", "prod", "last"] | None = Field(
        default=None,
        description="how a process reward model makes one score of its steps'; None: min, where steps alone are scored",
    )
    step_separator: str = Field(
        default="\n\n",
        min_length=1,
        description="what parts the steps of completions that do not say their own",
    )
    reference_cache: str = Field(
        default="auto", description="file of reference log-probs that runs share: auto, off or a path"
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="what the model computes in; auto: bfloat16 on a GPU, else as it is (float32 from a file)",
    )
    gradient_checkpointing: Literal[True, False, "auto"] = Field(
        default="auto",
        description="compute activations twice instead of keeping them; auto: if they don't fit",
    )
    compile: bool = Field(
        default=False, description="torch.compile on the layers; pays for large models on a GPU, not on a CPU"
    )
    eval_every: int | None = Field(
        default=None, ge=1, description="steps between evaluations; None: start and end only"
    )
    best_metric: str | None = Field(
        default=None,
        description="a figure, eval/… or watch/…: the weights where it was best are saved; None: the last",
    )
    best_mode: Literal["max", "min"] | None = Field(
        default=None, description="which way best_metric is better; None: known by its name"
    )
    patience: int | None = Field(
        default=None, ge=1, description="stop after so many measurements without a better one; None: never"
    )
    watch_every: int = Field(default=10, ge=1, description="steps between calls of the watcher")
    checkpoint_every: int | None = Field(
        default=None, ge=1, description="steps; None: about ten times in the run"
    )
    keep_checkpoints: int = Field(
        default=2, ge=1, description="how many of the newest checkpoints stay on disk"
    )
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = Field(
        default=(), description="where the figures go besides metrics.jsonl"
    )


#: Settings that change no number of a run; a run may be continued with other values of them.
FREE_SETTINGS = (
    "checkpoint_every",
    "keep_checkpoints",
    "reference_cache",
    "gradient_checkpointing",
    "sinks",
)


class Recipe(BaseModel):
    """A training run in a TOML file: ``steerwell train RECIPE.toml``.

    ``data`` and ``eval_data`` are a store or a file that ``load`` reads. ``split`` is used for training and
    ``eval_split`` for the held-out figures (both only with a store; an ``eval_data`` file is used whole).
    ``losses`` is a mixture, in the place of ``objective``: a list of [objective, weight] or [objective, weight,
    settings]. ``resolve`` turns annotations into targets: "auto" asks the objective (pairs: majority; labels: labels;
    scores: mean), and a table ``[resolve]`` holds a ``rule`` with its settings. Paths are taken from where
    the command runs. With ``judge`` the run is online: completions are sampled from the policy for the
    prompts of ``data``, and ``[rollouts]`` holds the sampling settings. ``lora`` is the rank of a new adapter:
    the rest of the model stays as it is; ``adapter`` is its kind, ``lora_alpha`` its factor (twice the rank),
    ``lora_targets`` the linear layers that get it (all below the head).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    data: str
    objective: str | list[tuple[str, float] | tuple[str, float, dict[str, Any]]]
    out: str
    split: str | None = "train"
    eval_split: str | None = "test"
    eval_data: str | None = None
    resolve: str | dict[str, Any] = "auto"
    reference: str = "start"
    lora: int | None = Field(default=None, ge=1)
    adapter: Literal["lora", "dora", "qlora"] = "lora"
    lora_alpha: float | None = Field(default=None, gt=0)
    lora_targets: list[str] | None = None
    judge: str | None = None
    hyperparameters: dict[str, Any] = Field(default_factory=dict)
    train: TrainConfig = TrainConfig()
    rollouts: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _one_objective(cls, table: Any) -> Any:
        if isinstance(table, dict) and "losses" in table:
            if "objective" in table:
                raise PydanticCustomError("both", "objective and losses are both given")
            table = {**table, "objective": table["losses"]}
            del table["losses"]
        return table

    @classmethod
    def from_toml(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe; ``overrides`` are ``key=value`` with a dotted key (``train.learning_rate=1e-5``).

        A key without a dot may also name a field of ``[train]`` or a hyperparameter. Values are TOML; what
        is no TOML is text. Raises :class:`InputError` for a missing or broken file, an unknown key or a
        value of the wrong kind.
        """
        path = Path(path)
        try:
            table = tomllib.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            raise InputError("no such recipe", file=path, mend="Give the path of a TOML file.") from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise InputError(f"not a TOML file ({error})", file=path) from None
        for override in overrides:
            _override(table, override)
        return parse(cls, table, file=path)


def parse(model: type[Any], table: Mapping[str, Any], file: str | Path | None = None) -> Any:
    """Validate ``table``; the first problem becomes an :class:`InputError` in one line."""
    try:
        return model.model_validate(dict(table))
    except ValidationError as error:
        # An unknown key first: a misspelt one shows up as missing too.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        parts = [str(part) for part in first["loc"]]
        place = ".".join(parts)
        if first["type"] == "extra_forbidden":
            owner = TrainConfig if parts[0] == "train" and parts[1:] else model
            mend = nearest(parts[-1], owner.model_fields)
            if owner is Recipe and mend.startswith("Known"):
                further = nearest(parts[-1], [f"train.{name}" for name in TrainConfig.model_fields])
                mend = mend if further.startswith("Known") else further
            raise InputError(f"unknown setting {place!r}", file=file, mend=mend) from None
        if first["type"] == "both":
            raise InputError(first["msg"], file=file, mend="A mixture is told by losses alone.") from None
        if first["type"] == "missing":
            raise InputError(f"{place!r} is missing", file=file, mend=f"Add {place} = …") from None
        got = str(first["input"])[:40]
        raise InputError(
            f"{place} = {got}: {first['msg'][:1].lower() + first['msg'][1:]}",
            file=file,
            mend="Change the value.",
        ) from None


def split_settings(
    settings: Mapping[str, Any], hyperparameters: Iterable[str]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the loop's settings from the objective's hyperparameters by name.

    Returns (settings of the loop, hyperparameters); raises :class:`InputError` for a name that neither knows.
    """
    known = set(hyperparameters)
    loop: dict[str, Any] = {}
    hyper: dict[str, Any] = {}
    for name, value in settings.items():
        if name in known:
            hyper[name] = value
        elif name in TrainConfig.model_fields:
            loop[name] = value
        else:
            raise InputError(
                f"unknown setting {name!r}: neither the loop nor the objective has it",
                mend=nearest(name, known | set(TrainConfig.model_fields)),
            )
    return loop, hyper


def _override(table: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise InputError(
            f"--set {text!r} is no key=value", mend="Write, for example, train.learning_rate=1e-5."
        )
    if len(parts) == 1 and parts[0] not in Recipe.model_fields:
        if parts[0] in TrainConfig.model_fields:
            parts = ["train", *parts]
        elif any(parts[0] in hyperparameters(function) for function in TABLE.values()):
            parts = ["hyperparameters", *parts]
    try:
        parsed = tomllib.loads(f"value = {value.strip()}")["value"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    for part in parts[:-1]:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise InputError(f"--set {text!r}: {part!r} is a value, not a table")
    table[parts[-1]] = parsed


__all__ = [
    "FREE_SETTINGS",
    "LEARNING_RATES",
    "LORA_FACTOR",
    "Recipe",
    "TrainConfig",
    "parse",
    "split_settings",
]
