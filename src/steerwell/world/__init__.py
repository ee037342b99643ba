"""A small world in which alignment can be seen, because the truth about every text is known.

It supplies prompts, demonstrations, a *gold* judge, simulated annotators and a tiny base model; everything else
goes through the same public code as any other model and data. It was built to make the phenomena of alignment
visible: what happens here is an illustration, not evidence about large models.
"""

from steerwell.world.annotators import Annotator, annotate, assign, panel
from steerwell.world.base import BaseRecipe, base_path, train_base
from steerwell.world.demonstrations import DEMONSTRATOR, IDEAL, WEB, Profile, demonstrations, write
from steerwell.world.gold import METRICS, GoldJudge, Verdict, gold, gold_judge, metrics, verdicts
from steerwell.world.prompts import CHAT_MIX, EVALUATION_MIX, PREFERENCE_MIX, Request, prompts, read

__all__ = [
    "CHAT_MIX",
    "DEMONSTRATOR",
    "EVALUATION_MIX",
    "IDEAL",
    "METRICS",
    "PREFERENCE_MIX",
    "WEB",
    "Annotator",
    "BaseRecipe",
    "GoldJudge",
    "Profile",
    "Request",
    "Verdict",
    "annotate",
    "assign",
    "base_path",
    "demonstrations",
    "gold",
    "gold_judge",
    "metrics",
    "panel",
    "prompts",
    "read",
    "train_base",
    "verdicts",
    "write",
]
