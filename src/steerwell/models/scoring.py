"""How the outputs of a reward model's head become a score: the recipe that is saved with the model.

It holds all that a score depends on besides the weights, so that a score is the same in training, in judging and in
serving: where the hidden states are read, what the outputs are and how they are put together, the scale, the
temperature of probabilities, and the chat template and stop token that the model was trained with.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from steerwell.data.errors import InputError, nearest
from steerwell.data.steps import SEPARATOR
from steerwell.models.forward import Pooling
from steerwell.models.render import ending
from steerwell.models.step_scores import check_aggregate

SCORING_FILE = "steerwell_scoring.json"
VERSION = 2
POOLINGS = ("last", "mean", "cls")
Template = Literal["chat", "pair"]
TEMPLATES = ("chat", "pair")
HEADS: dict[str, str] = {
    "score": "one score",
    "attributes": "one output for each named attribute",
    "quantiles": "quantiles of the score",
    "members": "members of an ensemble",
    "quality_length": "quality, and what length explains",
}
COMBINATIONS = ("mean", "min", "uwo")
Combination = Literal["mean", "min", "uwo"]


@dataclass(frozen=True)
class ScoringRecipe:
    """What turns a head's outputs into scores.

    pooling: which hidden states are read: ``last``, that of the completion's last token, or ``mean``, the mean over
    its scored tokens; on an encoder ``cls``, the model's own way, or ``mean``.
    head: what the outputs are (:data:`HEADS`), with their names in ``outputs``.
    weights: of attributes, where they are not 1 / A each and there is no gate. gate: whether the head has one
    (:mod:`steerwell.models.reward_head`). combine: how members become one score: ``mean``, ``min`` (worst case, WCO) or
    ``uwo``, mean - penalty * variance over the members (arXiv:2310.02743, sections 3.2 and 3.3; the variance divides
    by their number). levels, scales: what is taken off each member before, and what it is divided by then, from
    :meth:`~steerwell.models.reward_model.RewardModel.normalised`. A score is ``(combined - mean) / std``.
    temperature: s((a - b) / temperature) is the probability that a completion of score a is preferred to one of
    score b. cutpoints: of the model's ``ordinal`` objective.
    uncertainty: digest of the posterior beside the model (:mod:`steerwell.models.bayesian_head`); empty: it has none.
    aggregate: how a process reward model makes one score of those of the completion's steps (min, prod or last; see
    :mod:`steerwell.models.step_scores`), as ``step_separator`` cuts them; None: whole completions are scored.
    template: ``chat``, the tokenizer's chat template, or ``pair``, the two texts of an encoder
    (:mod:`steerwell.models.pairs`), together at most ``max_length`` tokens long (None: as many as the model reads).
    template_digest, stop: of the chat template and the token that ends a turn, as in training; empty: not recorded.
    """

    pooling: Pooling = "last"
    mean: float = 0.0
    std: float = 1.0
    head: str = "score"
    outputs: tuple[str, ...] = ("score",)
    weights: tuple[float, ...] | None = None
    gate: bool = False
    combine: Combination = "mean"
    penalty: float = 0.5
    levels: tuple[float, ...] | None = None
    scales: tuple[float, ...] | None = None
    temperature: float = 1.0
    cutpoints: tuple[float, ...] | None = None
    uncertainty: str = ""
    aggregate: str | None = None
    step_separator: str = SEPARATOR
    template: Template = "chat"
    max_length: int | None = None
    template_digest: str = ""
    stop: str = ""

    def __post_init__(self) -> None:
        for name in ("outputs", "weights", "cutpoints", "levels", "scales"):
            value = getattr(self, name)
            if isinstance(value, list):
                object.__setattr__(self, name, tuple(value))
        for name, known in (
            ("pooling", POOLINGS),
            ("head", HEADS),
            ("combine", COMBINATIONS),
            ("template", TEMPLATES),
        ):
            value = str(getattr(self, name))
            if value not in known:
                raise InputError(f"unknown {name} {value!r}", mend=nearest(value, known))
        other = {"chat": "cls", "pair": "last"}[self.template]
        if self.pooling == other:
            whose = "encoders" if other == "cls" else "decoders, which read from left to right"
            left = " or ".join(name for name in POOLINGS if name != other)
            raise InputError(f"pooling {other!r} is for {whose}", mend=f"Use {left}.")
        if self.max_length is not None and self.template == "chat":
            raise InputError("max_length of a scoring recipe is for encoders", mend="Leave it out.")
        check_aggregate(self.aggregate)
        if not self.std > 0:
            raise InputError(f"the scale of scores must be positive, got {self.std}", mend="Use std=1.0.")
        if not self.temperature > 0:
            raise InputError(f"the temperature must be positive, got {self.temperature}", mend="Use 1.0.")
        if not self.penalty >= 0:
            raise InputError(f"the penalty must be >= 0, got {self.penalty}", mend="Use penalty=0.5.")
        for name in ("weights", "levels", "scales"):
            given = getattr(self, name)
            if given is not None and len(given) != len(self.outputs):
                raise InputError(f"{len(given)} {name} for {len(self.outputs)} outputs", mend="One for each.")

    def to_json(self) -> str:
        """The text of :data:`SCORING_FILE`."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=2) + "\n"

    def digest(self) -> str:
        """A hash of all that it says. A name that is new and at its default changes nothing."""
        plain = {field.name: field.default for field in fields(self)}
        kept = {name: value for name, value in asdict(self).items() if value != plain[name]}
        return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=12).hexdigest()


def read_recipe(given: Mapping[str, Any], file: str | Path) -> ScoringRecipe:
    """A recipe from its JSON object; what an older version did not have keeps its default.

    Raises :class:`InputError` for a newer version, an unknown name or a value of the wrong kind.
    """
    version = given.get("version", 1)
    if not isinstance(version, int) or version > VERSION:
        raise InputError(
            f"the scoring recipe has version {version!r}, this steerwell reads {VERSION}",
            file=file,
            mend="Upgrade steerwell.",
        )
    values = {name: value for name, value in given.items() if name != "version"}
    known = [field.name for field in fields(ScoringRecipe)]
    for name in values:
        if name not in known:
            raise InputError(
                f"not a scoring recipe: unknown name {name!r}", file=file, mend=nearest(name, known)
            )
    try:
        return ScoringRecipe(**values)
    except TypeError as error:
        raise InputError(f"not a scoring recipe ({error})", file=file, mend="Write it again.") from error
    except InputError as error:
        raise InputError(error.what, file=file, mend=error.mend) from None


def combined(head_scores: Tensor, recipe: ScoringRecipe, gate: Tensor | None = None) -> Tensor:
    """One raw score per completion (N,) from the outputs (N, H), differentiable; ``gate`` (N, H) are its logits.

    attributes: the mean, a weighted sum by ``weights``, or with a gate the mean by softmax(gate) (arXiv:2406.12845,
    equation 4, without its verbosity correction); quantiles: their mean; members: see :class:`ScoringRecipe`;
    quality_length: quality alone (arXiv:2402.07319).
    """
    if recipe.head == "attributes" and gate is not None:
        return (gate.softmax(1) * head_scores).sum(1)
    if recipe.head == "attributes" and recipe.weights is not None:
        return head_scores @ head_scores.new_tensor(recipe.weights)
    if recipe.head in ("attributes", "quantiles"):
        return head_scores.mean(1)
    if recipe.head == "members":
        return by_members(member_scores(head_scores, recipe), recipe.combine, recipe.penalty)
    return head_scores[:, 0]


def member_scores(head_scores: Tensor, recipe: ScoringRecipe) -> Tensor:
    """The outputs (N, H) of members on one scale, where the recipe has ``levels`` and ``scales``."""
    if recipe.levels is not None:
        head_scores = head_scores - head_scores.new_tensor(recipe.levels)
    return head_scores if recipe.scales is None else head_scores / head_scores.new_tensor(recipe.scales)


def by_members(each: Tensor, combine: str, penalty: float) -> Tensor:
    """One score (N,) from those of members (N, H): their mean, their least (WCO), or mean - penalty * variance (UWO;
    arXiv:2310.02743, section 3; the variance divides by their number).
    """
    if combine == "min":
        return each.amin(1)
    if combine == "uwo":
        return each.mean(1) - penalty * each.var(1, correction=0)
    return each.mean(1)


def on_scale(
    recipe: ScoringRecipe, rows: Sequence[Sequence[float]], scores: Callable[[ScoringRecipe], list[float]]
) -> ScoringRecipe:
    """The recipe with which the scores of a reference set have mean 0 and standard deviation 1, and by which
    probabilities are as before.

    ``rows`` are the raw outputs of its completions (needed of members alone, which are brought to one level and scale
    first); ``scores`` gives its scores by a recipe. Raises :class:`InputError` for fewer than two different ones.
    """
    raw_temperature = recipe.temperature * recipe.std * statistics.fmean(recipe.scales or [1])
    plain = replace(recipe, mean=0.0, std=1.0)
    if recipe.head == "members":
        columns = [_scale(column) for column in zip(*rows, strict=True)]
        plain = replace(
            plain, levels=tuple(mean for mean, _ in columns), scales=tuple(std for _, std in columns)
        )
    mean, std = _scale(scores(plain))
    temperature = raw_temperature / (std * statistics.fmean(plain.scales or [1]))
    return replace(plain, mean=mean, std=std, temperature=temperature)


def _scale(raw: Sequence[float]) -> tuple[float, float]:
    """Mean and standard deviation."""
    if len(set(raw)) < 2:
        raise InputError(
            f"{len(raw)} completions with {len(set(raw))} different scores have no scale",
            mend="Give a reference set of some hundred completions.",
        )
    return statistics.fmean(raw), statistics.pstdev(raw)


def made_for(tokenizer: Any, recipe: ScoringRecipe) -> ScoringRecipe:
    """The recipe with ``template_digest`` and ``stop`` of this tokenizer."""
    template = getattr(tokenizer, "chat_template", None)
    if not template:
        return replace(recipe, template_digest="", stop="")
    text = template if isinstance(template, str) else json.dumps(template, sort_keys=True)
    stop = ending(tokenizer).stop_id
    word = "" if stop is None else str(tokenizer.convert_ids_to_tokens(stop))
    return replace(
        recipe, template_digest=hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), stop=word
    )


def check_tokenizer(recipe: ScoringRecipe, tokenizer: Any, file: str | Path) -> None:
    """Raise :class:`InputError` where the template or the stop token is another one than in training."""
    now = made_for(tokenizer, recipe)
    for name, what in (("template_digest", "chat template"), ("stop", "stop token")):
        before = getattr(recipe, name)
        if before and before != getattr(now, name):
            raise InputError(
                f"the {what} is not the one that this reward model was trained with, so its scores mean nothing",
                file=file,
                mend=f"Put the tokenizer files of the training run back, or delete {name!r} from {SCORING_FILE} "
                "if the change is meant.",
            )


def check_outputs(recipe: ScoringRecipe, model: Any, file: str | Path) -> None:
    """Raise :class:`InputError` where the model has another number of outputs than the recipe names."""
    labels = model.config.num_labels
    if labels != len(recipe.outputs):
        raise InputError(
            f"{type(model).__name__} has {labels} labels, and its scoring recipe names {len(recipe.outputs)}",
            file=file,
            mend=f"A reward model has one label, or a {SCORING_FILE} beside it that names its outputs.",
        )


__all__ = [
    "COMBINATIONS",
    "HEADS",
    "POOLINGS",
    "SCORING_FILE",
    "Combination",
    "ScoringRecipe",
    "by_members",
    "check_outputs",
    "check_tokenizer",
    "combined",
    "made_for",
    "member_scores",
    "on_scale",
    "read_recipe",
]
