"""Runs for :mod:`test_processes`: ``python processes_run.py FOLDER/KIND[:STOP]…``, alone or under ``torchrun``."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from small_runs import LengthJudge, pair_groups, step_groups, tiny_policy

from steerwell.models.adapters import Adapter, add_adapter
from steerwell.models.reward_model import RewardModel
from steerwell.train import rollouts, train

SETTINGS: dict[str, Any] = {
    "learning_rate": 3e-3,
    "steps": 6,
    "checkpoint_every": 2,
    "reference_cache": "off",
}
# Adam's first update is close to the gradient's sign. Where a gradient is 0 but for rounding, that is rounding
# blown up to the learning rate, so the runs that are to be equal to the last digits are in float64.
IN_FLOAT32 = ("dpo", "lora_bf16")


class Stopped(Exception):
    """Stands for anything that ends a run from inside, in all of its processes."""


def run(kind: str, out: Path, stop_at: int | None = None, progress: Any = None) -> Any:
    """Six steps of one kind of training; ``stop_at`` makes the run fail after that step."""

    def watch(step: int, model: Any, figures: Any) -> None:
        if step == stop_at:
            raise Stopped

    settings: dict[str, Any] = {**SETTINGS, "watch": watch, "watch_every": 1, "progress": progress}
    policy = tiny_policy()
    if kind not in IN_FLOAT32:
        policy.model.double()
    if kind == "grpo":
        prompts = [f"go {i}" for i in range(5)]
        source = rollouts(prompts, LengthJudge(), n=4, prompts_per_step=3, max_new_tokens=5, updates=2)
        return train(policy, source, "grpo", out=out, **settings)
    data = (step_groups if kind == "process_reward" else pair_groups)(10)
    objective: Any = [("dpo", 1.0), ("sft", 0.1)] if kind == "mixture" else kind
    if kind.startswith(
        "lora"
    ):  # the reference is the adapter switched off; once in bfloat16, with KTO's live one
        policy.model = add_adapter(policy.model, Adapter(4))
        objective = "kto" if kind == "lora_bf16" else "dpo"
        if kind == "lora_bf16":
            settings["dtype"] = "bfloat16"
    start: Any = policy
    if (
        kind == "odin"
    ):  # a head that is large enough for its own loss to be seen, in each process's unequal share
        start = RewardModel.from_policy(policy, head="quality_length", outputs=("quality", "length"))
        start.model.score.weight.data *= 100
        objective = [("odin_pairs", 1.0), ("orthogonal_heads", 30.0)]
    return train(
        start, data, objective, out=out, eval_data=data[:3], eval_every=2, batch_size=5,
        max_tokens=120, **settings,
    )  # fmt: skip


if __name__ == "__main__":
    torch.set_num_threads(1)
    for asked in sys.argv[1:]:
        place, _, stop = asked.partition(":")
        with suppress(Stopped):
            run(Path(place).name, Path(place), int(stop) if stop else None)
