"""Flat token batches that live for one step, in layouts with equal numbers.

``tree``: each shared prefix is encoded once and completions branch from it, position ids continuing from the
branch point. ``rows``: each completion has a copy of its prompt. Neither has padding.

Models with layers that carry a state along the sequence can take neither. For them ``rows`` means ``padded``:
one sequence per row of a rectangle, filled up on the right, where nothing that is read can see the filling.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, fields, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steerwell.data.errors import InputError
from steerwell.models.attention import stateful_layers, takes_tree, unwrap
from steerwell.models.render import Sequence, TokenizedGroup
from steerwell.models.tree_plan import Node, TreePlan

# What a recipe may say. Which one of Layout it becomes depends on the model: see layout_for.
Wish = Literal["auto", "tree", "rows"]
Layout = Literal["auto", "tree", "rows", "padded"]
# A shorter overlap between two completions is encoded twice: a branch point costs more than it saves.
MIN_SHARED = 8
# Different groups share a beginning (a system prompt, an agent's history) when it has this many tokens.
MIN_SHARED_BETWEEN_GROUPS = 32


@dataclass(slots=True)
class Batch:
    """N completions with S scored tokens, packed into T tokens: one row of T, or (padded) N rows of T / N.

    =============== ===== ========================================================================
    input_ids       (B,L) token ids; B is 1 and L is T, or B is N in the padded layout
    position_ids    (B,L) depth of each token in its own sequence
    plan            -     who sees whom; travels to the attention function. None in the padded layout
    longest         -     tokens of the longest sequence
    src             (S,)  flat position whose output predicts …
    target          (S,)  … this token …
    at              (S,)  … which itself lies here
    owner           (S,)  completion of each scored token, ascending
    last            (N,)  flat position of each completion's last token
    lengths         (N,)  scored tokens of each completion, float
    group           (N,)  which of the given groups each completion belongs to
    =============== ===== ========================================================================

    Flat positions count through the rows. Completions keep the order of the groups given.
    """

    input_ids: Tensor
    position_ids: Tensor
    plan: TreePlan | None
    src: Tensor
    target: Tensor
    at: Tensor
    owner: Tensor
    last: Tensor
    lengths: Tensor
    group: Tensor
    n: int
    longest: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch on another device; itself when it is there already."""
        device = torch.device(device)
        if self.input_ids.device == device:
            return self
        values: dict[str, Any] = {f.name: getattr(self, f.name) for f in fields(self)}
        moved = {k: v.to(device) for k, v in values.items() if isinstance(v, (Tensor, TreePlan))}
        return Batch(**{**values, **moved})

    def flat(self) -> Batch:
        """Padded rows end to end in one row with a plan, for a model that runs on plans."""
        if self.plan is not None:
            return self
        count, length = self.input_ids.shape
        plan = TreePlan([Node(i * length, length, 0) for i in range(count)]).to(self.input_ids.device)
        ids, positions = (x.view(1, -1) for x in (self.input_ids, self.position_ids))
        return replace(self, input_ids=ids, position_ids=positions, plan=plan)

    @property
    def n_tokens(self) -> int:
        """T, the tokens that the model encodes, padding included."""
        return self.input_ids.numel()


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


def padded(groups: Seq[TokenizedGroup]) -> Batch:
    """One sequence per row, filled up on the right to the longest, for models that cannot take a plan.

    Exact because every layer of a decoder reads from left to right: what stands after a sequence's end has no
    way to the positions that are read. No mask says where the padding is, and none is needed.
    """
    sequences, group = _flatten(groups)
    longest = max(len(s.ids) for s in sequences)
    input_ids = torch.zeros(len(sequences), longest, dtype=torch.long)
    for row, s in zip(input_ids, sequences, strict=True):
        row[: len(s.ids)] = torch.tensor(s.ids)
    positions = torch.arange(longest).repeat(len(sequences), 1)
    flat = [range(i * longest + s.n_prompt - 1, i * longest + len(s.ids)) for i, s in enumerate(sequences)]
    return _index(sequences, group, flat, input_ids, positions, None)


def layout_for(wish: Layout, *models: nn.Module) -> Layout:
    """The layout that all of these models can take, for a wish of ``auto``, ``tree`` or ``rows``.

    ``auto`` is the tree wherever it can be. Raises :class:`InputError` for a ``tree`` on a model with layers
    that carry a state along the sequence, and for a layout that does not exist.
    """
    if wish not in ("auto", "tree", "rows"):
        raise InputError(f"unknown layout {wish!r}", mend="Choose auto, tree or rows.")
    for model in models:
        if not takes_tree(model):
            if wish == "tree":
                raise InputError(
                    f"a {type(unwrap(model)).__name__} cannot share prompts: it has {stateful_layers(model)}",
                    mend="Use layout = auto or rows.",
                )
            return "padded"
    return "tree" if wish == "auto" else wish


def build(groups: Seq[TokenizedGroup], layout: Layout = "auto") -> Batch:
    """Pack groups in the given layout; ``auto`` is ``tree``, which never has more tokens than ``rows``.

    Which layout a model can take is for :func:`layout_for` to say.
    """
    makers = {"auto": tree, "tree": tree, "rows": rows, "padded": padded}
    if layout not in makers:
        raise ValueError(f"unknown layout {layout!r}: choose auto, tree, rows or padded")
    return makers[layout](groups)


def pack(groups: Seq[TokenizedGroup], max_tokens: int, layout: Layout = "auto") -> list[list[int]]:
    """Split groups into micro-batches of at most ``max_tokens`` encoded tokens, groups kept whole.

    A group that is too long by itself gets a micro-batch of its own. Returns indices into ``groups``,
    ascending inside each micro-batch. First-fit, longest first, so that few micro-batches are needed.
    """
    if layout == "padded":
        shapes = [(len(group.sequences), _longest(group)) for group in groups]
    else:
        shapes = [(n_tokens(group, layout), 1) for group in groups]
    bins: list[tuple[int, int, list[int]]] = []  # rows, their length, members
    for i in sorted(range(len(shapes)), key=lambda i: (-shapes[i][1], -shapes[i][0], i)):
        count, length = shapes[i]
        for b, (used, longest, members) in enumerate(bins):
            if (used + count) * max(longest, length) <= max_tokens:
                members.append(i)
                bins[b] = (used + count, max(longest, length), members)
                break
        else:
            bins.append((count, length, [i]))
    return sorted(sorted(members) for _, _, members in bins)


def n_tokens(group: TokenizedGroup, layout: Layout = "auto") -> int:
    """How many tokens the model encodes for one group (an upper bound where completions begin alike)."""
    if layout == "padded":
        return len(group.sequences) * _longest(group)
    total = sum(len(s.ids) for s in group.sequences)
    if layout == "rows" or not group.sequences:
        return total
    first = group.sequences[0]
    shared = first.n_prompt
    if all(s.n_prompt == shared and s.ids[:shared] == first.ids[:shared] for s in group.sequences[1:]):
        return total - shared * (len(group.sequences) - 1)
    return total


def _longest(group: TokenizedGroup) -> int:
    return max((len(s.ids) for s in group.sequences), default=0)


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
    flat = [
        _flat_positions(runs, end, s.n_prompt - 1, len(s.ids)) for s, end in zip(sequences, ends, strict=True)
    ]
    ids = torch.tensor([flat_ids])
    return _index(sequences, group, flat, ids, torch.tensor([positions]), TreePlan(nodes))


def _index(
    sequences: Seq[Sequence],
    group: Seq[int],
    flat: Seq[Seq[int]],
    input_ids: Tensor,
    position_ids: Tensor,
    plan: TreePlan | None,
) -> Batch:
    """A batch from the flat positions of each sequence, from its last prompt token to its end."""
    src: list[int] = []
    at: list[int] = []
    target: list[int] = []
    lengths: list[int] = []
    for s, places in zip(sequences, flat, strict=True):
        scored = s.scored()
        lengths.append(len(scored))
        if len(scored) == len(places) - 1:
            src += places[:-1]
            at += places[1:]
            target += s.ids[s.n_prompt :]
        else:
            src += [places[i - s.n_prompt] for i in scored]
            at += [places[i - s.n_prompt + 1] for i in scored]
            target += [s.ids[i] for i in scored]
    count = torch.tensor(lengths)
    return Batch(
        input_ids=input_ids,
        position_ids=position_ids,
        plan=plan,
        src=torch.tensor(src),
        target=torch.tensor(target),
        at=torch.tensor(at),
        owner=torch.repeat_interleave(torch.arange(len(sequences)), count),
        last=torch.tensor([places[-1] for places in flat]),
        lengths=count.float(),
        group=torch.tensor(group),
        n=len(sequences),
        longest=max(len(s.ids) for s in sequences),
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


__all__ = [
    "Batch",
    "Layout",
    "Wish",
    "build",
    "layout_for",
    "n_tokens",
    "pack",
    "padded",
    "rows",
    "tree",
]
