"""Tiny encoders of four families with tokenizers of pairs, made in code.

model = tiny_encoder("bert")              # a bare backbone: 2 layers, hidden 32
path = encoder_dir(tmp_path, "bert")      # with its tokenizer, as a directory
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    BertConfig,
    DebertaV2Config,
    ModernBertConfig,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:?!{}\"'-_"
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CONFIGS: dict[str, tuple[Any, dict[str, Any]]] = {
    "bert": (BertConfig, {"pad_token_id": 0}),
    "roberta": (RobertaConfig, {"pad_token_id": 1, "type_vocab_size": 1, "max_position_embeddings": 130}),
    "deberta": (
        DebertaV2Config,
        {
            "pad_token_id": 0,
            "type_vocab_size": 0,
            "relative_attention": True,
            "max_relative_positions": -1,
            "position_buckets": 8,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
        },
    ),
    "modernbert": (
        ModernBertConfig,
        {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "local_attention": 8},
    ),
}
FAMILIES = tuple(CONFIGS)


def word_pieces(**settings: Any) -> PreTrainedTokenizerFast:
    """A WordPiece of single letters, lower case, as BERT frames a pair: [CLS] a [SEP] b [SEP], types 0 and 1."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = [*special, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    vocabulary = {word: i for i, word in enumerate(words)}
    inner = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    inner.normalizer = normalizers.BertNormalizer()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    inner.decoder = decoders.WordPiece()
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, model_max_length=128, **{"model_input_names": inputs, **names, **settings}
    )


def byte_pieces() -> PreTrainedTokenizerFast:
    """A byte-level BPE without merges, as RoBERTa frames a pair: <s> a </s></s> b </s>, no types."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    inner = Tokenizer(models.BPE({word: i for i, word in enumerate(words)}, [], unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0), add_prefix_space=False)
    inner.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        cls_token="<s>",
        sep_token="</s>",
        unk_token="<unk>",
        model_max_length=128,
        model_input_names=["input_ids", "attention_mask"],
    )


def tokenizer_for(family: str) -> PreTrainedTokenizerFast:
    """The tokenizer of a family."""
    if family == "roberta":
        return byte_pieces()
    if family == "modernbert":  # it knows no token types
        return word_pieces(model_input_names=["input_ids", "attention_mask"])
    return word_pieces()


def tiny_encoder(family: str, kind: Any = AutoModel, seed: int = 0, **settings: Any) -> Any:
    """A network of a family with random weights that are large enough to tell texts apart."""
    config, own = CONFIGS[family]
    size = len(tokenizer_for(family))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = kind.from_config(config(**{**SIZES, "vocab_size": size, **own, **settings}))
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim > 1:
                    weight.normal_(0.0, 0.15)
    return model.eval()


def encoder_dir(tmp_path: Path, family: str, kind: Any = AutoModel, **settings: Any) -> Path:
    """A directory of an encoder: bare by default, or with a head of ``kind``."""
    path = Path(tmp_path) / f"{family}-{kind.__name__}"
    tiny_encoder(family, kind, **settings).save_pretrained(path)
    tokenizer_for(family).save_pretrained(path)
    return path


def classifier_dir(tmp_path: Path, family: str, labels: int = 1, **settings: Any) -> Path:
    """A directory of a trained-looking classifier, without a recipe of ours."""
    return encoder_dir(tmp_path, family, AutoModelForSequenceClassification, num_labels=labels, **settings)


__all__ = [
    "FAMILIES",
    "AutoModelForMaskedLM",
    "byte_pieces",
    "classifier_dir",
    "encoder_dir",
    "tiny_encoder",
    "tokenizer_for",
    "word_pieces",
]
