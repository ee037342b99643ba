"""A run that was stopped anyhow and started again is the same run: equal weights, byte for byte, equal
metrics."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import resumed_run
import torch
from resumed_run import STEPS, run
from small_runs import lines, pair_groups, tiny_policy

from steerwell.data.errors import InputError
from steerwell.train import TrainingError, checkpoint, fit, train
from steerwell.train.checkpoint import checkpoints, save_checkpoint


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The process that is killed has one thread, so the one that goes on must have one too."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[bytes, bytes]]:
    """Weights and metrics of the runs that nobody interrupted."""
    torch.set_num_threads(1)
    made = {}
    for kind in ("mixture", "grpo", "kto", "bradley_terry"):
        out = tmp_path_factory.mktemp(kind) / "run"
        run(kind, out)
        made[kind] = result(out)
    return made


def result(out: Path) -> tuple[bytes, bytes]:
    assert json.loads((out / "run.json").read_text())["status"] == "done"
    return (out / "model" / "model.safetensors").read_bytes(), (out / "metrics.jsonl").read_bytes()


class Crash(Exception):
    """Stands for anything that ends a run from inside."""


def crash_at(step: int) -> Any:
    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == step:
            raise Crash

    return progress


def start(kind: str, out: Path) -> subprocess.Popen[bytes]:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests / "train"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, resumed_run.__file__, kind, str(out), "0.2"]
    return subprocess.Popen(script, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for_lines(process: subprocess.Popen[bytes], out: Path, count: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        if (out / "metrics.jsonl").exists() and len(
            (out / "metrics.jsonl").read_bytes().splitlines()
        ) >= count:
            return
        assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
        time.sleep(0.002)
    raise AssertionError("the run did not come that far")


@pytest.mark.parametrize("kind", ["mixture", "grpo"])
def test_killed_at_a_random_step(kind: str, tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]) -> None:
    out = tmp_path / "run"
    process = start(kind, out)
    try:
        wait_for_lines(process, out, random.randint(4, STEPS - 4))
        process.send_signal(signal.SIGKILL)
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
    assert not (out / "model").exists()
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    run(kind, out)
    assert result(out) == straight[kind]


def test_ctrl_c_in_another_process(tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]) -> None:
    out = tmp_path / "run"
    process = start("mixture", out)
    try:
        wait_for_lines(process, out, 5)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    assert errors.decode().rstrip().endswith("KeyboardInterrupt")
    record = json.loads((out / "run.json").read_text())
    assert record["status"] == "interrupted"
    assert record["step"] == lines(out)[-1]["step"]  # nothing that was done is lost
    assert checkpoints(out / "checkpoints")[-1].name == f"step-{record['step']:06d}"
    run("mixture", out)
    assert result(out) == straight["mixture"]


@pytest.mark.parametrize("kind", ["kto", "bradley_terry", "grpo"])
@pytest.mark.parametrize("step", [1, 7])
def test_crashed(kind: str, step: int, tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]) -> None:
    out = tmp_path / "run"
    for at in (step, step + 4):
        with pytest.raises(Crash):
            run(kind, out, progress=crash_at(at))
    run(kind, out)
    assert result(out) == straight[kind]


@pytest.mark.parametrize("harm", ["cut", "flip", "no manifest", "half manifest"])
def test_a_torn_checkpoint_is_passed_over(
    harm: str, tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]
) -> None:
    out, told = tmp_path / "run", []
    with pytest.raises(Crash):
        run("mixture", out, progress=crash_at(8))
    kept = checkpoints(out / "checkpoints")
    assert [path.name for path in kept] == ["step-000003", "step-000006"]
    weights, manifest = kept[-1] / "model.safetensors", kept[-1] / "manifest.json"
    if harm == "cut":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif harm == "flip":
        whole = bytearray(weights.read_bytes())
        whole[-5] ^= 1
        weights.write_bytes(bytes(whole))
    elif harm == "no manifest":
        manifest.unlink()
    else:
        manifest.write_bytes(manifest.read_bytes()[:40])
    run("mixture", out, progress=lambda *args: told.append(args))
    first = next(args for args in told if args[0] == "train")
    assert first[1] == 3
    assert "continued from step 3; step-000006 was incomplete" in first[3]
    assert result(out) == straight["mixture"]


def test_when_every_checkpoint_is_torn_the_run_begins_again(
    tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Crash):
        run("mixture", out, progress=crash_at(8))
    for path in checkpoints(out / "checkpoints"):
        (path / "optimizer.safetensors").write_bytes(b"")
    run("mixture", out)
    assert result(out) == straight["mixture"]


def test_a_metrics_file_that_lost_its_end_goes_with_the_checkpoint_before(
    tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]
) -> None:
    out = tmp_path / "run"
    with pytest.raises(Crash):
        run("mixture", out, progress=crash_at(8))
    metrics = out / "metrics.jsonl"
    kept = metrics.read_bytes().splitlines(keepends=True)
    metrics.write_bytes(b"".join(kept[:5]))
    run("mixture", out)
    assert result(out) == straight["mixture"]


def test_a_kill_between_the_last_step_and_the_saved_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, tuple[bytes, bytes]]
) -> None:
    out = tmp_path / "run"

    def no_save(*_: Any) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(fit.Policy, "save", no_save)
        with pytest.raises(Crash):
            run("mixture", out)
    assert json.loads((out / "run.json").read_text())["status"] == "running"
    run("mixture", out)
    assert result(out) == straight["mixture"]


def test_ctrl_c_waits_for_the_step_and_a_second_does_not(
    tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]
) -> None:
    def interrupt(times: int) -> Any:
        def progress(stage: str, done: int, total: int, note: str) -> None:
            if stage == "train" and done == 5:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)

        return progress

    before = signal.getsignal(signal.SIGINT)
    for times, step in ((1, 5), (2, 3)):
        out = tmp_path / str(times)
        with pytest.raises(KeyboardInterrupt):
            run("mixture", out, progress=interrupt(times))
        record = json.loads((out / "run.json").read_text())
        assert (record["status"], record["step"]) == ("interrupted", step)
        assert signal.getsignal(signal.SIGINT) is before
        run("mixture", out)
        assert result(out) == straight["mixture"]


def test_ctrl_c_between_updates_waits_for_the_end_of_the_rollouts(
    tmp_path: Path, straight: dict[str, tuple[bytes, bytes]]
) -> None:
    out = tmp_path / "run"

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == 5:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run("grpo", out, progress=progress)
    assert json.loads((out / "run.json").read_text())["step"] == 6
    run("grpo", out)
    assert result(out) == straight["grpo"]


def test_a_full_disk_keeps_the_earlier_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, straight: dict[str, tuple[bytes, bytes]]
) -> None:
    out, true, calls = tmp_path / "run", checkpoint.save_file, []

    def full(tensors: Any, path: Path) -> None:
        calls.append(path)
        if len(calls) > 3:
            Path(path).write_bytes(b"half")
            raise OSError(28, "No space left on device")
        true(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(TrainingError, match=r"No space left on device.*earlier ones are kept"):
            run("mixture", out)
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000003"]
    run("mixture", out)
    assert result(out) == straight["mixture"]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (1, 9, 10):
        save_checkpoint(tmp_path, step, {"model": {"w": torch.ones(2)}}, {"metrics_bytes": 0}, keep=2)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-000009", "step-000010"]


def test_two_processes_do_not_train_into_one_folder(tmp_path: Path) -> None:
    out = tmp_path / "run"

    def second(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == 2:
            with pytest.raises(InputError, match="another process is training into out"):
                run("mixture", out)
            raise Crash

    with pytest.raises(Crash):
        run("mixture", out, progress=second)
    with pytest.raises(InputError, match="out holds another run"):
        train(tiny_policy(), pair_groups(), "dpo", out=out)
