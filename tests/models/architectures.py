"""Tiny models of many architectures, made from configs: what each has that could go wrong is made to happen.

Windows are shorter than the sequences, soft caps and scales are far from 1, experts are chosen, embeddings are
tied where the architecture ties them. ``TREE`` models share prompts, ``PADDED`` ones get one sequence per row.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from steerwell.models.render import TokenizedGroup
from tiny import token_group

VOCAB, WINDOW = 96, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
NARROW = {k: v for k, v in SIZES.items() if k != "head_dim"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
BOTH_KINDS = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "max_position_embeddings": 256,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_conv_kernel_dim": 3,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_expand": 2}

# Standard deviation of weights: enough to tell texts apart. Gemma 4's many gates and norms amplify rounding.
SPREAD = {"gemma4_text": 0.08}

# The settings of each architecture, by the name that a config.json gives it.
TREE: dict[str, dict[str, Any]] = {
    "llama": SIZES,
    "qwen2": {**SIZES, "use_sliding_window": True, "max_window_layers": 1, "sliding_window": WINDOW},
    "qwen3": {**SIZES, "tie_word_embeddings": True},
    "qwen3_moe": {**SIZES, **EXPERTS},
    "mistral": {**SIZES, "sliding_window": WINDOW},
    "ministral3": {
        **SIZES,
        "sliding_window": WINDOW,
        "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.3},  # queries grow with their positions
    },
    "cohere": {**NARROW, "logit_scale": 0.25},
    "cohere2": {**SIZES, **BOTH_KINDS, "logit_scale": 0.25},
    "gemma2": {**SIZES, **BOTH_KINDS, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma3_text": {**SIZES, **BOTH_KINDS},
    "gemma4_text": {
        **SIZES,
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "global_head_dim": 16,
        "hidden_size_per_layer_input": 4,
        "vocab_size_per_layer_input": VOCAB,
        "final_logit_softcapping": 3.0,
    },
    "phi3": {**NARROW, "sliding_window": WINDOW},
    "olmo2": SIZES,
    "olmo3": {**SIZES, **BOTH_KINDS},
    "granite": {**NARROW, "logits_scaling": 4.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5},
    "smollm3": {**NARROW, "no_rope_layers": [1, 0]},
    "gpt_oss": {
        **SIZES,
        **BOTH_KINDS,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": YARN,
    },
    "deepseek_v3": {
        **NARROW,
        "num_key_value_heads": 4,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 12,
    },
    "glm4": SIZES,
    "starcoder2": {**NARROW, "sliding_window": WINDOW},
}
PADDED: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {**SIZES, **LINEAR},
    "qwen3_next": {**SIZES, **LINEAR, **EXPERTS, "shared_expert_intermediate_size": 24},
    "falcon_h1": {**SIZES, **MAMBA, "mamba_d_ssm": 64, "lm_head_multiplier": 0.3},
    "lfm2": {**NARROW, "layer_types": ["conv", "full_attention"]},
    "bamba": {**NARROW, **MAMBA, "attn_layer_indices": [1]},
    "granitemoehybrid": {
        **NARROW,
        **MAMBA,
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 48,
        "logits_scaling": 2.0,
    },
    "jamba": {
        **NARROW,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "num_experts": 2,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
    },
    "mamba2": {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 8,
        "num_heads": 8,
        "head_dim": 8,
        "n_groups": 2,
        "chunk_size": 8,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    },
    "recurrent_gemma": {
        **SIZES,
        "num_hidden_layers": 3,
        "lru_width": 32,
        "attention_window_size": WINDOW,
        "block_types": ["recurrent", "recurrent", "attention"],
    },
    "llama4_text": {**SIZES, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 6},
}


def make(name: str, *, classifier: bool = False, **settings: Any) -> PreTrainedModel:
    """A model with its own attention, in evaluation mode, with weights large enough to tell texts apart."""
    config = CONFIG_MAPPING[name](**{**(TREE.get(name) or PADDED.get(name) or SIZES), **settings})
    kind = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    if classifier:
        config.num_labels = 1
    own = "eager" if name in ("gemma2", "gpt_oss") else None  # sdpa knows no soft caps and no sinks
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind.from_config(config, **({"attn_implementation": own} if own else {}))
        with torch.no_grad():
            for weight in model.parameters():
                weight.normal_(0.0, SPREAD.get(name, 0.15)) if weight.ndim > 1 else weight.add_(
                    torch.randn_like(weight) * 0.1
                )
    return model.eval()


def has_classifier(name: str) -> bool:
    """Whether transformers has a sequence classifier of this architecture."""
    return CONFIG_MAPPING[name] in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING


def branching_groups() -> list[TokenizedGroup]:
    """Three groups: a branch point inside completions and one that is a prefix of another; one whose prompt
    continues a sequence of the first; one that shares nothing."""
    rng = random.Random(7)

    def words(count: int) -> list[int]:
        return [rng.randrange(2, VOCAB) for _ in range(count)]

    prompt, stem, other = words(11), words(9), words(8)
    first = token_group(prompt, [stem + words(4), other, stem + words(6), stem])
    second = token_group(prompt + other + words(3), [words(7), words(2)])
    return [first, second, token_group(words(3), [words(5), words(9)])]
