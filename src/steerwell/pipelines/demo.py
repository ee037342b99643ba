"""``steerwell demo``: the whole way on the embedded world, from base model to aligned model, with a report.

The stages are in :mod:`steerwell.pipelines.stages`. After the annotators, two ways are independent and run as
two processes of one thread each: the reward model and GRPO against it; and preference tuning with its
measurements. A stage that is done is not done again, so an interrupted demo goes on with the same command.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steerwell.data.errors import InputError
from steerwell.pipelines.progress import Progress, Relay, silent

MODELS = ("base", "sft", "ipo", "dpo", "grpo")


@dataclass(frozen=True)
class Stage:
    """A stage of the demo: its name, what must be done before, and the function that does it."""

    name: str
    after: tuple[str, ...]
    work: Callable[..., Any]
    arguments: tuple[str, ...] = ()


def _stages(from_scratch: bool) -> list[Stage]:
    from steerwell.pipelines import stages

    found = [Stage("base", (), base)] if from_scratch else []
    found += [
        Stage("sft", ("base",) if from_scratch else (), stages.sft),
        Stage("sample", ("sft",), stages.sample),
        Stage("reward_model", ("sample",), stages.reward_model),
        Stage("overoptimize", ("reward_model",), stages.overoptimize),
        Stage("ipo", ("sample",), stages.prefer, ("ipo",)),
        Stage("dpo", ("ipo",), stages.prefer, ("dpo",)),
    ]
    made_by = {"sft": "dpo", "base": "measure_sft", "ipo": "measure_base", "dpo": "measure_ipo"}
    made_by["grpo"] = "overoptimize"
    return found + [Stage(f"measure_{m}", (made_by[m],), stages.measure, (m,)) for m in MODELS]


def base(run: Any, progress: Progress) -> None:
    """Train the base model from scratch into ``base/``."""
    from steerwell import world

    def relay(step: int, steps: int, loss: float) -> None:
        if step % 10 == 0 or step == steps:
            progress("base", step, steps, f"loss {loss:.2f}")

    world.train_base(run.base, seed=run.seed, progress=relay)


def _worker() -> None:
    """A worker leaves Ctrl-C to its parent, and takes one thread."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from steerwell.models.load import set_threads

    set_threads(int(os.environ.get("STEERWELL_THREADS", "1")))


def _do(stage: Stage, run: Any, progress: Progress) -> float:
    """Do a stage; returns its wall seconds."""
    started = time.perf_counter()
    stage.work(run, *stage.arguments, progress)
    return time.perf_counter() - started


def _claim(out: Path, identity: dict[str, Any]) -> dict[str, float]:
    """Take the folder for this demo; returns the seconds of the stages that are already done."""
    from steerwell.pipelines.stages import write_json

    path = out / "demo.json"
    if path.exists():
        found = json.loads(path.read_text("utf-8"))
        differing = [k for k in identity if found.get("identity", {}).get(k) != identity[k]]
        if differing:
            raise InputError(
                f"{out} holds another demo (different {', '.join(differing)})",
                mend="Name another folder with --out, or remove this one.",
            )
        return found["seconds"]
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty and holds no demo", mend="Name another folder with --out.")
    write_json(path, {"identity": identity, "seconds": {}})
    return {}


def run_demo(
    out: str | Path = "runs/demo",
    seed: int = 0,
    from_scratch: bool = False,
    progress: Progress = silent,
    recipe: Any = None,
    workers: int = 2,
) -> dict[str, Any]:
    """Run the demo into ``out`` and write ``result.json`` and ``report/index.html`` there.

    Returns the result: ``before`` (the SFT model) and ``after`` (the IPO model), ``win_rate`` of after against
    before, ``reward_model``, ``overoptimization``, ``seconds`` by stage, and ``models`` with every model's
    figures. Raises :class:`InputError` when ``out`` holds something else, KeyboardInterrupt on Ctrl-C (the same
    call goes on from there).
    """
    from steerwell import world
    from steerwell.pipelines.stages import Recipe, Run, recipe_dict, write_json

    out = Path(out)
    recipe = recipe or Recipe()
    identity = {
        "seed": seed,
        "from_scratch": from_scratch,
        "recipe": json.loads(json.dumps(recipe_dict(recipe))),
        "steerwell": version("steerwell"),
    }
    seconds = _claim(out, identity)
    run = Run(out, seed, out / "base" if from_scratch else world.base_path(), recipe)
    stages = _stages(from_scratch)
    progress("demo", len(seconds), len(stages), "")

    def done(stage: Stage, took: float) -> None:
        seconds[stage.name] = round(took, 2)
        write_json(out / "demo.json", {"identity": identity, "seconds": seconds})
        progress("demo", len(seconds), len(stages), stage.name)

    _run_stages(stages, run, seconds, done, progress, workers)
    from steerwell.pipelines.demo_report import collect, write_report

    result = collect(run, seconds)
    write_json(out / "result.json", result)
    write_report(run, result)
    return result


def _run_stages(
    stages: list[Stage],
    run: Any,
    seconds: dict[str, float],
    done: Callable[[Stage, float], None],
    progress: Progress,
    workers: int,
) -> None:
    """Run the stages that are not done, each as soon as what it needs is there."""
    waiting = [stage for stage in stages if stage.name not in seconds]
    if not waiting:
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_worker)
    running: dict[Future[float], Stage] = {}
    with context.Manager() as manager, Relay(manager, progress) as relay:
        try:
            while waiting or running:
                for stage in [s for s in waiting if all(a in seconds for a in s.after)]:
                    waiting.remove(stage)
                    running[pool.submit(_do, stage, run, relay.child)] = stage
                finished, _ = wait(running, return_when="FIRST_COMPLETED")
                for future in finished:
                    stage = running.pop(future)
                    done(stage, future.result())
        except BaseException:
            for process in list((pool._processes or {}).values()):
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


__all__ = ["MODELS", "run_demo"]
