"""The figures of a recipe under settings that may be varied: what it reads, holds and computes.

A :class:`Forecast` is one way to run a :class:`~steerwell.train.job.Job`.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from steerwell.models.batch import Layout, build, layout_for
from steerwell.models.render import TokenizedGroup
from steerwell.train import duration
from steerwell.train.census import Census, cut, recorded, sampled
from steerwell.train.config import TrainConfig
from steerwell.train.items import Item
from steerwell.train.job import Job
from steerwell.train.machines import Machine
from steerwell.train.memory import Holding, Peak, cache_bytes, peak
from steerwell.train.reference import LIVE_NAMES, REFERENCE_NAMES
from steerwell.train.skeleton import Skeleton, skeleton
from steerwell.train.terms import needed
from steerwell.train.trace import Product, Trace, trace

Sums = tuple[float, float, float, float]  # tokens, scored tokens, area, micro-batches


@dataclass(frozen=True)
class Forecast:
    """The figures of a job under settings that a mend may change. Everything is made when first asked for."""

    job: Job
    max_tokens: int | None = None
    max_length: int | None = None
    lora: int | None = None
    count: int | None = None
    checkpointing: bool = False

    @cached_property
    def config(self) -> TrainConfig:
        changes: dict[str, Any] = {}
        if self.max_tokens is not None:
            changes["max_tokens"] = self.max_tokens
        if self.max_length is not None:
            changes["max_length"] = self.max_length
        return self.job.config.model_copy(update=changes)

    @property
    def devices(self) -> int:
        return self.count or self.job.count

    @cached_property
    def skeleton(self) -> Skeleton:
        job = self.job
        return skeleton(job.recipe.model, reward=job.reward, dtype=job.dtype, **self.adapter)

    @property
    def adapter(self) -> dict[str, Any]:
        """Rank, kind and layers of the adapter."""
        return self.job.adapter | ({"lora": self.lora} if self.lora is not None else {})

    @cached_property
    def layout(self) -> Layout:
        return layout_for(self.config.layout, self.skeleton.model)

    @cached_property
    def census(self) -> Census:
        job, config = self.job, self.config
        if job.source is not None:
            return sampled(job.source, job.tokenizer, config, self.layout, job.context, self.devices)
        data, held_out, seconds = job.items(config, self.layout)
        return recorded(data, held_out, config, self.layout, seconds, self.devices)

    @cached_property
    def reading(self) -> list[list[Item]]:
        """Micro-batches of one reference pass and of one evaluation; the former first."""
        found = list(self.census.eval_items)
        if self.needs_reference and self.job.source is None:
            found = [*self.census.items, *found]
        return cut(found, self.config.max_tokens, self.layout)

    @property
    def needs_reference(self) -> bool:
        names = needed(self.job.terms)
        return bool(names & (REFERENCE_NAMES | LIVE_NAMES)) or self.job.source is not None

    @property
    def references(self) -> int:
        """Bytes of models beside the one in training."""
        job = self.job
        skel = self.skeleton
        beside = skel.passed
        if not self.needs_reference or job.reward or job.recipe.reference == "none":
            return beside
        if job.recipe.reference != "start":
            return beside + skeleton(job.recipe.reference, dtype=job.dtype).weights
        adapted = (self.lora or job.recipe.lora) is not None
        if adapted or (job.source is None and not LIVE_NAMES & needed(job.terms)):
            return beside
        return beside + skel.weights

    @cached_property
    def largest(self) -> list[Item]:
        """The largest micro-batch of training."""
        return most(self.census.micro_batches)

    @cached_property
    def largest_read(self) -> list[Item] | None:
        """The largest micro-batch that is read without gradient; None where there is none."""
        if self.reading:
            return most(self.reading)
        return self.largest if self.job.source is not None else None

    @cached_property
    def training_trace(self) -> Trace:
        """A training pass over the largest micro-batch."""
        return self._trace(self.largest, True)

    @cached_property
    def reading_trace(self) -> Trace | None:
        """A pass without gradient over the largest micro-batch that is read so."""
        return self._trace(self.largest_read, False) if self.largest_read else None

    def _trace(self, items: list[Item], backward: bool) -> Trace:
        return trace(
            self.skeleton.model,
            build([item.tokens for item in items], self.layout),
            backward=backward,
            accumulate=self.accumulates,
            pooling=self.config.pooling if self.job.reward else None,
            accelerator=self.job.kind == "cuda",
            checkpointing=self.checkpointing,
            masters=self.skeleton.size < 4,
        )

    @property
    def accumulates(self) -> bool:
        return len(self.census.micro_batches) > self.census.walked

    @property
    def products(self) -> Counter[Product]:
        """The matrix products of the largest training pass."""
        large = self.training_trace
        return large.body.products + large.head.products

    @property
    def heads(self) -> tuple[int, int]:
        inner = self.skeleton.model.config.get_text_config()
        count = inner.num_attention_heads
        return count, getattr(inner, "head_dim", None) or inner.hidden_size // count

    def peak(self, reserved: int) -> Peak:
        """The most that one device holds; ``reserved`` is held before the run."""
        holding = Holding(
            self.skeleton,
            self.job.kind,
            self.devices,
            beside=self.references,
            cache=self._cache(),
            reserved=reserved,
            accumulates=self.accumulates,
        )
        return peak(holding, self.training_trace, self.reading_trace)

    def _cache(self) -> int:
        source = self.job.source
        if source is None:
            return 0
        rows = min(source.batch_size, source.prompts_per_step * source.n)
        longest = max(len(s.ids) for item in self.census.items for s in item.tokens.sequences)
        more = rows < source.prompts_per_step * source.n
        slots = longest + (max(32, longest // 2) if more else 0)
        return cache_bytes(self.skeleton.model.config, rows, slots, self.skeleton.size)

    @property
    def tree(self) -> bool:
        return self.layout == "tree"

    def _area(self, read: list[list[Item]]) -> float:
        return duration.areas([[item.tokens for item in items] for items in read], self.tree)

    def costs(self, machine: Machine) -> tuple[duration.Cost, duration.Cost | None]:
        """The cost of a training pass, and of one without gradient."""
        training = self._cost(self.training_trace, self.largest, True, machine)
        if self.reading_trace is None or self.largest_read is None:
            return training, None
        return training, self._cost(self.reading_trace, self.largest_read, False, machine)

    def _cost(self, large: Trace, items: list[Item], backward: bool, machine: Machine) -> duration.Cost:
        less = _half(items)
        areas = self._area([items]), self._area([less])
        return duration.cost(large, self._trace(less, backward), areas, machine)

    @cached_property
    def work(self) -> _Work:
        """What all the steps, and all the passes without gradient, read."""
        return _work(self)

    def features(self, machine: Machine) -> dict[str, Any]:
        """Predicted seconds before factors, by part of the run; bytes for updates and files."""
        training, reading = self.costs(machine)
        work = self.work
        skel = self.skeleton
        steps = self.census.steps
        found: dict[str, Any] = {"training": training.of(*work.training)}
        if reading is not None:
            found["reference"] = reading.of(*work.reference)
            found["evaluation"] = reading.of(*work.evaluation)
        every = self.config.checkpoint_every or math.ceil(steps / 10)
        saved = (steps - 1) // every
        shared = skel.trainable / self.devices
        found["update"] = steps * shared * 40.0 / machine.bandwidth
        found["files"] = saved * skel.trainable * 12.0 * 2 + 3.0 * skel.weights
        found["tokens"] = sum(part[0] for part in (work.training, work.reference, work.evaluation))
        return found

    def seconds(self, machine: Machine) -> dict[str, float]:
        """Predicted seconds of the run, by part."""
        factors = duration.CPU if machine.kind == "cpu" else duration.CUDA
        found = self.features(machine)
        parts = {
            name: found[name].seconds(factors, machine)
            for name in ("training", "reference", "evaluation")
            if name in found
        }
        if self.devices > 1:
            parts["training"] = max(parts["training"], self._sending(machine))
        parts["update"] = factors.update * found["update"]
        parts["tokenising and packing"] = self.census.seconds + factors.token * found["tokens"]
        if self.job.source is not None:
            parts["sampling"] = self._sampling(machine, factors)
        parts["files and start"] = factors.file * found["files"] + factors.fixed
        return {name: second for name, second in parts.items() if second > 0}

    def _sending(self, machine: Machine) -> float:
        """Seconds in which weights and gradients cross the link: weights twice, gradients in fp32 once."""
        share = (self.devices - 1) / self.devices
        each = share * (2 * self.skeleton.total * self.skeleton.size + 4 * self.skeleton.trainable)
        return self.work.training[3] * each / machine.link

    def _sampling(self, machine: Machine, factors: duration.Factors) -> float:
        """An upper bound: every completion as long as it may become, one token of every row at a time."""
        source, reading = self.job.source, self.costs(machine)[1]
        assert source is not None
        assert reading is not None
        sets = max(1, self.census.steps // source.updates)
        total = source.prompts_per_step * source.n
        rows = min(source.batch_size, total)
        prompts = sum(item.tokens.sequences[0].n_prompt for item in self.census.items) / len(
            self.census.items
        )
        passes = math.ceil(total / rows) * source.max_new_tokens
        read = reading.of(source.prompts_per_step * prompts, source.prompts_per_step, 0.0, 1.0)
        width = prompts + source.max_new_tokens / 2
        step = reading.of(rows, rows, rows * width, 1.0)
        return sets * (read + step * passes).seconds(factors, machine)

    @property
    def flops(self) -> float:
        """Floating-point operations of training, two per multiply-add, recomputation included."""
        large = self.training_trace
        per_token = large.body.flops / large.tokens
        per_scored = large.head.flops / max(1, large.scored)
        attention = large.body.attention / max(1.0, self._area([self.largest]))
        tokens, scored, area, _ = self.work.training
        return per_token * tokens + per_scored * scored + attention * area

    def about_model(self) -> dict[str, Any]:
        skel = self.skeleton
        adapter = self.adapter
        asked = adapter["lora"] is not None
        return {
            "name": skel.name,
            "kind": "reward model" if self.job.reward else "policy",
            "architecture": type(getattr(skel.model, "get_base_model", lambda: skel.model)()).__name__,
            "parameters": skel.total,
            "trainable": skel.trainable,
            "adapter": f"{adapter['adapter']} of rank {adapter['lora']}" if asked else None,
            "dtype": str(skel.dtype).removeprefix("torch."),
            "gradient_checkpointing": self.checkpointing,
        }

    def about_data(self) -> dict[str, Any]:
        census = self.census
        return {
            **census.about,
            "upper_bound": census.upper_bound,
            "tokens_as_rows": census.tokens_rows,
            "tokens_padded": census.tokens_padded,
            "histogram": [list(bar) for bar in census.histogram],
            "longest": [asdict(row) for row in census.longest],
            "eval_groups": len(census.eval_items),
            "eval_tokens": sum(item.size for item in census.eval_items),
        }

    def about_batches(self) -> dict[str, Any]:
        census = self.census
        sizes = [sum(item.size for item in items) for items in census.micro_batches]
        return {
            "layout": self.layout,
            "why": _why(self.config.layout, self.layout, census),
            "steps": census.steps,
            "passes": census.passes,
            "micro_batches_per_step": len(sizes) / max(1, census.walked),
            "tokens_per_micro_batch": {"mean": sum(sizes) / len(sizes), "largest": max(sizes)},
            "max_tokens": self.config.max_tokens,
            "groups_above_max_tokens": sum(item.size > self.config.max_tokens for item in census.items),
        }


@dataclass(frozen=True)
class _Work:
    """(tokens, scored tokens, area, micro-batches) of the whole run, on each device."""

    training: Sums
    reference: Sums
    evaluation: Sums


def _work(forecast: Forecast) -> _Work:
    census, job, devices = forecast.census, forecast.job, forecast.devices
    training = _sums(forecast, census.micro_batches, census.steps / census.walked)
    none: Sums = (0.0, 0.0, 0.0, 0.0)
    kl = "kl" in needed(job.terms)
    evaluation = reference = none
    if census.eval_items:
        every = forecast.config.eval_every
        times = 2 + ((census.steps - 1) // every if every else 0)
        read = cut(census.eval_items, forecast.config.max_tokens, forecast.layout)
        evaluation = _sums(forecast, read, times * (3 if kl else 1))
    if job.source is not None and job.recipe.reference != "none":
        reference = training
    elif needed(job.terms) & REFERENCE_NAMES:
        share = min(1.0, census.passes) if job.config.steps else 1.0
        reference = _sums(forecast, forecast.reading, share / devices)
    if "per_token_kl" in needed(job.terms):  # the reference reads every step
        a, b, c, d = (x + y for x, y in zip(reference, training, strict=True))
        reference = a, b, c, d
    if kl:  # the policy and the reference read every completion once more, under another prompt
        a, b, c, d = (x + 2 * y for x, y in zip(reference, training, strict=True))
        reference = a, b, c, d
    return _Work(training, reference, evaluation)


def _sums(forecast: Forecast, read: list[list[Item]], times: float) -> Sums:
    tokens = sum(item.size for items in read for item in items)
    scored = sum(sum(item.lengths) for items in read for item in items)
    return times * tokens, times * scored, times * forecast._area(read), times * len(read)


def most(cut: list[list[Item]]) -> list[Item]:
    """The micro-batch with most tokens; among equals the one with most scored tokens."""
    return max(cut, key=lambda items: (sum(i.size for i in items), sum(sum(i.lengths) for i in items)))


def _half(items: list[Item]) -> list[Item]:
    """About half of a micro-batch: every other group, or half of the completions of a single one."""
    if len(items) > 1:
        return items[::2]
    (item,) = items
    sequences = item.tokens.sequences[: max(1, len(item.tokens.sequences) // 2)]
    tokens = TokenizedGroup(sequences, item.tokens.group, [False] * len(sequences))
    return [replace(item, tokens=tokens, lengths=item.lengths[: len(sequences)])]


def _why(asked: str, layout: str, census: Census) -> str:
    saved = 1 - census.tokens / max(1, census.tokens_rows)
    if asked != "auto":
        return f"the recipe says {asked}"
    if layout != "tree":
        return "the model cannot take a tree"
    return f"it encodes each prompt once and so {saved:.0%} fewer tokens than rows"


__all__ = ["Forecast", "most"]
