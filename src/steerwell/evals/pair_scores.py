"""One score per completion from whatever can give one: a reward model, or a policy beside its reference.

The implicit reward of a policy is log-prob − reference log-prob, summed over the completion (DPO,
arXiv:2305.18290, equation 5, up to beta and a term of the prompt alone). Without a reference the mean
log-probability per token orders completions too, but it is another number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.types import Completion, CompletionGroup
from steerwell.evals.measure import Trial

Scorer = Callable[[Sequence[CompletionGroup]], list[list[float | None]]]

MEAN_LOGP = "mean log-probability"
IMPLICIT = "implicit reward"
REWARD = "reward"


def score(
    model: Any, groups: Sequence[CompletionGroup], reference: Any = None
) -> tuple[str, list[list[float | None]]]:
    """What orders the completions, in words, and one score per completion of each group.

    A model with ``.score(groups)`` is a reward model. Any other is scored by its implicit reward against
    ``reference``, and without one by its mean log-probability.
    """
    if hasattr(model, "score"):
        return REWARD, [list(scores) for scores in model.score(groups)]
    if not hasattr(model, "logps"):
        raise InputError(
            f"{getattr(model, 'name', model)!s} can neither score nor give log-probabilities",
            mend="Give a reward model (.score) or a policy (.logps).",
        )
    ours = model.logps(groups)
    if reference is not None and hasattr(reference, "logps"):
        theirs = reference.logps(groups)
        return IMPLICIT, [
            [a - b for a, b in zip(x, y, strict=True)] for x, y in zip(ours, theirs, strict=True)
        ]
    lengths = [[len(s.ids) - s.n_prompt for s in tokenized.sequences] for tokenized in model.tokenize(groups)]
    return MEAN_LOGP, [
        [logp / max(n, 1) for logp, n in zip(x, y, strict=True)] for x, y in zip(ours, lengths, strict=True)
    ]


def scorer(trial: Trial) -> Scorer:
    """Scores of groups by the policy of a trial, a score that is not a finite number as None (missing).

    Raises :class:`InputError` for a policy that is itself the baseline: it has no implicit reward.
    """
    reference = None if trial.is_baseline or trial.against is trial.policy else trial.against

    def scores(groups: Sequence[CompletionGroup]) -> list[list[float | None]]:
        how, found = score(trial.policy, groups, reference)
        if how == MEAN_LOGP:
            raise InputError(
                f"{trial.name} is a policy without a reference, so it gives no reward",
                mend="Name its reference with --against (against=…), or give a reward model.",
            )
        return [[None if s is None or not math.isfinite(s) else float(s) for s in given] for given in found]

    return scores


def has_words(completion: Completion) -> bool:
    """Whether the last message of a completion says anything."""
    return bool(completion.messages[-1].content.strip())


def forgiving(scores: Scorer) -> Scorer:
    """The same scores, where completions without words may be refused: they are None then.

    Many encoders have no place to read an empty completion. Those are scored apart from the others, so that
    the refusal of one costs no other score.
    """

    def both(groups: Sequence[CompletionGroup]) -> list[list[float | None]]:
        found: list[list[float | None]] = [[None] * len(group.completions) for group in groups]
        for wordy in (True, False):
            places = [
                (i, [j for j, c in enumerate(group.completions) if has_words(c) is wordy])
                for i, group in enumerate(groups)
            ]
            places = [(i, js) for i, js in places if js]
            part = [
                CompletionGroup(
                    groups[i].prompt, tuple(groups[i].completions[j] for j in js), meta=groups[i].meta
                )
                for i, js in places
            ]
            try:
                given = scores(part) if part else []
            except ValueError:  # InputError is one
                if wordy:
                    raise
                continue
            for (i, js), values in zip(places, given, strict=True):
                for j, value in zip(js, values, strict=True):
                    found[i][j] = value
        return found

    return both


__all__ = ["IMPLICIT", "MEAN_LOGP", "REWARD", "Scorer", "forgiving", "has_words", "score", "scorer"]
