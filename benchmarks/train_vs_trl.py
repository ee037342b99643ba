"""steerwell against TRL 1.16: the same model, token ids, order and optimizer, in CPU seconds on one thread.

    python benchmarks/train_vs_trl.py --method dpo --vocab 32768 --peer PYTHON

PYTHON is the interpreter of an environment with TRL (benchmarks/README.md says how to make it); it may be
given as STEERWELL_PEER_PYTHON instead. The contenders take turns, each run in a fresh process; per-step losses
must agree within 1e-4, or the script fails. Counted are the CPU seconds of the training part, the reference
log-probs included on both sides, and the peak resident memory of the process.

TRL runs at its best on a CPU: fp32, no gradient checkpointing, SDPA, fused AdamW, no logging and no
checkpoints, and that of its two ways to the reference (a second model, or computed ahead) which took less time
in a run of each. ``--cached`` measures a second training on the same data with another learning rate and
another output folder, where steerwell has its reference on disk; TRL computes it again, as its own cache does
not survive either change. ``--epochs 2`` measures the second epoch as well.

CPU seconds include the kernel's: fresh memory costs page faults, and large buffers are fresh memory each time
they are allocated. What the kernel took is shown apart, with the ratio that is left without it;
``--keep-memory`` tells the C library (glibc) to keep what was freed, which no trainer does by itself.

The share of the machine's matrix-multiply rate counts only what must be computed: each unique token once
through the layers, the head on scored positions only, attention by branch (:func:`useful_flops`).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
if (HERE.parent / "src" / "steerwell").is_dir():
    sys.path.insert(0, str(HERE.parent / "src"))

from machine import machine  # noqa: E402
from synthetic import make_rows, qwen3_config, save_json, write_model  # noqa: E402

METHODS = ("dpo", "reward", "kto", "sft")
SAME_LOSS = 1e-4
SIDES = {"steerwell": "steerwell_side.py", "trl": "trl_side.py"}


def main() -> None:
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="train-vs-trl-") as work:
        result = compare(args, Path(work))
    print(json.dumps(result["summary"], indent=2))
    save_json(args.out or HERE / "results" / f"{name_of(args)}.json", result)
    if result["summary"]["largest_loss_difference"] > SAME_LOSS:
        sys.exit(f"the losses differ by {result['summary']['largest_loss_difference']:.2g}")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="dpo")
    add("--peer", default=os.environ.get("STEERWELL_PEER_PYTHON"), help="interpreter of TRL's environment")
    add("--vocab", type=int, default=32768)
    add("--rows", type=int, default=64, help="prompts, with two completions each (SFT: one)")
    add("--batch-size", type=int, default=8)
    add("--prompt", type=int, default=200, help="mean tokens of a prompt")
    add("--completion", type=int, default=120, help="mean tokens of a completion")
    add("--hidden", type=int, default=256)
    add("--layers", type=int, default=4)
    add("--epochs", type=int, default=1)
    add("--pairs", type=int, default=3, help="runs of each contender")
    add("--reference", choices=["precompute", "model", "best"], default="best", help="TRL's way")
    add("--max-tokens", type=int, default=8192, help="steerwell's tokens per micro-batch (its default)")
    add("--cached", action="store_true", help="measure a second training on the same data")
    add("--keep-memory", action="store_true", help="tell glibc to keep freed memory, for both contenders")
    add("--only", choices=["steerwell"], help="measure steerwell alone, without a comparison")
    add("--quick", action="store_true", help="16 rows and one run of each: a look, no result")
    add("--out", type=Path, help="result file (default: benchmarks/results/…)")
    args = parser.parse_args()
    if args.quick:
        args.rows, args.pairs, args.out = 16, 1, args.out or Path(tempfile.gettempdir()) / "quick.json"
    if not args.peer and not args.only:
        parser.error("give --peer PYTHON, the interpreter of an environment with TRL (see README.md)")
    if args.epochs > 1 and args.method == "kto":
        parser.error("TRL fixes the order of KTO when it prepares the data: one epoch only")
    return args


def name_of(args: argparse.Namespace) -> str:
    """The result file's name, by what was measured."""
    parts = ["train_vs_trl", args.method, str(args.vocab)]
    parts += ["cached"] if args.cached else []
    parts += ["keep_memory"] if args.keep_memory else []
    parts += [f"epochs{args.epochs}"] if args.epochs > 1 else []
    return "_".join(parts)


def compare(args: argparse.Namespace, work: Path) -> dict[str, Any]:
    """All runs, and what they say."""
    from steerwell.train.sources import epoch_order

    rows = make_rows(args.rows, vocab=args.vocab, prompt=args.prompt, completion=args.completion)
    orders = [epoch_order(args.rows, epoch, 0) for epoch in range(args.epochs)]
    shape = {"hidden": args.hidden, "layers": args.layers}
    parameters = write_model(work / "model", args.vocab, reward=args.method == "reward", **shape)
    save_json(work / "rows.json", rows)
    save_json(work / "order.json", orders)
    runs: dict[str, list[dict[str, Any]]] = {"steerwell": [], "trl": []}
    if args.cached:
        run_side("steerwell", args, work, number=0, first=True)
    choice, tried = reference_choice(args, work)
    for number in range(1, args.pairs + 1):
        for side in ("steerwell",) if args.only else ("trl", "steerwell"):
            one = run_side(side, args, work, number=number, reference=choice)
            runs[side].append(one)
            print(
                f"{side} {number}: {one['training_cpu_seconds']:.2f} CPU s, {one['peak_mib']:.0f} MiB",
                flush=True,
            )
    flops = useful_flops(args, rows, parameters)
    return {
        "machine": machine(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("peer", "out", "only", "quick")}
        | {"parameters": parameters, "trl_reference": choice, "trl_reference_tried": tried},
        "summary": summary(args, runs, flops, work),
        "runs": runs,
    }


def reference_choice(args: argparse.Namespace, work: Path) -> tuple[str, dict[str, float]]:
    """Which of TRL's two ways to the reference costs less here."""
    if args.method not in ("dpo", "kto") or args.only:
        return "none", {}
    if args.reference != "best":
        return args.reference, {}
    tried: dict[str, float] = {}
    for choice in ("precompute", "model"):
        tried[choice] = run_side("trl", args, work, number=0, reference=choice)["training_cpu_seconds"]
        print(f"trl, reference by {choice}: {tried[choice]:.2f} CPU s", flush=True)
    return min(tried, key=lambda choice: tried[choice]), tried


def run_side(
    side: str,
    args: argparse.Namespace,
    work: Path,
    *,
    number: int,
    reference: str = "none",
    first: bool = False,
) -> dict[str, Any]:
    """One run of one contender in a process of its own."""
    task = {
        "method": args.method,
        "batch_size": args.batch_size,
        "learning_rate": 2e-5 if first else 1e-5,
        "beta": 0.1,
        "epochs": args.epochs,
        "seed": 0,
        "max_tokens": args.max_tokens,
        "reference": reference,
        "out": f"out-{number}",
        "weights": "weights-trl",
        "result": f"result-{side}.json",
    }
    save_json(work / "task.json", task)
    python = args.peer if side == "trl" else sys.executable
    cache = work / ("cache" if args.cached else f"cache-{number}")
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "STEERWELL_CACHE": str(cache),
        "HF_DATASETS_CACHE": str(work / "datasets"),
    }
    if args.keep_memory:
        environment |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), str(2**35))
    if side == "trl":
        environment.pop("PYTHONPATH", None)
    command = [python, str(HERE / "peers" / SIDES[side]), str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{side} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((work / task["result"]).read_text())


def summary(
    args: argparse.Namespace, runs: dict[str, list[dict[str, Any]]], flops: float, work: Path
) -> dict[str, Any]:
    """The figures that count: medians over the runs, ratios by turn, differences of losses and weights."""
    ours, theirs = runs["steerwell"], runs["trl"]

    def middle(side: list[dict[str, Any]], name: str) -> float:
        return round(statistics.median(run[name] for run in side), 3)

    found: dict[str, Any] = {
        "steerwell": {
            **figures(ours, middle),
            "useful_gflops": round(flops / 1e9, 1),
            "share_of_matmul_rate": round(
                statistics.median(flops / r["training_cpu_seconds"] / r["sgemm_flops"] for r in ours), 3
            ),
            "sgemm_gflops_per_second": round(middle(ours, "sgemm_flops") / 1e9, 1),
        },
        "largest_loss_difference": 0.0,
    }
    if not theirs:
        return found
    found["trl"] = figures(theirs, middle)
    turns = list(zip(theirs, ours, strict=True))
    found["cpu_ratio"] = round(
        middle(theirs, "training_cpu_seconds") / middle(ours, "training_cpu_seconds"), 2
    )
    found["cpu_ratio_outside_the_kernel"] = round(
        statistics.median(map(outside_the_kernel, theirs)) / statistics.median(map(outside_the_kernel, ours)),
        2,
    )
    found["cpu_ratio_by_turn"] = [
        round(t["training_cpu_seconds"] / o["training_cpu_seconds"], 2) for t, o in turns
    ]
    found["memory_ratio"] = round(middle(theirs, "peak_mib") / middle(ours, "peak_mib"), 2)
    found["memory_ratio_without_imports"] = round(
        found["trl"]["peak_mib_without_imports"] / found["steerwell"]["peak_mib_without_imports"], 2
    )
    if args.epochs > 1:
        found["last_epoch_cpu_ratio"] = round(
            statistics.median(last_epoch(args, t) / last_epoch(args, o) for t, o in turns), 2
        )
    for theirs_one, ours_one in turns:
        pairs = zip(theirs_one["losses"], ours_one["losses"], strict=True)
        found["largest_loss_difference"] = max(
            found["largest_loss_difference"], max(abs(a - b) for a, b in pairs)
        )
    found["relative_difference_of_the_update"] = update_difference(work, args.pairs)
    return found


def figures(side: list[dict[str, Any]], middle: Any) -> dict[str, float]:
    """One contender's medians."""
    return {
        "training_cpu_seconds": middle(side, "training_cpu_seconds"),
        "of_it_in_the_kernel": middle(side, "of_it_in_the_kernel"),
        "reference_cpu_seconds": middle(side, "reference_cpu_seconds"),
        "whole_call_cpu_seconds": middle(side, "whole_call_cpu_seconds"),
        "peak_mib": middle(side, "peak_mib"),
        "peak_mib_without_imports": round(
            statistics.median(run["peak_mib"] - run["import_mib"] for run in side), 1
        ),
    }


def outside_the_kernel(run: dict[str, Any]) -> float:
    """CPU seconds of the training part without those spent in the kernel."""
    return run["training_cpu_seconds"] - run["of_it_in_the_kernel"]


def last_epoch(args: argparse.Namespace, run: dict[str, Any]) -> float:
    """CPU seconds of the last epoch's steps."""
    steps = len(run["step_ends"]) // args.epochs
    return run["step_ends"][-1] - run["step_ends"][-1 - steps]


def update_difference(work: Path, number: int) -> float:
    """How far the two trained models lie apart, relative to how far training moved them (norms)."""
    from safetensors.torch import load_file

    start, ours, theirs = (
        load_file(folder / "model.safetensors")
        for folder in (work / "model", work / f"out-{number}" / "model", work / "weights-trl")
    )
    apart = sum(float((ours[k] - theirs[k]).double().square().sum()) for k in start)
    moved = sum(float((theirs[k] - start[k]).double().square().sum()) for k in start)
    return round((apart / moved) ** 0.5, 5)


def useful_flops(args: argparse.Namespace, rows: list[list[list[int]]], parameters: int) -> float:
    """Floating-point operations that the training needs at least.

    A product with a weight matrix costs 2 operations per weight and token; the backward pass costs twice the
    forward pass. Layers: each prompt once, each completion with its end token once. Head: the scored
    positions (none for a reward model). Attention: per query, the keys it may see, twice 2 x width. The
    reference adds one forward pass (none when it is cached); KTO's estimate two forward passes over
    completions under another prompt, with every prompt once.
    """
    config = qwen3_config(args.vocab, args.hidden, args.layers)
    width = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    attention = args.hidden * (2 * width + 2 * narrow)
    weights = args.layers * (attention + 3 * args.hidden * config.intermediate_size)
    tokens = scored = seen = 0
    for prompt, *both in rows:
        answers = [len(ids) + 1 for ids in (both[:1] if args.method == "sft" else both)]
        p = len(prompt)
        tokens += p + sum(answers)
        scored += sum(answers)
        seen += p * (p + 1) // 2 + sum(a * p + a * (a + 1) // 2 for a in answers)
    forward = 2 * weights * tokens + args.layers * 4 * width * seen
    forward += 0 if args.method == "reward" else 2 * args.hidden * args.vocab * scored
    passes = {"dpo": 3 * args.epochs + (not args.cached), "reward": 3 * args.epochs, "sft": 3 * args.epochs}
    passes["kto"] = 3 * args.epochs + (not args.cached) + 2 * args.epochs
    return float(forward) * passes[args.method]


if __name__ == "__main__":
    main()
