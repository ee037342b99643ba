"""``steerwell train RECIPE --compare dpo,ipo,simpo,kto``: the same data and seed through several objectives.

Each contender is trained into a run folder of its own, ``OUT/NAME``, from the recipe's model, data, split, seed and
``[train]``; such a folder is an ordinary run, so a comparison that was interrupted goes on where it stopped, and one
that is called again trains nothing. Then all are measured by one yardstick (:mod:`steerwell.pipelines.yardstick`),
and ``OUT/compare.json`` and ``OUT/compare.html`` say what came out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup, Prompt
from steerwell.pipelines.contenders import (
    Contender,
    check_contender,
    contenders,
    groups_for,
    pair_terms,
)
from steerwell.pipelines.progress import Progress, silent
from steerwell.pipelines.stages import write_json
from steerwell.pipelines.yardstick import Figures, Yardstick
from steerwell.train.config import Recipe, TrainConfig
from steerwell.train.displacement import MEND
from steerwell.train.loop import train
from steerwell.train.metrics import read_metrics
from steerwell.train.recipe import recorded, targets
from steerwell.train.sources import steps_in
from steerwell.train.terms import describe

LOOKS = 10  # evaluations in a run, where the recipe does not say how many
MEASURED = "measured.json"


@dataclass(frozen=True)
class Entrant:
    """A contender with its data: the groups it is trained on and those it is evaluated on while it trains."""

    contender: Contender
    groups: Sequence[CompletionGroup]
    held_out: Sequence[CompletionGroup]
    out: Path

    @property
    def config(self) -> TrainConfig:
        """The recipe's settings; where they say nothing of evaluation, about ten of them."""
        config = self.contender.config
        if "eval_every" in config.model_fields_set:
            return config
        steps = config.steps or steps_in(len(self.groups), config.batch_size, config.epochs)
        return config.model_copy(update={"eval_every": max(1, -(-steps // LOOKS))})


def compare(
    recipe: Recipe,
    entries: Sequence[str],
    *,
    samples: int = 200,
    max_new_tokens: int = 256,
    progress: Progress = silent,
) -> dict[str, Any]:
    """Train the objectives that ``entries`` name by ``recipe`` (its own objective is not trained unless it is named),
    measure them alike, and write ``compare.json`` and ``compare.html`` into ``recipe.out``; returns what the JSON
    file holds. ``samples``: how many of the held-out prompts are sampled for KL and win rate.

    Raises :class:`InputError`, before a model is loaded, for what :func:`~steerwell.pipelines.contenders.contenders`
    refuses, for data that lack what a contender takes, for a recipe without held-out pairs, and for an ``out`` that
    holds something else; and what :func:`steerwell.train.loop.train` raises.
    """
    found = contenders(entries, recipe)
    out = Path(recipe.out)
    _check_out(out)
    notes: list[str] = []
    entrants, held_out = _entrants(recipe, found, out, notes)
    prompts = list({g.prompt_id: Prompt(g.prompt, g.meta) for g in held_out}.values())[:samples]
    yard = Yardstick(
        recipe.model,
        held_out,
        prompts,
        max_new_tokens,
        recipe.train.max_length,
        recipe.train.seed,
        recipe.train.dtype,
    )
    for entrant in entrants:
        _train(recipe, entrant, progress)
    rows = []
    for i, entrant in enumerate(entrants):
        progress("measure", i, len(entrants), entrant.contender.name)
        rows.append(_row(entrant, _measured(entrant, yard)))
    progress("measure", len(entrants), len(entrants), "")
    result = {
        "model": recipe.model,
        "data": recipe.data,
        "out": recipe.out,
        "seed": recipe.train.seed,
        "held_out": {"prompts": len(held_out), "pairs": yard.pairs},
        "samples": {"prompts": len(prompts), "max_new_tokens": max_new_tokens, "gold": yard.gold},
        "contenders": rows,
        "notes": [*notes, *_displaced(entrants)],
        "steerwell": version("steerwell"),
    }
    write_json(out / "compare.json", result)
    from steerwell.pipelines.compare_report import write_page

    write_page(out / "compare.html", result)
    return result


def _check_out(out: Path) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError(
            "a comparison runs in one process",
            mend="Train each objective by itself under torchrun: --set objective=…",
        )
    if out.exists() and not out.is_dir():
        raise InputError("out is a file", file=out, mend="Give a folder.")
    if (out / "run.json").exists():
        raise InputError(
            "out holds a run, and a comparison makes a folder with a run of each objective",
            file=out,
            mend="Give another out: --set out=runs/compare.",
        )


def _entrants(
    recipe: Recipe, found: Sequence[Contender], out: Path, notes: list[str]
) -> tuple[list[Entrant], list[CompletionGroup]]:
    """The contenders with their data, all checked; and the held-out groups with pairs that they are measured on."""
    groups, others = recorded(recipe, notes)
    if not others:
        raise InputError(
            "a comparison needs held-out pairs, and the recipe names none",
            file=recipe.data,
            mend="Give eval_data, or a store with a test split (steerwell import --test-fraction 0.1).",
        )
    quiet: list[str] = []
    paired = [group for group in targets(others, recipe.resolve, pair_terms(), quiet) if group.pairs]
    if not paired:
        raise InputError(
            f"a comparison needs held-out pairs; 0 of {len(others)} held-out groups have one",
            file=recipe.eval_data or recipe.data,
            mend="Give held-out data with preferences or rankings: eval_data, or eval_split of the store.",
        )
    entrants = []
    for one in found:
        own: list[str] = []
        data = groups_for(one, groups, recipe.resolve, own)
        held_out = groups_for(one, others, recipe.resolve, quiet)
        check_contender(one, data, held_out, recipe.reference)
        notes += [note for note in own if note not in notes]
        entrants.append(Entrant(one, data, held_out, out / one.folder))
    return entrants, paired


def _train(recipe: Recipe, entrant: Entrant, progress: Progress) -> None:
    """Train a contender into its folder; one that is done there is left alone."""
    one = entrant.contender

    def relay(stage: str, done: int, total: int, note: str = "") -> None:
        progress(one.name if stage == "train" else f"{one.name}: {stage}", done, total, note)

    train(
        recipe.model,
        entrant.groups,
        one.objective,
        out=entrant.out,
        eval_data=entrant.held_out,
        reference=recipe.reference if one.wants_reference else "start",
        config=entrant.config,
        lora=recipe.lora,
        adapter=recipe.adapter,
        lora_alpha=recipe.lora_alpha,
        lora_targets=recipe.lora_targets,
        progress=relay,
        **one.hyper,
    )


def _measured(entrant: Entrant, yard: Yardstick) -> Figures:
    """The figures of a contender: those in its folder, if they are of this run and this yardstick, else new ones."""
    record = _record(entrant)
    key, path = yard.key(record["identity_digest"]), entrant.out / MEASURED
    kept = _kept(path)
    if kept.get("key") == key:
        return Figures.from_dict(kept["figures"])
    figures = yard.measure(yard.load(str(entrant.out / "model")))
    write_json(path, {"key": key, "figures": figures.to_dict()})
    return figures


def _kept(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):  # not measured yet, or torn: it is measured again
        return {}


def _record(entrant: Entrant) -> dict[str, Any]:
    return json.loads((entrant.out / "run.json").read_text("utf-8"))


def _row(entrant: Entrant, figures: Figures) -> dict[str, Any]:
    record, one = _record(entrant), entrant.contender
    return {
        "name": one.name,
        "settings": describe(one.terms),
        "learning_rate": record["identity"]["train.learning_rate"],
        "out": str(entrant.out),
        "steps": record.get("steps"),
        "groups": len(entrant.groups),
        "wall_seconds": record.get("wall_seconds"),
        **figures.to_dict(),
        "curves": curves(read_metrics(entrant.out / "metrics.jsonl")),
    }


def _displaced(entrants: Sequence[Entrant]) -> list[str]:
    """The runs' own warnings that preferred completions became less likely, and once what helps."""
    notes = []
    for entrant in entrants:
        warning = (_record(entrant).get("displacement") or {}).get("warning")
        if warning:
            notes.append(f"{entrant.contender.name}: {warning.removesuffix(MEND).strip()}")
    return [*notes, MEND] if notes else []


def curves(metrics: Sequence[dict[str, Any]]) -> list[dict[str, float | None]]:
    """What was recorded on the held-out pairs along the way, by step: ``accuracy`` (by the objective's own reward),
    ``margin`` and ``chosen_shift`` (since the start, in nats per completion). None where it was not recorded.
    """
    looks = [line for line in metrics if "eval/loss" in line]

    def shift(line: dict[str, Any], side: str) -> float | None:
        name = f"eval/logps/{side}"
        now, then = line.get(name), looks[0].get(name)
        return None if now is None or then is None else now - then

    rows: list[dict[str, float | None]] = []
    for line in looks:
        chosen, rejected = shift(line, "chosen"), shift(line, "rejected")
        rows.append(
            {
                "step": line["step"],
                "accuracy": line.get("eval/rewards/accuracies"),
                "margin": None if chosen is None or rejected is None else chosen - rejected,
                "chosen_shift": chosen,
            }
        )
    return rows


__all__ = ["compare", "curves"]
