"""The report in a real browser: it fits, it can be read, it runs nothing. Skipped without a Chromium."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from sample_report import sample_report

from browser import CHROMIUM, dump, look

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")


@pytest.mark.parametrize(
    ("width", "theme"),
    [(1200, "light"), (1200, "dark"), (400, "light"), (320, "dark"), (740, "light"), (900, "light")],
)
def test_it_fits_and_can_be_read(width: int, theme: Any, tmp_path: Path) -> None:
    saw = look(sample_report(theme).html(), width, tmp_path)
    assert saw["width"] == width
    assert saw["needed"] <= width
    assert saw["outside"] == []
    assert saw["clipped"] == []
    assert saw["faint"] == []
    assert saw["small"] == []
    assert saw["charts"] == ["wide" if width > 736 else "narrow"] * 2
    assert saw["title"] == "What tuning changed, and what it cost"


def test_the_probe_can_fail(tmp_path: Path) -> None:
    page = sample_report("light").html()
    wide = page.replace("<main>", '<main><p style="width:900px;color:#ddd">too wide and too faint</p>')
    saw = look(wide, 400, tmp_path)
    assert saw["needed"] > 400
    assert len(saw["outside"]) == 1
    assert len(saw["faint"]) == 1


def test_the_content_policy_stops_a_script_even_if_one_got_in(tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    attack = "<script>document.title='broken into'</script>"
    page = sample_report().html().replace("<main>", "<main>" + attack)
    file.write_text(page, encoding="utf-8")
    assert "<title>broken into</title>" not in dump(file, tmp_path)
    file.write_text(re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page), encoding="utf-8")
    assert "<title>broken into</title>" in dump(file, tmp_path)
