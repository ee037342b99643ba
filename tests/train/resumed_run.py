"""A run in a process of its own, slow enough to be killed: ``python resumed_run.py KIND OUT [SECONDS PER
STEP]``."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any

import torch
from small_runs import LengthJudge, pair_groups, tiny_policy

from steerwell.train import rollouts, train

STEPS = 14


def run(kind: str, out: Path, progress: Any = None) -> Any:
    """A run of 14 steps with a checkpoint at every third, of recorded data or of rollouts."""
    settings: dict[str, Any] = {"learning_rate": 3e-3, "steps": STEPS, "checkpoint_every": 3}
    if kind == "grpo":
        source = rollouts([f"go {i}" for i in range(5)], LengthJudge(3), n=4, prompts_per_step=2,
                          max_new_tokens=5, updates=2)  # fmt: skip
        return train(tiny_policy(), source, "grpo", out=out, progress=progress, **settings)
    objective: Any = [("dpo", 1.0), ("sft", 0.1)] if kind == "mixture" else kind
    data = pair_groups(10)
    return train(
        tiny_policy(), data, objective, out=out, eval_data=data[:3], eval_every=4, batch_size=3,
        progress=progress, **settings,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    pause = float(sys.argv[3]) if len(sys.argv) > 3 else 0.0
    run(sys.argv[1], Path(sys.argv[2]), progress=lambda *_: time.sleep(pause))
