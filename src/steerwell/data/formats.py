"""Reading and writing preference files: one call each, the format found out, what was dropped said.

groups = load("prefs.jsonl")            # TRL's row types, HH transcripts, our own; .jsonl or .jsonl.gz
print(groups.report)                    # rows, groups, what was dropped and why, what to know
save(groups, "out.jsonl", "native")     # whole or not at all
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from steerwell.data import hh, native, stepwise, trl
from steerwell.data.errors import InputError, nearest
from steerwell.data.gather import DropRow, Gather, Item, Row
from steerwell.data.types import CompletionGroup

READERS: dict[str, Callable[[Row], list[Item]]] = {**trl.READERS, **stepwise.READERS, "hh": hh.read_row}
READ_FORMATS = (*READERS, "native")
WRITERS = {**trl.WRITERS, "trl-stepwise": stepwise.write_stepwise}
WRITE_FORMATS = (*WRITERS, "native")
_ROWS_SHOWN = 8
MEND_JSON = "Write one JSON object a line (JSONL)."


@dataclass
class LoadReport:
    """What a file held and what became of it."""

    file: str
    format: str = ""
    rows: int = 0
    groups: int = 0
    completions: int = 0
    annotations: int = 0
    dropped: list[tuple[int, str]] = field(default_factory=list)  # (row, reason)
    flagged: dict[str, list[int]] = field(default_factory=dict)  # what rows have in common -> the rows
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All of it, as JSON-like values."""
        return {**vars(self), "dropped": [list(d) for d in self.dropped]}

    def __str__(self) -> str:
        lines = [
            f"{self.file}: {self.rows} rows of format {self.format} -> {self.groups} groups, "
            f"{self.completions} completions, {self.annotations} annotations"
        ]
        reasons: dict[str, list[int]] = {}
        for row, reason in self.dropped:
            reasons.setdefault(reason, []).append(row)
        lines += [f"  dropped {len(rows)} ({_listed(rows)}): {why}" for why, rows in reasons.items()]
        lines += [f"  {len(rows)} rows {what} ({_listed(rows)})" for what, rows in self.flagged.items()]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])


def _listed(rows: list[int]) -> str:
    more = f" and {len(rows) - _ROWS_SHOWN} more" if len(rows) > _ROWS_SHOWN else ""
    return ("row " if len(rows) == 1 else "rows ") + ", ".join(map(str, rows[:_ROWS_SHOWN])) + more


class Loaded(list[CompletionGroup]):
    """The groups of a file, in its order, with the ``report`` of the reading."""

    report: LoadReport

    def __init__(self, groups: Iterable[CompletionGroup], report: LoadReport) -> None:
        super().__init__(groups)
        self.report = report


def load(
    path: str | Path, format: str | None = None, *, on_bad: Literal["raise", "drop"] = "raise"
) -> Loaded:
    """Read a JSONL file (or .gz) of preferences, labels, demonstrations, prompts, or of our own format.

    ``format`` is found out from the first row, or one of ``trl-preference``, ``trl-unpaired``,
    ``trl-prompt-completion``, ``trl-prompt-only``, ``trl-messages``, ``trl-stepwise``, ``prm800k``,
    ``math-shepherd``, ``step-dpo``, ``hh``, ``native``. Rows about one
    prompt become one group, verdicts become annotations by ``dataset:<file name>`` (or the row's
    ``annotator``). Texts are taken as they are, to the last space.

    A bad row raises :class:`InputError` that names file, row and mend, or with ``on_bad="drop"`` is left
    out and listed in the report. HH transcripts with an empty end are left out and listed either way: the
    published data has some. Raises also for a missing or empty file, a folder, and a file with no usable
    row.
    """
    path = Path(path)
    if on_bad not in ("raise", "drop"):
        raise InputError(f"on_bad must be 'raise' or 'drop', got {on_bad!r}")
    if format is not None and format not in READ_FORMATS:
        raise InputError(f"unknown format {format!r}", mend=nearest(format, READ_FORMATS))
    report = LoadReport(str(path), format or "")
    gather, groups = Gather(path.name), []
    for row in _rows(path, report, on_bad):
        try:
            report.format = report.format or _detect(row)
            if report.format == "native":
                groups.append(native.read_group(row))
                continue
            for item in READERS[report.format](row):
                gather.add(item)
                for flag in item.flags:
                    found = report.flagged.setdefault(flag, [])
                    if row.number not in found[-1:]:
                        found.append(row.number)
        except DropRow as reason:
            report.dropped.append((row.number, str(reason)))
        except InputError as error:
            if on_bad == "raise":
                raise
            report.dropped.append((row.number, error.what))
    groups = groups or gather.groups()
    _finish(report, gather, groups)
    return Loaded(groups, report)


def _finish(report: LoadReport, gather: Gather, groups: list[CompletionGroup]) -> None:
    if not report.rows:
        raise InputError("the file is empty", file=report.file, mend=MEND_JSON)
    if not groups:
        row, why = report.dropped[0]
        raise InputError(
            f"none of the {report.rows} rows can be used; the first: {why}", file=report.file, row=row
        )
    report.groups = len(groups)
    report.completions = sum(len(g.completions) for g in groups)
    report.annotations = sum(len(g.annotations) for g in groups)
    if gather.repeated_prompts:
        verb = "repeats the prompt" if gather.repeated_prompts == 1 else "repeat the prompts"
        report.notes.append(f"{gather.repeated_prompts} {verb} of earlier rows and joined their groups")
    if gather.repeated_verdicts:
        report.notes.append(
            f"{gather.repeated_verdicts} verdicts repeat earlier rows word for word: kept once"
        )


def _detect(row: Row) -> str:
    if "steerwell" in row.value:
        return "native"
    if hh.is_hh(row.value):
        return "hh"
    found = stepwise.detect(row.value) or trl.detect(row.value)
    if found:
        return found
    keys = ", ".join(sorted(row.value)) or "none"
    row.fail(
        f"{trl.NO_PROMPT}, chosen or messages (its keys: {keys})",
        "See the formats: steerwell import --help.",
    )


def _rows(path: Path, report: LoadReport, on_bad: str) -> Iterator[Row]:
    """The rows of a file. Counts them in the report; bad lines raise, or are dropped and listed."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        report.rows += 1
        try:
            yield Row(_parse(line, path, number), path, number)
        except InputError as error:
            if on_bad == "raise":
                raise
            report.dropped.append((number, error.what))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file or a gzip file, which is known by its first bytes."""
    if path.is_dir():
        raise InputError("this is a folder", file=path, mend="Give one of the files in it.")
    number = 0
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if packed else path.open("rb") as file:
            # In bytes, so that only \n ends a line (JSON texts may hold others) and a bad byte has a row.
            for number, line in enumerate(file, 1):
                yield (line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line).decode()
    except FileNotFoundError:
        raise InputError("no such file", file=path, mend="Check the path.") from None
    except UnicodeDecodeError:
        raise InputError("not text in UTF-8", file=path, row=number, mend="Save the file as UTF-8.") from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"a damaged gzip file ({error})", file=path, mend="Fetch it again.") from None
    except OSError as error:
        raise InputError(f"can't be read ({error.strerror or error})", file=path) from None


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


def _parse(line: str, path: Path, number: int) -> dict[str, Any]:
    fail = partial(InputError, file=path, row=number)
    try:
        value = json.loads(line, parse_constant=_no_constant)
        if "\\u" in line:
            json.dumps(value, ensure_ascii=False).encode()  # half a surrogate pair is no text
    except UnicodeEncodeError:
        raise fail("holds half a character (a lone surrogate)", mend="Write the text as UTF-8.") from None
    except (ValueError, RecursionError) as error:
        raise fail(f"not JSON ({error})", mend=MEND_JSON) from None
    if not isinstance(value, dict):
        raise fail(f"expected a JSON object, got {type(value).__name__}", mend=MEND_JSON)
    return value


@dataclass(frozen=True)
class SaveReport:
    """How many rows were written, and what the format can't carry."""

    file: str
    format: str
    rows: int
    lost: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            [
                f"{self.file}: {self.rows} rows of format {self.format}",
                *(f"  not carried: {x}" for x in self.lost),
            ]
        )


_NEEDS = {
    "trl-preference": "no group has pairs; derive them first: steerwell.resolve.majority(groups)",
    "trl-unpaired": "no completion has a label; derive them first: steerwell.resolve.labels(groups)",
    "trl-prompt-completion": "there is no completion to write",
    "trl-stepwise": "no step has a label; derive them first: steerwell.resolve.step_labels(groups)",
}


def save(groups: Iterable[CompletionGroup], path: str | Path, format: str = "native") -> SaveReport:
    """Write groups as ``native``, ``trl-preference``, ``trl-unpaired``, ``trl-prompt-completion`` or
    ``trl-stepwise``.

    JSONL, or gzip when the name ends with .gz; conversational rows. The file appears whole or not at all. The
    report says what the format can't carry: only ``native`` is lossless. Raises :class:`InputError` for an
    unknown format, a missing folder, and when there is nothing to write.
    """
    path = Path(path)
    if format not in WRITE_FORMATS:
        raise InputError(f"unknown format to write {format!r}", mend=nearest(format, WRITE_FORMATS))
    if path.is_dir() or not path.parent.is_dir():
        what = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(what, file=path, mend="Give a file name in an existing folder.")
    listed = list(groups)
    if format == "native":
        rows: Iterable[Mapping[str, Any]] = map(native.write_group, listed)
    else:
        rows = [row for group in listed for row in WRITERS[format](group)]
        if not rows:
            raise InputError(_NEEDS[format], file=path, mend="Nothing was written.")
    count = _write(rows, path)
    return SaveReport(str(path), format, count, () if format == "native" else tuple(_lost(listed, format)))


def _write(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    partial_file = path.with_name(f".{path.name}.{os.getpid()}.partial")
    count = 0
    try:
        with partial_file.open("wb") as raw:
            packed = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            for row in rows:
                text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
                packed.write(text.encode() + b"\n")
                count += 1
            if packed is not raw:
                packed.close()
        os.replace(partial_file, path)
    except (TypeError, ValueError) as error:
        raise InputError(f"can't be written as JSON ({error})", file=path, mend="Mend the group.") from None
    except OSError as error:
        raise InputError(
            f"can't be written ({error.strerror})", file=path, mend="Check the folder."
        ) from None
    finally:
        with suppress(FileNotFoundError):
            partial_file.unlink()
    return count


def _lost(groups: list[CompletionGroup], format: str) -> Iterator[str]:
    """What of these groups a TRL format has no place for."""
    counts: Counter[str] = Counter()
    for group in groups:
        counts["annotations"] += len(group.annotations)
        counts["completions with token ids"] += sum(c.token_ids is not None for c in group.completions)
        counts["tags of prompts"] += bool(group.meta)
        counts["scores"] += sum(s is not None for s in group.scores or ())
        counts["ranks"] += sum(r is not None for r in group.ranks or ())
        if format == "trl-preference":
            counts["probabilities of pairs (p < 1)"] += sum(0 < p.p < 1 for p in group.pairs)
            named = {k for p in group.pairs for k in p[:2]}
            counts["completions without a pair"] += len(group.completions) - len(named)
        else:
            counts["pairs"] += len(group.pairs)
        told = sum(len(stepwise.labelled(own)) for own in group.step_labels or ())
        given = sum(x is not None for own in group.step_labels or () for x in own or ())
        counts["labels of steps"] += given - (told if format == "trl-stepwise" else 0)
        if format == "trl-unpaired":
            labels = group.labels or (None,) * len(group.completions)
            counts["completions without a label"] += sum(label is None for label in labels)
        else:
            counts["labels"] += sum(label is not None for label in group.labels or ())
    yield from (f"{n} {what}" for what, n in counts.items() if n)
    yield "where completions came from"


__all__ = [
    "READ_FORMATS",
    "WRITE_FORMATS",
    "LoadReport",
    "Loaded",
    "SaveReport",
    "load",
    "save",
]
