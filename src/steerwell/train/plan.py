"""What a recipe will take before it runs: tokens, memory by part, time, and what to change when it won't fit.

``steerwell plan RECIPE.toml``. The data are read as training reads them, the model is built without weights on
the meta device, and the largest micro-batch is traced there. How far the figures are from what is measured
is on the page ``docs/planning.md``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from steerwell.data.errors import InputError
from steerwell.train.census import Census
from steerwell.train.config import Recipe
from steerwell.train.forecast import Forecast
from steerwell.train.job import read
from steerwell.train.machines import Machine, at_hand, named, own_memory
from steerwell.train.memory import Peak, device_kind

#: For the printed intervals on a CPU: more than the largest relative errors of the benchmark
#: (``benchmarks/results/plan_error.json``), as other machines and times are not that one.
MEMORY_ERROR, TIME_ERROR = 0.20, 0.40
#: For a GPU that was not measured; assumptions.
GPU_MEMORY_ERROR, GPU_TIME_ERROR = 0.20, 0.60
#: Share of the memory that a plan may fill.
USABLE = 0.95


@dataclass(frozen=True)
class Mend:
    """One setting to change, with what it would bring: ``peak`` in bytes, and whether the run fits then."""

    setting: str
    peak: int
    fits: bool
    why: str


@dataclass(frozen=True)
class Plan:
    """What a run will take. Bytes on one device, seconds for the whole run."""

    machine: Machine
    model: dict[str, Any]
    data: dict[str, Any]
    batches: dict[str, Any]
    peak: Peak
    interval: tuple[int, int]
    seconds: dict[str, float]
    seconds_interval: tuple[float, float]
    flops: float
    fits: bool
    mends: list[Mend]
    notes: list[str]
    census: Census = field(repr=False)

    @property
    def total_seconds(self) -> float:
        """The whole run."""
        return sum(self.seconds.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        machine = self.machine
        return {
            "fits": self.fits,
            "model": self.model,
            "data": self.data,
            "batches": self.batches,
            "memory": {
                "moment": self.peak.moment,
                "parts": self.peak.parts,
                "total": self.peak.total,
                "low": self.interval[0],
                "high": self.interval[1],
                "available": machine.memory,
            },
            "time": {
                "parts": self.seconds,
                "total": self.total_seconds,
                "low": self.seconds_interval[0],
                "high": self.seconds_interval[1],
                "flops": self.flops,
            },
            "machine": {
                "name": machine.name,
                "kind": machine.kind,
                "count": machine.count,
                "measured": machine.measured,
                "flops_per_second": machine.rate,
            },
            "mends": [asdict(mend) for mend in self.mends],
            "notes": self.notes,
        }


def plan(recipe: Recipe, gpu: str | None = None, count: int = 1) -> Plan:
    """What ``recipe`` will take on the machine at hand, or on ``count`` GPUs of a name (``h100-80gb``).

    No weight is loaded. Raises :class:`InputError` for what training would refuse before it starts, and for an
    unknown GPU.
    """
    if gpu is None and count != 1:
        raise InputError("count is for named GPUs", mend="Give gpu too, for example h100-80gb.")
    target = named(gpu, count) if gpu is not None else None
    job = read(recipe, "cuda" if target is not None else device_kind(), count)
    work = Forecast(job)
    held = own_memory() if work.census.items else 0  # what a run holds too, before it makes a tensor
    machine = target or at_hand(work.products, work.heads, held)
    if _checkpointing(work, machine):
        work = replace(work, checkpointing=True)
    top = work.peak(machine.reserved)
    notes = [*job.notes, *_notes(work, machine)]
    error = MEMORY_ERROR if machine.kind == "cpu" else GPU_MEMORY_ERROR
    moving = (top.total - machine.reserved) * error
    seconds = work.seconds(machine)
    spread = TIME_ERROR if machine.kind == "cpu" else GPU_TIME_ERROR
    total = sum(seconds.values())
    fits = top.total <= USABLE * machine.memory
    return Plan(
        machine=machine,
        model=work.about_model(),
        data=work.about_data(),
        batches=work.about_batches(),
        peak=top,
        interval=(round(top.total - moving), round(top.total + moving)),
        seconds=seconds,
        seconds_interval=(total * (1 - spread), total * (1 + spread)),
        flops=work.flops,
        fits=fits,
        mends=[] if fits else _mends(work, machine),
        notes=notes,
        census=work.census,
    )


def _checkpointing(work: Forecast, machine: Machine) -> bool:
    """Whether layers are computed again: as asked, or where the memory needs it."""
    asked = work.config.gradient_checkpointing
    if asked != "auto":
        return bool(asked)
    return work.peak(machine.reserved).total > USABLE * machine.memory


def _notes(work: Forecast, machine: Machine) -> list[str]:
    notes: list[str] = []
    census, config = work.census, work.config
    over = [item for item in census.items if item.size > config.max_tokens]
    if over:
        largest = max(over, key=lambda item: item.size)
        notes.append(
            f"{len(over)} of {len(census.items)} groups have more than max_tokens = {config.max_tokens} tokens "
            f"(most: {largest.size}, prompt {largest.prompt_id}) and get a micro-batch of their own"
        )
    if census.about.get("truncated_completions"):
        notes.append(
            f"{census.about['truncated_completions']} completions lose their end to max_length = {config.max_length}"
        )
    if census.about.get("groups_left_out"):
        notes.append(f"{census.about['groups_left_out']} groups have nothing that the objective takes")
    if census.upper_bound:
        notes.append("rollouts: tokens, memory and time are upper bounds (no completion stops early)")
        notes.append("the judge's own time is not in the plan")
    if not machine.measured:
        notes.append(
            f"{machine.name} was not measured: rates from its data sheet, matrix products at "
            f"{machine.rate / 1e12:.0f} TFLOPS"
        )
    return notes


def _mends(work: Forecast, machine: Machine) -> list[Mend]:
    """What to change, in the order to try it, each with its own forecast (and with what stands before it in
    force only where it says so).
    """
    found: list[Mend] = []

    def consider(setting: str, changed: Forecast, why: str) -> bool:
        top = changed.peak(machine.reserved).total
        found.append(Mend(setting, top, top <= USABLE * machine.memory, why))
        return found[-1].fits

    if not work.checkpointing:
        again = replace(work, checkpointing=True)
        if consider("train.gradient_checkpointing=true", again, "layers are computed twice instead of kept"):
            work = again
    largest = max(sum(item.size for item in items) for items in work.census.micro_batches)
    least = max(item.size for item in work.census.items)
    tokens = min(work.config.max_tokens, largest) // 2
    while tokens >= least // 2 and tokens > 0:
        tokens = max(tokens, least)
        if consider(f"train.max_tokens={tokens}", replace(work, max_tokens=tokens), "smaller micro-batches"):
            break
        if tokens == least:
            break
        tokens //= 2
    if work.job.recipe.lora is None and not work.job.reward:
        consider("lora=16", replace(work, lora=16), "no gradients and moments for the weights themselves")
    lengths = sorted(len(s.ids) for item in work.census.items for s in item.tokens.sequences)
    typical = lengths[int(0.95 * (len(lengths) - 1))]
    if work.job.source is None and typical < 0.8 * lengths[-1]:
        consider(
            f"train.max_length={typical}", replace(work, max_length=typical), "cuts the longest 5 % of rows"
        )
    if machine.kind == "cuda":
        count = 2 * work.devices
        while count <= 64 and not consider(
            f"--count {count}", replace(work, count=count), "weights and moments are shared out"
        ):
            count *= 2
    return found


__all__ = ["Mend", "Plan", "plan"]
