"""What the plan says against what models hold and runs record."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from steerwell.data.errors import InputError
from steerwell.models.batch import pack
from steerwell.models.load import load_policy
from steerwell.train.census import recorded
from steerwell.train.config import Recipe, TrainConfig
from steerwell.train.items import Prepared, prepare
from steerwell.train.loop import checked
from steerwell.train.machines import GPUS, named
from steerwell.train.plan import MEMORY_ERROR, TIME_ERROR, plan
from steerwell.train.recipe import run_recipe
from steerwell.train.skeleton import skeleton
from steerwell.train.sources import shuffled
from steerwell.train.trace import Product
from tiny import SIZES, tiny_llama, tiny_policy_dir, tiny_qwen3, tiny_tokenizer
from train.small_runs import LengthJudge, pair_groups

MakeRecipe = Callable[..., Recipe]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy_dir(tmp_path_factory.mktemp("plan"))


@pytest.fixture(scope="module")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [
        {
            "prompt": group.prompt[0].content,
            "chosen": group.completions[0].text,
            "rejected": group.completions[2].text,
        }
        for group in pair_groups(10)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(model_dir: Path, data_file: Path, tmp_path: Path) -> MakeRecipe:
    def make(**changes: Any) -> Recipe:
        train = {"batch_size": 4, "learning_rate": 1e-3} | changes.pop("train", {})
        base = {
            "model": str(model_dir),
            "data": str(data_file),
            "objective": "dpo",
            "out": str(tmp_path / "run"),
        }
        return Recipe(**{**base, **changes}, train=TrainConfig(**train))

    return make


def mixture_of_experts() -> Any:
    sizes = {**SIZES, "vocab_size": 272, "head_dim": 8}
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**sizes, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24)
    )


@pytest.mark.parametrize(
    "model",
    [tiny_llama, tiny_qwen3, lambda: tiny_llama(num_key_value_heads=4), mixture_of_experts],
    ids=["grouped", "tied", "plain", "experts"],
)
def test_parameters_are_counted_exactly(model: Any, tmp_path: Path) -> None:
    real = model()
    found = skeleton(str(tiny_policy_dir(tmp_path, model=real)))
    assert found.total == found.trainable == sum(p.numel() for p in real.parameters())
    assert found.weights == sum(x.numel() * x.element_size() for x in (*real.parameters(), *real.buffers()))


def test_parameters_of_an_adapter_are_counted_exactly(model_dir: Path) -> None:
    real = load_policy(model_dir, lora=3).model
    found = skeleton(str(model_dir), lora=3)
    assert found.total == sum(p.numel() for p in real.parameters())
    assert found.trainable == sum(p.numel() for p in real.parameters() if p.requires_grad)
    dora = skeleton(str(model_dir), lora=3, adapter="dora")
    rows = sum(p.shape[0] for n, p in real.named_parameters() if "lora_B" in n)  # one length for each row
    assert dora.trainable == found.trainable + rows


def test_four_bits_take_an_eighth_of_the_linear_weights(model_dir: Path) -> None:
    plain, quantised = (skeleton(str(model_dir), lora=2, adapter=kind) for kind in ("lora", "qlora"))
    real = load_policy(model_dir).model
    linear = sum(p.numel() for name, p in real.named_parameters() if "proj" in name)
    assert plain.weights - quantised.weights == pytest.approx(linear * (4 - 4.127 / 8), abs=1)


@pytest.mark.parametrize(
    ("objective", "train"),
    [("dpo", {}), ("sft", {"layout": "rows"}), ("bradley_terry", {"max_length": 40, "epochs": 2})],
)
def test_tokens_and_steps_are_those_of_the_run(
    recipe: MakeRecipe, objective: str, train: dict[str, Any]
) -> None:
    asked = recipe(objective=objective, train=train)
    said = plan(asked)
    record = run_recipe(asked).record
    both = said.data.keys() & record["data"].keys()
    assert {"groups", "completions", "pairs", "tokens", "scored_tokens", "truncated_completions"} <= both
    for name in both - {"notes"}:
        assert said.data[name] == record["data"][name], name
    assert said.batches["steps"] == record["steps"]
    assert said.batches["passes"] * said.data["tokens"] == record["tokens"]
    assert said.fits
    assert said.mends == []


def test_micro_batches_are_those_of_the_loop() -> None:
    terms, config = checked("dpo", {"batch_size": 5, "max_tokens": 150, "epochs": 2.0}, {})
    data = prepare(pair_groups(13), terms, tiny_tokenizer(), None)
    census = recorded(data, Prepared([], {}), config, "tree")
    cut: list[list[str]] = []
    for step in range(census.steps):
        items = [data.items[i] for i in shuffled(13, step, 5, config.seed, 26)]
        for members in pack([item.tokens for item in items], 150):
            cut.append([items[i].prompt_id for i in members])
    assert [[item.prompt_id for item in items] for items in census.micro_batches] == cut
    assert census.steps == 6
    assert len(cut) > 6


def test_rows_padding_lengths_and_longest(recipe: MakeRecipe, data_file: Path, tmp_path: Path) -> None:
    """Three pairs by hand. A word of n letters has n tokens here; a turn of the user has n + 2 tokens, then one
    token opens the answer, and one ends it."""
    rows = [("q" * 4, "a" * 3, "b" * 5), ("q" * 2 + "z", "c", "d" * 2), ("q" * 9, "e" * 6, "f")]
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in rows))
    said = plan(recipe(data=str(path), train={"batch_size": 2, "seed": 0}))
    prompts, answers = (7, 6, 12), ((4, 6), (2, 3), (7, 2))
    whole = [p + a for p, both in zip(prompts, answers, strict=True) for a in both]
    assert said.data["tokens"] == sum(prompts) + sum(map(sum, answers))
    assert said.data["tokens_as_rows"] == sum(whole)
    order = shuffled(3, 0, 3, 0)
    longest = [max(p + a for a in both) for p, both in zip(prompts, answers, strict=True)]
    first = 4 * max(longest[order[0]], longest[order[1]])
    assert said.data["tokens_padded"] == first + 2 * longest[order[2]]
    assert [row["tokens"] for row in said.data["longest"]] == sorted(whole, reverse=True)[:5]
    assert said.data["longest"][0]["words"] == "q" * 9
    assert sum(count for _, _, count in said.data["histogram"]) == 6


def test_no_weight_is_read(recipe: MakeRecipe, tmp_path: Path) -> None:
    broken = tiny_policy_dir(tmp_path, name="broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    assert plan(recipe(model=str(broken))).data == plan(recipe()).data
    with pytest.raises(InputError):
        load_policy(broken)


def test_what_training_refuses_is_refused(recipe: MakeRecipe, tmp_path: Path) -> None:
    for changes, words in (
        ({"objective": "dpoo"}, "unknown objective"),
        ({"objective": "kto"}, "the data is empty"),
        ({"reference": "none"}, "needs a reference"),
        ({"data": str(tmp_path / "nothing.jsonl")}, "no such file"),
        ({"model": str(tmp_path / "nothing")}, "no such model directory"),
        ({"rollouts": {"n": 2}}, "without a judge"),
    ):
        with pytest.raises(InputError, match=words):
            plan(recipe(**changes))
    with pytest.raises(InputError, match=r"unknown GPU 'h101-80gb'.*h100-80gb"):
        plan(recipe(), gpu="h101-80gb")
    with pytest.raises(InputError, match="count is for named GPUs"):
        plan(recipe(), count=2)


def test_rows_longer_than_the_model_reads_are_refused(recipe: MakeRecipe, tmp_path: Path) -> None:
    short = tiny_policy_dir(tmp_path, name="short", model=tiny_llama(max_position_embeddings=24))
    with pytest.raises(InputError, match="the model reads 24"):
        plan(recipe(model=str(short)))


def test_memory_of_full_training_in_bfloat16_is_the_sum_by_hand(recipe: MakeRecipe) -> None:
    """On a GPU: 2 bytes of weights, 4 of master weights, 4 of gradients and 8 of moments for each parameter."""
    said = plan(recipe(), gpu="h100-80gb")
    parameters = said.model["parameters"]
    parts = said.peak.parts
    assert said.model["dtype"] == "bfloat16"
    assert parts["master weights"] == parts["gradients"] == 4 * parameters
    assert parts["optimizer"] == 8 * parameters
    buffers = parts["weights"] - 2 * parameters
    assert 0 <= buffers < 200
    assert said.fits
    assert sum(parts.values()) == said.peak.total
    assert said.interval[0] < said.peak.total < said.interval[1]


def test_more_gpus_share_what_can_be_shared(recipe: MakeRecipe) -> None:
    one, four = plan(recipe(), gpu="h100-80gb"), plan(recipe(), gpu="h100-80gb", count=4)
    assert four.peak.parts["optimizer"] == -(-one.peak.parts["optimizer"] // 4)
    assert four.peak.parts["gathered layers"] > 0 == one.peak.parts["gathered layers"]
    assert (
        four.batches["tokens_per_micro_batch"]["largest"] < one.batches["tokens_per_micro_batch"]["largest"]
    )


def test_a_second_model_is_counted(recipe: MakeRecipe, model_dir: Path, tmp_path: Path) -> None:
    """Another reference, and the policy that a reward model is made from, stay in memory."""
    other = tiny_policy_dir(tmp_path, name="other", model=tiny_llama(seed=1))
    weights = skeleton(str(model_dir)).weights
    assert plan(recipe()).peak.parts["reference"] == 0
    assert plan(recipe(reference=str(other))).peak.parts["reference"] == weights
    assert plan(recipe(objective="bradley_terry")).peak.parts["reference"] == weights


def test_rollouts_are_planned_from_above(recipe: MakeRecipe, data_file: Path) -> None:
    settings = {"n": 3, "prompts_per_step": 4, "max_new_tokens": 12}
    config = {"steps": 2, "learning_rate": 1e-3}
    asked = Recipe(
        **recipe(objective="grpo").model_dump(exclude={"train", "split", "eval_split", "resolve"})
        | {"judge": "length", "rollouts": settings},
        train=TrainConfig(**config),
    )
    said = plan(asked)
    assert said.data["upper_bound"]
    assert said.data["scored_tokens"] == 10 * 3 * 12
    record = run_recipe(asked, judge=LengthJudge()).record
    assert record["steps"] == said.batches["steps"] == 2
    assert 0 < record["tokens"] <= sum(item.size for items in said.census.micro_batches for item in items)
    assert said.seconds["sampling"] > 0


def test_a_group_above_max_tokens_is_named(recipe: MakeRecipe) -> None:
    said = plan(recipe(train={"max_tokens": 30}))
    assert said.batches["groups_above_max_tokens"] > 0
    assert any("more than max_tokens = 30" in note for note in said.notes)


def test_named_gpus_by_their_data_sheets() -> None:
    assert named("h100").name == "h100-80gb"
    assert named("H200-141GB", 2).count == 2
    product = Product(8192, 4096, 4096)
    slow, fast = named("l4-24gb"), named("b200-180gb")
    assert slow.seconds(product, 1) > 10 * fast.seconds(product, 1)
    assert all(gpu.memory > 20 * 2**30 and gpu.rate > 5e13 for gpu in GPUS.values())
    with pytest.raises(InputError, match="count must be at least 1"):
        named("h100", 0)


def test_plain_values_for_json(recipe: MakeRecipe) -> None:
    value = json.loads(json.dumps(plan(recipe(), gpu="a100-80gb", count=2).to_dict()))
    assert list(value) == ["fits", "model", "data", "batches", "memory", "time", "machine", "mends", "notes"]
    assert value["machine"] == {
        "name": "a100-80gb",
        "kind": "cuda",
        "count": 2,
        "measured": False,
        "flops_per_second": pytest.approx(0.65 * 312e12),
    }
    assert value["memory"]["total"] == sum(value["memory"]["parts"].values())
    assert value["time"]["total"] == pytest.approx(sum(value["time"]["parts"].values()))
    assert torch.get_default_dtype() == torch.float32


ROOT = Path(__file__).parents[2]


def test_the_page_states_the_figures_of_the_benchmark() -> None:
    page = (ROOT / "docs" / "planning.md").read_text("utf-8")
    result = json.loads((ROOT / "benchmarks" / "results" / "plan_error.json").read_text("utf-8"))
    rows = [row for row in result["cases"] if row["set"] == "held out"]
    for kind, what in (("memory", "peak memory"), ("time", "CPU seconds")):
        off = sorted(abs(row[kind]["planned"] / row[kind]["measured"] - 1) for row in rows)
        median = (off[(len(off) - 1) // 2] + off[len(off) // 2]) / 2
        assert f"| {what} | {median:.0%} | {off[-1]:.0%} |" in page
    count = len(result["cases"]) - len(rows)
    assert f"fitted on {count} cases" in page
    assert f"the other {len(rows)}," in page
    assert result["machine"]["processor"] in page


def test_the_printed_intervals_are_not_narrower_than_what_was_measured() -> None:
    result = json.loads((ROOT / "benchmarks" / "results" / "plan_error.json").read_text("utf-8"))
    for kind, error in (("memory", MEMORY_ERROR), ("time", TIME_ERROR)):
        assert max(abs(row[f"{kind}_error"]) for row in result["cases"]) <= error
