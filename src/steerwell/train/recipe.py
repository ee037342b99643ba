"""A recipe file, done: read the data, derive the targets, load the model, train, say what happened."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from steerwell.data import formats, resolve
from steerwell.data.errors import InputError, nearest
from steerwell.data.store import Store, open_store
from steerwell.data.types import CompletionGroup, Prompt
from steerwell.train.config import Recipe
from steerwell.train.fit import Watch
from steerwell.train.items import Progress
from steerwell.train.loop import Model, checked, train
from steerwell.train.metrics import read_metrics
from steerwell.train.sources import Judge, rollouts
from steerwell.train.terms import Term, needed, targets_of

RULES: dict[str, Callable[..., resolve.Resolved]] = {
    "majority": resolve.majority,
    "soft": resolve.soft,
    "mean": resolve.mean,
    "labels": resolve.labels,
    "ranks": resolve.ranks,
    "strengths": resolve.strengths,
    "attributes": resolve.attributes,
    "step_labels": resolve.step_labels,
}
SQLITE = b"SQLite format 3\x00"


@dataclass(frozen=True)
class Trained:
    """What a recipe came to: the model, its run folder, ``run.json``, the last line of the metrics, and notes
    about the data (one sentence each: what was read, what was left out and why).
    """

    model: Model
    out: Path
    record: dict[str, Any]
    figures: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def run_recipe(
    recipe: Recipe,
    progress: Progress | None = None,
    *,
    judge: Judge | None = None,
    watch: Watch | None = None,
) -> Trained:
    """Do what the recipe says; the same recipe continues an interrupted run and leaves a finished one alone.

    ``judge`` is the judge that ``recipe.judge`` names (this room knows no judges). Raises what
    :func:`steerwell.train.loop.train` raises, and :class:`InputError` for data that cannot be read.
    """
    terms, config = checked(recipe.objective, recipe.train, recipe.hyperparameters)
    notes: list[str] = []
    data: Any
    if recipe.judge is not None:
        if judge is None:
            raise InputError(f"the judge {recipe.judge!r} was not given to run_recipe")
        data, held_out = _rollouts(recipe, judge), None
    else:
        if recipe.rollouts:
            raise InputError(
                "[rollouts] is given without a judge", mend='Add, for example, judge = "rm:DIR".'
            )
        data, held_out = _recorded(recipe, terms, notes)
    model = train(
        recipe.model,
        data,
        recipe.objective,
        out=recipe.out,
        eval_data=held_out,
        reference=recipe.reference,
        config=config,
        lora=recipe.lora,
        adapter=recipe.adapter,
        lora_alpha=recipe.lora_alpha,
        lora_targets=recipe.lora_targets,
        progress=progress,
        watch=watch,
        **recipe.hyperparameters,
    )
    out = Path(recipe.out)
    record = json.loads((out / "run.json").read_text("utf-8"))
    notes += (record.get("data") or {}).get("notes", [])
    notes += [f"held out: {note}" for note in (record.get("eval_data") or {}).get("notes", [])]
    notes += [warning] if (warning := (record.get("displacement") or {}).get("warning")) else []
    last = read_metrics(out / "metrics.jsonl")[-1:]
    return Trained(model, out, record, last[0] if last else {}, notes)


def _rollouts(recipe: Recipe, judge: Judge) -> Any:
    known = [name for name in inspect.signature(rollouts).parameters if name not in ("prompts", "judge")]
    for name in recipe.rollouts:
        if name not in known:
            raise InputError(f"unknown setting 'rollouts.{name}'", mend=nearest(name, known))
    _refuse_evaluation(recipe)
    if is_store(recipe.data):
        with open_store(recipe.data, create=False) as store:
            prompts = store.prompts(_split(store, recipe.split, recipe, "split"))
    else:
        prompts = [Prompt(group.prompt, group.meta) for group in formats.load(recipe.data)]
    return rollouts(prompts, judge, **recipe.rollouts)


def _refuse_evaluation(recipe: Recipe) -> None:
    for name in ("eval_data", "eval_split", "resolve"):
        if name in recipe.model_fields_set and getattr(recipe, name) is not None:
            raise InputError(f"{name} is not used with a judge", mend="Take it out of the recipe.")


def _recorded(
    recipe: Recipe, terms: Sequence[Term], notes: list[str]
) -> tuple[list[CompletionGroup], list[CompletionGroup] | None]:
    """The groups to train on and those to evaluate on (None: nothing to evaluate on), with targets."""
    found, held_out = recorded(recipe, notes)
    data = targets(found, recipe.resolve, terms, notes)
    quiet: list[str] = []
    held_out = targets(held_out, recipe.resolve, terms, quiet) if held_out else None
    notes += [f"held out: {note}" for note in quiet]
    return data, held_out or None


def recorded(recipe: Recipe, notes: list[str]) -> tuple[list[CompletionGroup], list[CompletionGroup] | None]:
    """The groups of a recipe to train on and those to evaluate on (None: it names none), with their evidence and no
    targets yet. What was read is told in ``notes``. Raises :class:`InputError` for data that cannot be read.
    """
    held_out: list[CompletionGroup] | None = None
    if is_store(recipe.data):
        with open_store(recipe.data, create=False) as store:
            found = store.groups(_split(store, recipe.split, recipe, "split"))
            if recipe.eval_data is None and recipe.eval_split is not None and recipe.split is not None:
                name = _split(store, recipe.eval_split, recipe, "eval_split")
                held_out = store.groups(name) if name else None
    else:
        for name in ("split", "eval_split"):
            if name in recipe.model_fields_set and getattr(recipe, name) is not None:
                raise InputError(
                    f"{name} is for stores, and {recipe.data} is a file",
                    mend="Import the file into a store, or give an eval_data file.",
                )
        found = _file(recipe.data, notes)
    if recipe.eval_data is not None:
        if is_store(recipe.eval_data):
            with open_store(recipe.eval_data, create=False) as store:
                held_out = store.groups()
        else:
            held_out = _file(recipe.eval_data, notes)
    return found, held_out or None


def targets(
    groups: Sequence[CompletionGroup], rule: str | dict[str, Any], terms: Sequence[Term], notes: list[str]
) -> list[CompletionGroup]:
    """Targets from annotations by a rule ("auto": what the terms take), unless the groups have them already.

    ``rule`` is a name, or a table with ``rule`` and the settings of that rule. Raises :class:`InputError` for
    an unknown rule or setting.
    """
    table = {"rule": rule} if isinstance(rule, str) else dict(rule)
    name = table.pop("rule", "auto")
    names = ("auto", "none", *RULES)
    if name not in names:
        raise InputError(f"unknown rule resolve = {name!r}", mend=nearest(str(name), names))
    rules = _rules_for(groups, terms) if name == "auto" else [] if name == "none" else [name]
    if table and not rules:
        raise InputError(f"resolve = {name!r} takes no settings", mend=f"Name a rule: {', '.join(RULES)}.")
    found = list(groups)
    for one in rules:
        known = [k for k in inspect.signature(RULES[one]).parameters if k not in ("groups", "annotations")]
        for key in table:
            if key not in known:
                raise InputError(f"resolve: {one} has no setting {key!r}", mend=nearest(key, known))
        resolved = RULES[one](found, **table)
        notes.append(str(resolved.report))
        found = list(resolved)
    return found


def _rules_for(groups: Sequence[CompletionGroup], terms: Sequence[Term]) -> list[str]:
    names, rules = needed(terms), []
    kinds = {annotation.kind for group in groups for annotation in group.annotations}
    have_pairs = any(group.pairs for group in groups)
    have_labels = any(group.labels is not None for group in groups)
    graded = any("pair_strengths" in targets_of(term) for term in terms)
    if graded and not any(group.pair_strengths for group in groups):
        rules.append("strengths")
    elif "pairs" in names and not have_pairs:
        rules.append("majority")
    if "attributes" in names and not any(group.attributes for group in groups):
        rules.append("attributes")
    if "labels" in names and not have_labels:
        rules.append("labels")
    if "ranks" in names and not any(group.ranks is not None for group in groups):
        rules.append("ranks")
    if "step_labels" in names and not any(group.step_labels is not None for group in groups):
        rules.append("step_labels")
    scored = {"rewards", "advantages"} | ({"scores"} if terms[0].kind != "reward" else set())
    if names & scored and not any(group.scores is not None for group in groups):
        rules.append("mean")
    if "demonstrations" in names and not rules and not have_pairs and not have_labels:
        rules += ["labels"] if "label" in kinds else ["majority"] if kinds & {"preference", "ranking"} else []
    return rules


def _file(path: str, notes: list[str]) -> list[CompletionGroup]:
    loaded = formats.load(path)
    notes.append(str(loaded.report))
    return list(loaded)


def _split(store: Store, name: str | None, recipe: Recipe, setting: str) -> str | None:
    """The split to read: a default one that the store doesn't have is left out, one that was asked for is
    not.
    """
    if name is None or setting in recipe.model_fields_set or name in store.split_names:
        return name
    return None


def is_store(word: str) -> bool:
    """Whether a word names a store: a database URL, a SQLite file, or a file that is called like one."""
    path = Path(word)
    if path.is_file():
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    return "://" in word or path.suffix in (".db", ".sqlite", ".sqlite3")


__all__ = ["Trained", "is_store", "recorded", "run_recipe", "targets"]
