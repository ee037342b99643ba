"""Pages in a real browser: open one in a frame of some width, and bring back what can be seen of it."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = next(
    (p for n in ("chromium", "chromium-browser", "google-chrome") if (p := shutil.which(n))), None
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--hide-scrollbars",
    "--virtual-time-budget=4000",
)

# Runs inside the framed page (its content policy is taken out for that) and writes what it saw.
PROBE = """
<script>
addEventListener('load', () => {
  const channel = v => { v /= 255; return v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4 };
  const numbers = c => (c.match(/[\\d.]+/g) || []).map(Number);
  const light = c => c.slice(0, 3).map(channel).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const behind = e => { for (; e; e = e.parentElement) {
    const c = numbers(getComputedStyle(e).backgroundColor); if (c.length === 3 || c[3] === 1) return c; }
    return [255, 255, 255] };
  const contrast = (a, b) => {
    const [x, y] = [light(a), light(b)];
    return (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
  };
  const shown = e => e.getClientRects().length > 0;
  const saw = { width: innerWidth, needed: document.documentElement.scrollWidth, title: document.title,
                outside: [], faint: [], small: [], clipped: [], charts: [] };
  const name = e => e.outerHTML.slice(0, 90);
  for (const e of document.querySelectorAll('body *')) {
    if (!shown(e) || e.closest('.hidden, thead')) continue;
    const box = e.getBoundingClientRect();
    if (!e.closest('svg, SCROLLS *') && (box.right > innerWidth + 1 || box.left < -1)) saw.outside.push(name(e));
    const words = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!words) continue;
    const style = getComputedStyle(e), inside = e.closest('svg');
    const ink = numbers(inside ? style.fill : style.color);
    const ratio = contrast(ink, behind(inside || e));
    if (ratio < 4.5) saw.faint.push([name(e), ratio]);
    if (e.scrollWidth > e.clientWidth + 2 && style.overflow === 'hidden') saw.clipped.push(name(e));
    if (box.height < 9) saw.small.push([name(e), box.height]);
  }
  for (const chart of document.querySelectorAll('svg.chart')) if (shown(chart)) {
    const frame = chart.getBoundingClientRect();
    saw.charts.push(chart.classList.contains('wide') ? 'wide' : 'narrow');
    const boxes = [...chart.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
    boxes.forEach(([words, b], i) => {
      if (b.left < frame.left - 2 || b.right > frame.right + 2 || b.bottom > frame.bottom + 2)
        saw.outside.push('chart text ' + words);
      for (const [other, c] of boxes.slice(i + 1))
        if (b.left < c.right - 1 && c.left < b.right - 1 && b.top < c.bottom - 2 && c.top < b.bottom - 2)
          saw.clipped.push(words + ' overlaps ' + other);
    });
  }
  const out = document.createElement('pre'); out.id = 'saw'; out.textContent = JSON.stringify(saw);
  (parent.document.body || document.body).append(out);
});
</script>
"""


def look(page: str, width: int, folder: Path, scrolls: str = "no-such") -> dict[str, Any]:
    """Open the page in a frame of this width and bring back what the probe saw. What lies in a box that matches
    ``scrolls`` may reach beyond the frame; the box itself may not.
    """
    assert CHROMIUM
    bare = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    framed = html.escape(bare.replace("</head>", PROBE.replace("SCROLLS", scrolls) + "</head>"))
    file = folder / "frame.html"
    file.write_text(
        "<!doctype html><meta charset=utf-8><body style='margin:0'>"
        f"<iframe style='border:0;width:{width}px;height:3000px' srcdoc=\"{framed}\"></iframe>",
        encoding="utf-8",
    )
    dom = dump(file, folder)
    found = re.search(r'<pre id="saw">(.*?)</pre>', dom, re.DOTALL)
    assert found, dom[-500:]
    return json.loads(html.unescape(found[1]))


def dump(file: Path, folder: Path) -> str:
    """The document as Chromium holds it after everything has run."""
    assert CHROMIUM
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={folder / 'profile'}", "--dump-dom", file.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
