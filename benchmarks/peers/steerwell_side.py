"""steerwell's side of train_vs_trl.py: the public ``steerwell.train`` on the same folder, timed.

The training part begins when all texts are tokenised and ends with the last step: reference log-probs,
preflight, steps and the metrics file lie in it; the digest of the start and the final save do not (TRL's part
has neither), and are in ``whole_call_cpu_seconds``.
"""

import json
import os
import resource
import sys
import time
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")

HERE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(HERE))
if (HERE.parent / "src" / "steerwell").is_dir():
    sys.path.insert(0, str(HERE.parent / "src"))

import torch  # noqa: E402
import transformers  # noqa: E402

import steerwell as sw  # noqa: E402
from steerwell.train.loop import train  # noqa: E402
from synthetic import as_groups  # noqa: E402

torch.set_num_threads(1)
OBJECTIVES = {"dpo": "dpo", "reward": "bradley_terry", "kto": "kto", "sft": "sft"}
NEVER = 10**9


def peak_mib() -> float:
    """Peak resident memory of this process (the kernel's count of ``getrusage`` survives an exec)."""
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if "VmHWM" in x) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def sgemm_rate(size: int = 2048, times: int = 5) -> float:
    """Floating-point operations a second of a square fp32 matrix product on one thread: the median."""
    a, b = torch.rand(size, size), torch.rand(size, size)
    out = a @ b
    taken = []
    for _ in range(times):
        start = time.process_time()
        torch.mm(a, b, out=out)
        taken.append(time.process_time() - start)
    return 2 * size**3 / sorted(taken)[times // 2]


def main(folder: Path) -> None:
    """Run the task of ``folder`` and write its result."""
    base = peak_mib()
    task = json.loads((folder / "task.json").read_text())
    rows = json.loads((folder / "rows.json").read_text())
    method = task["method"]
    groups = as_groups(rows, method)
    marks: dict[str, list[float]] = {}
    kernel: list[float] = []  # CPU seconds inside the kernel (page faults, mostly) at the same moments

    def progress(stage: str, done: int, total: int, note: str) -> None:
        marks.setdefault(stage, []).append(time.process_time())
        if stage == "train" or done == total:
            kernel.append(os.times().system)

    beta = {"beta": task["beta"]} if method in ("dpo", "kto") else {}
    begin, wall = time.process_time(), time.perf_counter()
    train(
        folder / "model",
        groups,
        OBJECTIVES[method],
        out=folder / task["out"],
        learning_rate=task["learning_rate"],
        epochs=task["epochs"],
        batch_size=task["batch_size"],
        max_tokens=task["max_tokens"],
        schedule="constant",
        warmup=0.0,
        weight_decay=0.0,
        betas=(0.9, 0.999),
        max_grad_norm=1.0,
        seed=task["seed"],
        checkpoint_every=NEVER,
        progress=progress,
        **beta,
    )
    end, wall = time.process_time(), time.perf_counter() - wall
    peak = peak_mib()
    ready, steps = marks["tokenize"][-1], marks["train"]
    lines = [json.loads(line) for line in (folder / task["out"] / "metrics.jsonl").read_text().splitlines()]
    result = {
        "training_cpu_seconds": steps[-1] - ready,
        "of_it_in_the_kernel": kernel[-1] - kernel[0],
        "reference_cpu_seconds": marks["reference"][-1] - ready if "reference" in marks else 0.0,
        "whole_call_cpu_seconds": end - begin,
        "train_wall_seconds": wall,
        "step_ends": [t - ready for t in steps],
        "peak_mib": peak,
        "import_mib": base,
        "losses": [line["loss"] for line in lines if "loss" in line],
        "versions": {
            "steerwell": sw.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
        "sgemm_flops": sgemm_rate(),
    }
    (folder / task["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
