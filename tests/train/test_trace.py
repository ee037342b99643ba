"""What a trace on the meta device says, against what real tensors take and against sums by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    DeepseekV3Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from steerwell.models.attention import use_steerwell_attention
from steerwell.models.batch import build
from steerwell.models.forward import head, hidden_states, reward_scores, token_logps
from steerwell.train.memory import activation_bytes
from steerwell.train.trace import trace
from tiny import random_groups, token_group

VOCAB = 300
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
KINDS: dict[str, Any] = {
    "llama": LlamaConfig(**SIZES),
    "llama, one head each": LlamaConfig(**{**SIZES, "num_key_value_heads": 4}),
    "qwen3, tied": Qwen3Config(**SIZES, head_dim=16, tie_word_embeddings=True),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, **MOE),
    "gemma2": Gemma2Config(**SIZES, head_dim=16),
    "gpt_oss": GptOssConfig(**SIZES, head_dim=16, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **{**SIZES, "num_key_value_heads": 4, "num_hidden_layers": 3},
        first_k_dense_replace=1,
        moe_intermediate_size=24,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        q_lora_rank=16,
        kv_lora_rank=16,
    ),
}


def made(config: Any, *, meta: bool, kind: Any = AutoModelForCausalLM) -> Any:
    with torch.device("meta" if meta else "cpu"):
        model = kind.from_config(config, dtype=torch.float32).eval()
    use_steerwell_attention(model)
    return model


def really_saved(model: Any, batch: Any, pooling: Any = None) -> int:
    """Bytes of all storages that autograd keeps after the forward pass, weights and buffers left out."""
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, Any] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        if pooling is None:
            hidden = hidden_states(model, batch).index_select(0, batch.src)
            token_logps(hidden, head(model), batch.target)
        else:
            reward_scores(model, batch, pooling)
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", KINDS)
def test_saved_bytes_are_those_of_a_real_pass(name: str) -> None:
    """Within 4 %: token ids and masks are kept by a real pass and dropped at once by the trace, or the reverse."""
    groups = random_groups(1, groups=6, vocab=VOCAB, prompt=60, completion=50)
    real = really_saved(made(KINDS[name], meta=False), build(groups))
    said = activation_bytes(made(KINDS[name], meta=True), groups)
    assert said == pytest.approx(real, rel=0.04)


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_saved_bytes_of_a_reward_model(layout: Any, pooling: Any) -> None:
    config = LlamaConfig(**SIZES, num_labels=1)
    kind = AutoModelForSequenceClassification
    groups = random_groups(2, groups=5, vocab=VOCAB, prompt=50, completion=40)
    real = really_saved(made(config, meta=False, kind=kind), build(groups, layout), pooling)
    said = activation_bytes(made(config, meta=True, kind=kind), groups, layout=layout, pooling=pooling)
    assert said == pytest.approx(real, rel=0.03)


def test_products_are_those_of_the_sum_by_hand() -> None:
    """2 operations per weight and token forward, 4 backward; the head on scored positions only."""
    model = made(KINDS["llama"], meta=True)
    batch = build([token_group(list(range(20)), [list(range(30, 41)), list(range(50, 57))])])
    found = trace(model, batch)
    hidden, wide, heads, groups, size = 32, 80, 4, 2, 8
    weights = 2 * (2 * hidden * heads * size + 2 * hidden * groups * size + 3 * hidden * wide)
    assert (found.tokens, found.scored) == (38, 18)
    assert found.body.flops == 6 * weights * 38
    assert found.head.flops == 6 * 18 * VOCAB * hidden
    reading = trace(model, batch, backward=False)
    assert reading.body.flops == 2 * weights * 38
    assert reading.head.flops == 2 * 18 * VOCAB * hidden


def test_attention_is_counted_by_its_area() -> None:
    """One row of 24 tokens: scores and values, 2 operations each, over the whole square; 2.5 times that back."""
    model = made(KINDS["llama"], meta=True)
    found = trace(model, build([token_group(list(range(14)), [list(range(10))])], "rows"))
    layers, heads, size = 2, 4, 8
    assert found.body.attention == layers * heads * (2 + 5) * 2 * 24 * 24 * size


def test_the_peak_holds_gradients_that_were_there_before() -> None:
    model = made(KINDS["llama"], meta=True)
    batch = build(random_groups(3, groups=4, vocab=VOCAB))
    total = sum(p.numel() for p in model.parameters()) * 4
    first, later = trace(model, batch), trace(model, batch, accumulate=True)
    assert first.peak["gradients"] < total <= later.peak["gradients"]
    assert later.peak["activations"] == pytest.approx(first.peak["activations"], rel=0.1)
    assert all(p.grad is None for p in model.parameters())


def test_masters_take_each_gradient_away_at_once() -> None:
    model = made(KINDS["llama"], meta=True)
    batch = build(random_groups(3, groups=4, vocab=VOCAB))
    largest = max(p.numel() for p in model.parameters()) * 4
    assert trace(model, batch, masters=True).peak["gradients"] <= largest


def test_recomputing_layers_keeps_their_inputs_only() -> None:
    """What is kept: one input (T, hidden) per layer and the head's part. The layers' forward products are computed
    twice, all but the last one of each, whose result nothing needs.
    """
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": 6})
    model = made(config, meta=True)
    batch = build(random_groups(4, groups=6, vocab=VOCAB, prompt=60, completion=50))
    kept, again = trace(model, batch), trace(model, batch, checkpointing=True)
    assert again.saved < 0.5 * kept.saved
    assert again.saved >= 6 * batch.n_tokens * 32 * 4
    last = 6 * 32 * 80
    assert again.body.flops == kept.body.flops * 4 / 3 - 2 * last * batch.n_tokens
    assert trace(model, batch).saved == kept.saved


def test_a_small_chunk_of_the_head_is_what_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """The head of a CPU has other budgets than that of a GPU, and the trace knows for which it speaks."""
    import sys

    home = sys.modules[token_logps.__module__]
    for name in [name for name in vars(home) if name.endswith("_CPU")]:
        monkeypatch.setattr(home, name, 16 * VOCAB)
    model = made(KINDS["llama"], meta=True)
    batch = build(random_groups(5, groups=8, vocab=VOCAB, completion=60))
    small, large = trace(model, batch), trace(model, batch, accelerator=True)
    assert small.saved + len(batch.target) * VOCAB * 4 * 0.9 < large.saved
    kept = 2 * 16 * VOCAB * 32  # sixteen positions are not made again
    assert small.head.flops == pytest.approx(large.head.flops * 4 / 3 - kept)


def test_a_model_without_weights_takes_no_memory() -> None:
    config = AutoConfig.for_model("llama", **{**SIZES, "hidden_size": 8192, "intermediate_size": 28672})
    model = made(config, meta=True)
    assert sum(p.numel() for p in model.parameters()) > 1e9
    assert trace(model, build(random_groups(6, vocab=VOCAB))).peak["activations"] > 0
