"""Rules with a known meaning as a judge: each gives a number from 0 to 1, the score is their mean.

Rules are for what a program can check: length, repetition, a word that must be there, valid JSON. The
rationale of every annotation lists each rule with its value, so a score leads back to what it saw.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import Annotation, Completion, CompletionGroup

Rule = Callable[[Completion], float]
ENDINGS = (".", "!", "?", "…", "。", "！", "？", "```")
CLOSERS = "\"'”’»)]}*_"


def max_words(completion: Completion, limit: int) -> float:
    """1 up to ``limit`` words, then limit / words: twice the limit scores 0.5."""
    words = len(completion.text.split())
    return 1.0 if words <= limit else limit / words


def min_words(completion: Completion, limit: int) -> float:
    """1 from ``limit`` words on, below it words / limit."""
    return min(1.0, len(completion.text.split()) / limit)


def no_repeat(completion: Completion) -> float:
    """The share of word triples that are new: 1 when none is said twice, near 0 for a loop.

    Shorter texts than three words have no triple and score 1.
    """
    words = completion.text.lower().split()
    triples = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(triples)) / len(triples) if triples else 1.0


def must_include(completion: Completion, text: str) -> float:
    """1 when the completion contains ``text`` (case does not matter), else 0."""
    return float(text.casefold() in completion.text.casefold())


def must_exclude(completion: Completion, text: str) -> float:
    """1 when the completion does not contain ``text`` (case does not matter), else 0."""
    return float(text.casefold() not in completion.text.casefold())


def matches(completion: Completion, pattern: re.Pattern[str]) -> float:
    """1 when the regular expression is found in the completion, else 0."""
    return float(pattern.search(completion.text) is not None)


def valid_json(completion: Completion) -> float:
    """1 when the whole completion is one JSON value, else 0."""
    try:
        json.loads(completion.text)
    except (ValueError, RecursionError):
        return 0.0
    return 1.0


def finished(completion: Completion) -> float:
    """1 when the completion came to its end: the sampler says so, or (text data) it ends like a sentence."""
    if completion.finished is not None:
        return float(completion.finished)
    return float(completion.text.rstrip().rstrip(CLOSERS).endswith(ENDINGS))


def _count(name: str, given: str) -> int:
    try:
        value = int(given)
    except ValueError:
        value = 0
    if value < 1:
        raise InputError(
            f"rule {name!r} needs a whole number of words, got {given!r}", mend=f"Write {name}:50."
        )
    return value


def _pattern(name: str, given: str) -> re.Pattern[str]:
    try:
        return re.compile(given)
    except re.error as error:
        raise InputError(
            f"rule {name!r}: {given!r} is no regular expression ({error})", mend="Mend the pattern."
        ) from None


def _text(name: str, given: str) -> str:
    return given


TAKES_ARGUMENT: dict[str, tuple[Callable[..., float], Callable[[str, str], object]]] = {
    "max_words": (max_words, _count),
    "min_words": (min_words, _count),
    "must_include": (must_include, _text),
    "must_exclude": (must_exclude, _text),
    "matches": (matches, _pattern),
}
TAKES_NOTHING: dict[str, Rule] = {"no_repeat": no_repeat, "valid_json": valid_json, "finished": finished}
RULES: dict[str, Callable[..., float]] = {k: v for k, (v, _) in TAKES_ARGUMENT.items()} | TAKES_NOTHING


@dataclass(frozen=True)
class RulesJudge:
    """Scores completions by rules. Make one with :func:`rules`."""

    specs: tuple[str, ...]
    checks: tuple[Rule, ...]

    @property
    def name(self) -> str:
        """The rules themselves, in the order given."""
        return "rules:" + ",".join(spec.replace("\\", "\\\\").replace(",", "\\,") for spec in self.specs)

    def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
        """One ``score`` annotation per completion: the mean of the rules, from 0 to 1."""
        return [self.judge(completion) for group in groups for completion in group.completions]

    def judge(self, completion: Completion) -> Annotation:
        """The annotation of one completion."""
        values = [check(completion) for check in self.checks]
        return Annotation(
            kind="score",
            completions=(completion.id,),
            annotator=self.name,
            value=sum(values) / len(values),
            rationale=", ".join(
                f"{spec} = {value:.3g}" for spec, value in zip(self.specs, values, strict=True)
            ),
        )


def rules(*specs: str) -> RulesJudge:
    """A judge that scores by the mean of the named rules, each written ``"name"`` or ``"name:argument"``.

    ``rules("max_words:50", "no_repeat", "must_include:thank you")``. The rules are in :data:`RULES`.
    Raises :class:`InputError` for an unknown rule (with the nearest known one) or a bad argument.
    """
    if not specs:
        raise InputError("rules needs at least one rule", mend=f"Known: {', '.join(sorted(RULES))}.")
    return RulesJudge(tuple(specs), tuple(_check(spec) for spec in specs))


def split_rules(text: str) -> list[str]:
    r"""The rules of ``"max_words:50,must_include:yes\, of course"``: commas part them, ``\,`` is a comma."""
    parts = [""]
    for token in re.findall(r"\\[,\\]|.", text, re.DOTALL):
        if token == ",":
            parts.append("")
        else:
            parts[-1] += token[1] if len(token) == 2 else token
    return [part.strip() for part in parts if part.strip()]


def _check(spec: str) -> Rule:
    name, colon, given = spec.partition(":")
    if name in TAKES_NOTHING:
        if colon:
            raise InputError(f"rule {name!r} takes no argument, got {given!r}", mend=f"Write {name}.")
        return TAKES_NOTHING[name]
    if name not in TAKES_ARGUMENT:
        raise InputError(f"unknown rule {name!r}", mend=nearest(name, RULES))
    if not given:
        raise InputError(f"rule {name!r} needs an argument", mend=f"Write {name}:VALUE.")
    function, read = TAKES_ARGUMENT[name]
    return partial(_call, function, read(name, given))


def _call(function: Callable[..., float], argument: object, completion: Completion) -> float:
    return function(completion, argument)


__all__ = ["RULES", "RulesJudge", "rules", "split_rules"]
