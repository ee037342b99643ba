"""Win rate of a policy over the baseline, by any judge that scores, ranks or compares."""

from __future__ import annotations

from collections.abc import Sequence

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup, Prompt
from steerwell.evals.measure import Findings, Measure, Task, Trial, annotated
from steerwell.evals.tasks import shipped_prompts
from steerwell.evals.winrate import compare


def win_rate(prompts: Sequence[Prompt] | None = None, *, criterion: str | None = None) -> Task:
    """Ask both policies the same prompts, let the judge see the pairs, count ties as half.

    Completion i of a prompt meets completion i of the baseline. Default prompts: ``prompts/assistant.jsonl``.
    """
    asked = shipped_prompts("assistant") if prompts is None else tuple(prompts)

    def measure(trial: Trial) -> Findings:
        return _measure(trial, criterion)

    return Task("win_rate", asked, measure, compares=True, needs_judge=True)


def _measure(trial: Trial, criterion: str | None) -> Findings:
    if trial.judge is None:
        raise InputError("win_rate needs a judge", mend="Give judge=….")
    pairs, duels = [], []
    for ours, theirs in zip(trial.groups, trial.against_groups, strict=True):
        if len(ours.completions) != len(theirs.completions):
            raise InputError(
                f"{trial.name} has {len(ours.completions)} completions of a prompt where "
                f"{trial.against_name} has {len(theirs.completions)}",
                mend="Sample both with the same n.",
            )
        for one, other in zip(ours.completions, theirs.completions, strict=True):
            pairs.append((one, other))
            duels.append(CompletionGroup(ours.prompt, (one, other), meta=ours.meta))
    unequal = [duel for duel in duels if duel.completions[0].text_id != duel.completions[1].text_id]
    annotations = list(trial.judge(unequal)) if unequal else []
    found = compare(pairs, annotations, criterion=criterion)
    notes = [str(found.coverage), f"{found.wins} wins, {found.ties} ties, {found.losses} losses"]
    if found.identical:
        notes.append(f"{found.identical} ties are equal texts")
    if found.first_shown.value is not None:
        notes.append(f"the completion shown first won {found.first_shown.value:.0%} of the decided verdicts")
    return Findings(
        (
            Measure(
                "win_rate",
                found.estimate,
                found.coverage,
                better="higher",
                items=tuple((c.prompt_id, c.outcome) for c in found.comparisons),
                notes=tuple(notes),
                detail=found,
            ),
        ),
        annotated(duels, annotations),
    )


__all__ = ["win_rate"]
