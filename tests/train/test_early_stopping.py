"""The best weights are the ones that are saved, a run stops when it gets no better, and a kill changes neither."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import largest_difference, lines, pair_groups, tiny_policy, weights

from steerwell.data.errors import InputError
from steerwell.models.load import load_policy
from steerwell.train import TrainingError, checkpoint, train
from steerwell.train.best import Best, direction
from steerwell.train.checkpoint import checkpoints

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 3, "checkpoint_every": 3}


class Script:
    """A watcher that says what it is told to, and keeps the weights that it saw."""

    def __init__(self, values: dict[int, float]) -> None:
        self.values = values
        self.seen: dict[int, dict[str, torch.Tensor]] = {}

    def __call__(self, step: int, model: Any, figures: Any) -> dict[str, float]:
        self.seen[step] = weights(model.model)
        return {"score": self.values[step]} if step in self.values else {}


class Crash(Exception):
    """Stands for anything that ends a run from inside."""


def crash_at(*steps: int) -> Any:
    left = list(steps)

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done in left:
            left.remove(done)
            raise Crash

    return progress


def scripted(out: Path, script: Script, progress: Any = None, **settings: Any) -> Any:
    given = {"steps": 14, "watch_every": 2, "best_metric": "watch/score", "best_mode": "max", **settings}
    return train(
        tiny_policy(), pair_groups(10), [("dpo", 1.0), ("sft", 0.1)], out=out, watch=script,
        eval_data=pair_groups(3), progress=progress, **SETTINGS, **given,
    )  # fmt: skip


RISES_TO_8 = {0: 0.1, 2: 0.3, 4: 0.5, 6: 0.4, 8: 0.9, 10: 0.2, 12: 0.8, 14: 0.7}


def result(out: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "done"
    model, metrics = out / "model" / "model.safetensors", out / "metrics.jsonl"
    return model.read_bytes(), metrics.read_bytes(), record["best"]


def test_the_best_weights_are_saved(tmp_path: Path) -> None:
    script = Script(RISES_TO_8)
    trained = scripted(tmp_path / "run", script)
    assert largest_difference(weights(trained.model), script.seen[8]) == 0.0
    assert largest_difference(weights(trained.model), script.seen[14]) > 1e-4
    saved = load_policy(tmp_path / "run" / "model")
    assert largest_difference(weights(saved.model), script.seen[8]) == 0.0
    assert result(tmp_path / "run")[2] == {
        "metric": "watch/score", "mode": "max", "step": 8, "value": 0.9, "stopped": "all steps done",
    }  # fmt: skip
    assert lines(tmp_path / "run")[-1]["step"] == 14


def test_it_stops_when_patience_has_run_out(tmp_path: Path) -> None:
    # an equal value is no improvement, nor is one that is not finite
    script = Script({0: 0.1, 2: 0.5, 4: 0.5, 6: math.nan, 8: 0.4, 10: 0.9})
    trained = scripted(tmp_path / "run", script, patience=3)
    assert largest_difference(weights(trained.model), script.seen[2]) == 0.0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["steps"] == 8
    assert record["best"]["step"] == 2
    assert record["best"]["stopped"] == "not better in 3 measurements"
    last = lines(tmp_path / "run")[-1]
    assert last["step"] == 8
    assert "eval/loss" in last  # measured once more where it stopped, though it was not its turn
    assert not any("eval/loss" in line for line in lines(tmp_path / "run")[1:-1])


def test_the_smallest_evaluation_loss_wins(tmp_path: Path) -> None:
    data, held_out = pair_groups(6), pair_groups(3, seed=4)
    settings = {**SETTINGS, "learning_rate": 4e-2, "steps": 12, "eval_every": 2}
    trained = train(tiny_policy(), data, "sft", out=tmp_path / "a", eval_data=held_out,
                    best_metric="eval/loss", **settings)  # fmt: skip
    losses = {line["step"]: line["eval/loss"] for line in lines(tmp_path / "a") if "eval/loss" in line}
    best = result(tmp_path / "a")[2]
    assert best["value"] == min(losses.values())
    assert losses[best["step"]] == best["value"]
    assert 0 < best["step"] < 12  # it rises again: too many epochs
    train(trained, data, "sft", out=tmp_path / "b", eval_data=held_out, steps=1)
    assert lines(tmp_path / "b")[0]["eval/loss"] == pytest.approx(best["value"], rel=1e-6)


@pytest.mark.parametrize("steps", [(8,), (10,), (1, 9), (7, 13)])
def test_a_crashed_run_keeps_its_best(tmp_path: Path, steps: tuple[int, ...]) -> None:
    # at 8 the newest checkpoint (6) goes back to the best of step 4, while that of step 8 lies there already
    scripted(tmp_path / "straight", Script(RISES_TO_8))
    out = tmp_path / "run"
    for step in steps:
        with pytest.raises(Crash):
            scripted(out, Script(RISES_TO_8), crash_at(step))
    scripted(out, Script(RISES_TO_8))
    assert result(out) == result(tmp_path / "straight")


def test_patience_is_counted_over_a_crash(tmp_path: Path) -> None:
    script = {0: 0.5, 2: 0.1, 4: 0.1, 6: 0.1, 8: 0.1, 10: 0.9, 12: 0.9, 14: 0.9}
    scripted(tmp_path / "straight", Script(script), patience=4)
    with pytest.raises(Crash):
        scripted(tmp_path / "run", Script(script), crash_at(7), patience=4)
    scripted(tmp_path / "run", Script(script), patience=4)
    assert result(tmp_path / "run") == result(tmp_path / "straight")
    assert result(tmp_path / "run")[2]["step"] == 0
    assert lines(tmp_path / "run")[-1]["step"] == 8


def test_torn_best_weights_take_the_run_back_to_a_checkpoint_without_them(tmp_path: Path) -> None:
    scripted(tmp_path / "straight", Script(RISES_TO_8))
    out, told = tmp_path / "run", []
    with pytest.raises(Crash):
        scripted(out, Script(RISES_TO_8), crash_at(11))
    best = out / "checkpoints" / "best"
    assert [path.name for path in checkpoints(out / "checkpoints")] == ["step-000006", "step-000009"]
    assert [path.name for path in checkpoints(best)] == ["step-000004", "step-000008"]
    (best / "step-000008" / "model.safetensors").write_bytes(b"half")
    scripted(out, Script(RISES_TO_8), lambda *args: told.append(args))
    assert next(args for args in told if args[0] == "train")[1] == 6
    assert result(out) == result(tmp_path / "straight")
    # what no checkpoint goes back to is deleted
    assert [path.name for path in checkpoints(best)] == ["step-000008"]


def test_a_full_disk_at_the_best_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scripted(tmp_path / "straight", Script(RISES_TO_8))
    out, true = tmp_path / "run", checkpoint.save_file

    def full(tensors: Any, path: Path) -> None:
        if "best" in str(path) and "step-000008" in str(path):
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        true(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            TrainingError, match=r"the best weights \(step 8\) could not be written \(No space"
        ):
            scripted(out, Script(RISES_TO_8))
    scripted(out, Script(RISES_TO_8))
    assert result(out) == result(tmp_path / "straight")


def test_settings_of_the_best_that_make_no_sense(tmp_path: Path) -> None:
    data = pair_groups()

    def refused(**settings: Any) -> str:
        with pytest.raises(InputError) as error:
            train(None, data, "dpo", out=tmp_path / "out", **settings)  # type: ignore[arg-type]
        return str(error.value)

    assert "patience is given without best_metric" in refused(patience=2)
    assert "best_mode is given without best_metric" in refused(best_mode="max")
    assert "is given without eval_data" in refused(best_metric="eval/loss")
    assert "is given without watch" in refused(best_metric="watch/score")
    assert "is no held-out figure" in refused(best_metric="loss", eval_data=data)
    assert "nothing is measured between start and end. Give eval_every" in refused(
        best_metric="eval/loss", patience=2, eval_data=data
    )
    assert "whether more of 'watch/score' is better is not known" in refused(
        best_metric="watch/score", watch=lambda *_: {}
    )
    assert not (tmp_path / "out").exists()


def test_a_figure_that_is_not_measured_is_named_before_the_first_update(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"'eval/rewards/accuracy' is not measured.*'eval/rewards/accuracies'"
    ):
        train(
            tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", eval_data=pair_groups(2, seed=1),
            steps=2, best_metric="eval/rewards/accuracy", best_mode="max",
        )  # fmt: skip
    assert lines(tmp_path / "a") == []


def test_directions() -> None:
    assert direction("eval/loss") == direction("eval/loss/sft") == "min"
    assert direction("eval/rewards/accuracies") == direction("eval/ipo/rewards/accuracies") == "max"
    assert direction("eval/accuracy") == direction("watch/win_rate") == "max"
    assert direction("eval/logps/chosen") is None
    assert direction("watch/floss") is None
    best = Best(Path(), "eval/loss", "min")
    assert [best.look(i, {"eval/loss": x}) for i, x in enumerate((1.0, 2.0, 0.5, 0.5))] == [
        True, False, True, False,
    ]  # fmt: skip
    assert (best.step, best.value, best.since, best.stops) == (2, 0.5, 1, False)
    assert not best.look(4, {"loss": 0.1})
    assert best.since == 1  # nothing was measured
