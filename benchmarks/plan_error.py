"""What `steerwell plan` says against what the runs took: peak memory and CPU seconds, one thread.

    OMP_NUM_THREADS=1 python benchmarks/plan_error.py            # run all cases, write the result, print the table
    OMP_NUM_THREADS=1 python benchmarks/plan_error.py --fit      # and say which factors fit the calibration cases
    python benchmarks/plan_error.py --again                      # no runs: the stored ones with the factors as they are

Every case is a recipe of its own: a model with random weights, random texts of known length, an objective. One
process plans it and another, fresh one runs it. Memory is the peak resident memory of the running process above what
it held before the recipe was read (Python, torch and transformers, about 390 MiB), against the plan's total
above what the planning process held then. Time is the run's CPU seconds, all of it: reading, tokenising, the
reference pass, training, checkpoints, saving.

The factors in `steerwell/train/duration.py` and `memory.py` were fitted on the cases marked "calibration" and on
nothing else. The published errors are those of the other cases. (Which factors there are was decided with all
cases in sight; their values were not.)
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results" / "plan_error.json"
MiB = 2**20
DEFAULTS: dict[str, Any] = {
    "family": "llama",
    "hidden": 256,
    "layers": 4,
    "heads": 4,
    "kv": 4,
    "wide": 704,
    "vocabulary": 8000,
    "tied": False,
    "objective": "dpo",
    "groups": 32,
    "prompt": 200,
    "completion": 120,
    "held_out": 0,
    "recipe": {},
    "train": {"batch_size": 8},
}
# Sizes, vocabularies, layouts, objectives and cuts; the held-out cases share none of their settings exactly.
CALIBRATION: dict[str, dict[str, Any]] = {
    "base": {},
    "deep": {"layers": 10, "hidden": 192, "wide": 512, "heads": 3, "kv": 3},
    "narrow": {"hidden": 64, "layers": 2, "wide": 176, "heads": 2, "kv": 2, "groups": 64},
    "micro": {"train": {"batch_size": 8, "max_tokens": 1500}},
    "lora": {"recipe": {"lora": 8}},
    "reward": {"objective": "bradley_terry"},
}
HELD_OUT: dict[str, dict[str, Any]] = {
    "issue": {"vocabulary": 32000},
    "qwen3": {"family": "qwen3", "hidden": 192, "layers": 6, "heads": 6, "kv": 2, "wide": 576, "tied": True},
    "grouped": {
        "hidden": 384,
        "layers": 5,
        "heads": 6,
        "kv": 2,
        "wide": 1024,
        "vocabulary": 4000,
        "groups": 32,
    },
    "small": {"hidden": 128, "layers": 3, "heads": 4, "kv": 4, "wide": 320, "vocabulary": 2000, "groups": 64},
    "simpo": {"objective": "simpo", "layers": 6, "vocabulary": 16000},
    "cut": {"train": {"batch_size": 16, "max_tokens": 2600}, "hidden": 320, "heads": 5, "kv": 5, "wide": 896},
    "rows": {"train": {"batch_size": 8, "layout": "rows"}, "layers": 5},
    "kto": {"objective": "kto"},
    "evaluated": {"held_out": 24, "train": {"batch_size": 8, "eval_every": 2}},
    "adapter": {"recipe": {"lora": 16}, "layers": 8, "vocabulary": 12000, "train": {"batch_size": 6}},
    "ranked": {"objective": "bradley_terry", "layers": 6, "hidden": 320, "heads": 5, "kv": 5, "wide": 864},
    "gemma2": {
        "family": "gemma2",
        "hidden": 192,
        "layers": 4,
        "heads": 3,
        "kv": 3,
        "wide": 512,
        "groups": 32,
    },
    "experts": {"family": "qwen3_moe", "hidden": 192, "layers": 4, "heads": 3, "kv": 3},
}


def case(name: str) -> dict[str, Any]:
    """The settings of a case, defaults filled in."""
    return {**DEFAULTS, **(CALIBRATION | HELD_OUT)[name]}


def make(name: str, place: Path) -> None:
    """Model, tokenizer, data and recipe of a case in a folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    from steerwell.world import base_path

    settings = case(name)
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(base_path())
    config = AutoConfig.for_model(
        settings["family"],
        vocab_size=settings["vocabulary"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["wide"],
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["kv"],
        head_dim=settings["hidden"] // settings["heads"],
        tie_word_embeddings=settings["tied"],
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **({"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 192, "decoder_sparse_step": 1}
           if settings["family"] == "qwen3_moe" else {}),
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    rng = random.Random(name)
    words = [w for w in tokenizer.get_vocab() if w.startswith("Ġ") and w[1:].isalpha()]

    def text(mean: float) -> str:
        count = max(2, round(mean * rng.lognormvariate(-0.08, 0.4)))
        return " ".join(rng.choice(words)[1:] for _ in range(count))

    def rows(path: Path, count: int) -> None:
        with path.open("w") as file:
            for i in range(count):
                prompt = f"{i} " + text(settings["prompt"])
                row = {"prompt": prompt, "chosen": text(settings["completion"])}
                row["rejected"] = text(settings["completion"])
                if settings["objective"] == "kto":
                    row = {"prompt": prompt, "completion": row["chosen"], "label": i % 2 == 0}
                file.write(json.dumps(row) + "\n")

    rows(place / "data.jsonl", settings["groups"])
    recipe = {"model": str(place / "model"), "data": str(place / "data.jsonl"), "out": str(place / "out")}
    recipe |= {"objective": settings["objective"], **settings["recipe"]}
    if settings["held_out"]:
        rows(place / "eval.jsonl", settings["held_out"])
        recipe["eval_data"] = str(place / "eval.jsonl")
    recipe["train"] = {"learning_rate": 1e-4, **settings["train"]}
    (place / "recipe.json").write_text(json.dumps(recipe))


def read(place: Path) -> Any:
    """The recipe of a folder."""
    from steerwell.train.config import Recipe

    return Recipe(**json.loads((place / "recipe.json").read_text()))


def start() -> int:
    """Everything imported that planning and running import; bytes that the process holds then."""
    import torch

    torch.set_num_threads(1)
    from transformers.utils import logging

    from steerwell.train.machines import own_memory

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    return own_memory()


def run(name: str, place: Path) -> dict[str, Any]:
    """Do a case and measure it."""
    base = start()
    from steerwell.train.recipe import run_recipe

    recipe = read(place)
    begin = time.process_time()
    done = run_recipe(recipe)
    taken = time.process_time() - begin
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"base": base, "bytes": most - base, "seconds": taken, "tokens": done.record["data"]["tokens"]}


def planned(name: str, place: Path) -> dict[str, Any]:
    """Plan a case; with what the prediction is made of, for the fit."""
    base = start()
    from steerwell.train.forecast import Forecast
    from steerwell.train.job import read as read_job
    from steerwell.train.machines import at_hand
    from steerwell.train.plan import plan

    recipe = read(place)
    begin = time.process_time()
    made = plan(recipe)
    taken = time.process_time() - begin
    work = Forecast(read_job(recipe, "cpu", 1))
    found = work.features(at_hand(work.products, work.heads))
    passes = [found[key] for key in ("training", "reference", "evaluation") if key in found]
    sums = [sum(column) for column in zip(*(one.tuple() for one in passes), strict=True)]
    parts = made.peak.parts
    return {
        "bytes": made.peak.total - base,
        "seconds": made.total_seconds,
        "tokens": made.data["tokens"],
        "planning_seconds": taken,
        "moment": made.peak.moment,
        "parts": parts,
        "features": [*sums, found["update"], found["tokens"], found["files"]],
        "tokenising": made.census.seconds,
        "accumulates": made.batches["micro_batches_per_step"] > 1,
        "passing": parts["activations"] + parts["head"],
        "tensors": made.peak.total - parts["allocator"] - base,
        "time_parts": made.seconds,
    }


def measure(name: str) -> dict[str, Any]:
    """Make, plan and run a case, each in a process of its own."""
    place = Path(tempfile.mkdtemp(prefix="plan-error-"))
    try:
        found: dict[str, Any] = {}
        for step in ("make", "plan", "run"):
            command = [sys.executable, "-W", "ignore", __file__, "--one", step, name, str(place)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"{name}: {step}: {done.stderr[-2000:]}")
            found[step] = json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(place, ignore_errors=True)
    said, took = found["plan"], found["run"]
    assert said["tokens"] == took["tokens"], name
    return {
        "case": name,
        "set": "calibration" if name in CALIBRATION else "held out",
        "settings": (CALIBRATION | HELD_OUT)[name],
        "tokens": took["tokens"],
        "memory": {"planned": said["bytes"], "measured": took["bytes"]},
        "time": {"planned": said["seconds"], "measured": took["seconds"]},
        "memory_error": said["bytes"] / took["bytes"] - 1,
        "time_error": said["seconds"] / took["seconds"] - 1,
        "planning_seconds": said["planning_seconds"],
        "plan": said,
    }


def again(row: dict[str, Any]) -> dict[str, Any]:
    """A stored case, planned again from its parts with the factors that the code has now."""
    from steerwell.train import duration, memory

    said, took = row["plan"], row["time"]["measured"]
    factors = duration.CPU
    products, attention, moved, operations, update, tokens, files = said["features"]
    seconds = duration.Features(products, attention, moved, operations).seconds(factors)
    seconds += factors.update * update + factors.token * tokens + factors.file * files + factors.fixed
    row["time"]["planned"] = seconds = seconds + said["tokenising"]
    held, share = row["memory"], memory.ALLOCATOR[kind(row)]
    held["planned"] = round(said["tensors"] + share * said["passing"])
    row["memory_error"], row["time_error"] = held["planned"] / held["measured"] - 1, seconds / took - 1
    return row


def errors(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    """Median and largest absolute relative error."""
    found = [abs(row[f"{kind}_error"]) for row in rows]
    return {"median": statistics.median(found), "largest": max(found)}


def fit(rows: list[dict[str, Any]]) -> None:
    """Factors that fit the calibration cases by least relative squares, none below zero.

    There are few cases, so few numbers are fitted: one factor for all computing and a fixed time; for memory a
    share of what is passing, and others with adapters and with several micro-batches per step.
    """
    import numpy as np
    from scipy.optimize import nnls

    from steerwell.train.duration import CPU

    rows = [row for row in rows if row["set"] == "calibration"]
    took = np.array([row["time"]["measured"] for row in rows])
    parts = np.array([row["plan"]["features"] for row in rows])
    known = np.array([row["plan"]["tokenising"] for row in rows]) + CPU.file * parts[:, 6]
    made = np.stack([parts[:, [0, 1, 2, 4]].sum(1), np.ones(len(rows))], 1)
    factors, _ = nnls(made / took[:, None], (took - known) / took)
    print(f"products = attention = moved = update = {factors[0]:.3f}, fixed = {factors[1]:.2f}")
    measured = np.array([row["memory"]["measured"] for row in rows])
    beside = measured - np.array([row["plan"]["tensors"] for row in rows])
    passing = np.array([row["plan"]["passing"] for row in rows])
    kinds = np.array([kind(row) for row in rows])
    names = ("plain", "accumulating", "adapted")
    columns = np.stack([passing * (kinds == name) for name in names], 1)
    shares, _ = nnls(columns / measured[:, None], beside / measured)
    print("ALLOCATOR = {" + ", ".join(f'"{n}": {s:.2f}' for n, s in zip(names, shares, strict=True)) + "}")


def kind(row: dict[str, Any]) -> str:
    """Which share of the allocator a case has."""
    if "lora" in row["settings"].get("recipe", {}):
        return "adapted"
    return "accumulating" if row["plan"]["accumulates"] else "plain"


def table(rows: list[dict[str, Any]]) -> None:
    """The cases, and the errors of each set."""
    heads = ("MiB planned", "measured", "error", "s planned", "measured", "error")
    print(
        f"{'case':12}{'set':13}"
        + "".join(f"{h:>{w}}" for h, w in zip(heads, (12, 10, 8, 11, 10, 8), strict=True))
    )
    for row in rows:
        memory, seconds = row["memory"], row["time"]
        print(
            f"{row['case']:12}{row['set']:13}{memory['planned'] / MiB:12.0f}{memory['measured'] / MiB:10.0f}"
            f"{row['memory_error']:+8.1%}{seconds['planned']:11.2f}{seconds['measured']:10.2f}{row['time_error']:+8.1%}"
        )
    for name in ("calibration", "held out"):
        part = [row for row in rows if row["set"] == name]
        for kind in ("memory", "time") if part else ():
            found = errors(part, kind)
            print(f"{name}: {kind} error median {found['median']:.1%}, largest {found['largest']:.1%}")


def machine() -> dict[str, Any]:
    """What was measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    import torch
    import transformers

    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads": 1,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def main() -> None:
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("--one", nargs=3, metavar=("STEP", "CASE", "FOLDER"), help=argparse.SUPPRESS)
    arguments.add_argument("--cases", nargs="*", default=[*CALIBRATION, *HELD_OUT])
    arguments.add_argument("--fit", action="store_true", help="print factors that fit the calibration cases")
    arguments.add_argument("--again", action="store_true", help="plan the stored cases again, without runs")
    arguments.add_argument("--out", type=Path, default=RESULT)
    given = arguments.parse_args()
    if given.one:
        step, name, place = given.one
        value = {"make": make, "plan": planned, "run": run}[step](name, Path(place))
        print(json.dumps(value))
        return
    rows: list[dict[str, Any]] = []
    where = machine()
    if given.again:
        stored = json.loads(given.out.read_text())
        rows, where, given.cases = [again(row) for row in stored["cases"]], stored["machine"], []
    for name in given.cases:
        rows.append(measure(name))
        row = rows[-1]
        print(
            f"{name}: memory {row['memory_error']:+.1%}, time {row['time_error']:+.1%}",
            file=sys.stderr,
            flush=True,
        )
    table(rows)
    if given.fit:
        fit(rows)
    value = {"machine": where, "cases": rows}
    value["errors"] = {
        part.replace(" ", "_"): {kind: errors(some, kind) for kind in ("memory", "time")}
        for part in ("calibration", "held out")
        if (some := [row for row in rows if row["set"] == part])
    }
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    main()
