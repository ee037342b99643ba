"""docs/judges_as_rewards.md: its Python runs as it stands, and its figures are computed again."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from noisy_judge import Noisy, group, same_order, scores

from chat_server import ChatServer, Request
from steerwell.judges import scored
from tiny import tiny_policy_dir

PAGE = (Path(__file__).parents[2] / "docs" / "judges_as_rewards.md").read_text("utf-8")


def test_its_python_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def reply(request: Request) -> str:
        good = {"The Pacific.": 2, "No.": 0}
        first, second = (good.get(request.part(f"{side} completion"), 1) for side in ("first", "second"))
        return request.verdict(overall="first" if first > second else "second")

    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    tiny_policy_dir(tmp_path / "models")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    names: dict[str, Any] = {}
    with ChatServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        for block in blocks:
            exec(compile(block, "judges_as_rewards.md", "exec"), names)
    lines = capsys.readouterr().out.splitlines()
    shown = re.findall(r"# ([\d.]+) 4 of 4 comparisons won", PAGE)
    assert lines[0].endswith(" 4 of 4 comparisons won")
    assert [f"{float(lines[0].split()[0]):.2f}"] == shown
    assert lines[3] == re.findall(r"# (\d+) comparisons for a group of eight", PAGE)[0]
    assert all("of the two answers, which have" in line for line in lines[-3:])


def test_the_table_of_budgets() -> None:
    rows = re.findall(r"^\| (\w+) \| (\d+) \| (\d+) \| (0\.\d\d) \|$", PAGE, re.MULTILINE)
    assert len(rows) == 4
    for opponents, requests, each, correlation in rows:
        found = []
        for i in range(100):
            rng = random.Random(i)
            data = group(*(f"{rng.gauss(0, 1.5):.5f}" for _ in range(16)), prompt=str(i))
            judge = Noisy()
            by = scored(judge, opponents=None if opponents == "all" else int(opponents))
            found.append(same_order(scores(by([data]), data), [float(c.text) for c in data.completions]))
            assert judge.calls.total() == by.calls(16) == int(requests) == 16 * int(each)
        assert float(np.mean(found)) == pytest.approx(float(correlation), abs=0.005)


def test_the_lead_of_the_side_shown_first() -> None:
    """With 65 % of the verdicts for the first side the mean lead is (0.65 - 0.35) log 3."""
    equal = [group("0", "0.0", prompt=f"p{i}") for i in range(1000)]

    def lead(both_orders: bool) -> float:
        values = [a.value for a in scored(Noisy(first=0.3), both_orders=both_orders)(equal)]
        return float(np.mean(values[::2]) - np.mean(values[1::2]))

    assert f"0.3 log 3 = {0.3 * math.log(3):.2f}" in PAGE
    assert lead(False) == pytest.approx(0.3 * math.log(3), abs=4 * 1.1 / math.sqrt(1000))
    assert lead(True) == pytest.approx(0.0, abs=4 * 1.1 / math.sqrt(1000))
