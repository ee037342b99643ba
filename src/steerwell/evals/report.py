"""One self-contained HTML page: numbers with their intervals, charts, and the texts behind them.

The page needs nothing but a browser: style and pictures are inside it, a content policy forbids every
request and every script, and all text is escaped. It follows the reader's light or dark setting, prints, and
reads on a telephone.

    report = Report("Did the tuning help?", lead="…")
    report.section("In short").cards([Card("Win rate", win_rate, mark=0.5)])
    report.section("Before and after").changes("…", [Change("gold", before, after, better="higher")])
    report.write("report/index.html")
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

from steerwell.data.errors import InputError
from steerwell.evals.charts import Mark, Series, line_chart, numbers, short
from steerwell.evals.display import (
    Card,
    Change,
    Sample,
    Side,
    Unit,
    card_data,
    cell_data,
    change_data,
    clock,
    fold,
    interval,
    say,
    scale_of,
    signed,
)
from steerwell.evals.stats import Estimate


@dataclass
class Report:
    """A builder: each call adds to the page and returns the report. :meth:`write` makes the file."""

    title: str
    lead: str = ""
    kicker: str = "Alignment report"
    theme: Literal["auto", "light", "dark"] = "auto"
    sections: list[dict[str, Any]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    def section(self, title: str, text: str = "") -> Report:
        """Begin a section; what follows belongs to it."""
        slug = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = {s["id"] for s in self.sections}
        unique = next(s for s in (slug, *(f"{slug}-{i}" for i in range(2, 999))) if s not in taken)
        self.sections.append({"id": unique, "title": title, "blocks": []})
        return self.text(text) if text else self

    def _add(self, kind: str, **block: Any) -> Report:
        if not self.sections:
            self.sections.append({"id": "start", "title": "", "blocks": []})
        self.sections[-1]["blocks"].append({"kind": kind, **block})
        return self

    def text(self, text: str) -> Report:
        """Paragraphs of plain text, parted by blank lines."""
        return self._add("text", paragraphs=[p.strip() for p in re.split(r"\n\s*\n", text) if p.strip()])

    def cards(self, cards: Sequence[Card]) -> Report:
        """Headline numbers, each with its interval."""
        return self._add("cards", cards=[card_data(card) for card in cards])

    def changes(
        self,
        caption: str,
        rows: Sequence[Change],
        *,
        names: tuple[str, str] = ("before", "after"),
        note: str = "",
    ) -> Report:
        """Metrics before and after in one picture: shares on a common scale, other numbers on their own."""
        shares = [change_data(row, (0.0, 1.0)) for row in rows if row.unit == "share"]
        others = [change_data(row, scale_of([row.before, row.after])) for row in rows if row.unit != "share"]
        return self._add("changes", caption=caption, names=names, shares=shares, others=others, note=note)

    def table(
        self,
        caption: str,
        columns: Sequence[str],
        rows: Sequence[Sequence[Any]],
        *,
        units: Mapping[str, Unit] | None = None,
        note: str = "",
    ) -> Report:
        """A table. A cell is text, a number, None (shown as a dash) or an :class:`Estimate` (with its bar).

        ``units`` says by column whether numbers are shares (shown in percent) or numbers (the default).
        """
        for i, row in enumerate(rows):
            if len(row) != len(columns):
                raise InputError(
                    f"row {i} of the table {caption!r} has {len(row)} cells for {len(columns)} columns",
                    mend="Give one cell per column.",
                )
        unit: list[Unit] = [(units or {}).get(column, "number") for column in columns]
        scales = [
            (0.0, 1.0) if u == "share" else scale_of([r[j] for r in rows if isinstance(r[j], Estimate)])
            for j, u in enumerate(unit)
        ]
        cells = [[cell_data(v, unit[j], scales[j]) for j, v in enumerate(row)] for row in rows]
        right = [any(isinstance(r[j], int | float | Estimate) for r in rows) for j in range(len(columns))]
        return self._add("table", caption=caption, columns=list(columns), rows=cells, right=right, note=note)

    def curves(
        self,
        caption: str,
        series: Sequence[Series],
        *,
        alt: str,
        x_label: str = "",
        y_label: str = "",
        marks: Sequence[Mark] = (),
        note: str = "",
    ) -> Report:
        """A line chart with its numbers in a folded table. ``alt`` says in words what it shows."""
        from markupsafe import Markup

        shared: dict[str, Any] = {"alt": alt, "x_label": x_label, "y_label": y_label, "marks": marks}
        wide = line_chart(series, **shared, width=920, height=360, name="wide")
        narrow = line_chart(series, **shared, width=360, height=270, direct=False, name="narrow")
        columns, rows = numbers(series, x_label)
        return self._add(
            "curves",
            caption=caption,
            wide=Markup(wide),
            narrow=Markup(narrow),
            legend=[(s.label, s.tone, s.dashed) for s in series],
            columns=columns,
            rows=[["–" if v is None else short(v) for v in row] for row in rows],
            note=note,
        )

    def overoptimization(
        self,
        caption: str,
        kl: Sequence[float],
        proxy: Sequence[float],
        gold: Sequence[float],
        *,
        gold_low: Sequence[float | None] | None = None,
        gold_high: Sequence[float | None] | None = None,
        note: str = "",
    ) -> Report:
        """The reward that was optimised and the one that was meant, as changes since the start, over the KL.

        ``kl`` in nats from the start policy; rows in the order of training. The peak of gold is marked, and
        what lies beyond it is shaded when gold ends below its peak.
        """
        order = sorted(range(len(kl)), key=lambda i: kl[i])
        x = [kl[i] for i in order]
        p0, g0 = proxy[0], gold[0]

        def since(values: Sequence[float | None], start: float) -> list[float | None]:
            return [None if (v := values[i]) is None else v - start for i in order]

        rise, truth = since(proxy, p0), since(gold, g0)
        heights = [float("-inf") if v is None else v for v in truth]
        peak = heights.index(max(heights))
        fell = peak < len(x) - 1
        series = [
            Series("proxy reward", x, rise, tone="proxy", dashed=True),
            Series(
                "gold reward",
                x,
                truth,
                since(gold_low, g0) if gold_low is not None else None,
                since(gold_high, g0) if gold_high is not None else None,
                tone="gold",
            ),
        ]
        end_proxy, at_peak, end_gold = rise[-1] or 0.0, truth[peak] or 0.0, truth[-1] or 0.0
        alt = (
            f"The proxy reward ends {signed(end_proxy)} from its start. The gold reward is highest, at "
            f"{signed(at_peak)}, at a KL of {short(round(x[peak], 2))}, and ends at {signed(end_gold)}."
        )
        marks = [Mark(x[peak], "gold peaks", "over-optimised" if fell else "")]
        return self.curves(
            caption,
            series,
            alt=alt,
            x_label="KL from the start policy (nats)",
            y_label="change since the start",
            marks=marks,
            note=note or alt,
        )

    def side_by_side(
        self, caption: str, samples: Sequence[Sample], *, names: tuple[str, str] = ("before", "after")
    ) -> Report:
        """Prompts with the completion of both policies next to each other and the verdicts on them."""
        rows = [
            {
                "prompt": s.prompt,
                "tag": s.tag,
                "note": s.note,
                "sides": [
                    {"name": name, "side": kind, "text": fold(side.text), "verdicts": list(side.verdicts)}
                    for name, kind, side in zip(names, ("before", "after"), (s.before, s.after), strict=True)
                ],
            }
            for s in samples
        ]
        return self._add("samples", caption=caption, rows=rows)

    def timings(self, caption: str, seconds: Mapping[str, float]) -> Report:
        """Where the time went: one bar per stage."""
        longest, total = max(seconds.values(), default=0.0) or 1.0, sum(seconds.values())
        rows = [(stage, clock(s), 100 * s / longest) for stage, s in seconds.items()]
        return self._add("timings", caption=caption, rows=rows, total=clock(total))

    def notes(self, items: Sequence[str] | Mapping[str, str]) -> Report:
        """Method and caveats: a list, or terms with their meaning."""
        pairs = list(items.items()) if isinstance(items, Mapping) else [("", item) for item in items]
        return self._add("notes", items=pairs)

    def figure(self, svg: str, caption: str, alt: str) -> Report:
        """A picture of your own as SVG text. It is inlined as an image, so nothing in it can run."""
        from base64 import b64encode

        return self._add("figure", data=b64encode(svg.encode()).decode(), caption=caption, alt=alt)

    def provenance(self, facts: Mapping[str, Any]) -> Report:
        """What the page was made from: versions, digests, seeds. Shown in the footer."""
        self.facts.update({key: str(value) for key, value in facts.items()})
        return self

    def html(self) -> str:
        """The whole page."""
        return _environment().get_template("report.html").render(report=self)

    def write(self, path: str | Path) -> Path:
        """Write the page, to a temporary name first; returns its path. A directory gets ``index.html``."""
        target = Path(path)
        if target.suffix.lower() not in (".html", ".htm"):
            target = target / "index.html"
        target.parent.mkdir(parents=True, exist_ok=True)
        page = self.html()
        with tempfile.NamedTemporaryFile(
            "w", dir=target.parent, prefix=".report-", delete=False, encoding="utf-8"
        ) as file:
            file.write(page)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
        return target


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("steerwell.evals", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


__all__ = ["Card", "Change", "Mark", "Report", "Sample", "Series", "Side", "interval", "say", "signed"]
