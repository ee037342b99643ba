"""A recipe with its data read, as training reads them, and no model loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.batch import Layout
from steerwell.models.encoder import is_encoder
from steerwell.train.census import tokenised
from steerwell.train.config import Recipe, TrainConfig
from steerwell.train.items import Prepared
from steerwell.train.loop import checked
from steerwell.train.recipe import _recorded, _rollouts
from steerwell.train.reference import LIVE_NAMES, REFERENCE_NAMES
from steerwell.train.skeleton import config_of, tokenizer_of
from steerwell.train.sources import Rollouts
from steerwell.train.terms import Term, check_data, needed


@dataclass(frozen=True)
class Job:
    """A recipe with its data read, as training reads them."""

    recipe: Recipe
    terms: list[Term]
    config: TrainConfig
    kind: str
    count: int
    tokenizer: Any
    context: int | None
    source: Rollouts | None
    groups: list[CompletionGroup]
    eval_groups: list[CompletionGroup]
    notes: list[str]
    known: dict[Any, tuple[Prepared, Prepared, float]] = field(default_factory=dict, repr=False)

    def items(self, config: TrainConfig, layout: Layout) -> tuple[Prepared, Prepared, float]:
        """The tokenised data, the held-out data, and the CPU seconds that tokenising them took."""
        key = config.max_length, layout
        if key not in self.known:
            asked = (self.terms, self.tokenizer, config, layout, self.context)
            data, seconds = tokenised(self.groups, *asked)
            held_out, more = tokenised(self.eval_groups, *asked)
            self.known[key] = data, held_out, seconds + more
        return self.known[key]

    @property
    def reward(self) -> bool:
        return self.terms[0].kind == "reward"

    @property
    def dtype(self) -> torch.dtype:
        asked = self.config.dtype
        if asked != "auto":
            return getattr(torch, asked)
        return torch.bfloat16 if self.kind == "cuda" else torch.float32

    @property
    def adapter(self) -> dict[str, Any]:
        """How the recipe asks for an adapter."""
        return {
            "lora": self.recipe.lora,
            "adapter": self.recipe.adapter,
            "targets": self.recipe.lora_targets,
        }


def read(recipe: Recipe, kind: str, count: int) -> Job:
    """Read the data and the tokenizer of a recipe that would run on ``count`` devices of a kind (cpu or cuda).

    Raises :class:`InputError` for what training would refuse before a model is loaded.
    """
    terms, config = checked(recipe.objective, recipe.train, recipe.hyperparameters)
    notes: list[str] = []
    source: Rollouts | None = None
    groups: list[CompletionGroup] = []
    held_out: list[CompletionGroup] | None = None
    if recipe.judge is not None:
        source = _rollouts(recipe, lambda groups: [])
    else:
        if recipe.rollouts:
            raise InputError(
                "[rollouts] is given without a judge", mend='Add, for example, judge = "rm:DIR".'
            )
        groups, held_out = _recorded(recipe, terms, notes)
        check_data(terms, groups)
        if held_out:
            check_data(terms, held_out, "the evaluation data")
    if recipe.reference == "none" and needed(terms) & (REFERENCE_NAMES | LIVE_NAMES):
        raise InputError(
            f"{terms[0].name} needs a reference, and reference is none", mend='Say reference = "start".'
        )
    if is_encoder(config_of(recipe.model)):
        raise InputError(
            "plan knows decoders only, and this is an encoder",
            file=recipe.model,
            mend="Train a few steps of it: --set train.steps=3 shows its tokens per second.",
        )
    context = getattr(config_of(recipe.model).get_text_config(), "max_position_embeddings", None)
    tokenizer = tokenizer_of(recipe.model)
    return Job(
        recipe, terms, config, kind, count, tokenizer, context, source, groups, list(held_out or []), notes
    )


__all__ = ["Job", "read"]
