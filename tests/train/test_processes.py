"""Several processes do the run that one does: equal figures, equal weights, from one another's checkpoints."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import processes_run
import pytest
import torch
from processes_run import Stopped
from safetensors.torch import load_file
from small_runs import largest_difference, lines, pair_groups, tiny_policy

from steerwell.train import train
from steerwell.train.ranks import ALONE, shares

KINDS = ("dpo", "mixture", "kto", "aot", "bco", "bradley_terry", "process_reward", "grpo", "lora")
OF_HEADS = ("odin",)  # its losses are in float32, and one reads the weights of the head, beside the layers
ROUNDED = ("lora_bf16",)  # in bfloat16 the last digits depend on who is packed with whom
TESTS = Path(__file__).parents[1]


def documented() -> list[str]:
    """The lines that the page on processes shows."""
    page = (TESTS.parent / "docs" / "processes.md").read_text("utf-8")
    return [line for line in page.splitlines() if line.startswith("torchrun ")]


def launch(*words: str, nodes: int = 1) -> str:
    """Run a program in two processes by ``torchrun``, on one "node" or on two; what it printed."""
    path = os.pathsep.join([str(TESTS), str(TESTS / "train"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    if nodes == 1:
        commands = [[*torchrun, "--standalone", "--nproc-per-node=2", *words]]
    else:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        meet = [
            "--nnodes=2",
            "--nproc-per-node=1",
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint=localhost:{port}",
        ]
        commands = [[*torchrun, *meet, *words]] * 2
    running = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    ends = [process.communicate(timeout=300) for process in running]
    for process, (_, errors) in zip(running, ends, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return "".join(out for out, _ in ends)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Where the runs of one process (one), of two (two), and those that were stopped and continued lie."""
    torch.set_num_threads(1)
    top = tmp_path_factory.mktemp("processes")
    made = {name: top / name for name in ("one", "two", "two_twice", "one_two", "two_one")}
    for kind in KINDS + OF_HEADS + ROUNDED:
        processes_run.run(kind, made["one"] / kind)
    with suppress(Stopped):
        processes_run.run("dpo", made["one_two"] / "dpo", 5)
    launch(
        processes_run.__file__,
        *(str(made["two"] / kind) for kind in KINDS + OF_HEADS + ROUNDED),
        f"{made['two_twice']}/dpo:5",
        f"{made['two_twice']}/dpo",
        f"{made['two_one']}/dpo:5",
        f"{made['one_two']}/dpo",
    )
    assert "step-000004" in {path.name for path in (made["two_one"] / "dpo" / "checkpoints").iterdir()}
    processes_run.run("dpo", made["two_one"] / "dpo")
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_give_the_curve_of_one(folders: dict[str, Path], kind: str) -> None:
    one, two = (lines(folders[name] / kind) for name in ("one", "two"))
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for mine, other in zip(one, two, strict=True):
        for name in mine:
            assert mine[name] == pytest.approx(other[name], rel=1e-5, abs=1e-5), name
    assert one[-1]["step"] == 6
    assert one[1]["loss"] != one[-1]["loss"]
    bound = 2e-6 if kind in processes_run.IN_FLOAT32 else 1e-12
    assert difference(folders["one"] / kind, folders["two"] / kind) < bound
    assert json.loads((folders["two"] / kind / "run.json").read_text())["processes"] == 2


@pytest.mark.parametrize("kind", OF_HEADS)
def test_a_loss_that_reads_weights_has_one_gradient(folders: dict[str, Path], kind: str) -> None:
    """With each process's own gradient of the head figures were 3 % apart."""
    one, two = (lines(folders[name] / kind) for name in ("one", "two"))
    for mine, other in zip(one, two, strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)
    assert difference(folders["one"] / kind, folders["two"] / kind) < 2e-5


@pytest.mark.parametrize("kind", ROUNDED)
def test_two_processes_in_bfloat16(folders: dict[str, Path], kind: str) -> None:
    one, two = (lines(folders[name] / kind) for name in ("one", "two"))
    assert [line["loss"] for line in one[1:]] == pytest.approx([line["loss"] for line in two[1:]], abs=5e-3)
    assert difference(folders["one"] / kind, folders["two"] / kind) < 1e-3


@pytest.mark.parametrize("name", ["one_two", "two_one"])
def test_a_checkpoint_is_continued_by_another_number_of_processes(
    folders: dict[str, Path], name: str
) -> None:
    assert difference(folders["one"] / "dpo", folders[name] / "dpo") < 2e-6
    for mine, other in zip(lines(folders["one"] / "dpo"), lines(folders[name] / "dpo"), strict=True):
        assert mine == pytest.approx(other, rel=1e-5, abs=1e-5)


def test_two_processes_continue_to_the_same_bytes(folders: dict[str, Path]) -> None:
    straight, continued = folders["two"] / "dpo", folders["two_twice"] / "dpo"
    for name in ("metrics.jsonl", "model/model.safetensors"):
        assert (straight / name).read_bytes() == (continued / name).read_bytes()


def test_a_torn_part_of_a_checkpoint_is_passed_over(folders: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "dpo"
    shutil.copytree(folders["two"] / "dpo", out)
    record = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps({**record, "status": "running"}))
    part = max((out / "checkpoints" / "step-000004" / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-10])
    notes: list[str] = []
    processes_run.run("dpo", out, progress=lambda *told: notes.append(told[3]))
    assert any("continued from step 2; step-000004 was incomplete" in note for note in notes)
    assert difference(folders["one"] / "dpo", out) < 2e-6


def difference(one: Path, other: Path) -> float:
    """The largest difference between the weights of two runs."""
    first, second = (load_file(out / "model" / "model.safetensors") for out in (one, other))
    return largest_difference(first, second)


def test_two_nodes_train_by_the_command_line(tmp_path: Path) -> None:
    model = tiny_policy().save(tmp_path / "base")
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(6)]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = tmp_path / "dpo.toml"
    recipe.write_text(
        f'model = "{model}"\ndata = "{data}"\nobjective = "dpo"\nout = "{tmp_path}/run"\n'
        "[train]\nbatch_size = 3\nlearning_rate = 1e-3\n"
    )
    printed = launch("-m", "steerwell", "train", str(recipe), "--json", nodes=2)
    assert json.loads(printed)["status"] == "done"  # one of the two speaks
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2


def test_shares_are_even_and_complete() -> None:
    assert shares([5, 1, 1, 1, 2], 2) == [[0], [1, 2, 3, 4]]
    assert shares([], 3) == [[], [], []]
    assert shares([7], 2) == [[0], []]
    many = [(i * 37) % 11 + 1 for i in range(50)]
    parts = shares(many, 4)
    assert sorted(i for part in parts for i in part) == list(range(50))
    loads = [sum(many[i] for i in part) for part in parts]
    assert max(loads) - min(loads) <= max(many)


def test_alone_nothing_is_sent() -> None:
    assert ALONE.gather(3) == [3]
    assert ALONE.first(lambda: "done") == "done"
    with pytest.raises(KeyError):
        ALONE.together(lambda: {}["missing"])
    assert ALONE.share([3, 2]) == [0, 1]


def test_the_number_of_processes_is_recorded(tmp_path: Path) -> None:
    train(tiny_policy(), pair_groups(3), "dpo", out=tmp_path / "run", steps=1)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 1
