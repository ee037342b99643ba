"""Messages to tokens: which tokens are the prompt, which are scored, and what is refused."""

from __future__ import annotations

import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.models.render import (
    Sequence,
    ending,
    render,
    tokenize_group,
    tokenize_groups,
    tokenize_prompts,
)
from tiny import ASSISTANT, BEGIN, END, NEWLINE_TEMPLATE, TEMPLATE, USER, tiny_tokenizer

PROMPT = as_messages("hi you")
NO_END = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}" + (
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
THINKING = (  # the last answer gets a thinking block that earlier ones lose
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' }}"
    "{% if m['role'] == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif %}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
OPEN_THINKING = THINKING.replace("{{ '<|assistant|>' }}", "{{ '<|assistant|><think>' }}").replace(
    "{{ '<think></think>' }}", "{{ '' }}"
)


def group(*answers: str, prompt=PROMPT, **fields) -> CompletionGroup:
    made = [Completion(prompt, (Message("assistant", text),), **fields) for text in answers]
    return CompletionGroup(prompt, tuple(made))


def split(tokenizer, sequence: Sequence) -> tuple[str, str]:
    """(prompt, completion) as text, special tokens included."""
    ids = sequence.ids
    return tokenizer.decode(ids[: sequence.n_prompt]), tokenizer.decode(ids[sequence.n_prompt :])


def test_prompt_and_completion() -> None:
    tokenizer = tiny_tokenizer()
    made = tokenize_group(tokenizer, group("yes", "no, the other"))
    assert made.truncated == [False, False]
    assert [split(tokenizer, s) for s in made.sequences] == [
        ("<|user|>hi you<|end|><|assistant|>", "yes<|end|>"),
        ("<|user|>hi you<|end|><|assistant|>", "no, the other<|end|>"),
    ]
    first = made.sequences[0]
    assert (first.ids[0], first.ids[first.n_prompt - 1], first.ids[-1]) == (USER, ASSISTANT, END)
    assert list(first.scored()) == list(range(first.n_prompt, len(first.ids)))
    assert tokenize_prompts(tokenizer, [PROMPT]) == [first.ids[: first.n_prompt]]


def test_what_follows_the_end_token_is_not_part_of_the_completion() -> None:
    tokenizer = tiny_tokenizer(NEWLINE_TEMPLATE)
    assert ending(tokenizer).stop == "<|end|>"
    assert ending(tokenizer).stop_id == END
    assert ending(tokenizer).rest == "\n"
    sequence = tokenize_group(tokenizer, group("yes\n")).sequences[0]
    assert split(tokenizer, sequence) == ("<|user|>\nhi you<|end|>\n<|assistant|>\n", "yes\n<|end|>")


def test_a_template_without_an_end_token_gets_one() -> None:
    tokenizer = tiny_tokenizer(NO_END)
    assert ending(tokenizer).stop_id == END
    sequence = tokenize_group(tokenizer, group("yes")).sequences[0]
    assert split(tokenizer, sequence) == ("user: hi you\nassistant: ", "yes<|end|>")


def test_the_ending_follows_a_changed_template_and_end_token() -> None:
    tokenizer = tiny_tokenizer()
    assert ending(tokenizer).rest == ""
    tokenizer.chat_template = NEWLINE_TEMPLATE
    assert ending(tokenizer).rest == "\n"
    tokenizer.chat_template = NO_END
    assert ending(tokenizer).stop_id == END
    tokenizer.eos_token = None
    assert ending(tokenizer).stop_id is None


def test_templates_that_think() -> None:
    tokenizer = tiny_tokenizer(THINKING)
    sequence = tokenize_group(tokenizer, group("yes")).sequences[0]
    assert split(tokenizer, sequence)[1] == "<think></think>yes<|end|>"
    tokenizer = tiny_tokenizer(OPEN_THINKING)
    sequence = tokenize_group(tokenizer, group("yes")).sequences[0]
    assert split(tokenizer, sequence) == ("<|user|>hi you<|end|><|assistant|><think>", "yes<|end|>")


def test_an_unfinished_completion_gets_no_end_token() -> None:
    for template in (NEWLINE_TEMPLATE, NO_END):
        tokenizer = tiny_tokenizer(template)
        sequence = tokenize_group(tokenizer, group("yes", finished=False)).sequences[0]
        assert split(tokenizer, sequence)[1] == "yes"


def test_sampled_tokens_are_used_as_they_are() -> None:
    tokenizer = tiny_tokenizer()
    spelt = [*(tokenizer.get_vocab()[c] for c in "the"), END]  # not how the tokenizer writes "the"
    assert tokenizer("the").input_ids != spelt[:-1]
    prompt = (USER, 20, END, ASSISTANT)
    sampled = Completion(
        PROMPT,
        (Message("assistant", "the"),),
        token_ids=tuple(spelt),
        prompt_token_ids=prompt,
        old_logps=(-1.0,) * 4,
        finished=True,
    )
    made = tokenize_group(tokenizer, CompletionGroup(PROMPT, (sampled,))).sequences[0]
    assert (made.ids, made.n_prompt) == ([*prompt, *spelt], 4)
    # the same words, tokens of some other tokenizer: rendered anew
    for foreign in ((30, 31, END), (5000, END)):
        other = Completion(PROMPT, sampled.messages, token_ids=foreign, prompt_token_ids=prompt)
        made = tokenize_group(tokenizer, CompletionGroup(PROMPT, (other,))).sequences[0]
        assert split(tokenizer, made)[1] == "the<|end|>"


def test_a_policy_may_say_nothing() -> None:
    tokenizer = tiny_tokenizer()
    silent = Completion(PROMPT, (Message("assistant", ""),), token_ids=(END,), finished=True)
    made = tokenize_group(tokenizer, CompletionGroup(PROMPT, (silent,))).sequences[0]
    assert made.ids[made.n_prompt :] == [END]
    foreign = Completion(PROMPT, (Message("assistant", ""),), token_ids=(40,), finished=True)
    made = tokenize_group(tokenizer, CompletionGroup(PROMPT, (foreign,))).sequences[0]
    assert made.ids[made.n_prompt :] == [END]
    empty = Completion(PROMPT, (Message("assistant", ""),), token_ids=())
    with pytest.raises(InputError, match="no tokens"):
        tokenize_group(tokenizer, CompletionGroup(PROMPT, (empty,)))


def test_the_users_turns_in_a_completion_are_read_and_not_scored() -> None:
    tokenizer = tiny_tokenizer(NEWLINE_TEMPLATE)
    turns = (
        Message("assistant", "yes"),
        Message("user", "why"),
        Message("assistant", "no"),
        Message("user", "?"),
    )
    made = tokenize_group(tokenizer, CompletionGroup(PROMPT, (Completion(PROMPT, turns),))).sequences[0]
    assert split(tokenizer, made)[1] == "yes<|end|>\n<|user|>\nwhy<|end|>\n<|assistant|>\nno<|end|>"
    assert tokenizer.decode([made.ids[i] for i in made.scored()]) == "yes<|end|>no<|end|>"


def test_a_completion_that_begins_with_the_user() -> None:
    tokenizer = tiny_tokenizer()
    prompt = (Message("user", "a"), Message("assistant", "b"))
    answers = [(Message("user", "c"), Message("assistant", text)) for text in ("d", "e")]
    made = tokenize_group(
        tokenizer, CompletionGroup(prompt, tuple(Completion(prompt, answer) for answer in answers))
    )
    for sequence, text in zip(made.sequences, "de", strict=True):
        assert split(tokenizer, sequence)[0] == "<|user|>a<|end|><|assistant|>b<|end|>"
        assert tokenizer.decode([sequence.ids[i] for i in sequence.scored()]) == f"{text}<|end|>"


def test_truncation_cuts_the_end_and_says_so() -> None:
    tokenizer = tiny_tokenizer()
    made = tokenize_group(tokenizer, group("yes", "a longer answer"), max_length=14)
    assert made.truncated == [False, True]
    assert len(made.sequences[1].ids) == 14
    assert made.sequences[1].ids[-1] != END
    n_prompt = made.sequences[0].n_prompt
    with pytest.raises(InputError, match=f"{n_prompt} tokens leaves no room in max_length={n_prompt}"):
        tokenize_group(tokenizer, group("yes"), max_length=n_prompt)


def test_truncation_inside_an_unscored_turn() -> None:
    tokenizer = tiny_tokenizer()
    turns = (Message("assistant", "yes"), Message("user", "why not that"), Message("assistant", "no"))
    whole = tokenize_group(tokenizer, CompletionGroup(PROMPT, (Completion(PROMPT, turns),))).sequences[0]
    (start, end), limit = whole.unscored[0], whole.unscored[0][0] + 3
    assert end > limit
    cut = tokenize_group(tokenizer, CompletionGroup(PROMPT, (Completion(PROMPT, turns),)), limit).sequences[0]
    assert cut.unscored == ((start, limit),)
    assert tokenizer.decode([cut.ids[i] for i in cut.scored()]) == "yes<|end|>"


def test_many_groups_are_the_same_as_one_by_one() -> None:
    tokenizer = tiny_tokenizer()
    groups = [group("yes", "no"), group("the"), group("you", prompt=as_messages("in an"))]
    together = tokenize_groups(tokenizer, groups)
    assert [t.sequences for t in together] == [tokenize_group(tokenizer, g).sequences for g in groups]
    assert [t.group for t in together] == groups
    assert tokenize_groups(tokenizer, []) == []


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_completion_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="empty completion to 'hi you'") as error:
        tokenize_group(tiny_tokenizer(), group("yes", text))
    assert error.value.mend


def test_a_completion_without_an_assistant_is_refused() -> None:
    lonely = CompletionGroup(PROMPT, (Completion(PROMPT, (Message("user", "me again"),)),))
    with pytest.raises(InputError, match="no assistant message"):
        tokenize_group(tiny_tokenizer(), lonely)


def test_a_refusal_names_the_prompt_and_the_file_it_came_from() -> None:
    named = group("yes", "", prompt=as_messages("why the"), source=Source("dataset", "prefs.jsonl"))
    with pytest.raises(InputError) as error:
        tokenize_groups(tiny_tokenizer(), [group("yes"), named])
    assert str(error.value).startswith("prefs.jsonl: an empty completion to 'why the' (prompt ")
    assert named.prompt_id in str(error.value)
    sampled = group("yes", "", prompt=as_messages("why the"), source=Source("model", "qwen"))
    with pytest.raises(InputError) as error:
        tokenize_groups(tiny_tokenizer(), [sampled])
    assert error.value.file is None


MIXED = tuple(
    Message(role, text)
    for role, text in (("system", "be"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("user", "d"))
)
STRICT = (  # like Mistral's: users and assistants in turn
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def test_mixed_roles() -> None:
    """What the template takes is rendered as it has it; what it refuses is named."""
    prompt = (*MIXED, Message("user", "e"))  # two users in a row
    turns = (Message("assistant", "f"), Message("tool", "g"), Message("assistant", "h"))
    asked = CompletionGroup(prompt, (Completion(prompt, turns), *group("yes", prompt=prompt).completions))
    tokenizer = tiny_tokenizer()
    first, second = tokenize_group(tokenizer, asked).sequences
    before = "<|system|>be<|end|><|user|>a<|end|><|assistant|>b<|end|><|tool|>c<|end|>"
    before += "<|user|>d<|end|><|user|>e<|end|><|assistant|>"
    assert split(tokenizer, first) == (before, "f<|end|><|tool|>g<|end|><|assistant|>h<|end|>")
    assert tokenizer.decode([first.ids[i] for i in first.scored()]) == "f<|end|>h<|end|>"
    assert split(tokenizer, second) == (before, "yes<|end|>")
    with pytest.raises(InputError, match=r"roles must alternate .*'tool', 'user', 'user'") as error:
        tokenize_groups(tiny_tokenizer(STRICT), [group("yes"), asked])
    assert asked.prompt_id in str(error.value)
    assert "Change the roles" in str(error.value)


def test_no_template() -> None:
    tokenizer = tiny_tokenizer(None)
    with pytest.raises(InputError, match="no chat template") as error:
        render(tokenizer, PROMPT, header=True)
    assert "chat_template.jinja" in error.value.mend


def test_a_template_that_refuses() -> None:
    tokenizer = tiny_tokenizer("{{ raise_exception('no system role here') }}")
    with pytest.raises(InputError, match="no system role here"):
        render(tokenizer, PROMPT, header=True)


def test_a_template_that_rewrites_the_history() -> None:
    turns = (Message("assistant", "yes"), Message("user", "why"), Message("assistant", "no"))
    shouting = THINKING.replace("m['content'] +", "(m['content'] if loop.last else m['content'] | upper) +")
    prompt = as_messages([*[m.to_dict() for m in PROMPT], {"role": "assistant", "content": "b"}])
    again = CompletionGroup(prompt, (Completion(prompt, (Message("user", "why"), turns[2])),))
    with pytest.raises(InputError, match="rewrites earlier turns"):
        tokenize_group(tiny_tokenizer(shouting), again)


def test_no_second_bos() -> None:
    tokenizer = tiny_tokenizer("{{ '<|begin|>' }}" + TEMPLATE)
    tokenizer.bos_token = "<|begin|>"
    sequence = tokenize_group(tokenizer, group("yes")).sequences[0]
    assert sequence.ids.count(BEGIN) == 1
