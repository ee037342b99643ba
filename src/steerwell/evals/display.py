"""What a report shows, from numbers to words and places on a scale: the pieces that a page is made of.

The makers at the end (``card``, ``change``, ``cell``) give plain dictionaries to the page's template.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from steerwell.evals.charts import short, ticks
from steerwell.evals.stats import Estimate

Unit = Literal["share", "points", "number"]
Good = Literal["good", "bad", ""]
MINUS = "\N{MINUS SIGN}"
FOLD_AFTER = 700  # characters of a completion that are shown before the rest is folded away


@dataclass(frozen=True)
class Card:
    """A headline number. ``mark`` is a value to compare with, drawn on the bar (0.5 for a win rate)."""

    label: str
    value: Estimate | float | str | None
    note: str = ""
    unit: Unit = "share"
    mark: float | None = None
    mark_label: str = ""
    tone: Good = ""


@dataclass(frozen=True)
class Change:
    """A metric before and after; ``difference`` (paired), or else the intervals, say if it got better."""

    label: str
    before: Estimate
    after: Estimate
    better: Literal["higher", "lower"] | None = None
    unit: Unit = "share"
    difference: Estimate | None = None
    hint: str = ""


@dataclass(frozen=True)
class Side:
    """One completion as it is shown, with short verdicts: (words, "good" | "bad" | "")."""

    text: str
    verdicts: Sequence[tuple[str, Good]] = ()


@dataclass(frozen=True)
class Sample:
    """A prompt and what was said before and after."""

    prompt: str
    before: Side
    after: Side
    tag: str = ""
    note: str = ""


# ---------------------------------------------------------------- numbers in words


def say(value: float | None, unit: Unit = "number") -> str:
    """A number as people read it: a share in percent, otherwise three digits that matter."""
    if value is None:
        return "–"
    if unit == "share":
        said = f"{100 * value:.1f}%"
    elif unit == "points":
        said = f"{100 * value:.1f}"
    elif isinstance(value, int) or abs(value) >= 100:
        said = f"{value:,.0f}"
    else:
        said = f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
    zero = said.strip("-%") in ("0", "0.0", "0.00")
    return (said.lstrip("-") if zero else said).replace("-", MINUS)


def signed(value: float, unit: Unit = "number") -> str:
    """A change, always with its sign; a change of a share is in percentage points."""
    said = say(value, unit)
    return said if said.startswith(MINUS) or not said.strip("0.%") else f"+{said}"


def interval(e: Estimate, unit: Unit) -> str:
    """The interval in words."""
    if e.low is None or e.high is None:
        return "no interval" if e.value is not None else "no data"
    return f"{say(e.low, unit).removesuffix('%')} to {say(e.high, unit)}"


def clock(seconds: float) -> str:
    """A duration as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


# ---------------------------------------------------------------- what the template is handed


def scale_of(estimates: Sequence[Estimate]) -> tuple[float, float]:
    """A round scale that holds every interval, from zero where zero is near."""
    ends = [v for e in estimates for v in (e.value, e.low, e.high) if v is not None]
    if not ends:
        return 0.0, 1.0
    low, high = min(ends), max(ends)
    if low > 0 and low < 0.7 * high:
        low = 0.0
    found = ticks(low, high, 4)
    return found[0], found[-1]


def _bar(e: Estimate, scale: tuple[float, float]) -> dict[str, float] | None:
    """Places of an estimate on its scale, in percent of the width."""
    if e.value is None:
        return None

    def at(value: float) -> float:
        return round(min(100.0, max(0.0, 100 * (value - scale[0]) / (scale[1] - scale[0]))), 2)

    low = e.value if e.low is None else e.low
    high = e.value if e.high is None else e.high
    return {"at": at(e.value), "low": at(low), "width": round(max(at(high) - at(low), 0.6), 2)}


def _ends(scale: tuple[float, float], unit: Unit) -> tuple[str, str]:
    """The two ends of a scale in words."""
    if unit == "share":
        return f"{short(100 * scale[0])}%", f"{short(100 * scale[1])}%"
    return short(scale[0]), short(scale[1])


def card_data(card: Card) -> dict[str, Any]:
    """A card for the template."""
    found: dict[str, Any] = {"label": card.label, "note": card.note, "tone": card.tone, "bar": None}
    if not isinstance(card.value, Estimate):
        value = card.value
        return {**found, "value": value if isinstance(value, str) else say(value, card.unit), "range": ""}
    e = card.value
    ends = [e, Estimate(card.mark, None, None, 0)] if card.mark is not None else [e]
    scale = (0.0, 1.0) if card.unit == "share" else scale_of(ends)
    bar = _bar(e, scale)
    if bar and card.mark is not None:
        place = _bar(Estimate(card.mark, None, None, 0), scale)
        found["mark"] = place["at"] if place else None
    found["ends"] = _ends(scale, card.unit)
    found["mark_label"] = card.mark_label or (say(card.mark, card.unit) if card.mark is not None else "")
    return {**found, "value": say(e.value, card.unit), "range": interval(e, card.unit), "n": e.n, "bar": bar}


def change_data(row: Change, scale: tuple[float, float]) -> dict[str, Any]:
    """A metric before and after for the template, on a scale from low to high."""
    change_unit: Unit = "points" if row.unit == "share" else row.unit
    d, before, after = row.difference, row.before.value, row.after.value
    size = d.value if d and d.value is not None else None
    if size is None and before is not None and after is not None:
        size = after - before
    words = "–" if size is None else signed(size, change_unit) + (" points" if row.unit == "share" else "")
    verdict, tone = _verdict(row, size)
    return {
        "label": row.label,
        "hint": row.hint,
        "before": say(before, row.unit),
        "after": say(after, row.unit),
        "before_range": interval(row.before, row.unit),
        "after_range": interval(row.after, row.unit),
        "before_bar": _bar(row.before, scale),
        "after_bar": _bar(row.after, scale),
        "ends": _ends(scale, row.unit),
        "better": {"higher": "higher is better", "lower": "lower is better"}.get(row.better or "", ""),
        "change": words,
        "change_range": f"{interval(d, change_unit)}" if d and d.low is not None else "",
        "verdict": verdict,
        "tone": tone,
    }


def _verdict(row: Change, size: float | None) -> tuple[str, Good]:
    """Better, worse or not told apart: by the paired interval, or else by intervals that do not overlap."""
    d = row.difference
    if d is not None and d.low is not None and d.high is not None:
        clear = d.low > 0 or d.high < 0
    else:
        a, b = row.before, row.after
        ends = (a.low, a.high, b.low, b.high)
        if any(v is None for v in ends):
            return "", ""
        clear = b.low > a.high or b.high < a.low  # type: ignore[operator]
    if not clear or size is None:
        return "no clear change", ""
    if row.better is None:
        return ("higher" if size > 0 else "lower"), ""
    improved = (size > 0) == (row.better == "higher")
    return ("better", "good") if improved else ("worse", "bad")


def cell_data(value: Any, unit: Unit, scale: tuple[float, float]) -> dict[str, Any]:
    """A cell of a table for the template."""
    if isinstance(value, Estimate):
        text = say(value.value, unit)
        return {"text": text, "range": interval(value, unit), "bar": _bar(value, scale)}
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return {"text": say(value, unit), "range": "", "bar": None}
    return {"text": str(value), "range": "", "bar": None}


def fold(text: str) -> tuple[str, str]:
    """What is shown of a long text, and the rest that is folded away."""
    if len(text) <= FOLD_AFTER + 100:
        return text, ""
    cut = text.rfind(" ", FOLD_AFTER - 100, FOLD_AFTER)
    cut = cut if cut > 0 else FOLD_AFTER
    return text[:cut], text[cut:]


__all__ = [
    "Card",
    "Change",
    "Good",
    "Sample",
    "Side",
    "Unit",
    "card_data",
    "cell_data",
    "change_data",
    "clock",
    "fold",
    "interval",
    "say",
    "scale_of",
    "signed",
]
