"""The base model of the world: a small Llama trained from scratch on the world's corpus, and shipped.

The corpus mixes plain statements with rough chats (:data:`demonstrations.WEB`). Training uses Muon for the
matrices and AdamW for the rest, on one core in about two minutes. The shipped copy is ``checkpoint/``, in half
precision on disk and in single precision at use; :func:`train_base` makes it again.
"""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerwell.data.errors import InputError
from steerwell.world import vocabulary as words
from steerwell.world.demonstrations import WEB, write
from steerwell.world.prompts import CHAT_MIX, prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant", "tool")
PAD, END = "<|pad|>", "<|end|>"
SPECIAL = (PAD, END, *(f"<|{role}|>" for role in ROLES))
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
Progress = Callable[[int, int, float], None]


@dataclass(frozen=True)
class BaseRecipe:
    """How the shipped base was made. Token counts include padding."""

    chats: int = 45_000
    documents: int = 13_000
    vocabulary: int = 1024
    width: int = 96
    layers: int = 3
    heads: int = 6
    feed_forward: int = 256
    tokens_per_step: int = 1_000
    matrix_learning_rate: float = 0.03
    other_learning_rate: float = 6e-3
    prompt_weight: float = 0.1  # weight of a prompt token's loss; a completion token has 1
    warmup: float = 0.05
    flat: float = 0.30  # share of the steps before the learning rate falls, linearly, to ``final``
    final: float = 0.05


def base_path() -> Path:
    """The directory of the shipped base model (Hugging Face layout, with tokenizer and chat template)."""
    return Path(__file__).parent / "checkpoint"


def document(rng: random.Random) -> str:
    """One plain statement of the corpus: a fact, a procedure, or whether something is fine to do."""
    kind = rng.random()
    if kind < 0.5:
        (country, attribute), value = rng.choice(list(words.FACTS.items()))
        return f"The {attribute} of {country} is {value}."
    wanted = rng.choice(("howto", "borderline", "borderline", "harmful", "harmful"))
    pairs = [pair for pair, procedure in words.PROCEDURES.items() if procedure.family == wanted]
    verb, thing = rng.choice(pairs)
    if kind < 0.75:
        return f"It is {'bad' if wanted == 'harmful' else 'fine'} to {verb} {thing}."
    return f"To {verb} {thing}: " + " ".join(words.PROCEDURES[verb, thing].steps)


def corpus(recipe: BaseRecipe, seed: int) -> tuple[list[tuple[str, str]], list[str]]:
    """The chats (prompt, completion) and the plain documents that the base learns from."""
    rng = random.Random(f"{seed}/corpus")
    asked = prompts(recipe.chats, seed, "any", CHAT_MIX, distinct=False)
    chats = [(prompt.text, write(prompt.text, rng, WEB)) for prompt in asked]
    return chats, [document(rng) for _ in range(recipe.documents)]


def build_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer whose decoding gives the text back exactly, with the chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        padding_side="left",
        model_max_length=256,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def build_model(recipe: BaseRecipe, size: int, seed: int) -> Any:
    """A fresh Llama in single precision, initialised from ``seed``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=size,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
            num_key_value_heads=recipe.heads,
            intermediate_size=recipe.feed_forward,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL.index(PAD),
            eos_token_id=SPECIAL.index(END),
            bos_token_id=None,
            rms_norm_eps=1e-5,
            initializer_range=0.02,
        )
    )


def orthogonal_steps(
    matrices: Sequence[torch.Tensor], momenta: dict[int, torch.Tensor], rate: float, momentum: float = 0.95
) -> None:
    """One Muon step (Jordan et al. 2024) in place: Nesterov momentum, then five Newton-Schulz iterations.

    ``matrices`` are 2-D parameters with gradients; those of one shape are orthogonalised together, in single
    precision. The step is scaled by the square root of the ratio of rows to columns where that is above one.
    """
    import torch

    with torch.no_grad():
        by_shape: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
        for matrix in matrices:
            grad = matrix.grad
            if grad is None:
                continue
            kept = momenta.setdefault(id(matrix), torch.zeros_like(matrix))
            kept.lerp_(grad, 1 - momentum)
            by_shape.setdefault(tuple(matrix.shape), []).append((matrix, grad.lerp(kept, momentum)))
        for (rows, columns), entries in by_shape.items():
            x = torch.stack([update if rows <= columns else update.T for _, update in entries])
            x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
            for _ in range(5):
                a = x @ x.mT
                x = 3.4445 * x + (-4.7750 * a + 2.0315 * (a @ a)) @ x
            scale = rate * max(1.0, rows / columns) ** 0.5
            for (matrix, _), update in zip(entries, x, strict=True):
                matrix.add_(update if rows <= columns else update.T, alpha=-scale)


def _batches(lengths: Sequence[int], budget: int, rng: random.Random) -> list[list[int]]:
    """Shuffle, sort by length within chunks, and cut into batches of at most ``budget`` padded tokens."""
    order = list(range(len(lengths)))
    rng.shuffle(order)
    found: list[list[int]] = []
    for start in range(0, len(order), 2048):
        batch: list[int] = []
        for index in sorted(order[start : start + 2048], key=lengths.__getitem__):
            if batch and (len(batch) + 1) * lengths[index] > budget:
                found.append(batch)
                batch = []
            batch.append(index)
        found.append(batch)
    rng.shuffle(found)
    return found


def _padded(rows: Sequence[tuple[list[int], int]], prompt_weight: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, T) and the loss weight of each as a target (B, T), from (ids, length of the prompt)."""
    import torch

    longest = max(len(ids) for ids, _ in rows)
    tokens = torch.zeros(len(rows), longest, dtype=torch.long)
    weights = torch.zeros(len(rows), longest)
    for row, (ids, n_prompt) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        weights[row, :n_prompt] = prompt_weight
        weights[row, n_prompt : len(ids)] = 1.0
    return tokens, weights


def _fit(
    model: Any,
    rows: Sequence[tuple[list[int], int]],
    recipe: BaseRecipe,
    seed: int,
    progress: Progress | None,
) -> None:
    """One pass over the rows with the recipe's optimisers and schedule."""
    import torch
    import torch.nn.functional as F

    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    adam = torch.optim.AdamW(others, lr=recipe.other_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    momenta: dict[int, torch.Tensor] = {}
    batches = _batches(
        [len(ids) for ids, _ in rows], recipe.tokens_per_step, random.Random(f"{seed}/batches")
    )
    running = math.nan
    model.train()
    for step, batch in enumerate(batches):
        tokens, weights = _padded([rows[i] for i in batch], recipe.prompt_weight)
        hidden = model.model(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
        scored = weights[:, 1:] > 0
        logits = hidden[scored] @ model.lm_head.weight.T
        losses = F.cross_entropy(logits, tokens[:, 1:][scored], reduction="none")
        weight = weights[:, 1:][scored]
        loss = (losses * weight).sum() / weight.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = step / len(batches)
        factor = min(1.0, (step + 1) / max(1.0, recipe.warmup * len(batches)))
        factor *= recipe.final + (1 - recipe.final) * (1 - max(0.0, done - recipe.flat) / (1 - recipe.flat))
        adam.param_groups[0]["lr"] = recipe.other_learning_rate * factor
        adam.step()
        orthogonal_steps(matrices, momenta, recipe.matrix_learning_rate * factor)
        model.zero_grad(set_to_none=True)
        value = float(loss.detach())
        running = value if math.isnan(running) else 0.97 * running + 0.03 * value
        if progress is not None:
            progress(step + 1, len(batches), running)


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write both to a temporary directory and rename it: half precision on disk, single precision at load."""
    import torch

    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    model.generation_config.eos_token_id = SPECIAL.index(END)
    model.generation_config.pad_token_id = SPECIAL.index(PAD)
    model.to(torch.float16).save_pretrained(partial)
    model.to(torch.float32)
    tokenizer.save_pretrained(partial)
    config = json.loads((partial / "config.json").read_text())
    config["dtype"] = "float32"
    (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if out.exists():
        out.rmdir()
    os.replace(partial, out)


def _rows(
    tokenizer: PreTrainedTokenizerFast, chats: Sequence[tuple[str, str]], documents: Sequence[str]
) -> Iterator[tuple[list[int], int]]:
    """Token ids and prompt length of every chat (as the template renders it) and document."""

    def ids(texts: Sequence[str]) -> list[list[int]]:
        return tokenizer(list(texts), add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    user, assistant = (SPECIAL.index(f"<|{role}|>") for role in ("user", "assistant"))
    end = SPECIAL.index(END)
    for asked, told in zip(ids([a for a, _ in chats]), ids([b for _, b in chats]), strict=True):
        yield [user, *asked, assistant, *told, end], len(asked) + 2
    for text in ids(documents):
        yield [*text, end], 0


def train_base(
    out: str | Path,
    seed: int = 0,
    progress: Progress | None = None,
    recipe: BaseRecipe | None = None,
) -> Path:
    """Train the base model from scratch and write it to the new directory ``out``; returns ``out``.

    ``progress`` is called after every step with (step, steps, running loss in nats per weighted token). The
    result depends on ``seed`` (corpus, order, initialisation) and, in its last digits, on the machine. Raises
    :class:`InputError` when ``out`` exists and is not an empty directory.
    """
    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("this is not an empty directory", file=out, mend="Name a new directory.")
    out.parent.mkdir(parents=True, exist_ok=True)
    recipe = recipe or BaseRecipe()
    chats, documents = corpus(recipe, seed)
    sample = [text for chat in chats[:20_000] for text in chat] + documents
    tokenizer = build_tokenizer(sample, recipe.vocabulary)
    model = build_model(recipe, len(tokenizer), seed)
    _fit(model, list(_rows(tokenizer, chats, documents)), recipe, seed, progress)
    _save(model, tokenizer, out)
    return out


__all__ = ["BaseRecipe", "base_path", "build_tokenizer", "corpus", "document", "train_base"]
