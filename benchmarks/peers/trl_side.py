"""TRL's side of train_vs_trl.py: run by the interpreter of the peer's environment, with a folder as argument.

The folder holds ``task.json``, ``rows.json`` (token ids in the order of training) and ``model/``; the result is
written to the file that the task names. TRL runs at its best on a CPU: fp32, no gradient checkpointing, SDPA,
the fused AdamW, no logging, no checkpoints, telemetry off.
"""

import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path

os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    TRL_EXPERIMENTAL_SILENCE="1",
    TQDM_DISABLE="1",
)

import datasets
import torch
import transformers
import trl
from torch.utils.data import SequentialSampler

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
datasets.disable_progress_bars()

TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "sft": (trl.SFTTrainer, trl.SFTConfig),
}


def peak_mib() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        return next(int(x.split()[1]) for x in status.read_text().splitlines() if "VmHWM" in x) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Order(torch.utils.data.Sampler):
    """Row numbers in the given order, another one for each epoch."""

    def __init__(self, orders):
        self.orders, self.epoch = orders, 0

    def __len__(self):
        return len(self.orders[0])

    def __iter__(self):
        order = self.orders[min(self.epoch, len(self.orders) - 1)]
        self.epoch += 1
        return iter(order)


def dataset(method, rows):
    """The rows as text, one column each, as the trainer of ``method`` takes them."""

    def spell(ids):
        return " ".join(f"t{i}" for i in ids)

    if method == "kto":
        # Within a batch first all chosen, then all rejected: TRL rotates the completions of a batch for its KL.
        records = []
        for batch in rows:
            for place, label in ((1, True), (2, False)):
                records += [
                    {"prompt": spell(row[0]) + " ", "completion": spell(row[place]), "label": label}
                    for row in batch
                ]
    elif method == "sft":
        records = [{"prompt": spell(p) + " ", "completion": spell(c)} for p, c, _ in rows]
    elif method == "reward":
        records = [{"chosen": spell(p + c), "rejected": spell(p + r)} for p, c, r in rows]
    else:
        records = [{"prompt": spell(p) + " ", "chosen": spell(c), "rejected": spell(r)} for p, c, r in rows]
    return datasets.Dataset.from_list(records)


def settings(task, folder):
    method, batch = task["method"], task["batch_size"]
    chosen = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 * batch if method == "kto" else batch,
        "num_train_epochs": task["epochs"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "max_grad_norm": 1.0,
        "optim": "adamw_torch_fused",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
        "max_length": None,
    }
    if method in ("dpo", "kto"):
        chosen["precompute_ref_log_probs"] = task["reference"] == "precompute"
        chosen["beta"] = task["beta"]
    if method == "kto":
        chosen["train_sampling_strategy"] = "sequential"
    return chosen


def main(folder: Path) -> None:
    base = peak_mib()
    task = json.loads((folder / "task.json").read_text())
    orders = json.loads((folder / "order.json").read_text())
    rows = json.loads((folder / "rows.json").read_text())
    method, size = task["method"], task["batch_size"]
    if method == "kto":
        ordered = [rows[i] for order in orders for i in order]
        task["epochs"] = 1
        data = dataset(method, [ordered[i : i + size] for i in range(0, len(ordered), size)])
    else:
        data = dataset(method, rows)
    kind = (
        transformers.AutoModelForSequenceClassification
        if method == "reward"
        else transformers.AutoModelForCausalLM
    )
    model = kind.from_pretrained(folder / "model", dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    trainer_class, config_class = TRAINERS[method]
    losses, seconds, kernel, reference = [], [], [], [0.0, 0.0]

    class Timed(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset) if method == "kto" else Order(orders)

        def _precompute_ref_logps(self, *args, **kwargs):
            start, start_kernel = time.process_time(), os.times().system
            out = super()._precompute_ref_logps(*args, **kwargs)
            reference[0] += time.process_time() - start
            reference[1] += os.times().system - start_kernel
            return out

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            seconds.append(time.process_time())
            kernel.append(os.times().system)

    with tempfile.TemporaryDirectory() as out:
        begin = time.process_time()
        trainer = Timed(
            model=model,
            args=config_class(**settings(task, out)),
            train_dataset=data,
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        ready_kernel = os.times().system
        ready, wall = time.process_time(), time.perf_counter()
        trainer.train()
        end, wall = time.process_time(), time.perf_counter() - wall
        peak = peak_mib()
    result = {
        "training_cpu_seconds": reference[0] + seconds[-1] - ready,
        "of_it_in_the_kernel": reference[1] + kernel[-1] - ready_kernel,
        "reference_cpu_seconds": reference[0],
        "whole_call_cpu_seconds": end - begin,
        "train_wall_seconds": wall,
        "step_ends": [t - ready + reference[0] for t in seconds],
        "peak_mib": peak,
        "import_mib": base,
        "losses": losses,
        "versions": {
            "trl": trl.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "threads": torch.get_num_threads(),
    }
    model.save_pretrained(folder / task["weights"])
    (folder / task["result"]).write_text(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
