"""TensorBoard and W&B: asked for by name, told every step once, and nothing but figures and settings."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from small_runs import lines, pair_groups, tiny_policy

from steerwell.data.errors import InputError
from steerwell.train import sinks, train

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 4, "steps": 8, "checkpoint_every": 3}


class Writer:
    """Takes the part of TensorBoard's writer: it writes what it was told to a file of its own."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.texts: list[str] = []
        self.closed = False
        Path(log_dir).mkdir(parents=True)  # fails if the one before still lies there
        Writer.made.append(self)

    def add_text(self, name: str, text: str, step: int) -> None:
        self.texts.append(text)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert isinstance(value, float | int)
        self.scalars.append((name, value, step))

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed = True


class WandbRun:
    """Takes the part of a W&B run on a server that keeps what it has."""

    def __init__(self, history: list[tuple[int, dict[str, float]]], asked: dict[str, Any]) -> None:
        self.history, self.asked = history, asked
        self.exit_code: int | None = None

    @property
    def step(self) -> int:
        return self.history[-1][0] + 1 if self.history else 0

    def log(self, figures: dict[str, float], step: int) -> None:
        assert not self.history or step > self.history[-1][0], "a step was sent twice"
        self.history.append((step, figures))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module that answers as W&B does; ``runs`` are the runs that were begun, ``server`` what it keeps."""
    fake: Any = ModuleType("wandb")
    fake.runs, fake.server = [], {}
    fake.Error = type("Error", (Exception,), {})
    fake.Settings = lambda **given: given

    def init(**asked: Any) -> WandbRun:
        kept = fake.server.setdefault(asked["id"], []) if asked["mode"] == "online" else []
        fake.runs.append(WandbRun(kept, asked))
        return fake.runs[-1]

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for name in ("WANDB_MODE", "WANDB_PROJECT", "WANDB_ERROR_REPORTING"):
        monkeypatch.delenv(name, raising=False)
    return fake


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    fake: Any = ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    Writer.made = []
    return Writer


class Crash(Exception):
    """Stands for anything that ends a run from inside."""


def run(out: Path, *names: str, crash: int = 0) -> None:
    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == crash:
            raise Crash

    data = pair_groups(8)
    train(tiny_policy(), data, "dpo", out=out, eval_data=data[:2], sinks=names, progress=progress, **SETTINGS)


def figures_of(out: Path) -> list[tuple[str, float, int]]:
    return [(n, v, line["step"]) for line in lines(out) for n, v in line.items() if n != "step"]


def test_tensorboard_is_told_every_figure_once(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(Crash):
        run(tmp_path / "run", "tensorboard", crash=5)
    assert max(step for _, _, step in writer.made[0].scalars) == 5
    run(tmp_path / "run", "tensorboard")
    first, second = writer.made
    assert first.closed
    assert second.closed
    assert second.scalars == figures_of(tmp_path / "run")
    assert "train.learning_rate = 0.003" in second.texts[0]
    run(tmp_path / "plain")
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()


def test_wandb_stays_offline_unless_the_environment_says_otherwise(
    tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "run", "wandb")
    (begun,) = wandb.runs
    assert begun.asked["mode"] == "offline"
    assert begun.asked["project"] == "steerwell"
    assert begun.exit_code == 0
    sent = [(n, v, step) for step, figures in begun.history for n, v in figures.items()]
    assert sent == figures_of(tmp_path / "run")
    # the settings of the run, and no paths, names of machines, code or command lines
    identity = json.loads((tmp_path / "run" / "run.json").read_text())["identity"]
    assert begun.asked["config"] == identity
    assert not any(str(tmp_path) in str(value) for value in identity.values())
    assert begun.asked["settings"] == sinks.PRIVATE
    assert sinks.os.environ["WANDB_ERROR_REPORTING"] == "false"
    monkeypatch.setenv("WANDB_MODE", "online")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    run(tmp_path / "other", "wandb")
    assert (wandb.runs[1].asked["mode"], wandb.runs[1].asked["project"]) == ("online", "mine")


@pytest.mark.parametrize("mode", ["online", "offline"])
def test_wandb_is_not_sent_a_step_twice(
    mode: str, tmp_path: Path, wandb: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", mode)
    with pytest.raises(Crash):
        run(tmp_path / "run", "wandb", crash=5)
    assert wandb.runs[0].exit_code == 1
    if mode == "online":
        del wandb.runs[0].history[2:]  # what a kill took before it was sent
    run(tmp_path / "run", "wandb")
    first, second = wandb.runs
    assert first.asked["id"] == second.asked["id"]
    assert second.asked["resume"] == ("allow" if mode == "online" else None)
    assert [step for step, _ in second.history] == list(range(9))


def test_a_missing_package_is_said_before_the_model_is_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, module in sinks.MODULES.items():
        monkeypatch.setitem(sys.modules, module, None)  # what Python does for a module that can't be imported
        with pytest.raises(InputError) as error:
            train(None, pair_groups(), "dpo", out=tmp_path / "run", sinks=[name])  # type: ignore[arg-type]
        assert str(error.value) == (
            f"the sink '{name}' needs the package {name}. Install it: pip install 'steerwell[{name}]'."
        )
    with pytest.raises(InputError, match=r"sinks.0 = tensorbord"):
        train(None, pair_groups(), "dpo", out=tmp_path / "run", sinks=["tensorbord"])  # type: ignore[arg-type]
    assert not (tmp_path / "run").exists()


def test_wandb_that_cannot_start_is_one_line(tmp_path: Path, wandb: Any) -> None:
    def init(**_: Any) -> None:
        raise wandb.Error("no API key\nconfigured")

    wandb.init = init
    with pytest.raises(InputError, match=r"wandb could not start \(no API key\)\. Log in"):
        run(tmp_path / "run", "wandb")


def test_a_sink_may_be_added_to_a_run_that_goes_on(tmp_path: Path, writer: Any) -> None:
    with pytest.raises(Crash):
        run(tmp_path / "run", crash=5)
    run(tmp_path / "run", "tensorboard")
    assert writer.made[0].scalars == figures_of(tmp_path / "run")


def test_real_event_files_can_be_read_back(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with pytest.raises(Crash):
        run(tmp_path / "run", "tensorboard", crash=5)
    run(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    for name in ("loss", "eval/rewards/accuracies"):
        wanted = [(line["step"], line[name]) for line in lines(tmp_path / "run") if name in line]
        assert [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)] == wanted
