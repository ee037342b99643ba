"""``steerwell judge --with``, for judges that make scores: ``scored:openai:MODEL`` and ``verifier:DIR``."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from chat_server import ChatServer, Request, first_token
from steerwell.cli import words
from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.store import open_store
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.judges import PairwiseJudge, ScoredJudge, VerifierJudge, parse
from steerwell.judges.verifier import QUESTION


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "key")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def group(prompt: str, *texts: str) -> CompletionGroup:
    messages = as_messages(prompt)
    completions = (
        Completion(messages, (Message("assistant", t),), Source("model", index=i))
        for i, t in enumerate(texts)
    )
    return CompletionGroup(messages, tuple(completions))


def larger(request: Request) -> str:
    first, second = (float(request.part(f"{side} completion")) for side in ("first", "second"))
    return request.verdict(overall="first" if first > second else "second")


def test_scored_in_a_store_and_samples_that_come_later(run: Any, tmp_path: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        store.add([group("a", "1", "2", "3"), group("b", "4", "5")])
    with ChatServer(larger) as server:
        judge = ["judge", "s.db", "--with", "scored:openai:m", "--base-url", server.url, "--json"]
        found = run(*judge).json
        assert found["judge"].startswith("scored:openai:m/pairwise-")
        assert (found["verdicts"], found["no_verdict"]) == ({"score": 5}, 0)
        assert len(server.requests) == 3 * 2 + 1 * 2
        assert run(*judge).json["new_annotations"] == 0
        assert len(server.requests) == 8  # nothing was asked again
        with open_store(str(tmp_path / "s.db")) as store:
            store.add([group("b", "4", "5", "6")])
        found = run(*judge).json
        assert found["new_annotations"] == 1
    with open_store(str(tmp_path / "s.db")) as store:
        by_text = {
            c.text: a.value for g in store.groups() for c in g.completions for a in g.annotations
            if a.completions == (c.id,)
        }  # fmt: skip
    assert by_text["5"] == pytest.approx(math.log(5) / 2)
    assert by_text["4"] + by_text["5"] == pytest.approx(0.0)
    assert by_text["6"] > by_text["5"]  # on the scale of those that were scored before


def test_options_stand_before_the_judge_that_compares(run: Any, tmp_path: Path) -> None:
    def letters(request: Request) -> Any:
        a, b = (float(request.part(f"completion {letter}")) for letter in "AB")
        return first_token(A=-math.log1p(math.exp(b - a)), B=-math.log1p(math.exp(a - b)))

    with open_store(str(tmp_path / "s.db")) as store:
        store.add([group("a", *"12345")])
    with ChatServer(letters) as server:
        word = "scored:logprobs=yes,opponents=2:openai:m"
        found = run("judge", "s.db", "--with", word, "--base-url", server.url, "--json").json
        assert found["verdicts"] == {"score": 5}
        assert len(server.requests) == 5 * 2
    judge = parse(
        "scored:votes=3,temperature=0.7,prior=1,both_orders=no:openai:org/m:tag", base_url=server.url
    )
    assert isinstance(judge, ScoredJudge)
    assert isinstance(judge.judge, PairwiseJudge)
    assert (judge.votes, judge.prior, judge.both_orders, judge.opponents) == (3, 1.0, False, None)
    assert (judge.judge.endpoint.model, judge.judge.endpoint.temperature) == ("org/m:tag", 0.7)
    assert judge.judge.both_orders  # scored sees to the orders


def test_verifier_in_a_store(run: Any, tmp_path: Path, tiny_dir: Path) -> None:
    with open_store(str(tmp_path / "s.db")) as store:
        store.add([group("a", "yes", "no"), group("b", "perhaps")])
    judge = ["judge", "s.db", "--with", f"verifier:{tiny_dir}", "--json"]
    found = run(*judge).json
    assert found["verdicts"] == {"score": 3}
    assert found["judge"].startswith("verifier:tiny@")
    assert run(*judge).json["new_annotations"] == 0
    other = run(*judge, "--question", "Is it kind?").json
    assert other["new_annotations"] == 3
    assert other["judge"] != found["judge"]


def test_the_model_of_the_world_can_be_asked() -> None:
    judge = words.judge("verifier:world:base")
    assert isinstance(judge, VerifierJudge)
    assert judge.question.question == QUESTION


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("scored:", "needs an argument"),
        ("scored:rm:runs/rm", "is no judge that compares"),
        ("scored:votes=2:rules:finished", "is no judge that compares"),
        ("scored:opponents=1:openai:m", "opponents must be 2 or more"),
        ("scored:opponents=four:openai:m", "opponents must be a whole number"),
        ("scored:logprobs=maybe:openai:m", "logprobs must be yes or no"),
        ("scored:prior=x:openai:m", "prior must be a number"),
        ("scored:oponents=4:openai:m", "Did you mean 'opponents'?"),
        ("scored:base_url=x:openai:m", "scored has no option 'base_url'"),
        ("scored:votes=3:openai:m", "at temperature 0 are one vote"),
        ("verifier:", "needs an argument"),
        ("verifier:nowhere", "no such model directory"),
        ("verfier:x", "Did you mean 'verifier:…'?"),
    ],
)
def test_words_that_name_no_judge(word: str, message: str) -> None:
    with pytest.raises(InputError, match=r"\w") as error:
        words.judge(word)
    assert message in str(error.value)


def test_settings_of_another_judge_are_refused() -> None:
    with pytest.raises(InputError, match="'verifier' takes no setting criteria"):
        parse("verifier:x", criteria=["a"])
    with pytest.raises(InputError, match="'refusal' takes no setting question"):
        parse("refusal", question="a")
    with pytest.raises(InputError, match="takes no setting question"):
        parse("openai:m", question="a", base_url="http://localhost/v1")
    with pytest.raises(InputError, match="takes no setting question"):
        parse("scored:openai:m", question="a", base_url="http://localhost/v1")


def test_explain_says_what_they_are(run: Any) -> None:
    assert "arXiv:2408.15240" in run("explain", "verifier").out
    assert "Bradley–Terry" in run("explain", "scored").out
    assert "verifier" in run("judge", "--help").out
