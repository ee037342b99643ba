"""The page on evaluating reward models: its Python runs, and every figure that it names can be explained."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

from steerwell.cli.eval_verbs import catalogue
from steerwell.evals.tasks import BENCHMARKS

PAGE = (Path(__file__).parents[1] / "docs" / "evaluating_reward_models.md").read_text("utf-8")


def test_its_python_says_what_the_page_says() -> None:
    (code,) = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(code, "evaluating_reward_models.md", "exec"), {})
    assert said.getvalue() == "fitted 1.82 [0.75]\nseparable\n"


def test_every_figure_that_it_names_can_be_explained() -> None:
    known = catalogue()
    rows = [line for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name for line in rows for name in re.findall(r"`([a-z_0-9]+)`", line.split("|")[1])}
    assert set(BENCHMARKS) < named
    assert {"rm_accuracy", "rm_ceiling", "rm_ece", "probe", "bon_gold"} < named
    assert {name for name in named if name not in known} == set()
