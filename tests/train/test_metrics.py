"""Figures by example, and the file they go to."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from steerwell.train import timing
from steerwell.train.metrics import MetricsFile, Totals, finite, read_metrics
from steerwell.train.timing import Timing


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


def test_sinks_get_the_figures_that_are_numbers(tmp_path: Path) -> None:
    told: list[tuple[int, dict[str, float]]] = []

    class Sink:
        def write(self, step: int, figures: dict[str, float]) -> None:
            told.append((step, figures))

        def close(self, *, done: bool) -> None: ...

    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.sinks = [Sink()]  # type: ignore[list-item]
    file.write(3, {"loss": 0.5, "grad_norm": math.inf, "tokens": 7})
    file.close()
    assert told == [(3, {"loss": 0.5, "tokens": 7})]
    assert finite(read_metrics(tmp_path / "metrics.jsonl")[0]) == {"loss": 0.5, "tokens": 7}


def test_timing_is_kept_over_sittings_without_lost_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    path = tmp_path / "timing.jsonl"
    first = Timing(path, 0)
    assert first.recent() == 0.0
    for step in (1, 2, 3):
        first.begin()
        now += 2.0
        first.end(step, 100)
    assert first.recent() == 50.0
    first.close()
    with open(path, "a") as file:
        file.write('{"step": 4, "sec')  # a kill in the middle of a line
    second = Timing(path, 2)  # step 3 was lost with the kill
    second.begin()
    now += 4.0
    second.end(3, 100)
    second.close()
    assert [(line["step"], line["seconds"]) for line in read_metrics(path)] == [(1, 2.0), (2, 2.0), (3, 4.0)]
    assert second.recent() == 25.0
    assert second.about() == {"step_seconds": 8.0, "tokens_per_second": 37.5}
