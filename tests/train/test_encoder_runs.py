"""Encoders are trained by the one loop: cut into micro-batches, stopped and continued, in bfloat16, with an adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import encoder_runs
import pytest
import torch
from encoder_runs import KINDS, run
from safetensors.torch import load_file
from small_runs import largest_difference, lines, pair_groups, text_group, tiny_policy, weights
from test_processes import launch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from steerwell.data.errors import InputError
from steerwell.data.types import Pair
from steerwell.judges import reward_model
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.train import Recipe, train
from steerwell.train.plan import plan
from steerwell.train.rundir import TrainingError
from tiny_encoders import FAMILIES, classifier_dir, encoder_dir


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("encoders")
    return {family: encoder_dir(folder, family) for family in FAMILIES}


class Stopped(Exception):
    """Stands for anything that ends a run from inside."""


def moved(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights less the keys' biases: softmax cancels them, so that their gradient is rounding and AdamW makes steps of
    it.
    """
    return {name: value for name, value in found.items() if not name.endswith("key.bias")}


def stop_at(step: int) -> dict[str, Any]:
    def watch(now: int, model: Any, figures: Any) -> None:
        if now == step:
            raise Stopped

    return {"watch": watch, "watch_every": 1}


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        *((family, "cls") for family in FAMILIES),
        ("bert", "mean"),
        ("deberta", "lora"),
        ("roberta", "bfloat16"),
    ],
)
def test_an_encoder_learns_pairs_and_serves_what_it_learnt(
    encoders: dict[str, Path], family: str, kind: str, tmp_path: Path
) -> None:
    """Every kind of run lowers the loss; what is saved scores as what is returned, and as transformers does."""
    data = pair_groups(10)
    model = run(encoders[family], tmp_path / kind, steps=12, learning_rate=5e-3)
    figures = lines(tmp_path / kind)
    assert figures[0]["eval/loss"] == pytest.approx(0.6931, abs=0.02)
    assert figures[-1]["eval/loss"] < figures[0]["eval/loss"] - 0.005
    record = json.loads((tmp_path / kind / "run.json").read_text())
    assert record["identity"]["train.pooling"] == ("mean" if kind == "mean" else "cls")
    assert record["data"]["truncated_prompts"] == 0
    assert "ends" not in record["data"]
    assert record["preflight"]["packed_against_alone"]["completions"] > 0
    again = load_reward_model(tmp_path / kind / "model")
    assert again.recipe == model.recipe
    found = torch.tensor(again.score(data))
    torch.testing.assert_close(found, torch.tensor(model.score(data)), rtol=1e-4, atol=1e-5)
    if kind != "mean":
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / kind / "model").eval()
        tokenizer = AutoTokenizer.from_pretrained(tmp_path / kind / "model")
        texts = [(g.prompt[0].content, c.text) for g in data for c in g.completions]
        with torch.no_grad():
            logits = theirs(**tokenizer(*zip(*texts, strict=True), padding=True, return_tensors="pt")).logits
        torch.testing.assert_close(found.flatten(), logits[:, 0], rtol=1e-4, atol=1e-5)


def test_how_a_step_is_cut_changes_nothing(encoders: dict[str, Path], tmp_path: Path) -> None:
    """One micro-batch, or one for each group."""
    one = weights(run(encoders["bert"], tmp_path / "one" / "cls", max_tokens=100_000).model)
    many = weights(run(encoders["bert"], tmp_path / "many" / "cls", max_tokens=1).model)
    assert largest_difference(moved(one), moved(many)) < 1e-5
    before = weights(RewardModel.from_encoder(encoders["bert"]).model)
    assert largest_difference(one, before) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_continued_is_the_same_run(
    encoders: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    run(encoders["roberta"], tmp_path / "straight" / kind, **stop_at(99))
    with pytest.raises(Stopped):
        run(encoders["roberta"], tmp_path / "twice" / kind, **stop_at(5))
    run(encoders["roberta"], tmp_path / "twice" / kind, **stop_at(99))
    for name in ("metrics.jsonl", "model/model.safetensors"):
        straight, twice = ((tmp_path / which / kind / name).read_bytes() for which in ("straight", "twice"))
        assert straight == twice, name


def test_recomputed_activations_give_the_same_weights(encoders: dict[str, Path], tmp_path: Path) -> None:
    found = [
        weights(run(encoders["modernbert"], tmp_path / str(on) / "cls", gradient_checkpointing=on).model)
        for on in (True, False)
    ]
    assert largest_difference(*found) < 1e-7


def test_two_processes_do_the_run_of_one(encoders: dict[str, Path], tmp_path: Path) -> None:
    launch(encoder_runs.__file__, str(encoders["roberta"]), *(str(tmp_path / "two" / kind) for kind in KINDS))
    for kind in KINDS:
        run(encoders["roberta"], tmp_path / "one" / kind)
        one, two = (lines(tmp_path / which / kind) for which in ("one", "two"))
        near = 5e-3 if kind == "bfloat16" else 1e-5
        assert [x["loss"] for x in one[1:]] == pytest.approx([x["loss"] for x in two[1:]], abs=near)
        mine, other = (
            load_file(tmp_path / which / kind / "model" / "model.safetensors") for which in ("one", "two")
        )
        # a weight moves by 5e-3; where a gradient is small AdamW scales up its rounding too
        assert largest_difference(moved(mine), moved(other)) < (2e-3 if kind == "bfloat16" else 1e-4)
        if kind != "bfloat16":
            one, two = (load_reward_model(tmp_path / which / kind / "model") for which in ("one", "two"))
            scores, others = (torch.tensor(model.score(pair_groups(6))) for model in (one, two))
            assert scores.std() > 1e-3
            torch.testing.assert_close(scores, others, rtol=1e-4, atol=1e-5)


def test_the_output_layer_stays_in_float32(encoders: dict[str, Path], tmp_path: Path) -> None:
    """In bfloat16 scores near 8 would be multiples of 1/16."""
    seen: dict[str, torch.dtype] = {}

    def watch(step: int, model: Any, figures: Any) -> None:
        seen.update({name: p.dtype for name, p in model.model.named_parameters()})

    run(encoders["roberta"], tmp_path / "bfloat16", watch=watch)
    fine = {name for name, dtype in seen.items() if dtype == torch.float32}
    assert fine == {"classifier.out_proj.weight", "classifier.out_proj.bias"}
    assert len(seen) > 20
    assert seen["classifier.dense.weight"] == torch.bfloat16


# What is cut, and how it is scored


def test_cut_prompts_are_counted_and_the_limit_is_kept(encoders: dict[str, Path], tmp_path: Path) -> None:
    long = text_group("far too long " * 30 + "end", ["yes", "no"], pairs=(Pair(0, 1),))
    wordy = text_group("why", ["a b c " * 40, "d"], pairs=(Pair(0, 1),))
    notes: list[str] = []
    model = train(
        str(encoders["bert"]),
        [*pair_groups(4), long, wordy],
        "bradley_terry",
        out=tmp_path / "run",
        max_length=64,
        steps=1,
        progress=lambda stage, done, total, note: notes.append(note) if stage == "data" else None,
    )
    about = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    found = [tokens for g in [*pair_groups(4), long, wordy] for tokens in model.tokenize([g])]
    assert about["truncated_prompts"] == sum(tokens.cut_prompts for tokens in found) > 2
    assert about["truncated_completions"] == sum(sum(tokens.truncated) for tokens in found) == 1
    assert "cut 1 of 16 completions (6.2%) to max_length=64: they have lost their end" in notes[0]
    assert "read after a prompt that has lost its beginning to max_length=64" in notes[0]
    assert model.recipe.max_length == 64
    assert load_reward_model(tmp_path / "run" / "model").recipe.max_length == 64
    assert max(len(s.ids) for tokens in found for s in tokens.sequences) == 64


def test_without_max_length_the_model_says_how_much_it_reads(
    encoders: dict[str, Path], tmp_path: Path
) -> None:
    long = text_group("far too long " * 60 + "end", ["yes", "no"], pairs=(Pair(0, 1),))
    train(str(encoders["roberta"]), [long], "bradley_terry", out=tmp_path / "run", steps=1)
    about = json.loads((tmp_path / "run" / "run.json").read_text())["data"]
    assert about["truncated_prompts"] == 2
    assert "max_length=128" in about["notes"][0]


# What is given and what is refused


def test_a_reward_model_on_an_encoder_is_trained_on(tmp_path: Path) -> None:
    """A classifier from elsewhere goes on from its own head; one given as an object is left alone."""
    path = classifier_dir(tmp_path, "deberta")
    given = load_reward_model(path)
    before = given.score(pair_groups(4))
    settings: dict[str, Any] = {"steps": 2, "learning_rate": 1e-3, "batch_size": 4}
    one = train(given, pair_groups(8), "bradley_terry", out=tmp_path / "object", **settings)
    two = train(str(path), pair_groups(8), "bradley_terry", out=tmp_path / "path", **settings)
    assert given.score(pair_groups(4)) == before
    assert weights(one.model).keys() == weights(two.model).keys()
    assert largest_difference(weights(one.model), weights(two.model)) == 0
    assert largest_difference(weights(one.model), weights(given.model)) > 1e-4


def test_refusals(encoders: dict[str, Path], tmp_path: Path) -> None:
    bert, out = str(encoders["bert"]), tmp_path / "run"
    with pytest.raises(InputError, match="BertModel, an encoder: it reads both ways and cannot write"):
        train(bert, pair_groups(4), "dpo", out=out)
    with pytest.raises(InputError, match="cannot write"):
        train(tiny_policy(), pair_groups(4), "dpo", out=out, reference=bert)
    with pytest.raises(InputError, match="pooling 'last' is for decoders"):
        train(bert, pair_groups(4), "bradley_terry", out=out, pooling="last")
    with pytest.raises(InputError, match="pooling 'cls' is for encoders"):
        train(tiny_policy(), pair_groups(4), "bradley_terry", out=out, pooling="cls")
    with pytest.raises(InputError, match="cannot share prompts: it has attention that reads both ways"):
        train(bert, pair_groups(4), "bradley_terry", out=out, layout="tree")
    with pytest.raises(InputError, match=r"holds no text beside 3 special tokens"):
        train(bert, pair_groups(4), "bradley_terry", out=out, max_length=3)
    same = text_group("why", ["Yes", "yes"], pairs=(Pair(0, 1),))
    with pytest.raises(InputError, match="chosen and rejected are equal: 'Yes'"):
        train(bert, [same, *pair_groups(4)], "bradley_terry", out=out)
    assert not out.exists()
    (tmp_path / "d.jsonl").write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    recipe = Recipe(model=bert, data=str(tmp_path / "d.jsonl"), objective="bradley_terry", out=str(out))
    with pytest.raises(InputError, match="plan knows decoders only"):
        plan(recipe)


def test_the_first_check_fires_where_padding_is_seen(
    encoders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = RewardModel.from_encoder(encoders["bert"])
    own = type(model.model).forward

    def without_mask(self: Any, *args: Any, attention_mask: Any = None, **kwargs: Any) -> Any:
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(model.model), "forward", without_mask)
    with pytest.raises(TrainingError, match="mixes up the rows of a batch"):
        train(model, pair_groups(6), "bradley_terry", out=tmp_path / "run", steps=1)


def test_an_encoder_judges(tmp_path: Path) -> None:
    path = classifier_dir(tmp_path, "bert")
    model, data = load_reward_model(path), pair_groups(3)
    annotations = reward_model(str(path))(data)
    assert [a.value for a in annotations] == pytest.approx(
        [x for some in model.score(data) for x in some], abs=1e-6
    )
    assert {a.kind for a in annotations} == {"score"}
