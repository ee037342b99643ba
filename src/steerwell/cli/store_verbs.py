"""``steerwell import`` and ``steerwell export``: files into a store, and out of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerwell.cli import show, words
from steerwell.cli.app import app
from steerwell.data.errors import InputError, nearest

if TYPE_CHECKING:
    from steerwell.data.store import Store
    from steerwell.data.types import CompletionGroup


@app.command(
    "import",
    epilog="Example: steerwell import prefs.jsonl --to prefs.db",
)
def import_(
    files: Annotated[
        list[Path], typer.Argument(metavar="FILE…", help="TRL JSONL, HH text (.gz too), or native.")
    ],
    to: Annotated[
        str, typer.Option("--to", metavar="STORE", help="A SQLite file, made if need be, or a URL.")
    ],
    format: Annotated[
        str | None, typer.Option("--format", help="Take this format instead of the one found.")
    ] = None,
    split: Annotated[
        str | None, typer.Option("--split", help="Put all of it into this split, such as test.")
    ] = None,
    test_fraction: Annotated[
        float | None,
        typer.Option("--test-fraction", metavar="X", help="Split by prompt: this share is test."),
    ] = None,
    on_bad: Annotated[
        str, typer.Option("--on-bad", metavar="fail|drop", help="What to do with a bad row.")
    ] = "fail",
    as_json: show.AsJson = False,
) -> None:
    """Read preference data into a store: all of it or, after an error, nothing.

    Says which format was found, what was dropped and why. Importing a file again adds nothing.
    """
    from steerwell.data.formats import load

    if on_bad not in ("fail", "drop"):
        raise InputError(
            f"--on-bad {on_bad!r} is neither fail nor drop", mend=nearest(on_bad, ("fail", "drop"))
        )
    if split is not None and test_fraction is not None:
        raise InputError("--split and --test-fraction exclude each other", mend="Give one of them.")
    if test_fraction is not None and not 0 < test_fraction < 1:
        raise InputError(f"--test-fraction must be between 0 and 1, got {test_fraction:g}", mend="Give 0.1.")
    words.check_new_store(to)
    loaded = [load(file, format, on_bad="drop" if on_bad == "drop" else "raise") for file in files]
    groups = [group for found in loaded for group in found]
    with words.new_store(to) as store:
        if test_fraction is not None:
            store.set_split({"train": 1 - test_fraction, "test": test_fraction})
        added = store.add(groups, split=split)
        splits = store.split_sizes()
    value = {
        "store": to,
        "files": [found.report.to_dict() for found in loaded],
        "new": {
            "prompts": added.prompts,
            "completions": added.completions,
            "annotations": added.annotations,
        },
        "splits": splits,
    }
    lines = [str(found.report) for found in loaded]
    lines.append(f"{to}: {added}")
    lines.append("prompts by split: " + ", ".join(f"{name} {count:,}" for name, count in splits.items()))
    show.result(value, as_json, "\n".join(lines))


@app.command(
    epilog="Example: steerwell export prefs.db --format trl-preference --to pairs.jsonl",
)
def export(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    format: Annotated[str, typer.Option("--format", help="trl-preference, trl-unpaired, … or native.")],
    to: Annotated[Path, typer.Option("--to", metavar="PATH", help="The file to write.")],
    split: Annotated[str | None, typer.Option("--split", help="Only this split.")] = None,
    criterion: Annotated[str | None, typer.Option("--criterion", help="Only verdicts by this one.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    as_json: show.AsJson = False,
) -> None:
    """Write what a store holds as a file that other tools read.

    Pairs are resolved by majority, labels by majority of labels, those of steps by the mean. Says what the format
    cannot carry.
    """
    from steerwell.data.formats import WRITE_FORMATS, save

    if format not in WRITE_FORMATS:
        raise InputError(f"unknown format {format!r}", mend=nearest(format, WRITE_FORMATS))
    if to.exists() and not force:
        raise InputError("this file is there already", file=to, mend="Give another name, or --force.")
    with words.existing_store(store) as opened:
        groups, how = resolved(opened, format, split, criterion)
    report = save(groups, to, format)
    value = {
        "path": str(to),
        "format": format,
        "groups": len(groups),
        "rows": report.rows,
        "resolved": how,
        "not_carried": list(report.lost),
    }
    show.result(value, as_json, f"{how}\n{report}" if how else str(report))


def resolved(
    store: Store, format: str, split: str | None, criterion: str | None
) -> tuple[list[CompletionGroup], str]:
    """The groups with the targets that a format needs, and what resolving them said."""
    from steerwell.data import resolve

    groups = store.groups(split=split)
    rules = {
        "trl-preference": (resolve.majority, "pair"),
        "trl-unpaired": (resolve.labels, "label"),
        "trl-stepwise": (resolve.step_labels, "labelled step"),
    }
    if format not in rules:
        return groups, ""
    rule, need = rules[format]
    found = rule(groups, criterion=criterion)
    if not found:
        raise InputError(
            f"{format} needs {need}s; 0 of {len(groups)} groups have one",
            file=store.name,
            mend="Judge them first: steerwell judge STORE --with JUDGE.",
        )
    return found, str(found.report)


__all__ = ["export", "import_"]
