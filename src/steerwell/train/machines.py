"""What a machine can do: named GPUs from a table, and the machine at hand by measuring it for a moment."""

from __future__ import annotations

import math
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from steerwell.data.errors import InputError, nearest
from steerwell.train.trace import Product

GB, MiB = 10**9, 2**20

#: What a GPU keeps for the CUDA context, cuBLAS workspaces and kernels, in bytes: an assumption.
CONTEXT = 1200 * MiB
#: Share of a GPU's peak rate that large matrix products reach, and share of its bandwidth that all other
#: operations reach: assumptions, stated in the plan. Measured utilisation replaces them where a GPU is at hand.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.65, 0.35, 0.7
#: Seconds of the host per operation; a GPU waits for it when the operations are small. An assumption.
LAUNCH = 8e-6


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: bf16 rate without sparsity and with fp32 accumulation (operations per second),
    memory as the driver reports it (bytes), memory bandwidth and that of the link to its neighbours, one way
    (bytes per second).
    """

    rate: float
    memory: int
    bandwidth: float
    link: float = 25 * GB


# Rates and bandwidths from the makers' data sheets, halved where those state them with sparsity; memory from
# nvidia-smi. NVLink: 450 GB/s each way for Hopper, 300 for Ampere, 900 for Blackwell. PCIe 4.0 x16: 25 GB/s.
GPUS: dict[str, Gpu] = {
    # NVIDIA B200 (HGX B200 data sheet): 2.25 PFLOPS dense bf16, 7.7 TB/s
    "b200-180gb": Gpu(2250e12, 183359 * MiB, 7700 * GB, 900 * GB),
    # NVIDIA H200 and H100 SXM data sheets: 989.4 TFLOPS; 4.8 and 3.35 TB/s
    "h200-141gb": Gpu(989.4e12, 143771 * MiB, 4800 * GB, 450 * GB),
    "h100-80gb": Gpu(989.4e12, 81559 * MiB, 3350 * GB, 450 * GB),
    # NVIDIA H100 PCIe data sheet: 756 TFLOPS, 2.0 TB/s
    "h100-pcie-80gb": Gpu(756e12, 81559 * MiB, 2000 * GB),
    # NVIDIA A100 SXM data sheet: 312 TFLOPS; 1.555 and 2.039 TB/s
    "a100-80gb": Gpu(312e12, 81920 * MiB, 2039 * GB, 300 * GB),
    "a100-40gb": Gpu(312e12, 40960 * MiB, 1555 * GB, 300 * GB),
    # NVIDIA L40S data sheet: 362 TFLOPS, 864 GB/s
    "l40s-48gb": Gpu(362e12, 46068 * MiB, 864 * GB),
    # NVIDIA L4 data sheet: 121 TFLOPS, 300 GB/s
    "l4-24gb": Gpu(121e12, 23034 * MiB, 300 * GB),
    # NVIDIA A10G (AWS G5): 70 TFLOPS, 600 GB/s
    "a10g-24gb": Gpu(70e12, 23028 * MiB, 600 * GB),
    # NVIDIA Blackwell and Ada GPU architecture papers, GeForce, fp32 accumulation
    "rtx5090-32gb": Gpu(209.5e12, 32607 * MiB, 1792 * GB),
    "rtx4090-24gb": Gpu(165.2e12, 24564 * MiB, 1008 * GB),
    # NVIDIA Ampere GA102 architecture paper: 71 TFLOPS, 936 GB/s
    "rtx3090-24gb": Gpu(71e12, 24576 * MiB, 936 * GB),
}


@dataclass(frozen=True)
class Machine:
    """Where a run would take place.

    ``memory`` are the bytes that the run may take on each device. ``seconds`` gives the time of ``count``
    matrix products of a shape in the training type; ``attention`` is a rate in operations per second,
    ``bandwidth`` in bytes per second, ``operation`` the seconds that each operation costs besides.
    ``measured`` is False for a GPU that is known by its data sheet only.
    """

    name: str
    kind: str  # cpu | cuda
    count: int
    memory: int
    reserved: int  # bytes that are taken before any tensor is made
    seconds: Callable[[Product, int], float] = field(repr=False)
    attention: float
    bandwidth: float
    operation: float
    link: float
    measured: bool
    rate: float  # of large matrix products, operations per second


def named(name: str, count: int = 1) -> Machine:
    """``count`` GPUs of the table. Raises :class:`InputError` for an unknown name."""
    short = {key.rsplit("-", 1)[0]: key for key in GPUS if key.rsplit("-", 1)[0] not in ("a100",)}
    key = short.get(name.lower(), name.lower())
    if key not in GPUS:
        raise InputError(f"unknown GPU {name!r}", mend=nearest(name.lower(), GPUS))
    if count < 1:
        raise InputError(f"count must be at least 1, got {count}")
    gpu = GPUS[key]

    def seconds(product: Product, times: int) -> float:
        flops = 2.0 * product.m * product.k * product.n
        moved = 2.0 * (product.m * product.k + product.k * product.n + product.m * product.n)
        least = moved / (gpu.bandwidth * BANDWIDTH_SHARE)
        return times * max(flops / (gpu.rate * PRODUCT_SHARE), least)

    return Machine(
        name=key,
        kind="cuda",
        count=count,
        memory=gpu.memory,
        reserved=CONTEXT,
        seconds=seconds,
        attention=gpu.rate * ATTENTION_SHARE,
        bandwidth=gpu.bandwidth * BANDWIDTH_SHARE,
        operation=LAUNCH,
        link=gpu.link,
        measured=False,
        rate=gpu.rate * PRODUCT_SHARE,
    )


def at_hand(
    products: Counter[Product], heads: tuple[int, int], held: int = 0, budget: float = 0.8
) -> Machine:
    """The machine at hand, measured for about ``budget`` seconds.

    ``products`` are the matrix products that matter, with how often each occurs; those with most work are
    timed in their own shape (shortened where one alone would take long). ``heads`` are number and size of
    the attention heads. ``held`` are bytes that this process holds already, and a run would hold too.
    """
    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    dtype = torch.bfloat16 if cuda else torch.float32
    rates = _product_rates(products, device, dtype, budget * 0.7)
    typical = sum(rates.values()) / len(rates) if rates else _rate(Product(512, 512, 512), device, dtype)
    large = max(rates.values(), default=typical)

    def seconds(product: Product, times: int) -> float:
        flops = 2.0 * product.m * product.k * product.n
        return times * flops / rates.get(_timed_shape(product), typical)

    if cuda:
        properties: Any = torch.cuda.get_device_properties(device)
        name, memory, reserved = properties.name, properties.total_memory, CONTEXT
        count = max(1, int(os.environ.get("WORLD_SIZE", "1")))
    else:
        name, reserved, count = _cpu_name(), held, 1
        memory = available_memory() + own_memory()
    return Machine(
        name=name,
        kind=device.type,
        count=count,
        memory=memory,
        reserved=reserved,
        seconds=seconds,
        attention=_attention_rate(heads, device, dtype),
        bandwidth=_bandwidth(device, dtype),
        operation=LAUNCH if cuda else 0.0,
        link=450 * GB if cuda else math.inf,
        measured=True,
        rate=large,
    )


LONGEST = 2**27  # multiply-adds of one timed product


def _timed_shape(product: Product) -> Product:
    """The shape that stands for a product: its longest side cut until it can be timed."""
    sides = list(product)
    while math.prod(sides) > LONGEST and max(sides) > 256:
        longest = sides.index(max(sides))
        sides[longest] = max(256, min(sides[longest] // 2, sides[longest]))
    return Product(*sides)


def _product_rates(
    products: Counter[Product], device: torch.device, dtype: torch.dtype, budget: float
) -> dict[Product, float]:
    work: Counter[Product] = Counter()
    for product, times in products.items():
        work[_timed_shape(product)] += 2 * math.prod(product) * times
    rates: dict[Product, float] = {}
    begin = time.perf_counter()
    for shape, _ in work.most_common():
        if rates and time.perf_counter() - begin > budget:
            break
        rates[shape] = _rate(shape, device, dtype)
    return rates


def _rate(shape: Product, device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a product of this shape, the second operand as weights lie (transposed)."""
    a = torch.randn(shape.m, shape.k, device=device).to(dtype)
    b = torch.randn(shape.n, shape.k, device=device).to(dtype).t()
    return 2.0 * math.prod(shape) / _typical(lambda: a @ b, device)


def _attention_rate(heads: tuple[int, int], device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of fused causal attention forward and backward, the masked half counted."""
    number, size = heads
    length = 256
    parts = [torch.randn(1, number, length, size, device=device).to(dtype) for _ in range(3)]
    q, k, v = (part.requires_grad_() for part in parts)

    def once() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        torch.autograd.grad(out.sum(), (q, k, v))

    with torch.enable_grad():
        taken = _typical(once, device)
    return 2.0 * number * length * length * 7 * size / taken


def _bandwidth(device: torch.device, dtype: torch.dtype) -> float:
    """Bytes per second of one elementwise operation on 8 MiB of numbers: two read, one written."""
    count = 8 * MiB // dtype.itemsize
    a, b = (torch.randn(count, device=device).to(dtype) for _ in range(2))
    return 3.0 * count * dtype.itemsize / _typical(lambda: a * b, device, 0.06, 40)


def _typical(once: Callable[[], Any], device: torch.device, least: float = 0.025, tries: int = 16) -> float:
    """Seconds of a call, the median of several after one that warms up.

    On one thread of a CPU they are seconds of that thread: the time that others have the processor does not count.
    """
    clock = time.thread_time if device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    once()
    taken: list[float] = []
    begin = time.perf_counter()
    while len(taken) < 3 or (time.perf_counter() - begin < least and len(taken) < tries):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = clock()
        once()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(clock() - start)
    return max(1e-9, sorted(taken)[len(taken) // 2])


def own_memory() -> int:
    """Bytes of memory that this process holds."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if platform.system() == "Darwin" else peak * 1024


def available_memory() -> int:
    """Bytes that a new process could take without swapping: the system's own word, within the limit of its
    control group.
    """
    free: list[int] = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            free.append(max(0, int(limit) - int((group / "memory.current").read_text())))
    except (OSError, ValueError):
        pass
    return min(free)


def _cpu_name() -> str:
    cores = torch.get_num_threads()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {cores} thread{'s' if cores > 1 else ''}"


__all__ = ["GPUS", "Gpu", "Machine", "at_hand", "available_memory", "named", "own_memory"]
