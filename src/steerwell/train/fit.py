"""The steps of a run: the same ones for every objective, for recorded data and for rollouts.

A step takes its items, runs them forward and backward, updates, and writes one line of figures. What a step
does depends on the weights, the moments and the step's number alone, so a run can be continued from any
checkpoint.
"""

from __future__ import annotations

import math
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.models.load import Policy
from steerwell.models.reward_model import RewardModel
from steerwell.models.sharding import fill, own_part, whole
from steerwell.train.best import Best
from steerwell.train.checkpoint import (
    latest_checkpoint,
    load_tensors,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
    verified,
)
from steerwell.train.config import TrainConfig
from steerwell.train.coupled import Carried
from steerwell.train.displacement import Displacement, conclusion
from steerwell.train.items import Item, Progress, prepare, set_advantages
from steerwell.train.metrics import MetricsFile, Totals, read_metrics
from steerwell.train.precision import MasterWeights
from steerwell.train.preflight import StartChecks, check_packing
from steerwell.train.provide import Provider
from steerwell.train.ranks import Ranks
from steerwell.train.rundir import RunDir, TrainingError
from steerwell.train.schedule import rate
from steerwell.train.settle import settle
from steerwell.train.sinks import open_sinks
from steerwell.train.sources import Source, derived_seed, rollout_figures, shuffled
from steerwell.train.step import kl_figures, run_items, suspects
from steerwell.train.terms import Term, check_data
from steerwell.train.timing import Timing

Watch = Callable[[int, Any, Mapping[str, float]], Mapping[str, float] | None]


@dataclass
class Run:
    """Everything that the steps of a run work with."""

    trained: Policy | RewardModel
    terms: list[Term]
    config: TrainConfig
    provider: Provider
    folder: RunDir
    optimizer: torch.optim.Optimizer
    steps: int
    items: Sequence[Item]
    stream: int  # groups seen in the whole run, with repetition
    eval_items: list[Item]
    source: Source | None = None
    watch: Watch | None = None
    progress: Progress | None = None
    best: Best | None = None
    masters: MasterWeights | None = None
    release: Callable[[], None] = lambda: None  # gives the model its plain layers back
    tokens: int = 0
    displacement: Displacement | None = None
    carried: Carried = field(default_factory=dict)  # what objectives carry from step to step
    bones: Any = None  # of a model that is spread over processes: where its weights are gathered to
    rollout: tuple[int, list[Item], dict[str, float]] = field(default_factory=lambda: (-1, [], {}))

    @property
    def names(self) -> dict[Tensor, str]:
        """What is updated, with names (a tied weight once): the trainable parameters, or their masters."""
        if self.masters is not None:
            return self.masters.names
        return {p: name for name, p in self.trained.model.named_parameters() if p.requires_grad}

    @property
    def ranks(self) -> Ranks:
        """This process among those that do the run together."""
        return self.provider.ranks

    @property
    def updates(self) -> int:
        """Optimizer steps per set of rollouts; checkpoints are made at multiples of it."""
        return 1 if self.source is None else self.source.updates


def fit(run: Run) -> None:
    """Do the steps of a run from where its folder stands, and save the model.

    Raises :class:`TrainingError` for a loss that is not finite (naming the prompts; the last good state is
    kept as a checkpoint) and for a failed check at the first step; KeyboardInterrupt after Ctrl-C, when the
    state is on disk.
    """
    start, metrics = _restore(run)
    timing = Timing(run.folder.path / "timing.jsonl", start, writes=run.ranks.writes)
    saved = [start]
    done = False
    try:
        if run.ranks.writes:
            history = read_metrics(run.folder.metrics)
            metrics.sinks = open_sinks(run.config.sinks, run.folder.path, run.folder.record, history)
        _finish(run, _steps(run, start, metrics, timing, saved), metrics, timing)
        done = True
    except KeyboardInterrupt:
        with suppress(OSError):
            run.folder.write(status="interrupted", step=saved[-1])
        raise
    except (TrainingError, InputError) as error:
        with suppress(OSError):  # a disk that is full may have no room for this either
            run.folder.write(status="failed", error=str(error), step=saved[-1])
        raise
    finally:
        run.release()
        timing.close()
        metrics.close()
        for sink in metrics.sinks:
            sink.close(done=done)


def _steps(run: Run, start: int, metrics: MetricsFile, timing: Timing, saved: list[int]) -> int:
    """The steps from ``start`` on; returns the number of the last one. ``saved``: steps with a checkpoint."""
    every = run.config.checkpoint_every or math.ceil(run.steps / 10)
    with _interruptible() as asked:
        if start == 0:
            run.folder.write(preflight=check_packing(run.provider, _items(run, 0)[0]))
            _look(run, 0, metrics, {}, timing, always=True)
        for step in range(start, run.steps):
            _set_rate(run, step)
            before = run.tokens
            timing.begin()
            try:
                figures = _step(run, step)
            except TrainingError:
                sound = all(bool(own_part(p).isfinite().all()) for p in run.names)
                if step > saved[-1] and step % run.updates == 0 and all(run.ranks.gather(sound)):
                    _save(run, step, metrics)
                raise
            timing.end(step + 1, run.tokens - before)
            if _look(run, step + 1, metrics, figures, timing, always=step + 1 == run.steps):
                return step + 1
            stop = any(run.ranks.gather(asked()))
            if (
                (step + 1) % run.updates == 0
                and step + 1 < run.steps
                and ((step + 1) // every > saved[-1] // every or stop)
            ):
                _save(run, step + 1, metrics)
                saved.append(step + 1)
                if stop:
                    raise KeyboardInterrupt
    return run.steps


def _finish(run: Run, last: int, metrics: MetricsFile, timing: Timing) -> None:
    """Save the model: the best weights where ``best_metric`` asks for them, else the last."""
    about: dict[str, Any] = {"tokens": run.tokens, "steps": last, **timing.about()}
    if run.best is not None:
        if run.best.path is not None and run.best.step != last:
            _load(run, run.best.path)
        about["best"] = run.best.about()
    if run.masters is not None:
        run.masters.close()
    if isinstance(run.trained, RewardModel) and (run.config.normalise or run.config.calibrate):
        about["scoring"] = settle(run.trained, run.provider, run.config, run.items, run.eval_items)
    with _writing("the model"):
        metrics.sync()
        _save_model(run)
        about["displacement"] = found = conclusion(
            read_metrics(run.folder.metrics),
            last,
            "pairs" if run.displacement is None else run.displacement.by,
        )
        if found.get("warning") and run.progress is not None:
            run.progress("train", run.steps, run.steps, found["warning"])
        run.folder.write(status="done", **about)


def _restore(run: Run) -> tuple[int, MetricsFile]:
    """Continue from the newest whole checkpoint, or begin; returns the step and the metrics file."""
    best, ranks = run.best, run.ranks

    def usable(state: Mapping[str, Any]) -> bool:
        """Whether the best weights that a checkpoint goes back to are whole too."""
        if best is None or state["best"]["step"] is None:
            return True
        return verified(best.folder / f"step-{state['best']['step']:06d}") is not None

    found = ranks.first(lambda: latest_checkpoint(run.folder.checkpoints, run.folder.metrics, usable))
    if found is None:
        return 0, MetricsFile(run.folder.metrics, writes=ranks.writes)
    path, state, torn = found
    _load(run, path)
    restore_optimizer(run.optimizer, run.names, _tensors(run, path, "optimizer"))
    run.tokens, run.carried = state["tokens"], state.get("carried", {})
    if best is not None:
        best.restore(state["best"])
    if run.progress is not None:
        note = f"continued from step {state['step']}"
        if torn:
            note += f"; {torn[0].name} was incomplete and is not used"
        run.progress("train", state["step"], run.steps, note)
    return state["step"], MetricsFile(run.folder.metrics, state["metrics_bytes"], writes=ranks.writes)


def _load(run: Run, path: Path) -> None:
    """Put the weights of a checkpoint in."""
    weights = _tensors(run, path, "model")
    with torch.no_grad():
        for parameter, name in run.names.items():
            parameter.copy_(weights[name])
    if run.masters is not None:
        run.masters.pull()


def _tensors(run: Run, path: Path, stem: str) -> dict[str, Tensor]:
    like: dict[str, Tensor] = {name: parameter for parameter, name in run.names.items()}
    return load_tensors(path, stem, run.provider.device, like)


def _save(run: Run, step: int, metrics: MetricsFile) -> None:
    names = run.names
    tensors = {
        "model": {name: parameter for parameter, name in names.items()},
        "optimizer": optimizer_tensors(run.optimizer, names),
    }
    keep = run.config.keep_checkpoints
    with _writing(f"the checkpoint of step {step}", "earlier ones"):
        state: dict[str, Any] = {"tokens": run.tokens, "metrics_bytes": run.ranks.first(metrics.sync)}
        if run.carried:
            state["carried"] = run.carried
        if run.best is not None:
            state["best"] = run.best.state()
        save_checkpoint(run.folder.checkpoints, step, tensors, state, keep, run.ranks)
        if run.best is not None and run.ranks.writes:
            run.best.prune(run.folder.checkpoints)
        run.folder.write(step=step, tokens=run.tokens)


@contextmanager
def _writing(what: str, kept: str = "the checkpoints") -> Iterator[None]:
    """An :class:`OSError` (a full disk) inside ends the run with one line that says what to do."""
    try:
        yield
    except OSError as error:
        raise TrainingError(
            f"{what} could not be written ({error.strerror}): {kept} are kept; make room and run the same again"
        ) from error


def _save_model(run: Run) -> None:
    """Write ``model/``; weights that are spread over processes are gathered by the first one for it."""
    if run.bones is not None:
        fill(run.bones, run.trained.model, run.ranks.writes)
    model = run.trained if run.bones is None else replace(run.trained, model=run.bones)
    run.ranks.first(lambda: model.save(run.folder.model) and None)


def _step(run: Run, step: int) -> dict[str, float]:
    """One optimizer step; returns its figures, measured before the update."""
    items, figures = _items(run, step)
    totals = Totals()
    fresh = run.source is not None and step % run.updates == 0
    checks = StartChecks(run.provider, fresh=fresh, first=step == 0 and not run.config.dropout)

    def observe(tensors: Mapping[str, Tensor]) -> None:
        checks.look(tensors, totals)
        if run.displacement is not None:
            run.displacement.observe(tensors, totals)
        if run.source is not None:
            kl_figures(tensors, totals)

    with _dropout(run, step):
        outcome = run_items(
            items, run.terms, run.provider, backward=True, observe=observe, carried=run.carried
        )
    found = run.ranks.together(lambda: checks.conclude(outcome.parts))
    if step == 0:
        run.folder.write(preflight={**run.folder.record.get("preflight", {}), "first_step": found})
    if not run.ranks.alone:
        totals.merge(run.ranks.gather(totals.state()))
    parameters = list(run.names)
    limit = run.config.max_grad_norm
    norm = whole(torch.nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit))
    loss, grad_norm = torch.stack([outcome.loss, norm.double()]).tolist()
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        run.optimizer.zero_grad(set_to_none=True)
        rows = suspects(items, run.terms, run.provider)
        shown = ", ".join(rows[:5]) + (f" and {len(rows) - 5} more" if len(rows) > 5 else "")
        what = "loss" if not math.isfinite(loss) else "gradient"
        raise TrainingError(f"the {what} of step {step + 1} is not finite; prompts: {shown}")
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.masters is not None:
        run.masters.pull()
    run.tokens += sum(item.size for item in items)
    run.carried = outcome.carried
    return {
        "loss": loss,
        **outcome.totals.means(),
        **figures,
        **totals.means(),
        "grad_norm": grad_norm,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        "tokens": run.tokens,
    }


def _items(run: Run, step: int) -> tuple[list[Item], dict[str, float]]:
    """The items of a step, and figures of the rollouts they come from."""
    if run.source is None:
        config = run.config
        places = shuffled(len(run.items), step, config.batch_size, config.seed, run.stream)
        items = [run.items[i] for i in places]
        _advantages(items, run.terms)
        return items, {}
    number = step // run.updates
    if run.rollout[0] != number:
        run.rollout = (number, *_roll_out(run, step))
    return run.rollout[1], run.rollout[2]


def _roll_out(run: Run, step: int) -> tuple[list[Item], dict[str, float]]:
    """Fresh items for an online step. Advantages are taken over all completions of the step with a reward."""
    assert run.source is not None
    groups = run.source.step(run.trained, step, run.config.seed)  # type: ignore[arg-type]
    check_data(run.terms, groups, f"the rollouts of step {step + 1}")
    config = run.config
    items = list(prepare(groups, run.terms, run.trained.tokenizer, config.max_length, config.layout).items)
    _advantages(items, run.terms)
    return items, rollout_figures(groups)


def _advantages(items: list[Item], terms: list[Term]) -> None:
    """Advantages over all the completions of a step, where an objective takes them."""
    for rule in {term.advantages for term in terms if term.advantages}:
        set_advantages(items, rule)


def _look(
    run: Run, step: int, metrics: MetricsFile, figures: dict[str, float], timing: Timing, *, always: bool
) -> bool:
    """Evaluate and call the watcher where it is their turn, keep the best weights, and write the line of this
    step. Whether the run stops here, as patience has run out; then all is measured once more.
    """
    every = run.config.eval_every
    evaluate = always or (every is not None and step % every == 0)
    watch = always or step % run.config.watch_every == 0
    line = _measured(run, step, figures, evaluate, watch)
    if run.displacement is not None and step:
        line |= run.displacement.look(step)
    stops = False
    if run.best is not None:
        if run.best.look(step, line):
            with _writing(f"the best weights (step {step})"):
                run.best.save({name: p for p, name in run.names.items()}, run.ranks)
        stops = run.best.stops
    if stops:
        line = _measured(run, step, line, not evaluate, not watch)
    if line:
        with _writing(f"the metrics of step {step}"):
            metrics.write(step, line)
    if run.progress is not None and step:
        note = _note(line) + (f"  {timing.recent():,.0f} tokens/s" if timing.recent() else "")
        run.progress("train", step, step if stops else run.steps, note)
    return stops


def _measured(
    run: Run, step: int, figures: Mapping[str, float], evaluate: bool, watch: bool
) -> dict[str, float]:
    """The figures with those of the held-out data and those of the watcher."""
    line = dict(figures)
    if evaluate and run.eval_items:
        _advantages(run.eval_items, run.terms)
        outcome = run_items(run.eval_items, run.terms, run.provider, backward=False, carried=run.carried)
        line["eval/loss"] = outcome.loss.item()
        line |= {f"eval/{name}": value for name, value in outcome.totals.means().items()}
    if watch and run.watch is not None:
        seen = run.ranks.gather(run.watch(step, run.trained, dict(line)))[0]
        line |= {f"watch/{name}": float(value) for name, value in (seen or {}).items()}
    return line


def _note(line: Mapping[str, float]) -> str:
    names = ("loss", "rewards/accuracies", "accuracy", "reward", "eval/loss")
    return "  ".join(f"{name} {line[name]:.4g}" for name in names if name in line)


def _set_rate(run: Run, step: int) -> None:
    assert run.config.learning_rate is not None
    for group in run.optimizer.param_groups:
        group["lr"] = run.config.learning_rate * rate(step, run.steps, run.config)


@contextmanager
def _dropout(run: Run, step: int) -> Iterator[None]:
    """Dropout for the length of a step, if it is wanted; its noise is a function of (seed, step)."""
    if not run.config.dropout:
        yield
        return
    devices = [run.provider.device] if run.provider.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(derived_seed(run.config.seed, "dropout", step * run.ranks.size + run.ranks.rank))
        run.trained.model.train()
        try:
            yield
        finally:
            run.trained.model.eval()


@contextmanager
def _interruptible() -> Iterator[Callable[[], bool]]:
    """Ctrl-C waits for the end of the step, so that its state can be kept; a second one does not wait.

    In another thread than the main one Ctrl-C acts as Python has it.
    """
    asked: list[bool] = []
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return

    def on_interrupt(number: int, frame: object) -> None:
        if asked:
            raise KeyboardInterrupt
        asked.append(True)

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield lambda: bool(asked)
    finally:
        signal.signal(signal.SIGINT, before)


__all__ = ["Run", "Watch", "fit"]
