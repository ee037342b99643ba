"""The page of a comparison in a real browser, with more contenders than colours. Skipped without a Chromium."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from browser import CHROMIUM, look
from steerwell.evals.stats import Estimate
from steerwell.pipelines.compare_report import write_page

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
NAMES = ("dpo", "ipo", "simpo", "kto", "orpo:learning_rate=3e-05", "mpo", "dpo:beta=0.5", "apo_down")


def around(value: float, half: float) -> dict[str, Any]:
    return Estimate(value, value - half, value + half, 261).to_dict()


def result(names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    """A comparison with invented figures; all lines end low, where their names have no room below them."""
    return {
        "model": "runs/sft",
        "data": "prefs.db",
        "out": "runs/compare",
        "seed": 0,
        "held_out": {"prompts": 195, "pairs": 261},
        "samples": {"prompts": 195, "max_new_tokens": 256, "gold": True},
        "contenders": [
            {
                "name": name,
                "settings": {"dpo": {"weight": 0.8, "beta": 0.1}, "sft": {"weight": 1.0}},
                "learning_rate": 1e-6,
                "steps": 57,
                "groups": 1804,
                "wall_seconds": 1234.5,
                "accuracy": around(0.7 + 0.01 * i, 0.06),
                "margin": around(12.5 - i, 0.7),
                "chosen_shift": around(0.02 - 0.02 * i, 0.01),
                "kl": around(11.2 + i, 0.9),
                "tokens": around(119.3, 1.5),
                "win_rate": around(0.65, 0.06),
                "curves": [
                    {"step": s, "accuracy": 0.5, "margin": s / 10, "chosen_shift": -s * (1 + i / 100)}
                    for s in range(0, 60, 6)
                ],
            }
            for i, name in enumerate(names)
        ],
        "notes": ["kto has its labels from the pairs: chosen is desirable, rejected is not"],
        "steerwell": "0",
    }


@pytest.mark.parametrize("width", [1200, 740, 400])
def test_it_fits_and_can_be_read(width: int, tmp_path: Path) -> None:
    page = write_page(tmp_path / "compare.html", result()).read_text("utf-8")
    saw = look(page, width, tmp_path, scrolls="details.numbers")  # eight columns scroll on a telephone
    assert saw["width"] == width
    assert saw["needed"] <= width
    assert saw["outside"] == []
    assert saw["clipped"] == []
    assert saw["faint"] == []
    assert saw["charts"] == ["wide" if width > 736 else "narrow"] * 3
    assert saw["title"] == "Objectives compared"
