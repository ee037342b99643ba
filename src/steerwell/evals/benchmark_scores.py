"""What the benchmark tasks share: items with their scores, and shares of parts, sections and wholes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steerwell.data.benchmarks import BenchmarkItem
from steerwell.data.errors import InputError
from steerwell.evals import stats
from steerwell.evals.measure import Findings, Measure, Task, Trial
from steerwell.evals.pair_scores import forgiving, scorer
from steerwell.evals.stats import NOTHING
from steerwell.evals.winrate import Coverage

Files = str | Path | Sequence[str | Path]


@dataclass(frozen=True)
class Scored:
    """An item with one score per completion; None where the model gave none."""

    item: BenchmarkItem
    scores: tuple[float | None, ...]

    @property
    def complete(self) -> bool:
        """Whether every completion has a score."""
        return None not in self.scores

    @property
    def values(self) -> tuple[float, ...]:
        """The scores of a complete item."""
        return tuple(float(s) for s in self.scores if s is not None)


def benchmark(
    name: str,
    files: Files,
    read: Callable[[str | Path], list[BenchmarkItem]],
    measures: Callable[[Sequence[Scored]], list[Measure]],
) -> Task:
    """A task that scores all items of some files. The files are read, and checked, at once."""
    paths = [files] if isinstance(files, str | Path) else list(files)
    if not paths:
        raise InputError(f"{name} needs its published file", mend=f"Give --data {name}=FILE.")
    items = [item for path in paths for item in read(path)]
    groups = tuple(item.group for item in items)

    def measure(trial: Trial) -> Findings:
        given = forgiving(scorer(trial))(groups)
        scored = [Scored(item, tuple(s)) for item, s in zip(items, given, strict=True)]
        return Findings(tuple(measures(scored)), groups)

    return Task(name, (), measure, needs_rewards=True, beside=True)


def item_share(
    name: str,
    scored: Sequence[Scored],
    value: Callable[[Scored], float],
    **also: Any,
) -> Measure:
    """The mean of ``value`` (in [0, 1]) over the items that have all scores, clustered by prompt."""
    items = tuple((one.item.key, value(one) if one.complete else None) for one in scored)
    prompts = [one.item.group.prompt_id for one in scored]
    several = len(set(prompts)) < len(prompts)
    judged = sum(v is not None for _, v in items)
    missing = {"no score": len(items) - judged} if judged < len(items) else {}
    return Measure(
        name,
        stats.proportion([v for _, v in items], prompts if several else None),
        Coverage(len(items), judged, missing),
        better="higher",
        items=items,
        clusters={key: prompt for (key, _), prompt in zip(items, prompts, strict=True)} if several else {},
        **also,
    )


def weighted(name: str, parts: Sequence[Measure], weights: Sequence[float], **also: Any) -> Measure:
    """The weighted mean of measures of different items, with an interval from theirs (:func:`stats.combined`).

    Its items are those of the parts, scaled so that their mean is the weighted mean: so the paired difference
    of two models is one of the whole, too. A part without items leaves the whole without.
    """
    total = float(sum(weights))
    estimate = stats.combined([m.estimate for m in parts], weights) if total else NOTHING
    counts = [sum(v is not None for _, v in m.items) for m in parts]
    n = sum(counts)
    items: tuple[tuple[str, float | None], ...] = ()
    if all(counts) and total:
        items = tuple(
            (key, None if v is None else v * n * w / (total * count))
            for m, w, count in zip(parts, weights, counts, strict=True)
            for key, v in m.items
        )
    clusters: Mapping[str, str] = {}
    if any(m.clusters for m in parts):
        clusters = {key: m.clusters.get(key, key) for m in parts for key, _ in m.items}
    missing: dict[str, int] = {}
    for m in parts:
        for why, count in m.coverage.missing.items():
            missing[why] = missing.get(why, 0) + count
    coverage = Coverage(
        sum(m.coverage.expected for m in parts), sum(m.coverage.judged for m in parts), missing
    )
    return Measure(
        name, estimate, coverage, better="higher", items=items, clusters=clusters, unit="number", **also
    )


def by_part(scored: Sequence[Scored]) -> dict[str, list[Scored]]:
    """The items of each part, in the order met."""
    found: dict[str, list[Scored]] = {}
    for one in scored:
        found.setdefault(one.item.part, []).append(one)
    return found


__all__ = ["Files", "Scored", "benchmark", "by_part", "item_share", "weighted"]
