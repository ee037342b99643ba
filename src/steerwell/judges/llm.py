"""A language model as a judge: compares pairs of completions at any OpenAI-compatible endpoint.

Each pair is shown in both orders, in two separate requests, so that a preference for a side can be seen and
cancels out. The verdict is one JSON object that must carry an id that only the request holds: a candidate
that writes a verdict of its own does not know the id. A request that brings no valid verdict becomes an
annotation with the value None and the reason as its rationale: never a tie, never a default.

With ``logprobs`` the model answers with one letter instead, and the verdict is how likely it holds either: finer
than a word, at the cost of the reasons.

The key is read from the environment when a request is made. It is kept out of names, annotations and
messages.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import resources
from itertools import combinations
from typing import Any, NamedTuple

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, Messages, digest
from steerwell.data.types import Annotation, Completion, CompletionGroup
from steerwell.judges.endpoint import Answer, Endpoint, Failure

VERDICTS: dict[str, Any] = {"first": 0, "second": 1, "tie": "tie", "both_bad": "both_bad"}
KNOWN_CRITERIA = {
    "overall": "which completion serves the person better, all things considered",
    "helpful": "does what was asked, correctly and completely, and no more than that",
    "honest": "says what is true, shows doubt where there is doubt, flatters nobody",
    "harmless": "helps nobody to do harm, and refuses nothing that is harmless",
    "concise": "says what is needed in few words",
}


LETTERS = ("A", "B")
LARGEST_LOG_ODDS = 20.0  # nats; beyond it probabilities in single precision are rounding
SMALLEST_LEFT = 1e-6  # a smaller difference between 1 and a sum of probabilities is rounding
BLANKS = " \n\t▁ĠĊ"  # of tokens, as servers write them


class Task(NamedTuple):
    """Two completions of one prompt in the order in which they are shown, and what to judge them by."""

    first: Completion
    second: Completion
    criteria: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class PairwiseJudge:
    """Compares every pair of a group in both orders. Make one with :func:`pairwise`."""

    endpoint: Endpoint
    criteria: tuple[tuple[str, str], ...]
    both_orders: bool = True
    template: str = field(default="", repr=False)

    @property
    def logprobs(self) -> bool:
        """Whether verdicts carry the log-odds (nats) of the preferred completion as their ``strength``."""
        return self.endpoint.top_logprobs > 0

    @property
    def name(self) -> str:
        """``openai:MODEL/pairwise-DIGEST``: the digest covers prompt, criteria and sampling settings."""
        protocol = digest(self.template, [list(c) for c in self.criteria], self.endpoint.sampling)
        return f"openai:{self.endpoint.model}/pairwise-{protocol[:8]}"

    def __call__(self, groups: Sequence[CompletionGroup], /) -> list[Annotation]:
        """One ``preference`` per pair, order and criterion; None with the reason where no verdict came.

        Raises :class:`InputError` when the endpoint refuses the key or knows no such model or address, and
        when not one request of a call got through.
        """
        tasks = [task for group in groups for task in self._tasks(group)]
        answers = self.endpoint.ask_all([self._ask(task) for task in tasks])
        failures = [answer for answer in answers if isinstance(answer, Failure)]
        if answers and len(failures) == len(answers) and all(failure.unreachable for failure in failures):
            raise InputError(
                f"no answer from {self.endpoint.base_url}: {failures[0].reason}",
                mend="Start the server, or name another one with base_url (--base-url).",
            )
        return [
            annotation
            for task, answer in zip(tasks, answers, strict=True)
            for annotation in self._read(task, answer)
        ]

    def _tasks(self, group: CompletionGroup) -> list[Task]:
        """Pairs of different texts, in the order given and (with both orders) turned round."""
        found: list[Task] = []
        for one, other in combinations(group.completions, 2):
            if one.text_id == other.text_id:
                continue
            # one letter answers one question
            for criteria in ((c,) for c in self.criteria) if self.logprobs else (self.criteria,):
                found.append(Task(one, other, criteria))
                if self.both_orders:
                    found.append(Task(other, one, criteria))
        return found

    def _id(self, task: Task) -> str:
        """What the verdict must carry. It hashes both texts, so no text can contain its own id."""
        return digest(self.name, task.first.id, task.second.id, task.first.text_id, task.second.text_id)[:12]

    def _ask(self, task: Task) -> str:
        form = {"id": self._id(task), **{name: "…" for name, _ in task.criteria}}
        return fill(
            self.template,
            id=self._id(task),
            criteria="\n".join(f"- {name}: {meaning}" for name, meaning in task.criteria),
            prompt=transcript(task.first.prompt),
            first=transcript(task.first.messages),
            second=transcript(task.second.messages),
            form=json.dumps(form, ensure_ascii=False),
        )

    def _read(self, task: Task, answer: Answer | Failure) -> list[Annotation]:
        names = [name for name, _ in task.criteria]
        values: dict[str, Any] = dict.fromkeys(names)
        strength = seconds = None
        if isinstance(answer, Failure):
            rationale = f"no verdict: {answer.reason}"
        elif self.logprobs:
            seconds = answer.seconds
            odds, rationale = letter_odds(answer.first_token)
            if odds is not None:
                values, strength = {names[0]: "tie" if odds == 0 else int(odds < 0)}, abs(odds)
        else:
            seconds = answer.seconds
            verdict, why = parse_verdict(answer.text, self._id(task), names)
            rationale = answer.text.strip() if verdict else f"no verdict: {why}"
            values = {name: VERDICTS[verdict[name]] if verdict else None for name in names}
        return [
            Annotation(
                kind="preference",
                completions=(task.first.id, task.second.id),
                annotator=self.name,
                value=values[name],
                criterion=name,
                strength=strength,
                rationale=rationale[:2000],
                time=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=seconds,
            )
            for name in names
        ]


def letter_odds(first_token: Sequence[tuple[str, float]]) -> tuple[float | None, str]:
    """log P(A) - log P(B) (nats) from the likeliest first tokens of a reply, and the rationale.

    A letter's tokens (``"A"``, ``" A"``) are added up. A letter that is not listed is counted with the most that
    it can have, so the odds are not overstated: the probability of the least likely token listed, or what all
    of them leave over if that is less. None when neither is listed. The odds are kept within ±20.
    """
    left = 1.0 - sum(math.exp(logprob) for _, logprob in first_token)
    floor = min([logprob for _, logprob in first_token] + [math.log(max(left, SMALLEST_LEFT))])
    found: list[float] = []
    for letter in LETTERS:
        mine = [logprob for token, logprob in first_token if token.strip(BLANKS) == letter]
        found.append(max(mine) + math.log(sum(math.exp(x - max(mine)) for x in mine)) if mine else -math.inf)
    if max(found) == -math.inf:
        words = ", ".join(repr(token) for token, _ in first_token[:3])
        return None, f"no verdict: neither A nor B is among the likeliest first tokens ({words} …)"
    one, other = (floor if x == -math.inf else x for x in found)
    odds = max(-LARGEST_LOG_ODDS, min(LARGEST_LOG_ODDS, one - other))
    return odds, f"P(A) = {1 / (1 + math.exp(-odds)):.3g} of the two letters"


def parse_verdict(text: str, id: str, criteria: Sequence[str]) -> tuple[dict[str, str] | None, str]:
    """The verdict of each criterion in a judge's reply, or None and the reason why there is none.

    A verdict is a JSON object with the key ``id`` and this id, each criterion with one of ``first``,
    ``second``, ``tie``, ``both_bad``, and nothing else. Objects with another id, or none, are someone else's
    text and are passed over. Two verdicts that differ are no verdict.
    """
    found = [value for value in _objects(text) if value.get("id") == id]
    if not found:
        return None, "the reply holds no JSON object with the id of the request"
    if any(other != found[0] for other in found[1:]):
        return None, "the reply holds verdicts that contradict each other"
    verdict = {key: value for key, value in found[0].items() if key != "id"}
    if set(verdict) != set(criteria):
        return None, f"the verdict has the keys {sorted(verdict)} and not {sorted(criteria)}"
    wrong = {
        key: value for key, value in verdict.items() if not isinstance(value, str) or value not in VERDICTS
    }
    if wrong:
        return None, f"the verdict says {str(wrong)[:80]}, which is none of {', '.join(VERDICTS)}"
    return verdict, ""


def _objects(text: str) -> list[dict[str, Any]]:
    """Every JSON object that begins somewhere in the text and is not inside another one."""
    decoder = json.JSONDecoder()
    found, place = [], text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
        except (ValueError, RecursionError):
            end = place + 1
        else:
            found.append(value)
        place = text.find("{", end)
    return found


def transcript(messages: Messages) -> str:
    """Messages as text: a single message as its words, more of them with their roles."""
    if len(messages) == 1:
        return messages[0].content
    return "\n\n".join(f"[{message.role}]\n{_words(message)}" for message in messages)


def _words(message: Message) -> str:
    return message.content + (f"\n{message.extra}" if message.extra else "")


def fill(template: str, **values: str) -> str:
    """Put values into ``{{name}}`` places, in one pass: a value that holds ``{{name}}`` stays so."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)


def _criterion(text: str) -> tuple[str, str]:
    name, _, meaning = text.partition(":")
    name = name.strip()
    if not re.fullmatch(r"[A-Za-z][\w-]*", name) or name == "id":
        raise InputError(
            f"{text!r} is no name of a criterion",
            mend="Write a word, or 'word: what it means in one sentence'.",
        )
    return name, meaning.strip() or KNOWN_CRITERIA.get(name, f"is more {name.replace('_', ' ')}")


def pairwise(
    model: str,
    criteria: Sequence[str] = ("overall",),
    *,
    base_url: str | None = None,
    api_key_env: str = "OPENAI_API_KEY",
    both_orders: bool = True,
    temperature: float = 0.0,
    max_tokens: int = 512,
    concurrency: int = 4,
    retries: int = 4,
    backoff: float = 1.0,
    timeout: float = 60.0,
    logprobs: bool = False,
    top_logprobs: int = 20,
) -> PairwiseJudge:
    """A judge that compares pairs with a language model at an OpenAI-compatible endpoint.

    Args:
        model: ``"openai:MODEL"`` (or just the model's name at the endpoint).
        criteria: names (``"helpful"``) or names with their meaning (``"kind: warm, never cold"``). All are
            asked in one request; each gets its own annotation.
        base_url: where ``/chat/completions`` is; ``OPENAI_BASE_URL`` or OpenAI's own address by default.
        api_key_env: the environment variable that holds the key. A server of your own may need none.
        both_orders: show each pair in both orders (two requests).
        concurrency: requests under way at the same time.
        retries: how often status 429, 5xx and lost connections are tried again.
        backoff: seconds before the first retry, doubled each time; a server's ``Retry-After`` goes first.
        timeout: seconds for one request.
        logprobs: ask for one letter and read how likely A and B are, from the log-probabilities of the first token.
            Each criterion is a request of its own, there are no reasons and no "both bad", and ``max_tokens`` is 1.
            The annotation's ``strength`` is the log-odds (nats, 0 or more) of the completion it prefers. Models
            that think before they answer hold no letter as first token: leave it off for them.
        top_logprobs: how many first tokens the server is asked to list; some allow fewer than 20.

    Raises :class:`InputError` for a bad criterion or model name, or when OpenAI's own address has no key.
    """
    if isinstance(criteria, str):
        criteria = (criteria,)
    kind, colon, rest = model.partition(":")
    name = rest if colon and kind == "openai" else model
    if not name.strip():
        raise InputError("the judge needs the name of a model", mend="Write openai:MODEL.")
    named = tuple(_criterion(text) for text in criteria)
    if not named or len({n for n, _ in named}) != len(named):
        raise InputError("criteria must be one or more different names", mend="Name each criterion once.")
    if logprobs and top_logprobs < 2:
        raise InputError(f"top_logprobs must be 2 or more, got {top_logprobs}", mend="Leave it at 20.")
    endpoint = Endpoint(
        model=name.strip(),
        base_url=(base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1").rstrip("/"),
        api_key_env=api_key_env,
        temperature=temperature,
        max_tokens=1 if logprobs else max_tokens,
        concurrency=concurrency,
        retries=retries,
        backoff=backoff,
        timeout=timeout,
        top_logprobs=top_logprobs if logprobs else 0,
    )
    endpoint.check()
    template = prompt_file("pairwise_letter" if logprobs else "pairwise")
    return PairwiseJudge(endpoint, named, both_orders, template)


def prompt_file(name: str) -> str:
    """The text of ``prompts/NAME.txt``."""
    return resources.files("steerwell.judges").joinpath(f"prompts/{name}.txt").read_text(encoding="utf-8")


__all__ = [
    "KNOWN_CRITERIA",
    "VERDICTS",
    "PairwiseJudge",
    "fill",
    "letter_odds",
    "pairwise",
    "parse_verdict",
    "prompt_file",
    "transcript",
]
