"""A language model as a verifier: how likely it answers Yes to a question about a completion, as a score.

The question is asked as an ordinary chat message, so any policy can be asked, and plain SFT on labelled
completions (:func:`verification_groups`) trains it. One :class:`Question` makes the message in training and in
judging: the two can't drift apart.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from steerwell.data.errors import InputError, nearest
from steerwell.data.messages import Message, Messages, digest
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source
from steerwell.judges.llm import fill, prompt_file, transcript

if TYPE_CHECKING:
    from steerwell.models.load import Policy
    from steerwell.models.render import TokenizedGroup

QUESTION = "Is this completion right?"
PLACES = ("prompt", "completion", "question", "yes", "no", "id")
PROBES = ("qzjx", "#0")  # two answers that share no token with each other, nor both with a word


@dataclass(frozen=True)
class Question:
    """What a verifier is asked about a completion, and the two answers. Made by :func:`verifier` and
    :func:`verification_groups` from the same arguments.

    Raises :class:`InputError` for answers that are equal or empty, and for a template without a place for the
    completion or the question, or with an unknown place.
    """

    question: str = QUESTION
    yes: str = "Yes"
    no: str = "No"
    template: str = field(default="", repr=False)  # empty: prompts/verifier.txt

    def __post_init__(self) -> None:
        if not self.yes.strip() or not self.no.strip() or self.yes.strip() == self.no.strip():
            raise InputError(
                f"the answers {self.yes!r} and {self.no!r} can't be told apart",
                mend="Give two different words.",
            )
        places = re.findall(r"\{\{(\w+)\}\}", self.text)
        for place in places:
            if place not in PLACES:
                raise InputError(
                    f"the template has an unknown place {{{{{place}}}}}", mend=nearest(place, PLACES)
                )
        for needed in ("completion", "question"):
            if needed not in places:
                raise InputError(f"the template has no place {{{{{needed}}}}}", mend=f"Add {{{{{needed}}}}}.")

    @property
    def text(self) -> str:
        """The template."""
        return self.template or prompt_file("verifier")

    @property
    def id(self) -> str:
        """Identity of all that is asked."""
        return digest(self.text, self.question, self.yes, self.no)[:8]

    def about(self, completion: Completion) -> Messages:
        """The chat message that asks about a completion. Its markers carry an id that no completion can know."""
        words = fill(
            self.text,
            id=digest(self.id, completion.text_id)[:12],
            prompt=transcript(completion.prompt),
            completion=transcript(completion.messages),
            question=self.question,
            yes=self.yes,
            no=self.no,
        )
        return (Message("user", words.strip()),)

    def both(self, prompt: Messages) -> CompletionGroup:
        """The two answers to a message, as a group: yes, no."""
        answers = (
            Completion(prompt, (Message("assistant", a),), Source(index=i))
            for i, a in enumerate(self.answers)
        )
        return CompletionGroup(prompt, tuple(answers))

    @property
    def answers(self) -> tuple[str, str]:
        """Yes and no."""
        return self.yes, self.no


@dataclass(frozen=True)
class VerifierJudge:
    """Scores completions by a policy's answer to a question. Make one with :func:`verifier`."""

    policy: Policy
    question: Question
    label: str
    max_tokens: int

    @property
    def name(self) -> str:
        """``verifier:NAME@WEIGHTS/QUESTION``, digests of the weights as they are now and of what is asked."""
        return f"verifier:{self.label}@{self.policy.digest()[:10]}/{self.question.id}"

    def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
        """One ``score`` per completion: log P(yes) - log P(no), in nats; None where that is no finite number."""
        asked = [c for group in groups for c in group.completions]
        found, name = [], self.name
        for completion, (yes, no) in zip(asked, self.logps(asked), strict=True):
            value = yes - no
            finite = math.isfinite(value)
            found.append(
                Annotation(
                    kind="score",
                    completions=(completion.id,),
                    annotator=name,
                    value=value if finite else None,
                    rationale=(
                        f"P({self.question.yes}) = {_share(value):.3g} of the two answers, "
                        f"which have {math.exp(yes) + math.exp(no):.3g} of all"
                        if finite
                        else f"no score: the log-odds were {value}"
                    ),
                )
            )
        return found

    def logps(self, completions: Sequence[Completion]) -> list[list[float]]:
        """[log P(yes), log P(no)] (nats) of every completion, as the next token of the policy's turn.

        The two are a group of one-token completions: the message before them is encoded once.
        """
        import torch

        from steerwell.models.forward import per_token_logps
        from steerwell.models.load import by_group, evaluating

        tokens = self.policy.tokenize([self.question.both(self.question.about(c)) for c in completions])
        model = self.policy.model
        with torch.no_grad(), evaluating(model):
            return by_group(
                [first_tokens(group) for group in tokens],
                lambda batch: per_token_logps(model, batch),
                model,
                self.max_tokens,
            )


def first_tokens(answers: TokenizedGroup) -> TokenizedGroup:
    """The group of two answers with the first token in which they differ as the only one that is scored.

    What they share before it is written by the chat template (an empty block of thoughts, say).
    """
    from steerwell.models.render import Sequence as Tokens
    from steerwell.models.render import TokenizedGroup

    yes, no = (sequence.ids for sequence in answers.sequences)
    n = _shared([yes, no])
    return TokenizedGroup([Tokens(ids[: n + 1], n) for ids in (yes, no)], answers.group, [False, False])


def _shared(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    return next(
        (n for n, tokens in enumerate(zip(*sequences, strict=False)) if len(set(tokens)) > 1),
        min(map(len, sequences)),
    )


def _share(log_odds: float) -> float:
    return 1 / (1 + math.exp(-log_odds)) if log_odds > -700 else 0.0


def _check_tokens(policy: Policy, question: Question) -> None:
    """Raise unless the answers differ in the first token after what the chat template writes."""
    prompt = (Message("user", "?"),)
    words = (*question.answers, *PROBES)
    completions = tuple(
        Completion(prompt, (Message("assistant", word),), Source(index=i)) for i, word in enumerate(words)
    )
    (tokens,) = policy.tokenize([CompletionGroup(prompt, completions)])
    ids = [sequence.ids for sequence in tokens.sequences]
    if _shared(ids[:2]) > _shared(ids):
        raise InputError(
            f"{question.yes!r} and {question.no!r} begin with the same token for {policy.name}'s tokenizer",
            mend="Choose two answers with different first tokens.",
        )


def verifier(
    policy: Policy | str | Path,
    *,
    question: str = QUESTION,
    yes: str = "Yes",
    no: str = "No",
    template: str = "",
    max_tokens: int = 16384,
) -> VerifierJudge:
    """A judge of kind ``score`` from a language model that is asked a question about each completion.

    The score is log P(yes) - log P(no) of the next token, in nats: the log-odds of yes when these are the only
    answers. Generative verifiers (arXiv:2408.15240, equation 4) use P(yes) itself; the log-odds order
    completions alike where the two answers have the same probability together, do not flatten near 0 and 1, and do
    not fall when the model would rather say something else. Reasons are not sampled before the answer, as that
    paper's second kind of verifier does.

    Any instruction-tuned model can be asked; :func:`verification_groups` and plain SFT make it better at it.

    Args:
        policy: a loaded policy, a model directory, or a run directory with ``model/`` inside.
        question: what is asked; the answers are named after it.
        yes, no: the answers. Only their first tokens are read.
        template: the whole message, with ``{{completion}}``, ``{{question}}`` and, if wanted, ``{{prompt}}``,
            ``{{yes}}``, ``{{no}}``, ``{{id}}``. Empty: ``judges/prompts/verifier.txt``.
        max_tokens: tokens that are encoded at once.

    Raises :class:`InputError` for a bad template, for answers that begin with the same token for this tokenizer,
    and what :func:`steerwell.load_policy` raises.
    """
    asked = Question(question, yes, no, template)
    if isinstance(policy, str | Path):
        from steerwell.models.load import load_policy

        place = Path(policy)
        inside = place / "model"
        if inside.is_dir() and not (place / "config.json").exists():
            place = inside
        if (place / "steerwell_scoring.json").exists():
            raise InputError(
                "this is a reward model and answers no question", file=policy, mend=f"Write rm:{policy}."
            )
        label = place.parent.name if place is inside else place.name
        policy = load_policy(str(place) if place.exists() else str(policy))
    else:
        label = policy.name
    _check_tokens(policy, asked)
    return VerifierJudge(policy, asked, label, max_tokens)


def verification_groups(
    groups: Iterable[CompletionGroup],
    *,
    question: str = QUESTION,
    yes: str = "Yes",
    no: str = "No",
    template: str = "",
) -> list[CompletionGroup]:
    """SFT data for a :func:`verifier` from labelled completions: the same message, answered by the label.

    One group with one completion (``yes`` for the label True, ``no`` for False) per labelled completion, in
    order; those without a label are left out. Give the arguments that the verifier will get. The log-odds of a
    verifier trained on k times as many True as False labels lie higher by log k than on as many of each.

    Raises :class:`InputError` when no completion has a label, and for a bad template.
    """
    asked = Question(question, yes, no, template)
    found, count = [], 0
    for group in groups:
        count += len(group.completions)
        for completion, label in zip(group.completions, group.labels or (), strict=group.labels is not None):
            if label is None:
                continue
            prompt = asked.about(completion)
            answer = asked.both(prompt).completions[0 if label else 1]
            found.append(CompletionGroup(prompt, (answer,), meta=group.meta))
    if not found:
        raise InputError(
            f"a verifier learns from labels; 0 of {count} completions have one",
            mend="Resolve them first: resolve.labels(groups), or with from_preferences=True.",
        )
    return found


__all__ = ["QUESTION", "Question", "VerifierJudge", "verification_groups", "verifier"]
