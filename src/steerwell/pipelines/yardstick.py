"""One measure for policies that were trained by different objectives: all against the model that they started from.

What an objective calls its reward has a unit of its own (``beta`` times a log-ratio, a mean log-prob, an odds ratio),
so held-out figures of two objectives cannot be set side by side. Here everything is made of one quantity, the
log-ratio of a completion to the start model, h(y) = log pi(y|x) - log start(y|x), summed over tokens, in nats:

- accuracy: share of held-out pairs with h(chosen) > h(rejected), ties half. It is the accuracy of the implicit reward
  of DPO (arXiv:2305.18290, equation 5) for every beta > 0, and is asked of reference-free objectives too.
- margin: mean of h(chosen) - h(rejected).
- chosen shift: mean of h(chosen) / |chosen|, nats per token; below 0 the preferred completions have become less
  likely (likelihood displacement, arXiv:2410.08847).
- KL to the start: over fresh samples of the policy, the sum over tokens of exp(d) - 1 - d with
  d = log start - log pi of the token (k3 of http://joschu.net/blog/kl-approx.html). Given what came before a token
  its mean is the KL there, so the sum has the sequence's KL (of the tokens that were sampled) as its mean, and each
  term is at least 0. ``kl_k1`` is the mean of -d, summed: the same mean and a larger spread.
- win rate: on the prompts of the embedded world, how often gold prefers the policy's sample to the start's.

Intervals are 95%, with a prompt's pairs as one cluster. They cover the choice of pairs, prompts and samples, not the
seed of training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch

from steerwell import world
from steerwell.data.messages import digest
from steerwell.data.types import CompletionGroup, Prompt
from steerwell.evals import stats
from steerwell.evals.stats import Estimate
from steerwell.evals.tasks.pair_accuracy import accuracy
from steerwell.evals.winrate import compare_scores
from steerwell.models.batch import build, layout_for, pack
from steerwell.models.forward import per_token_logps
from steerwell.models.load import MAX_TOKENS, Policy, evaluating, load_policy

FORMAT = "yardstick-1"


@dataclass(frozen=True)
class Figures:
    """What one policy came to. ``tokens`` is the mean length of its samples, ``unfinished`` how many of them were cut
    off; ``win_rate`` is None where there is no gold.
    """

    accuracy: Estimate
    margin: Estimate
    chosen_shift: Estimate
    kl: Estimate
    kl_k1: Estimate
    tokens: Estimate
    unfinished: int
    win_rate: Estimate | None

    def to_dict(self) -> dict[str, Any]:
        """The JSON form."""
        return {
            name: value.to_dict() if isinstance(value, Estimate) else value
            for name, value in vars(self).items()
        }

    @classmethod
    def from_dict(cls, value: dict[str, Any]) -> Figures:
        """Read the JSON form back."""
        known: dict[str, Any] = {
            k: Estimate.from_dict(v) if isinstance(v, dict) else v for k, v in value.items()
        }
        return cls(**known)


@dataclass(frozen=True)
class Yardstick:
    """What every contender is measured by. ``groups`` have pairs; ``prompts`` are sampled once each."""

    start_path: str
    groups: Sequence[CompletionGroup]
    prompts: Sequence[Prompt]
    max_new_tokens: int
    max_length: int | None = None
    seed: int = 0
    dtype: str = "auto"
    _cache: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @cached_property
    def gold(self) -> bool:
        """Whether gold can judge the samples: every prompt is one of the embedded world's."""
        return all(world.read(prompt.messages[-1].content) is not None for prompt in self.prompts)

    @cached_property
    def pairs(self) -> int:
        """How many held-out pairs there are."""
        return sum(len(group.pairs) for group in self.groups)

    def key(self, run: str) -> str:
        """What decides the figures of a run: its own identity, the pairs, the prompts and how they are sampled."""
        pairs = [[[c.id for c in g.completions], [list(p) for p in g.pairs]] for g in self.groups]
        asked = [prompt.id for prompt in self.prompts]
        how = [self.max_new_tokens, self.max_length, self.seed, self.dtype]
        return digest(FORMAT, run, pairs, asked, how)

    def load(self, path: str) -> Policy:
        """A policy of the comparison, in the number type of the recipe."""
        return load_policy(path, dtype=None if self.dtype == "auto" else self.dtype)

    def sample(self, policy: Policy) -> list[CompletionGroup]:
        """One completion for each prompt, at temperature 1, with the comparison's seed."""
        return policy.sample(self.prompts, 1, max_new_tokens=self.max_new_tokens, seed=self.seed)

    @property
    def start(self) -> Policy:
        """The model that all contenders started from; loaded when it is first asked for."""
        return self._kept("start", lambda: self.load(self.start_path))

    @property
    def fitting(self) -> list[CompletionGroup]:
        """The held-out groups whose prompts leave room for a completion; training leaves the others out too."""
        return self._kept("fitting", self._fitting)

    def _fitting(self) -> list[CompletionGroup]:
        tokens = self.start.tokenize(self.groups)
        limit = math.inf if self.max_length is None else self.max_length
        return [t.group for t in tokens if all(sequence.n_prompt < limit for sequence in t.sequences)]

    def _kept(self, name: str, make: Any) -> Any:
        if name not in self._cache:
            self._cache[name] = make()
        return self._cache[name]

    def measure(self, policy: Policy) -> Figures:
        """The figures of a policy."""
        groups = self.fitting
        before = self._kept("pairs", lambda: token_logps(self.start, groups, self.max_length))
        after = token_logps(policy, groups, self.max_length)
        ratios = [
            [math.fsum(a) - math.fsum(b) for a, b in zip(x, y, strict=True)]
            for x, y in zip(after, before, strict=True)
        ]
        lengths = [[len(tokens) for tokens in group] for group in before]
        samples = self.sample(policy)
        kl, kl_k1 = divergences(token_logps(policy, samples), token_logps(self.start, samples))
        drawn = [group.completions[0] for group in samples]
        return Figures(
            accuracy=accuracy(groups, ratios, "log-ratio to the start model").estimate,
            **_of_pairs(groups, ratios, lengths),
            kl=_at_least_zero(stats.mean(kl)),
            kl_k1=stats.mean(kl_k1),
            tokens=stats.mean([float(len(one.token_ids or ())) for one in drawn]),
            unfinished=sum(one.finished is False for one in drawn),
            win_rate=self._win_rate(samples) if self.gold else None,
        )

    def _win_rate(self, samples: Sequence[CompletionGroup]) -> Estimate:
        theirs = self._kept("gold", lambda: _worth(self.sample(self.start)))
        return compare_scores(_worth(samples), theirs, [prompt.id for prompt in self.prompts]).estimate


def _at_least_zero(found: Estimate) -> Estimate:
    """The estimate of a mean of values that are none below 0: its interval ends there too."""
    return found if found.low is None else replace(found, low=max(0.0, found.low))


def _worth(groups: Sequence[CompletionGroup]) -> list[float | None]:
    return [found[0].gold for found in world.verdicts(groups)]


def _of_pairs(
    groups: Sequence[CompletionGroup], ratios: Sequence[Sequence[float]], lengths: Sequence[Sequence[int]]
) -> dict[str, Estimate]:
    """Margin and chosen shift over all pairs; one with p < 0.5 is turned round, one with p = 0.5 has no chosen side."""
    margins: list[float] = []
    shifts: list[float] = []
    prompts: list[str] = []
    for group, h, size in zip(groups, ratios, lengths, strict=True):
        for pair in group.pairs:
            if pair.p == 0.5:
                continue
            one, other = (pair.chosen, pair.rejected) if pair.p > 0.5 else (pair.rejected, pair.chosen)
            margins.append(h[one] - h[other])
            shifts.append(h[one] / max(1, size[one]))
            prompts.append(group.prompt_id)
    clusters = prompts if len(set(prompts)) < len(prompts) else None
    return {"margin": stats.mean(margins, clusters), "chosen_shift": stats.mean(shifts, clusters)}


def divergences(
    policy: Sequence[Sequence[Sequence[float]]], start: Sequence[Sequence[Sequence[float]]]
) -> tuple[list[float], list[float]]:
    """k3 and k1 of every completion from its tokens' log-probs under the policy that sampled it and the start."""
    k3: list[float] = []
    k1: list[float] = []
    for ours, theirs in zip(policy, start, strict=True):
        for mine, own in zip(ours, theirs, strict=True):
            d = [b - a for a, b in zip(mine, own, strict=True)]
            k3.append(math.fsum(math.expm1(x) - x for x in d))
            k1.append(-math.fsum(d))
    return k3, k1


@torch.no_grad()
def token_logps(
    policy: Policy, groups: Sequence[CompletionGroup], max_length: int | None = None
) -> list[list[list[float]]]:
    """Log-probs (nats) of the scored tokens, one list per completion of each group."""
    tokens = policy.tokenize(groups, max_length)
    layout, device = layout_for("auto", policy.model), policy.device
    out: list[list[list[float]]] = [[] for _ in tokens]
    with evaluating(policy.model):
        for members in pack(tokens, MAX_TOKENS, layout):
            batch = build([tokens[i] for i in members], layout).to(device)
            values = per_token_logps(policy.model, batch).split([int(n) for n in batch.lengths.tolist()])
            for owner, own in zip(batch.group.tolist(), values, strict=True):
                out[members[owner]].append(own.double().tolist())
    return out


__all__ = ["Figures", "Yardstick", "divergences", "token_logps"]
