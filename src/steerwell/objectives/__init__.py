"""Objectives: plain functions from tensors to unreduced losses, each with its formula and source.

``TABLE`` holds them by name; ``explain(name)`` prints one. This room imports torch and nothing else.
"""

from __future__ import annotations

from steerwell.objectives.policy_gradient import grpo, ppo_clip, reinforce, rloo
from steerwell.objectives.preference import dpo, ipo, kto, sft, simpo
from steerwell.objectives.reduce import denominator, reduce
from steerwell.objectives.reward import bradley_terry
from steerwell.objectives.table import (
    TABLE,
    TENSORS,
    Objective,
    ObjectiveError,
    check_hyperparameters,
    explain,
    get,
    hyperparameters,
    needs,
    objective,
    optional,
)

__all__ = [
    "TABLE",
    "TENSORS",
    "Objective",
    "ObjectiveError",
    "bradley_terry",
    "check_hyperparameters",
    "denominator",
    "dpo",
    "explain",
    "get",
    "grpo",
    "hyperparameters",
    "ipo",
    "kto",
    "needs",
    "objective",
    "optional",
    "ppo_clip",
    "reduce",
    "reinforce",
    "rloo",
    "sft",
    "simpo",
]
