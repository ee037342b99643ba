"""Rules: each number checked by hand, and the errors for what is no rule."""

from __future__ import annotations

import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.judges import Judge, parse, rules
from steerwell.judges.rules import RULES, split_rules

PROMPT = as_messages("Say something.")


def completion(text: str, finished: bool | None = None, index: int = 0) -> Completion:
    return Completion(PROMPT, (Message("assistant", text),), Source(index=index), finished=finished)


def score(text: str, *specs: str, finished: bool | None = None) -> float:
    group = CompletionGroup(PROMPT, (completion(text, finished),))
    (annotation,) = rules(*specs)([group])
    assert annotation.kind == "score"
    assert annotation.completions == (group.completions[0].id,)
    return annotation.value


@pytest.mark.parametrize(
    ("text", "rule", "value"),
    [
        ("one two three", "max_words:3", 1.0),
        ("one two three four", "max_words:2", 0.5),
        ("", "max_words:2", 1.0),
        ("one two", "min_words:4", 0.5),
        ("one two three four five", "min_words:4", 1.0),
        ("", "min_words:4", 0.0),
        ("a b c d", "no_repeat", 1.0),
        ("no no no no no no", "no_repeat", 0.25),
        ("hi", "no_repeat", 1.0),
        ("Thank YOU very much", "must_include:thank you", 1.0),
        ("Thanks", "must_include:thank you", 0.0),
        ("Thanks", "must_exclude:sorry", 1.0),
        ("SORRY!", "must_exclude:sorry", 0.0),
        ("Order A12", r"matches:[A-Z]\d+", 1.0),
        ("order", r"matches:\d", 0.0),
        ('{"a": [1, 2]}', "valid_json", 1.0),
        ('Here: {"a": 1}', "valid_json", 0.0),
        ("[" * 100_000, "valid_json", 0.0),
        ("It ends.", "finished", 1.0),
        ('"It ends!"', "finished", 1.0),
        ("It ends in the", "finished", 0.0),
        ("", "finished", 0.0),
    ],
)
def test_values(text: str, rule: str, value: float) -> None:
    assert score(text, rule) == pytest.approx(value)


def test_finished_believes_the_sampler_first() -> None:
    assert score("It ends in the", "finished", finished=True) == 1.0
    assert score("It ends.", "finished", finished=False) == 0.0


def test_the_score_is_the_mean_and_the_rationale_lists_the_rules() -> None:
    group = CompletionGroup(PROMPT, (completion("one two three four"), completion("one", index=1)))
    judge = rules("max_words:2", "must_include:one")
    first, second = judge([group])
    assert (first.value, second.value) == (0.75, 1.0)
    assert first.rationale == "max_words:2 = 0.5, must_include:one = 1"
    assert {first.annotator, second.annotator} == {"rules:max_words:2,must_include:one"} == {judge.name}
    assert isinstance(judge, Judge)
    assert judge([group])[0].id == first.id  # the same judgement again is the same record


def test_groups_without_completions_give_nothing() -> None:
    assert rules("no_repeat")([CompletionGroup(PROMPT)]) == []


def test_the_command_line_spelling_round_trips() -> None:
    text = r"must_include:yes\, of course,matches:a{1\,3}\\d,no_repeat"
    specs = split_rules(text)
    assert specs == ["must_include:yes, of course", r"matches:a{1,3}\d", "no_repeat"]
    judge = parse("rules:" + text)
    assert judge.name == rules(*specs).name == "rules:" + text
    assert split_rules(judge.name.removeprefix("rules:")) == specs


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (("max_wrds:5",), "Did you mean 'max_words'?"),
        (("max_words",), "needs an argument"),
        (("max_words:few",), "needs a whole number"),
        (("max_words:0",), "needs a whole number"),
        (("no_repeat:3",), "takes no argument"),
        (("matches:[",), "is no regular expression"),
        ((), "needs at least one rule"),
    ],
)
def test_what_is_no_rule(specs: tuple[str, ...], message: str) -> None:
    with pytest.raises(InputError, match=r"rule") as error:
        rules(*specs)
    assert message in str(error.value)


def test_every_rule_is_documented() -> None:
    assert all(rule.__doc__ and len(rule.__doc__) > 20 for rule in RULES.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("opnai:gpt", "Did you mean 'openai'?"),
        ("rm", "needs an argument"),
        ("rules:", "needs an argument"),
        ("refusal:x", "takes no argument"),
        ("", "unknown judge"),
    ],
)
def test_what_is_no_judge(text: str, message: str) -> None:
    with pytest.raises(InputError, match=r"judge|argument") as error:
        parse(text)
    assert message in str(error.value)


def test_a_setting_that_a_judge_does_not_take_is_an_error() -> None:
    with pytest.raises(InputError, match="takes no setting criteria"):
        parse("rules:no_repeat", criteria=["helpful"])
