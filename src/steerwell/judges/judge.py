"""What a judge is, and how the command line names one.

A judge is any callable ``judge(groups) -> list[Annotation]`` with a ``name``. Nothing needs to be subclassed:
a function with a ``name`` attribute is a judge. The name says who is speaking and goes into every annotation,
so it must change when the judge changes (another model, another prompt, other arguments).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import Annotation, CompletionGroup

KINDS = {
    "rm": "rm:DIRECTORY, a reward model: one score per completion; of an ensemble rm:DIRECTORY?combine=min",
    "rules": "rules:max_words:50,no_repeat, rules with a known meaning: one score per completion",
    "refusal": "refusal, a classifier: does the completion refuse? full, partial or none",
    "openai": "openai:MODEL, any OpenAI-compatible chat endpoint: compares pairs, in both orders",
}


@runtime_checkable
class Judge(Protocol):
    """A callable that reads groups and writes annotations about their completions."""

    @property
    def name(self) -> str:
        """Who is speaking: the ``annotator`` of every annotation."""
        ...

    def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
        """Judge the completions of ``groups``; evidence only, targets are left alone."""
        ...


def parse(text: str, **settings: Any) -> Judge:
    """The judge that a command-line word names: ``rm:DIR``, ``rules:…``, ``refusal`` or ``openai:MODEL``.

    ``settings`` go to the judge's own function (for ``openai``: ``criteria``, ``base_url`` …).
    Raises :class:`InputError` for an unknown kind, with the nearest known one, or for bad arguments.
    """
    from steerwell.judges.llm import pairwise
    from steerwell.judges.refusal import refusal
    from steerwell.judges.reward_model import reward_model
    from steerwell.judges.rules import rules, split_rules

    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise InputError(f"unknown judge {text!r}", mend=nearest(kind, KINDS))
    if kind != "refusal" and not rest.strip():
        raise InputError(f"the judge {kind!r} needs an argument", mend=f"Write {KINDS[kind]}.")
    if kind == "refusal" and rest:
        raise InputError("the refusal judge takes no argument", mend="Write refusal.")
    if kind == "openai":
        return pairwise(text.strip(), **settings)
    if settings:
        raise InputError(
            f"the judge {kind!r} takes no setting {', '.join(sorted(settings))}",
            mend="Only openai:MODEL takes criteria and a base URL.",
        )
    if kind == "rm":
        place, _, asked = rest.partition("?")
        return reward_model(place, **_combining(asked, text))
    return rules(*split_rules(rest)) if kind == "rules" else refusal()


def _combining(asked: str, text: str) -> dict[str, Any]:
    """``combine=uwo&penalty=0.5`` as settings."""
    found: dict[str, Any] = {}
    for part in filter(None, asked.split("&")):
        key, _, value = part.partition("=")
        if key not in ("combine", "penalty"):
            raise InputError(
                f"unknown setting {key!r} in {text!r}", mend=nearest(key, ("combine", "penalty"))
            )
        try:
            found[key] = value if key == "combine" else float(value)
        except ValueError:
            raise InputError(
                f"penalty must be a number, got {value!r}", mend="Write rm:DIRECTORY?combine=uwo&penalty=0.5."
            ) from None
    return found


__all__ = ["KINDS", "Judge", "parse"]
