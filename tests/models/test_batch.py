"""Packing: every completion can be read back from the flat tensors, and shared beginnings are there once."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steerwell.models import batch as batch_room
from steerwell.models.batch import Batch, build, n_tokens, pack, padded, rows, tree
from steerwell.models.render import TokenizedGroup
from tiny import random_groups, token_group

A, B, C, D = ([k * 100 + i for i in range(20)] for k in (1, 2, 3, 4))


def sequences(groups: list[TokenizedGroup]) -> list:
    return [s for group in groups for s in group.sequences]


def check(batch: Batch, groups: list[TokenizedGroup]) -> None:
    """All indices of a batch say what the sequences say."""
    flat, depth = batch.input_ids[0], batch.position_ids[0]
    every = sequences(groups)
    assert batch.n == len(every)
    assert torch.equal(flat[batch.at], batch.target)
    assert torch.equal(depth[batch.src] + 1, depth[batch.at])
    for i, s in enumerate(every):
        mine = batch.owner == i
        assert batch.target[mine].tolist() == s.ids[s.n_prompt :]
        assert flat[batch.src[mine]].tolist() == s.ids[s.n_prompt - 1 : -1]
        assert depth[batch.at[mine]].tolist() == list(range(s.n_prompt, len(s.ids)))
        assert batch.at[mine][-1] == batch.last[i]
        assert batch.lengths[i] == len(s.ids) - s.n_prompt
    assert batch.owner.tolist() == sorted(batch.owner.tolist())
    assert batch.group.tolist() == [g for g, group in enumerate(groups) for _ in group.sequences]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), least=st.integers(1, 9), between=st.sampled_from([1, 8, 32]))
def test_every_completion_can_be_read_back(seed: int, least: int, between: int) -> None:
    groups = random_groups(seed, vocab=11)  # three words: many accidental overlaps
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batch_room, "MIN_SHARED", least)
        patch.setattr(batch_room, "MIN_SHARED_BETWEEN_GROUPS", between)
        shared, alone = tree(groups), rows(groups)
    check(shared, groups)
    check(alone, groups)
    rectangle = padded(groups)
    assert rectangle.plan is None
    assert rectangle.input_ids.shape == (len(sequences(groups)), rectangle.longest)
    check(rectangle.flat(), groups)
    assert alone.n_tokens == sum(len(s.ids) for s in sequences(groups))
    assert shared.n_tokens <= sum(n_tokens(group) for group in groups)
    if least == between == 1:  # a full trie: as many tokens as there are different beginnings
        beginnings = {tuple(s.ids[:k]) for s in sequences(groups) for k in range(1, len(s.ids) + 1)}
        assert shared.n_tokens == len(beginnings)


def test_the_prompt_is_there_once() -> None:
    groups = [token_group(A, [B, C, D]), token_group(D, [A])]
    batch = tree(groups)
    assert batch.n_tokens == 20 + 3 * 20 + 20 + 20
    assert rows(groups).n_tokens == 3 * 40 + 40
    assert batch.position_ids[0, :80].tolist() == [*range(20), *range(20, 40), *range(20, 40), *range(20, 40)]


def test_a_short_prompt_is_shared_too() -> None:
    assert tree([token_group([7], [[8, 9], [9, 8]])]).n_tokens == 5


@pytest.mark.parametrize(
    ("completions", "tokens"),
    [
        ([B, B, C], 60),  # equal samples: one text
        ([B[:9], B, C], 60),  # one is a prefix of the other
        ([B[:3], B, C], 63),  # too short a prefix to be worth a branch
        ([B[:10] + C, B[:10] + D, D], 20 + 10 + 40 + 20),  # a branch point inside the completions
        ([B[:7] + C, B[:7] + D, D], 20 + 14 + 40 + 20),  # a chance overlap
        ([B[:7] + C, B[:7] + D], 20 + 7 + 40),  # which costs nothing when all have it
    ],
)
def test_beginnings_of_completions_are_shared_when_worth_it(completions, tokens: int) -> None:
    groups = [token_group(A, completions)]
    assert tree(groups).n_tokens == tokens
    check(tree(groups), groups)


def test_an_agent_history_is_there_once() -> None:
    groups = [token_group(A[:5], [B]), token_group(A[:5] + B, [C, D]), token_group(A[:5] + B + C, [D])]
    batch = tree(groups)
    check(batch, groups)
    assert batch.n_tokens == 5 + 20 + 20 + 20 + 20


def test_other_groups_share_a_long_beginning_only() -> None:
    long, short = list(range(40)), list(range(12))
    assert tree([token_group(long + A, [B]), token_group(long + C, [D])]).n_tokens == 40 + 80
    assert tree([token_group(short + A, [B]), token_group(short + C, [D])]).n_tokens == 24 + 80


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    budget=st.integers(1, 400),
    layout=st.sampled_from(["auto", "tree", "rows", "padded"]),
)
def test_pack_keeps_the_budget_and_every_group(seed: int, budget: int, layout) -> None:
    groups = random_groups(seed, groups=9)
    packed = pack(groups, budget, layout)
    assert sorted(i for members in packed for i in members) == list(range(9))
    for members in packed:
        assert members == sorted(members)
        encoded = build([groups[i] for i in members], layout).n_tokens
        assert encoded <= budget or len(members) == 1
    firsts = [members[0] for members in packed]
    assert firsts == sorted(firsts)


def test_pack_is_tight() -> None:
    groups = [token_group(A[:4], [B[:n]]) for n in (6, 1, 5, 2)]  # 10, 5, 9, 6 tokens
    assert pack(groups, 15) == [[0, 1], [2, 3]]
    assert pack(groups, 100) == [[0, 1, 2, 3]]
    assert pack([], 100) == []


def test_layouts_by_name() -> None:
    groups = [token_group(A, [B, C])]
    assert build(groups).n_tokens == build(groups, "tree").n_tokens == 60
    assert build(groups, "rows").n_tokens == 80
    assert build(groups, "padded").n_tokens == 80
    with pytest.raises(ValueError, match="auto, tree, rows or padded"):
        build(groups, "table")  # type: ignore[arg-type]


def test_what_is_not_a_batch() -> None:
    with pytest.raises(ValueError, match="at least one completion"):
        tree([])
    with pytest.raises(ValueError, match="0 of 20 tokens"):
        rows([token_group([], [A])])
    with pytest.raises(ValueError, match="20 of 20 tokens"):
        tree([token_group(A, [[]])])


def test_to_a_device() -> None:
    batch = tree([token_group(A, [B, C])])
    assert batch.to("cpu") is batch
    moved = batch.to("meta")
    assert moved.input_ids.device.type == moved.owner.device.type == "meta"
    assert moved.plan is not batch.plan
    assert moved.n == 2


def test_deep_histories_do_not_overflow() -> None:
    groups, history = [], list(A)
    for turn in range(500):
        groups.append(token_group(history, [[turn % 50, 1, 2, 3, 4, 5, 6, 7]]))
        history = groups[-1].sequences[0].ids
    batch = tree(groups)
    assert batch.n_tokens == len(history)
    assert batch.n == 500
