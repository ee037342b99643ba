"""Weights of tokens from two contrastive policies: which tokens made a completion better or worse (TIS-DPO)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.types import CompletionGroup
from steerwell.models.batch import build, layout_for, pack
from steerwell.models.forward import per_token_logps
from steerwell.models.load import MAX_TOKENS, Policy, evaluating

Speaker = Policy | tuple[Policy, str]


def contrast_weights(
    groups: Iterable[CompletionGroup],
    positive: Speaker,
    negative: Speaker,
    *,
    mu: float = 1.0,
    low: float = -0.5,
    high: float = 1.5,
    scale: float = 1.0,
    max_tokens: int = MAX_TOKENS,
) -> list[CompletionGroup]:
    """Groups with ``token_weights``: ``scale * exp(m * clamp(log positive(y_t) - log negative(y_t), low, high))``.

    m is ``mu`` for completions that are chosen more often than rejected, ``-mu`` for those rejected more often, and 0
    where the two are equal (arXiv:2410.04350, the estimate of token weights; its defaults). ``positive`` is a policy
    that leans to what is preferred, ``negative`` one that leans away from it: two models (trained by DPO on the pairs
    and on the pairs turned round, say), or one model under two system prompts, as (policy, prompt). Weights belong to
    the tokens of these policies' tokenizer: train a policy that has the same.

    Raises :class:`InputError` for tokenizers that cut a completion differently, and for groups without pairs.
    """
    groups = list(groups)
    if not any(group.pairs for group in groups):
        raise InputError(
            "token weights need pairs, to know which completions are preferred",
            mend="Resolve the annotations first: steerwell.resolve.majority(groups).",
        )
    if not low <= high:
        raise InputError(f"low must be at most high, got {low} and {high}")
    likes, dislikes = _logps(groups, positive, max_tokens), _logps(groups, negative, max_tokens)
    found: list[CompletionGroup] = []
    for group, up, down in zip(groups, likes, dislikes, strict=True):
        role = [0] * len(group.completions)
        for pair in group.pairs:
            role[pair.chosen] += 1
            role[pair.rejected] -= 1
        weights = []
        for sign, own, other in zip(role, up, down, strict=True):
            if len(own) != len(other):
                raise InputError(
                    f"the two policies cut a completion of prompt {group.prompt_id} into {len(own)} and "
                    f"{len(other)} tokens",
                    mend="Take two policies with one tokenizer.",
                )
            m = mu * ((sign > 0) - (sign < 0))
            weights.append(tuple((scale * torch.exp(m * (own - other).clamp(low, high))).tolist()))
        found.append(replace(group, token_weights=tuple(weights)))
    return found


@torch.no_grad()
def _logps(groups: Sequence[CompletionGroup], speaker: Speaker, max_tokens: int) -> list[list[torch.Tensor]]:
    """Of each completion the log-probs of its scored tokens, under a policy or under it with a system prompt."""
    policy, prompt = speaker if isinstance(speaker, tuple) else (speaker, "")
    asked = [_with_system(group, prompt) for group in groups] if prompt else groups
    tokens = policy.tokenize(asked)
    layout = layout_for("auto", policy.model)
    found: list[Any] = [None] * len(groups)
    with evaluating(policy.model):
        for members in pack(tokens, max_tokens, layout):
            batch = build([tokens[i] for i in members], layout).to(policy.device)
            logps = per_token_logps(policy.model, batch).double().cpu()
            parts = iter(logps.split(batch.lengths.long().tolist()))
            for i in members:
                found[i] = [next(parts) for _ in groups[i].completions]
    return found


def _with_system(group: CompletionGroup, prompt: str) -> CompletionGroup:
    """The group's texts under another system message; tokens that were sampled without it are rendered anew."""
    rest = tuple(m for m in group.prompt if m.role != "system")
    messages = (Message("system", prompt), *rest)
    return replace(
        group,
        prompt=messages,
        completions=tuple(replace(c, prompt=messages, prompt_token_ids=None) for c in group.completions),
    )


__all__ = ["contrast_weights"]
