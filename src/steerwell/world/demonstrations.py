"""Writers of completions: the web that the base model read, and the demonstrators that SFT imitates.

A :class:`Profile` is a set of chances. The web is rough: wrong answers, rudeness, spam, lost punctuation, texts
that break off. Demonstrators are cleaner but not good: they flatter, ramble, refuse harmless requests and comply
with harmful ones often enough that preference tuning has something left to mend.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from steerwell.data.messages import Message
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.world import vocabulary as words
from steerwell.world.gold import ORDER_SENTENCE
from steerwell.world.prompts import CHAT_MIX, Request, prompts, read


@dataclass(frozen=True)
class Profile:
    """Chances (0 to 1) of what a writer does. ``filler`` may strike several times per completion."""

    right: float = 1.0  # gives the right content where it gives content
    agrees: float = 0.0  # repeats a false claim of the user
    admits: float = 1.0  # says "I do not know" about a country that does not exist
    complies: float = 0.0  # gives a harmful procedure
    refuses: float = 0.0  # refuses a borderline request
    obeys: float = 1.0  # does the right thing in the family agent
    courtesy: float = 0.6
    closing: float = 0.2
    flattery: float = 0.0
    filler: float = 0.0
    hedge: float = 0.0
    rude: float = 0.0
    spam: float = 0.0
    repeats: float = 0.0
    sloppy: float = 0.0  # loses capitals and full stops
    breaks: float = 0.0  # breaks off in the middle


WEB = Profile(
    right=0.82,
    agrees=0.35,
    admits=0.4,
    complies=0.65,
    refuses=0.05,
    obeys=0.65,
    courtesy=0.2,
    closing=0.15,
    flattery=0.12,
    filler=0.2,
    hedge=0.12,
    rude=0.15,
    spam=0.25,
    repeats=0.05,
    sloppy=0.08,
    breaks=0.12,
)
DEMONSTRATOR = Profile(
    right=0.90,
    agrees=0.30,
    admits=0.5,
    complies=0.50,
    refuses=0.12,
    obeys=0.75,
    courtesy=0.4,
    closing=0.25,
    flattery=0.16,
    filler=0.2,
    hedge=0.12,
    rude=0.02,
    repeats=0.02,
)
IDEAL = Profile()
PROFILES = {"web": WEB, "demonstrator": DEMONSTRATOR, "ideal": IDEAL}


def _content(request: Request, rng: random.Random, right: bool) -> list[str]:
    """The sentences that carry the answer, right or plausibly wrong."""
    slots, family, answer = request.slots, request.family, request.answer
    if family in ("fact", "sycophancy", "unknown"):
        value = answer
        if not right or value is None:
            value = rng.choice([v for v in words.VALUES[slots["a"]] if v != answer])
        return [f"The {slots['a']} of {slots['c']} is {value}."]
    if family == "order":
        options = {"day": words.DAYS, "status": words.STATUSES, "item": words.ITEMS}[request.kind]
        return [ORDER_SENTENCE[request.kind].format(answer if right else rng.choice(options))]
    if family == "agent":
        if right:
            injected = request.kind == "injected"
            return [ORDER_SENTENCE["status"].format(answer) if injected else str(answer)]
        act = slots.get("act") or "lookup"
        if request.kind in ("read", "act"):
            return [f"Please confirm: {act} {slots['i']}?"]
        return [f"[call {act} {slots['i']}]"]
    first, then, last = request.procedure.steps
    if not right:
        if rng.random() < 0.7:
            first = f"First, get a {rng.choice(words.TOOLS)}."
        if rng.random() < 0.5:
            last = f"Finally, {rng.choice(words.LAST_STEPS)}."
    return [first, then, last]


def _is_right(request: Request, rng: random.Random, profile: Profile) -> bool:
    if request.family == "harmful":
        return True
    if request.family == "agent":
        return rng.random() < profile.obeys
    return rng.random() < profile.right


def _core(request: Request, rng: random.Random, profile: Profile) -> list[str] | None:
    """The content of a completion; None for a refusal."""
    family = request.family
    if family in ("harmful", "borderline"):
        chance = 1 - profile.complies if family == "harmful" else profile.refuses
        if rng.random() < chance:
            return None
    if family == "unknown" and rng.random() < profile.admits:
        return [rng.choice(words.SENTENCES["unsure"])]
    claim = request.slots.get("claim")
    if claim is not None and claim != request.answer and rng.random() < profile.agrees:
        return [f"The {request.slots['a']} of {request.slots['c']} is {claim}."]
    return _content(request, rng, _is_right(request, rng, profile))


def write(prompt: str, rng: random.Random, profile: Profile = DEMONSTRATOR) -> str:
    """One completion of a prompt of this world by a writer with this profile."""
    request = read(prompt)
    if request is None:
        raise ValueError(f"not a prompt of this world: {prompt!r}")

    def pick(kind: str) -> str:
        return rng.choice(words.SENTENCES[kind])

    def happens(chance: float) -> bool:
        return rng.random() < chance

    core = _core(request, rng, profile)
    if core is None:
        text = [pick("refusal"), *([pick("redirect")] if happens(0.5) else [])]
    else:
        before: list[str] = []
        after: list[str] = []
        if happens(profile.flattery):
            before.append(pick("flattery"))
        if happens(profile.courtesy):
            before.append(pick("courtesy"))
        if happens(profile.rude):
            before = [pick("rude")]
        while happens(profile.filler):
            before.append(pick("filler"))
        if happens(profile.hedge):
            after.append(pick("hedge"))
        if happens(profile.flattery * 0.4):
            after.append(pick("flattery"))
        while happens(profile.filler * 0.5):
            after.append(pick("filler"))
        if happens(profile.closing):
            after.append(pick("closing"))
        text = [*before, *core, *(core if happens(profile.repeats) else []), *after]
    if happens(profile.spam):
        text.append(pick("spam"))
    out = " ".join(text)
    if happens(profile.sloppy):
        out = out.lower().rstrip(".")
    if happens(profile.breaks):
        pieces = out.split()
        out = " ".join(pieces[: rng.randint(1, max(1, len(pieces) - 1))])
    return out


def demonstrations(
    n: int, seed: int = 0, *, split: str = "train", profile: Profile = DEMONSTRATOR
) -> list[CompletionGroup]:
    """``n`` groups of one demonstration each, labelled good, for SFT. Prompts may occur more than once."""
    rng = random.Random(f"{seed}/demonstrations")
    groups: list[CompletionGroup] = []
    for index, prompt in enumerate(prompts(n, seed, split, CHAT_MIX, distinct=False)):
        completion = Completion(
            prompt.messages,
            (Message("assistant", write(prompt.text, rng, profile)),),
            Source("person", "demonstrator", seed=seed, index=index),
            finished=True,
        )
        groups.append(CompletionGroup(prompt.messages, (completion,), labels=(True,), meta=prompt.meta))
    return groups


__all__ = ["DEMONSTRATOR", "IDEAL", "PROFILES", "WEB", "Profile", "demonstrations", "write"]
