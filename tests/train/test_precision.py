"""bfloat16 with float32 masters: small updates are not lost, gradients add up, and a kill changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_runs import LengthJudge, largest_difference, lines, pair_groups, tiny_policy, weights

from steerwell.models.load import load_policy
from steerwell.models.reward_model import RewardModel
from steerwell.train import rollouts, train
from steerwell.train.precision import MasterWeights, cast, dtype_of, in_dtype, resolved_dtype, set_precision
from tiny import tiny_policy_dir

SETTINGS: dict[str, Any] = {"batch_size": 4, "steps": 4, "warmup": 0.0, "schedule": "constant"}
BF16 = torch.bfloat16


def test_updates_too_small_for_bfloat16_are_not_lost(tmp_path: Path) -> None:
    settings = {**SETTINGS, "learning_rate": 1e-6, "dtype": "bfloat16"}
    start = weights(tiny_policy().model)
    moved = weights(train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", **settings).model)
    exact = weights(
        train(
            tiny_policy(), pair_groups(), "dpo", out=tmp_path / "b", **{**settings, "dtype": "float32"}
        ).model
    )
    assert {value.dtype for value in moved.values()} == {torch.float32}
    name = "model.layers.1.mlp.up_proj.weight"
    # AdamW goes about one learning rate a step, where a weight of 0.15 has a bfloat16 neighbour 1e-3 away
    went, should = moved[name] - start[name], exact[name] - start[name]
    assert 1e-6 < float(went.abs().mean()) < 5e-6
    assert torch.nn.functional.cosine_similarity(went.flatten(), should.flatten(), dim=0) > 0.9
    stuck = start[name].to(BF16)
    assert float((stuck + went.to(BF16) == stuck).float().mean()) > 0.99  # weights in bfloat16 would not move


def test_what_a_step_computes_is_close_to_float32(tmp_path: Path) -> None:
    for dtype in ("bfloat16", "float32"):
        train(
            tiny_policy(), pair_groups(), "dpo", out=tmp_path / dtype, eval_data=pair_groups(4, seed=1),
            learning_rate=1e-3, dtype=dtype, **SETTINGS,
        )  # fmt: skip
    for half, full in zip(lines(tmp_path / "bfloat16"), lines(tmp_path / "float32"), strict=True):
        assert half.keys() == full.keys()
        if "loss" in half:
            assert half["loss"] == pytest.approx(full["loss"], abs=0.02)
            assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.1)
        assert half["learning_rate"] == full["learning_rate"] if "learning_rate" in half else True
    identity = json.loads((tmp_path / "bfloat16" / "run.json").read_text())["identity"]
    assert identity["train.dtype"] == "bfloat16"


def test_gradients_are_summed_in_float32() -> None:
    layer = torch.nn.Linear(1, 1, bias=False)
    masters = _masters_of(layer)
    (master,) = masters.names
    for x in (1.0, 2.0**-10, 2.0**-10):  # in bfloat16 1 + 2^-10 is 1
        layer(torch.full((1, 1), x, dtype=BF16)).sum().backward()
    assert layer.weight.grad is None
    assert master.grad is not None
    assert master.grad.item() == 1 + 2.0**-9
    with torch.no_grad():
        master.add_(2.0**-12)
    wanted = master.detach().clone()
    masters.pull()
    assert layer.weight.dtype == BF16
    assert torch.equal(layer.weight, wanted.to(BF16))
    masters.close()
    assert torch.equal(layer.weight, wanted)
    layer(torch.ones(1, 1)).sum().backward()  # the layer has its own gradients again
    assert layer.weight.grad is not None


class _Small(torch.nn.Module):
    def __init__(self, layer: torch.nn.Linear) -> None:
        super().__init__()
        self.layer = layer

    def get_input_embeddings(self) -> torch.nn.Linear:
        return self.layer


def _masters_of(layer: torch.nn.Linear) -> MasterWeights:
    masters = set_precision(_Small(layer), BF16)
    assert masters is not None
    return masters


@pytest.mark.parametrize("kind", ["mixture", "grpo", "bradley_terry"])
def test_a_crashed_run_in_bfloat16_is_the_same_run(kind: str, tmp_path: Path) -> None:
    class Crash(Exception):
        pass

    def run(out: Path, crash: int = 0) -> None:
        def progress(stage: str, done: int, total: int, note: str) -> None:
            if stage == "train" and done == crash:
                raise Crash

        settings: dict[str, Any] = {"learning_rate": 1e-4, "steps": 6, "checkpoint_every": 2}
        settings |= {"dtype": "bfloat16", "progress": progress}
        if kind == "grpo":
            source = rollouts([f"go {i}" for i in range(4)], LengthJudge(), n=3, prompts_per_step=2,
                              max_new_tokens=4)  # fmt: skip
            train(tiny_policy(), source, "grpo", out=out, **settings)
            return
        objective: Any = [("dpo", 1.0), ("sft", 0.1)] if kind == "mixture" else kind
        train(tiny_policy(), pair_groups(8), objective, out=out, batch_size=3, **settings)

    run(tmp_path / "straight")
    with pytest.raises(Crash):
        run(tmp_path / "run", crash=5)
    run(tmp_path / "run")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes(), name


def test_an_adapter_is_kept_in_float32_over_a_base_in_bfloat16(tmp_path: Path) -> None:
    path = tiny_policy_dir(tmp_path)
    seen: dict[str, set[torch.dtype]] = {}

    def watch(step: int, model: Any, figures: Any) -> None:
        for name, p in model.model.named_parameters():
            seen.setdefault("lora" if "lora_" in name else "base", set()).add(p.dtype)

    trained = train(
        path, pair_groups(), "dpo", out=tmp_path / "a", lora=4, learning_rate=1e-5, dtype="bfloat16",
        watch=watch, checkpoint_every=2, **SETTINGS,
    )  # fmt: skip
    assert seen == {"lora": {BF16}, "base": {BF16}}
    kept = sorted((tmp_path / "a" / "checkpoints").glob("step-*"))[-1]
    from safetensors.torch import load_file

    masters = load_file(kept / "model.safetensors")
    assert all("lora_" in name for name in masters)
    assert {value.dtype for value in masters.values()} == {torch.float32}
    adapter = [p for name, p in trained.model.named_parameters() if "lora_B" in name]
    assert all(p.dtype == torch.float32 and bool(p.any()) for p in adapter)
    assert not torch.equal(adapter[0], adapter[0].to(BF16).float())  # it was not rounded at the end
    base = load_policy(path)
    frozen = {n.replace("base_model.model.", "").replace(".base_layer", ""): p
              for n, p in trained.model.named_parameters() if "lora_" not in n}  # fmt: skip
    for name, value in base.model.named_parameters():
        assert torch.equal(frozen[name], value.to(BF16).float()), name


def test_a_policy_given_is_left_alone_and_one_in_bfloat16_comes_back_as_it_came(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.model.to(BF16)
    before = weights(policy.model)
    trained = train(policy, pair_groups(), "dpo", out=tmp_path / "a", learning_rate=1e-2, dtype="bfloat16",
                    **SETTINGS)  # fmt: skip
    assert largest_difference(before, weights(policy.model)) == 0.0
    assert dtype_of(trained.model) == BF16
    saved = load_file(tmp_path / "a" / "model" / "model.safetensors")
    assert {value.dtype for value in saved.values()} == {BF16}
    assert largest_difference(before, weights(trained.model)) > 1e-3


def test_the_reference_computes_in_the_same_dtype(tmp_path: Path) -> None:
    # KTO asks a living reference: at the start its log-ratios, and so its kl, are exactly 0
    train(tiny_policy(), pair_groups(), "kto", out=tmp_path / "a", dtype="bfloat16", learning_rate=1e-5,
          **SETTINGS)  # fmt: skip
    first = lines(tmp_path / "a")[0]
    assert first["kl"] == 0.0
    assert first["loss"] == pytest.approx(0.5, abs=1e-6)
    train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "b", reference=tiny_policy(), dtype="bfloat16",
          learning_rate=1e-5, **SETTINGS)  # fmt: skip
    assert lines(tmp_path / "b")[0]["rewards/margins"] == 0.0


def test_what_auto_means() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert resolved_dtype("auto", cpu, torch.float32) == torch.float32
    assert resolved_dtype("auto", cpu, torch.float64) == torch.float64
    assert resolved_dtype("auto", cpu, BF16) == torch.float32
    assert resolved_dtype("auto", gpu, torch.float32) == BF16
    assert resolved_dtype("float32", gpu, BF16) == torch.float32
    assert resolved_dtype("bfloat16", cpu, torch.float32) == BF16


def test_casting_leaves_what_must_be_fine() -> None:
    model = RewardModel.from_policy(tiny_policy()).model
    frequencies = model.model.rotary_emb.inv_freq.clone()
    ids = {name: id(p) for name, p in model.named_parameters()}
    other = in_dtype(model, BF16)
    assert other is not model
    assert dtype_of(model) == torch.float32
    assert in_dtype(other, BF16) is other
    cast(model, BF16)
    assert {name: id(p) for name, p in model.named_parameters()} == ids
    assert {p.dtype for name, p in model.named_parameters() if "score" not in name} == {BF16}
    assert model.score.weight.dtype == torch.float32
    assert torch.equal(model.model.rotary_emb.inv_freq, frequencies)
    assert set_precision(tiny_policy().model, torch.float32) is None


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_auto_on_a_gpu_is_bfloat16_and_close_to_float32_on_a_cpu(tmp_path: Path) -> None:
    policy = tiny_policy()
    policy.model.to("cuda")
    for name, given in (("gpu", policy), ("cpu", tiny_policy())):
        train(given, pair_groups(), "dpo", out=tmp_path / name, learning_rate=1e-4, **SETTINGS)
    record = json.loads((tmp_path / "gpu" / "run.json").read_text())
    assert record["identity"]["train.dtype"] == "bfloat16"
    assert record["gradient_checkpointing"] is False
    for one, other in zip(lines(tmp_path / "gpu"), lines(tmp_path / "cpu"), strict=True):
        assert one["loss"] == pytest.approx(other["loss"], abs=0.02)
