"""Policies in and out of directories of the standard Hugging Face layout, and what loading any model takes.

Only safetensors are read, and no code from a model directory is run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
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
    add_adapter,
    asked_adapter,
    four_bits,
    merged,
)
from steerwell.models.batch import build, layout_for, pack
from steerwell.models.directory import (
    check_directory,
    first_line,
    from_hub,
    quiet,
    remembered_digest,
    save_directory,
    weights_digest,
)
from steerwell.models.encoder import is_encoder
from steerwell.models.forward import (
    adopt,
    per_token_logps,
    sum_by_owner,
    unwrap,
)
from steerwell.models.render import TEMPLATE_MEND, TokenizedGroup, ending, tokenize_groups

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_TOKENS = 16384  # encoded at once when nothing is trained


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
        with evaluating(self.model):
            return by_group(
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
    model, tokenizer = load_parts(AutoModelForCausalLM, path, device, dtype, asked)
    return Policy(
        model if asked is None else add_adapter(model, asked), tokenizer, name or name_of(path), str(path)
    )


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


def load_parts(
    kind: Any,
    path: str | Path,
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
    adapter: Adapter | None,
    *,
    labels: int | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The network and the tokenizer of a model directory, checked, on their device, and ready for batches. ``kind`` is
    the class of ``transformers`` that reads it. With ``labels`` its head of so many outputs need not be there: the
    caller has it. Raises :class:`InputError` for all that can be wrong with it.
    """
    place = check_directory(path)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = number_type(dtype, device)
    quantised = four_bits(adapter, device)
    how = how_to_read(place)
    _refuse_encoder(place, path, how)
    tokenizer = read_tokenizer(place, path, how)
    if not tokenizer.chat_template:
        raise InputError("the tokenizer has no chat template", file=path, mend=TEMPLATE_MEND)
    if quantised is not None:
        how |= {"quantization_config": quantised, "device_map": {"": device}}
    if labels is not None:
        how |= {"num_labels": labels}
    model, missing = read_network(kind, place, path, dtype, how)
    given = {"score.weight"} if labels is not None else set()
    refuse_missing(model, [name for name in missing if name not in given], path)
    check_rows(model, tokenizer, path)
    if quantised is None:
        model.to(device)
    adopt(model.eval())
    return model, tokenizer


def encoder_config(path: str | Path, how: Mapping[str, Any] | None = None) -> Any:
    """The configuration of a model if it is an encoder (:func:`steerwell.models.encoder.is_encoder`), else None.
    ``how`` is what :func:`how_to_read` said, if it was asked.
    """
    place = check_directory(path)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(place, **(how or how_to_read(place)))
    except (OSError, ValueError, KeyError):
        return None  # whoever loads the model says what is wrong
    return config if is_encoder(config) else None


def _refuse_encoder(place: str, path: str | Path, how: Mapping[str, Any]) -> None:
    config = encoder_config(place, how)
    if config is not None:
        kind = next(iter(config.architectures or ()), type(config).__name__)
        raise InputError(
            f"this is a {kind}, an encoder: it reads both ways and cannot write",
            file=path,
            mend='Train a reward model from it (objective = "bradley_terry"), or name a causal language model.',
        )


def how_to_read(place: str) -> dict[str, Any]:
    """What to tell ``from_pretrained``: to run no code, and not to wait for a network that is not there."""
    return {"trust_remote_code": False, "local_files_only": not from_hub(place)}


def read_tokenizer(place: str, path: str | Path, how: Mapping[str, Any]) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises :class:`InputError`, which names ``path``, where there is none."""
    with quiet():
        try:
            return AutoTokenizer.from_pretrained(place, **how)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(
                f"no tokenizer could be loaded ({first_line(error)})"
                if Path(place).is_dir()
                else f"no such directory, and no model of this name from the hub ({first_line(error)})",
                file=path,
                mend="Give a directory with tokenizer.json and tokenizer_config.json next to the model.",
            ) from error


def read_network(
    kind: Any, place: str, path: str | Path, dtype: torch.dtype, how: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    """The network of a model, by the class ``kind``, and the names of weights that its files lack (they have random
    values). Raises :class:`InputError` where it can't be read.
    """
    with quiet():
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
    return model, sorted(info["missing_keys"])


def refuse_missing(model: PreTrainedModel, missing: Sequence[str], path: str | Path) -> None:
    """Raise :class:`InputError` where weights are missing: ``transformers`` would go on with random numbers there."""
    if missing:
        raise InputError(
            f"{len(missing)} weights of a {type(model).__name__} are missing ({missing[0]})",
            file=path,
            mend="Name a directory of the right kind of model, with all of its weights.",
        )


def check_rows(model: Any, tokenizer: PreTrainedTokenizerBase, path: str | Path) -> None:
    """Raise :class:`InputError` where the tokenizer knows more tokens than the model."""
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer has {len(tokenizer)} tokens but the model has embeddings for {rows}",
            file=path,
            mend="Take the tokenizer that the model was trained with.",
        )


def by_group(
    groups: list[TokenizedGroup], values: Callable[[Any], torch.Tensor], model: Any, max_tokens: int
) -> list[list[Any]]:
    """``values`` of batches of the groups, under a token budget: one list per group, one number (or one list, where
    they are a table) per completion.
    """
    out: list[list[Any]] = [[] for _ in groups]
    for members, batch in batches(groups, model, max_tokens):
        for owner, value in zip(batch.group.tolist(), values(batch).tolist(), strict=True):
            out[members[owner]].append(value)
    return out


def batches(groups: list[TokenizedGroup], model: Any, max_tokens: int) -> Iterator[tuple[list[int], Any]]:
    """The groups that have completions, under a token budget: which they are, and their batch on the model's device."""
    layout, device = layout_for("auto", model), next(model.parameters()).device
    busy = [i for i, group in enumerate(groups) if group.sequences]
    for members in pack([groups[i] for i in busy], max_tokens, layout):
        own = [busy[i] for i in members]
        yield own, build([groups[i] for i in own], layout).to(device)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout inside; the model's mode is put back afterwards."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def name_of(path: str | Path) -> str:
    """What a model is called: the last part of its path."""
    return Path(path).name or str(path)


__all__ = [
    "MAX_TOKENS",
    "Policy",
    "batches",
    "by_group",
    "check_rows",
    "encoder_config",
    "evaluating",
    "how_to_read",
    "load_parts",
    "load_policy",
    "merged",
    "name_of",
    "number_type",
    "read_network",
    "read_tokenizer",
    "refuse_missing",
    "set_threads",
    "weights_digest",
]
