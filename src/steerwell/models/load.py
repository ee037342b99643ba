"""Models in and out of directories: policies and reward models in the standard Hugging Face layout.

Only safetensors are read, and no code from a model directory is run.
"""

from __future__ import annotations

import copy
import hashlib
import json
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
from steerwell.models.adapters import (
    Adapter,
    AdapterKind,
    adapter_below_head,
    add_adapter,
    asked_adapter,
    four_bits,
    fresh_adapter,
    merged,
    without_adapter,
)
from steerwell.models.batch import build, layout_for, pack
from steerwell.models.classifier import check_classifier, classifier_on
from steerwell.models.directory import (
    check_directory,
    first_line,
    from_hub,
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
    adapter: AdapterKind = "lora",
    lora_alpha: float | None = None,
    lora_targets: Iterable[str] | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    name: str | None = None,
) -> Policy:
    """Load a causal language model from a directory, or by its name on the Hugging Face hub.

    ``lora`` adds a new adapter of that rank: then only the adapter is trained, and :meth:`Policy.save` merges
    it. ``adapter``, ``lora_alpha`` and ``lora_targets`` are as in
    :class:`~steerwell.models.adapters.Adapter`. ``device`` is a GPU where there is one. ``dtype`` is fp32 on
    a CPU and bf16 elsewhere, whatever the weights were saved in.

    Raises :class:`InputError` for a missing directory, one without config, tokenizer, chat template or
    safetensors, a model that is not a decoder or loses its own numbers (see :func:`forward.adopt`), and an
    adapter that cannot be had.
    """
    asked = asked_adapter(lora, adapter, lora_alpha, lora_targets)
    model, tokenizer = _load(AutoModelForCausalLM, path, device, dtype, asked)
    return Policy(
        model if asked is None else add_adapter(model, asked), tokenizer, name or _name(path), str(path)
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
    model, tokenizer = _load(AutoModelForSequenceClassification, path, device, dtype, asked)
    check_classifier(model, path)
    whole: Any = model if asked is None else add_adapter(model, asked)
    return RewardModel(whole, tokenizer, recipe, name or _name(path), str(path))


DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def number_type(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The type of weights: the one asked for (a torch type, or a name of one), else fp32 on a CPU and bf16
    elsewhere. Raises :class:`InputError` for an unknown name.
    """
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype.removeprefix("torch.") not in DTYPES:
        raise InputError(f"unknown dtype {dtype!r}", mend=nearest(dtype, DTYPES))
    return DTYPES[dtype.removeprefix("torch.")]


def _load(
    kind: Any,
    path: str | Path,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    adapter: Adapter | None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    place = check_directory(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = number_type(dtype, device)
    quantised = four_bits(adapter, device)
    how: dict[str, Any] = {"trust_remote_code": False, "local_files_only": not from_hub(place)}
    with quiet():
        try:
            tokenizer = AutoTokenizer.from_pretrained(place, **how)
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
        if quantised is not None:
            how |= {"quantization_config": quantised, "device_map": {"": device}}
        try:
            model, info = kind.from_pretrained(
                place, dtype=dtype, use_safetensors=True, output_loading_info=True, **how
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
    if quantised is None:
        model.to(device)
    adopt(model.eval())
    return model, tokenizer


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
