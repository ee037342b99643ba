"""``steerwell eval`` and ``steerwell explain``: numbers, and what they mean."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

import typer

from steerwell.cli import show, words
from steerwell.cli.app import app
from steerwell.cli.eval_data import make_tasks, places
from steerwell.cli.glossary import METRICS
from steerwell.data.errors import InputError, nearest


@app.command(
    "eval",
    epilog="Example: steerwell eval runs/dpo --against runs/sft --tasks win_rate --judge rm:runs/rm",
)
def eval_(
    models: Annotated[
        list[str], typer.Argument(metavar="MODEL…", help="Model or run directories, or hub names.")
    ],
    tasks: Annotated[str, typer.Option("--tasks", metavar="T,…", help="See steerwell explain.")],
    against: Annotated[str | None, typer.Option("--against", metavar="BASE", help="The baseline.")] = None,
    judge: Annotated[str | None, typer.Option("--judge", metavar="J", help="As in steerwell judge.")] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", metavar="P", help="win_rate: a store, a file or world:200.")
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(
            "--data",
            metavar="[TASK=]PATH",
            help="Judged pairs (a store or a file), or a benchmark's file: --data rewardbench2=FILE. Repeatable.",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option("--split", help="Which split of --data; all takes the whole store.")
    ] = "test",
    criteria: Annotated[
        str, typer.Option("--criteria", metavar="C,…", help="openai: what to judge by.")
    ] = "",
    base_url: Annotated[
        str, typer.Option("--base-url", metavar="URL", help="openai: a server of your own.")
    ] = "",
    n: Annotated[int, typer.Option("-n", min=1, help="Completions per prompt.")] = 1,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Only that many prompts or pairs.")
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Tokens per completion.")
    ] = 256,
    temperature: Annotated[float, typer.Option("--temperature")] = 1.0,
    greedy: Annotated[bool, typer.Option("--greedy", help="The likeliest token each time.")] = False,
    seed: Annotated[int, typer.Option("--seed")] = 0,
    to: Annotated[
        str | None, typer.Option("--to", metavar="STORE", help="Keep the texts and verdicts here.")
    ] = None,
    as_json: show.AsJson = False,
) -> None:
    """Evaluate models: every number with its 95% interval, and the difference to a baseline.

    The baseline is --against, or the first model.
    """
    from steerwell.evals.tasks import NAMES

    wanted = words.names(tasks, "task")
    for task in wanted:
        if task not in NAMES:
            raise InputError(f"unknown task {task!r}", mend=nearest(task, NAMES))
    if "win_rate" in wanted and judge is None:
        raise InputError("win_rate needs a judge", mend="Add, for example, --judge rm:runs/rm.")
    if to is not None:
        words.check_new_store(to)
    tasks_made = make_tasks(wanted, places(data or [], wanted), split, limit)
    asked = None if prompts is None else words.prompts(prompts, seed=seed, limit=limit)
    settings: dict[str, Any] = {"base_url": base_url}
    settings["criteria"] = words.names(criteria, "criterion") if criteria else []
    words.prepare_torch()
    by_judge = None if judge is None else words.judge(judge, **settings)
    everyone = [*models, against] if against else models
    loaded = {word: words.load_model(word) for word in dict.fromkeys(everyone)}
    from steerwell.evals.task import evaluate

    with show.stages() as progress:
        found = evaluate(
            [loaded[word] for word in dict.fromkeys(models)],
            tasks_made,
            judge=by_judge,
            prompts=asked,
            against=loaded[against] if against else None,
            n=n,
            seed=seed,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            greedy=greedy,
            progress=progress,
        )
    if to is not None:
        with words.new_store(to) as store:
            store.add([group for groups in found.groups.values() for group in groups])
    show.result(found.to_dict(), as_json, lambda: str(found))


@app.command(
    epilog="Example: steerwell explain dpo",
)
def explain(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Leave it out for a list.")] = None,
    as_json: show.AsJson = False,
) -> None:
    """Explain an objective, a judge, a rule, a task or a metric."""
    known = catalogue()
    if name is None:
        lines = [
            f"{kind}s: {', '.join(sorted(k for k, (its, _) in known.items() if its == kind))}"
            for kind in KINDS
        ]
        listed = {kind: sorted(k for k, (its, _) in known.items() if its == kind) for kind in KINDS}
        show.result(listed, as_json, "\n".join(lines))
        return
    if name not in known:
        parts = (name.removeprefix("eval/"), name.partition("/")[0])
        name = next((part for part in parts if part in known), name)
    if name not in known:
        raise InputError(f"there is nothing called {name!r} to explain", mend=nearest(name, known))
    kind, text = known[name]
    if kind == "objective":
        from steerwell import objectives

        text = objectives.explain(name)
    show.result({"name": name, "kind": kind, "text": text}, as_json, text.rstrip())


KINDS = ("objective", "judge", "rule", "task", "metric")


def catalogue() -> dict[str, tuple[str, str]]:
    """Name → (kind, text) of all that can be explained. Earlier kinds win where two share a name."""
    from steerwell import judges, objectives
    from steerwell.evals.tasks import NAMES, named
    from steerwell.judges.rules import RULES

    makers = {
        "rm": judges.reward_model,
        "rules": judges.rules,
        "refusal": judges.RefusalJudge.__call__,
        "openai": judges.pairwise,
        "verifier": judges.verifier,
        "scored": judges.scored,
    }
    found: dict[str, tuple[str, str]] = {
        name: ("metric", f"{name}: {text}") for name, text in METRICS.items()
    }
    found |= {name: ("task", _task(name, text, named(name))) for name, text in NAMES.items()}
    found |= {name: ("rule", _described(name, "", rule)) for name, rule in RULES.items()}
    found |= {name: ("judge", _described(name, judges.KINDS[name], make)) for name, make in makers.items()}
    found |= dict.fromkeys([*objectives.TABLE, *objectives.MIXTURES], ("objective", ""))
    return found


def _task(name: str, line: str, make: Any) -> str:
    """A task with what its file says at the top: the formulas, and where we differ from the authors."""
    return f"{_described(name, line, make)}\n\n{inspect.getdoc(inspect.getmodule(make)) or ''}"


def _described(name: str, line: str, thing: Any) -> str:
    text = inspect.getdoc(thing) or ""
    return f"{name}: {text}" if not line else f"{name}: {line}\n\n{text}"


__all__ = ["catalogue", "eval_", "explain"]
