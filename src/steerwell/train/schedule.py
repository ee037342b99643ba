"""The learning rate over a run."""

from __future__ import annotations

import math

from steerwell.train.config import TrainConfig


def rate(step: int, steps: int, config: TrainConfig) -> float:
    """The share of the peak learning rate at step ``step`` (from 0): warm-up, then the schedule."""
    rising = math.ceil(config.warmup * steps)
    if step < rising:
        return (step + 1) / rising
    done = (step - rising) / max(1, steps - rising)
    if config.schedule == "constant":
        return 1.0
    falling = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.final_lr + (1 - config.final_lr) * falling


__all__ = ["rate"]
