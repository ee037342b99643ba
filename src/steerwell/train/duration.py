"""How long a pass takes on a machine, from the trace of two batches.

Matrix products take the time that their shapes take on the machine; attention goes by its own rate, all other
operations by the bytes that they move, and each operation costs a little besides. On a CPU the four are
weighted by factors that were fitted to measured runs (``benchmarks/plan_error.py --fit``).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from steerwell.models.render import TokenizedGroup
from steerwell.train.machines import Machine
from steerwell.train.trace import Trace, Work


@dataclass(frozen=True)
class Factors:
    """What a prediction is multiplied by. ``operation`` and ``token`` are seconds for one operation of torch
    and for one token that is packed into a batch by Python; ``file`` seconds for a byte that is written and
    hashed; ``fixed`` seconds of a run besides.
    """

    products: float = 1.0
    attention: float = 1.0
    moved: float = 1.0
    update: float = 1.0
    operation: float = 0.0
    token: float = 0.0
    file: float = 1e-9
    fixed: float = 0.0


#: Fitted on the calibration cases of the benchmark, on one thread: one factor for all computing, and the seconds
#: that go into loading and saving whatever the size.
CPU = Factors(products=1.26, attention=1.26, moved=1.26, update=1.26, fixed=0.7)
#: Nothing is fitted for GPUs: the shares assumed in :mod:`steerwell.train.machines` stand.
CUDA = Factors(token=5e-7, fixed=10.0)


@dataclass(frozen=True)
class Features:
    """Predicted seconds by kind of work, before factors."""

    products: float = 0.0
    attention: float = 0.0
    moved: float = 0.0
    operations: float = 0.0  # how many

    def __add__(self, other: Features) -> Features:
        return Features(*(a + b for a, b in zip(self.tuple(), other.tuple(), strict=True)))

    def __mul__(self, times: float) -> Features:
        return Features(*(a * times for a in self.tuple()))

    def tuple(self) -> tuple[float, float, float, float]:
        """In the order of the fields."""
        return self.products, self.attention, self.moved, self.operations

    def seconds(self, factors: Factors, machine: Machine | None = None) -> float:
        """The weighted sum; on a GPU the host's time for the operations runs beside it."""
        cost = factors.operation + (0.0 if machine is None else machine.operation)
        busy = (
            factors.products * self.products + factors.attention * self.attention + factors.moved * self.moved
        )
        if machine is not None and machine.kind == "cuda":  # the device may wait for the host
            return max(busy, cost * self.operations)
        return busy + cost * self.operations


def features(work: Work, machine: Machine) -> Features:
    """Predicted seconds of a stretch of work."""
    return Features(
        products=sum(machine.seconds(product, count) for product, count in work.products.items()),
        attention=work.attention / machine.attention,
        moved=work.moved / machine.bandwidth,
        operations=work.operations,
    )


@dataclass(frozen=True)
class Cost:
    """The cost of a pass over any batch: a line in tokens for the layers, one in scored tokens for the head,
    and attention by the area of its scores.
    """

    base: Features
    per_token: Features
    per_scored: Features
    per_area: Features

    def of(self, tokens: float, scored: float, area: float, batches: float = 1.0) -> Features:
        """Over ``batches`` micro-batches that have so many tokens, scored tokens and scores in all."""
        return self.base * batches + self.per_token * tokens + self.per_scored * scored + self.per_area * area


def cost(large: Trace, small: Trace, areas: tuple[float, float], machine: Machine) -> Cost:
    """The cost of a pass from the traces of a large and a smaller batch with these areas."""
    body, other = features(large.body, machine), features(small.body, machine)
    head, less = features(large.head, machine), features(small.head, machine)
    attention = Features(attention=body.attention / max(1.0, areas[0]))
    body, other = (Features(x.products, 0.0, x.moved, x.operations) for x in (body, other))
    base, per_token = _line(body, other, large.tokens, small.tokens)
    head_base, per_scored = _line(head, less, large.scored, small.scored)
    return Cost(base + head_base, per_token, per_scored, attention)


def _line(large: Features, small: Features, x: int, less: int) -> tuple[Features, Features]:
    """Intercept and slope through two points; through the origin where they are one."""
    if x <= less:
        return Features(), large * (1 / max(1, x))
    base: list[float] = []
    slope: list[float] = []
    for a, b in zip(large.tuple(), small.tuple(), strict=True):
        rise = max(0.0, (a - b) / (x - less))
        rise = min(rise, a / x)  # an intercept below zero is noise
        slope.append(rise)
        base.append(a - rise * x)
    return Features(*base), Features(*slope)


def area(groups: Iterable[TokenizedGroup], tree: bool = True) -> float:
    """Query × key scores of groups: in a tree p² for a prompt of p tokens, and c (p + c) for a completion of c
    tokens; in rows (p + c)² for each completion. The causally masked half counts.
    """
    total = 0.0
    for group in groups:
        lengths = [(s.n_prompt, len(s.ids)) for s in group.sequences]
        if tree and lengths:
            total += lengths[0][0] ** 2 + sum((whole - prompt) * whole for prompt, whole in lengths)
        else:
            total += sum(whole * whole for _, whole in lengths)
    return total


def areas(batches: Sequence[Sequence[TokenizedGroup]], tree: bool) -> float:
    """The area of all batches."""
    return sum(area(batch, tree) for batch in batches)


__all__ = ["CPU", "CUDA", "Cost", "Factors", "Features", "area", "areas", "cost", "features"]
