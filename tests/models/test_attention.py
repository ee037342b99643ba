"""The registered attention function: it needs a plan, and it refuses models that a plan cannot serve."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from architectures import PADDED, make
from transformers import (
    T5Config,
    T5ForConditionalGeneration,
)

from steerwell.data.errors import InputError
from steerwell.models import tree_plan
from steerwell.models.attention import (
    Node,
    TreePlan,
    steerwell_attention,
    takes_tree,
    use_steerwell_attention,
)
from steerwell.models.batch import layout_for, tree
from steerwell.models.forward import hidden_states
from tiny import tiny_llama, token_group

NODES = [
    Node(0, 5, 0),
    Node(5, 3, 5, ((0, 5),)),
    Node(8, 2, 8, ((0, 5), (5, 8))),
    Node(10, 6, 5, ((0, 5),)),
    Node(16, 4, 0),
]


def seen_by_hand(nodes: list[Node], window: int | None) -> torch.Tensor:
    """(T, T): which key each query sees, written the slow way."""
    t = sum(node.length for node in nodes)
    seen = torch.zeros(t, t, dtype=torch.bool)
    for node in nodes:
        own = [
            *(i for a, b in node.path for i in range(a, b)),
            *range(node.offset, node.offset + node.length),
        ]
        for query in range(node.length):
            at = node.start + query
            for depth in range(at + 1):
                if window is None or depth > at - window:
                    seen[node.offset + query, own[depth]] = True
    return seen


@pytest.mark.parametrize("cost", [0, 40, 10**9])
@pytest.mark.parametrize("window", [None, 4, 100])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
def test_plan_equals_a_full_mask(monkeypatch, cost: int, window: int | None, heads: tuple[int, int]) -> None:
    monkeypatch.setattr(tree_plan, "CALL_COST", cost)
    torch.manual_seed(0)
    query = torch.randn(1, heads[0], 20, 8, requires_grad=True)
    key, value = (torch.randn(1, heads[1], 20, 8, requires_grad=True) for _ in range(2))
    mask = seen_by_hand(NODES, window)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.3, enable_gqa=True).transpose(
        1, 2
    )
    plan = TreePlan(NODES)
    assert (len(plan.padded.calls) == 5) is (cost == 0)
    out, weights = steerwell_attention(
        torch.nn.Module(), query, key, value, plan=plan, scaling=0.3, sliding_window=window
    )
    assert weights is None
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
    upstream = torch.randn_like(out)
    found = torch.autograd.grad(out, (query, key, value), upstream)
    for a, b in zip(found, torch.autograd.grad(expected, (query, key, value), upstream), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("cost", [0, 10**9])
def test_softcap_and_sinks(monkeypatch, cost: int) -> None:
    monkeypatch.setattr(tree_plan, "CALL_COST", cost)
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8)
    sinks = torch.randn(4)
    k, v = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
    scores = 1.5 * torch.tanh(query @ k.transpose(2, 3) * 8**-0.5 / 1.5)
    scores = scores.masked_fill(~seen_by_hand(NODES, None), -torch.inf)
    scores = torch.cat([scores, sinks.view(1, 4, 1, 1).expand(1, 4, 20, 1)], -1)
    expected = (scores.softmax(-1)[..., :-1] @ v).transpose(1, 2)
    out = TreePlan(NODES).attend(torch.nn.Module(), query, key, value, scaling=None, softcap=1.5, sinks=sinks)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_value_heads_may_be_narrower_than_keys(monkeypatch) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 8), torch.randn(1, 2, 20, 4)
    expected = F.scaled_dot_product_attention(query, key, value, seen_by_hand(NODES, None)).transpose(1, 2)
    for cost in (0, 10**9):
        monkeypatch.setattr(tree_plan, "CALL_COST", cost)
        out = TreePlan(NODES).attend(torch.nn.Module(), query, key, value, scaling=None)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)


def test_a_plan_is_needed_and_must_fit() -> None:
    model = tiny_llama()
    use_steerwell_attention(model)
    with pytest.raises(RuntimeError, match="no plan reached"):
        model(input_ids=torch.tensor([[10, 11, 12]]))
    batch = tree([token_group([10, 11], [[12, 13]])])
    batch.plan = TreePlan(NODES)
    with pytest.raises(RuntimeError, match="one row of 20 tokens"):
        hidden_states(model, batch)
    model.set_attn_implementation("sdpa")
    assert model(input_ids=torch.tensor([[10, 11, 12]])).logits.shape == (1, 3, 272)


def test_large_nodes_are_alone_and_small_ones_together() -> None:
    small = [Node(10 * i, 10, 0) for i in range(30)]
    assert len(TreePlan(small).padded.calls) == 1
    large = [Node(400 * i, 400, 0) for i in range(3)] + [Node(1200, 20, 0), Node(1220, 21, 0)]
    calls = TreePlan(large).padded.calls
    assert sorted(len(call.starts) for call in calls) == [1, 1, 1, 2] or len(calls) == 2
    assert all(
        call.mask(None, torch.float32) is None for call in calls if call.pieces
    )  # plain causal, no mask


def test_masks_are_made_once_for_all_layers() -> None:
    plan = TreePlan(NODES)
    model = tiny_llama(num_hidden_layers=3)
    use_steerwell_attention(model)
    batch = tree([token_group([10, 11], [[12, 13], [14, 15, 16]])])
    hidden_states(model, batch)
    assert [len(call.masks) for call in batch.plan.padded.calls] == [1] * len(batch.plan.padded.calls)
    moved = plan.to("meta")
    assert moved.n_tokens == 20
    assert all(call.starts.device.type == "meta" for call in moved.padded.calls)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", PADDED)
def test_layers_with_a_state_are_found(name: str) -> None:
    model = make(name)
    assert not takes_tree(model)
    with pytest.raises(InputError, match="cannot share prompts: it has ") as error:
        use_steerwell_attention(model)
    assert "rows" in error.value.mend
    with pytest.raises(InputError, match=r"cannot share prompts.* Use layout = auto or rows"):
        layout_for("tree", tiny_llama(), model)
    assert layout_for("auto", model) == layout_for("rows", tiny_llama(), model) == "padded"


def test_attention_in_every_layer_takes_the_tree() -> None:
    model = tiny_llama()
    assert takes_tree(model)
    assert [layout_for(wish, model, model) for wish in ("auto", "tree", "rows")] == ["tree", "tree", "rows"]
    with pytest.raises(InputError, match=r"unknown layout 'padded'.* auto, tree or rows"):
        layout_for("padded", model)  # type: ignore[arg-type]


def test_a_plan_for_a_model_with_its_own_attention_is_an_error() -> None:
    batch = tree([token_group([10, 11], [[12, 13]])])
    with pytest.raises(RuntimeError, match="follows no plan"):
        hidden_states(tiny_llama(), batch)


def test_an_encoder_decoder_is_refused() -> None:
    with torch.device("meta"):
        model = T5ForConditionalGeneration(
            T5Config(vocab_size=64, d_model=16, d_ff=16, num_layers=1, num_heads=2)
        )
    with pytest.raises(InputError, match="left to right"):
        use_steerwell_attention(model)
