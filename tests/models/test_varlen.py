"""The variable-length call: its indices and arguments, with a stand-in for the kernel that keeps its documented
alignment; and, where there is a GPU, the kernel itself against padded calls."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from steerwell.models import varlen
from steerwell.models.attention import Node, TreePlan
from steerwell.models.batch import rows, tree
from steerwell.models.varlen import VarlenIndex, gather
from tiny import random_groups

NODES = [
    Node(0, 5, 0),
    Node(5, 3, 5, ((0, 5),)),
    Node(8, 2, 8, ((0, 5), (5, 8))),
    Node(10, 6, 5, ((0, 5),)),
    Node(16, 4, 0),
]


def stand_in(aligned: str = "bottom-right", calls: list[dict[str, Any]] | None = None):
    """Variable-length attention by its definition, one sequence at a time, in any dtype.

    FlashAttention 2: query i of q sees key j of k if i + k - q - left <= j <= i + k - q + right, -1 for no
    bound. With ``top-left`` the two begin together instead, as they do in other kernels.
    """

    def varlen_attn(
        query,
        key,
        value,
        cu_seq_q,
        cu_seq_k,
        max_q,
        max_k,
        *,
        scale=None,
        window_size=(-1, -1),
        enable_gqa=False,
    ) -> Tensor:
        if calls is not None:
            calls.append({"max": (max_q, max_k), "window": window_size, "gqa": enable_gqa})
        assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
        assert enable_gqa or query.shape[1] == key.shape[1]
        assert query.shape[-1] == key.shape[-1] == value.shape[-1]
        assert (cu_seq_q[-1], cu_seq_k[-1]) == (len(query), len(key))
        assert (int(cu_seq_q.diff().max()), int(cu_seq_k.diff().max())) == (max_q, max_k)
        left, right = window_size
        outs = []
        bounds = (pairwise(x.tolist()) for x in (cu_seq_q, cu_seq_k))
        for (a, b), (c, d) in zip(*bounds, strict=True):
            shared = query.shape[1] // key.shape[1]
            q, k, v = (
                query[a:b],
                key[c:d].repeat_interleave(shared, 1),
                value[c:d].repeat_interleave(shared, 1),
            )
            scores = torch.einsum("qhd,khd->hqk", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
            at = torch.arange(b - a)[:, None] + ((d - c) - (b - a) if aligned == "bottom-right" else 0)
            j = torch.arange(d - c)
            seen = torch.ones(b - a, d - c, dtype=torch.bool)
            seen &= (j <= at + right) if right >= 0 else True
            seen &= (j >= at - left) if left >= 0 else True
            outs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v))
        return torch.cat(outs)

    return varlen_attn


def inputs(t: int, heads=(4, 2), sizes=(8, 8), **like: Any) -> list[Tensor]:
    made = torch.Generator().manual_seed(0)
    shapes = ((1, heads[0], t, sizes[0]), (1, heads[1], t, sizes[0]), (1, heads[1], t, sizes[1]))
    return [torch.randn(shape, generator=made).to(**like).requires_grad_() for shape in shapes]


def outcome(plan: TreePlan, x: list[Tensor], window: int | None) -> list[Tensor]:
    """The output, and the gradients of query, key and value."""
    out = plan.attend(torch.nn.Module(), *x, scaling=0.3, sliding_window=window)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    return [out, *torch.autograd.grad(out, x, upstream)]


def both(monkeypatch, plan: TreePlan, x: list[Tensor], window: int | None, kernel) -> list[list[Tensor]]:
    padded = outcome(plan, x, window)
    with monkeypatch.context() as patch:
        patch.setattr(varlen, "takes", lambda *_: True)
        patch.setattr(varlen, "kernel", lambda: kernel)
        return [outcome(plan, x, window), padded]


PLANS = {"by hand": NODES, "roots": [Node(0, 7, 0), Node(7, 1, 0), Node(8, 12, 0)]}
for _seed in range(3):
    _groups = random_groups(_seed, prompt=40, completion=20)
    PLANS |= {f"tree {_seed}": tree(_groups).plan.nodes, f"rows {_seed}": rows(_groups).plan.nodes}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("window", [None, 1, 4, 1000])
@pytest.mark.parametrize(("heads", "sizes"), [((4, 2), (8, 8)), ((2, 2), (8, 4))])
def test_one_call_equals_padded_calls(monkeypatch, name: str, window: int | None, heads, sizes) -> None:
    plan, calls = TreePlan(PLANS[name]), []
    found, expected = both(
        monkeypatch, plan, inputs(plan.n_tokens, heads, sizes), window, stand_in(calls=calls)
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    (call,) = calls
    assert call["window"] == ((-1, 0) if window in (None, 1000) else (window - 1, 0))
    assert call["gqa"] is (heads == (4, 2))


@pytest.mark.parametrize("window", [None, 4])
def test_another_alignment_would_show(monkeypatch, window: int | None) -> None:
    plan = TreePlan(NODES)
    found, expected = both(monkeypatch, plan, inputs(20), window, stand_in("top-left"))
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() > 0.1 * b.norm()
    roots = TreePlan(PLANS["roots"])  # as many queries as keys: no alignment to get wrong
    found, expected = both(monkeypatch, roots, inputs(20), window, stand_in("top-left"))
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)


def test_a_window_that_is_one_too_wide_would_show(monkeypatch) -> None:
    real = stand_in()

    def wider(*args, window_size, **settings):
        return real(*args, window_size=(window_size[0] + 1, 0), **settings)

    found, expected = both(monkeypatch, TreePlan(NODES), inputs(20), 4, wider)
    assert (found[0] - expected[0]).norm() > 0.1 * expected[0].norm()


def test_the_index() -> None:
    index = VarlenIndex.of(NODES, torch.device("cpu"))
    assert index.query_starts.tolist() == [0, 5, 8, 10, 16, 20]
    assert index.key_starts.tolist() == [0, 5, 13, 23, 34, 38]
    assert (index.n_queries, index.n_keys) == (6, 11)
    assert index.key_index is not None
    tail = [*range(5), *range(10, 16), *range(16, 20)]
    assert index.key_index.tolist() == [*range(5), *range(8), *range(10), *tail]
    assert VarlenIndex.of(PLANS["roots"], torch.device("cpu")).key_index is None


def test_gradients_of_shared_tokens_are_added_in_fp32() -> None:
    tokens = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    out = gather(tokens, torch.zeros(1000, dtype=torch.long))
    out.backward(torch.full_like(out, 0.5))
    assert tokens.grad is not None
    assert tokens.grad.tolist() == [[500.0] * 3, [0.0] * 3]  # bf16 sums of halves stop at 128


def test_what_the_kernel_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "kernel", lambda: stand_in())
    monkeypatch.setattr(varlen, "_new_enough", lambda device: device == 1)

    def one(size: int = 64, dtype: torch.dtype = torch.bfloat16, device: str = "cuda:1") -> Any:
        return SimpleNamespace(
            is_cuda=device != "cpu", shape=(20, 4, size), dtype=dtype, device=torch.device(device)
        )

    good, sinks = (one(), one(), one(48)), torch.zeros(4)
    assert varlen.takes(*good, None, None, 0.0)
    assert not varlen.takes(*good, 5.0, None, 0.0)
    assert not varlen.takes(*good, None, sinks, 0.0)
    assert not varlen.takes(*good, None, None, 0.1)
    for each in (
        {"dtype": torch.float32},
        {"size": 60},
        {"size": 264},
        {"device": "cpu"},
        {"device": "cuda:0"},
    ):
        assert not varlen.takes(one(**each), one(**each), one(**each), None, None, 0.0)
    assert not varlen.takes(one(), one(), one(72), None, None, 0.0)
    assert not varlen.takes(one(), one(dtype=torch.float16), one(), None, None, 0.0)
    monkeypatch.setattr(varlen, "kernel", lambda: None)
    assert not varlen.takes(*good, None, None, 0.0)


@pytest.mark.skipif(varlen.kernel() is None, reason="this torch has no variable-length attention")
def test_the_installed_kernel_knows_these_arguments() -> None:
    """On meta tensors: names, ranks and dtypes, forward and backward."""
    plan = TreePlan(NODES).to("meta")
    q, k, v = (x[0].transpose(0, 1) for x in inputs(20, (4, 2), (16, 8), device="meta", dtype=torch.bfloat16))
    index = VarlenIndex.of(NODES, torch.device("meta"))
    out = varlen.attend(index, q, k, v, 0.3, 4)
    assert out.shape == (20, 4, 8)
    assert plan.varlen.n_keys == 11
    grads = torch.autograd.grad(out, (q, k, v), torch.empty_like(out))
    assert [g.shape for g in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize(("heads", "sizes"), [((4, 2), (64, 64)), ((4, 4), (96, 64)), ((8, 2), (128, 128))])
def test_the_kernel_aligns_at_the_ends(monkeypatch, name: str, window: int | None, heads, sizes) -> None:
    """On a GPU, in bf16: as near to padded calls in fp32 as bf16 padded calls are, forward and backward."""
    plan = TreePlan(PLANS[name]).to("cuda")
    x = inputs(plan.n_tokens, heads, sizes, device="cuda", dtype=torch.bfloat16)
    q, k, v = (y[0].transpose(0, 1) for y in x)
    assert varlen.takes(q, k, v, None, None, 0.0)
    found = outcome(plan, x, window)
    with monkeypatch.context() as patch:
        patch.setattr(varlen, "takes", lambda *_: False)
        exact = outcome(plan, [y.detach().float().requires_grad_() for y in x], window)
        rounded = outcome(plan, x, window)
    for a, b, r in zip(found, exact, rounded, strict=True):
        assert (a.float() - b).norm() <= 2 * (r.float() - b).norm() + 2e-3 * b.norm()
