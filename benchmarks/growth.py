"""What one pair costs as the data set grows: CPU seconds and peak memory of DPO on 1k to 64k pairs.

    OMP_NUM_THREADS=1 python benchmarks/growth.py

Each size is trained for one epoch in a process of its own, on one thread, through the public call, with a model
so small (two layers of 32) that what the loop itself does is a good part of the cost. The pairs are made when
they are asked for and kept by nobody, so whatever grows with their number is the training's own.

The result says, for each size, CPU seconds per pair of tokenising, of the reference and of the steps, the peak
resident memory, and how much memory the tokenised pairs took. The exponent is the slope of log(CPU seconds)
over log(pairs): 1 is linear.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
if (HERE.parent / "src" / "steerwell").is_dir():
    sys.path.insert(0, str(HERE.parent / "src"))

from machine import machine  # noqa: E402
from synthetic import as_groups, make_rows, save_json, write_model  # noqa: E402

SIZES = (1000, 4000, 16000, 64000)
VOCAB = 1024
NEVER = 10**9


class Pairs(Sequence):
    """Pairs that are made when they are asked for; the same ones every time."""

    def __init__(self, n: int, prompt: int, completion: int) -> None:
        self.n, self.prompt, self.completion = n, prompt, completion

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(self.n))]
        if not 0 <= i < self.n:
            raise IndexError(i)
        rows = make_rows(1, vocab=VOCAB, prompt=self.prompt, completion=self.completion, seed=i)
        return as_groups(rows, "dpo")[0]


def main() -> None:
    args = arguments()
    if args.one:
        print(json.dumps(train_one(args)))
        return
    sizes = (200, 800) if args.quick else tuple(args.sizes)
    found = []
    for size in sizes:
        found.append(run_one(args, size))
        print(json.dumps(found[-1]), flush=True)
    result = {
        "machine": machine(),
        "settings": {"prompt": args.prompt, "completion": args.completion, "batch_size": args.batch_size},
        "sizes": found,
        "summary": summary(found),
    }
    print(json.dumps(result["summary"], indent=2))
    out = args.out or (
        Path(tempfile.gettempdir()) / "growth.json" if args.quick else HERE / "results" / "growth.json"
    )
    save_json(out, result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sizes", type=int, nargs="+", default=SIZES, help="numbers of pairs")
    add("--prompt", type=int, default=200, help="mean tokens of a prompt")
    add("--completion", type=int, default=120, help="mean tokens of a completion")
    add("--batch-size", type=int, default=32)
    add("--quick", action="store_true", help="200 and 800 pairs: a look, no result")
    add("--out", type=Path)
    add("--one", type=int, help=argparse.SUPPRESS)
    return parser.parse_args()


def run_one(args: argparse.Namespace, size: int) -> dict[str, Any]:
    """One size in a process of its own, with a cache of its own."""
    command = [sys.executable, str(Path(__file__).resolve()), "--one", str(size)]
    for name in ("prompt", "completion", "batch_size"):
        command += [f"--{name.replace('_', '-')}", str(getattr(args, name))]
    with tempfile.TemporaryDirectory(prefix="growth-") as cache:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment["STEERWELL_CACHE"] = cache
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{size} pairs failed:\n{done.stderr[-4000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def train_one(args: argparse.Namespace) -> dict[str, Any]:
    """One epoch over ``args.one`` pairs, with the CPU seconds and the memory of its parts."""
    import torch

    from steerwell.train.loop import train

    torch.set_num_threads(1)
    marks: dict[str, float] = {}
    memory: dict[str, float] = {}

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == 1:
            memory["at_step_1"] = resident("VmRSS")
        marks[stage] = time.process_time()
        memory[stage] = resident("VmRSS")

    with tempfile.TemporaryDirectory(prefix="growth-") as work:
        sizes = {"hidden": 32, "layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
        sizes |= {"num_key_value_heads": 1, "head_dim": 16}
        write_model(Path(work) / "model", VOCAB, **sizes)
        start, before = time.process_time(), resident("VmRSS")
        train(
            Path(work) / "model",
            Pairs(args.one, args.prompt, args.completion),
            "dpo",
            out=Path(work) / "run",
            batch_size=args.batch_size,
            learning_rate=1e-4,
            checkpoint_every=NEVER,
            progress=progress,
        )
        reference = marks.get("reference", marks["tokenize"])
        parts = {
            "tokenize": marks["tokenize"] - start,
            "reference": reference - marks["tokenize"],
            "train": marks["train"] - reference,
        }
    return {
        "pairs": args.one,
        "cpu_seconds": round(sum(parts.values()), 2),
        "cpu_milliseconds_per_pair": {k: round(1000 * v / args.one, 3) for k, v in parts.items()},
        "peak_mib": round(resident("VmHWM"), 1),
        "data_mib": round(memory["tokenize"] - before, 1),
    }


def resident(name: str) -> float:
    """MiB of resident memory now (VmRSS) or at most so far (VmHWM); Linux only."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) / 1024


def summary(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The slope of the cost, and the memory that each further pair takes."""
    first, last = found[0], found[-1]
    more = last["pairs"] - first["pairs"]
    return {
        "exponent_of_cpu_seconds": round(
            math.log(last["cpu_seconds"] / first["cpu_seconds"]) / math.log(last["pairs"] / first["pairs"]), 3
        ),
        "peak_kib_for_each_further_pair": round(1024 * (last["peak_mib"] - first["peak_mib"]) / more, 2),
        "data_kib_for_each_further_pair": round(1024 * (last["data_mib"] - first["data_mib"]) / more, 2),
    }


if __name__ == "__main__":
    main()
