"""Groups made ready for training: tokenised once, with their targets as plain lists, checked before any step.

An :class:`Item` is one group. :func:`gather` puts the targets of several items together as tensors, in the
order of their completions; it is cheap enough to be done anew for every micro-batch.
"""

from __future__ import annotations

import hashlib
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.data.messages import digest
from steerwell.data.steps import SEPARATOR, check_steps, with_steps
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
from steerwell.train import targets
from steerwell.train.terms import Term, demonstrations, needed, prune

if TYPE_CHECKING:
    from steerwell.models.reward_model import RewardModel

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
    extra: dict[str, list[float]] = field(default_factory=dict)  # further targets by the name of their tensor


@dataclass(frozen=True)
class Prepared:
    """The items of a data set, and what became of the rest, for ``run.json``."""

    items: Seq[Item]
    about: dict[str, Any]


def prepare(
    groups: Seq[CompletionGroup],
    terms: Seq[Term],
    tokenizer: Any,
    max_length: int | None,
    layout: Layout = "auto",
    progress: Progress | None = None,
    *,
    into: Any = None,
    context: int | None = None,
    step_separator: str = SEPARATOR,
    reader: RewardModel | None = None,
) -> Prepared:
    """Tokenise what the terms read, a slice of the groups at a time; each group is asked for once. A group that
    ``max_length`` leaves nothing of to score is left out and counted. Completions without ``steps`` are cut by
    ``step_separator``, where steps are asked for.

    ``reader`` is a reward model that makes tokens in its own way (an encoder's pairs) and cuts them itself.
    The items go ``into`` what is given (an :class:`~steerwell.train.item_file.ItemFile`), else into a list.
    Raises :class:`InputError` when more than half of the groups cannot be used, for a pair of equal token
    sequences, for templates or completions that :func:`tokenize_groups` refuses, and for a sequence of more than
    ``context`` tokens (None: there is no limit).
    """
    items = [] if into is None else into
    account = _Account(max_length if reader is None else reader.limit(max_length), reader is not None)
    too_long: InputError | None = None
    first: tuple[CompletionGroup, InputError] | None = None
    refused = done = 0
    stepwise = "steps" in needed(terms)
    for part in _kept(groups, terms, account):
        if stepwise:
            part = [_cut(group, step_separator) for group in part]
        read = tokenize_groups(tokenizer, part) if reader is None else reader.tokenize(part, max_length)
        for group, tokens in zip(part, read, strict=True):
            if max_length is not None and not truncate(tokens, max_length):
                error = no_room(tokens, max_length)
                account.leave_out(f"the prompt leaves no room in max_length={max_length}")
            elif not all(map(scored_tokens, tokens.sequences)):
                error = _nothing_scored(tokens)
                account.leave_out("a completion has no token to score")
            else:
                item = _item(group, tokens, terms, layout, tokenizer)
                too_long = too_long or _longer(item, context)
                account.count(item)
                items.append(item)
                continue
            refused += 1
            first = first or (group, error)
        done += len(part)
        if progress is not None:
            progress("tokenize", done, len(groups) - account.untargeted, "")
    if first is not None and 2 * refused > done:
        group, error = first
        what = f"{refused} of {done} groups cannot be used; the first: {error.what}"
        raise about(group, InputError(what, file=error.file, mend=error.mend))
    if too_long is not None:
        raise too_long
    return Prepared(items, account.about())


def _kept(
    groups: Seq[CompletionGroup], terms: Seq[Term], account: _Account
) -> Iterator[list[CompletionGroup]]:
    """Slices of what the terms read of the groups. The last one comes when all groups have been seen."""
    part: list[CompletionGroup] = []
    for group in groups:
        kept = prune(group, terms)
        if kept is None:
            account.untargeted += 1
            continue
        if len(part) == TOKENIZE_AT_ONCE:
            yield part
            part = []
        part.append(kept)
    if part:
        yield part


def _cut(group: CompletionGroup, separator: str) -> CompletionGroup:
    """The group with steps for all completions; raises :class:`InputError` where they or their labels do not fit."""
    try:
        cut = with_steps(group, separator)
        check_steps(cut)
    except InputError as error:
        raise about(group, error) from error
    return cut


def _nothing_scored(tokens: TokenizedGroup) -> InputError:
    cut = "after it was cut to max_length " if any(tokens.truncated) else ""
    return InputError(
        f"a completion has no token to score {cut}".rstrip(),
        mend="Raise max_length." if cut else "Drop it, or write what it should say.",
    )


@dataclass
class _Account:
    """What becomes of the data, counted as it is read."""

    max_length: int | None
    encoder: bool = False  # they are cut so that the closing token stays, and prompts at their beginning
    untargeted: int = 0  # groups with no target that the objective takes
    groups: int = 0
    completions: int = 0
    pairs: int = 0
    tokens: int = 0
    scored: int = 0
    cut: int = 0
    cut_prompts: int = 0
    reasons: Counter[str] = field(default_factory=Counter)

    def leave_out(self, why: str) -> None:
        """A group that cannot be used, and why."""
        self.reasons[why] += 1

    def count(self, item: Item) -> None:
        """A group that is used."""
        self.groups += 1
        self.completions += len(item.lengths)
        self.pairs += len(item.pairs)
        self.tokens += item.size
        self.scored += sum(item.lengths)
        self.cut += sum(item.tokens.truncated)
        self.cut_prompts += item.tokens.cut_prompts

    def about(self) -> dict[str, Any]:
        """The counts for ``run.json``; ``notes`` are sentences about what was left out or cut."""
        nothing = {"no target that the objective takes": self.untargeted} if self.untargeted else {}
        reasons = Counter({**nothing, **self.reasons})
        left_out, share = reasons.total(), self.cut / max(1, self.completions)
        total = self.groups + left_out
        notes = [f"left out {n:,} of {total:,} groups: {why}" for why, n in reasons.items()]
        if self.cut:
            most = "; most completions end nowhere, and a policy may not learn to stop"
            lost = f"their end token{most if 2 * self.cut > self.completions else ''}"
            notes.append(
                f"cut {self.cut:,} of {self.completions:,} completions ({share:.1%}) to max_length="
                f"{self.max_length}: they have lost {'their end' if self.encoder else lost}"
            )
        if self.cut_prompts:
            notes.append(
                f"{self.cut_prompts:,} of {self.completions:,} completions are read after a prompt that has lost its "
                f"beginning to max_length={self.max_length}"
            )
        prompts = {"truncated_prompts": self.cut_prompts} if self.encoder else {}
        return {
            "groups": self.groups,
            "groups_left_out": left_out,
            "left_out": dict(reasons),
            "completions": self.completions,
            "pairs": self.pairs,
            "tokens": self.tokens,
            "scored_tokens": self.scored,
            "truncated_completions": self.cut,
            "truncated_share": share,
            **prompts,
            "notes": notes,
        }


def _item(
    group: CompletionGroup, tokens: TokenizedGroup, terms: Seq[Term], layout: Layout, tokenizer: Any
) -> Item:
    names = needed(terms)
    if any(term.kind == "reward" for term in terms):
        names -= {"scores"}  # the model's own
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
        extra=targets.made(names, group, tokens, tokenizer),
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


def gather(
    items: Seq[Item], names: set[str], device: torch.device, logps: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """Targets of several items as tensors: ``lengths``, ``group`` and those of ``names`` that items hold; recorded
    log-probs in the type ``logps``.
    """
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
    for name in {name for name in names for item in items if name in item.extra}:
        values = (x for item in items for x in item.extra[name])
        out[name] = targets.tensor(name, values, device, len(out["lengths"]))
    if "step_owner" in out:
        counts = torch.tensor([len(item.extra["step_owner"]) for item in items], device=device)
        before = torch.tensor([0, *(len(item.lengths) for item in items)], device=device).cumsum(0)[:-1]
        out["step_owner"] = out["step_owner"] + before.repeat_interleave(counts)
    for name in names & {"ref_logps", "ref_per_token_logps", "old_per_token_logps"}:
        if items and all(getattr(item, name) for item in items):
            out[name] = _floats((value for item in items for value in getattr(item, name)), device, logps)
    return out


def items_digest(items: Iterable[Item]) -> str:
    """A hash of all that training reads: token ids, targets, order."""
    state = hashlib.blake2b(digest_size=12)
    for item in items:
        for sequence in item.tokens.sequences:
            head = [len(sequence.ids), sequence.n_prompt, *(i for span in sequence.unscored for i in span)]
            state.update(array("q", [*head, *sequence.ids]).tobytes())
        whole = [*(i for pair in item.pairs for i in pair), *item.labels, *item.demonstrations]
        state.update(array("q", whole).tobytes())
        state.update(array("d", [*item.pair_probs, *item.rewards, *item.old_per_token_logps]).tobytes())
        for name, values in sorted(item.extra.items()):
            state.update(name.encode() + array("d", values).tobytes())
    return digest(state.hexdigest())


def _floats(values: Any, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(list(values), dtype=dtype, device=device)


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


def _longer(item: Item, context: int | None) -> InputError | None:
    """What to say of an item with a sequence of more tokens than the model reads; None where there is none."""
    longest = max(len(sequence.ids) for sequence in item.tokens.sequences)
    if context is None or longest <= context:
        return None
    error = InputError(
        f"a prompt with its completion has {longest} tokens; the model reads {context}",
        mend=f"Give max_length = {context} or less, or leave it out.",
    )
    return about(item.tokens.group, error)


__all__ = [
    "Item",
    "Prepared",
    "Progress",
    "gather",
    "items_digest",
    "prepare",
    "scored_tokens",
    "set_advantages",
]
