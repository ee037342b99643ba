"""``steerwell sample``, ``steerwell judge`` and ``steerwell train``: completions, evidence, models."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steerwell.cli import show, words
from steerwell.cli.app import app
from steerwell.data.errors import InputError

if TYPE_CHECKING:
    from steerwell.data.types import Annotation, CompletionGroup, Prompt

PER_SAVE = 256  # completions that are sampled before they are written down
# Groups that a judge sees before its verdicts are written down, by kind of judge: fewer where each is dear.
GROUPS_PER_SAVE = {
    "openai": 8,
    "scored": 4,
    "rm": 64,
    "verifier": 64,
    "rules": 256,
    "refusal": 256,
    "world": 256,
}


@app.command(
    epilog="Example: steerwell sample runs/sft --prompts prefs.db --split train -n 4 --to prefs.db",
)
def sample(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model or run directory, or a hub name.")],
    prompts: Annotated[str, typer.Option("--prompts", metavar="P", help="A store, a file, or world:200.")],
    to: Annotated[str, typer.Option("--to", metavar="STORE", help="Where the completions go.")],
    n: Annotated[int, typer.Option("-n", min=1, help="Completions per prompt.")] = 1,
    split: Annotated[str | None, typer.Option("--split", help="Only this split of the prompts.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only that many prompts.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens per completion.")
    ] = 256,
    temperature: Annotated[
        float, typer.Option("--temperature", help="1 samples from the model itself.")
    ] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token each time.")] = False,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same completions.")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Completions at a time.")] = 256,
    as_json: show.AsJson = False,
) -> None:
    """Sample completions from a model and keep them in a store, with their tokens and log-probabilities.

    They are written down every few hundred: an interrupted command goes on where it stopped.
    """
    words.check_new_store(to)
    asked = words.prompts(prompts, split=split, seed=seed, limit=limit)
    words.prepare_torch()
    from steerwell.models.load import load_policy

    policy = load_policy(words.model_path(model), name=model)
    how = {"max_new_tokens": max_new_tokens, "temperature": float(temperature), "greedy": greedy}
    begin, new, finished, tokens = time.monotonic(), 0, 0, 0
    with words.new_store(to) as store, show.progress("sample") as step:
        todo = missing(store.groups(), asked, n, policy, how, seed)
        for some in words.in_chunks(todo, max(1, PER_SAVE // n), step):
            groups = policy.sample(some, n, **how, seed=seed, batch_size=batch_size)
            new += store.add(groups).completions
            drawn = [completion for group in groups for completion in group.completions]
            finished += sum(bool(completion.finished) for completion in drawn)
            tokens += sum(len(completion.token_ids or ()) for completion in drawn)
    value = {
        "store": to,
        "model": model,
        "prompts": len(asked),
        "there_already": len(asked) - len(todo),
        "new_completions": new,
        "finished": finished,
        "tokens": tokens,
        "seconds": round(time.monotonic() - begin, 3),
    }
    there = (
        f", {show.counted(len(asked) - len(todo), 'prompt')} had theirs already"
        if len(todo) < len(asked)
        else ""
    )
    cut = (
        f", {len(todo) * n - finished:,} cut off at {max_new_tokens} tokens"
        if finished < len(todo) * n
        else ""
    )
    show.result(value, as_json, f"{to}: {show.counted(new, 'new completion')} from {model}{cut}{there}")


def missing(
    groups: Iterable[CompletionGroup],
    prompts: Sequence[Prompt],
    n: int,
    policy: Any,
    how: dict[str, Any],
    seed: int,
) -> list[Prompt]:
    """The prompts that do not have their ``n`` completions from this policy with these settings yet."""
    from steerwell.data.messages import canonical

    drawn: Counter[str] = Counter()
    wanted = (policy.name, policy.digest(), canonical(how), seed)
    for group in groups:
        sources = [completion.source for completion in group.completions]
        drawn[group.prompt_id] += sum(
            s.index < n and (s.name, s.revision, s.sampling, s.seed) == wanted for s in sources
        )
    return [prompt for prompt in prompts if drawn[prompt.id] < n]


@app.command(
    epilog="Example: steerwell judge prefs.db --with rules:max_words:50,no_repeat",
)
def judge(
    store: Annotated[str, typer.Argument(metavar="STORE")],
    by: Annotated[
        str,
        typer.Option(
            "--with",
            metavar="JUDGE",
            help="rm:DIR, verifier:DIR, rules:max_words:50, refusal, openai:MODEL, scored:openai:MODEL, world:gold.",
        ),
    ],
    split: Annotated[str | None, typer.Option("--split", help="Only this split.")] = None,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Only that many prompts.")] = None,
    criteria: Annotated[
        str, typer.Option("--criteria", metavar="C,…", help="openai: what to judge by.")
    ] = "",
    base_url: Annotated[
        str, typer.Option("--base-url", metavar="URL", help="openai: a server of your own.")
    ] = "",
    question: Annotated[
        str, typer.Option("--question", help="verifier: what is asked, as it was in training.")
    ] = "",
    as_json: show.AsJson = False,
) -> None:
    """Have a judge look at the completions of a store; its verdicts are added as evidence.

    What this judge has decided already is not asked again; what failed is. An interrupted command goes on
    where it stopped. Nothing is overwritten.
    """
    settings: dict[str, Any] = {"base_url": base_url, "question": question}
    settings["criteria"] = words.names(criteria, "criterion") if criteria else []
    with words.existing_store(store) as opened:
        groups = [group for group in opened.groups(split=split) if group.completions][:limit]
        if not groups:
            raise InputError(
                "there are no completions to judge", file=store, mend="Sample some: steerwell sample."
            )
        by_judge = words.judge(by, **settings)
        todo = [group for group in groups if undecided(group, by_judge.name)]
        new = 0
        verdicts: Counter[str] = Counter()
        failures: Counter[str] = Counter()
        with show.progress("judge") as step:
            for some in words.in_chunks(todo, GROUPS_PER_SAVE[by.partition(":")[0]], step):
                known = {key for group in some for key in decided(group, by_judge.name)}
                found = [a for a in by_judge(some) if (a.criterion, a.completions) not in known]
                new += opened.add((), found).annotations
                verdicts.update(a.kind for a in found if a.value is not None)
                failures.update(a.rationale for a in found if a.value is None)
    value = {
        "store": store,
        "judge": by_judge.name,
        "groups": len(groups),
        "there_already": len(groups) - len(todo),
        "new_annotations": new,
        "verdicts": dict(verdicts),
        "no_verdict": sum(failures.values()),
        "reasons": dict(failures.most_common()),
    }
    lines = [f"{store}: {show.counted(new, 'new annotation')} by {by_judge.name}"]
    if len(todo) < len(groups):
        lines.append(f"  {show.counted(len(groups) - len(todo), 'prompt')} had been judged already")
    if failures:
        lines.append(f"  no verdict in {sum(failures.values()):,} (ask again with the same command):")
        lines += [f"    {count:,} × {reason}" for reason, count in failures.most_common(5)]
    show.result(value, as_json, "\n".join(lines))


def decided(group: CompletionGroup, name: str) -> set[tuple[str, tuple[str, ...]]]:
    """(criterion, completions in the order shown) of every verdict that this judge has reached."""
    return {
        (a.criterion, a.completions) for a in group.annotations if a.annotator == name and a.value is not None
    }


def undecided(group: CompletionGroup, name: str) -> bool:
    """Whether this judge has not seen a completion of the group yet, or failed and never made up for it."""
    mine: list[Annotation] = [a for a in group.annotations if a.annotator == name]
    done = decided(group, name)
    seen = {completion for _, shown in done for completion in shown}
    return any((a.criterion, a.completions) not in done for a in mine) or any(
        completion.id not in seen for completion in group.completions
    )


@app.command(
    epilog="Example: steerwell train dpo.toml --set beta=0.05 --set train.learning_rate=1e-6\n\n"
    "Example: steerwell train dpo.toml --compare dpo,dpo:beta=0.5,ipo,simpo,kto --set out=runs/compare",
)
def train(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.toml")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a setting of the recipe.")
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="NAME,…",
            help="Train these objectives instead, each into OUT/NAME, and compare them on the held-out pairs. "
            "NAME:key=value sets a hyperparameter or the learning_rate of one.",
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=1, help="--compare: held-out prompts to sample, for KL (200)."),
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="--compare: tokens per sample (256).")
    ] = None,
    as_json: show.AsJson = False,
) -> None:
    """Train a policy or a reward model by a recipe: sft, bradley_terry, dpo, ipo, simpo, kto, grpo …

    The same command continues an interrupted run; a run that is done is left alone.
    """
    from steerwell.train.config import Recipe

    asked = Recipe.from_toml(recipe, overrides or ())
    if compare is None:
        if samples is not None or max_new_tokens is not None:
            raise InputError("--samples and --max-new-tokens are for --compare", mend="Leave them out.")
        train_one(asked, as_json)
    else:
        compare_all(asked, compare, samples or 200, max_new_tokens or 256, as_json)


def compare_all(recipe: Any, compare: str, samples: int, max_new_tokens: int, as_json: bool) -> None:
    """Train the objectives that are named and show how they compare."""
    entries = words.names(compare, "objective")
    places = _places(recipe)
    words.prepare_torch()
    from steerwell.pipelines.compare import compare as compare_objectives
    from steerwell.pipelines.compare_report import table

    with show.stages() as progress:
        found = compare_objectives(
            recipe.model_copy(update=places),
            entries,
            samples=samples,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
    show.result(found, as_json, lambda: table(found))


def _places(asked: Any) -> dict[str, str]:
    """Where the models of a recipe are."""
    places = {"model": words.model_path(asked.model)}
    if asked.reference not in ("start", "none"):
        places["reference"] = words.model_path(asked.reference)
    return places


def train_one(asked: Any, as_json: bool) -> None:
    """Train by a recipe and show what it came to."""
    places = _places(asked)
    words.prepare_torch()
    by_judge = None if asked.judge is None else words.judge(asked.judge)
    from steerwell.train.recipe import run_recipe

    with show.stages() as progress:
        done = run_recipe(asked.model_copy(update=places), progress, judge=by_judge)
    value = {
        "out": str(done.out),
        "model": str(done.out / "model"),
        "status": done.record.get("status"),
        "wall_seconds": done.record.get("wall_seconds"),
        "cpu_seconds": done.record.get("cpu_seconds"),
        "metrics": done.figures,
        "notes": done.notes,
    }
    show.result(value, as_json, lambda: trained_lines(value))


def trained_lines(value: dict[str, Any]) -> str:
    """What a training run came to, for people: notes about the data, the last figures, where the model is."""
    figures = {k: v for k, v in value["metrics"].items() if isinstance(v, float) or k == "step"}
    width = max((len(name) for name in figures), default=0)
    lines = [*value["notes"], *(f"  {name:{width}}  {number:.4g}" for name, number in figures.items())]
    return "\n".join([*lines, f"model: {value['model']} ({value['wall_seconds'] or 0:.0f} s)"])


__all__ = ["judge", "sample", "train"]
