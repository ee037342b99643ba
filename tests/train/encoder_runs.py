"""Runs for :mod:`test_encoder_runs`: ``python encoder_runs.py ENCODER FOLDER/KIND…``, alone or under ``torchrun``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from small_runs import pair_groups

from steerwell.train import train

KINDS: dict[str, dict[str, Any]] = {
    "cls": {},
    "mean": {"pooling": "mean"},
    "lora": {"lora": 2},
    "bfloat16": {"dtype": "bfloat16"},
}
SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "steps": 6, "batch_size": 5, "checkpoint_every": 2}


def run(encoder: Path, out: Path, **settings: Any) -> Any:
    """Six steps of Bradley-Terry on an encoder; the folder's name is the kind."""
    data, kind = pair_groups(10), KINDS[out.name]
    everything = {"eval_data": data[:3], "max_tokens": 200, **SETTINGS, **kind, **settings}
    return train(str(encoder), data, "bradley_terry", out=out, **everything)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for folder in sys.argv[2:]:
        run(Path(sys.argv[1]), Path(folder))
