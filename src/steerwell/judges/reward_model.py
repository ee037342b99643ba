"""A reward model as a judge: one score annotation per completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from steerwell.data.errors import InputError
from steerwell.data.types import Annotation, CompletionGroup

if TYPE_CHECKING:
    from steerwell.models.reward_ensemble import RewardEnsemble
    from steerwell.models.reward_model import RewardModel


@dataclass(frozen=True)
class RewardModelJudge:
    """Scores completions with a loaded reward model. Make one with :func:`reward_model`."""

    model: RewardModel | RewardEnsemble
    name: str

    def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
        """One ``score`` annotation per completion, in the model's normalised units.

        A score that is not a finite number becomes no verdict (None), never zero.
        """
        filled = [group for group in groups if group.completions]
        found: list[Annotation] = []
        for group, scores in zip(filled, self.model.score(filled) if filled else [], strict=True):
            for completion, score in zip(group.completions, scores, strict=True):
                value = float(score)
                found.append(
                    Annotation(
                        kind="score",
                        completions=(completion.id,),
                        annotator=self.name,
                        value=value if math.isfinite(value) else None,
                        rationale="" if math.isfinite(value) else f"the score was {value}",
                    )
                )
        return found


def reward_model(
    path_or_model: str | Path | RewardModel | RewardEnsemble,
    *,
    name: str | None = None,
    combine: str | None = None,
    penalty: float | None = None,
) -> RewardModelJudge:
    """A judge from a reward model or an ensemble of them: a directory (or a run directory with ``model/`` inside), or a
    loaded one.

    The annotator's name is ``rm:NAME@DIGEST`` with the digest of the weights, so that scores of another
    checkpoint in the same place are not taken for scores of this one. ``combine`` and ``penalty`` say how the
    members of an ensemble become one score, where that is to be another way than the model's own
    (:class:`~steerwell.models.scoring.ScoringRecipe`). Raises :class:`InputError` when the directory holds no reward
    model, and for ``combine`` and ``penalty`` where it is no ensemble.
    """
    if isinstance(path_or_model, str | Path):
        from steerwell.models.reward_ensemble import load_scorer

        place = Path(path_or_model)
        inside = place / "model"
        if inside.is_dir() and not (place / "config.json").exists():
            place = inside
        model: RewardModel | RewardEnsemble = load_scorer(
            str(place) if place.exists() else str(path_or_model)
        )
        label = place.parent.name if place is inside else place.name
    else:
        model = path_or_model
        label = str(getattr(model, "name", "") or "model")
    changes = {k: v for k, v in (("combine", combine), ("penalty", penalty)) if v is not None}
    if changes:
        if getattr(getattr(model, "recipe", None), "head", "members") != "members":
            raise InputError(
                f"{' and '.join(changes)} say how members are put together, and {label} has one score",
                mend="Leave them out, or train an ensemble: ensemble_bradley_terry.",
            )
        model = model.with_recipe(**changes)
    return RewardModelJudge(model, name or f"rm:{label}@{model.digest()[:10]}")


__all__ = ["RewardModelJudge", "reward_model"]
