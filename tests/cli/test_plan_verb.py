"""``steerwell plan``: its exit status, its JSON, its words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file
from transformers import LlamaConfig

from steerwell.cli.plan_verb import number, size, span
from tiny import SIZES, tiny_tokenizer


@pytest.fixture
def recipe(tiny_dir: Path, pairs_file: Path, tmp_path: Path) -> Path:
    path = tmp_path / "dpo.toml"
    path.write_text(
        f'model = "{tiny_dir}"\ndata = "{pairs_file}"\nobjective = "dpo"\nout = "runs/dpo"\n'
        "[train]\nbatch_size = 4\n"
    )
    return path


@pytest.fixture
def large_dir(tmp_path: Path) -> Path:
    """A directory of more than a billion parameters, without any of them."""
    path = tmp_path / "large"
    sizes = {**SIZES, "hidden_size": 8192, "intermediate_size": 40960, "num_attention_heads": 64}
    LlamaConfig(vocab_size=272, architectures=["LlamaForCausalLM"], **sizes).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    save_file({}, path / "model.safetensors")
    return path


def test_a_recipe_that_fits(run: Any, recipe: Path) -> None:
    outcome = run("plan", recipe)
    assert outcome.status == 0
    for words in ("10 pairs", "layout   tree", "lengths", "longest", "memory", "time", "It fits"):
        assert words in outcome.out
    assert outcome.err == ""
    assert not Path("runs").exists()
    value = run("plan", recipe, "--json", "--set", "batch_size=5").json
    assert value["fits"] is True
    assert value["batches"]["steps"] == 2
    assert value["machine"]["measured"] is True


def test_a_recipe_that_does_not_fit_says_what_to_change(run: Any, recipe: Path, large_dir: Path) -> None:
    words = ("plan", recipe, "--set", f"model={large_dir}", "--gpu", "l4-24gb")
    outcome = run(*words)
    assert outcome.status == 1
    assert outcome.err == ""
    assert "It does not fit" in outcome.out
    assert "lora=16" in outcome.out
    mended = run("plan", recipe, "--set", f"model={large_dir}", "--gpu", "l4-24gb", "--set", "lora=16")
    assert mended.status == 0, mended.out
    assert "lora of rank 16" in mended.out
    more = run(*words, "--count", "8")
    assert more.status == 0, more.out
    assert "8 × l4-24gb" in more.out


def test_bad_input_is_one_line(run: Any, recipe: Path) -> None:
    for words, said in (
        (("plan", "nothing.toml"), "no such recipe"),
        (("plan", recipe, "--gpu", "h100-90gb"), "unknown GPU 'h100-90gb'"),
        (("plan", recipe, "--count", "2"), "count is for named GPUs"),
        (("plan", recipe, "--set", "objective=dpoo"), "unknown objective 'dpoo'"),
        (("plan", recipe, "--set", "model=nothing"), "no such model directory"),
    ):
        outcome = run(*words)
        assert outcome.status == 2, words
        assert outcome.out == ""
        assert outcome.err.count("\n") == 1
        assert said in outcome.err


def test_numbers_for_people() -> None:
    assert size(1003 * 2**20) == "1003 MiB"
    assert [size(n) for n in (0, 1023, 1536, 3 * 2**30, 2**41)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "3 GiB",
        "2 TiB",
    ]
    assert [number(n) for n in (12, 1_500, 7_050_000, 8.19e9)] == ["12", "1.5 k", "7.05 M", "8.19 B"]
    assert [span(s) for s in (0.123, 42, 200, 9000, 400_000)] == [
        "0.12 s",
        "42 s",
        "3 min",
        "2.5 h",
        "4.63 days",
    ]
