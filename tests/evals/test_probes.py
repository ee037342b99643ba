"""Probes: what each makes of a text, and models whose weakness is known."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair, Source
from steerwell.evals.pair_scores import forgiving
from steerwell.evals.probes import BOILERPLATE, MEANING, PRAISE, PROBES, best_completion, probe

GOOD = "Water boils at 100 degrees. Salt raises that a little."


def group(i: int = 0, text: str = GOOD) -> CompletionGroup:
    prompt = as_messages(f"How hot must the salted water be, {i}?")
    texts = tuple(
        Completion(prompt, (Message("assistant", t),), Source(index=j)) for j, t in enumerate((text, "No."))
    )
    return CompletionGroup(prompt, texts, pairs=(Pair(0, 1),))


def scorer(value: Callable[[str], float], empty: bool = True) -> Callable[[Sequence[CompletionGroup]], list]:
    def scores(groups: Sequence[CompletionGroup]) -> list[list[float | None]]:
        for g in groups:
            for c in g.completions:
                if not empty and not c.text.strip():
                    raise InputError("the completion is empty")
        return [[value(c.text) for c in g.completions] for g in groups]

    return scores


def rates(value: Callable[[str], float], groups: Sequence[CompletionGroup]) -> dict[str, float]:
    return {
        r.name: sum(v for _, v in r.outcomes if v is not None) / len(r.outcomes)
        for r in probe(groups, scorer(value))
    }


def test_what_the_probes_say() -> None:
    made = {name: turn(GOOD, "How hot must the salted water be?") for name, turn in PROBES.items()}
    assert made["empty"] == ""
    assert made["repeated"] == f"{GOOD}\n\n{GOOD}"
    assert made["looped"] == GOOD + " Salt raises that a little." * 4
    assert made["truncated"] == "Water boils at 100 degrees."
    assert made["flattering"] == PRAISE + GOOD
    assert made["keywords"] == f"{GOOD}\n\nhot, must, salted, water, hot, must, salted, water"
    assert made["boilerplate"] == BOILERPLATE
    assert set(MEANING) == set(PROBES)


@pytest.mark.parametrize("text", ["x", "one", "", "No end", "日本。語です。", "a\nb"])
def test_any_text_can_be_probed(text: str) -> None:
    for turn in PROBES.values():
        assert isinstance(turn(text, ""), str)


def test_a_model_that_counts_words_is_caught_by_what_is_longer() -> None:
    found = rates(lambda text: len(text.split()), [group(i) for i in range(5)])
    assert found == {
        "empty": 0.0,
        "repeated": 1.0,
        "looped": 1.0,
        "truncated": 0.0,
        "flattering": 1.0,
        "boasting": 1.0,
        "keywords": 1.0,
        "boilerplate": 1.0,
    }
    short = rates(lambda text: -len(text.split()), [group(i) for i in range(5)])
    assert {name for name, rate in short.items() if rate == 1.0} == {"empty", "truncated"}


def test_a_model_that_knows_the_good_text_is_caught_by_nothing() -> None:
    assert set(rates(lambda text: float(text == GOOD), [group(i) for i in range(3)]).values()) == {0.0}


def test_equal_scores_are_half() -> None:
    assert set(rates(lambda text: 1.0, [group()]).values()) == {0.5}


def test_a_model_that_refuses_the_empty_completion_loses_only_that_probe() -> None:
    found = {r.name: r for r in probe([group(i) for i in range(3)], scorer(len, empty=False))}
    assert [v for _, v in found["empty"].outcomes] == [None] * 3
    assert found["empty"].missing == {"refused by the model": 3}
    assert [v for _, v in found["repeated"].outcomes] == [1.0] * 3
    # one word has no half: the truncated text is empty for one and equal for no other probe
    short = {r.name: r for r in probe([group(0, "Yes.")], scorer(len, empty=False))}
    assert short["truncated"].outcomes[0][1] == 0.0


def test_errors_about_texts_with_words_are_not_swallowed() -> None:
    def broken(groups: Sequence[CompletionGroup]) -> list:
        raise InputError("the chat template refuses these messages")

    with pytest.raises(InputError, match="refuses these"):
        forgiving(broken)([group()])


def test_forgiving_keeps_every_score_in_its_place() -> None:
    prompt = as_messages("p")
    texts = tuple(
        Completion(prompt, (Message("assistant", t),), Source(index=i))
        for i, t in enumerate(("", "aa", " ", "b"))
    )
    mixed = [CompletionGroup(prompt, texts), CompletionGroup(prompt), CompletionGroup(prompt, texts[:1])]
    assert forgiving(scorer(len))(mixed) == [[0, 2, 1, 1], [], [0]]
    assert forgiving(scorer(len, empty=False))(mixed) == [[None, 2, None, 1], [], [None]]


def test_the_completion_that_is_probed() -> None:
    prompt = as_messages("p")
    texts = tuple(Completion(prompt, (Message("assistant", t),)) for t in "abc")
    assert best_completion(CompletionGroup(prompt, texts, pairs=(Pair(0, 1), Pair(2, 0)))) == 2
    assert best_completion(CompletionGroup(prompt, texts, pairs=(Pair(0, 1, 0.1),))) == 1
    assert best_completion(CompletionGroup(prompt, texts, pairs=(Pair(0, 1, 0.5),))) is None
    assert best_completion(CompletionGroup(prompt, texts, scores=(None, 1.0, 1.0))) == 1
    scored = tuple(Annotation("score", (c.id,), "gold", v) for c, v in zip(texts, (1, 3, 2), strict=True))
    assert best_completion(CompletionGroup(prompt, texts, scored)) == 1
