"""What a model says about a batch: log-probs of the scored tokens, hidden states, reward scores.

And the door that every model comes in by: :func:`adopt` sees to it that its numbers here are its own numbers.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.attention import (
    NAME,
    refusal,
    refuse_other_ways,
    takes_tree,
    unwrap,
    use_steerwell_attention,
)
from steerwell.models.batch import Batch, padded, tree
from steerwell.models.encoder import encoder_outputs, is_encoder
from steerwell.models.head import Head, head, token_logps
from steerwell.models.render import Sequence, TokenizedGroup
from steerwell.models.sharding import inside

Pooling = Literal["last", "mean", "cls"]


def per_token_logps(
    model: nn.Module, batch: Batch, *, temperature: float = 1.0, chunk: int | None = None
) -> Tensor:
    """Log-probabilities (nats) of the scored tokens, (S,) in fp32, differentiable.

    ``temperature`` divides the logits, as it does in sampling. ``chunk`` is how many positions go through the
    head at once; by default as many as keep the logits below 64 MiB (512 MiB on an accelerator).
    """

    def run() -> Tensor:
        hidden = hidden_states(model, batch).index_select(0, batch.src)
        return token_logps(hidden, head(model), batch.target, temperature=temperature, chunk=chunk)

    return inside(model, run)


def sum_by_owner(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """(S,) values of tokens -> (n,) sums over each completion's tokens, added up in float64."""
    exact = values if values.device.type == "mps" else values.double()
    return exact.new_zeros(n).index_add(0, owner, exact).to(values.dtype)


def reward_scores(model: nn.Module, batch: Batch, pooling: Pooling = "last") -> Tensor:
    """The first output of a sequence classifier, (N,) in fp32, differentiable; see :func:`head_outputs`."""
    return head_outputs(model, batch, pooling)[0][:, 0]


def head_outputs(
    model: nn.Module, batch: Batch, pooling: Pooling = "last", *, gated: bool = False
) -> tuple[Tensor, Tensor | None]:
    """All outputs of a sequence classifier, (N, H) in fp32, and, if ``gated``, the logits (N, H) of its gate (None
    otherwise); differentiable.

    ``last`` reads the hidden state of each completion's last token (as ``transformers`` does), ``mean`` the
    mean over its scored tokens. Encoders take ``cls`` and ``mean``: see
    :func:`steerwell.models.encoder.encoder_outputs`. The gate reads the prompt's last token.
    """
    found = inside(model, _outputs, model, batch, pooling, gated)
    if not gated:
        return found, None
    count = found.shape[1] // 2
    return found[:, :count], found[:, count:]


def pooled_states(model: nn.Module, batch: Batch, pooling: Pooling = "last") -> Tensor:
    """What the head of a sequence classifier reads of each completion, (N, D) in fp32, differentiable."""
    return inside(model, lambda: _pooled(hidden_states(model, batch), batch, pooling).float().clone())


def _outputs(model: nn.Module, batch: Batch, pooling: Pooling, gated: bool) -> Tensor:
    if is_encoder(unwrap(model).config):
        return encoder_outputs(unwrap(model), batch, pooling).clone()
    hidden = hidden_states(model, batch)
    score: Any = unwrap(model).score
    # FSDP wants a tensor of its own, not a view
    read = [_pooled(hidden, batch, pooling).to(score.weight.dtype)]
    if gated:
        first = batch.lengths.long().cumsum(0) - batch.lengths.long()
        read.append(hidden.index_select(0, batch.src[first]).to(score.weight.dtype))
    return score(*read).float().clone()


def _pooled(hidden: Tensor, batch: Batch, pooling: Pooling) -> Tensor:
    if pooling == "last":
        return hidden.index_select(0, batch.last)
    if pooling == "mean":
        states = hidden.index_select(0, batch.at)
        total = hidden.new_zeros(batch.n, hidden.shape[1]).index_add(0, batch.owner, states)
        return total / batch.lengths[:, None].to(total.dtype)
    raise ValueError(f"unknown pooling {pooling!r}: choose last or mean")


def hidden_states(model: nn.Module, batch: Batch) -> Tensor:
    """The backbone's last hidden states at all flat positions, (T, hidden)."""
    inner = unwrap(model)
    limit = _rescaled_beyond(inner.config.get_text_config())
    if batch.longest > limit:
        raise InputError(
            f"a sequence has {batch.longest} tokens, and beyond {limit} this {type(inner).__name__} changes the "
            "scale of all positions of a batch, so that numbers would depend on neighbours",
            mend=f"Set max_length = {limit} or less.",
        )
    ours = inner.config._attn_implementation == NAME
    if ours:
        batch = batch.flat()
    elif batch.plan is not None:  # it would read the packed row as one text
        raise RuntimeError(
            f"{type(inner).__name__} runs with its own attention, which follows no plan: "
            "switch it with adopt, and ask layout_for which layout it takes"
        )
    inputs: dict[str, Any] = {"input_ids": batch.input_ids, "use_cache": False}
    if ours:
        inputs |= {"position_ids": batch.position_ids, "plan": batch.plan}
    return backbone(inner)(**inputs).last_hidden_state.flatten(0, 1)


def backbone(model: PreTrainedModel) -> Any:
    """The part of a model below its head. (Llama 4 keeps it under another name than it says.)"""
    outer: Any = model
    return outer.model if model.base_model is model and hasattr(model, "model") else model.base_model


def _rescaled_beyond(config: Any) -> float:
    """The length up to which rotary positions do not depend on the longest sequence of a batch."""
    rope = getattr(config, "rope_parameters", None) or {}
    each = rope.values() if rope and all(isinstance(x, dict) for x in rope.values()) else [rope]
    limits = [
        x.get("original_max_position_embeddings") or config.max_position_embeddings
        for x in each
        if x.get("rope_type") == "longrope" or "dynamic" in str(x.get("rope_type"))
    ]
    return min(limits, default=float("inf"))


# Architectures that the tests compare with their own attention; others are compared when they are loaded.
_LLAMA_LIKE = ("llama", "mistral", "ministral3", "qwen2", "qwen3", "qwen3_moe", "phi3", "granite", "smollm3")
_OTHERS = ("cohere", "cohere2", "deepseek_v3", "glm4", "gpt_oss", "olmo2", "olmo3", "starcoder2")
COMPARED = frozenset((*_LLAMA_LIKE, *_OTHERS, "gemma2", "gemma3_text", "gemma4_text"))


@torch.no_grad()
def adopt(model: PreTrainedModel) -> None:
    """Make a newly loaded model ready for batches, and make sure that it still gives its own numbers.

    A model whose layers are all softmax attention is switched to ours, and takes trees. Any other decoder keeps
    its own attention and takes padded rows.

    Raises :class:`InputError` for models that do not read from left to right, that lose the plan on the way to
    attention, whose head is not linear, and whose numbers on a small batch differ from their own.
    """
    if model.config.model_type in COMPARED and takes_tree(model):
        use_steerwell_attention(model)
        return
    refuse_other_ways(model)
    anything: Any = model.eval()
    rows = anything.get_input_embeddings().weight.shape[0]
    ids = [[(7 * i + 3) % rows for i in branch] for branch in ((0, 1, 2, 3, 4, 5), (0, 1, 2, 6))]
    groups = [TokenizedGroup([Sequence(x, 3) for x in ids], CompletionGroup(()), [False] * 2)]
    own = [backbone(model)(input_ids=_row(x, anything), use_cache=False) for x in ids]
    whole = torch.cat([out.last_hidden_state[0, 3:] for out in own])
    has_head = anything.get_output_embeddings() is not None
    logits = [anything(input_ids=_row(x, anything)).logits[0, 2:-1].float() for x in ids if has_head]
    if takes_tree(model):
        use_steerwell_attention(model)
    batch = (tree if takes_tree(model) else padded)(groups).to(anything.device)
    try:
        errors = [_distance(hidden_states(model, batch).index_select(0, batch.at), whole)]
    except RuntimeError as error:
        if "no plan reached" not in str(error):
            raise
        raise refusal(model, "does not hand its keyword arguments on to its attention") from error
    if has_head:
        expected = torch.cat(logits).log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
        errors.append(_distance(per_token_logps(model, batch), expected))
    if not max(errors) < (1e-3 if whole.dtype == torch.float32 else 5e-2):
        raise refusal(model, f"does not give its own numbers here (relative error {max(errors):.2g})")


def _row(ids: list[int], model: PreTrainedModel) -> Tensor:
    return torch.tensor([ids], device=model.device)


def _distance(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).float().norm() / expected.float().norm())


__all__ = [
    "COMPARED",
    "Head",
    "Pooling",
    "adopt",
    "backbone",
    "head",
    "head_outputs",
    "hidden_states",
    "per_token_logps",
    "pooled_states",
    "reward_scores",
    "sum_by_owner",
    "token_logps",
    "unwrap",
]
