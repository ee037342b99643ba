"""Reward models in and out of directories: sequence classifiers with the recipe that turns outputs into scores.

The directory is of the standard Hugging Face layout, so that any server reads it; the recipe lies beside the weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import CompletionGroup
from steerwell.models.adapters import (
    AdapterKind,
    adapter_below_head,
    add_adapter,
    asked_adapter,
    fresh_adapter,
    merged,
    without_adapter,
)
from steerwell.models.classifier import check_classifier, classifier_on
from steerwell.models.directory import model_place, read_json, remembered_digest, save_directory
from steerwell.models.encoder import positions, train_what_is_read
from steerwell.models.forward import Pooling, reward_scores
from steerwell.models.load import (
    MAX_TOKENS,
    Policy,
    by_group,
    encoder_config,
    evaluating,
    load_parts,
    name_of,
    unwrap,
)
from steerwell.models.load_encoder import load_encoder
from steerwell.models.pairs import tokenize_pairs
from steerwell.models.render import TokenizedGroup, ending, tokenize_groups

SCORING_FILE = "steerwell_scoring.json"
POOLINGS = ("last", "mean", "cls")
Template = Literal["chat", "pair"]
TEMPLATES = ("chat", "pair")


@dataclass(frozen=True)
class ScoringRecipe:
    """How texts become tokens, which states are read, and how raw outputs become scores: ``(raw - mean) / std``.

    ``template``: ``chat`` is the tokenizer's chat template, ``pair`` the two texts of an encoder
    (:mod:`steerwell.models.pairs`), together at most ``max_length`` tokens long (None: as many as the model reads).
    """

    pooling: Pooling = "last"
    mean: float = 0.0
    std: float = 1.0
    template: Template = "chat"
    max_length: int | None = None

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"unknown pooling {self.pooling!r}", mend=nearest(str(self.pooling), POOLINGS))
        if self.template not in TEMPLATES:
            raise InputError(f"unknown template {self.template!r}", mend=nearest(self.template, TEMPLATES))
        other = {"chat": "cls", "pair": "last"}[self.template]
        if self.pooling == other:
            whose = "encoders" if other == "cls" else "decoders, which read from left to right"
            left = " or ".join(name for name in POOLINGS if name != other)
            raise InputError(f"pooling {other!r} is for {whose}", mend=f"Use {left}.")
        if self.max_length is not None and self.template == "chat":
            raise InputError("max_length of a scoring recipe is for encoders", mend="Leave it out.")
        if not self.std > 0:
            raise InputError(f"the scale of scores must be positive, got {self.std}", mend="Use std=1.0.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; what encoders need is left out of other models' recipes, as it always was."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return kept if self.template == "pair" else {k: kept[k] for k in ("pooling", "mean", "std")}


@dataclass(eq=False)
class RewardModel:
    """A sequence classifier with one label that scores completions; higher is better."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    recipe: ScoringRecipe = ScoringRecipe()
    name: str = "reward-model"
    path: str = ""
    _digest: tuple[Any, str] | None = field(default=None, repr=False)

    @classmethod
    def from_policy(
        cls, policy: Policy, *, pooling: Pooling = "last", name: str | None = None
    ) -> RewardModel:
        """A reward model on a copy of the policy's backbone; its new head is close to zero, always the same.

        A policy with an adapter gives a reward model with a new adapter of the same form, over the weights
        that the policy has with its own one.

        Raises :class:`InputError` for an architecture without a sequence classifier in ``transformers``.
        """
        adapter = adapter_below_head(policy.model)
        fresh = adapter is not None and fresh_adapter(policy.model)
        source = without_adapter(policy.model) if fresh else merged(policy.model)
        if source is policy.model:
            source = copy.deepcopy(source)
        model = classifier_on(source, _pad_id(policy.tokenizer), policy.path or None)
        whole: Any = model if adapter is None else add_adapter(model, adapter)
        return cls(whole, policy.tokenizer, ScoringRecipe(pooling), name or f"{policy.name}-reward")

    @classmethod
    def from_encoder(
        cls,
        path: str | Path,
        *,
        pooling: Pooling = "cls",
        max_length: int | None = None,
        lora: int | None = None,
        adapter: AdapterKind = "lora",
        lora_alpha: float | None = None,
        lora_targets: Iterable[str] | None = None,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        name: str | None = None,
    ) -> RewardModel:
        """A new reward model on an encoder (BERT, RoBERTa, DeBERTa, ModernBERT, a model of sentence-transformers).

        It reads a prompt and a completion as a pair of texts of at most ``max_length`` tokens
        (:func:`steerwell.models.pairs.tokenize_pairs`). ``pooling`` is ``cls``, the model's own way to an output, or
        ``mean``, the mean over the completion's tokens. Its output layer is close to zero, always the same. With
        ``lora`` an adapter and the head are trained, and nothing else.

        Raises :class:`InputError` for a model that is no encoder, and as
        :func:`steerwell.models.load_encoder.load_encoder` does.
        """
        asked = asked_adapter(lora, adapter, lora_alpha, lora_targets)
        recipe = ScoringRecipe(pooling, template="pair", max_length=max_length)
        if encoder_config(model_place(path)) is None:
            raise InputError("this is no encoder", file=path, mend="Use from_policy with a language model.")
        model, tokenizer = load_encoder(path, device, dtype, asked, outputs=1)
        train_what_is_read(model, pooling)
        whole: Any = model if asked is None else add_adapter(model, asked)
        return cls(whole, tokenizer, recipe, name or f"{name_of(path)}-reward", str(path))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def digest(self) -> str:
        """Identity of the weights and the recipe."""
        self._digest = remembered_digest(self.model, self._digest)
        words = json.dumps(self.recipe.to_dict(), sort_keys=True)
        return hashlib.blake2b((self._digest[1] + words).encode(), digest_size=12).hexdigest()

    def tokenize(
        self, groups: Iterable[CompletionGroup], max_length: int | None = None
    ) -> list[TokenizedGroup]:
        """Token ids of groups; see :func:`steerwell.models.render.tokenize_groups`, and for a recipe of pairs
        :func:`steerwell.models.pairs.tokenize_pairs`.
        """
        if self.recipe.template == "pair":
            return tokenize_pairs(self.tokenizer, groups, self.limit(max_length))
        return tokenize_groups(self.tokenizer, groups, max_length)

    def limit(self, max_length: int | None = None) -> int | None:
        """The tokens that a pair may have: the least of what is asked for, the recipe's and what the encoder reads."""
        limits = (max_length, self.recipe.max_length, positions(unwrap(self.model)))
        return min((n for n in limits if n is not None), default=None)

    @torch.no_grad()
    def score(self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS) -> list[list[float]]:
        """The score of every completion, one list per group; the same whatever else is in the batch."""
        with evaluating(self.model):
            raw = by_group(
                self.tokenize(groups),
                lambda batch: reward_scores(self.model, batch, self.recipe.pooling),
                self.model,
                max_tokens,
            )
        return [[(x - self.recipe.mean) / self.recipe.std for x in scores] for scores in raw]

    def save(self, path: str | Path) -> Path:
        """Write a complete model directory with its scoring recipe; see :meth:`Policy.save`."""
        recipe = json.dumps({"version": 1, **self.recipe.to_dict()}, indent=2) + "\n"
        return save_directory(merged(self.model), self.tokenizer, Path(path), {SCORING_FILE: recipe})

    def copy(self) -> RewardModel:
        """An independent copy with equal weights, on the same device."""
        return RewardModel(
            copy.deepcopy(self.model), self.tokenizer, self.recipe, self.name, self.path, self._digest
        )


def load_reward_model(
    path: str | Path,
    *,
    lora: int | None = None,
    adapter: AdapterKind = "lora",
    lora_alpha: float | None = None,
    lora_targets: Iterable[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
) -> RewardModel:
    """Load a reward model: a sequence classifier with one label. Without a recipe it reads the last token, and on an
    encoder a pair of texts in the model's own way.

    With ``lora`` a new adapter and the head are trained, and nothing else; see :func:`load_policy`.

    Raises :class:`InputError` as :func:`load_policy` does, and for a directory that holds a language model.
    """
    asked = asked_adapter(lora, adapter, lora_alpha, lora_targets)
    local = Path(path).expanduser()
    if (local / "config.json").is_file():
        config = read_json(local / "config.json")
        kinds = [str(kind) for kind in config.get("architectures") or []]
        if kinds and not any("ForSequenceClassification" in kind for kind in kinds):
            raise InputError(
                f"this is a {kinds[0]}, not a reward model",
                file=path,
                mend='Train one from it: a recipe with objective = "bradley_terry".',
            )
    encoder = encoder_config(path) is not None
    recipe = ScoringRecipe("cls", template="pair") if encoder else ScoringRecipe()
    if (local / SCORING_FILE).is_file():
        given = {k: v for k, v in read_json(local / SCORING_FILE).items() if k != "version"}
        try:
            recipe = ScoringRecipe(**given)
        except TypeError as error:
            raise InputError(f"not a scoring recipe ({error})", file=local / SCORING_FILE) from error
    if encoder != (recipe.template == "pair"):
        raise InputError(
            f"the template of an encoder is pair, that of a decoder chat, and this is {recipe.template}",
            file=local / SCORING_FILE,
        )
    if encoder:
        model, tokenizer = load_encoder(path, device, dtype, asked)
        train_what_is_read(model, recipe.pooling)
    else:
        model, tokenizer = load_parts(AutoModelForSequenceClassification, path, device, dtype, asked)
    check_classifier(model, path)
    whole: Any = model if asked is None else add_adapter(model, asked)
    return RewardModel(whole, tokenizer, recipe, name or name_of(path), str(path))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else ending(tokenizer).stop_id or 0)  # type: ignore[arg-type]


__all__ = ["SCORING_FILE", "RewardModel", "ScoringRecipe", "load_reward_model"]
