"""Flat token batches that live for one step, in two layouts with equal numbers.

``tree``: each shared prefix is encoded once and completions branch from it, position ids continuing from the
branch point. ``rows``: each completion has a copy of its prompt. Neither has padding.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from steerwell.models.attention import Node, TreePlan
from steerwell.models.render import Sequence, TokenizedGroup

Layout = Literal["auto", "tree", "rows"]
# A shorter overlap between two completions is encoded twice: a branch point costs more than it saves.
MIN_SHARED = 8
# Different groups share a beginning (a system prompt, an agent's history) when it has this many tokens.
MIN_SHARED_BETWEEN_GROUPS = 32


@dataclass(slots=True)
class Batch:
    """N completions with S scored tokens, packed into T tokens.

    =============== ===== ========================================================================
    input_ids       (1,T) token ids
    position_ids    (1,T) depth of each token in its own sequence
    plan            -     who sees whom; travels to the attention function
    src             (S,)  flat position whose output predicts …
    target          (S,)  … this token …
    at              (S,)  … which itself lies here
    owner           (S,)  completion of each scored token, ascending
    last            (N,)  flat position of each completion's last token
    lengths         (N,)  scored tokens of each completion, float
    group           (N,)  which of the given groups each completion belongs to
    =============== ===== ========================================================================

    Completions keep the order of the groups given.
    """

    input_ids: Tensor
    position_ids: Tensor
    plan: TreePlan
    src: Tensor
    target: Tensor
    at: Tensor
    owner: Tensor
    last: Tensor
    lengths: Tensor
    group: Tensor
    n: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device; itself when it is there already."""
        device = torch.device(device)
        if self.input_ids.device == device:
            return self
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, (Tensor, TreePlan))}
        return Batch(**{**values, **moved})

    @property
    def n_tokens(self) -> int:
        """T, the tokens that the model encodes."""
        return self.input_ids.shape[1]


def tree(groups: Seq[TokenizedGroup]) -> Batch:
    """Pack groups with every shared prefix encoded once.

    Completions of a group share its prompt and whatever else they begin with; groups whose prompts are
    prefixes of one another (an agent's history) or begin alike for long share that beginning too.
    """
    sequences, group = _flatten(groups)
    runs, ends = _trie(sequences, group)
    return _assemble(sequences, group, runs, ends)


def rows(groups: Seq[TokenizedGroup]) -> Batch:
    """Pack groups with one copy of the prompt for each completion."""
    sequences, group = _flatten(groups)
    runs = [_Run(-1, i, 0, len(s.ids)) for i, s in enumerate(sequences)]
    return _assemble(sequences, group, runs, list(range(len(runs))))


def build(groups: Seq[TokenizedGroup], layout: Layout = "auto") -> Batch:
    """Pack groups in the given layout; ``auto`` is ``tree``, which never has more tokens than ``rows``."""
    if layout not in ("auto", "tree", "rows"):
        raise ValueError(f"unknown layout {layout!r}: choose auto, tree or rows")
    return rows(groups) if layout == "rows" else tree(groups)


def pack(groups: Seq[TokenizedGroup], max_tokens: int, layout: Layout = "auto") -> list[list[int]]:
    """Split groups into micro-batches of at most ``max_tokens`` encoded tokens, groups kept whole.

    A group that is too long by itself gets a micro-batch of its own. Returns indices into ``groups``,
    ascending inside each micro-batch. First-fit, longest first, so that few micro-batches are needed.
    """
    sizes = [n_tokens(group, layout) for group in groups]
    bins: list[tuple[int, list[int]]] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        for b, (used, members) in enumerate(bins):
            if used + sizes[i] <= max_tokens:
                members.append(i)
                bins[b] = (used + sizes[i], members)
                break
        else:
            bins.append((sizes[i], [i]))
    return sorted(sorted(members) for _, members in bins)


def n_tokens(group: TokenizedGroup, layout: Layout = "auto") -> int:
    """How many tokens the model encodes for one group (an upper bound where completions begin alike)."""
    total = sum(len(s.ids) for s in group.sequences)
    if layout == "rows" or not group.sequences:
        return total
    first = group.sequences[0]
    shared = first.n_prompt
    if all(s.n_prompt == shared and s.ids[:shared] == first.ids[:shared] for s in group.sequences[1:]):
        return total - shared * (len(group.sequences) - 1)
    return total


@dataclass(slots=True)
class _Run:
    """A run of tokens without a branch: depths ``start`` to ``end`` of sequence ``source``."""

    parent: int
    source: int
    start: int
    end: int
    offset: int = 0


def _flatten(groups: Seq[TokenizedGroup]) -> tuple[list[Sequence], list[int]]:
    sequences = [s for group in groups for s in group.sequences]
    if not sequences:
        raise ValueError("a batch needs at least one completion")
    for s in sequences:
        if not 0 < s.n_prompt < len(s.ids):
            raise ValueError(
                f"a sequence needs a prompt and a completion: {s.n_prompt} of {len(s.ids)} tokens"
            )
    return sequences, [g for g, group in enumerate(groups) for _ in group.sequences]


def _common(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix of two token lists."""
    n = min(len(a), len(b))
    if a[:n] == b[:n]:
        return n
    same, differs = 0, n  # a[:same] and b[:same] are equal, a[:differs] and b[:differs] are not
    while differs - same > 1:
        middle = (same + differs) // 2
        if a[same:middle] == b[same:middle]:
            same = middle
        else:
            differs = middle
    return same


def _trie(sequences: Seq[Sequence], group: Seq[int]) -> tuple[list[_Run], list[int]]:
    """The runs of the token trie in depth-first order, and for each sequence the run that it ends in."""
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].ids)
    ids = [sequences[i].ids for i in order]
    shared = [0] * len(order)  # with the one before; 0 where the two are not to share
    for i in range(1, len(order)):
        before, here = order[i - 1], order[i]
        length = _common(ids[i - 1], ids[i])
        nested = length >= min(sequences[before].n_prompt, sequences[here].n_prompt)
        if group[before] == group[here] or nested or length >= MIN_SHARED_BETWEEN_GROUPS:
            shared[i] = length
    runs: list[_Run] = []
    ends = [0] * len(order)
    todo = [(0, len(order), 0, -1)]  # sequences [low, high) agree up to this depth, below this parent
    while todo:
        low, high, depth, parent = todo.pop()
        if high - low == 1:
            if len(ids[low]) > depth:
                runs.append(_Run(parent, order[low], depth, len(ids[low])))
                parent = len(runs) - 1
            ends[order[low]] = parent
            continue
        least = min(shared[low + 1 : high])
        worth_it = least - depth >= MIN_SHARED or depth == 0 or least == len(ids[high - 1])
        if least > depth and worth_it:
            runs.append(_Run(parent, order[low], depth, least))
            parent, depth = len(runs) - 1, least
        cuts = [low, *(i for i in range(low + 1, high) if shared[i] == least), high]
        todo += [(a, b, depth, parent) for a, b in reversed(list(pairwise(cuts)))]
    return runs, ends


def _assemble(sequences: Seq[Sequence], group: Seq[int], runs: list[_Run], ends: Seq[int]) -> Batch:
    flat_ids: list[int] = []
    positions: list[int] = []
    nodes: list[Node] = []
    for run in runs:
        run.offset = len(flat_ids)
        flat_ids += sequences[run.source].ids[run.start : run.end]
        positions += range(run.start, run.end)
        path: tuple[tuple[int, int], ...] = ()
        if run.parent >= 0:
            above, node = runs[run.parent], nodes[run.parent]
            path = (*node.path, (above.offset, above.offset + node.length))
        nodes.append(Node(run.offset, run.end - run.start, run.start, path))
    src: list[int] = []
    at: list[int] = []
    target: list[int] = []
    last: list[int] = []
    lengths: list[int] = []
    for s, end in zip(sequences, ends, strict=True):
        flat = _flat_positions(runs, end, s.n_prompt - 1, len(s.ids))
        last.append(flat[-1])
        scored = s.scored()
        lengths.append(len(scored))
        if len(scored) == len(flat) - 1:
            src += flat[:-1]
            at += flat[1:]
            target += s.ids[s.n_prompt :]
        else:
            src += [flat[i - s.n_prompt] for i in scored]
            at += [flat[i - s.n_prompt + 1] for i in scored]
            target += [s.ids[i] for i in scored]
    count = torch.tensor(lengths)
    return Batch(
        input_ids=torch.tensor([flat_ids]),
        position_ids=torch.tensor([positions]),
        plan=TreePlan(nodes),
        src=torch.tensor(src),
        target=torch.tensor(target),
        at=torch.tensor(at),
        owner=torch.repeat_interleave(torch.arange(len(sequences)), count),
        last=torch.tensor(last),
        lengths=count.float(),
        group=torch.tensor(group),
        n=len(sequences),
    )


def _flat_positions(runs: Seq[_Run], end: int, first: int, stop: int) -> list[int]:
    """Where depths ``first`` to ``stop`` of the sequence that ends in run ``end`` lie in the packed batch."""
    parts: list[range] = []
    while end >= 0 and runs[end].end > first:
        run = runs[end]
        a, b = max(first, run.start), min(stop, run.end)
        parts.append(range(run.offset + a - run.start, run.offset + b - run.start))
        end = run.parent
    return [i for part in reversed(parts) for i in part]


__all__ = ["Batch", "Layout", "build", "n_tokens", "pack", "rows", "tree"]
