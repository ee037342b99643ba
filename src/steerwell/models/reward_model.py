"""Reward models in and out of directories: sequence classifiers with the recipe that turns outputs into scores.

The directory is of the standard Hugging Face layout, so that any server reads it; the recipe lies beside the weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedTokenizerBase

from steerwell.data.errors import InputError, nearest
from steerwell.data.steps import SEPARATOR
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
from steerwell.models.directory import read_json, remembered_digest, save_directory
from steerwell.models.forward import Pooling, reward_scores
from steerwell.models.load import MAX_TOKENS, Policy, by_group, evaluating, load_parts, name_of
from steerwell.models.render import TokenizedGroup, ending, tokenize_groups
from steerwell.models.step_scores import aggregate, check_aggregate, step_logits

SCORING_FILE = "steerwell_scoring.json"
POOLINGS = ("last", "mean")


@dataclass(frozen=True)
class ScoringRecipe:
    """How raw outputs become scores: which states are read, and ``(raw - mean) / std``.

    With ``aggregate`` (min, prod or last) the raw score is made of those of the completion's steps, as
    ``step_separator`` cuts them: the model is a process reward model. See :mod:`steerwell.models.step_scores`.
    """

    pooling: Pooling = "last"
    mean: float = 0.0
    std: float = 1.0
    aggregate: str | None = None
    step_separator: str = SEPARATOR

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"unknown pooling {self.pooling!r}", mend=nearest(str(self.pooling), POOLINGS))
        check_aggregate(self.aggregate)
        if not self.std > 0:
            raise InputError(f"the scale of scores must be positive, got {self.std}", mend="Use std=1.0.")

    def facts(self) -> dict[str, Any]:
        """What counts: without what is said of steps where none are scored."""
        steps = ("aggregate", "step_separator") if self.aggregate is None else ()
        return {name: value for name, value in asdict(self).items() if name not in steps}


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

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def digest(self) -> str:
        """Identity of the weights and the recipe."""
        self._digest = remembered_digest(self.model, self._digest)
        words = json.dumps(self.recipe.facts(), sort_keys=True)
        return hashlib.blake2b((self._digest[1] + words).encode(), digest_size=12).hexdigest()

    def tokenize(
        self, groups: Iterable[CompletionGroup], max_length: int | None = None
    ) -> list[TokenizedGroup]:
        """Token ids of groups; see :func:`steerwell.models.render.tokenize_groups`."""
        return tokenize_groups(self.tokenizer, groups, max_length)

    @torch.no_grad()
    def score(self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS) -> list[list[float]]:
        """The score of every completion, one list per group; the same whatever else is in the batch."""
        if self.recipe.aggregate is not None:
            raw = [
                [aggregate(self.recipe.aggregate, steps) for steps in own]
                for own in self._step_logits(groups, max_tokens)
            ]
            return [[(x - self.recipe.mean) / self.recipe.std for x in scores] for scores in raw]
        with evaluating(self.model):
            raw = by_group(
                self.tokenize(groups),
                lambda batch: reward_scores(self.model, batch, self.recipe.pooling),
                self.model,
                max_tokens,
            )
        return [[(x - self.recipe.mean) / self.recipe.std for x in scores] for scores in raw]

    def score_steps(
        self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS
    ) -> list[list[list[float]]]:
        """The probability that each step of every completion is right: lists of completions of steps, one per group.

        Steps are the group's ``steps``, or as the recipe's ``step_separator`` cuts. Raises :class:`InputError` for a
        model that has learnt nothing about steps.
        """
        if self.recipe.aggregate is None:
            raise InputError(
                f"{self.name} is no process reward model: it scores whole completions",
                mend='Train one: a recipe with objective = "process_reward".',
            )
        found = self._step_logits(groups, max_tokens)
        return [
            [torch.tensor(steps, dtype=torch.float64).sigmoid().tolist() for steps in own] for own in found
        ]

    def _step_logits(self, groups: Iterable[CompletionGroup], max_tokens: int) -> list[list[list[float]]]:
        with evaluating(self.model):
            return step_logits(
                self.model,
                self.tokenizer,
                groups,
                self.tokenize,
                max_tokens=max_tokens,
                separator=self.recipe.step_separator,
            )

    def save(self, path: str | Path) -> Path:
        """Write a complete model directory with its scoring recipe; see :meth:`Policy.save`."""
        recipe = json.dumps({"version": 1, **self.recipe.facts()}, indent=2) + "\n"
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
    """Load a reward model: a sequence classifier with one label. Without a recipe it reads the last token.

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
    recipe = ScoringRecipe()
    if (local / SCORING_FILE).is_file():
        given = {k: v for k, v in read_json(local / SCORING_FILE).items() if k != "version"}
        try:
            recipe = ScoringRecipe(**given)
        except TypeError as error:
            raise InputError(f"not a scoring recipe ({error})", file=local / SCORING_FILE) from error
    model, tokenizer = load_parts(AutoModelForSequenceClassification, path, device, dtype, asked)
    check_classifier(model, path)
    whole: Any = model if asked is None else add_adapter(model, asked)
    return RewardModel(whole, tokenizer, recipe, name or name_of(path), str(path))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else ending(tokenizer).stop_id or 0)  # type: ignore[arg-type]


__all__ = ["SCORING_FILE", "RewardModel", "ScoringRecipe", "load_reward_model"]
