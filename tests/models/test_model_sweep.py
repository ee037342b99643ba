"""Every architecture that is promised: log-probs, rewards and all gradients are those of the model's own
attention on one sequence at a time, whatever the layout."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from architectures import PADDED, TREE, branching_groups, has_classifier, make
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.models import forward, tree_plan
from steerwell.models.attention import takes_tree
from steerwell.models.batch import Batch, padded, rows, tree
from steerwell.models.forward import adopt, per_token_logps, reward_scores
from tiny import token_group

pytestmark = pytest.mark.filterwarnings(
    "ignore"
)  # what transformers says about kernels that are not installed
WINDOWS = [name for name, settings in TREE.items() if "sliding_window" in settings]
GROUPS = branching_groups()
SEQUENCES = [s for group in GROUPS for s in group.sequences]
Grads = dict[str, Tensor]


def weighted(values: Tensor) -> Tensor:
    return (values * torch.randn(values.shape, generator=torch.Generator().manual_seed(3))).sum()


def gradients(model, values: Tensor) -> Grads:
    names, parameters = zip(*model.named_parameters(), strict=True)
    found = torch.autograd.grad(weighted(values), parameters, allow_unused=True)
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def own_logps(model) -> Tensor:
    """(S,) from the model's own attention and head, a sequence per call, no padding."""
    parts = []
    for s in SEQUENCES:
        logits = model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0, s.n_prompt - 1 : -1]
        parts.append(logits.log_softmax(-1).gather(1, torch.tensor(s.ids[s.n_prompt :])[:, None])[:, 0])
    return torch.cat(parts)


def own_scores(model) -> Tensor:
    """(N,) from the model's own pooling: it reads the last token that is not padding."""
    return torch.cat([model(input_ids=torch.tensor([s.ids])).logits[:, 0] for s in SEQUENCES])


def error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def differs(values: Callable[[Batch], Tensor], batch: Batch, model, expected: Tensor, grads: Grads) -> str:
    """Where values or gradients are off by more than 1e-5, relatively; "" if nowhere.

    A gradient that is exactly zero (a key's bias) is rounding on both sides: 1e-7 of the whole counts as zero.
    """
    whole = torch.stack([g.norm() for g in grads.values()]).norm()
    out = values(batch)
    if not error(out, expected) <= 1e-5:
        return f"values: {error(out, expected):.1e}"
    found = gradients(model, out)
    if found.keys() != grads.keys():
        return f"parameters: {found.keys() ^ grads.keys()}"
    off = {k: float((found[k] - g).norm() / (1e-5 * g.norm() + 1e-7 * whole)) for k, g in grads.items()}
    worst = max(off, key=lambda k: off[k])
    return "" if off[worst] <= 1 else f"gradient of {worst}: {off[worst]:.1f} times too far off"


def compare(model, own: Callable[..., Tensor], ours: Callable[..., Tensor], batches: list[Batch]) -> None:
    expected = own(model)
    grads = gradients(model, expected)
    adopt(model)
    for batch in batches:
        assert differs(lambda b: ours(model, b), batch, model, expected.detach(), grads) == ""


def test_the_groups_branch_in_every_way() -> None:
    shared = tree(GROUPS)
    assert shared.n_tokens < sum(len(s.ids) for s in SEQUENCES) - 3 * 11
    assert shared.plan is not None
    depths = [len(node_path) for node_path in paths(shared)]
    assert max(depths) == 2  # a branch of a branch
    assert shared.longest > 2 * 5  # windows bite


def paths(batch: Batch) -> list[tuple]:
    from steerwell.models import batch as room

    sequences, group = room._flatten(GROUPS)
    runs, _ = room._trie(sequences, group)

    def path(i: int) -> tuple:
        return () if runs[i].parent < 0 else (*path(runs[i].parent), runs[i].parent)

    return [path(i) for i in range(len(runs))]


@pytest.mark.parametrize("name", TREE)
def test_trees_and_rows_equal_one_at_a_time(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    batches = [tree(GROUPS), rows(GROUPS), padded(GROUPS)]
    monkeypatch.setattr(tree_plan, "CALL_COST", 0)  # each node by itself, so that no mask hides another
    compare(make(name), own_logps, per_token_logps, [*batches, tree(GROUPS)])


def test_the_promised_architectures_are_swept() -> None:
    assert TREE.keys() == forward.COMPARED
    assert {takes_tree(make(name)) for name in TREE} == {True}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_bite(name: str) -> None:
    model, wide = (make(name, **size) for size in ({}, {"sliding_window": 200}))
    with torch.no_grad():
        assert error(own_logps(wide), own_logps(model)) > 1e-3


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_equal_one_at_a_time(name: str) -> None:
    compare(make(name), own_logps, per_token_logps, [padded(GROUPS)])


@pytest.mark.parametrize("name", PADDED)
def test_a_plan_would_be_wrong_for_them(name: str) -> None:
    """What the padded rows are for: one after another in a row, sequences leak into each other."""
    model = make(name)
    with torch.no_grad():
        expected = own_logps(model)
        batch = rows(GROUPS)
        hidden = forward.backbone(model)(input_ids=batch.input_ids, position_ids=batch.position_ids)
        packed = forward.token_logps(
            hidden.last_hidden_state[0, batch.src], forward.head(model), batch.target
        )
    assert error(packed, expected) > 1e-3


@pytest.mark.parametrize("name", ["qwen3_5_text", "falcon_h1", "lfm2"])
def test_the_length_and_the_filling_of_padding_change_nothing(name: str) -> None:
    model = make(name)
    adopt(model)
    batch = padded(GROUPS)
    length, extra = batch.input_ids.shape[1], 37
    longer = padded([*GROUPS, token_group([5] * length, [[6] * extra])])
    values, wider = per_token_logps(model, batch), per_token_logps(model, longer)[: len(batch.target)]
    assert error(wider, values) <= 1e-5
    other = padded(GROUPS)
    for row, s in zip(other.input_ids, SEQUENCES, strict=True):
        row[len(s.ids) :] = 17
    filled = per_token_logps(model, other)
    assert error(filled, values) <= 1e-5
    first, second = (gradients(model, x) for x in (values, filled))
    assert first.keys() == second.keys()
    for name, g in first.items():
        assert (g - second[name]).norm() <= 1e-5 * g.norm() + 1e-7, name


def test_a_state_that_flows_back_is_refused_on_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison on loading sees a hybrid whose padding reaches the tokens before it."""
    model = make("lfm2")
    real = type(model.model).forward

    def leaking(self, input_ids, **inputs):
        out = real(self, input_ids, **inputs)
        out.last_hidden_state = out.last_hidden_state + 0.1 * out.last_hidden_state.mean(1, keepdim=True)
        return out

    monkeypatch.setattr(type(model.model), "forward", leaking)
    with pytest.raises(InputError, match="own numbers"):
        adopt(model)


@pytest.mark.parametrize("name", [name for name in (*TREE, *PADDED) if has_classifier(name)])
def test_reward_scores_equal_one_at_a_time(name: str) -> None:
    model = make(name, classifier=True)
    batches = [tree(GROUPS), rows(GROUPS)] if name in TREE else [padded(GROUPS)]
    compare(model, own_scores, reward_scores, batches)
