"""How likely a model holds either letter, as a verdict: the request, the odds, and servers that do not tell."""

from __future__ import annotations

import math
from typing import Any

import pytest

from chat_server import ChatServer, Request, first_token
from steerwell.data.errors import InputError
from steerwell.data.evidence import check_annotation
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.judges import pairwise, scored
from steerwell.judges.llm import letter_odds


def group(*texts: str, prompt: str = "Say a number.") -> CompletionGroup:
    messages = as_messages(prompt)
    return CompletionGroup(
        messages,
        tuple(Completion(messages, (Message("assistant", t),), Source(index=i)) for i, t in enumerate(texts)),
    )


def judge_at(server: ChatServer, *criteria: str, **settings: Any) -> Any:
    given = {"backoff": 0.001, "logprobs": True, **settings}
    return pairwise("openai:m", criteria or ("overall",), base_url=server.url, **given)


def numbers(request: Request, lean: float = 0.0) -> dict[str, Any]:
    """A model whose log-odds are the difference of the two numbers, and that leans to A."""
    a, b = (float(request.part(f"completion {letter}")) for letter in "AB")
    z = a - b + lean
    return first_token(A=-math.log1p(math.exp(-z)), B=-math.log1p(math.exp(z)))


def test_the_odds_are_the_verdict() -> None:
    data = group("1.5", "0.25")
    with ChatServer(numbers) as server:
        judge = judge_at(server, both_orders=False)
        (found,) = judge([data])
    assert (found.kind, found.value) == ("preference", 0)
    assert found.strength == pytest.approx(1.25)
    assert found.rationale == "P(A) = 0.777 of the two letters"
    check_annotation(found)
    body = server.requests[0].body
    assert (body["logprobs"], body["top_logprobs"], body["max_tokens"]) == (True, 20, 1)
    assert "Answer with one letter" in server.requests[0].text
    assert judge.logprobs


def test_scores_are_the_mean_log_odds_of_both_orders() -> None:
    data = group("1.5", "0.25", "-1")
    with ChatServer(lambda r: numbers(r, lean=0.75)) as server:  # the lean to A cancels
        found = scored(judge_at(server))([data])
    mean = (1.5 + 0.25 - 1) / 3
    assert [a.value for a in found] == pytest.approx([1.5 - mean, 0.25 - mean, -1 - mean], abs=1e-6)
    assert len(server.requests) == 6
    assert found[0].rationale == "mean log-odds +1.88 in 4 comparisons"
    with ChatServer(lambda r: numbers(r, lean=0.75)) as server:
        one, other = scored(judge_at(server))([group("1.5", "0.25")])
    assert one.value - other.value == pytest.approx(
        1.25, abs=1e-6
    )  # no prior: the odds are finite as they are


def test_each_criterion_is_a_request_of_its_own() -> None:
    def reply(request: Request) -> Any:
        return first_token(A=-0.1, B=-3.0) if "- kind: " in request.text else first_token(A=-3.0, B=-0.1)

    with ChatServer(reply) as server:
        found = judge_at(server, "kind: warm", "honest", both_orders=False)([group("x", "y")])
    assert {a.criterion: a.value for a in found} == {"kind": 0, "honest": 1}
    assert len(server.requests) == 2


def test_no_letter_is_no_verdict_and_a_missing_score() -> None:
    def reply(request: Request) -> Any:
        shown = [request.part(f"completion {letter}") for letter in "AB"]
        return first_token(Hm=-0.1, So=-2.5) if "7" in shown else numbers(request)

    data = group("1", "2", "7")
    with ChatServer(reply) as server:
        judge = judge_at(server)
        found = judge([data])
        values = [a.value for a in scored(judge)([data])]
    assert [a.value for a in found] == [1, 0, None, None, None, None]
    assert "neither A nor B is among the likeliest first tokens ('Hm', 'So' …)" in found[2].rationale
    assert found[2].strength is None
    assert values[2] is None
    assert values[:2] == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize(
    ("tokens", "odds"),
    [
        ([("A", -0.5), ("B", -1.5)], 1.0),
        ([("A", math.log(0.3)), (" A", math.log(0.3)), ("ĠB", math.log(0.2)), ("x", -9)], math.log(3)),
        ([("B", -1e-4), ("▁A", -9.25), ("An", -11)], -9.25 + 1e-4),
        ([("A", -0.1), ("x", -3.0), ("y", -5.0)], 4.9),  # B is not listed: at most as likely as y
        ([("A", math.log(0.75))], math.log(3)),  # nothing else is listed: B has at most what is left over
        ([("A", 0.0), ("B", -9999.0)], 20.0),
        ([("B", 0.0), ("A", -9999.0)], -20.0),
        ([("a", -0.1), ("b", -2.0)], None),
        ([], None),
    ],
)
def test_letters_are_read_from_the_first_token(tokens: list[tuple[str, float]], odds: float | None) -> None:
    assert letter_odds(tokens)[0] == (None if odds is None else pytest.approx(odds))


@pytest.mark.parametrize(
    "logprobs", [None, {}, {"content": None}, {"content": [{"token": "A", "logprob": -0.1}]}]
)
def test_a_server_without_log_probs_stops_at_once(logprobs: Any) -> None:
    choice = {"message": {"role": "assistant", "content": "A"}, "logprobs": logprobs}
    server = ChatServer(lambda r: choice)
    with server, pytest.raises(InputError, match="returns no log-probabilities") as error:
        judge_at(server, concurrency=1)([group(f"{i}", "x") for i in range(20)])
    assert "leave logprobs off" in str(error.value)
    assert len(server.requests) <= 2


def test_a_reply_that_ends_at_once_is_a_failure_of_its_own() -> None:
    def reply(request: Request) -> Any:
        empty = {"message": {"role": "assistant", "content": ""}, "logprobs": {"content": []}}
        return numbers(request) if request.number else empty

    with ChatServer(reply) as server:
        found = judge_at(server, concurrency=1)([group("1", "2")])
    assert [a.value for a in found] == [None, 0]
    assert found[0].rationale == "no verdict: the model said nothing"


def test_a_server_that_refuses_the_parameter_says_so() -> None:
    with ChatServer(lambda r: (400, "top_logprobs must be at most 5")) as server:
        found = judge_at(server, both_orders=False)([group("1", "2")])
    assert found[0].rationale == "no verdict: status 400: top_logprobs must be at most 5"
    with pytest.raises(InputError, match="top_logprobs must be 2 or more"):
        pairwise("m", base_url="http://localhost/v1", logprobs=True, top_logprobs=1)


def test_judges_with_and_without_log_probs_have_different_names() -> None:
    where = "http://localhost/v1"
    plain, letter = pairwise("m", base_url=where), pairwise("m", base_url=where, logprobs=True)
    few = pairwise("m", base_url=where, logprobs=True, top_logprobs=5)
    assert len({plain.name, letter.name, few.name}) == 3
    assert (
        plain.name == "openai:m/pairwise-b83a5be2"
    )  # as before there were log-probs: no judge is asked again
