"""Small hand-made line charts in SVG: crisp at any size, coloured by the page's own CSS variables.

No chart is drawn without the numbers: :func:`numbers` gives the table that stands beside it. All text is
escaped. A None is a gap in the line.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from typing import Literal

from steerwell.data.errors import InputError

Tone = Literal["before", "after", "proxy", "gold", "good", "bad", "ink"]
MOST_POINTS = 400


@dataclass(frozen=True)
class Series:
    """One line: ``y`` over ``x``, with an optional band from ``low`` to ``high``, in the page's ``tone``."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    low: Sequence[float | None] | None = None
    high: Sequence[float | None] | None = None
    tone: Tone = "after"
    dashed: bool = False

    def __post_init__(self) -> None:
        sizes = {len(v) for v in (self.x, self.y, self.low, self.high) if v is not None}
        if len(sizes) != 1:
            raise InputError(
                f"the series {self.label!r} has columns of unequal length", mend="Give one y per x."
            )


@dataclass(frozen=True)
class Mark:
    """A vertical line at ``x`` with a few words; ``shade_after`` tints everything to its right."""

    x: float
    label: str
    shade_after: str = ""


def known(value: float | None) -> bool:
    """Is it a number that can be drawn?"""
    return value is not None and math.isfinite(value)


def ticks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers that cover low … high: steps of 1, 2, 2.5 or 5 times a power of ten."""
    if not high > low:
        margin = abs(low) * 0.1 or 1.0
        low, high = low - margin, high + margin
    raw = (high - low) / max(about - 1, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(first, last + 1)]


def short(value: float) -> str:
    """A tick label: as few digits as say the value, with a true minus sign."""
    if abs(value) >= 10_000:
        said = f"{value:,.0f}"
    else:
        said = f"{value:.4g}" if abs(value) >= 1e-4 or value == 0 else f"{value:.0e}"
    return said.replace("-", "\N{MINUS SIGN}")


def thinned(series: Series, most: int = MOST_POINTS) -> Series:
    """Means over runs of neighbouring points where there are more points than pixels to show them."""
    if len(series.x) <= most:
        return series
    size = math.ceil(len(series.x) / most)

    def means(values: Sequence[float | None]) -> list[float | None]:
        runs = (
            [v for v in values[i : i + size] if v is not None and known(v)]
            for i in range(0, len(values), size)
        )
        return [sum(run) / len(run) if run else None for run in runs]

    x = [v for v in means(series.x) if v is not None]
    band = [means(b) if b is not None else None for b in (series.low, series.high)]
    return Series(series.label, x, means(series.y), band[0], band[1], series.tone, series.dashed)


@dataclass(frozen=True)
class _Frame:
    """The plot area in pixels and the data range it shows."""

    left: float
    right: float
    top: float
    bottom: float
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return self.left + (value - self.x0) / (self.x1 - self.x0) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.bottom - (value - self.y0) / (self.y1 - self.y0) * (self.bottom - self.top)


def line_chart(
    series: Sequence[Series],
    *,
    alt: str,
    x_label: str = "",
    y_label: str = "",
    marks: Sequence[Mark] = (),
    width: int = 760,
    height: int = 340,
    direct: bool = True,
    name: str = "",
) -> str:
    """The SVG of a line chart. ``alt`` says what it shows; ``direct`` writes the labels at the line ends.

    Raises :class:`InputError` when there is no number to draw.
    """
    lines = [thinned(s) for s in series]
    points = [(x, y) for s in lines for x, y in zip(s.x, s.y, strict=True) if y is not None and known(y)]
    if not points:
        raise InputError(f"the chart {alt[:60]!r} has no numbers to draw", mend="Leave it out.")
    bands = [
        v for s in lines for b in (s.low, s.high) if b is not None for v in b if v is not None and known(v)
    ]
    bottom, top = min([y for _, y in points] + bands), max([y for _, y in points] + bands)
    room = 0.05 * (top - bottom) or abs(top) * 0.1 or 1.0  # as ticks does it where all values are one
    y_ticks = _inside(ticks(bottom, top, 5), bottom - room, top + room)
    if len(y_ticks) < 3:
        y_ticks = _inside(ticks(bottom, top, 8), bottom - room, top + room)
    lowest, highest = min(x for x, _ in points), max(x for x, _ in points)
    x_ticks = [t for t in ticks(lowest, highest, 7 if width > 500 else 5) if lowest <= t <= highest] or [
        lowest
    ]
    gutter = 12 + 7.2 * max(len(t) for t in tick_labels(y_ticks))
    ends = 14 + (8.8 * max(len(s.label) for s in lines) if direct else 6)
    frame = _Frame(
        left=gutter,
        right=width - ends,
        top=(26 if y_label else 12) + (20 if marks else 0),
        bottom=height - (44 if x_label else 26),
        x0=lowest,
        x1=highest if highest > lowest else lowest + 1,
        y0=bottom - room,
        y1=top + room,
    )
    parts = [
        f'<svg class="chart {escape(name)}" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(alt)}">',
        *_axes(frame, x_ticks, y_ticks, x_label, y_label, width, height),
        *(part for mark in marks for part in _mark(mark, frame)),
        *(part for s in lines for part in _line(s, frame)),
        *(_labels(lines, frame) if direct else []),
        "</svg>",
    ]
    return "".join(parts)


def tick_labels(values: Sequence[float]) -> list[str]:
    """The labels of ticks that lie close together: as many digits as tell them apart, the same for all."""
    for digits in range(4, 13):
        said = [f"{value:.{digits}g}" for value in values]
        if len(set(said)) == len(values) and all(
            abs(float(s) - v) <= 1e-3 * abs(values[-1] - values[0]) for s, v in zip(said, values, strict=True)
        ):
            break
    else:
        said = [repr(value) for value in values]
    plain = [short(v) for v in values] if digits == 4 and max(map(abs, values)) >= 1e-4 else said
    return [s.replace("-", "\N{MINUS SIGN}") for s in plain]


def _inside(values: Sequence[float], low: float, high: float) -> list[float]:
    return [v for v in values if low <= v <= high]


def _words(kind: str, x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _axes(
    f: _Frame, xs: Sequence[float], ys: Sequence[float], x_label: str, y_label: str, width: int, height: int
) -> Iterable[str]:
    """Faint horizontal lines with their values, a baseline with ticks, and the names of both axes."""
    for value, label in zip(ys, tick_labels(ys), strict=True):
        y = f.y(value)
        kind = "zero" if value == 0 else "grid"
        yield f'<line class="{kind}" x1="{f.left:.1f}" x2="{f.right:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield _words("tick", f.left - 8, y + 4, label, "end")
    for value, label in zip(xs, tick_labels(xs), strict=True):
        x = f.x(value)
        yield f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{f.bottom:.1f}" y2="{f.bottom + 5:.1f}"/>'
        yield _words("tick", x, f.bottom + 19, label, "middle")
    if y_label:
        yield _words("axis", 0, 13, y_label)
    if x_label:
        yield _words("axis", (f.left + f.right) / 2, height - 6, x_label, "middle")


def _mark(mark: Mark, f: _Frame) -> Iterable[str]:
    """A dashed vertical line with its words above the plot, where no line can cross them."""
    if not f.x0 <= mark.x <= f.x1:
        return
    x = f.x(mark.x)
    if mark.shade_after:
        yield (
            f'<rect class="shade" x="{x:.1f}" y="{f.top:.1f}" width="{max(f.right - x, 0):.1f}" '
            f'height="{f.bottom - f.top:.1f}"/>'
        )
        if f.right - x > 7.2 * (len(mark.shade_after) + len(mark.label)):
            yield _words("note", f.right, f.top - 7, mark.shade_after, "end")
    yield f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{f.top:.1f}" y2="{f.bottom:.1f}"/>'
    half = 3.6 * len(mark.label)
    anchor = "start" if x - f.left < half else "end" if f.right - x < half else "middle"
    yield _words("note", x, f.top - 7, mark.label, anchor)


def _line(s: Series, f: _Frame) -> Iterable[str]:
    """The band, the line (broken where a value is missing) and, on short series, its points."""
    if s.low is not None and s.high is not None:
        rows = [
            (x, lo, hi)
            for x, lo, hi in zip(s.x, s.low, s.high, strict=True)
            if lo is not None and hi is not None and known(lo) and known(hi)
        ]
        edge = [f"{f.x(x):.1f},{f.y(hi):.1f}" for x, _, hi in rows]
        edge += [f"{f.x(x):.1f},{f.y(lo):.1f}" for x, lo, _ in reversed(rows)]
        if len(rows) > 1:
            yield f'<polygon class="band tone-{s.tone}" points="{" ".join(edge)}"/>'
    path, pen_down = [], False
    for x, y in zip(s.x, s.y, strict=True):
        if y is None or not known(y):
            pen_down = False
            continue
        path.append(f"{'L' if pen_down else 'M'}{f.x(x):.1f} {f.y(y):.1f}")
        pen_down = True
    look = (" dashed" if s.dashed else "") + (" dense" if len(s.x) > 100 else "")
    yield f'<path class="line tone-{s.tone}{look}" d="{"".join(path)}"/>'
    if len(s.x) <= 24:
        for x, y in zip(s.x, s.y, strict=True):
            if y is not None and known(y):
                yield f'<circle class="point tone-{s.tone}" cx="{f.x(x):.1f}" cy="{f.y(y):.1f}" r="3.5"/>'


def _labels(lines: Sequence[Series], f: _Frame) -> Iterable[str]:
    """The names of the lines at their right ends, pushed apart where they would touch."""
    found = []
    for s in lines:
        drawn = [(x, y) for x, y in zip(s.x, s.y, strict=True) if y is not None and known(y)]
        if drawn:
            found.append([f.y(drawn[-1][1]), s])
    found.sort(key=lambda row: row[0])
    for above, below in pairwise(found):
        below[0] = max(below[0], above[0] + 17)
    if found and found[-1][0] > f.bottom:  # no room below: push back up
        found[-1][0] = f.bottom
        for below, above in pairwise(reversed(found)):
            above[0] = min(above[0], below[0] - 17)
    for y, s in found:
        yield _words(f"name tone-{s.tone}", f.right + 10, y + 4, s.label)


def numbers(
    series: Sequence[Series], x_label: str, most: int = 40
) -> tuple[list[str], list[list[float | None]]]:
    """The chart as a table: a column of x and one per line, at most ``most`` rows (evenly spaced)."""
    xs = sorted({x for s in series for x in s.x})
    if len(xs) > most:
        xs = [xs[round(i * (len(xs) - 1) / (most - 1))] for i in range(most)]
    at = [dict(zip(s.x, s.y, strict=True)) for s in series]
    return [x_label or "x", *(s.label for s in series)], [[x, *(values.get(x) for values in at)] for x in xs]


__all__ = [
    "Mark",
    "Series",
    "Tone",
    "known",
    "line_chart",
    "numbers",
    "short",
    "thinned",
    "tick_labels",
    "ticks",
]
