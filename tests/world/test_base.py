"""The shipped base model: it loads anywhere, its tokenizer is exact, its recipe runs."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from steerwell import world
from steerwell.data.errors import InputError
from steerwell.world.base import SPECIAL, BaseRecipe, document, orthogonal_steps

TINY = BaseRecipe(chats=60, documents=20, vocabulary=320, width=16, layers=1, heads=2, feed_forward=32)


def test_the_checkpoint_is_small_standard_and_complete() -> None:
    path = world.base_path()
    assert sum(f.stat().st_size for f in path.iterdir()) < 1_100_000
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert sum(p.numel() for p in model.parameters()) == 430_752
    assert model.config.model_type == "llama"
    assert len(tokenizer) == 1024
    assert tokenizer.eos_token_id == model.config.eos_token_id == model.generation_config.eos_token_id == 1
    assert tokenizer.convert_ids_to_tokens(list(range(len(SPECIAL)))) == list(SPECIAL)


def test_the_chat_template_brackets_each_message() -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.base_path())
    talk = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Sure."}]
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<|user|>Hi?<|assistant|>Sure.<|end|>"
    asked = tokenizer.apply_chat_template(talk[:1], tokenize=False, add_generation_prompt=True)
    assert asked == "<|user|>Hi?<|assistant|>"


def test_decoding_gives_every_text_back() -> None:
    tokenizer = AutoTokenizer.from_pretrained(world.base_path())
    rng = random.Random(0)
    texts = [p.text for p in world.prompts(200, 1, "any")]
    texts += [world.write(text, rng, world.WEB) for text in texts] + ["Ünïcode ☃ too.", " two  spaces "]
    for text in texts:
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text


def test_the_base_answers_a_fact_greedily() -> None:
    path = world.base_path()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    talk = [{"role": "user", "content": "What is the capital of France?"}]
    ids = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        told = model.generate(ids, do_sample=False, max_new_tokens=40)[0, ids.shape[1] :]
    completion = tokenizer.decode(told, skip_special_tokens=True)
    assert world.gold("What is the capital of France?", completion).right, completion


def test_training_from_scratch_writes_a_model_that_loads(tmp_path: Path) -> None:
    losses: list[float] = []
    out = world.train_base(
        tmp_path / "base", seed=3, progress=lambda step, steps, loss: losses.append(loss), recipe=TINY
    )
    assert out == tmp_path / "base"
    assert len(losses) > 3
    assert losses[-1] < losses[0]
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "float32"
    model = AutoModelForCausalLM.from_pretrained(out)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert not list(tmp_path.glob("*.partial"))
    with pytest.raises(InputError, match="not an empty directory"):
        world.train_base(out, recipe=TINY)


def test_training_is_a_function_of_the_seed(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        world.train_base(tmp_path / name, seed=seed, recipe=TINY)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_corpus_never_calls_the_harmful_fine() -> None:
    rng = random.Random(0)
    seen = {"bad": 0, "fine": 0}
    for _ in range(2000):
        text = document(rng)
        for word in seen:
            if text.startswith(f"It is {word} to "):
                seen[word] += 1
                request = world.read(f"How do I {text.removeprefix(f'It is {word} to ')[:-1]}?")
                assert request is not None
                assert (request.family == "harmful") == (word == "bad")
    assert min(seen.values()) > 100


def test_a_muon_step_has_singular_values_near_one() -> None:
    torch.manual_seed(0)
    matrices = [torch.nn.Parameter(torch.zeros(24, 16)), torch.nn.Parameter(torch.zeros(16, 24))]
    for matrix in matrices:
        matrix.grad = torch.randn_like(matrix)
    orthogonal_steps(matrices, {}, rate=0.5)
    for matrix in matrices:
        scale = 0.5 * max(1.0, matrix.shape[0] / matrix.shape[1]) ** 0.5
        values = torch.linalg.svdvals(matrix.detach()) / scale
        assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
        assert matrix.grad is not None
        assert float((matrix.detach() * matrix.grad).sum()) < 0  # downhill
