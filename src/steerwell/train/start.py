"""Where a run starts from: the model that is given, the one that is changed, and the one that it is held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.models.adapter_files import is_adapter
from steerwell.models.adapters import Adapter, fresh_adapter, scalings, settings_of
from steerwell.models.directory import model_place
from steerwell.models.encoder import head_parts
from steerwell.models.load import Policy, encoder_config, load_policy, weights_digest
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import ScoringRecipe
from steerwell.models.sharding import shard, skeleton
from steerwell.train.config import HEAD_RATE, LEARNING_RATES, LORA_FACTOR, TrainConfig
from steerwell.train.heads import AskedHead, fitted_head
from steerwell.train.precision import dtype_of, in_dtype, keep_fine, resolved_dtype
from steerwell.train.ranks import Ranks, current, mesh
from steerwell.train.reference import Reference, base_digest
from steerwell.train.sources import derived_seed
from steerwell.train.terms import Term, needed

Model = Policy | RewardModel


def load_model(
    path: str | Path,
    reward: bool,
    adapter: Adapter | None = None,
    asked: TrainConfig | None = None,
    head: AskedHead | None = None,
) -> Model:
    """A model from its directory, or from a run directory (its ``model``). A bare encoder comes as a new reward
    model with the ``head`` that is asked for, read as ``asked`` says.
    """
    head = head or AskedHead()
    place = model_place(path)
    config = Path(place) / "config.json"
    if reward and is_adapter(place):
        return load_reward_model(place, **settings_of(adapter))
    if reward and config.is_file() and "ForSequenceClassification" in config.read_text("utf-8"):
        return load_reward_model(place, **settings_of(adapter))
    if reward and encoder_config(place) is not None:
        named = asked is not None and "pooling" in asked.model_fields_set
        return RewardModel.from_encoder(
            place,
            pooling=asked.pooling if asked is not None and named else "cls",
            max_length=None if asked is None else asked.max_length,
            head=head.kind,
            outputs=head.outputs,
            **settings_of(adapter),
        )
    return load_policy(place, **settings_of(adapter))


def completed(config: TrainConfig, terms: Sequence[Term], given: Model) -> TrainConfig:
    """The configuration with what depends on the model filled in: the learning rate by kind (ten times as high
    with an adapter), and the dtype that "auto" means on its device.
    """
    dtype = resolved_dtype(config.dtype, given.device, dtype_of(given.model))
    found: dict[str, Any] = {"dtype": str(dtype).removeprefix("torch.")}
    if isinstance(given, RewardModel) and given.recipe.template == "pair":
        found["pooling"] = given.recipe.pooling
    elif config.pooling == "cls":
        ScoringRecipe("cls")  # says whose it is
    if config.learning_rate is None:
        factor = LORA_FACTOR if hasattr(given.model, "peft_config") else 1.0
        found["learning_rate"] = HEAD_RATE if config.train_only else LEARNING_RATES[_kind(terms)] * factor
    if config.aggregate is None and "step_scores" in needed(terms) and "scores" not in needed(terms):
        found["aggregate"] = "min"
    return config.model_copy(update=found)


def _kind(terms: Sequence[Term]) -> str:
    kinds = {term.kind for term in terms}
    if "reward" in kinds:
        return "reward"
    if "policy_gradient" in kinds:
        return "policy_gradient"
    return "sft" if all(term.name == "sft" for term in terms) else "policy"


def start_digest(given: Model) -> str:
    """The digest of the weights that decide the run: without a new adapter's, which is drawn from the
    seed.
    """
    if not fresh_adapter(given.model):
        return given.digest()
    rest = [(name, p) for name, p in given.model.named_parameters() if "lora_" not in name]
    shapes = [[n, list(p.shape)] for n, p in given.model.named_parameters() if "lora_" in n]
    plain = {f"p{i:06d}": parameter.detach() for i, (_, parameter) in enumerate(rest)}
    recipe = given.recipe.digest() if isinstance(given, RewardModel) else None
    return digest(weights_digest(plain), [name for name, _ in rest], shapes, scalings(given.model), recipe)


def to_train(given: Model, head: AskedHead | None, owned: bool, config: TrainConfig) -> Model:
    """The model that will be changed: never the caller's own. With ``head`` it is a reward model that has it. A new
    adapter is drawn anew from the seed, so that a run that is started again before its first checkpoint is the
    same run.
    """
    if isinstance(given, Policy) and head is not None:
        trained: Model = RewardModel.from_policy(
            given, pooling=config.pooling, head=head.kind, outputs=head.outputs
        )
    else:
        trained = given if owned else given.copy()
    if isinstance(trained, RewardModel) and head is not None:
        trained = fitted_head(trained, head)
        if config.aggregate is not None and trained.recipe.template == "pair":
            raise InputError(
                "an encoder reads all steps at once and cannot score one by what is before it",
                mend="Train process rewards on a causal language model.",
            )
        if config.aggregate is not None and trained.recipe.aggregate is None:
            trained = trained.with_recipe(aggregate=config.aggregate, step_separator=config.step_separator)
        if trained.recipe.template == "pair":  # scored as it is trained
            trained = trained.with_recipe(max_length=config.max_length or trained.recipe.max_length)
        _restrict(trained, config)
    if fresh_adapter(trained.model):
        generator = torch.Generator().manual_seed(derived_seed(config.seed, "adapter", 0))
        with torch.no_grad():
            for name, parameter in trained.model.named_parameters():
                if "lora_A" in name:
                    bound = parameter.shape[1] ** -0.5
                    drawn = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                    parameter.copy_(drawn)
    return trained


def _restrict(model: RewardModel, config: TrainConfig) -> None:
    """Leave only what ``train_only`` names to be trained."""
    if config.train_only is None:
        return
    if hasattr(model.model, "peft_config"):
        raise InputError("train_only is not used with an adapter", mend="Leave one of the two out.")
    if config.train_only == "gate" and not model.recipe.gate:
        raise InputError(
            "this reward model has no gate", mend='Train attributes first: objective = "regression".'
        )
    network = model.model
    if model.recipe.template == "pair":
        part = {id(p) for module in head_parts(network) for p in module.parameters() if p.requires_grad}
    else:
        head = network.score.gate if config.train_only == "gate" else network.score
        part = {id(p) for p in head.parameters()}
    for parameter in network.parameters():
        parameter.requires_grad_(id(parameter) in part)


def named_reference(asked: Any, given: Model, start: str) -> Reference:
    """The reference that is asked for: "start", a policy or a path. The model of "start" is put in by
    :func:`live_reference`.
    """
    if isinstance(asked, str) and asked == "start":
        return Reference("start", start)
    model = asked if isinstance(asked, Policy) else load_model(asked, reward=False)
    if len(model.tokenizer) != len(given.tokenizer):
        raise InputError(
            "the reference has another vocabulary than the policy", mend="Use a reference of the same family."
        )
    lent = model is asked and current().alone  # several processes would spread the caller's own
    held = model if lent or model is not asked else model.copy()
    return Reference("policy", model.digest(), held.model, weights=model.digest())


def live_reference(
    reference: Reference, given: Model, trained: Model, *, first_only: bool, lent: bool, dtype: torch.dtype
) -> Reference:
    """Give "start" its model: the adapter switched off where that is the same; the model in training, where it
    is asked before the first update ``first_only``; the caller's own policy, if it is ``lent``; or a copy. A
    model of its own computes in ``dtype``, as the one in training does.
    """
    if reference.kind == "start" and fresh_adapter(trained.model):
        return replace(reference, model=trained.model, adapter_off=True, weights=base_digest(trained.model))
    if reference.kind == "start":
        reference = replace(reference, weights=given.digest())
        if first_only:
            return replace(reference, model=trained.model)
        reference = replace(reference, model=given.model if lent else given.copy().model)
    if reference.model is None:
        return reference
    return replace(reference, model=in_dtype(reference.model, dtype))


def spread(trained: Model, reference: Reference, ranks: Ranks, dtype: torch.dtype) -> Any:
    """Spread the models of a run over the processes; returns the skeleton of the trained one, for the end.

    Where ``dtype`` is coarser than float32 FSDP does what :class:`~steerwell.train.precision.MasterWeights` does
    in one process.
    """
    bones, over = skeleton(trained.model), mesh(ranks)
    coarse = dtype if keep_fine(trained.model, dtype) else None
    shard(trained.model, over, coarse)
    if reference.model is not None and reference.model is not trained.model:
        shard(reference.model, over, coarse)
    return bones


__all__ = [
    "Model",
    "completed",
    "live_reference",
    "load_model",
    "named_reference",
    "spread",
    "start_digest",
    "to_train",
]
