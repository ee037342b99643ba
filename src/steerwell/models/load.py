"""Models in and out of directories: policies and reward models in the standard Hugging Face layout.

Only safetensors are read, and no code from a model directory is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steerwell.data.errors import InputError, nearest
from steerwell.data.messages import Message
from steerwell.data.types import CompletionGroup, Prompt
from steerwell.models.batch import build, layout_for, pack
from steerwell.models.directory import (
    check_directory,
    first_line,
    quiet,
    read_json,
    remembered_digest,
    save_directory,
    weights_digest,
)
from steerwell.models.forward import (
    Pooling,
    adopt,
    per_token_logps,
    reward_scores,
    sum_by_owner,
    unwrap,
)
from steerwell.models.render import TEMPLATE_MEND, TokenizedGroup, ending, tokenize_groups

if TYPE_CHECKING:
    from collections.abc import Callable

SCORING_FILE = "steerwell_scoring.json"
MAX_TOKENS = 16384  # encoded at once when nothing is trained
POOLINGS = ("last", "mean")


def set_threads(n: int = 1) -> None:
    """Torch threads of this process. Contended threads run many times slower than one, so commands use 1."""
    torch.set_num_threads(n)


@dataclass(eq=False)
class Policy:
    """A language model that answers, with its tokenizer and chat template."""

    model: Any  # PreTrainedModel, or peft's wrapper of one
    tokenizer: PreTrainedTokenizerBase
    name: str
    path: str = ""
    _digest: tuple[Any, str] | None = field(default=None, repr=False)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Tokens that end a completion: the generation config's, the tokenizer's and the template's."""
        generation = getattr(unwrap(self.model), "generation_config", None)
        named = getattr(generation, "eos_token_id", None)
        ids = [*named] if isinstance(named, Sequence) else [named]
        ids += [self.tokenizer.eos_token_id, ending(self.tokenizer).stop_id]
        return tuple(sorted({i for i in ids if i is not None}))

    def digest(self) -> str:
        """Identity of the weights: equal weights have equal digests. Computed again when they changed."""
        self._digest = remembered_digest(self.model, self._digest)
        return self._digest[1]

    def sample(
        self,
        prompts: Sequence[Prompt | str | Sequence[Message | Mapping[str, Any]]],
        n: int = 1,
        *,
        max_new_tokens: int = 256,
        temperature: float = 1.0,
        greedy: bool = False,
        seed: int = 0,
        batch_size: int = 256,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[CompletionGroup]:
        """Draw ``n`` completions of each prompt; see :func:`steerwell.models.sampler.sample`."""
        from steerwell.models.sampler import sample

        return sample(
            self,
            prompts,
            n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            greedy=greedy,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )

    def tokenize(
        self, groups: Iterable[CompletionGroup], max_length: int | None = None
    ) -> list[TokenizedGroup]:
        """Token ids of groups; see :func:`steerwell.models.render.tokenize_groups`."""
        return tokenize_groups(self.tokenizer, groups, max_length)

    @torch.no_grad()
    def logps(self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS) -> list[list[float]]:
        """Summed log-probability (nats) of every completion given its prompt, one list per group."""
        with _evaluating(self.model):
            return _by_group(
                self.tokenize(groups),
                lambda batch: sum_by_owner(per_token_logps(self.model, batch), batch.owner, batch.n),
                self.model,
                max_tokens,
            )

    def save(self, path: str | Path) -> Path:
        """Write a complete model directory (weights, tokenizer, template), adapters merged; returns its path.

        An older model directory of that name is replaced. Raises :class:`InputError` when something else is
        there.
        """
        return save_directory(merged(self.model), self.tokenizer, Path(path))

    def copy(self) -> Policy:
        """An independent copy with equal weights, on the same device."""
        return Policy(copy.deepcopy(self.model), self.tokenizer, self.name, self.path, self._digest)


@dataclass(frozen=True)
class ScoringRecipe:
    """How raw outputs become scores: which states are read, and ``(raw - mean) / std``."""

    pooling: Pooling = "last"
    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise InputError(f"unknown pooling {self.pooling!r}", mend=nearest(str(self.pooling), POOLINGS))
        if not self.std > 0:
            raise InputError(f"the scale of scores must be positive, got {self.std}", mend="Use std=1.0.")


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

        Raises :class:`InputError` for an architecture without a sequence classifier in ``transformers``.
        """
        source = merged(policy.model)
        config = copy.deepcopy(source.config)
        config.num_labels = 1
        config.get_text_config().pad_token_id = config.pad_token_id = _pad_id(policy.tokenizer)
        config.architectures = None
        try:
            model = AutoModelForSequenceClassification.from_config(
                config, dtype=source.dtype, attn_implementation="sdpa"
            )
        except ValueError as error:
            raise InputError(
                f"{type(source).__name__} has no sequence classifier", mend="Choose another base model."
            ) from error
        _check_classifier(model, policy.path or None)
        model.base_model.load_state_dict(source.base_model.state_dict())
        with torch.no_grad():
            noise = torch.Generator().manual_seed(0)
            shape = model.score.weight.shape
            model.score.weight.copy_(torch.randn(shape, generator=noise) * 0.01 / shape[1] ** 0.5)
        model.to(policy.device).eval()  # type: ignore[arg-type]
        adopt(model)
        return cls(model, policy.tokenizer, ScoringRecipe(pooling), name or f"{policy.name}-reward")

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def digest(self) -> str:
        """Identity of the weights and the recipe."""
        self._digest = remembered_digest(self.model, self._digest)
        words = json.dumps(asdict(self.recipe), sort_keys=True)
        return hashlib.blake2b((self._digest[1] + words).encode(), digest_size=12).hexdigest()

    def tokenize(
        self, groups: Iterable[CompletionGroup], max_length: int | None = None
    ) -> list[TokenizedGroup]:
        """Token ids of groups; see :func:`steerwell.models.render.tokenize_groups`."""
        return tokenize_groups(self.tokenizer, groups, max_length)

    @torch.no_grad()
    def score(self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS) -> list[list[float]]:
        """The score of every completion, one list per group; the same whatever else is in the batch."""
        with _evaluating(self.model):
            raw = _by_group(
                self.tokenize(groups),
                lambda batch: reward_scores(self.model, batch, self.recipe.pooling),
                self.model,
                max_tokens,
            )
        return [[(x - self.recipe.mean) / self.recipe.std for x in scores] for scores in raw]

    def save(self, path: str | Path) -> Path:
        """Write a complete model directory with its scoring recipe; see :meth:`Policy.save`."""
        recipe = json.dumps({"version": 1, **asdict(self.recipe)}, indent=2) + "\n"
        return save_directory(merged(self.model), self.tokenizer, Path(path), {SCORING_FILE: recipe})

    def copy(self) -> RewardModel:
        """An independent copy with equal weights, on the same device."""
        return RewardModel(
            copy.deepcopy(self.model), self.tokenizer, self.recipe, self.name, self.path, self._digest
        )


def load_policy(
    path: str | Path,
    *,
    lora: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
) -> Policy:
    """Load a causal language model from a directory, or by its name on the Hugging Face hub.

    ``lora`` adds a new adapter of that rank to every linear layer below the head; then only the adapter is
    trained, and :meth:`Policy.save` merges it. ``device`` is a GPU where there is one. ``dtype`` is fp32 on
    a CPU and the saved one elsewhere.

    Raises :class:`InputError` for a missing directory, one without config, tokenizer, chat template or
    safetensors, and a model that is not a decoder or loses its own numbers (see :func:`forward.adopt`).
    """
    model, tokenizer = _load(AutoModelForCausalLM, path, device, dtype)
    if lora is not None:
        model = _add_adapter(model, lora)
    return Policy(model, tokenizer, name or _name(path), str(path))


def load_reward_model(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
) -> RewardModel:
    """Load a reward model: a sequence classifier with one label. Without a recipe it reads the last token.

    Raises :class:`InputError` as :func:`load_policy` does, and for a directory that holds a language model.
    """
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
    model, tokenizer = _load(AutoModelForSequenceClassification, path, device, dtype)
    _check_classifier(model, path)
    return RewardModel(model, tokenizer, recipe, name or _name(path), str(path))


def _load(
    kind: Any, path: str | Path, device: str | torch.device | None, dtype: str | torch.dtype | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place = check_directory(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else "auto")
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"no tokenizer could be loaded ({first_line(error)})"
                if Path(place).is_dir()
                else f"no such directory, and no model of this name from the hub ({first_line(error)})",
                file=path,
                mend="Give a directory with tokenizer.json and tokenizer_config.json next to the model.",
            ) from error
        if not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template", file=path, mend=TEMPLATE_MEND)
        try:
            model, info = kind.from_pretrained(
                place, dtype=dtype, use_safetensors=True, trust_remote_code=False, output_loading_info=True
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise InputError(
                f"the model could not be loaded ({first_line(error)})",
                file=path,
                mend="It must be a complete Hugging Face directory with safetensors weights.",
            ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would go on with random numbers there
        raise InputError(
            f"{len(missing)} weights of a {type(model).__name__} are missing ({missing[0]})",
            file=path,
            mend="Name a directory of the right kind of model, with all of its weights.",
        )
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model has embeddings for {rows}",
            file=path,
            mend="Take the tokenizer that the model was trained with.",
        )
    model.to(device).eval()
    adopt(model)
    return model, tokenizer


def _check_classifier(model: Any, path: Any) -> None:
    if getattr(model.config, "num_labels", None) != 1 or not isinstance(
        getattr(model, "score", None), nn.Linear
    ):
        raise InputError(
            f"{type(model).__name__} with {model.config.num_labels} labels is not a reward model",
            file=path,
            mend="A reward model is a sequence classifier with one label.",
        )


def _add_adapter(model: PreTrainedModel, rank: int) -> Any:
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise InputError(f"lora must be a positive rank, got {rank}", mend="Use lora=16.")
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    with warnings.catch_warnings():  # peft asks transformers under names that are going out of use
        warnings.simplefilter("ignore", FutureWarning)
        return get_peft_model(model, config).eval()


def merged(model: Any) -> PreTrainedModel:
    """The ``transformers`` model with its adapters merged in: a copy when there are adapters, else itself."""
    if not hasattr(model, "merge_and_unload"):
        return model
    return copy.deepcopy(model).merge_and_unload()


def _by_group(
    groups: list[TokenizedGroup], values: Callable[[Any], torch.Tensor], model: Any, max_tokens: int
) -> list[list[float]]:
    layout, device = layout_for("auto", model), next(model.parameters()).device
    out: list[list[float]] = [[] for _ in groups]
    busy = [i for i, group in enumerate(groups) if group.sequences]
    for members in pack([groups[i] for i in busy], max_tokens, layout):
        batch = build([groups[busy[i]] for i in members], layout).to(device)
        for owner, value in zip(batch.group.tolist(), values(batch).tolist(), strict=True):
            out[busy[members[owner]]].append(value)
    return out


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; the model's mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else ending(tokenizer).stop_id or 0)  # type: ignore[arg-type]


def _name(path: str | Path) -> str:
    return Path(path).name or str(path)


__all__ = [
    "Policy",
    "RewardModel",
    "ScoringRecipe",
    "load_policy",
    "load_reward_model",
    "merged",
    "set_threads",
    "weights_digest",
]
