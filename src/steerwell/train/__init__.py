"""Training: one loop for every objective, on recorded data or on fresh rollouts, with exact resume."""

from __future__ import annotations

from steerwell.train.config import Recipe, TrainConfig
from steerwell.train.loop import train
from steerwell.train.recipe import run_recipe
from steerwell.train.rundir import TrainingError
from steerwell.train.sources import rollouts

__all__ = ["Recipe", "TrainConfig", "TrainingError", "rollouts", "run_recipe", "train"]
