"""Turns that a policy goes on with, and labels of steps from how that ends."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

import steerwell as sw
from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.store import open_store
from steerwell.data.types import Annotation, Completion, CompletionGroup
from steerwell.judges import rules
from steerwell.models.attention import use_steerwell_attention
from steerwell.models.continuation import continuations
from steerwell.models.load import Policy
from steerwell.models.monte_carlo import monte_carlo_step_labels
from tiny import END, NEWLINE_TEMPLATE, tiny_llama, tiny_tokenizer

ASKED = (Message("user", "why?"),)


def policy(**settings: Any) -> Policy:
    model = tiny_llama(**settings)
    use_steerwell_attention(model)
    return Policy(model, tiny_tokenizer(NEWLINE_TEMPLATE), "tiny")


def completion(text: str, **more: Any) -> Completion:
    return Completion(ASKED, (Message("assistant", text),), **more)


def group(*texts: str) -> CompletionGroup:
    return CompletionGroup(ASKED, tuple(map(completion, texts)))


class Clean:
    """Right is what does not say WRONG; every ``skip``-th completion gets no verdict."""

    name = "clean"

    def __init__(self, skip: int = 0) -> None:
        self.skip, self.seen = skip, []

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[Annotation]:
        found = []
        for one in (c for g in groups for c in g.completions):
            self.seen.append(one)
            value = None if self.skip and len(self.seen) % self.skip == 0 else "WRONG" not in one.text
            found.append(Annotation("label", (one.id,), self.name, value))
        return found


def test_a_continuation_begins_with_the_very_tokens_and_ends_as_sampled() -> None:
    it = policy()
    begun = completion("one\n\ntwo\n\n")
    (found,) = continuations(it, [begun], 4, max_new_tokens=6, seed=1)
    own = tuple(it.tokenizer("one\n\ntwo\n\n", add_special_tokens=False)["input_ids"])
    for one in found.completions:
        assert one.token_ids is not None
        assert one.token_ids[: len(own)] == own
        assert END not in one.token_ids[:-1]
        assert one.finished == (one.token_ids[-1] == END)
        assert one.text.startswith("one\n\ntwo\n\n")
        assert one.old_logps is None, "nothing is known of the beginning's"
    asked = it.tokenizer("<|user|>\nwhy?<|end|>\n<|assistant|>\n", add_special_tokens=False)["input_ids"]
    assert found.completions[0].prompt_token_ids == tuple(asked)
    assert len({one.token_ids for one in found.completions}) > 1
    assert len({one.id for one in found.completions}) == 4
    tokens = it.tokenize([found])[0]
    assert [tuple(s.ids[s.n_prompt :]) for s in tokens.sequences] == [c.token_ids for c in found.completions]


def test_what_was_sampled_goes_on_with_its_tokens_and_log_probs() -> None:
    it = policy()
    first = it.sample(["why?"], 1, max_new_tokens=4, seed=3)[0].completions[0]
    assert first.finished is False
    (found,) = continuations(it, [first], 2, max_new_tokens=3, seed=4)
    for one in found.completions:
        assert one.token_ids is not None
        assert one.token_ids[:4] == first.token_ids
        assert one.old_logps is not None
        assert len(one.old_logps) == len(one.token_ids)
    summed = it.logps([found])[0]
    assert summed == pytest.approx([sum(c.old_logps or ()) for c in found.completions], abs=1e-3)


def test_what_cannot_be_continued() -> None:
    it = policy()
    x = it.tokenizer("x", add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match="a completion has ended already"):
        continuations(it, [completion("x", token_ids=(*x, END), prompt_token_ids=(1, 2))], 1)
    two = Completion(ASKED, (Message("assistant", "a"), Message("user", "b")))
    with pytest.raises(InputError, match="only one assistant message can be continued"):
        continuations(it, [two], 1)
    with pytest.raises(InputError, match="a completion with 2 messages cannot be sampled from"):
        monte_carlo_step_labels(it, [CompletionGroup(ASKED, (two,))], Clean())


@pytest.mark.parametrize(("mode", "good", "bad"), [("soft", 1.0, 0.0), ("hard", True, False)])
def test_the_planted_wrong_step_is_found(mode: Any, good: Any, bad: Any) -> None:
    judge = Clean()
    groups = [group("one\n\ntwo WRONG\n\nthree", "one\n\n2\n\n3"), group("only WRONG")]
    told: list[tuple[int, int]] = []
    made = monte_carlo_step_labels(
        policy(), groups, judge, 3, mode=mode, max_new_tokens=4, progress=lambda *x: told.append(x)
    )
    assert [[v for _, v in a.value] for a in made] == [[good, bad, bad], [good, good, good], [bad]]
    assert [a.completions[0] for a in made] == [c.id for g in groups for c in g.completions]
    assert made[0].rationale == "right of judged: 3/3, 0/3, 0/1", (
        "the finished completion is judged as it stands"
    )
    assert made[0].annotator.startswith("mc:tiny@")
    assert f":n=3,{mode}," in made[0].annotator
    assert made[0].annotator.endswith(":clean")
    assert told[-1] == (7, 7)
    begun = [c for c in judge.seen if c.source.kind == "model"]
    assert len(begun) == 3 * 3, "both begin with the same step, which is sampled once"


def test_labels_become_targets_and_evidence(tmp_path: Any) -> None:
    one = group("one\n\ntwo WRONG\n\nthree")
    made = monte_carlo_step_labels(policy(), [one], Clean(), 2, max_new_tokens=3)
    with open_store(tmp_path / "s.db") as store:
        store.add(one, made)
        found = sw.resolve.step_labels(store.groups())
    assert found[0].step_labels == ((1.0, 0.0, 0.0),)
    assert made[0].value[0][0] == 5


class Coin:
    """Right with probability 0.7, by the tokens of a completion."""

    name = "coin"

    def __call__(self, groups: Sequence[CompletionGroup]) -> list[Annotation]:
        found = []
        for one in (c for g in groups for c in g.completions):
            state = hashlib.blake2b(repr(one.token_ids).encode(), digest_size=4).digest()
            found.append(Annotation("score", (one.id,), self.name, int.from_bytes(state, "big") / 2**32))
        return found


def test_a_soft_label_is_the_share_and_the_same_however_it_is_sampled() -> None:
    it, groups = policy(), [group("one\n\ntwo", "1\n\n2"), group("a\n\nb")]
    settings: dict[str, Any] = {"max_new_tokens": 8, "threshold": 0.3, "temperature": 1.3}
    many = monte_carlo_step_labels(it, groups[:1], Coin(), 400, **settings)
    assert many[0].value[0][1] == pytest.approx(0.7, abs=4 * (0.7 * 0.3 / 400) ** 0.5)
    whole = monte_carlo_step_labels(it, groups, Coin(), 5, **settings)
    parts = monte_carlo_step_labels(it, groups, Coin(), 5, batch_size=3, **settings)
    assert whole == parts
    assert monte_carlo_step_labels(it, groups[1:], Coin(), 5, **settings) == whole[2:]
    other = monte_carlo_step_labels(it, groups, Coin(), 5, seed=1, **settings)
    assert [a.value for a in other] != [a.value for a in whole]
    assert other[0].annotator != whole[0].annotator


def test_no_verdict_is_no_label() -> None:
    one = [group("one\n\ntwo")]
    (none,) = monte_carlo_step_labels(policy(), one, Clean(skip=1), 3, max_new_tokens=3)
    assert [v for _, v in none.value] == [None, None]
    (some,) = monte_carlo_step_labels(policy(), one, Clean(skip=2), 3, max_new_tokens=3)
    assert some.rationale == "right of judged: 2/2, 0/0"
    assert [v for _, v in some.value] == [1.0, None]


def test_a_step_at_the_end_of_the_context_has_no_label() -> None:
    it = policy(max_position_embeddings=40)
    text = "one\n\n" + "x" * 60
    (made,) = monte_carlo_step_labels(it, [group(text)], Clean(), 2, max_new_tokens=50)
    assert [v for _, v in made.value] == [1.0, 1.0], "the whole is judged as it stands"
    begun = CompletionGroup(ASKED, (completion(text + "\n\nz", finished=False),))
    (made,) = monte_carlo_step_labels(it, [begun], Clean(), 2, max_new_tokens=50)
    assert [v for _, v in made.value] == [1.0, None, None]


def test_a_judge_of_rules_and_bad_settings() -> None:
    it = policy()
    judge = rules("must_exclude:WRONG")
    (made,) = monte_carlo_step_labels(it, [group("a\n\nWRONG b")], judge, 2, max_new_tokens=3)
    assert [v for _, v in made.value] == [1.0, 0.0]
    with pytest.raises(InputError, match="unknown mode 'any'"):
        monte_carlo_step_labels(it, [], judge, mode="any")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n must be at least 1"):
        monte_carlo_step_labels(it, [], judge, 0)
    assert monte_carlo_step_labels(it, [replace(group("a"), completions=())], judge) == []
