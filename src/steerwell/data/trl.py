"""The row types of TRL, standard (texts) and conversational (message lists), read and written.

================== ===========================================================================
preference         ``prompt``, ``chosen``, ``rejected``; or without ``prompt``, which is then the
                   common beginning of the other two
unpaired           ``prompt``, ``completion``, ``label``
prompt-completion  ``prompt``, ``completion``
prompt-only        ``prompt``
messages           ``messages``: each assistant message answers what comes before it
================== ===========================================================================

Read beside them when present: ``annotator``, ``criterion``, ``margin`` (the strength of a preference) and
``score_chosen`` / ``score_rejected``. Other texts and numbers of a row become tags of the prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from steerwell.data.gather import Item, Row, common_prompt
from steerwell.data.messages import Messages
from steerwell.data.types import CompletionGroup

READ = {
    "annotator",
    "chosen",
    "completion",
    "criterion",
    "label",
    "margin",
    "messages",
    "prompt",
    "rejected",
    "score_chosen",
    "score_rejected",
}
NO_PROMPT = "the row has no prompt"
MEND_PROMPT = 'Add "prompt": the text, or the list of messages, that was answered.'


def _item(row: Row, prompt: Messages, texts: tuple[Messages, ...] = (), **more: Any) -> Item:
    value = row.value
    who, criterion = value.get("annotator"), value.get("criterion")
    meta = {k: v for k, v in value.items() if k not in READ and isinstance(v, str | int | float | bool)}
    left = tuple(k for k, v in value.items() if k not in READ and k not in meta and v is not None)
    return Item(
        prompt,
        texts,
        annotator=None if who is None else str(who),
        criterion="overall" if criterion is None else str(criterion),
        meta=meta,
        flags=tuple(f"have a key {k!r} that is not carried" for k in left),
        **more,
    )


def _number(row: Row, key: str) -> float | None:
    value = row.value.get(key)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        row.fail(f"{key!r} must be a number, got {value!r:.40}", "Mend the row.")
    return value


def _same(row: Row, chosen: Any, rejected: Any) -> None:
    if chosen == rejected:
        row.fail("chosen and rejected are equal", "Leave the row out: it prefers nothing.")


def _common_text(row: Row, chosen: str, rejected: str) -> int:
    """Where two texts part, moved back to the last word boundary."""
    shared = next(
        (k for k, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    while shared > 0 and not chosen[shared - 1 : shared].isspace():
        shared -= 1
    cut = len(chosen[:shared].rstrip())
    if not cut:
        row.fail(f"{NO_PROMPT}: chosen and rejected have no common beginning", MEND_PROMPT)
    return cut


def _implicit(row: Row, chosen: Any, rejected: Any) -> Item:
    if isinstance(chosen, str) and isinstance(rejected, str):
        cut = _common_text(row, chosen, rejected)
        prompt, ends = row.prompt(chosen[:cut]), (chosen[cut:], rejected[cut:])
        texts = row.completion(ends[0], "chosen"), row.completion(ends[1], "rejected")
        return _item(row, prompt, texts, preferred=True)
    first, second = row.messages(chosen, "assistant"), row.messages(rejected, "assistant")
    k = common_prompt(first, second)
    if not k:
        row.fail(f"{NO_PROMPT}: chosen and rejected have no common beginning", MEND_PROMPT)
    texts = row.completion(first[k:], "chosen"), row.completion(second[k:], "rejected")
    return _item(row, row.prompt(first[:k]), texts, preferred=True)


def _dicts(messages: Messages) -> list[dict[str, Any]]:
    return [m.to_dict() for m in messages]


def _after(prompt: Messages, messages: Messages) -> Messages:
    """A completion without the prompt, where it repeats the prompt (as UltraFeedback's binarized rows do)."""
    return messages[len(prompt) :] if messages[: len(prompt)] == prompt else messages


def read_preference(row: Row) -> list[Item]:
    """A pair, with explicit or implicit prompt."""
    missing = [name for name in ("chosen", "rejected") if row.value.get(name) is None]
    if missing:
        row.fail(f"the row has no {missing[0]!r}", "Each row needs chosen and rejected.")
    chosen, rejected = row.value["chosen"], row.value["rejected"]
    _same(row, chosen, rejected)
    if row.value.get("prompt") is None:
        item = _implicit(row, chosen, rejected)
    else:
        prompt = row.prompt(row.value["prompt"])
        ends = (_after(prompt, row.messages(v, "assistant")) for v in (chosen, rejected))
        texts = tuple(row.completion(m, name) for m, name in zip(ends, ("chosen", "rejected"), strict=True))
        _same(row, *texts)
        item = _item(row, prompt, texts, preferred=True)
    scores = _number(row, "score_chosen"), _number(row, "score_rejected")
    return [replace(item, scores=scores, strength=_number(row, "margin"))]


def _answered(row: Row) -> tuple[Messages, Messages]:
    for name, mend in (("prompt", MEND_PROMPT), ("completion", "Give the text that answers the prompt.")):
        if row.value.get(name) is None:
            row.fail(f"the row has no {name}", mend)
    return row.prompt(row.value["prompt"]), row.completion(row.value["completion"], "completion")


def read_unpaired(row: Row) -> list[Item]:
    """A completion with a label, True or False."""
    prompt, completion = _answered(row)
    label = row.value.get("label")
    if not isinstance(label, bool) and label not in (0, 1):
        row.fail(f"the label must be true or false, got {label!r:.40}", "Mend the row.")
    return [_item(row, prompt, (completion,), label=bool(label))]


def read_prompt_completion(row: Row) -> list[Item]:
    """A completion without a verdict: a demonstration."""
    prompt, completion = _answered(row)
    return [_item(row, prompt, (completion,))]


def read_prompt(row: Row) -> list[Item]:
    """A prompt alone."""
    if row.value.get("prompt") is None:
        row.fail(NO_PROMPT, MEND_PROMPT)
    return [_item(row, row.prompt(row.value["prompt"]))]


def read_messages(row: Row) -> list[Item]:
    """A conversation: each assistant message is a completion of what comes before it."""
    messages = row.messages(row.value.get("messages"), "user")
    items = []
    for k, message in enumerate(messages):
        if message.role == "assistant":
            if k == 0:
                row.fail(f"{NO_PROMPT}: the conversation begins with the assistant", "Begin with the user.")
            prompt = row.prompt(messages[:k])
            items.append(_item(row, prompt, (row.completion((message,), "assistant"),)))
    if not items:
        row.fail("the conversation has no assistant message", "Use the key prompt for prompts alone.")
    return items


READERS: dict[str, Callable[[Row], list[Item]]] = {
    "trl-preference": read_preference,
    "trl-unpaired": read_unpaired,
    "trl-prompt-completion": read_prompt_completion,
    "trl-prompt-only": read_prompt,
    "trl-messages": read_messages,
}


def detect(row: Mapping[str, Any]) -> str | None:
    """The TRL type that the keys of a row say, or None."""
    keys = {k for k, v in row.items() if v is not None}
    if {"chosen", "rejected"} & keys:
        return "trl-preference"
    if {"completion", "label"} <= keys:
        return "trl-unpaired"
    if "completion" in keys:
        return "trl-prompt-completion"
    if "messages" in keys:
        return "trl-messages"
    return "trl-prompt-only" if "prompt" in keys else None


def write_preference(group: CompletionGroup) -> Iterator[dict[str, Any]]:
    """A row per pair, the more probable side chosen."""
    for chosen, rejected, p in group.pairs:
        first, second = (chosen, rejected) if p >= 0.5 else (rejected, chosen)
        yield {
            "prompt": _dicts(group.prompt),
            "chosen": _dicts(group.completions[first].messages),
            "rejected": _dicts(group.completions[second].messages),
        }


def write_unpaired(group: CompletionGroup) -> Iterator[dict[str, Any]]:
    """A row per completion with a label."""
    for completion, label in zip(group.completions, group.labels or (), strict=False):
        if label is not None:
            yield {
                "prompt": _dicts(group.prompt),
                "completion": _dicts(completion.messages),
                "label": label,
            }


def write_prompt_completion(group: CompletionGroup) -> Iterator[dict[str, Any]]:
    """A row per completion, those labelled bad left out."""
    labels = group.labels or (None,) * len(group.completions)
    for completion, label in zip(group.completions, labels, strict=True):
        if label is not False:
            yield {"prompt": _dicts(group.prompt), "completion": _dicts(completion.messages)}


WRITERS: dict[str, Callable[[CompletionGroup], Iterator[dict[str, Any]]]] = {
    "trl-preference": write_preference,
    "trl-unpaired": write_unpaired,
    "trl-prompt-completion": write_prompt_completion,
}

__all__ = ["NO_PROMPT", "READERS", "WRITERS", "detect"]
