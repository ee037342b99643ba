"""``steerwell plan``: what a recipe will take, before it is run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from steerwell.cli import show, words
from steerwell.cli.app import DONE, FAILED, app

if TYPE_CHECKING:
    from steerwell.train.plan import Plan

BAR = 32  # signs of the longest bar of the histogram


@app.command(
    epilog="Example: steerwell plan dpo.toml --gpu h100-80gb --count 8 --set train.max_tokens=16384",
)
def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", metavar="NAME", help="A GPU by name, such as h100-80gb or l4-24gb.")
    ] = None,
    count: Annotated[int, typer.Option("--count", min=1, help="How many of them.")] = 1,
    as_json: show.AsJson = False,
) -> int:
    """Say what a recipe will take: parameters, tokens, memory by part, time; and what to change if it won't fit.

    The data are read and the model's configuration; no weight is loaded. Exit status 1: it does not fit.
    """
    from steerwell.train.config import Recipe

    asked = Recipe.from_toml(recipe, overrides or ())
    places = {"model": words.model_path(asked.model)}
    if asked.reference not in ("start", "none"):
        places["reference"] = words.model_path(asked.reference)
    words.prepare_torch()
    from steerwell.train.plan import plan as make

    made = make(asked.model_copy(update=places), gpu=gpu, count=count)
    show.result(made.to_dict(), as_json, lambda: "\n".join(lines(made)))
    return DONE if made.fits else FAILED


def lines(plan: Plan) -> list[str]:
    """The plan for people."""
    return [
        *_model(plan),
        "",
        *_data(plan),
        "",
        *_memory(plan),
        "",
        *_time(plan),
        *(["", *_verdict(plan)]),
        *(["", *(f"note: {note}" for note in plan.notes)] if plan.notes else []),
    ]


def _model(plan: Plan) -> list[str]:
    model = plan.model
    adapter = f", {model['adapter']}" if model["adapter"] else ""
    again = ", gradient checkpointing" if model["gradient_checkpointing"] else ""
    machine = plan.machine
    many = f"{machine.count} × " if machine.count > 1 else ""
    known = "measured just now" if machine.measured else "from its data sheet"
    return [
        f"model    {model['name']} ({model['architecture']}, {model['kind']}): "
        f"{number(model['parameters'])} parameters, {number(model['trainable'])} trained{adapter}",
        f"         {model['dtype']}{again}",
        f"machine  {many}{machine.name}, {size(machine.memory)}{' each' if many else ''}, "
        f"{machine.rate / 1e12:,.3g} TFLOPS ({known})",
    ]


def _data(plan: Plan) -> list[str]:
    data, batches = plan.data, plan.batches
    pairs = f", {data['pairs']:,} pairs" if data.get("pairs") else ""
    most = "at most " if data["upper_bound"] else ""
    found = [
        f"data     {data['groups']:,} groups, {data['completions']:,} completions{pairs}: {most}"
        f"{data['tokens']:,} tokens, {data['scored_tokens']:,} scored",
        f"         as rows {data['tokens_as_rows']:,} tokens, padded without sharing {data['tokens_padded']:,}",
    ]
    if data["eval_groups"]:
        found.append(f"         held out: {data['eval_groups']:,} groups, {data['eval_tokens']:,} tokens")
    tokens = batches["tokens_per_micro_batch"]
    found += [
        f"layout   {batches['layout']}: {batches['why']}",
        f"         {batches['steps']:,} steps of {batches['micro_batches_per_step']:.3g} micro-batches, each "
        f"{tokens['mean']:,.0f} tokens (largest {tokens['largest']:,}, max_tokens {batches['max_tokens']:,})",
        "lengths  prompt and completion, tokens",
    ]
    top = max((count for _, _, count in data["histogram"]), default=1)
    wide = len(f"{data['histogram'][-1][1]:,}") if data["histogram"] else 1
    for low, high, count in data["histogram"]:
        bar = "█" * max(1 if count else 0, round(BAR * count / top))
        found.append(f"         {low:>{wide},}–{high:<{wide},} {bar} {count:,}".rstrip())
    found.append("longest")
    for row in data["longest"]:
        found.append(
            f"         {row['tokens']:,} tokens ({row['prompt_tokens']:,} of them prompt), completion "
            f"{row['completion']} of {row['prompt_id'][:12]} “{row['words']}”"
        )
    return found


def _memory(plan: Plan) -> list[str]:
    low, high = plan.interval
    each = " on each device" if plan.machine.count > 1 else ""
    found = [
        f"memory   {size(plan.peak.total)}{each} at most ({size(low)} to {size(high)}), in {plan.peak.moment}"
    ]
    for part, held in sorted(plan.peak.parts.items(), key=lambda one: -one[1]):
        if held:
            found.append(f"         {part:16} {size(held):>10}")
    return found


def _time(plan: Plan) -> list[str]:
    low, high = plan.seconds_interval
    found = [
        f"time     {span(plan.total_seconds)} ({span(low)} to {span(high)}), {plan.flops:.3g} operations"
    ]
    for part, seconds in sorted(plan.seconds.items(), key=lambda one: -one[1]):
        found.append(f"         {part:24} {span(seconds):>8}")
    return found


def _verdict(plan: Plan) -> list[str]:
    if plan.fits:
        share = plan.peak.total / plan.machine.memory
        return [f"It fits: {share:.0%} of the memory of {plan.machine.name}."]
    found = [
        f"It does not fit: {size(plan.peak.total)} are needed, {plan.machine.name} has {size(plan.machine.memory)}."
    ]
    for mend in plan.mends:
        does = "fits" if mend.fits else "does not fit yet"
        found.append(f"  {mend.setting:40} {size(mend.peak):>9}, {does} ({mend.why})")
    return found


def size(count: float) -> str:
    """Bytes for people: ``1.5 GiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" or abs(count) >= 100 else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} TiB"


def number(count: float) -> str:
    """Large numbers for people: ``1.5 B``."""
    for factor, unit in ((1e9, " B"), (1e6, " M"), (1e3, " k")):
        if count >= factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:.0f}"


def span(seconds: float) -> str:
    """Seconds for people: ``42 s``, ``3 min``, ``2.5 h``, ``3.1 days``."""
    if seconds < 100:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.3g} h" if seconds < 100 * 3600 else f"{seconds / 86400:.3g} days"


__all__ = ["lines", "number", "plan", "size", "span"]
