"""``steerwell demo``: the whole way on the embedded world."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from steerwell.cli import show
from steerwell.cli.app import app, threads

FIGURES = {
    "gold": "gold (true worth)",
    "harmful_compliance": "harmful compliance",
    "over_refusal": "over-refusal",
    "fact_accuracy": "facts right",
    "flattery": "flattery",
    "words": "words",
}


@app.command(
    epilog="Example: steerwell demo --out runs/demo --seed 0",
)
def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Where the run and its report go.")
    ] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    from_scratch: Annotated[bool, typer.Option("--from-scratch", help="Train the base model too.")] = False,
    as_json: show.AsJson = False,
) -> None:
    """From a base model to an aligned one on a small world whose truth is known, with a report.

    Takes a few minutes on two cores. The same command continues an interrupted demo.
    """
    threads()
    from steerwell.pipelines.demo import run_demo

    with show.stages() as progress:
        found = run_demo(out, seed, from_scratch, progress)
    show.result(found, as_json, lambda: table(found, out))


def table(found: Mapping[str, Any], out: Path) -> str:
    """The result for people: before and after with intervals, the win rate, over-optimisation."""
    lines = [f"{'':22}{'before (SFT)':>24}{'after':>24}"]
    for key, label in FIGURES.items():
        lines.append(f"{label:22}{estimate(found['before'][key]):>24}{estimate(found['after'][key]):>24}")
    lines.append(f"{'win rate against SFT':22}{'':24}{estimate(found['win_rate']):>24}")
    hack = found["overoptimization"]
    lines += [
        "",
        f"GRPO against the reward model: proxy {hack['proxy_start']:.2f} → {hack['proxy_end']:.2f}, "
        f"gold {hack['gold_start']:.2f} → {hack['gold_peak']:.2f} (best, at KL {hack['kl_at_peak']:.1f} nats)"
        f" → {hack['gold_end']:.2f}",
        f"report: {out / 'report' / 'index.html'}",
    ]
    return "\n".join(lines)


def estimate(value: Mapping[str, Any]) -> str:
    """``0.62 (0.58 … 0.66)``; a dash where nothing was measured."""
    if value.get("value") is None:
        return "–"
    text = f"{value['value']:.2f}"
    if value.get("low") is None or value.get("high") is None:
        return text
    return f"{text} ({value['low']:.2f} … {value['high']:.2f})"


__all__ = ["demo", "estimate", "table"]
