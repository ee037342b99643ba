"""What a comparison found: the table for the terminal, and one self-contained page with the table and the curves."""

from __future__ import annotations

import io
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from steerwell.evals.charts import Series, Tone
from steerwell.evals.display import Unit, say, signed
from steerwell.evals.report import Report
from steerwell.evals.stats import Estimate

#: Column of the table -> (figure, unit, whether it is a change, what it means).
COLUMNS: dict[str, tuple[str, Unit, bool, str]] = {
    "pair accuracy": (
        "accuracy",
        "share",
        False,
        "held-out pairs whose chosen completion gained more log-prob since the start than the rejected one; ties count "
        "half",
    ),
    "margin": (
        "margin",
        "number",
        True,
        "nats by which the chosen completion gained more than the rejected one, summed over tokens; mean over "
        "held-out pairs",
    ),
    "chosen shift": (
        "chosen_shift",
        "number",
        True,
        "nats per token that the chosen completions of the held-out pairs gained since the start; below 0 they have "
        "become less likely",
    ),
    "KL to start": (
        "kl",
        "number",
        False,
        "nats per completion, over fresh samples of the tuned model (the k3 estimate, summed over tokens)",
    ),
    "gold win rate": (
        "win_rate",
        "share",
        False,
        "how often gold prefers the tuned model's sample to the start's, on held-out prompts of the embedded world; "
        "ties count half",
    ),
    "tokens": ("tokens", "number", False, "mean length of the samples"),
}
TONES: tuple[Tone, ...] = ("after", "proxy", "gold", "before", "bad", "good", "ink")
CURVES = {
    "accuracy": (
        "Held-out pair accuracy",
        "share of pairs",
        "By each objective's own reward, which need not be the log-ratio of the table; objectives that learn from "
        "labels record none.",
    ),
    "margin": (
        "Held-out margin since the start",
        "nats per pair",
        "The same quantity for all: how much more log-prob the chosen completions gained than the rejected ones.",
    ),
    "chosen_shift": (
        "Log-prob of the held-out chosen completions since the start",
        "nats per completion",
        "Below 0 the preferred completions have become less likely while the margin grew.",
    ),
}
WIDE = 200  # columns of a table that goes to a file or a pipe


def columns(result: dict[str, Any]) -> list[str]:
    """The columns that hold something: the win rate only where there is gold."""
    return [name for name in COLUMNS if name != "gold win rate" or result["samples"]["gold"]]


def estimate(row: dict[str, Any], column: str) -> Estimate | None:
    """A figure of a contender; None where it was not measured."""
    value = row[COLUMNS[column][0]]
    return None if value is None else Estimate.from_dict(value)


def table(result: dict[str, Any]) -> str:
    """The result for people: a table, notes about the data, and where the page is."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=SIMPLE_HEAD, pad_edge=False)
    shown.add_column("objective", no_wrap=True)
    for name in (*columns(result), "seconds"):
        shown.add_column(name, justify="right")
    for row in result["contenders"]:
        cells = [_cell(estimate(row, name), *COLUMNS[name][1:3]) for name in columns(result)]
        shown.add_row(row["name"], *cells, f"{row['wall_seconds'] or 0:.0f}")
    terminal = sys.stdout.isatty()
    width = shutil.get_terminal_size().columns if terminal else WIDE
    out = io.StringIO()
    Console(file=out, width=width, force_terminal=terminal, highlight=False).print(shown)
    held, drawn = result["held_out"], result["samples"]
    lines = [line.rstrip() for line in out.getvalue().splitlines()]
    lines += [
        f"{held['pairs']:,} held-out pairs of {held['prompts']:,} prompts; {drawn['prompts']:,} prompts sampled once. "
        "Intervals are 95%.",
        *(f"note: {note}" for note in result["notes"]),
        f"page: {Path(result['out']) / 'compare.html'}",
    ]
    return "\n".join(lines)


def _cell(found: Estimate | None, unit: Unit, change: bool) -> str:
    if found is None or found.value is None:
        return "–"
    value = signed(found.value, unit) if change else say(found.value, unit)
    if found.low is None or found.high is None:
        return value
    low, high = (say(end, unit).removesuffix("%") for end in (found.low, found.high))
    return f"{value} ({low} … {high})"


def write_page(path: Path, result: dict[str, Any]) -> Path:
    """Write ``compare.html``: the table with its intervals, the curves, the settings, and how it was measured."""
    names = [row["name"] for row in result["contenders"]]
    report = Report(
        "Objectives compared",
        lead=f"{len(names)} preference objectives on the same model, data, order and seed, measured by one yardstick: "
        "the log-ratio to the model that they all started from.",
        kicker="steerwell train --compare",
    )
    shown = columns(result)
    report.section("In short").table(
        f"Measured on {result['held_out']['pairs']:,} held-out pairs and samples for "
        f"{result['samples']['prompts']:,} held-out prompts",
        ["objective", *shown],
        [[row["name"], *(_on_the_page(row, name) for name in shown)] for row in result["contenders"]],
        units={name: COLUMNS[name][1] for name in shown},
        note="95% intervals over prompts. They do not cover the seed of training: a second seed may change places "
        "that lie close together.",
    )
    _curves(report, result)
    report.section("What each was given").table(
        "Settings",
        ["objective", "settings", "learning rate", "steps", "groups", "seconds"],
        [
            [
                row["name"],
                _settings(row["settings"]),
                f"{row['learning_rate']:g}",
                row["steps"],
                row["groups"],
                row["wall_seconds"],
            ]
            for row in result["contenders"]
        ],
    )
    report.section("How it was measured").notes({name: COLUMNS[name][3] for name in shown})
    if result["notes"]:
        report.section("Notes").notes(result["notes"])
    facts = {key: result[key] for key in ("steerwell", "model", "data", "seed")}
    report.provenance(facts | {"samples cut at": f"{result['samples']['max_new_tokens']} tokens"})
    return report.write(path)


def _on_the_page(row: dict[str, Any], column: str) -> Estimate | float | None:
    """A cell of the page's table: the length of samples goes without its interval, as the page is not that wide."""
    found = estimate(row, column)
    return found.value if found is not None and column == "tokens" else found


def _curves(report: Report, result: dict[str, Any]) -> None:
    report.section(
        "On the way",
        "What each run recorded on the held-out pairs while it trained. eval_every in the recipe says how often.",
    )
    for figure, (caption, unit, note) in CURVES.items():
        series = _series(result["contenders"], figure)
        if not series:
            continue
        ends = ", ".join(f"{s.label} {_last(s)}" for s in series)
        report.curves(
            caption,
            series,
            alt=f"{caption} by step. At the end: {ends}.",
            x_label="step",
            y_label=unit,
            note=note,
        )


def _series(rows: Sequence[dict[str, Any]], figure: str) -> list[Series]:
    """One line for each contender that recorded the figure; colours first, then dashes."""
    found = []
    for i, row in enumerate(rows):
        points = [(float(line["step"]), line[figure]) for line in row["curves"]]
        if any(y is not None for _, y in points):
            x, y = zip(*points, strict=True)
            tone = TONES[i % len(TONES)]
            found.append(Series(row["name"], x, y, tone=tone, dashed=i // len(TONES) % 2 == 1))
    return found


def _last(series: Series) -> str:
    return say(next(y for y in reversed(series.y) if y is not None))


def _settings(terms: dict[str, dict[str, Any]]) -> str:
    """Every term with all of its hyperparameters, in one line."""
    parts = []
    for name, given in terms.items():
        told = ", ".join(f"{key} = {value}" for key, value in given.items() if key != "weight")
        weight = f"{given['weight']:g} × " if given["weight"] != 1 else ""
        parts.append(f"{weight}{name}{f' ({told})' if told else ''}")
    return " + ".join(parts)


__all__ = ["columns", "estimate", "table", "write_page"]
