"""Preference Proxy Evaluations, PPE (Frick et al. 2024, arXiv:2410.14872): human preference, and correctness.

Human preference: accuracy on the votes that are no tie, and how alike the models behind the completions are
ranked by people and by the reward model (win rates, a tie counts half), by Spearman's and Kendall's correlation.

Correctness, each file by itself: accuracy on the published pairs of a right and a wrong response; the area under
the ROC curve; and the best-of-k curve C(k), the share of right responses among those picked from a random k of
the K responses, exact over all choices of k. Of the curve: ``end_score`` C(K), ``max_score`` the highest C(k),
and ``loss`` the mean over k of how far C(k) is below an oracle's.

The definitions are as commonly described; they were not held against the authors' code, and figures may differ
from published ones in detail. The curve is exact where they draw samples; equal
scores count half in accuracy and are broken at random in the curve. Their figures of confidence (separability,
agreement of intervals, Brier score) are not computed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import stats as correlations

from steerwell.data.benchmarks import read_ppe
from steerwell.evals import stats
from steerwell.evals.benchmark_scores import Files, Scored, benchmark, by_part, item_share, weighted
from steerwell.evals.best_of_n import best_of_n
from steerwell.evals.measure import Measure, Task
from steerwell.evals.stats import NOTHING, Estimate
from steerwell.evals.winrate import Coverage

HUMAN = "human"
TAGS = ("hard_prompt", "if_prompt", "math_prompt", "is_code")
DRAWS = 400


def ppe(files: Files) -> Task:
    """PPE from any of its published files, human preference and correctness, as many as are given.

    Raises :class:`InputError` naming file and row for a bad row.
    """
    return benchmark("ppe", files, read_ppe, scores)


def scores(scored: Sequence[Scored]) -> list[Measure]:
    """The measures of every part, and the mean accuracy of the correctness sets where there are several."""
    found, accuracies = [], []
    for part, items in by_part(scored).items():
        if part == HUMAN:
            found += _human(items)
        else:
            own = _correctness(part, items)
            found += own
            accuracies.append(own[0])
    if len(accuracies) > 1:
        notes = (f"mean of {len(accuracies)} sets",)
        section = "PPE, correctness"
        weights = [1.0] * len(accuracies)
        found.append(weighted("ppe/correctness", accuracies, weights, section=section, notes=notes))
    return found


def _human(items: Sequence[Scored]) -> list[Measure]:
    section = "PPE, human preference"
    decided = [one for one in items if one.item.facts["winner"] is not None]
    ties = (f"{len(items) - len(decided)} ties of {len(items)} votes left out",)
    found = [item_share("ppe/human/accuracy", decided, _preferred, section=section, notes=ties)]
    for tag in TAGS:
        part = [one for one in decided if one.item.facts.get(tag)]
        if part and len(part) < len(decided):
            found.append(
                item_share(f"ppe/human/accuracy/{tag}", part, _preferred, section=section, shown=False)
            )
    complete = [one for one in items if one.complete]
    left = len(items) - len(complete)
    coverage = Coverage(len(items), len(complete), {"no score": left} if left else {})
    for name in ("spearman", "kendall"):
        estimate, models = model_ranking(complete, name)
        notes = (f"ranking of {models} models by win rate, people's against the reward model's",)
        found.append(
            Measure(
                f"ppe/human/{name}", estimate, coverage, "higher", unit="number", notes=notes, section=section
            )
        )
    return found


def _preferred(one: Scored) -> float:
    first, second = one.values
    if first == second:
        return 0.5
    return float((second > first) == bool(one.item.facts["winner"]))


def model_ranking(items: Sequence[Scored], how: str) -> tuple[Estimate, int]:
    """The rank correlation of win rates by model, people's and the reward model's; and how many models.

    The interval is by bootstrap over prompts. No value with fewer than 3 models.
    """
    names = sorted({model for one in items for model in one.item.facts["models"]})
    if len(names) < 3:
        return NOTHING, len(names)
    place = {name: i for i, name in enumerate(names)}
    rows = []
    for one in items:
        winner = one.item.facts["winner"]
        first, second = one.values
        people = 0.5 if winner is None else 1.0 - winner
        model = 0.5 if first == second else float(first > second)
        a, b = (place[m] for m in one.item.facts["models"])
        rows.append([a, b, people, model])
    table = np.array(rows)
    prompts = [one.item.group.prompt_id for one in items]
    whole = _correlation(table, len(names), how)
    if whole is None:
        return NOTHING, len(names)

    def statistic(drawn: np.ndarray) -> float:
        value = _correlation(drawn, len(names), how)
        return whole if value is None else value

    return stats.cluster_bootstrap(table, prompts, statistic, draws=DRAWS, method="percentile"), len(names)


def _correlation(table: np.ndarray, models: int, how: str) -> float | None:
    a, b = table[:, 0].astype(int), table[:, 1].astype(int)
    battles = np.bincount(a, minlength=models) + np.bincount(b, minlength=models)
    met = battles > 0
    rates = []
    for column in (2, 3):
        wins = np.bincount(a, table[:, column], models) + np.bincount(b, 1 - table[:, column], models)
        rates.append(wins[met] / battles[met])
    if any(np.ptp(rate) == 0 for rate in rates):
        return None
    found = (correlations.spearmanr if how == "spearman" else correlations.kendalltau)(*rates)
    return float(found.statistic)  # type: ignore[union-attr]


def _correctness(part: str, items: Sequence[Scored]) -> list[Measure]:
    section = f"PPE, {part}"
    with_pairs = [one for one in items if one.item.facts["pairs"]]
    found = [item_share(f"ppe/{part}/accuracy", with_pairs, _pair_accuracy, section=section)]
    mixed = [one for one in items if len(set(one.item.facts["scores"])) > 1]
    notes = ("within a prompt, mean over the prompts with right and wrong responses",)
    found.append(item_share(f"ppe/{part}/auc", mixed, _auc_of, section=section, notes=notes))
    complete = [one for one in items if one.complete]
    coverage = Coverage(
        len(items),
        len(complete),
        {"no score": len(items) - len(complete)} if len(complete) < len(items) else {},
    )
    found.append(_pooled(part, complete, coverage, section))
    return found + _curve(part, complete, coverage, section)


def _pair_accuracy(one: Scored) -> float:
    values = one.values
    won = [
        0.5 if values[a] == values[b] else float(values[a] > values[b]) for a, b in one.item.facts["pairs"]
    ]
    return sum(won) / len(won)


def _auc_of(one: Scored) -> float:
    return area(np.array(one.values), np.array(one.item.facts["scores"]))


def area(values: np.ndarray, right: np.ndarray) -> float:
    """The area under the ROC curve: P(a right one scores higher than a wrong one), equal scores half."""
    good, bad = values[right > 0.5], values[right <= 0.5]
    if not len(good) or not len(bad):
        return 0.5
    ranks = correlations.rankdata(np.concatenate([good, bad]))
    return float((ranks[: len(good)].sum() - len(good) * (len(good) + 1) / 2) / (len(good) * len(bad)))


def _pooled(part: str, items: Sequence[Scored], coverage: Coverage, section: str) -> Measure:
    """Over all responses at once: a reward is known up to a term of the prompt, so this can be low by right."""
    values = np.array([v for one in items for v in one.values])
    right = np.array([s for one in items for s in one.item.facts["scores"]])
    prompts = [one.item.group.prompt_id for one in items for _ in one.values]
    estimate = NOTHING
    if len(values) and right.min() <= 0.5 < right.max():
        estimate = stats.cluster_bootstrap(
            np.column_stack([values, right]), prompts, lambda r: area(r[:, 0], r[:, 1]), draws=DRAWS
        )
    notes = ("over the responses of all prompts at once; differences between prompts count too",)
    return Measure(
        f"ppe/{part}/auc_pooled", estimate, coverage, "higher", notes=notes, section=section, shown=False
    )


def _curve(part: str, items: Sequence[Scored], coverage: Coverage, section: str) -> list[Measure]:
    if not items:
        return []
    k = min(len(one.scores) for one in items)
    prompts = [one.item.group.prompt_id for one in items]
    keys = [one.item.key for one in items]
    gold = [one.item.facts["scores"] for one in items]
    ours = np.array([best_of_n(one.values, g)[:k] for one, g in zip(items, gold, strict=True)])
    oracle = np.array([best_of_n(g, g)[:k] for g in gold])
    best = int(ours.mean(0).argmax())
    columns = {
        "max_score": (ours[:, best], "higher", f"reached at k = {best + 1}, chosen on these prompts"),
        "end_score": (ours[:, -1], "higher", f"k = {k}"),
        "loss": ((oracle - ours).mean(1), "lower", "mean over k of the oracle's curve less this one"),
        "random": (ours[:, 0], None, "k = 1"),
        "oracle": (oracle[:, -1], None, f"k = {k}, picked by the truth"),
    }
    found = []
    for name, (values, better, note) in columns.items():
        items_of = tuple((key, float(v)) for key, v in zip(keys, values, strict=True))
        found.append(
            Measure(
                f"ppe/{part}/{name}",
                stats.mean(values, prompts),
                coverage,
                better,  # type: ignore[arg-type]
                items=items_of if name != "max_score" else (),
                clusters=dict(zip(keys, prompts, strict=True)),
                unit="number",
                notes=(note,),
                section=section,
                shown=name != "oracle",
            )
        )
    return found


__all__ = ["area", "model_ranking", "ppe", "scores"]
