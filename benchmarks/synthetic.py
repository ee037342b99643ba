"""Input for the training benchmarks: a small random model and preference data of seeded random tokens.

Token ``i`` is spelt ``ti``, so text and token ids are the same thing for every contender, and none can gain or
lose by its tokenisation. Lengths are log-normal.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

PAD, UNKNOWN, END = 0, 1, 2
FIRST_WORD = 10
SIGMA = 0.6  # spread of the logarithm of the lengths
LONGEST = 512
# What a template must write so that a chat is the bare words, with the end token behind an answer.
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} <eos>{% else %} {% endif %}"
    "{% endfor %}"
)


def qwen3_config(vocab: int, hidden: int = 256, layers: int = 4, **changes: Any) -> Any:
    """A Qwen3 with 8 query and 4 key-value heads, an MLP of three times the width, and tied embeddings."""
    from transformers import Qwen3Config

    sizes = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": hidden // 8,
        "intermediate_size": 3 * hidden,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": END,
        "pad_token_id": PAD,
    }
    return Qwen3Config(**{**sizes, **changes})


def word_tokenizer(vocab: int) -> Any:
    """One token for each word ``t10``, ``t11``, …; pad, unknown and end tokens before them."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<pad>": PAD, "<unk>": UNKNOWN, "<eos>": END, **{f"t{i}": i for i in range(3, vocab)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def spell(ids: list[int]) -> str:
    """The text of token ids."""
    return " ".join(f"t{i}" for i in ids)


def make_rows(
    n: int, *, vocab: int, prompt: int = 200, completion: int = 120, seed: int = 1
) -> list[list[list[int]]]:
    """``n`` rows of token ids [prompt, chosen, rejected], of log-normal lengths with the given means."""
    import numpy as np

    draw = np.random.default_rng(seed)

    def length(mean: int) -> int:
        return int(np.clip(draw.lognormal(math.log(mean) - SIGMA**2 / 2, SIGMA), 4, LONGEST))

    return [
        [draw.integers(FIRST_WORD, vocab, length(mean)).tolist() for mean in (prompt, completion, completion)]
        for _ in range(n)
    ]


def write_model(folder: Path, vocab: int, *, seed: int = 0, reward: bool = False, **changes: Any) -> int:
    """A model directory with random weights; with ``reward`` a sequence classifier with one label.

    Returns the number of parameters.
    """
    import torch
    from transformers import Qwen3ForCausalLM, Qwen3ForSequenceClassification

    torch.manual_seed(seed)
    config = qwen3_config(vocab, **changes)
    if reward:
        config.num_labels = 1
    model = (Qwen3ForSequenceClassification if reward else Qwen3ForCausalLM)(config)
    model.save_pretrained(folder)
    word_tokenizer(vocab).save_pretrained(folder)
    return sum(p.numel() for p in model.parameters())


def as_groups(rows: list[list[list[int]]], method: str) -> list[Any]:
    """The rows as steerwell's groups, with the targets that ``method`` takes."""
    from steerwell.data.messages import Message
    from steerwell.data.types import Completion, CompletionGroup, Pair

    groups = []
    for prompt, *completions in rows:
        asked = (Message("user", spell(prompt)),)
        answers = tuple(
            Completion(asked, (Message("assistant", spell(ids)),))
            for ids in (completions[:1] if method == "sft" else completions)
        )
        targets: dict[str, Any] = {
            "dpo": {"pairs": (Pair(0, 1),)},
            "reward": {"pairs": (Pair(0, 1),)},
            "strengths": {"pairs": (Pair(0, 1),), "pair_strengths": (strength_of(completions[0]),)},
            "kto": {"labels": (True, False)},
            "sft": {},
            "sample": {},
        }[method]
        groups.append(CompletionGroup(asked, answers, **targets))
    return groups


def strength_of(ids: list[int]) -> float:
    """A made-up strength of a pair, 1 to 3, told by the chosen completion's first token."""
    return 1.0 + ids[0] % 3


def save_json(path: Path, value: Any) -> None:
    """Write JSON aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    aside.replace(path)
