"""The nouns: prompts, completions, annotations, groups. No torch here; everything is frozen.

Evidence (:class:`Annotation`: who said what about which text) is kept apart from targets (the ``pairs``,
``scores``, ``labels`` and ``ranks`` of a :class:`CompletionGroup`, which ``resolve`` derives from evidence).
Missing is not zero: a verdict that failed is ``None``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

from steerwell.data.messages import Messages, conversation_id, digest, text

AnnotationKind = Literal["preference", "score", "label", "ranking", "steps", "critique", "correction"]
ANNOTATION_KINDS: tuple[AnnotationKind, ...] = (
    "preference",
    "score",
    "label",
    "ranking",
    "steps",
    "critique",
    "correction",
)


@dataclass(frozen=True)
class Prompt:
    """The messages that ask for a completion, with tags (source, category, split) that travel along."""

    messages: Messages
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def id(self) -> str:
        """Identity of the text: the hash chain of the messages."""
        return conversation_id(self.messages)

    @property
    def text(self) -> str:
        """The words of all messages."""
        return text(self.messages)


@dataclass(frozen=True)
class Source:
    """Where a completion came from. ``index`` tells apart samples that are otherwise drawn alike."""

    kind: Literal["model", "person", "dataset"] = "dataset"
    name: str = ""
    revision: str = ""
    sampling: str = ""  # canonical JSON of the sampling parameters
    seed: int | None = None
    step: int | None = None
    index: int = 0


@dataclass(frozen=True)
class Completion:
    """What answers a prompt.

    When a policy of ours sampled it, ``prompt_token_ids``, ``token_ids`` (with the stop token, if it was
    reached) and ``old_logps`` (nats, one per token, at the sampling temperature) travel with it: sampled
    tokens are facts and are never re-tokenised. ``finished`` is None where it is not known (text data).
    """

    prompt: Messages
    messages: Messages
    source: Source = Source()
    token_ids: tuple[int, ...] | None = field(default=None, repr=False)
    prompt_token_ids: tuple[int, ...] | None = field(default=None, repr=False)
    old_logps: tuple[float, ...] | None = field(default=None, repr=False)
    finished: bool | None = None

    @cached_property
    def text_id(self) -> str:
        """Identity of the text: equal texts after equal prompts have equal ids."""
        return conversation_id(self.messages, conversation_id(self.prompt))

    @cached_property
    def id(self) -> str:
        """Identity of the sample: two equal samples are one text and two samples."""
        s = self.source
        return "c1-" + digest(self.text_id, s.kind, s.name, s.revision, s.sampling, s.seed, s.step, s.index)

    @property
    def text(self) -> str:
        """The words of the completion."""
        return text(self.messages)


@dataclass(frozen=True)
class Annotation:
    """One judgement by one annotator (a person or a judge). Append-only: never changed, only added.

    ``completions`` are the :attr:`Completion.id` s **in the order they were shown**. ``value`` by kind:

    ========== ===================================================================================
    preference 0 (first shown is better), 1 (second), ``"tie"``, ``"both_bad"``
    score      a number
    label      True (good) or False (bad)
    ranking    a tuple with the rank of each completion shown, 1 is best, equal ranks are ties
    steps      a tuple of (end, verdict), one for each step of the text (see :mod:`steerwell.data.steps`);
               a verdict is True (right), False, the probability that the step is right, or None
    critique   text
    correction text: what the completion should have said
    ========== ===================================================================================

    ``None`` means that there is no verdict (a judge failed, a person skipped): never a score of zero.
    ``order_known`` is False for imported data that does not say which completion was shown first; such
    annotations count as votes, but say nothing about the side an annotator prefers.
    """

    kind: AnnotationKind
    completions: tuple[str, ...]
    annotator: str
    value: Any
    criterion: str = "overall"
    strength: float | None = None
    rationale: str = ""
    time: str = ""  # ISO 8601, UTC
    seconds: float | None = None
    cost: float | None = None
    order_known: bool = True

    @cached_property
    def id(self) -> str:
        """Identity of the judgement: the hash of all it says."""
        value = list(self.value) if isinstance(self.value, tuple) else self.value
        return "a1-" + digest(
            self.kind,
            list(self.completions),
            self.annotator,
            value,
            self.criterion,
            self.strength,
            self.rationale,
            self.time,
        )


class Pair(NamedTuple):
    """An edge between two completions of a group, by position in ``group.completions``."""

    chosen: int
    rejected: int
    p: float = 1.0  # probability that chosen is the better one


@dataclass(frozen=True)
class CompletionGroup:
    """One prompt, K completions, the evidence about them, and the targets that were resolved from it.

    ``annotations`` may name completions of other groups too. ``pairs`` are edges; ``scores``, ``labels`` and
    ``ranks`` (0 is best) have one entry per completion (None where there is no verdict) or are None altogether,
    and so have ``token_weights``: one weight per scored token of the completion; ``steps``: the character ends of
    its steps; and ``step_labels``: the probability that each step is right, None where nobody says. ``attributes`` are
    scores by name (helpfulness, verbosity): for each name one entry per completion; all groups of a data set have the
    same names. ``pair_strengths`` say of each pair by how much the chosen one is better: 0 a tie, 1 slightly, 2
    clearly, 3 by far, None where nobody said.
    """

    prompt: Messages
    completions: tuple[Completion, ...] = ()
    annotations: tuple[Annotation, ...] = ()
    pairs: tuple[Pair, ...] = ()
    scores: tuple[float | None, ...] | None = None
    labels: tuple[bool | None, ...] | None = None
    ranks: tuple[int | None, ...] | None = None
    token_weights: tuple[tuple[float, ...] | None, ...] | None = field(default=None, repr=False)
    pair_strengths: tuple[float | None, ...] | None = None
    attributes: Mapping[str, tuple[float | None, ...]] | None = None
    steps: tuple[tuple[int, ...] | None, ...] | None = None
    step_labels: tuple[tuple[float | None, ...] | None, ...] | None = None
    meta: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @cached_property
    def prompt_id(self) -> str:
        """Identity of the prompt's text."""
        return conversation_id(self.prompt)


__all__ = [
    "ANNOTATION_KINDS",
    "Annotation",
    "AnnotationKind",
    "Completion",
    "CompletionGroup",
    "Pair",
    "Prompt",
    "Source",
]
