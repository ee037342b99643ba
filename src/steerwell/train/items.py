"""Groups made ready for training: tokenised once, with their targets as plain lists, checked before any step.

An :class:`Item` is one group. :func:`gather` puts the targets of several items together as tensors, in the
order of their completions; it is cheap enough to be done anew for every micro-batch.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.data.types import CompletionGroup
from steerwell.models.batch import Layout, n_tokens
from steerwell.models.render import (
    Sequence,
    TokenizedGroup,
    about,
    no_room,
    tokenize_groups,
    truncate,
)
from steerwell.objectives import advantages as advantage_table
from steerwell.train.terms import Term, demonstrations, needed, prune

TOKENIZE_AT_ONCE = 256
OLD_NAMES = frozenset({"old_per_token_logps", "old_logps"})
Progress = Callable[[str, int, int, str], None]


@dataclass(slots=True)
class Item:
    """One tokenised group. ``ref_logps`` and ``ref_per_token_logps`` are filled in when they are computed
    once.
    """

    tokens: TokenizedGroup
    prompt_id: str
    size: int  # tokens that the model reads for it
    lengths: list[int]
    pairs: list[tuple[int, int]]
    pair_probs: list[float]
    labels: list[bool]
    rewards: list[float]
    demonstrations: list[bool]
    old_per_token_logps: list[float]
    advantages: list[float] = field(default_factory=list)
    ref_logps: list[float] = field(default_factory=list)
    ref_per_token_logps: list[float] = field(default_factory=list)
    finished: list[bool | None] = field(default_factory=list)


@dataclass(frozen=True)
class Prepared:
    """The items of a data set, and what became of the rest, for ``run.json``."""

    items: list[Item]
    about: dict[str, Any]


def prepare(
    groups: Seq[CompletionGroup],
    terms: Seq[Term],
    tokenizer: Any,
    max_length: int | None,
    layout: Layout = "auto",
    progress: Progress | None = None,
) -> Prepared:
    """Tokenise what the terms read. A group that ``max_length`` leaves nothing of to score is left out and
    counted.

    Raises :class:`InputError` when that is so for more than half of the groups, for a pair of equal token
    sequences, and for templates or completions that :func:`tokenize_groups` refuses.
    """
    kept = [pruned for group in groups if (pruned := prune(group, terms)) is not None]
    items: list[Item] = []
    refused: list[tuple[CompletionGroup, InputError]] = []
    reasons: Counter[str] = Counter()
    if len(kept) < len(groups):
        reasons["no target that the objective takes"] = len(groups) - len(kept)
    for start in range(0, len(kept), TOKENIZE_AT_ONCE):
        part = kept[start : start + TOKENIZE_AT_ONCE]
        for group, tokens in zip(part, tokenize_groups(tokenizer, part), strict=True):
            if max_length is not None and not truncate(tokens, max_length):
                refused.append((group, no_room(tokens, max_length)))
                reasons[f"the prompt leaves no room in max_length={max_length}"] += 1
            elif not all(map(scored_tokens, tokens.sequences)):
                refused.append((group, _nothing_scored(tokens)))
                reasons["a completion has no token to score"] += 1
            else:
                items.append(_item(group, tokens, terms, layout))
        if progress is not None:
            progress("tokenize", min(start + TOKENIZE_AT_ONCE, len(kept)), len(kept), "")
    if 2 * len(refused) > len(kept):
        group, error = refused[0]
        what = f"{len(refused)} of {len(kept)} groups cannot be used; the first: {error.what}"
        raise about(group, InputError(what, file=error.file, mend=error.mend))
    return Prepared(items, _account(items, reasons, max_length))


def _nothing_scored(tokens: TokenizedGroup) -> InputError:
    cut = "after it was cut to max_length " if any(tokens.truncated) else ""
    return InputError(
        f"a completion has no token to score {cut}".rstrip(),
        mend="Raise max_length." if cut else "Drop it, or write what it should say.",
    )


def _account(items: Seq[Item], reasons: Counter[str], max_length: int | None) -> dict[str, Any]:
    """What became of the data, for ``run.json``; ``notes`` are sentences about what was left out or cut."""
    completions = sum(len(item.lengths) for item in items)
    cut = sum(sum(item.tokens.truncated) for item in items)
    left_out = reasons.total()
    notes = [f"left out {n:,} of {len(items) + left_out:,} groups: {why}" for why, n in reasons.items()]
    if cut:
        most = (
            "; most completions end nowhere, and a policy may not learn to stop"
            if 2 * cut > completions
            else ""
        )
        notes.append(
            f"cut {cut:,} of {completions:,} completions ({cut / completions:.1%}) to max_length={max_length}: "
            f"they have lost their end token{most}"
        )
    return {
        "groups": len(items),
        "groups_left_out": left_out,
        "left_out": dict(reasons),
        "completions": completions,
        "pairs": sum(len(item.pairs) for item in items),
        "tokens": sum(item.size for item in items),
        "scored_tokens": sum(sum(item.lengths) for item in items),
        "truncated_completions": cut,
        "truncated_share": cut / max(1, completions),
        "notes": notes,
    }


def _item(group: CompletionGroup, tokens: TokenizedGroup, terms: Seq[Term], layout: Layout) -> Item:
    names = needed(terms)
    lengths = [scored_tokens(sequence) for sequence in tokens.sequences]
    prompt_id = group.prompt_id
    if "pairs" in names:
        _refuse_equal_pairs(group, tokens)
    old: list[float] = []
    if names & OLD_NAMES or any(term.kind == "policy_gradient" for term in terms):
        for completion, length in zip(group.completions, lengths, strict=True):
            if completion.old_logps is not None and len(completion.old_logps) >= length:
                old += completion.old_logps[:length]
            elif names & OLD_NAMES:
                error = InputError(
                    "a completion has no old_logps for its tokens",
                    mend="Sample it with policy.sample, or train on steerwell.rollouts.",
                )
                raise about(group, error)
    if len(old) != sum(lengths):
        old = []
    return Item(
        tokens=tokens,
        prompt_id=prompt_id,
        size=n_tokens(tokens, layout),
        lengths=lengths,
        pairs=[(pair.chosen, pair.rejected) for pair in group.pairs],
        pair_probs=[pair.p for pair in group.pairs],
        labels=[label is True for label in group.labels or ()],
        rewards=[math.nan if score is None else float(score) for score in group.scores or ()],
        demonstrations=demonstrations(group) if "demonstrations" in names else [],
        old_per_token_logps=old,
        finished=[completion.finished for completion in group.completions],
    )


def scored_tokens(sequence: Sequence) -> int:
    """How many tokens of a sequence are scored."""
    return len(sequence.ids) - sequence.n_prompt - sum(b - a for a, b in sequence.unscored)


def set_advantages(items: Seq[Item], name: str) -> None:
    """Advantages over all the completions of a step, by the named rule."""
    rewards = torch.tensor([reward for item in items for reward in item.rewards])
    group = torch.tensor([g for g, item in enumerate(items) for _ in item.rewards])
    values = iter(advantage_table.compute(name, rewards, group).tolist())
    for item in items:
        item.advantages = [next(values) for _ in item.rewards]


def gather(items: Seq[Item], names: set[str], device: torch.device) -> dict[str, Tensor]:
    """Targets of several items as tensors: ``lengths``, ``group`` and those of ``names`` that items hold."""
    out: dict[str, Tensor] = {
        "lengths": _floats((n for item in items for n in item.lengths), device),
        "group": torch.tensor([g for g, item in enumerate(items) for _ in item.lengths], device=device),
    }
    if "pairs" in names:
        chosen: list[int] = []
        rejected: list[int] = []
        start = 0
        for item in items:
            for c, r in item.pairs:
                chosen.append(start + c)
                rejected.append(start + r)
            start += len(item.lengths)
        out["pairs"] = torch.tensor([chosen, rejected], dtype=torch.long, device=device)
    for name in names & {"labels", "demonstrations"}:
        flags = [flag for item in items for flag in getattr(item, name)]
        out[name] = torch.tensor(flags, dtype=torch.bool, device=device)
    for name in names & {"pair_probs", "rewards", "advantages"}:
        out[name] = _floats((value for item in items for value in getattr(item, name)), device)
    for name in names & {"ref_logps", "ref_per_token_logps", "old_per_token_logps"}:
        if items and all(getattr(item, name) for item in items):
            out[name] = _floats((value for item in items for value in getattr(item, name)), device)
    return out


def items_digest(items: Seq[Item]) -> str:
    """A hash of all that training reads: token ids, targets, order."""
    state = hashlib.blake2b(digest_size=12)
    for item in items:
        for sequence in item.tokens.sequences:
            head = [len(sequence.ids), sequence.n_prompt, *(i for span in sequence.unscored for i in span)]
            state.update(array("q", [*head, *sequence.ids]).tobytes())
        whole = [*(i for pair in item.pairs for i in pair), *item.labels, *item.demonstrations]
        state.update(array("q", whole).tobytes())
        state.update(array("d", [*item.pair_probs, *item.rewards, *item.old_per_token_logps]).tobytes())
    return digest(state.hexdigest())


def _floats(values: Any, device: torch.device) -> Tensor:
    return torch.tensor(list(values), dtype=torch.float32, device=device)


def _refuse_equal_pairs(group: CompletionGroup, tokens: TokenizedGroup) -> None:
    for pair in group.pairs:
        if tokens.sequences[pair.chosen].ids == tokens.sequences[pair.rejected].ids:
            cut = tokens.truncated[pair.chosen] or tokens.truncated[pair.rejected]
            words = group.completions[pair.chosen].text[:60]
            error = InputError(
                f"chosen and rejected are equal{' after they were cut to max_length' if cut else ''}: {words!r}",
                mend="Raise max_length." if cut else "Drop the pair: it says nothing.",
            )
            raise about(group, error)


def refuse_longer(items: Seq[Item], context: int | None) -> None:
    """Raise :class:`InputError` for a sequence of more than ``context`` tokens (None: there is no limit)."""
    for item in items if context is not None else ():
        longest = max(len(sequence.ids) for sequence in item.tokens.sequences)
        if longest > context:  # type: ignore[operator]
            error = InputError(
                f"a prompt with its completion has {longest} tokens; the model reads {context}",
                mend=f"Give max_length = {context} or less, or leave it out.",
            )
            raise about(item.tokens.group, error)


__all__ = [
    "Item",
    "Prepared",
    "Progress",
    "gather",
    "items_digest",
    "prepare",
    "refuse_longer",
    "scored_tokens",
    "set_advantages",
]
