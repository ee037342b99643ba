"""The numbers of a batch are those of the model's own attention, one sequence at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    LlamaConfig,
    OlmoConfig,
    Phi3Config,
    Qwen3Config,
    StableLmConfig,
)

from steerwell.data.errors import InputError
from steerwell.models import forward, tree_plan
from steerwell.models.attention import Node, TreePlan, use_steerwell_attention
from steerwell.models.batch import build, rows, tree
from steerwell.models.forward import per_token_logps, reward_scores, sum_by_owner
from tiny import random_groups, tiny_llama, tiny_qwen3, token_group

MAKERS = {"llama": tiny_llama, "qwen3": tiny_qwen3}
SMALL = {
    "vocab_size": 272,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
ONE_LABEL = {**SMALL, "num_labels": 1}


def one_at_a_time(model, groups) -> Tensor:
    """(S,) log-probs from the model's own attention and head, a sequence per call, no padding."""
    parts = []
    for group in groups:
        for s in group.sequences:
            logits = model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0, s.n_prompt - 1 : -1]
            target = torch.tensor(s.ids[s.n_prompt :])[:, None]
            parts.append(logits.float().log_softmax(-1).gather(1, target)[:, 0])
    return torch.cat(parts)


def weights_like(values: Tensor, seed: int = 0) -> Tensor:
    return torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))


def gradients(model, total: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(total, list(model.parameters()), allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for g, p in zip(found, model.parameters(), strict=True)]


def agrees(model, batch, expected: Tensor, expected_grads: list[Tensor]) -> bool:
    """Whether values are equal to 1e-5 (relative to the largest) and gradients to 1e-5 of their norm."""
    values = per_token_logps(model, batch)
    grads = gradients(model, (values * weights_like(values)).sum())
    near = (values - expected).abs().max() <= 1e-5 * expected.abs().max().clamp(min=1)
    return bool(near) and all(
        (a - b).norm() <= 1e-5 * b.norm() + 1e-6 for a, b in zip(grads, expected_grads, strict=True)
    )


def reference(model, groups) -> tuple[Tensor, list[Tensor]]:
    model.set_attn_implementation("sdpa")
    values = one_at_a_time(model, groups)
    grads = gradients(model, (values * weights_like(values)).sum())
    use_steerwell_attention(model)
    return values.detach(), grads


@pytest.mark.parametrize("name", MAKERS)
@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 10**6), cost=st.sampled_from([0, 300, 4096, 10**9]))
def test_tree_rows_and_one_at_a_time_are_equal(name: str, seed: int, cost: int) -> None:
    model, groups = MAKERS[name](), random_groups(seed)
    expected = reference(model, groups)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree_plan, "CALL_COST", cost)  # from one call per node to one call for all
        for batch in (tree(groups), rows(groups)):
            assert agrees(model, batch, *expected)


def long_groups():
    """Two trees with long nodes, one of them with branches in branches."""
    return random_groups(5, groups=3, prompt=90, completion=70)


@pytest.mark.parametrize("name", MAKERS)
def test_long_nodes(name: str) -> None:
    model, groups = MAKERS[name](), long_groups()
    assert len(tree(groups).plan.padded.calls) > 1
    expected = reference(model, groups)
    assert agrees(model, tree(groups), *expected)
    assert agrees(model, rows(groups), *expected)


def broken(how: str):
    """A batch of one prompt (4 tokens) with completions of 3 and 2 tokens, wrong in one way."""
    groups = [token_group([10, 11, 12, 13], [[20, 21, 22], [30, 31]])]
    batch = tree(groups)
    root, first, second = Node(0, 4, 0), Node(4, 3, 4, ((0, 4),)), Node(7, 2, 4, ((0, 4),))
    if how == "intact":
        batch.plan = TreePlan([root, first, second])
    elif how == "a branch sees its sibling":
        batch.plan = TreePlan([root, first, Node(7, 2, 7, ((0, 4), (4, 7)))])
    elif how == "a branch lost its prompt":
        batch.plan = TreePlan([root, first, Node(7, 2, 0)])
    elif how == "a branch misses one prompt token":
        halves = Node(0, 3, 0), Node(3, 1, 3, ((0, 3),))
        batch.plan = TreePlan([*halves, first, Node(7, 2, 3, ((0, 3),))])
    elif how == "positions run on":
        batch.position_ids = torch.arange(batch.n_tokens)[None]
    elif how == "positions are one off in a branch":
        batch.position_ids[0, 7:] += 1
    elif how == "the wrong token predicts":
        batch.src[-1] -= 1
    elif how == "the future is seen":
        for call in batch.plan.padded.calls:
            keys = torch.arange(call.n_keys)
            seen = (keys < call.sizes[:, None])[:, None, None].expand(-1, 1, call.n_queries, -1)
            mask = torch.zeros(seen.shape).masked_fill(~seen, -torch.inf)
            call.masks[None, torch.float32] = mask
    return groups, batch


@pytest.mark.parametrize(
    "how",
    [
        "intact",
        "a branch sees its sibling",
        "a branch lost its prompt",
        "a branch misses one prompt token",
        "positions run on",
        "positions are one off in a branch",
        "the wrong token predicts",
        "the future is seen",
    ],
)
@pytest.mark.parametrize("cost", [0, 10**9])
def test_the_comparison_sees_every_mistake(monkeypatch: pytest.MonkeyPatch, how: str, cost: int) -> None:
    monkeypatch.setattr(tree_plan, "CALL_COST", cost)
    model = tiny_llama()
    groups, batch = broken(how)
    expected = reference(model, groups)
    assert agrees(model, batch, *expected) is (how == "intact")


def test_unknown_architectures_are_compared_on_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    config = OlmoConfig(**SMALL)
    assert config.model_type not in forward.COMPARED
    model = large_weights(AutoModelForCausalLM.from_config(config))
    groups = random_groups(4)
    expected = one_at_a_time(model, groups)
    forward.adopt(model)
    torch.testing.assert_close(per_token_logps(model, tree(groups)), expected, rtol=1e-5, atol=1e-5)
    model.set_attn_implementation("sdpa")
    monkeypatch.setattr(forward, "tree", lambda groups: broken_positions(tree(groups)))
    with pytest.raises(InputError, match="own numbers"):
        forward.adopt(model)


@pytest.mark.filterwarnings("ignore")
def test_a_model_that_reads_both_ways_is_refused_on_loading() -> None:
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48
    )
    with pytest.raises(InputError, match="BertLMHeadModel"):
        forward.adopt(large_weights(AutoModelForCausalLM.from_config(config)))


def test_a_model_that_drops_keyword_arguments_is_refused_on_loading() -> None:
    model = large_weights(AutoModelForCausalLM.from_config(StableLmConfig(**SMALL)))
    with pytest.raises(InputError, match="StableLmForCausalLM does not hand its keyword arguments on"):
        forward.adopt(model)


def test_positions_that_depend_on_neighbours_are_refused() -> None:
    """Long sequences change the scale of rotary positions for every sequence of the same batch."""
    long = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0}
    long |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    model = large_weights(
        AutoModelForCausalLM.from_config(
            Phi3Config(**SMALL, rope_parameters=long, original_max_position_embeddings=12)
        )
    )
    short, other = token_group([10, 11], [[12, 13, 14]]), token_group([10] * 9, [[20, 21, 22, 23]])
    alone = one_at_a_time(model, [short])
    forward.adopt(model)
    torch.testing.assert_close(per_token_logps(model, tree([short])), alone, rtol=1e-5, atol=1e-5)
    with pytest.raises(InputError, match=r"a sequence has 13 tokens, and beyond 12 .* max_length = 12"):
        per_token_logps(model, tree([short, other]))


def broken_positions(batch):
    batch.position_ids = batch.position_ids * 2
    return batch


def large_weights(model):
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(0)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.15)
    return model.eval()


@pytest.mark.parametrize("config", [LlamaConfig(**ONE_LABEL), Qwen3Config(**ONE_LABEL)])
def test_reward_scores_equal_one_at_a_time(config) -> None:
    model = large_weights(AutoModelForSequenceClassification.from_config(config))
    groups = random_groups(11)
    sequences = [s for group in groups for s in group.sequences]
    own = torch.cat([model(input_ids=torch.tensor([s.ids])).logits[:, 0] for s in sequences])
    states = [model.model(input_ids=torch.tensor([s.ids])).last_hidden_state[0] for s in sequences]
    means = torch.stack([h[s.n_prompt :].mean(0) for h, s in zip(states, sequences, strict=True)])
    expected = {"last": own, "mean": model.score(means)[:, 0]}
    grads = {k: gradients(model, (v * weights_like(v)).sum()) for k, v in expected.items()}
    use_steerwell_attention(model)
    for pooling in ("last", "mean"):
        for layout in ("tree", "rows"):
            scores = reward_scores(model, build(groups, layout), pooling)
            torch.testing.assert_close(scores, expected[pooling], rtol=1e-5, atol=1e-5)
            found = gradients(model, (scores * weights_like(scores)).sum())
            for a, b in zip(found, grads[pooling], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (expected["last"] - expected["mean"]).abs().max() > 0.1
    with pytest.raises(ValueError, match="choose last or mean"):
        reward_scores(model, build(groups), "first")  # type: ignore[arg-type]


def test_log_probs_at_a_temperature_and_sums() -> None:
    model, groups = tiny_llama(), random_groups(8)
    use_steerwell_attention(model)
    batch = tree(groups)
    values = per_token_logps(model, batch, temperature=0.5)
    hidden = forward.hidden_states(model, batch)[batch.src]
    logits = hidden @ model.lm_head.weight.t() / 0.5
    expected = logits.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]
    torch.testing.assert_close(values, expected, rtol=1e-5, atol=1e-5)
    sums = sum_by_owner(values, batch.owner, batch.n)
    assert sums.shape == (batch.n,)
    for i in range(batch.n):
        torch.testing.assert_close(sums[i], values[batch.owner == i].sum())


def test_unscored_tokens_are_read_and_not_scored() -> None:
    model = tiny_llama()
    use_steerwell_attention(model)
    group = token_group([10, 11], [[20, 21, 22, 23, 24]])
    whole = per_token_logps(model, tree([group]))
    group.sequences[0].unscored = ((3, 5),)
    batch = tree([group])
    torch.testing.assert_close(per_token_logps(model, batch), whole[[0, 3, 4]])
    assert batch.lengths.tolist() == [3.0]
