"""Many processes: who does which part of a step, and how their figures come together.

Under ``torchrun`` every process runs the same program on the same data. A step's groups are shared out by
tokens; each process works on its share, and sums are taken over all. With one process nothing is sent.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from steerwell.models.sharding import everywhere

T = TypeVar("T")
#: How long one process may wait for another (a judge that answers slowly, a checkpoint on a slow disk).
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class Ranks:
    """This process among ``size``; ``rank`` counts from 0, and process 0 alone writes files."""

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is one process only."""
        return self.size == 1

    @property
    def writes(self) -> bool:
        """Whether this process writes the files of a run."""
        return self.rank == 0

    def share(self, sizes: Sequence[int]) -> list[int]:
        """The places of ``sizes`` (tokens, say) that are this process's, ascending: largest first, each to whom
        has least. Every process finds the same division.
        """
        return shares(sizes, self.size)[self.rank]

    def gather(self, value: T) -> list[T]:
        """What each process gives, in the order of ranks, on every process."""
        if self.alone:
            return [value]
        return everywhere(value)

    def together(self, work: Callable[[], T]) -> T:
        """Do ``work`` on every process; when one fails, all raise its error, so that none is left waiting."""
        return self._together(work)[self.rank]

    def first(self, work: Callable[[], T]) -> T:
        """Do ``work`` on process 0 and give its result, or its error, to all."""
        return self._together(lambda: work() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def _together(self, work: Callable[[], Any]) -> list[Any]:
        if self.alone:
            return [work()]
        result, error = None, None
        try:
            result = work()
        except Exception as raised:  # noqa: BLE001  (raised again below, on all processes)
            error = raised
        answers = self.gather((result, error))
        for rank, (_, failed) in enumerate(answers):
            if failed is not None:
                if rank == self.rank:
                    raise failed
                raise _told(failed)
        return [answer for answer, _ in answers]


#: A program that was started alone.
ALONE = Ranks()


def shares(sizes: Sequence[int], n: int) -> list[list[int]]:
    """Divide places among ``n`` by size, evenly: the largest first, each to whom has least so far."""
    parts: list[list[int]] = [[] for _ in range(n)]
    loads = [0] * n
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        least = loads.index(min(loads))
        parts[least].append(i)
        loads[least] += sizes[i]
    return [sorted(part) for part in parts]


def join() -> Ranks:
    """Join the processes that ``torchrun`` started (once); a program that was started alone stays alone."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1 and dist.is_available() and not dist.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, timeout=PATIENCE)
        atexit.register(_leave)
    return current()


def current() -> Ranks:
    """This process among those that have joined."""
    if dist.is_available() and dist.is_initialized():
        return Ranks(dist.get_rank(), dist.get_world_size())
    return ALONE


def mesh(ranks: Ranks) -> Any:
    """The one-dimensional device mesh of all processes."""
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (ranks.size,))


def _told(error: Exception) -> Exception:
    error._steerwell_told = True  # type: ignore[attr-defined]
    return error


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


__all__ = ["ALONE", "Ranks", "current", "join", "mesh", "shares"]
