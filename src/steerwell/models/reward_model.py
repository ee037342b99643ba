"""Reward models in and out of directories: sequence classifiers with the recipe that turns outputs into scores
(:mod:`steerwell.models.scoring`).

The directory is of the standard Hugging Face layout, so that any server reads it; the recipe lies beside the weights.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.adapter_files import (
    write_adapter,
)
from steerwell.models.adapters import (
    AdapterKind,
    adapter_below_head,
    add_adapter,
    asked_adapter,
    fresh_adapter,
    merged,
    without_adapter,
)
from steerwell.models.bayesian_head import UNCERTAINTY_FILE, Posterior, read_posterior, with_posterior
from steerwell.models.classifier import classifier_on, size_at_start
from steerwell.models.directory import (
    model_place,
    put_in_place,
    remembered_digest,
    save_directory,
)
from steerwell.models.encoder import positions, train_what_is_read
from steerwell.models.forward import Pooling, head_outputs
from steerwell.models.load import (
    MAX_TOKENS,
    Policy,
    by_group,
    encoder_config,
    evaluating,
    name_of,
    unwrap,
)
from steerwell.models.load_encoder import load_encoder
from steerwell.models.pairs import tokenize_pairs
from steerwell.models.render import TokenizedGroup, ending, tokenize_groups
from steerwell.models.reward_head import add_gate
from steerwell.models.scoring import (
    SCORING_FILE,
    ScoringRecipe,
    combined,
    made_for,
    on_scale,
)
from steerwell.models.step_scores import aggregate, step_logits
from steerwell.models.uncertainty import margins_with_std, moderation, score_with_std


@dataclass(eq=False)
class RewardModel:
    """A sequence classifier that scores completions by its recipe; higher is better."""

    model: Any
    tokenizer: PreTrainedTokenizerBase
    recipe: ScoringRecipe = field(default_factory=ScoringRecipe)
    name: str = "reward-model"
    path: str = ""
    base: str = ""  # where the weights below its adapter lie, if they lie anywhere
    _digest: tuple[Any, str] | None = field(default=None, repr=False)
    _posterior: Posterior | None = field(default=None, repr=False)

    @classmethod
    def from_policy(
        cls,
        policy: Policy,
        *,
        pooling: Pooling = "last",
        name: str | None = None,
        head: str = "score",
        outputs: tuple[str, ...] = ("score",),
    ) -> RewardModel:
        """A reward model on a copy of the policy's backbone; its new head is close to zero, always the same. Members of
        an ensemble start apart, of size 1: what the data do not settle keeps them so.

        ``head`` says what the outputs are (:data:`steerwell.models.scoring.HEADS`), ``outputs`` names them.

        A policy with an adapter gives a reward model with a new adapter of the same form, over the weights
        that the policy has with its own one.

        Raises :class:`InputError` for an architecture without a sequence classifier in ``transformers``.
        """
        adapter = adapter_below_head(policy.model)
        fresh = adapter is not None and fresh_adapter(policy.model)
        source = without_adapter(policy.model) if fresh else merged(policy.model)
        if source is policy.model:
            source = copy.deepcopy(source)
        pad, spread = _pad_id(policy.tokenizer), size_at_start(head)
        model = classifier_on(source, pad, policy.path or None, len(outputs), spread=spread)
        whole: Any = model if adapter is None else add_adapter(model, adapter)
        recipe = made_for(policy.tokenizer, ScoringRecipe(pooling, head=head, outputs=outputs))
        base = policy.path if fresh else ""
        return cls(whole, policy.tokenizer, recipe, name or f"{policy.name}-reward", base=base)

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
        head: str = "score",
        outputs: tuple[str, ...] = ("score",),
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
        recipe = ScoringRecipe(pooling, head=head, outputs=outputs, template="pair", max_length=max_length)
        if encoder_config(model_place(path)) is None:
            raise InputError("this is no encoder", file=path, mend="Use from_policy with a language model.")
        model, tokenizer = load_encoder(
            path, device, dtype, asked, outputs=len(outputs), spread=size_at_start(head)
        )
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
        both = self._digest[1] + self.recipe.digest()
        return hashlib.blake2b(both.encode(), digest_size=12).hexdigest()

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
        if self.recipe.aggregate is not None:
            raw = [
                [aggregate(self.recipe.aggregate, steps) for steps in own]
                for own in self._step_logits(groups, max_tokens)
            ]
            return [[(x - self.recipe.mean) / self.recipe.std for x in scores] for scores in raw]

        def values(batch: Any) -> torch.Tensor:
            return combined(*self._read(batch, gated=self.recipe.gate))

        with evaluating(self.model):
            raw = by_group(self.tokenize(groups), values, self.model, max_tokens)
        return [[(x - self.recipe.mean) / self.recipe.std for x in scores] for scores in raw]

    @torch.no_grad()
    def outputs(
        self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS
    ) -> list[list[dict[str, float]]]:
        """All raw outputs of every completion by name, one list per group. Quantiles are sorted, so that they rise."""

        def values(batch: Any) -> torch.Tensor:
            found = self._read(batch)[0]
            return found.sort(1).values if self.recipe.head == "quantiles" else found

        with evaluating(self.model):
            raw = by_group(self.tokenize(groups), values, self.model, max_tokens)
        names = self.recipe.outputs
        return [[dict(zip(names, row, strict=True)) for row in rows] for rows in raw]  # type: ignore[arg-type]

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

    def _read(self, batch: Any, *, gated: bool = False) -> tuple[torch.Tensor, ScoringRecipe, Any]:
        found, gate = head_outputs(self.model, batch, self.recipe.pooling, gated=gated)
        return found, self.recipe, gate

    def score_with_std(
        self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS
    ) -> list[list[tuple[float, float]]]:
        """The score of every completion and its standard deviation, in units of the scores, one list per group.

        Members of an ensemble: over the members (the sum of squares divided by their number). Quantiles: the distance
        of the two that lie nearest to 0.16 and 0.84, in standard deviations of a normal distribution. A posterior
        (:meth:`with_uncertainty`): of the mean score at this completion, without the noise of single verdicts; with
        pairs, of the difference from the mean completion of the data, as pairs leave the level open.

        Raises :class:`InputError` for a model that has none of these.
        """
        return score_with_std(self, groups, max_tokens)

    def margins_with_std(
        self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS
    ) -> list[list[tuple[float, float]]]:
        """For every pair of every group the score of its first completion less that of its second, and the standard
        deviation of that difference: over the members, or by the posterior; quantiles are taken for independent.

        Raises :class:`InputError` as :meth:`score_with_std` does.
        """
        return margins_with_std(self, groups, max_tokens)

    def with_uncertainty(
        self,
        groups: Iterable[CompletionGroup],
        prior_precision: float | Literal["likeliest"] = 1.0,
        *,
        max_tokens: int = MAX_TOKENS,
    ) -> RewardModel:
        """This model with a posterior of its head (:mod:`steerwell.models.bayesian_head`), from the pairs of ``groups``
        (one score), their scores where no group has a pair, or their attributes. The network is shared, and scores
        stay as they are; the posterior is saved with the model.

        ``prior_precision``: 1 / variance of each weight before the data; ``likeliest``: by the marginal likelihood.
        It takes one pass over the data, and D^2 numbers for each output at a width of D.

        Raises :class:`InputError` for other heads, and where the groups hold nothing of the kind.
        """
        self._refuse_pairs("given a posterior", "Train an ensemble: ensemble_bradley_terry.")
        return with_posterior(self, groups, prior_precision, max_tokens)

    def _refuse_pairs(self, what: str, mend: str) -> None:
        if self.recipe.template == "pair":
            raise InputError(f"a reward model on an encoder cannot be {what}", mend=mend)

    def posterior(self) -> Posterior:
        """The posterior of the head, read from the model's directory when it is first asked for. Raises
        :class:`InputError` where there is none.
        """
        if self._posterior is None:
            self._posterior = read_posterior(Path(self.path) / UNCERTAINTY_FILE, self.recipe.uncertainty)
        return self._posterior

    def probability(self, better: float, other: float, *, variance: float = 0.0) -> float:
        """The probability that a completion of the first score is preferred to one of the second, by the recipe's
        temperature. ``variance``: of the difference, which then counts less (:func:`uncertainty.moderation`); the
        square of what :meth:`margins_with_std` gives.
        """
        logit = (better - other) / self.recipe.temperature
        logit *= moderation(variance / self.recipe.temperature**2)
        return 1 / (1 + math.exp(min(700.0, -logit)))

    def normalised(self, groups: Iterable[CompletionGroup]) -> RewardModel:
        """This model with scores of mean 0 and standard deviation 1 over the completions of ``groups``, the reference
        set; probabilities stay as they are. The network is shared.

        Members of an ensemble are brought to one level and scale first, each by its own mean and standard deviation:
        pairs leave the level of a member free, and ``min`` and ``uwo`` compare levels. Probabilities then go by the
        mean of the members' scales.

        Raises :class:`InputError` where there are fewer than two different scores.
        """
        groups = list(groups)

        def scores(recipe: ScoringRecipe) -> list[float]:
            return [score for own in replace(self, recipe=recipe).score(groups) for score in own]

        members = self.recipe.head == "members"
        rows = [[*each.values()] for own in self.outputs(groups) for each in own] if members else []
        return replace(self, recipe=on_scale(self.recipe, rows, scores))

    def with_recipe(self, **changes: Any) -> RewardModel:
        """This model with another recipe; the network is shared."""
        return replace(self, recipe=replace(self.recipe, **changes))

    def with_gate(self) -> RewardModel:
        """This model with a gate on its attributes, fresh where it had none (then all weigh the same); in place.

        Raises :class:`InputError` for a model of another kind.
        """
        if self.recipe.head != "attributes":
            raise InputError(
                f"a gate weighs attributes, and this head gives {self.recipe.head}",
                mend='Train one with objective = "regression" first.',
            )
        if self.recipe.template == "pair":
            raise InputError(
                "a gate reads the prompt alone, and an encoder reads both ways",
                mend="Use weights: model.with_recipe(weights=(…)).",
            )
        if hasattr(self.model, "peft_config"):
            raise InputError(
                "a gate cannot be put on a model with an adapter", mend="Merge it: save and load."
            )
        add_gate(self.model)
        self.recipe = replace(self.recipe, gate=True)
        return self

    def save(self, path: str | Path) -> Path:
        """Write a complete model directory with its scoring recipe; see :meth:`Policy.save`."""
        files: dict[str, str | bytes] = {SCORING_FILE: self.recipe.to_json()}
        if self.recipe.uncertainty:
            files[UNCERTAINTY_FILE] = self.posterior().to_bytes()
        return save_directory(merged(self.model), self.tokenizer, Path(path), files)

    def save_adapter(self, path: str | Path) -> Path:
        """Write the adapter and the head alone, in peft's layout, with the scoring recipe and the tokenizer;
        :func:`load_reward_model` reads the directory as it does a whole model, from the base that it names.

        Raises :class:`InputError` for a model without an adapter, with one over weights in 4 bits, and where the
        weights below it lie in no directory (a policy with a trained adapter was merged).
        """

        self._refuse_pairs("saved as an adapter alone", "Use save: adapter and head go into a whole model.")

        def write(fresh: Path) -> None:
            write_adapter(self.model, self.base, self.tokenizer, fresh)
            (fresh / SCORING_FILE).write_text(self.recipe.to_json(), encoding="utf-8")
            if self.recipe.uncertainty:
                (fresh / UNCERTAINTY_FILE).write_bytes(self.posterior().to_bytes())

        return put_in_place(Path(path), write)

    def copy(self) -> RewardModel:
        """An independent copy with equal weights, on the same device."""
        return replace(self, model=copy.deepcopy(self.model))


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else ending(tokenizer).stop_id or 0)  # type: ignore[arg-type]


__all__ = ["RewardModel"]
