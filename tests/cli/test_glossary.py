"""Whatever an objective reports can be explained."""

from __future__ import annotations

import pytest

from steerwell.cli.glossary import METRICS
from steerwell.objectives import TABLE
from steerwell.objectives.table import needs, optional
from steerwell.testing import batch_for


@pytest.mark.parametrize("name", sorted(TABLE))
def test_every_figure_of_every_objective_is_explained(name: str) -> None:
    fn = TABLE[name]
    tensors = tuple(t for t in (*needs(fn), *optional(fn)) if t != "running")
    batch = batch_for(fn, tensors, {})
    _, metrics = fn(**{t: batch[t] for t in tensors})
    assert set(metrics) <= set(METRICS)
