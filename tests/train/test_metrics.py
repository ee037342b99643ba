"""Figures by example, and the file they go to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from steerwell.train.metrics import MetricsFile, Totals, read_metrics


def test_means_weigh_examples_not_batches() -> None:
    whole, cut = Totals(), Totals()
    values = torch.tensor([1.0, 2.0, 3.0, 10.0])
    whole.add("x", values)
    for part in (values[:3], values[3:], values[:0]):
        cut.add("x", part)
    assert whole.means() == cut.means() == {"x": 4.0}
    assert Totals().means() == {}


def test_a_figure_without_examples_is_left_out() -> None:
    totals = Totals()
    totals.add("empty", torch.zeros(0))
    totals.add("one", torch.tensor(2.0))
    assert totals.means() == {"one": 2.0}


def test_sums_are_kept_in_double_precision() -> None:
    totals = Totals()
    for _ in range(1000):
        totals.add("x", torch.tensor([0.1, 1e6]))
    assert abs(totals.means()["x"] - 500000.05) < 1e-6


def test_the_file_is_cut_back_when_a_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(1, {"loss": 0.5})
    length = file.sync()
    file.write(2, {"loss": math.nan})
    file.close()
    assert read_metrics(path) == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    file = MetricsFile(path, length)
    file.write(2, {"loss": 0.25})
    file.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.25},
    ]
