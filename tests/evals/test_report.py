"""The report: one file, nothing executable, nothing fetched, every number in words and every text escaped."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from sample_report import SCRIPT, around, sample_report

from steerwell.data.errors import InputError
from steerwell.evals.charts import Mark, Series, line_chart, numbers, short, thinned, tick_labels, ticks
from steerwell.evals.report import Card, Change, Report, Sample, Side, interval, say, signed
from steerwell.evals.stats import NOTHING, Estimate

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Reader(HTMLParser):
    """Collects tags and words, and holds every element to be closed in order."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def page() -> str:
    return sample_report().html()


def test_the_page_is_well_formed_and_has_no_ids_twice(page: str) -> None:
    reader = Reader(page)
    assert reader.open == []
    ids = [attrs["id"] for _, attrs in reader.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) == 7
    links = {attrs["href"] for tag, attrs in reader.tags if tag == "a"}
    assert links == {f"#{i}" for i in ids}


def test_the_page_is_one_file_that_asks_for_nothing_and_runs_nothing(page: str) -> None:
    reader = Reader(page)
    assert not {tag for tag, _ in reader.tags} & {"script", "link", "iframe", "object", "base", "form"}
    for tag, attrs in reader.tags:
        assert not [name for name in attrs if name.startswith("on")], tag
        for name in ("src", "srcset", "action", "data", "poster"):
            assert (attrs.get(name) or "data:").startswith("data:"), tag
    assert not re.search(r"url\(|@import|https?://", page)
    policy = next(a["content"] for t, a in reader.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_text_is_shown_as_text(page: str) -> None:
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    assert SCRIPT in Reader(page).text  # after parsing it is back, as words


@pytest.mark.parametrize("place", ["title", "lead", "kicker", "theme-free"])
def test_nothing_anybody_writes_becomes_markup(place: str) -> None:
    evil = '"><script>x</script>'
    fields = {place: evil} if place != "theme-free" else {}
    report = Report(**{"title": "t", **fields})
    report.section(evil, evil).cards(
        [Card(evil, evil, evil), Card(evil, around(0.5, 0.1), mark=0.5, mark_label=evil)]
    )
    report.changes(evil, [Change(evil, NOTHING, NOTHING, hint=evil)], names=(evil, evil), note=evil)
    report.table(evil, [evil], [[evil]], note=evil).timings(evil, {evil: 1.0}).notes({evil: evil})
    report.curves(
        evil,
        [Series(evil, [0, 1], [0, 1])],
        alt=evil,
        x_label=evil,
        y_label=evil,
        marks=[Mark(0.5, evil, evil)],
    )
    report.side_by_side(evil, [Sample(evil, Side(evil, [(evil, "bad")]), Side(evil * 60), evil, evil)])
    report.figure("<svg/>", evil, evil).provenance({evil: evil})
    page = report.html()
    assert "<script" not in page
    assert Reader(page).open == []
    names = {name for _, attrs in Reader(page).tags for name in attrs}
    assert all(re.fullmatch(r"[a-zA-Z][a-zA-Z0-9-]*", name) for name in names)  # no attribute was ended early


def test_estimates_stand_with_their_intervals(page: str) -> None:
    text = Reader(page).text
    assert "Win rate against the start 68.4% 95% interval 65.3 to 71.5%" in text
    assert "41.5% → 5.5%" in text
    assert "−36.0 points ✓ better −42.6 to −29.4" in text
    assert "+1.5 points no clear change −1.2 to 4.2" in text
    assert "3 min 39 s" in text


def test_before_and_after_are_read_aloud(page: str) -> None:
    labels = [attrs.get("aria-label") or "" for _, attrs in Reader(page).tags]
    assert "after imitation 41.5% (34.9 to 48.4%), after preference tuning 5.5% (3.1 to 9.6%)" in labels
    charts = [attrs for tag, attrs in Reader(page).tags if tag == "svg"]
    assert len(charts) == 4
    assert all(attrs["role"] == "img" and attrs["aria-label"] for attrs in charts)
    tables = [tag for tag, _ in Reader(page).tags if tag in ("table", "caption")]
    assert tables.count("table") == tables.count("caption") == 4


def test_over_optimisation_marks_the_peak_only_when_gold_turns() -> None:
    kl = [0.0, 1.0, 2.0, 3.0]
    turned = Report("t").overoptimization("c", kl, [1.0, 1.5, 1.9, 2.2], [0.4, 0.6, 0.7, 0.3]).html()
    text = Reader(turned).text
    assert "The proxy reward ends +1.20 from its start" in text
    assert "highest, at +0.30, at a KL of 2, and ends at −0.10" in text
    assert 'class="shade"' in turned
    rising = Report("t").overoptimization("c", kl, [1.0, 1.5, 1.9, 2.2], [0.1, 0.2, 0.3, 0.4]).html()
    assert 'class="shade"' not in rising
    # rows out of order by KL are drawn in order, and both curves start at zero
    shuffled = Report("t").overoptimization(
        "c", [0.0, 2.0, 1.0, 3.0], [1, 1.9, 1.5, 2.2], [0.4, 0.7, 0.6, 0.3]
    )
    assert shuffled.html() == turned


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (Change("m", around(0.2, 0.05), around(0.5, 0.05), "higher"), "+30.0 points ✓ better"),
        (Change("m", around(0.2, 0.05), around(0.5, 0.05), "lower"), "+30.0 points ✗ worse"),
        (Change("m", around(0.2, 0.05), around(0.5, 0.05)), "+30.0 points higher"),
        (Change("m", around(0.2, 0.3), around(0.5, 0.3), "higher"), "+30.0 points no clear change"),
        (Change("m", around(0.2, 0.3), around(0.5, 0.3), "higher", difference=around(0.3, 0.1)), "✓ better"),
        (Change("m", around(2.0, 0.1), around(1.5, 0.1), "lower", "number"), "−0.50 ✓ better"),
        (Change("m", NOTHING, around(0.5, 0.1), "lower"), "– → 50.0% –"),
    ],
)
def test_better_and_worse_are_said_only_where_the_interval_says_so(row: Change, words: str) -> None:
    assert words in Reader(Report("t").changes("c", [row]).html()).text


def test_bars_stand_where_the_numbers_are() -> None:
    page = (
        Report("t")
        .changes("c", [Change("m", Estimate(0.25, 0.2, 0.3, 9), Estimate(0.5, 0.4, 0.75, 9))])
        .html()
    )
    assert 'class="range tone-before" style="left:20.0%;width:10.0%"' in page
    assert 'class="dot tone-before" style="left:25.0%"' in page
    assert 'class="range tone-after" style="left:40.0%;width:35.0%"' in page
    assert 'class="dot tone-after" style="left:50.0%"' in page


def test_numbers_in_words() -> None:
    assert say(0.6843, "share") == "68.4%"
    assert say(-0.0001) == "0.00"
    assert say(-1.5) == "−1.50"
    assert say(None) == "–"
    assert say(1280) == "1,280"
    assert say(3) == "3"
    assert signed(0.151, "points") == "+15.1"
    assert signed(-2.0) == "−2.00"
    assert signed(0.0) == "0.00"
    assert interval(Estimate(0.5, 0.4, 0.6, 3), "share") == "40.0 to 60.0%"
    assert interval(NOTHING, "share") == "no data"
    assert interval(Estimate(0.5, None, None, 1), "share") == "no interval"


def test_ticks_are_round_and_cover_the_data() -> None:
    assert ticks(0, 1, 5) == [0, 0.25, 0.5, 0.75, 1.0]
    assert ticks(-0.3, 1.31, 5) == [-0.5, 0.0, 0.5, 1.0, 1.5]
    assert [short(t) for t in ticks(0, 12000, 4)] == ["0", "5000", "10,000", "15,000"]
    flat = ticks(2, 2)
    assert flat[0] < 2 < flat[-1]
    assert short(-0.5) == "−0.5"


def test_tick_labels_tell_close_values_apart() -> None:
    assert tick_labels([5.0, 5.00005, 5.0001]) == ["5", "5.00005", "5.0001"]
    assert tick_labels([1e-6, 1.5e-6, 2e-6]) == ["1e−06", "1.5e−06", "2e−06"]
    assert tick_labels([0.0, 5000.0, 10000.0]) == ["0", "5000", "10,000"]
    assert tick_labels([100000.0, 125000.0]) == ["100,000", "125,000"]
    assert tick_labels([-0.5, 0.0]) == ["−0.5", "0"]


def test_a_chart_has_at_least_three_lines_to_read_values_from() -> None:
    for ys in ([0.22, 0.71], [0, 0], [0.95, 0.99], [-3, 4], [100000, 200000]):
        svg = line_chart([Series("a", [0, 1], ys)], alt="x")
        labels = re.findall(r'class="tick"[^>]*text-anchor="end">([^<]*)', svg)
        assert len(labels) >= 3
        assert len(set(labels)) == len(labels)


def test_a_missing_value_is_a_gap_and_never_a_zero() -> None:
    svg = line_chart([Series("a", [0, 1, 2, 3], [1.0, None, float("nan"), 2.0])], alt="a gap")
    path = re.search(r' d="([^"]+)"', svg)
    assert path
    assert path[1].count("M") == 2
    assert "L" not in path[1]
    with pytest.raises(InputError, match="no numbers to draw"):
        line_chart([Series("a", [0, 1], [None, None])], alt="nothing")
    with pytest.raises(InputError, match="unequal length"):
        Series("a", [0, 1], [1.0])


def test_long_series_are_thinned_by_means_and_short_tables_keep_the_ends() -> None:
    long = Series("a", list(range(1200)), [1.0, 3.0] * 600)
    thin = thinned(long)
    assert len(thin.x) <= 400
    assert all(abs((y or 0) - 2) < 0.4 for y in thin.y)
    assert thinned(Series("a", [0, 1], [0, 1])).y == [0, 1]
    columns, rows = numbers([long], "step")
    assert columns == ["step", "a"]
    assert len(rows) == 40
    assert (rows[0][0], rows[-1][0]) == (0, 1199)


def test_writing_is_atomic_and_a_directory_gets_an_index(tmp_path: Path) -> None:
    report = sample_report()
    target = report.write(tmp_path / "runs" / "report")
    assert target == tmp_path / "runs" / "report" / "index.html"
    assert target.read_text(encoding="utf-8") == report.html()
    assert [p.name for p in target.parent.iterdir()] == ["index.html"]
    broken = Report("t")
    broken.sections.append({"id": "x", "title": "x", "blocks": [{"kind": "cards"}]})
    with pytest.raises(Exception, match="cards"):
        broken.write(target)
    assert target.read_text(encoding="utf-8") == report.html()
    assert [p.name for p in target.parent.iterdir()] == ["index.html"]


def test_a_ragged_table_is_an_error() -> None:
    with pytest.raises(InputError, match="row 1 of the table 'c' has 1 cells for 2 columns"):
        Report("t").table("c", ["a", "b"], [[1, 2], [3]])


def test_theme_and_order_of_calls() -> None:
    assert 'data-theme="dark"' in sample_report("dark").html()
    assert '<html lang="en">' in sample_report().html()
    twice = Report("t").section("Same name").section("Same name").section("!?").text("a\n\nb").html()
    assert 'id="same-name"' in twice
    assert 'id="same-name-2"' in twice
    assert 'id="section"' in twice
    assert twice.count('class="prose"') == 2
