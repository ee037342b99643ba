"""What a judge is, and how the command line names one.

A judge is any callable ``judge(groups) -> list[Annotation]`` with a ``name``. Nothing needs to be subclassed:
a function with a ``name`` attribute is a judge. The name says who is speaking and goes into every annotation,
so it must change when the judge changes (another model, another prompt, other arguments).
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import Annotation, CompletionGroup

KINDS = {
    "rm": "rm:DIRECTORY, a reward model: one score per completion; of an ensemble rm:DIRECTORY?combine=min",
    "rules": "rules:max_words:50,no_repeat, rules with a known meaning: one score per completion",
    "refusal": "refusal, a classifier: does the completion refuse? full, partial or none",
    "openai": "openai:MODEL, any OpenAI-compatible chat endpoint: compares pairs, in both orders",
    "verifier": "verifier:DIRECTORY, a policy that is asked whether a completion is right: log-odds of Yes",
    "scored": (
        "scored:openai:MODEL or scored:opponents=4,logprobs=yes:openai:MODEL, comparisons made into one score "
        "per completion of a group"
    ),
}
OF_ENDPOINTS = ("criteria", "base_url")  # settings that come from options of the command line


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
    """The judge that a command-line word names: ``rm:DIR``, ``rules:…``, ``refusal`` … (:data:`KINDS`).

    ``settings`` go to the judge's own function (for ``openai``: ``criteria``, ``base_url`` …; for ``verifier``:
    ``question``). Raises :class:`InputError` for an unknown kind, with the nearest known one, or for bad arguments.
    """
    from steerwell.judges.llm import pairwise
    from steerwell.judges.refusal import refusal
    from steerwell.judges.reward_model import reward_model
    from steerwell.judges.rules import rules, split_rules
    from steerwell.judges.verifier import verifier

    kind, _, rest = text.strip().partition(":")
    if kind not in KINDS:
        raise InputError(f"unknown judge {text!r}", mend=nearest(kind, KINDS))
    if kind != "refusal" and not rest.strip():
        raise InputError(f"the judge {kind!r} needs an argument", mend=f"Write {KINDS[kind]}.")
    if kind == "refusal" and rest:
        raise InputError("the refusal judge takes no argument", mend="Write refusal.")
    takes = {*_options(pairwise), *OF_ENDPOINTS} if kind in ("openai", "scored") else set()
    wrong = sorted(set(settings) - takes - ({"question"} if kind == "verifier" else set()))
    if wrong:
        raise InputError(
            f"the judge {kind!r} takes no setting {', '.join(wrong)}",
            mend="Only openai:MODEL takes criteria and a base URL, and only verifier:DIR a question.",
        )
    if kind == "openai":
        return pairwise(text.strip(), **settings)
    if kind == "scored":
        return _scored(rest, settings)
    if kind == "verifier":
        return verifier(rest, **settings)
    if kind == "rm":
        place, _, asked = rest.partition("?")
        return reward_model(place, **_combining(asked, text))
    return rules(*split_rules(rest)) if kind == "rules" else refusal()


def _scored(text: str, settings: dict[str, Any]) -> Judge:
    """``openai:MODEL``, or ``opponents=4,votes=3,temperature=0.7:openai:MODEL``: how to score, and who compares."""
    from steerwell.judges.llm import pairwise
    from steerwell.judges.scored import scored

    first, _, rest = text.partition(":")
    inner, given = (rest, first) if "=" in first else (text, "")
    if inner.partition(":")[0] != "openai":
        raise InputError(
            f"scored makes scores of comparisons, and {inner!r} is no judge that compares",
            mend="Write scored:openai:MODEL. The other judges score or label already.",
        )
    own, its = _options(scored), _options(pairwise)
    options: dict[str, Any] = {}
    for option in filter(None, map(str.strip, given.split(","))):
        name, _, value = option.partition("=")
        if name not in (its | own):
            raise InputError(f"scored has no option {name!r}", mend=nearest(name, its | own))
        options[name] = _value(name, value, (its | own)[name])
    asking = {name: value for name, value in options.items() if name not in own}
    judge = pairwise(inner, **settings, **asking)
    return scored(judge, **{name: value for name, value in options.items() if name in own})


def _options(function: Any) -> dict[str, Any]:
    """The keyword-only arguments of a function that are one word each, with their defaults."""
    return {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY and name not in OF_ENDPOINTS
    }


def _value(name: str, text: str, default: Any) -> Any:
    """An option's text as what its default is: yes or no, a number, or text (None stands for a whole number)."""
    read, wanted = {
        bool: ({"yes": True, "no": False}.__getitem__, "yes or no"),
        float: (float, "a number"),
        str: (str, "text"),
    }.get(type(default), (int, "a whole number"))
    try:
        return read(text)
    except (KeyError, ValueError):
        raise InputError(f"{name} must be {wanted}, got {text!r}", mend=f"Write {name}=….") from None


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
