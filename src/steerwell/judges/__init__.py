"""Floor 3: judges. A judge reads groups and writes annotations: a model, a rule, a classifier, an endpoint.

All judges write the same record as people do, so they can be compared with people and with each other.
"""

from __future__ import annotations

from steerwell.judges.judge import KINDS, Judge, parse
from steerwell.judges.llm import PairwiseJudge, pairwise
from steerwell.judges.refusal import RefusalJudge, refusal, refusal_kind
from steerwell.judges.reward_model import RewardModelJudge, reward_model
from steerwell.judges.rules import RulesJudge, rules
from steerwell.judges.scored import ScoredJudge, scored
from steerwell.judges.verifier import Question, VerifierJudge, verification_groups, verifier

__all__ = [
    "KINDS",
    "Judge",
    "PairwiseJudge",
    "Question",
    "RefusalJudge",
    "RewardModelJudge",
    "RulesJudge",
    "ScoredJudge",
    "VerifierJudge",
    "pairwise",
    "parse",
    "refusal",
    "refusal_kind",
    "reward_model",
    "rules",
    "scored",
    "verification_groups",
    "verifier",
]
