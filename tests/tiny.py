"""Tiny models, tokenizers and policy directories for tests: made in code, no network, a few kilobytes.

model = tiny_llama()                      # 2 layers, hidden 32, 4 heads, 2 key-value heads
tokenizer = tiny_tokenizer()              # one token per byte, chat template, pad != eos
path = tiny_policy_dir(tmp_path)          # a complete Hugging Face directory of the two
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from steerwell.data.types import CompletionGroup
from steerwell.models.render import Sequence, TokenizedGroup

PAD, END, BEGIN, USER, ASSISTANT, SYSTEM, TOOL, DEVELOPER = range(8)
SPECIAL = (
    "<|pad|>",
    "<|end|>",
    "<|begin|>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|tool|>",
    "<|developer|>",
)
MERGES = ("t h", "th e", "i n", "a n", "Ġ the", "e r", "o u", "y ou")
VOCAB = 8 + 256 + len(MERGES)  # 272
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Like Qwen's: a newline follows the end token, which a model never samples.
NEWLINE_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "bos_token_id": None,
    "eos_token_id": END,
    "pad_token_id": PAD,
}


def tiny_tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 272 tokens: 8 special ones, the bytes, and a few merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [(left, right) for left, right in (merge.split() for merge in MERGES)]
    words = [*SPECIAL, *alphabet, *("".join(merge) for merge in merges)]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, merges, unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" ?\w+|\s|[^\w\s]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens(list(SPECIAL))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
    tokenizer.chat_template = template
    return tokenizer


def tiny_llama(vocab: int = VOCAB, *, seed: int = 0, **settings) -> LlamaForCausalLM:
    """A Llama with random weights that are large enough for its log-probs to tell texts apart."""
    return _random(LlamaForCausalLM, LlamaConfig(vocab_size=vocab, **{**SIZES, **settings}), seed)


def tiny_qwen3(vocab: int = VOCAB, *, seed: int = 0, **settings) -> Qwen3ForCausalLM:
    """A Qwen3 (norms on queries and keys, tied embeddings) with random weights."""
    sizes = {**SIZES, "head_dim": 16, "tie_word_embeddings": True, **settings}
    return _random(Qwen3ForCausalLM, Qwen3Config(vocab_size=vocab, **sizes), seed)


def _random(kind, config, seed: int):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind(config)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, 0.15)
    return model.eval()


def token_group(prompt: list[int], completions: list[list[int]]) -> TokenizedGroup:
    """A tokenised group straight from token ids."""
    sequences = [Sequence([*prompt, *ids], len(prompt)) for ids in completions]
    return TokenizedGroup(sequences, CompletionGroup(()), [False] * len(sequences))


def random_groups(
    seed: int, *, groups: int = 4, vocab: int = VOCAB, prompt: int = 24, completion: int = 14
) -> list[TokenizedGroup]:
    """Groups of random tokens with every kind of branch: prompts that continue an earlier group's sequence,
    completions that begin alike, that are equal, and one that is a prefix of another."""
    rng = random.Random(seed)

    def words(longest: int) -> list[int]:
        return [rng.randrange(8, vocab) for _ in range(rng.randint(1, longest))]

    made: list[TokenizedGroup] = []
    for _ in range(groups):
        history = rng.choice(rng.choice(made).sequences).ids if made and rng.random() < 0.4 else []
        stem, completions = words(completion), [words(completion) for _ in range(rng.randint(0, 2))]
        for _ in range(rng.randint(1, 3)):
            completions.append(stem[: rng.randint(0, len(stem))] + words(completion))
        if rng.random() < 0.5:
            completions += [completions[-1] + words(completion), list(completions[-1])]
        rng.shuffle(completions)
        made.append(token_group(history + words(prompt), completions))
    return made


def tiny_policy_dir(
    tmp_path: Path,
    *,
    name: str = "tiny",
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    """Save a model (a tiny Llama by default) and its tokenizer as a Hugging Face directory; its path."""
    path = Path(tmp_path) / name
    (model or tiny_llama()).save_pretrained(path)
    (tokenizer or tiny_tokenizer()).save_pretrained(path)
    return path
