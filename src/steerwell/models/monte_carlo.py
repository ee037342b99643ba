"""Labels of steps without people: let a policy finish from each step, and see how often it comes out right.

The label of a step is then its worth to that policy, not its truth: a wrong step that a policy mends counts as right,
a right one that it cannot use as wrong (arXiv:2501.07301).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.steps import SEPARATOR, annotate_steps, with_steps
from steerwell.data.types import Annotation, Completion, CompletionGroup
from steerwell.models.attention import unwrap
from steerwell.models.continuation import continuations
from steerwell.models.load import Policy
from steerwell.models.sampler import Progress
from steerwell.models.step_tokens import step_places, token_steps

Judge = Callable[[Sequence[CompletionGroup]], Iterable[Annotation]]
MODES = ("soft", "hard")


@dataclass
class _Open:
    """A completion whose steps are to be labelled: the tokens up to the end of each step (None: nothing to go on
    from), and whether the last of them is the end of the turn.
    """

    completion: Completion
    ends: tuple[int, ...]
    begun: list[tuple[int, ...] | None]
    asked: tuple[int, ...]
    ended: bool


@dataclass
class _Verdicts:
    """How many continuations of a beginning were judged, and how many of them right."""

    right: int = 0
    judged: int = 0


@dataclass
class _Batch:
    """Some groups that are sampled and judged together."""

    open: list[_Open] = field(default_factory=list)
    starts: dict[tuple[Any, ...], Completion] = field(default_factory=dict)  # each beginning once


def monte_carlo_step_labels(
    policy: Policy,
    groups: Iterable[CompletionGroup],
    judge: Judge,
    n: int = 8,
    *,
    mode: Literal["soft", "hard"] = "soft",
    threshold: float = 0.5,
    separator: str = SEPARATOR,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 256,
    progress: Progress | None = None,
) -> list[Annotation]:
    """A ``steps`` annotation of every completion: from the end of each step ``policy`` finishes ``n`` times, and
    ``judge`` says which of these completions are right (arXiv:2312.08935, its hard and soft estimation).

    A step's verdict is the share of its judged continuations that are right (``soft``), or whether any is (``hard``);
    None where none got a verdict, or the tokens up to there fill the model's context. Of a finished completion the
    last step is judged as it stands. ``judge`` is any callable that gives ``label`` annotations, or ``score`` ones,
    which are right from ``threshold`` on; a completion with as many verdicts for as against it has none. Steps are the
    groups' ``steps``, those of their annotations, or as ``separator`` cuts. The rationale counts right of judged.

    The same arguments give the same labels: a beginning's samples are functions of its tokens, ``seed`` and their
    index, and equal beginnings are sampled once. ``progress`` is called with steps done and all. Raises
    :class:`InputError` for a wrong ``mode`` or ``n``, and for completions of several messages.

    Differs from the paper in that the policy itself may be the completer, and that any judge decides instead of the
    equality of final answers.
    """
    if mode not in MODES:
        raise InputError(f"unknown mode {mode!r}", mend="Write 'soft' or 'hard'.")
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}")
    listed = [with_steps(group, separator) for group in groups]
    total, done = sum(len(ends or ()) for group in listed for ends in group.steps or ()), 0
    who = (
        f"mc:{policy.name}@{policy.digest()[:10]}:n={n},{mode},from={threshold:g},t={temperature:g},"
        f"max={max_new_tokens},seed={seed}:{_name_of(judge)}"
    )
    found: list[Annotation] = []
    for batch in _batches(policy, listed, max(1, batch_size // n)):
        keys = list(batch.starts)
        sampled = continuations(
            policy,
            list(batch.starts.values()),
            n,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            batch_size=batch_size,
        )
        whole = [CompletionGroup(o.completion.prompt, (o.completion,)) for o in batch.open if o.ended]
        verdicts = _verdicts(judge([*sampled, *whole]), threshold)
        of = {key: _count(group, verdicts) for key, group in zip(keys, sampled, strict=True)}
        for one in batch.open:
            found.append(_annotation(one, of, verdicts, mode, who))
            done += len(one.ends)
            if progress is not None:
                progress(done, total)
    return found


def _name_of(judge: Judge) -> str:
    return str(getattr(judge, "name", "") or getattr(judge, "__name__", "") or type(judge).__name__)


def _batches(policy: Policy, groups: Sequence[CompletionGroup], enough: int) -> Iterator[_Batch]:
    """Whole groups, until they have ``enough`` beginnings."""
    batch = _Batch()
    for group in groups:
        for one in _opened(policy, group):
            batch.open.append(one)
            for ids in one.begun:
                if ids is not None:
                    batch.starts.setdefault(_key(one, ids), _beginning(policy, one, ids))
        if len(batch.starts) >= enough:
            yield batch
            batch = _Batch()
    if batch.open:
        yield batch


def _key(one: _Open, ids: tuple[int, ...]) -> tuple[Any, ...]:
    return (one.completion.prompt, one.asked, ids)


def _beginning(policy: Policy, one: _Open, ids: tuple[int, ...]) -> Completion:
    words = str(policy.tokenizer.decode(list(ids), skip_special_tokens=True))
    return Completion(
        one.completion.prompt,
        (Message("assistant", words),),
        token_ids=ids,
        prompt_token_ids=one.asked,
        finished=False,
    )


def _opened(policy: Policy, group: CompletionGroup) -> Iterator[_Open]:
    for completion in group.completions:
        if len(completion.messages) != 1:
            raise InputError(
                f"steps of a completion with {len(completion.messages)} messages cannot be sampled from: "
                f"{completion.text[:60]!r}",
                mend="Give each assistant turn as a completion of its own.",
            )
    if not group.completions:
        return
    tokens = policy.tokenize([group])[0]
    context = getattr(unwrap(policy.model).config.get_text_config(), "max_position_embeddings", None)
    every = zip(
        group.completions,
        group.steps or (),
        tokens.sequences,
        token_steps(policy.tokenizer, group, tokens),
        strict=True,
    )
    for completion, ends, sequence, steps in every:
        ended = sequence.ids[-1] in policy.stop_ids
        begun: list[tuple[int, ...] | None] = [None] * len(ends or ())
        for at in step_places([0] * len(steps), steps):
            stop = sequence.n_prompt + at + 1
            room = context is None or stop < context
            if room and not (ended and stop == len(sequence.ids)):
                begun[steps[at]] = tuple(sequence.ids[sequence.n_prompt : stop])
        asked = tuple(sequence.ids[: sequence.n_prompt])
        yield _Open(completion, ends or (), begun, asked, ended)


def _verdicts(annotations: Iterable[Annotation], threshold: float) -> Mapping[str, bool]:
    """By completion, whether it is right: what most verdicts say; completions without a verdict are not there."""
    votes: dict[str, int] = defaultdict(int)
    for annotation in annotations:
        if annotation.value is None or annotation.kind not in ("label", "score"):
            continue
        right = annotation.value if annotation.kind == "label" else annotation.value >= threshold
        votes[annotation.completions[0]] += 1 if right else -1
    return {name: count > 0 for name, count in votes.items() if count}


def _count(group: CompletionGroup, verdicts: Mapping[str, bool]) -> _Verdicts:
    known = [verdicts[c.id] for c in group.completions if c.id in verdicts]
    return _Verdicts(sum(known), len(known))


def _annotation(
    one: _Open,
    of: Mapping[tuple[Any, ...], _Verdicts],
    verdicts: Mapping[str, bool],
    mode: str,
    who: str,
) -> Annotation:
    counts = [_Verdicts() if ids is None else of[_key(one, ids)] for ids in one.begun]
    if one.ended and counts:
        counts[-1] = _count(CompletionGroup(one.completion.prompt, (one.completion,)), verdicts)
    said: list[bool | float | None] = [
        None if not c.judged else c.right > 0 if mode == "hard" else c.right / c.judged for c in counts
    ]
    rationale = "right of judged: " + ", ".join(f"{c.right}/{c.judged}" for c in counts)
    return annotate_steps(one.completion, said, who, ends=one.ends, rationale=rationale)


__all__ = ["monte_carlo_step_labels"]
