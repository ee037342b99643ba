"""Messages and their ids: the chain, what counts as the same text, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steerwell.data.errors import InputError
from steerwell.data.messages import ROLES, Message, as_messages, chain, conversation_id

text = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
message = st.builds(Message, st.sampled_from(ROLES), text)


@given(st.lists(message, max_size=4), st.lists(message, max_size=4))
def test_a_chain_goes_on_from_its_parent(head: list[Message], tail: list[Message]) -> None:
    whole = chain([*head, *tail])
    assert whole[: len(head)] == chain(head)
    assert whole[len(head) :] == chain(tail, conversation_id(head))


@given(st.lists(message, max_size=3), st.lists(message, max_size=3))
def test_ids_are_equal_exactly_for_equal_conversations(a: list[Message], b: list[Message]) -> None:
    assert (conversation_id(a) == conversation_id(b)) == (a == b)


def test_white_space_and_the_border_between_messages_count() -> None:
    assert conversation_id(as_messages("why?")) != conversation_id(as_messages("why? "))
    joined, split = [Message("user", "ab")], [Message("user", "a"), Message("user", "b")]
    assert conversation_id(joined) != conversation_id(split)


def test_an_id_says_its_version_and_never_changes() -> None:
    assert conversation_id(as_messages("why?")) == "m1-745b93a98608f0c3cf4498ce"


def test_further_keys_survive_and_their_order_does_not_matter() -> None:
    call = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"name": "f", "arguments": {"b": 1, "a": 2}}],
    }
    read = Message.from_dict(call)
    assert read.to_dict() == {**call, "content": ""}
    assert Message.from_dict(dict(reversed(list(call.items())))) == read


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ({"role": "asistant", "content": "x"}, "Did you mean 'assistant'?"),
        ({"role": "user", "content": 3}, "must be text, got int"),
        ({"role": "user"}, "must be text, got NoneType"),
        ({"content": "x"}, "'role' and 'content'"),
        ("hello", "'role' and 'content'"),
    ],
)
def test_what_is_no_message_is_refused_in_one_line(value: object, says: str) -> None:
    with pytest.raises(InputError) as caught:
        Message.from_dict(value, file="x.jsonl", row=7)  # type: ignore[arg-type]
    assert says in str(caught.value)
    assert str(caught.value).startswith("x.jsonl, row 7: ")
    assert "\n" not in str(caught.value)
