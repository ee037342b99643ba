"""Objectives: plain functions from tensors to unreduced losses, each with its formula and source.

``TABLE`` holds them by name; ``explain(name)`` prints one. This room imports torch and nothing else.
"""

from __future__ import annotations

from steerwell.objectives.anchored_pairs import apo_down, apo_zero, bco_pair, cal_dpo, nca_pair
from steerwell.objectives.batchwise import alpha_dpo, aot, aot_unpaired, bco, beta_dpo
from steerwell.objectives.divergences import chi_po, f_dpo
from steerwell.objectives.dpo_variants import discopop, dpo_shift, dpop, exo_pair, hinge, robust_dpo, spin
from steerwell.objectives.length_aware import ld_dpo, ln_dpo, r_dpo
from steerwell.objectives.mixtures import MIXTURES
from steerwell.objectives.policy_gradient import cispo, grpo, ppo_clip, reinforce, rloo
from steerwell.objectives.preference import dpo, ipo, kto, sft, simpo
from steerwell.objectives.process import process_reward
from steerwell.objectives.ranked import info_nca, nca, plackett_luce
from steerwell.objectives.reduce import denominator, reduce
from steerwell.objectives.reference_free import alpha_po, cpo, orpo, slic
from steerwell.objectives.reward import bradley_terry, ordinal, plackett_luce_reward, scaled_bradley_terry
from steerwell.objectives.reward_ensemble import ensemble_bradley_terry, odin_pairs, orthogonal_heads
from steerwell.objectives.reward_heads import quantile, regression
from steerwell.objectives.scored_pairs import odpo, rebel, sppo
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
from steerwell.objectives.token_level import dmpo, step_dpo, tdpo, tis_dpo, wpo

__all__ = [
    "MIXTURES",
    "TABLE",
    "TENSORS",
    "Objective",
    "ObjectiveError",
    "alpha_dpo",
    "alpha_po",
    "aot",
    "aot_unpaired",
    "apo_down",
    "apo_zero",
    "bco",
    "bco_pair",
    "beta_dpo",
    "bradley_terry",
    "cal_dpo",
    "check_hyperparameters",
    "chi_po",
    "cispo",
    "cpo",
    "denominator",
    "discopop",
    "dmpo",
    "dpo",
    "dpo_shift",
    "dpop",
    "ensemble_bradley_terry",
    "exo_pair",
    "explain",
    "f_dpo",
    "get",
    "grpo",
    "hinge",
    "hyperparameters",
    "info_nca",
    "ipo",
    "kto",
    "ld_dpo",
    "ln_dpo",
    "nca",
    "nca_pair",
    "needs",
    "objective",
    "odin_pairs",
    "odpo",
    "optional",
    "ordinal",
    "orpo",
    "orthogonal_heads",
    "plackett_luce",
    "plackett_luce_reward",
    "ppo_clip",
    "process_reward",
    "quantile",
    "r_dpo",
    "rebel",
    "reduce",
    "regression",
    "reinforce",
    "rloo",
    "robust_dpo",
    "scaled_bradley_terry",
    "sft",
    "simpo",
    "slic",
    "spin",
    "sppo",
    "step_dpo",
    "tdpo",
    "tis_dpo",
    "wpo",
]
