"""Layers that are recomputed or compiled give the same training, under the same names."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import largest_difference, lines, pair_groups, tiny_policy, weights

from steerwell.data.errors import InputError
from steerwell.models.batch import tree
from steerwell.models.forward import per_token_logps
from steerwell.models.load import load_policy
from steerwell.train import layers, train
from steerwell.train.layers import activation_bound, free_memory, needs_checkpointing, set_layers
from tiny import random_groups, tiny_policy_dir

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 4, "steps": 3}


def gradients(model: torch.nn.Module, recompute: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Log-probs, gradients, and how many numbers were kept for the backward pass."""
    take_back = set_layers(model, recompute=recompute, compiled=False)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        logps = per_token_logps(model, tree(random_groups(1, groups=6)))
    model.zero_grad()
    logps.square().mean().backward()
    take_back()
    assert all("forward" not in module.__dict__ for module in model.modules())
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps.detach(), found, sum(kept.values())


@pytest.mark.parametrize("lora", [None, 4])
def test_recomputed_layers_have_equal_values_and_gradients(lora: int | None, tmp_path: Path) -> None:
    model = load_policy(tiny_policy_dir(tmp_path), lora=lora).model
    kept, computed = (gradients(model, recompute) for recompute in (False, True))
    assert torch.equal(kept[0], computed[0])
    assert kept[1].keys() == computed[1].keys()
    assert all(torch.equal(kept[1][name], computed[1][name]) for name in kept[1])
    assert computed[2] < 0.6 * kept[2]


def test_a_run_with_recomputation_is_the_same_run_and_may_be_switched_on_in_the_middle(
    tmp_path: Path,
) -> None:
    class Crash(Exception):
        pass

    def run(out: Path, recompute: Any, crash: int = 0) -> None:
        def progress(stage: str, done: int, total: int, note: str) -> None:
            if stage == "train" and done == crash:
                raise Crash

        train(
            tiny_policy(attention_dropout=0.3), pair_groups(), "dpo", out=out, dropout=True, checkpoint_every=1,
            gradient_checkpointing=recompute, progress=progress, **SETTINGS,
        )  # fmt: skip

    run(tmp_path / "kept", False)
    run(tmp_path / "computed", True)
    with pytest.raises(Crash):
        run(tmp_path / "switched", False, crash=2)
    run(tmp_path / "switched", True)
    for name in ("computed", "switched"):
        for file in ("metrics.jsonl", "model/model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (tmp_path / "kept" / file).read_bytes()
        assert json.loads((tmp_path / name / "run.json").read_text())["gradient_checkpointing"] is True
    assert json.loads((tmp_path / "kept" / "run.json").read_text())["gradient_checkpointing"] is False


def test_a_copy_of_a_model_runs_its_own_layers() -> None:
    model = tiny_policy().model
    batch = tree(random_groups(1))
    set_layers(model, recompute=True, compiled=False)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.5)
    moved = per_token_logps(other, batch)
    plain = tiny_policy().model
    with torch.no_grad():
        for p in plain.parameters():
            p.mul_(1.5)
    assert torch.equal(moved, per_token_logps(plain, batch))
    assert moved.requires_grad


def test_auto_asks_the_memory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_policy().model
    needed = activation_bound(model, 1000)
    # hidden 32, 4 heads and 2 groups of 8, intermediate 48, 2 layers, 4 bytes
    assert needed == 1000 * 2 * (16 * 32 + 6 * 8 * 8 + 4 * 48) * 4
    assert activation_bound(model.to(torch.bfloat16), 1000) == needed // 2
    assert free_memory(torch.device("cpu")) is not None
    for free, wanted in ((None, False), (2**40, False), (needed, True)):
        monkeypatch.setattr(layers, "free_memory", lambda device, free=free: free)
        assert needs_checkpointing(model, 1000) is wanted
    train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", **SETTINGS)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["gradient_checkpointing"] is True


def test_the_estimate_of_activations_is_from_above() -> None:
    model = tiny_policy(hidden_size=64, intermediate_size=160, num_hidden_layers=4).model
    batch = tree(random_groups(3, groups=12))
    own = {p.data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if x.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    from steerwell.models.forward import hidden_states

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        out = hidden_states(model, batch)
    tokens = len(batch.input_ids.flatten())
    assert out.requires_grad
    assert sum(kept.values()) < activation_bound(model, tokens) < 3 * sum(kept.values())


def test_a_model_without_known_layers_is_refused() -> None:
    with pytest.raises(InputError, match="the layers of Linear are not known"):
        set_layers(torch.nn.Linear(2, 2), recompute=True, compiled=False)
    set_layers(torch.nn.Linear(2, 2), recompute=False, compiled=False)
    assert not needs_checkpointing(torch.nn.Linear(2, 2), 10**12)  # "auto" leaves it alone


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_layers_train_alike(recompute: bool, tmp_path: Path) -> None:
    given = {"eval_data": pair_groups(5, seed=1), "eval_every": 1, "gradient_checkpointing": recompute}
    settings = {**SETTINGS, "learning_rate": 1e-4, **given}
    plain = train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "plain", **settings)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    fast = train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "fast", compile=True, **settings)
    assert largest_difference(weights(plain.model), weights(fast.model)) < 1e-5
    for one, other in zip(lines(tmp_path / "plain"), lines(tmp_path / "fast"), strict=True):
        for name in one.keys() | other.keys():
            if not name.endswith("accuracies"):  # ties at the start are broken by rounding
                assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-4), name
    names = [set(load_file(tmp_path / name / "model" / "model.safetensors")) for name in ("plain", "fast")]
    assert names[0] == names[1]
    assert fast.logps(pair_groups(2))[0] == pytest.approx(plain.logps(pair_groups(2))[0], abs=1e-2)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
