"""Pairs of a demonstration and the policy's own answer: the data of one round of self-play (SPIN)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup, Pair, Prompt
from steerwell.models.load import Policy


def self_play_pairs(
    policy: Policy, demonstrations: Iterable[CompletionGroup], *, n: int = 1, **sampling: Any
) -> list[CompletionGroup]:
    """Groups with the demonstrations as chosen and ``n`` fresh samples of ``policy`` as rejected completions
    (arXiv:2401.01335). ``sampling`` goes to :meth:`Policy.sample`.

    Train on them with the objective ``spin`` and ``reference="start"``, from ``policy`` itself; then sample again
    from what came out: each round's opponent is the round before. A sample that says what a demonstration says makes
    no pair with it; a prompt without a pair is left out. Raises :class:`InputError` where none is left, as at the end
    of self-play, and for groups with no completion.
    """
    given = list(demonstrations)
    empty = next((group for group in given if not group.completions), None)
    if empty is not None:
        raise InputError(f"prompt {empty.prompt_id} has no demonstration", mend="Leave it out.")
    sampled = policy.sample([Prompt(group.prompt, group.meta) for group in given], n, **sampling)
    found: list[CompletionGroup] = []
    for group, own in zip(given, sampled, strict=True):
        completions = (*group.completions, *own.completions)
        shown = range(len(group.completions))
        pairs = tuple(
            Pair(i, j)
            for j in range(len(shown), len(completions))
            for i in shown
            if completions[i].text != completions[j].text
        )
        if pairs:
            found.append(
                CompletionGroup(group.prompt, completions, group.annotations, pairs, meta=group.meta)
            )
    if not found:
        raise InputError(
            "the policy says word for word what the demonstrations say",
            mend="Self-play has nothing left to teach.",
        )
    return found


__all__ = ["self_play_pairs"]
