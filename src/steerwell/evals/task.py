"""Evaluate policies: sample, judge, summarise, and keep the texts behind every number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steerwell.data.errors import InputError
from steerwell.data.messages import as_messages
from steerwell.data.types import CompletionGroup, Prompt
from steerwell.evals.measure import Judge, Measure, Task, Trial, by_item
from steerwell.evals.stats import Estimate, paired_difference
from steerwell.evals.tasks import BENCHMARKS, named


@dataclass(frozen=True)
class Result:
    """One measure of one policy; ``difference`` is the paired difference to ``against`` on the same items."""

    task: str
    policy: str
    measure: Measure
    against: str = ""
    difference: Estimate | None = None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            "task": self.task,
            "policy": self.policy,
            "metric": self.measure.name,
            **self.measure.estimate.to_dict(),
            "better": self.measure.better,
            "against": self.against or None,
            "difference": self.difference.to_dict() if self.difference else None,
            "coverage": self.measure.coverage.to_dict(),
            "notes": list(self.measure.notes),
        }


@dataclass(frozen=True)
class Evaluation:
    """The numbers of an evaluation, and the texts they came from.

    ``groups[task, policy]`` are the completion groups with the annotations that were counted, so every number
    leads back to texts, and evaluation output can be added to a store as evidence.
    """

    results: tuple[Result, ...]
    groups: Mapping[tuple[str, str], tuple[CompletionGroup, ...]]
    settings: Mapping[str, Any]

    @property
    def shown(self) -> list[Result]:
        """The results that a table shows; the JSON form has all."""
        return [result for result in self.results if result.measure.shown]

    def get(self, policy: str, metric: str) -> Result:
        """The result of one metric for one policy; raises :class:`InputError` when there is none."""
        for result in self.results:
            if (result.policy, result.measure.name) == (policy, metric):
                return result
        known = ", ".join(f"{r.policy}/{r.measure.name}" for r in self.results)
        raise InputError(f"there is no result {policy}/{metric}", mend=f"Known: {known}.")

    def to_dict(self) -> dict[str, Any]:
        """The JSON form, without the texts."""
        return {"settings": dict(self.settings), "results": [result.to_dict() for result in self.results]}

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=110, no_color=True)
        with console.capture() as captured:
            console.print(self)
        return "\n".join(line.rstrip() for line in captured.get().strip("\n").splitlines())

    def __rich__(self) -> Any:
        from rich import box
        from rich.markup import escape
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("policy", overflow="fold", min_width=8)
        table.add_column("metric", overflow="fold")
        compared = any(result.difference for result in self.shown)
        for column in ("value", "95% interval", "n", *(["change"] if compared else [])):
            table.add_column(column, justify="right", no_wrap=True)
        before: tuple[str, str, str] | None = None
        for result in self.shown:
            e, name, heading = result.measure.estimate, result.measure.name, result.measure.section
            place = (result.task, result.policy if heading else "", heading)
            if before is not None and place != before:
                table.add_section()
            if heading and place != before:
                table.add_row(result.policy, f"[dim]{heading}[/dim]")
            before = place
            arrow = {"higher": " ↑", "lower": " ↓"}.get(result.measure.better or "", "")
            row = [
                "" if heading else result.policy,
                escape(name) + arrow,
                "–" if e.value is None else f"{e.value:.3f}",
                "–" if e.low is None or e.high is None else f"{e.low:.3f} … {e.high:.3f}",
                str(e.n),
            ]
            table.add_row(*row, *([_change(result.difference)] if compared else []))
        table.caption = self._caption()
        table.caption_justify = "left"
        return table

    def _caption(self) -> str:
        """What the columns mean, and a warning where completions were not judged."""
        lines = ["↑ higher is better, ↓ lower is better"]
        if any(r.difference for r in self.results):
            lines[0] += f"; change: paired difference to {self.settings.get('against')} with its 95% interval"
        gaps: dict[tuple[str, str], list[str]] = {}
        for result in self.shown:
            if not result.measure.coverage.complete:
                gaps.setdefault((result.policy, str(result.measure.coverage)), []).append(result.measure.name)
        lines += [f"{policy}, {', '.join(names)}: {coverage}" for (policy, coverage), names in gaps.items()]
        if len(self.shown) < len(self.results):
            lines.append(f"{len(self.results) - len(self.shown)} more figures, and notes on each: --json")
        return "\n".join(lines)


def evaluate(
    policies: Sequence[Any],
    tasks: Sequence[str | Task] = ("win_rate", "over_refusal"),
    *,
    judge: Judge | None = None,
    prompts: Sequence[Prompt | str] | None = None,
    pairs: Sequence[CompletionGroup] | None = None,
    against: Any = None,
    n: int = 1,
    seed: int = 0,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    greedy: bool = False,
    progress: Callable[[str, int, int, str], None] | None = None,
) -> Evaluation:
    """Sample from each policy, judge, and summarise with intervals.

    ``policies``: anything with ``name`` and ``sample`` (for ``pair_accuracy``: ``score`` or ``logps``).
    ``tasks``: names (``win_rate``, ``over_refusal``, ``pair_accuracy``) or :class:`Task` objects.
    ``judge``: prefers or scores completions, for ``win_rate``. ``prompts`` replace the general prompts of
    ``win_rate``; ``pairs`` are held-out groups with resolved pairs, for ``pair_accuracy`` and ``reward_model``.
    ``against``: the baseline, one of the policies or another one; by default the first policy.
    ``n`` completions per prompt, sampled with the same ``seed`` from every policy.
    ``progress(task, done, total, note)`` is told before each policy is sampled or measured, and at the end.

    Everything that can be wrong with the arguments raises :class:`InputError` before anything is sampled.
    """
    if not policies:
        raise InputError("there is no policy to evaluate", mend="Give at least one.")
    if n < 1:
        raise InputError(f"n must be at least 1, got {n}", mend="It is the completions per prompt.")
    todo = [_task(task, prompts, pairs) for task in tasks]
    baseline = policies[0] if against is None else against
    everyone = list(policies) if any(p is baseline for p in policies) else [*policies, baseline]
    names = _names(everyone)
    for task in todo:
        _check(task, policies, baseline, everyone, judge)
    asked = {"max_new_tokens": max_new_tokens, "temperature": temperature, "greedy": greedy, "seed": seed}
    results: list[Result] = []
    texts: dict[tuple[str, str], tuple[CompletionGroup, ...]] = {}
    for task in todo:
        found, groups = _run(task, policies, baseline, everyone, names, judge, n, asked, progress)
        results += found
        texts |= groups
    settings = {
        "policies": [names[id(p)] for p in policies],
        "against": names[id(baseline)],
        "tasks": [task.name for task in todo],
        "judge": getattr(judge, "name", None) if judge else None,
        "n": n,
        **asked,
    }
    return Evaluation(tuple(results), texts, settings)


def _run(
    task: Task,
    policies: Sequence[Any],
    baseline: Any,
    everyone: Sequence[Any],
    names: Mapping[int, str],
    judge: Judge | None,
    n: int,
    asked: Mapping[str, Any],
    progress: Callable[[str, int, int, str], None] | None,
) -> tuple[list[Result], dict[tuple[str, str], tuple[CompletionGroup, ...]]]:
    """One task: sample where it asks, measure each policy, and set it against the baseline."""
    samples: dict[int, tuple[CompletionGroup, ...]] = {}
    sampled = [p for p in everyone if task.prompts and (task.compares or any(p is q for q in policies))]
    measured = [p for p in policies if not (task.compares and p is baseline)]
    beside = task.beside and hasattr(baseline, "score") and not any(p is baseline for p in policies)
    measured += [baseline] if beside else []
    parts = _Parts(task.name, len(sampled) + len(measured), progress)
    for policy in sampled:
        parts.begin(f"sampling {names[id(policy)]}")
        samples[id(policy)] = _sample(policy, names[id(policy)], task.prompts, n, asked)
    found: list[Result] = []
    texts: dict[tuple[str, str], tuple[CompletionGroup, ...]] = {}
    for policy in measured:
        parts.begin(f"measuring {names[id(policy)]}")
        trial = Trial(
            policy=policy,
            name=names[id(policy)],
            groups=samples.get(id(policy), ()),
            against=baseline,
            against_name=names[id(baseline)],
            against_groups=samples.get(id(baseline), ()),
            judge=judge,
            is_baseline=policy is baseline,
        )
        findings = task.measure(trial)
        texts[task.name, trial.name] = findings.groups
        found += [Result(task.name, trial.name, m, trial.against_name) for m in findings.measures]
    parts.end()
    results = found if task.compares else _with_differences(found, names[id(baseline)])
    if beside:  # measured for the differences alone
        results = [r for r in results if r.policy != names[id(baseline)]]
        del texts[task.name, names[id(baseline)]]
    return results, texts


class _Parts:
    """How far a task is: how many of its parts are done."""

    def __init__(self, task: str, total: int, progress: Callable[[str, int, int, str], None] | None) -> None:
        self.task, self.total, self.progress = task, total, progress
        self.begun = 0

    def begin(self, note: str) -> None:
        if self.progress is not None:
            self.progress(self.task, self.begun, self.total, note)
        self.begun += 1

    def end(self) -> None:
        if self.progress is not None:
            self.progress(self.task, self.total, self.total, "")


def _task(
    task: str | Task, prompts: Sequence[Prompt | str] | None, pairs: Sequence[CompletionGroup] | None
) -> Task:
    """A task by name, with the user's own prompts or pairs where it takes them."""
    if isinstance(task, Task):
        return task
    maker = named(task)
    if task == "win_rate" and prompts is not None:
        return maker([p if isinstance(p, Prompt) else Prompt(as_messages(p)) for p in prompts])
    if task in ("pair_accuracy", "reward_model"):
        if pairs is None:
            raise InputError(f"{task} needs held-out pairs", mend="Give pairs=resolve.majority(groups).")
        return maker(pairs)
    if task in BENCHMARKS:
        raise InputError(
            f"{task} needs its published file",
            mend=f"Give --data {task}=FILE, or in Python the task itself: tasks.{task}.{task}(FILE).",
        )
    return maker()


def _check(
    task: Task, policies: Sequence[Any], baseline: Any, everyone: Sequence[Any], judge: Judge | None
) -> None:
    """Refuse what can't work, before anything is sampled."""
    if task.needs_judge and judge is None:
        raise InputError(f"{task.name} needs a judge", mend="Give judge=…, e.g. judges.reward_model(DIR).")
    if task.compares and all(p is baseline for p in policies):
        raise InputError(
            f"{task.name} compares policies, but the only one is the baseline itself",
            mend="Give a second policy or against=….",
        )
    ids = Counter(prompt.id for prompt in task.prompts)
    twice = next((prompt for prompt in task.prompts if ids[prompt.id] > 1), None)
    if twice is not None:
        raise InputError(
            f"{task.name} asks {twice.text[:40]!r} twice",
            mend="Remove the repetition; use n for more samples.",
        )
    for policy in policies if task.needs_rewards else ():
        has_reference = policy is not baseline and hasattr(policy, "logps") and hasattr(baseline, "logps")
        if not hasattr(policy, "score") and not has_reference:
            raise InputError(
                f"{task.name} measures rewards, and {getattr(policy, 'name', policy)!s} has none",
                mend="Give a reward model, or a policy beside its reference: --against BASE (against=…).",
            )
    for policy in everyone if task.compares else policies:
        if task.prompts and not hasattr(policy, "sample"):
            raise InputError(
                f"{task.name} samples, and {getattr(policy, 'name', policy)!s} can't be sampled",
                mend="Give a policy: anything with .name and .sample(prompts, n=…).",
            )


def _names(policies: Sequence[Any]) -> dict[int, str]:
    """A name for each policy object; equal names are numbered."""
    seen: Counter[str] = Counter()
    found: dict[int, str] = {}
    for policy in policies:
        if id(policy) in found:
            raise InputError(
                f"the policy {found[id(policy)]!r} is given twice", mend="Give each policy once."
            )
        name = str(getattr(policy, "name", "") or type(policy).__name__)
        seen[name] += 1
        found[id(policy)] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return found


def _sample(
    policy: Any, name: str, prompts: tuple[Prompt, ...], n: int, asked: Mapping[str, Any]
) -> tuple[CompletionGroup, ...]:
    """Ask a policy all prompts. The samples carry its name here, so that equal names can't mix them up."""
    groups = list(policy.sample(prompts, n, **asked))
    if len(groups) != len(prompts) or any(len(g.completions) != n for g in groups):
        raise InputError(
            f"{name} returned {sum(len(g.completions) for g in groups)} completions for "
            f"{len(prompts)} prompts with n = {n}",
            mend="sample(prompts, n) must return one group per prompt, in order, with n completions.",
        )
    return tuple(
        replace(
            group,
            completions=tuple(replace(c, source=replace(c.source, name=name)) for c in group.completions),
            meta={**group.meta, **prompt.meta},
        )
        for group, prompt in zip(groups, prompts, strict=True)
    )


def _with_differences(found: list[Result], baseline: str) -> list[Result]:
    """Add the paired difference to the baseline's measure of the same name, on the items that both have."""
    base = {r.measure.name: by_item(r.measure) for r in found if r.policy == baseline}
    done = []
    for result in found:
        theirs = base.get(result.measure.name)
        if result.policy == baseline or theirs is None:
            done.append(replace(result, against=""))
            continue
        ours = by_item(result.measure)
        shared = [key for key in ours if key in theirs]
        prompts = result.measure.clusters
        difference = paired_difference(
            [ours[k] for k in shared],
            [theirs[k] for k in shared],
            [prompts[k] for k in shared] if prompts else None,
            shares=result.measure.unit == "share",
        )
        done.append(replace(result, difference=difference))
    return done


def _change(difference: Estimate | None) -> str:
    if difference is None or difference.value is None:
        return "–"
    if difference.low is None or difference.high is None:
        return f"{difference.value:+.3f}"
    return f"{difference.value:+.3f}  {difference.low:+.2f} … {difference.high:+.2f}"


__all__ = ["Evaluation", "Result", "Task", "evaluate"]
