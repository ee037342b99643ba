"""docs/models.md says what the code does: its tables name what the sweep compares, and how it is run."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from architectures import NARROW, PADDED, TREE, make
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import tiny_encoders
from steerwell.data.errors import InputError
from steerwell.models import head, stateful, varlen
from steerwell.models.forward import adopt

pytestmark = pytest.mark.filterwarnings("ignore")
PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def table(heading: str) -> dict[str, list[str]]:
    """The table under a heading: the code word in the first cell of each line, and its other cells."""
    section = PAGE.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line
    ]
    return {cells[0].strip("`"): cells[1:] for cells in lines if re.fullmatch("`[a-z0-9_]+`", cells[0])}


def test_the_tables_name_what_is_swept() -> None:
    assert table("Tree").keys() == TREE.keys()
    assert table("Padded").keys() == PADDED.keys()


def test_the_encoders_named_are_those_tested() -> None:
    section = PAGE.read_text().split("\n## Encoders\n")[1].split("\n## ")[0]
    named = re.findall(r"^\| `([a-z0-9-]+)` \|", section, re.MULTILINE)
    assert named == [config.model_type for config, _ in tiny_encoders.CONFIGS.values()]


def test_what_the_kernel_takes() -> None:
    """Soft caps and sinks are what the variable-length kernel does not know."""
    for name, (_, kernel) in table("Tree").items():
        config = CONFIG_MAPPING[name](**TREE[name])
        unknown = getattr(config, "attn_logit_softcapping", None) is not None or name == "gpt_oss"
        assert kernel.startswith("no: ") is unknown, name
    assert varlen.MAX_HEAD == 256


@pytest.mark.parametrize("name", PADDED)
def test_how_hybrids_are_sampled(name: str) -> None:
    said = {"its own cache": True, "whole sequences": False}[table("Padded")[name][1]]
    with torch.no_grad():
        assert stateful._cache_is_exact(make(name)) is said


SETTINGS = {
    "stablelm": NARROW,
    "bert": NARROW,
    "bloom": {"vocab_size": 64, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "t5": {"vocab_size": 64, "d_model": 16, "d_ff": 16, "num_layers": 1, "num_heads": 2},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_refused_is_refused(name: str) -> None:
    assert table("Refused").keys() == SETTINGS.keys()
    kind = AutoModelForSeq2SeqLM if name == "t5" else AutoModelForCausalLM
    torch.manual_seed(0)
    model = kind.from_config(CONFIG_MAPPING[name](**SETTINGS[name]))
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0.0, 0.15)
    with pytest.raises(InputError, match=type(model).__name__):
        adopt(model)


def test_the_budgets_of_the_head() -> None:
    mib = 2**20
    section = PAGE.read_text().split("\n## Head\n")[1]
    assert (
        f"{head.CHUNK_CPU * 4 // mib} MiB of logits on a CPU and {head.CHUNK_ACCELERATOR * 4 // mib} MiB"
        in section
    )
    kept = f"{head.KEEP_CPU * 4 // mib} MiB ({head.KEEP_ACCELERATOR * 2 // mib // 1024} GiB in bf16"
    assert kept in section
