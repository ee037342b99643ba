"""Our own file format: one group a line, lossless, with evidence, targets, token ids and log-probabilities.

Every row has the key ``steerwell`` with the version of the format. Keys that would be empty are left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.evidence import as_value, check_annotation
from steerwell.data.gather import Row
from steerwell.data.steps import check_steps
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair, Source

VERSION = 1


def _plain(item: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The fields that differ from their defaults, tuples as lists."""
    defaults = {f.name: f.default for f in fields(item)}
    found = {}
    for name in names:
        value = getattr(item, name)
        if defaults[name] is MISSING or value != defaults[name]:
            found[name] = list(value) if isinstance(value, tuple) else value
    return found


_SOURCE = tuple(f.name for f in fields(Source))
_ANNOTATION = tuple(f.name for f in fields(Annotation))
_FACTS = ("token_ids", "prompt_token_ids", "old_logps", "finished")


def write_group(group: CompletionGroup) -> dict[str, Any]:
    """A group as one JSON object."""
    row: dict[str, Any] = {"steerwell": VERSION, "prompt": [m.to_dict() for m in group.prompt]}
    row["completions"] = [
        {"messages": [m.to_dict() for m in c.messages], "source": _plain(c.source, _SOURCE)}
        | _plain(c, _FACTS)
        for c in group.completions
    ]
    targets = {
        "annotations": [_plain(a, _ANNOTATION) for a in group.annotations],
        "pairs": [list(p) for p in group.pairs],
        "pair_strengths": group.pair_strengths,
        "scores": group.scores,
        "labels": group.labels,
        "ranks": group.ranks,
        "attributes": {name: list(values) for name, values in (group.attributes or {}).items()},
        "steps": group.steps,
        "step_labels": group.step_labels,
        "meta": dict(group.meta),
    }
    return row | {k: v for k, v in targets.items() if v not in (None, [], {})}


def read_group(row: Row) -> CompletionGroup:
    """A group from its JSON object. Raises :class:`InputError` for a newer version or a malformed row."""
    version = row.value.get("steerwell")
    if version != VERSION:
        row.fail(
            f"the row has format version {version!r}, this steerwell reads {VERSION}", "Upgrade steerwell."
        )
    try:
        return _read(row)
    except InputError as error:
        if error.row is not None:
            raise
        row.fail(error.what, error.mend)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        row.fail(f"not a group: {type(error).__name__} {error}", "Write it with steerwell export.")


def _read(row: Row) -> CompletionGroup:
    value = row.value
    prompt = row.messages(value["prompt"], "user")
    if not prompt:
        row.fail("the row has no prompt: it has no message", "Give it at least one message.")
    completions = []
    for c in value.get("completions", []):
        facts: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in c.items() if k in _FACTS
        }
        messages = row.messages(c["messages"], "assistant")
        completions.append(Completion(prompt, messages, Source(**c.get("source", {})), **facts))
    annotations = tuple(_read_annotation(a) for a in value.get("annotations", []))
    for annotation in annotations:
        check_annotation(annotation)
    pairs = tuple(Pair(*p) for p in value.get("pairs", []))
    if any(not 0 <= k < len(completions) for p in pairs for k in p[:2]):
        row.fail("a pair names a completion that is not in the group", "Count from 0.")
    names = ("scores", "labels", "ranks", "steps", "step_labels")
    targets: dict[str, Any] = {k: as_value(value[k]) for k in names if value.get(k) is not None}
    strengths = value.get("pair_strengths")
    if strengths is not None and len(strengths) != len(pairs):
        row.fail(f"{len(strengths)} pair_strengths for {len(pairs)} pairs", "Give one for each, or null.")
    strengths = None if strengths is None else tuple(strengths)
    attributes = {name: tuple(found) for name, found in (value.get("attributes") or {}).items()}
    for name, target in {**targets, **attributes}.items():
        if len(target) != len(completions):
            row.fail(
                f"{len(target)} {name} for {len(completions)} completions", "Give one for each, or null."
            )
    group = CompletionGroup(
        prompt,
        tuple(completions),
        annotations,
        pairs,
        **targets,
        pair_strengths=strengths,
        attributes=attributes or None,
        meta=value.get("meta", {}),
    )
    check_steps(group)
    return group


def _read_annotation(value: Mapping[str, Any]) -> Annotation:
    given = dict(value)
    given["completions"] = tuple(given["completions"])
    given["value"] = as_value(given["value"])
    return Annotation(**given)


__all__ = ["VERSION", "read_group", "write_group"]
