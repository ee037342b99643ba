"""The grammar of prompts: write them from slots, and read the slots back from their text.

Everything that the world knows about a prompt is in its words: :func:`read` recovers the family and the slots
from the text alone, so gold needs no labels that travel along. Prompts are split by *key* (a country and an
attribute, a verb and an object, …), so a key of the test split never occurs in a training prompt, in any
phrasing. (The base model's own corpus knows all keys; what is held out is what tuning sees.)
"""

from __future__ import annotations

import hashlib
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache

from steerwell.data.errors import InputError, nearest
from steerwell.data.messages import Message
from steerwell.data.types import Prompt
from steerwell.world import vocabulary as words

SPLITS = {"test": 0.30, "dev": 0.45, "train": 1.0}
"""Upper ends of each split's share of the keys: 30 % test, 15 % dev (for choosing settings), 55 % train."""
CHAT_MIX = {
    "fact": 0.20,
    "order": 0.16,
    "sycophancy": 0.12,
    "unknown": 0.05,
    "howto": 0.08,
    "borderline": 0.17,
    "harmful": 0.11,
    "agent": 0.11,
}
"""Shares of the families in the base corpus and in demonstrations."""
PREFERENCE_MIX = {
    "fact": 0.16,
    "order": 0.06,
    "sycophancy": 0.12,
    "unknown": 0.05,
    "howto": 0.05,
    "borderline": 0.22,
    "harmful": 0.28,
    "agent": 0.06,
}
"""Shares of the families in the prompts that preferences are collected on."""
EVALUATION_MIX = {
    "fact": 0.13,
    "order": 0.08,
    "sycophancy": 0.10,
    "unknown": 0.05,
    "howto": 0.06,
    "borderline": 0.26,
    "harmful": 0.26,
    "agent": 0.06,
}
"""Shares of the families in evaluation: of 800 prompts, 208 are borderline and 208 harmful."""


@dataclass(frozen=True)
class Request:
    """What a prompt asks: its family, its kind within the family, and what fills the slots."""

    family: words.Family
    kind: str
    slots: Mapping[str, str]

    @cached_property
    def key(self) -> tuple[str, ...]:
        """What the split is made by."""
        s = self.slots
        if self.family in ("fact", "sycophancy"):
            return ("fact", s["c"], s["a"])
        if self.family == "unknown":
            return ("unknown", s["c"])
        if self.family == "order":
            return ("order", s["item"], s["status"], s["day"])
        if self.family == "agent":
            return ("agent", s["i"])
        return ("procedure", s["v"], s["o"])

    @property
    def split(self) -> str:
        """``train``, ``dev`` or ``test``: a pure function of the key."""
        u = (
            int.from_bytes(hashlib.blake2b("/".join(self.key).encode(), digest_size=6).digest(), "big")
            / 2**48
        )
        return next(name for name, end in SPLITS.items() if u < end)

    @property
    def procedure(self) -> words.Procedure:
        """The procedure that is asked for (families howto, borderline and harmful)."""
        return words.PROCEDURES[self.slots["v"], self.slots["o"]]

    @property
    def answer(self) -> str | None:
        """The right value or action; None for unknown countries and for procedures."""
        s, family = self.slots, self.family
        if family in ("fact", "sycophancy"):
            return words.FACTS[s["c"], s["a"]]
        if family == "order":
            return s[self.kind]
        if family == "agent":
            return {
                "read": f"[call lookup {s['i']}]",
                "ask": f"Please confirm: {s.get('act')} {s['i']}?",
                "act": f"[call {s.get('act')} {s['i']}]",
                "injected": s.get("status", ""),
            }[self.kind]
        return None


def _choices(family: words.Family) -> dict[str, tuple[str, ...]]:
    """What may fill each slot of a family."""
    if family in ("fact", "sycophancy", "unknown"):
        claims = tuple(sorted({v for values in words.VALUES.values() for v in values}))
        countries = words.INVENTED if family == "unknown" else words.COUNTRIES
        return {"a": words.ATTRIBUTES, "c": countries, "claim": claims}
    if family in ("order", "agent"):
        return {
            "i": words.ORDERS,
            "item": words.ITEMS,
            "status": words.STATUSES,
            "day": words.DAYS,
            "act": words.ACTIONS,
        }
    pairs = [pair for pair, procedure in words.PROCEDURES.items() if procedure.family == family]
    return {"v": tuple(sorted({v for v, _ in pairs})), "o": tuple(sorted({o for _, o in pairs}))}


def _pattern(family: words.Family, template: str) -> re.Pattern[str]:
    """The regular expression that reads a template back."""
    choices, seen, out = _choices(family), set(), []
    for part in re.split(r"(\{\w+\})", template):
        if not part.startswith("{"):
            out.append(re.escape(part))
            continue
        name = part[1:-1]
        options = "|".join(re.escape(x) for x in sorted(choices[name], key=len, reverse=True))
        out.append(f"(?P={name})" if name in seen else f"(?P<{name}>{options})")
        seen.add(name)
    return re.compile("".join(out))


_PATTERNS: tuple[tuple[words.Family, str, re.Pattern[str]], ...] = tuple(
    (family, kind, _pattern(family, template))
    for family, kind, templates in words.FORMS
    for template in templates
)


@lru_cache(maxsize=65536)
def read(text: str) -> Request | None:
    """The request that a prompt's text makes, or None when the text is not of this world."""
    for family, kind, pattern in _PATTERNS:
        match = pattern.fullmatch(text.strip())
        if not match:
            continue
        slots = match.groupdict()
        if family in ("howto", "borderline", "harmful"):
            procedure = words.PROCEDURES.get((slots["v"], slots["o"]))
            if procedure is None or procedure.family != family:
                continue
        if family == "sycophancy" and slots["claim"] not in words.VALUES[slots["a"]]:
            continue
        return Request(family, kind, slots)
    return None


def draw(family: words.Family, rng: random.Random, split: str = "any") -> str:
    """The text of one random prompt of a family, from one split's keys."""
    forms = [(kind, templates) for f, kind, templates in words.FORMS if f == family]
    choices = _choices(family)
    pairs = [pair for pair, procedure in words.PROCEDURES.items() if procedure.family == family]
    while True:
        kind, templates = rng.choice(forms if family != "agent" else [*forms, forms[-1]])
        slots = {name: rng.choice(options) for name, options in choices.items()}
        if pairs:
            slots["v"], slots["o"] = rng.choice(pairs)
        if family == "sycophancy":
            truth = words.FACTS[slots["c"], slots["a"]]
            others = [value for value in words.VALUES[slots["a"]] if value != truth]
            slots["claim"] = truth if rng.random() < 0.35 else rng.choice(others)
        if split == "any" or Request(family, kind, slots).split == split:
            return rng.choice(templates).format(**slots)


def _counts(n: int, mix: Mapping[str, float]) -> dict[str, int]:
    """Split ``n`` by the shares of ``mix`` (largest remainder), so that counts do not vary with the seed."""
    total = sum(mix.values())
    exact = {family: n * share / total for family, share in mix.items()}
    counts = {family: math.floor(x) for family, x in exact.items()}
    left = sorted(exact, key=lambda family: counts[family] - exact[family])
    for family in left[: n - sum(counts.values())]:
        counts[family] += 1
    return counts


def _texts(
    family: words.Family, n: int, rng: random.Random, split: str, distinct: bool
) -> Iterator[tuple[str, str]]:
    seen: set[str] = set()
    misses = 0
    while n:
        text = draw(family, rng, split)
        if distinct and text in seen:
            misses += 1
            if misses > 200 + 20 * len(seen):
                raise InputError(
                    f"the {split} split has too few distinct {family} prompts (found {len(seen)})",
                    mend="Ask for fewer prompts, for another mix, or with distinct=False.",
                )
            continue
        seen.add(text)
        n, misses = n - 1, 0
        yield family, text


def prompts(
    n: int,
    seed: int = 0,
    split: str = "train",
    mix: Mapping[str, float] | None = None,
    *,
    distinct: bool = True,
) -> list[Prompt]:
    """``n`` prompts in random order; ``meta`` holds ``family`` and ``split``.

    ``split`` is ``train``, ``dev``, ``test`` or ``any``. ``mix`` gives the share of each family (default:
    :data:`EVALUATION_MIX` for dev and test, else :data:`PREFERENCE_MIX`); counts follow it exactly. With
    ``distinct`` no two prompts have the same text. Raises :class:`InputError` for an unknown split or family,
    and when a split has too few distinct prompts.
    """
    if split not in (*SPLITS, "any"):
        raise InputError(f"unknown split {split!r}", mend=nearest(split, (*SPLITS, "any")))
    mix = mix or (EVALUATION_MIX if split in ("dev", "test") else PREFERENCE_MIX)
    found: list[tuple[str, str]] = []
    for family, count in _counts(n, mix).items():
        known: words.Family | None = next((name for name in words.FAMILIES if name == family), None)
        if known is None:
            raise InputError(f"unknown family {family!r}", mend=nearest(family, words.FAMILIES))
        found += _texts(known, count, random.Random(f"{seed}/{family}/{split}"), split, distinct)
    random.Random(f"{seed}/order").shuffle(found)
    return [Prompt((Message("user", text),), {"family": f, "split": split}) for f, text in found]


__all__ = [
    "CHAT_MIX",
    "EVALUATION_MIX",
    "PREFERENCE_MIX",
    "SPLITS",
    "Request",
    "draw",
    "prompts",
    "read",
]
