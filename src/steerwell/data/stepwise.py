"""Files with verdicts on steps, read into ``steps`` annotations, and TRL's type of them written.

=============  ================================================================================
trl-stepwise   TRL: ``prompt``, ``completions`` (the steps), ``labels`` (one for each)
prm800k        github.com/openai/prm800k (arXiv:2305.20050): ``question.problem`` and
               ``label.steps``, each with rated ``completions`` and a ``chosen_completion``
math-shepherd  Math-Shepherd (arXiv:2312.08935): ``input`` with a tag behind each step, ``label``
               with + or - in its place
step-dpo       Math-Step-DPO (arXiv:2406.18629): ``prompt``, ``initial_reason_steps``, ``chosen``
               and ``rejected``: pairs that part in one step
=============  ================================================================================

Steps that a file gives one by one are joined by a blank line, and their ends are kept with the verdicts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from steerwell.data.gather import DropRow, Item, Row
from steerwell.data.messages import Messages
from steerwell.data.steps import joined, step_texts
from steerwell.data.types import CompletionGroup

TAG = "ки"  # Math-Shepherd's token behind each step
RATINGS = {-1: False, 0: True, 1: True}
MEND_STEPS = "Give one label for each step: true, false or null."
Verdict = bool | float | None


def _item(
    row: Row, prompt: Any, steps: Sequence[Sequence[tuple[str, Verdict]]], read: Collection[str], **more: Any
) -> Item:
    """An item of texts that are given as steps with verdicts; other texts and numbers of the row are tags."""
    texts, verdicts = [], []
    for own in steps:
        text, ends = joined([words for words, _ in own])
        texts.append(row.completion(text, "steps"))
        verdicts.append(tuple(zip(ends, (verdict for _, verdict in own), strict=True)))
    if "meta" not in more:
        tags = row.value.items()
        more["meta"] = {k: v for k, v in tags if k not in read and isinstance(v, str | int | float | bool)}
    return Item(row.prompt(prompt), tuple(texts), steps=tuple(verdicts), **more)


def read_stepwise(row: Row) -> list[Item]:
    """TRL's stepwise supervision. Beyond its true and false, a label may be a probability, or null for no verdict."""
    value = row.value
    if value.get("prompt") is None:
        row.fail(
            "the row has no prompt", 'Add "prompt": the text, or the list of messages, that was answered.'
        )
    steps, labels = value.get("completions"), value.get("labels")
    if not isinstance(steps, list) or not steps or not all(isinstance(step, str) for step in steps):
        row.fail("'completions' must be a list of texts, the steps", "Mend the row.")
    if not isinstance(labels, list) or len(labels) != len(steps):
        have = f"{len(labels)} labels" if isinstance(labels, list) else "no list of labels"
        row.fail(f"{have} for {len(steps)} steps", MEND_STEPS)
    for number, step in enumerate(steps, 1):
        if not step.strip():
            row.fail(f"step {number} is empty", "Leave it out, with its label.")
    for label in labels:
        if label is not None and not (isinstance(label, int | float) and 0 <= label <= 1):
            row.fail(f"a label must be true, false, from 0 to 1, or null, got {label!r:.40}", MEND_STEPS)
    read = {"prompt", "completions", "labels", "annotator", "criterion"}
    who, criterion = value.get("annotator"), value.get("criterion")
    verdicts = [bool(x) if x in (0, 1) and x is not None else x for x in labels]
    return [
        _item(
            row,
            value["prompt"],
            [list(zip(steps, verdicts, strict=True))],
            read,
            annotator=None if who is None else str(who),
            criterion="overall" if criterion is None else str(criterion),
        )
    ]


def read_prm800k(row: Row) -> list[Item]:
    """A line of PRM800K: the solution that the labeler followed, and one for each alternative to a step of it.

    Ratings of +1 and 0 (neutral) are right, -1 is wrong: the paper counts neutral steps as right. An alternative has
    the followed steps before it, without a verdict: they have theirs in the solution itself. Where no step goes on,
    the first of the last ones ends the solution. Steps that are flagged have no verdict, those that a labeler wrote
    are right. Only a solution that was followed to its end is finished.

    Left out: lines in which no step is rated.
    """
    question, label = row.value.get("question"), row.value.get("label")
    if not isinstance(question, Mapping) or not isinstance(label, Mapping) or "steps" not in label:
        row.fail("the row has no 'question' with 'label' and its 'steps'", "Is it a line of PRM800K?")
    line: list[tuple[str, Verdict]] = []
    branches: list[list[tuple[str, Verdict]]] = []
    ended = label.get("finish_reason") == "solution"
    for number, step in enumerate(label["steps"] or [], 1):
        rated = [_rated(row, number, one) for one in step.get("completions") or []]
        at, human = step.get("chosen_completion"), step.get("human_completion")
        if at is None and human is not None:
            follows: tuple[str, Verdict] | None = (_words(row, number, human), True)
        elif at is None:
            follows, ended = (rated.pop(0) if rated else None), False
        else:
            if not isinstance(at, int) or not 0 <= at < len(rated):
                row.fail(f"step {number} has no completion {at!r}", "Count from 0.")
            follows = rated.pop(at)
        history: list[tuple[str, Verdict]] = [(words, None) for words, _ in line]
        branches += [[*history, one] for one in rated if one[1] is not None]
        if follows is not None:
            line.append(follows)
        if at is None and human is None:
            break
    who = row.value.get("labeler")
    shared = {
        "annotator": None if who is None else f"prm800k:{who}",
        "meta": {k: v for k, v in question.items() if k == "ground_truth_answer" and v is not None},
    }
    items = []
    if any(verdict is not None for _, verdict in line):
        end = {} if ended else {"finished": False}
        items.append(_item(row, question.get("problem"), [line], (), **shared, **end))
    items += [_item(row, question.get("problem"), [one], (), **shared, finished=False) for one in branches]
    if not items:
        raise DropRow("no step of the solution is rated")
    return items


def _words(row: Row, number: int, value: Any) -> str:
    words = value.get("text") if isinstance(value, Mapping) else value
    if not isinstance(words, str) or not words.strip():
        row.fail(f"step {number} has a completion without text", "Leave it out.")
    return words


def _rated(row: Row, number: int, value: Any) -> tuple[str, Verdict]:
    rating = value.get("rating") if isinstance(value, Mapping) else value
    if rating is not None and rating not in RATINGS:
        row.fail(f"step {number} is rated {rating!r:.40}", "Ratings are -1, 0 and 1.")
    flagged = isinstance(value, Mapping) and value.get("flagged")
    return _words(row, number, value), None if rating is None or flagged else RATINGS[rating]


def read_math_shepherd(row: Row) -> list[Item]:
    """A row of Math-Shepherd: ``label`` is ``input`` with + (right) or - (wrong) in place of each tag.

    Left out: rows whose first tag comes before a "Step 1:", as some published ones do: the problem cannot be told
    from the first step there.
    """
    given, marked = row.value.get("input"), row.value.get("label")
    if not isinstance(given, str) or not isinstance(marked, str):
        row.fail("'input' and 'label' must be texts", "Is it a row of Math-Shepherd?")
    # the card of the data set writes "ки ?" and "ки +", the data themselves "ки" and "+"
    parts = re.sub(rf"{TAG} *\?", TAG, given).split(TAG)
    marked = re.sub(rf"{TAG} *([+-])", r"\1", marked)
    at, verdicts = 0, []
    for number, part in enumerate(parts[:-1], 1):
        at += len(part) + 1
        if marked[at - 1 - len(part) : at - 1] != part or marked[at - 1 : at] not in ("+", "-"):
            row.fail(
                f"'label' does not say + or - of step {number}", "It must repeat 'input' but for the tags."
            )
        verdicts.append(marked[at - 1] == "+")
    first = re.search(r"step 1:", parts[0], re.IGNORECASE)
    if first is None or not verdicts:
        raise DropRow('the problem does not end with "Step 1:" before the first tag')
    steps = [parts[0][first.start() :], *parts[1:-1]]
    own = [(words.strip(), verdict) for words, verdict in zip(steps, verdicts, strict=True)]
    if not all(words for words, _ in own):
        row.fail("a step is empty", "Leave the row out.")
    return [_item(row, parts[0][: first.start()].strip(), [own], ("input", "label"))]


def read_step_dpo(row: Row) -> list[Item]:
    """A row of Math-Step-DPO: two completions with the same beginning, ``initial_reason_steps``, that part in one
    step. The chosen one is right and the rejected one wrong, by the way these data are made (arXiv:2406.18629); of
    the beginning nothing is said. Neither is finished. ``full_chosen`` and ``full_rejected`` are not read.
    """
    value = row.value
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(value.get(name), str) or not value[name].strip():
            row.fail(f"the row has no {name!r}", "Each row needs prompt, chosen and rejected.")
    before = value.get("initial_reason_steps") or ""
    if not isinstance(before, str):
        row.fail("'initial_reason_steps' must be text", "Mend the row.")
    if value["chosen"] == value["rejected"]:
        row.fail("chosen and rejected are equal", "Leave the row out: it prefers nothing.")
    begun = ((len(before), None),) if before.strip() else ()
    texts = [before + value[name] for name in ("chosen", "rejected")]
    steps = tuple((*begun, (len(text), good)) for text, good in zip(texts, (True, False), strict=True))
    meta = {k: v for k in ("answer", "dataset") if isinstance(v := value.get(k), str)}
    made: tuple[Messages, ...] = tuple(row.completion(text, "chosen") for text in texts)
    return [Item(row.prompt(value["prompt"]), made, preferred=True, steps=steps, finished=False, meta=meta)]


READERS: dict[str, Callable[[Row], list[Item]]] = {
    "trl-stepwise": read_stepwise,
    "prm800k": read_prm800k,
    "math-shepherd": read_math_shepherd,
    "step-dpo": read_step_dpo,
}


def detect(row: Mapping[str, Any]) -> str | None:
    """The format with verdicts on steps that the keys of a row say, or None."""
    keys = {k for k, v in row.items() if v is not None}
    if "initial_reason_steps" in row and {"chosen", "rejected"} <= keys:
        return "step-dpo"
    if {"completions", "labels"} <= keys and "steerwell" not in keys:
        return "trl-stepwise"
    if isinstance(row.get("question"), Mapping) and isinstance(row.get("label"), Mapping):
        return "prm800k"
    if isinstance(row.get("input"), str) and TAG in row["input"] and isinstance(row.get("label"), str):
        return "math-shepherd"
    return None


def write_stepwise(group: CompletionGroup) -> Iterator[dict[str, Any]]:
    """A row per completion with labelled steps; true where a step is rather right than wrong. TRL knows no steps
    without a label: a row ends before the first one that has none, or is as likely right as wrong.
    """
    labels = group.step_labels or (None,) * len(group.completions)
    steps = group.steps or (None,) * len(group.completions)
    for completion, ends, own in zip(group.completions, steps, labels, strict=True):
        told = labelled(own)
        if ends is not None and told:
            texts = [text.rstrip("\n") for text in step_texts(completion.text, ends[: len(told)])]
            yield {"prompt": [m.to_dict() for m in group.prompt], "completions": texts, "labels": told}


def labelled(labels: Sequence[float | None] | None) -> list[bool]:
    """The labels up to the first step of which nothing is known, as true and false."""
    found: list[bool] = []
    for label in labels or ():
        if label is None or label == 0.5:
            break
        found.append(label > 0.5)
    return found


__all__ = ["READERS", "detect", "labelled", "write_stepwise"]
