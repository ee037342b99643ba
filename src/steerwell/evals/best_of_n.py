"""What picking the best of n by a reward model is worth in another measure, exactly, over all choices of n.

With K completions of a prompt in order of the model's scores, the one at place r (1 the best) is the model's
choice among a random n of them with probability C(K - r, n - 1) / C(K, n). No sampling is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special

from steerwell.data import resolve
from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.evals import stats
from steerwell.evals.measure import Measure
from steerwell.evals.stats import Estimate
from steerwell.evals.winrate import Coverage

SECTION = "best of n, by the scores of the data"
LEAST = 3  # completions of a prompt with a score of their own


def best_of_n(scores: Sequence[float], gold: Sequence[float]) -> np.ndarray:
    """The expected gold (K,) of the completion with the highest score among a random n, n = 1 … K.

    Equal scores are broken at random: completions with the same score share their probability evenly.
    ``best_of_n(gold, gold)`` is the oracle; entry 0 is the mean of ``gold`` for any scores.
    Raises :class:`InputError` for unequal lengths and for numbers that are not finite.
    """
    s, g = np.asarray(scores, dtype=np.float64), np.asarray(gold, dtype=np.float64)
    if s.ndim != 1 or s.shape != g.shape or not len(s):
        raise InputError(f"{s.shape} scores but {g.shape} gold values", mend="Give one per completion.")
    if not (np.isfinite(s).all() and np.isfinite(g).all()):
        raise InputError("a score is not a finite number", mend="Leave that completion out.")
    _, rank, size = np.unique(-s, return_inverse=True, return_counts=True)
    shared = (np.bincount(rank, weights=g) / size)[rank]  # the mean gold of those with an equal score
    ordered = shared[np.argsort(-s, kind="stable")]
    return chances(len(s)) @ ordered


@lru_cache(maxsize=64)
def chances(k: int) -> np.ndarray:
    """(K, K): row n - 1 has the chance of each place to be the best of a random n of K."""
    n, r = np.arange(1, k + 1)[:, None], np.arange(1, k + 1)[None, :]
    possible = r <= k - n + 1
    after = np.where(possible, k - r, n - 1)  # places behind r, of which n - 1 are drawn too
    table = np.where(possible, np.exp(_log_choose(after, n - 1) - _log_choose(np.full_like(n, k), n)), 0.0)
    table /= table.sum(1, keepdims=True)
    table.flags.writeable = False
    return table


def _log_choose(n: np.ndarray, k: np.ndarray) -> np.ndarray:
    return special.gammaln(n + 1.0) - special.gammaln(k + 1.0) - special.gammaln(n - k + 1.0)


def kl_bound(n: int) -> float:
    """log n - (n - 1)/n nats: no more than this separates best-of-n from the policy that was sampled.

    An upper bound, reached only where equal completions never occur (Beirami et al. 2024, arXiv:2401.01879).
    """
    if n < 1:
        raise InputError(f"best of {n} is nothing", mend="n is 1 or more.")
    return math.log(n) - (n - 1) / n


def has_gold(group: CompletionGroup) -> bool:
    """Whether a group has the scores or ranks of 3 completions."""
    return sum(value is not None for value in gold_scores(group)) >= LEAST


def gold_scores(group: CompletionGroup, model: Any = None) -> list[float | None]:
    """Scores by others than ``model`` itself: those resolved, else the mean of annotations, else −rank."""
    if group.scores is not None:
        return list(group.scores)
    own = f"@{model.digest()[:10]}" if hasattr(model, "digest") else None
    others = tuple(
        a for a in group.annotations if a.kind == "score" and not (own and a.annotator.endswith(own))
    )
    resolved = resolve.mean([group], annotations=others)
    if resolved:
        return list(resolved[0].scores or ())
    if group.ranks is not None:
        return [None if rank is None else -float(rank) for rank in group.ranks]
    return [None] * len(group.completions)


def best_of_n_measures(
    groups: Sequence[CompletionGroup], scores: Sequence[Sequence[float | None]], model: Any = None
) -> list[Measure]:
    """``bon_gold/n=…`` by the model, ``bon_oracle/n=…``, the share of the gain recovered, and the KL bound.

    All on the same prompts: those with N completions or more, N the most that half of the prompts have.
    """
    known: list[tuple[str, list[float], list[float]]] = []
    for group, given in zip(groups, scores, strict=True):
        gold = gold_scores(group, model)
        both = [(s, g) for s, g in zip(given, gold, strict=True) if s is not None and g is not None]
        if len(both) >= LEAST:
            known.append((group.prompt_id, [s for s, _ in both], [g for _, g in both]))
    if not known:
        return []
    sizes = sorted((len(s) for _, s, _ in known), reverse=True)
    most = sizes[(len(sizes) - 1) // 2]
    used = [one for one in known if len(one[1]) >= most]
    prompts = [prompt for prompt, _, _ in used]
    ours = np.array([best_of_n(s, g)[:most] for _, s, g in used])
    oracle = np.array([best_of_n(g, g)[:most] for _, _, g in used])
    left = len(known) - len(used)
    coverage = Coverage(len(known), len(used), {f"have fewer than {most} completions": left} if left else {})
    shown = {1, most} | {2**i for i in range(1, 7)}
    return [
        *_curve("bon_gold", ours, prompts, coverage, shown),
        *_curve("bon_oracle", oracle, prompts, coverage, {most}),
        Measure(
            "bon_recovered",
            recovered(ours[:, -1], oracle[:, -1], ours[:, 0], prompts),
            coverage,
            "higher",
            notes=(f"(model − random) / (oracle − random) at n = {most}",),
            unit="number",
            section=SECTION,
        ),
        Measure(
            f"bon_kl_bound/n={most}",
            Estimate(kl_bound(most), None, None, len(used)),
            coverage,
            unit="number",
            notes=("log n − (n − 1)/n nats, an upper bound",),
            section=SECTION,
        ),
    ]


def _curve(
    name: str, curve: np.ndarray, prompts: Sequence[str], coverage: Coverage, shown: set[int]
) -> list[Measure]:
    found = []
    for n in range(1, curve.shape[1] + 1):
        values = [float(v) for v in curve[:, n - 1]]
        what = (
            "a random one" if n == 1 else f"the best of {n} by the {'model' if 'gold' in name else 'scores'}"
        )
        found.append(
            Measure(
                f"{name}/n={n}",
                stats.mean(values, prompts),
                coverage,
                "higher" if name == "bon_gold" and n > 1 else None,
                items=tuple(zip(prompts, values, strict=True)),
                unit="number",
                notes=(what, f"KL from the sampled policy at most {kl_bound(n):.3f} nats"),
                section=SECTION,
                shown=n in shown,
            )
        )
    return found


def recovered(model: np.ndarray, oracle: np.ndarray, random: np.ndarray, prompts: Sequence[str]) -> Estimate:
    """(model − random) / (oracle − random), a ratio of means over prompts (P,), bootstrapped by prompt.

    No value where the oracle gains nothing: then all completions of each prompt have equal scores.
    """

    if not float(oracle.mean()) > float(random.mean()):
        return Estimate(None, None, None, len(model))
    return stats.cluster_bootstrap(np.column_stack([model - random, oracle - random]), prompts, "ratio")


__all__ = [
    "best_of_n",
    "best_of_n_measures",
    "chances",
    "gold_scores",
    "has_gold",
    "kl_bound",
    "recovered",
]
