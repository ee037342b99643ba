"""DPO on a GPU: tokens per second, model FLOPs utilisation and peak memory, by layout, against TRL.

    python benchmarks/gpu.py --models 1.5b --modes full
    python benchmarks/gpu.py --models 0.6b 1.5b 8b --modes full lora --contenders tree rows padded trl
    python benchmarks/gpu.py --self-check        # the same code at toy size on a CPU, some seconds

One file: it needs torch with CUDA, transformers, peft and steerwell (installed, or ``src`` beside this folder),
and nothing from the network: models have random weights in bf16 and data are random tokens. TRL is measured when
``--peer PYTHON`` (or STEERWELL_PEER_PYTHON) names an interpreter that has it, or when it is importable here.
Every contender runs in a process of its own; the result file is written after each, and a later call adds to
it, so that work can be spread over several commands. What is missing is said, and what does not fit in memory is
recorded as such.

``tree`` and ``rows`` are ``steerwell.train`` with that layout (``tree_compile``: with compile=True). ``padded``
is a stand-in for a trainer that pads: a plain Hugging Face forward over 2B sequences padded to the longest, with
SDPA, bf16 weights and our head and loss. ``trl`` is TRL's DPOTrainer in bf16 with the reference computed ahead,
no gradient checkpointing unless memory asks for it, at the largest micro-batch of ``--trl-batch`` that fits;
with several micro-batches and number types, the fastest counts.

Timed are whole optimizer steps after ``--warmup`` steps; the reference pass is timed apart.

Model FLOPs count what must be computed (:func:`step_flops`): each unique token once through the layers, the head
on scored positions only, attention by branch; full training costs three forward passes, LoRA two (no weight
gradients) plus three for attention; recomputed activations count nothing. Utilisation divides by the peak of the
GPU for dense bf16.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parent / "src"
PAD, END, FIRST_WORD = 0, 2, 10
# Dense bf16 peak in TFLOP/s, by a part of the device's name; --peak overrides.
PEAKS = {"H200": 989.0, "H100 PCIe": 756.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0, "B200": 2250.0}
# Sizes of Qwen3-0.6B, of a 1.5B of Qwen2.5's shape, and of Qwen3-8B; all built as Qwen3.
SIZES: dict[str, dict[str, Any]] = {
    "toy": {
        "vocab": 512,
        "hidden": 64,
        "layers": 2,
        "heads": 4,
        "kv": 2,
        "head": 16,
        "mlp": 96,
        "tied": True,
    },
    "0.6b": {
        "vocab": 151936,
        "hidden": 1024,
        "layers": 28,
        "heads": 16,
        "kv": 8,
        "head": 128,
        "mlp": 3072,
        "tied": True,
    },
    "1.5b": {
        "vocab": 151936,
        "hidden": 1536,
        "layers": 28,
        "heads": 12,
        "kv": 2,
        "head": 128,
        "mlp": 8960,
        "tied": True,
    },
    "8b": {
        "vocab": 151936,
        "hidden": 4096,
        "layers": 36,
        "heads": 32,
        "kv": 8,
        "head": 128,
        "mlp": 12288,
        "tied": False,
    },
}
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %} <eos>{% else %} {% endif %}"
    "{% endfor %}"
)
CONTENDERS = ("tree", "tree_compile", "rows", "padded", "trl")
RANK, BETA, RATE = 16, 0.1, 1e-6
SAME_LOSS = 1e-4


# The driver


def main() -> None:
    args = arguments()
    if args.one is not None:
        sys.exit(child(args.one))
    if args.self_check:
        return self_check()
    if SOURCE.is_dir():
        sys.path.insert(0, str(SOURCE))
    found = equipment(args)
    print(json.dumps(found, indent=2), flush=True)
    peak = args.peak or next((v for k, v in PEAKS.items() if k in found["gpu"]), None)
    if peak is None:
        sys.exit(f"the peak of {found['gpu']} is not known here: give --peak TFLOPS (dense bf16)")
    slug = re.sub(r"[^a-z0-9]+", "-", found["gpu"].lower()).strip("-")
    out = args.out or HERE / "results" / f"gpu-{slug}.json"
    result = json.loads(out.read_text()) if out.exists() else {"runs": {}}
    result |= {"machine": found, "peak_tflops": peak}
    for size in args.models:
        with tempfile.TemporaryDirectory(prefix="gpu-", dir=args.work) as work:
            task = prepare(args, size, Path(work))
            for mode in args.modes:
                for contender in args.contenders:
                    if contender == "trl" and not found["trl"]:
                        continue
                    one = measured(args, task | {"mode": mode, "contender": contender})
                    figures = concluded(one, task | {"mode": mode}, peak)
                    result["runs"][f"{size} {mode} {contender}"] = figures
                    save_json(out, result)
                    print(f"{size} {mode} {contender}: {json.dumps(figures)}", flush=True)
    result["ratios"] = ratios(result["runs"])
    save_json(out, result)
    print(json.dumps(result["ratios"], indent=2))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--models", nargs="+", choices=SIZES, default=["1.5b"])
    add("--modes", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    add("--contenders", nargs="+", choices=CONTENDERS, default=["tree", "rows", "padded", "trl"])
    add("--peer", default=os.environ.get("STEERWELL_PEER_PYTHON"), help="an interpreter that has TRL")
    add("--batch-size", type=int, default=32, help="pairs per optimizer step")
    add("--prompt", type=int, default=1024, help="mean tokens of a prompt")
    add("--completion", type=int, default=512, help="mean tokens of a completion")
    add("--steps", type=int, default=6)
    add("--warmup", type=int, default=2, help="steps that are not timed")
    add("--max-tokens", type=int, default=16384, help="tokens per micro-batch (padded: padding included)")
    add(
        "--trl-batch",
        type=int,
        nargs="+",
        default=[4],
        help="TRL's pairs per micro-batch; halved until it fits",
    )
    add(
        "--trl-dtype", nargs="+", choices=["autocast", "bf16"], default=["bf16"], help="fp32 weights, or bf16"
    )
    add("--peak", type=float, help="TFLOP/s of the GPU, dense bf16")
    add("--work", type=Path, help="where models are written (8B: 17 GB)")
    add("--out", type=Path)
    add("--self-check", action="store_true", help="toy size on a CPU; asserts equal losses")
    add("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


def equipment(args: argparse.Namespace) -> dict[str, Any]:
    """What is here; exits with a sentence when something that is needed is missing."""
    missing = []
    for name in ("torch", "transformers", "peft", "steerwell"):
        try:
            __import__(name)
        except ImportError as error:
            missing.append(f"{name} ({error})")
    if missing:
        sys.exit(f"missing in {sys.executable}: {'; '.join(missing)}")
    import torch
    import transformers

    if not torch.cuda.is_available():
        sys.exit(f"torch {torch.__version__} sees no CUDA device; --self-check runs at toy size on a CPU")
    trl = trl_version(args.peer or sys.executable)
    if "trl" in args.contenders and not trl:
        where = args.peer or f"{sys.executable} (and no --peer is given)"
        print(f"TRL cannot be imported by {where}: it is left out", file=sys.stderr)
    try:
        from torch.nn.attention.varlen import varlen_attn  # noqa: F401

        varlen = True
    except ImportError:
        varlen = False
    return {
        "gpu": torch.cuda.get_device_name(),
        "memory_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1),
        "gpus": torch.cuda.device_count(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
        "varlen_attention": varlen,
        "trl": trl,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def trl_version(python: str) -> str:
    """The version of TRL that an interpreter has; empty without one."""
    code = "import trl; print(trl.__version__)"
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    try:
        done = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, timeout=300, env=environment
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[-1] if done.returncode == 0 else ""


def prepare(args: argparse.Namespace, size: str, work: Path, device: str = "cuda") -> dict[str, Any]:
    """Write the data in the order that steerwell will take it, and say what the runs have in common."""
    from steerwell.train.sources import epoch_order

    rows = make_rows(args.batch_size * args.steps, args.prompt, args.completion, SIZES[size]["vocab"])
    save_json(work / "rows.json", rows)
    order = epoch_order(len(rows), 0, 0)
    save_json(work / "ordered.json", [rows[i] for i in order])
    names = ("batch_size", "steps", "warmup", "max_tokens")
    return {n: getattr(args, n) for n in names} | {"size": size, "work": str(work), "device": device}


def measured(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """One contender's run; for TRL the fastest of the settings asked for."""
    if task["contender"] != "trl":
        return run_child(sys.executable, task)
    best: dict[str, Any] = {"failed": "nothing was tried"}
    for dtype in args.trl_dtype:
        for batch in args.trl_batch:
            one: dict[str, Any] = {}
            while batch >= 1:
                attempt = task | {"micro": batch, "dtype": dtype, "recompute": False}
                one = run_child(args.peer or sys.executable, attempt)
                if one.get("failed") != "out of memory":
                    break
                batch //= 2
            if one.get("failed") == "out of memory":
                attempt = task | {"micro": 1, "dtype": dtype, "recompute": True}
                one = run_child(args.peer or sys.executable, attempt)
            if "failed" in best or ("failed" not in one and mean_step(one, task) < mean_step(best, task)):
                best = one
    return best


def run_child(python: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run one task in a process of its own."""
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    environment |= {"HF_HUB_DISABLE_TELEMETRY": "1", "TQDM_DISABLE": "1"}
    environment |= {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "STEERWELL_CACHE": task["work"]}
    if python != sys.executable:
        environment.pop("PYTHONPATH", None)
    command = [python, str(Path(__file__).resolve()), "--one", json.dumps(task)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    last = done.stdout.strip().splitlines()[-1:]
    if done.returncode or not last or not last[0].startswith("{"):
        return {"failed": (done.stderr.strip() or "no answer")[-1500:]}
    return json.loads(last[0])


def child(text: str) -> int:
    """The inside of a child process: run the task and print its result as the last line."""
    task = json.loads(text)
    if task["contender"] != "trl" and SOURCE.is_dir():
        sys.path.insert(0, str(SOURCE))
    import torch

    try:
        print("\n" + json.dumps(run_task(task)))
    except torch.cuda.OutOfMemoryError:
        print('\n{"failed": "out of memory"}')
    return 0


def run_task(task: dict[str, Any]) -> dict[str, Any]:
    """Train as the task says; step seconds, losses and peak memory."""
    model = Path(task["work"]) / "model"
    if not model.exists():
        write_model(model, task["size"], task["device"])
    run = {"padded": train_padded, "trl": train_trl}.get(task["contender"], train_steerwell)
    return run(task)


def mean_step(run: dict[str, Any], task: dict[str, Any]) -> float:
    """Mean seconds of the timed steps."""
    return statistics.fmean(run["step_seconds"][task["warmup"] :])


def concluded(run: dict[str, Any], task: dict[str, Any], peak: float) -> dict[str, Any]:
    """Figures of one run: tokens per second, utilisation, memory."""
    if "failed" in run:
        return run
    rows = json.loads((Path(task["work"]) / "ordered.json").read_text())
    size, first = SIZES[task["size"]], task["warmup"] * task["batch_size"]
    seconds = sum(run["step_seconds"][task["warmup"] :])
    tokens = sum(unique_tokens(row) for row in rows[first:])
    flops = step_flops(rows[first:], size, full=task["mode"] == "full")
    reference = step_flops(rows, size, passes=1)
    figures = {
        "seconds_per_step": round(mean_step(run, task), 4),
        "unique_tokens_per_second": round(tokens / seconds),
        "utilisation": round(flops / seconds / (peak * 1e12), 4),
        "peak_memory_gib": round(run["peak_bytes"] / 2**30, 2),
        **{name: run[name] for name in ("micro", "dtype", "recompute", "note") if name in run},
        "losses": [round(x, 6) for x in run["losses"]],
        "step_seconds": [round(x, 4) for x in run["step_seconds"]],
    }
    if run.get("reference_seconds"):
        figures["reference_seconds"] = round(run["reference_seconds"], 3)
        figures["reference_utilisation"] = round(reference / run["reference_seconds"] / (peak * 1e12), 4)
    return figures


def ratios(runs: dict[str, Any]) -> dict[str, float]:
    """How much faster ``tree`` is than each other contender, by model and mode."""
    found = {}
    for name, figures in runs.items():
        size, mode, contender = name.split()
        ours = runs.get(f"{size} {mode} tree", {})
        if contender != "tree" and "seconds_per_step" in figures and "seconds_per_step" in ours:
            found[f"{size} {mode} {contender} / tree"] = round(
                figures["seconds_per_step"] / ours["seconds_per_step"], 2
            )
    return found


def self_check() -> None:
    """All contenders that need no peer, at toy size on a CPU; their losses must agree."""
    if SOURCE.is_dir():
        sys.path.insert(0, str(SOURCE))
    import torch

    torch.set_num_threads(1)
    args = argparse.Namespace(
        batch_size=4, steps=3, warmup=1, max_tokens=256, prompt=24, completion=12, device="cpu"
    )
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        os.environ["STEERWELL_CACHE"] = work
        task = prepare(args, "toy", Path(work), device="cpu")
        for mode in ("full", "lora"):
            runs = {}
            for contender in ("tree", "rows", "padded"):
                own = task | {"mode": mode, "contender": contender, "rate": 1e-3}
                run = run_task(own)
                runs[contender] = run["losses"]
                figures = concluded(run, own, peak=1.0)
                print(f"toy {mode} {contender}: {json.dumps(figures)}", flush=True)
            # a new adapter is drawn by each trainer in its own way: there only the start must agree
            compared = task["steps"] if mode == "full" else 1
            for contender, losses in runs.items():
                apart = max(abs(a - b) for a, b in zip(losses[:compared], runs["tree"], strict=False))
                if len(losses) != task["steps"] or not apart < SAME_LOSS:
                    sys.exit(f"{mode} {contender} has other losses than tree: {losses}, {runs['tree']}")
            if abs(runs["tree"][0] - math.log(2)) > SAME_LOSS:
                sys.exit(f"the first loss is {runs['tree'][0]}, not ln 2")
    print("self-check passed")


# What is trained on


def make_rows(n: int, prompt: int, completion: int, vocab: int) -> list[list[list[int]]]:
    """Rows of token ids [prompt, chosen, rejected]; lengths are log-normal (sigma 0.6) with these means."""
    draw = random.Random(1)

    def ids(mean: int) -> list[int]:
        length = int(draw.lognormvariate(math.log(mean) - 0.18, 0.6))
        return [draw.randrange(FIRST_WORD, vocab) for _ in range(min(max(length, 4), 4 * mean))]

    return [[ids(prompt), ids(completion), ids(completion)] for _ in range(n)]


def spell(ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in ids)


def unique_tokens(row: list[list[int]]) -> int:
    """Tokens of a pair with its prompt counted once; each completion has an end token."""
    return len(row[0]) + len(row[1]) + len(row[2]) + 2


def step_flops(
    rows: list[list[list[int]]], size: dict[str, Any], *, full: bool = True, passes: int | None = None
) -> float:
    """Floating-point operations that training on these rows needs at least; with ``passes`` forward only.

    A product with a weight matrix costs 2 per weight and token. Backward costs as much again for the inputs,
    and once more for the weights, which LoRA (``full=False``) does not need; the adapters' own products are left
    out. Attention costs 4 x width per layer for each key that a query sees, three times in training.
    """
    width, narrow = size["heads"] * size["head"], size["kv"] * size["head"]
    layer = size["hidden"] * (2 * width + 2 * narrow) + 3 * size["hidden"] * size["mlp"]
    tokens = scored = seen = 0
    for prompt, *both in rows:
        p, answers = len(prompt), [len(ids) + 1 for ids in both]
        tokens += p + sum(answers)
        scored += sum(answers)
        seen += p * (p + 1) // 2 + sum(a * p + a * (a + 1) // 2 for a in answers)
    products = 2 * size["layers"] * layer * tokens + 2 * size["hidden"] * size["vocab"] * scored
    attention = 4 * size["layers"] * width * seen
    if passes is not None:
        return float(passes * (products + attention))
    return float((3 if full else 2) * products + 3 * attention)


def write_model(folder: Path, name: str, device: str) -> None:
    """A Qwen3 with random weights (bf16; fp32 on a CPU) and a tokenizer with one token per word."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    size = SIZES[name]
    config = Qwen3Config(
        vocab_size=size["vocab"],
        hidden_size=size["hidden"],
        num_hidden_layers=size["layers"],
        num_attention_heads=size["heads"],
        num_key_value_heads=size["kv"],
        head_dim=size["head"],
        intermediate_size=size["mlp"],
        tie_word_embeddings=size["tied"],
        max_position_embeddings=32768,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
    )
    torch.manual_seed(0)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    aside = folder.with_name(f".{folder.name}.new")
    model.save_pretrained(aside)
    words = {"<pad>": PAD, "<unk>": 1, "<eos>": END, **{f"t{i}": i for i in range(3, size["vocab"])}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(aside)
    aside.rename(folder)
    del model
    if device != "cpu":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


# The contenders


class Clock:
    """Seconds at the ends of steps, when the device has finished."""

    def __init__(self, device: str) -> None:
        self.device, self.times = device, [0.0]
        self.start()

    def start(self) -> None:
        """Begin again: the next step starts now."""
        self.times = [self._now()]

    def step(self) -> None:
        """A step has ended."""
        self.times.append(self._now())

    def seconds(self) -> list[float]:
        """Seconds of each step."""
        return [b - a for a, b in zip(self.times, self.times[1:], strict=False)]

    def _now(self) -> float:
        import torch

        if self.device != "cpu":
            torch.cuda.synchronize()
        return time.perf_counter()


def peak_bytes(device: str) -> int:
    """Most memory that tensors took on the device so far; 0 on a CPU."""
    import torch

    return 0 if device == "cpu" else torch.cuda.max_memory_allocated()


class Enough(Exception):
    """Raised after the last step: the final save is not measured."""


def train_steerwell(task: dict[str, Any]) -> dict[str, Any]:
    """``steerwell.train`` with the task's layout."""
    from steerwell.data.messages import Message
    from steerwell.data.types import Completion, CompletionGroup, Pair
    from steerwell.train.config import TrainConfig
    from steerwell.train.loop import train

    work, clock = Path(task["work"]), Clock(task["device"])
    groups = []
    for prompt, *both in json.loads((work / "rows.json").read_text()):
        asked = (Message("user", spell(prompt)),)
        answers = tuple(Completion(asked, (Message("assistant", spell(ids)),)) for ids in both)
        groups.append(CompletionGroup(asked, answers, pairs=(Pair(0, 1),)))
    reference = [0.0, 0.0]

    def progress(stage: str, done: int, total: int, note: str) -> None:
        if stage == "tokenize":
            reference[0] = clock._now()
        elif stage == "reference":
            reference[1] = clock._now()
            clock.start()
        elif stage == "train":
            clock.step()
            if done == total:
                raise Enough

    settings: dict[str, Any] = {"compile": True} if task["contender"] == "tree_compile" else {}
    if "reference_cache" in TrainConfig.model_fields:
        settings["reference_cache"] = "off"
    out = work / f"run-{task['mode']}-{task['contender']}"
    with contextlib.suppress(Enough):
        train(
            work / "model",
            groups,
            "dpo",
            out=out,
            lora=RANK if task["mode"] == "lora" else None,
            learning_rate=task.get("rate", RATE),
            beta=BETA,
            batch_size=task["batch_size"],
            max_tokens=task["max_tokens"],
            layout="rows" if task["contender"] == "rows" else "tree",
            schedule="constant",
            warmup=0.0,
            betas=(0.9, 0.999),
            checkpoint_every=10**9,
            progress=progress,
            **settings,
        )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        "step_seconds": clock.seconds(),
        "reference_seconds": reference[1] - reference[0],
        "losses": [line["loss"] for line in lines if "loss" in line],
        "peak_bytes": peak_bytes(task["device"]),
    }


def train_padded(task: dict[str, Any]) -> dict[str, Any]:
    """A plain forward over padded sequences, prompts encoded twice; our head and loss, no recomputation."""
    import torch
    import torch.nn.functional as F
    from transformers import AutoModelForCausalLM

    from steerwell.models.forward import head, token_logps, unwrap

    work, device = Path(task["work"]), task["device"]
    rows = json.loads((work / "ordered.json").read_text())
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(
        work / "model", dtype=dtype, attn_implementation="sdpa"
    ).to(device)
    if task["mode"] == "lora":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(
            model, LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model.train()
    weights = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=task.get("rate", RATE), weight_decay=0.0, fused=True)

    def logps(pairs: list[list[list[int]]]) -> torch.Tensor:
        """Summed log-probs (2, pairs) of the chosen and the rejected completions."""
        texts = [(p, [*c, END]) for i in (1, 2) for p, c in ((row[0], row[i]) for row in pairs)]
        longest = max(len(p) + len(c) for p, c in texts)
        ids = torch.full((len(texts), longest), PAD)
        mask, scored = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
        for i, (p, c) in enumerate(texts):
            ids[i, : len(p) + len(c)] = torch.tensor(p + c)
            mask[i, : len(p) + len(c)] = 1
            scored[i, len(p) : len(p) + len(c)] = True
        ids, mask, scored = ids.to(device), mask.to(device), scored.to(device)
        backbone: Any = unwrap(model).base_model
        states = backbone(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        before = states[:, :-1][scored[:, 1:]]
        each = token_logps(before, head(model), ids[scored])
        owner = scored.nonzero()[:, 0]
        return torch.zeros(len(texts), device=device).index_add(0, owner, each).view(2, -1)

    def parts(pairs: list[Any]) -> list[list[Any]]:
        """Consecutive pairs, as many as keep the padded tokens under the budget (at least one)."""
        cut: list[list[Any]] = []
        for row in pairs:
            grown = [*cut[-1], row] if cut else [row]
            longest = max(len(r[0]) + max(len(r[1]), len(r[2])) + 1 for r in grown)
            if cut and 2 * len(grown) * longest <= task["max_tokens"]:
                cut[-1] = grown
            else:
                cut.append([row])
        return cut

    size = task["batch_size"]
    steps = [rows[i : i + size] for i in range(0, len(rows), size)]
    clock, losses, known = Clock(device), [], {}
    start = clock._now()
    with torch.no_grad():
        for s, step in enumerate(steps):
            for m, part in enumerate(parts(step)):
                known[s, m] = logps(part)
    reference = clock._now() - start
    clock.start()
    for s, step in enumerate(steps):
        total = torch.zeros((), device=device)
        for m, part in enumerate(parts(step)):
            ratio = logps(part) - known[s, m]
            loss = -F.logsigmoid(BETA * (ratio[0] - ratio[1])).sum() / len(step)
            loss.backward()
            total += loss.detach()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(total))
        clock.step()
    return {
        "step_seconds": clock.seconds(),
        "reference_seconds": reference,
        "losses": losses,
        "peak_bytes": peak_bytes(device),
    }


def train_trl(task: dict[str, Any]) -> dict[str, Any]:
    """TRL's DPOTrainer on the same rows in the same order; imports nothing of ours."""
    import datasets
    import torch
    import transformers
    from peft import LoraConfig
    from torch.utils.data import SequentialSampler
    from trl import DPOConfig, DPOTrainer

    transformers.utils.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    work, micro = Path(task["work"]), task["micro"]
    rows = json.loads((work / "ordered.json").read_text())
    data = datasets.Dataset.from_list(
        [{"prompt": spell(p) + " ", "chosen": spell(c), "rejected": spell(r)} for p, c, r in rows]
    )
    pure = task["dtype"] == "bf16"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        work / "model", dtype=torch.bfloat16 if pure else torch.float32, attn_implementation="sdpa"
    )
    clock, losses, spent = Clock(task["device"]), [], [0.0]

    class Timed(DPOTrainer):
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def _precompute_ref_logps(self, *args: Any, **kwargs: Any) -> Any:
            start = clock._now()
            out = super()._precompute_ref_logps(*args, **kwargs)
            spent[0] += clock._now() - start
            return out

        def training_step(self, *args: Any, **kwargs: Any) -> Any:
            loss = super().training_step(*args, **kwargs)
            losses.append(loss.detach())
            return loss

    class Steps(transformers.TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            clock.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            clock.step()

    adapter = (
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        if task["mode"] == "lora"
        else None
    )
    with tempfile.TemporaryDirectory() as out:
        trainer = Timed(
            model=model,
            args=DPOConfig(
                output_dir=out,
                per_device_train_batch_size=micro,
                gradient_accumulation_steps=task["batch_size"] // micro,
                num_train_epochs=1,
                learning_rate=RATE,
                lr_scheduler_type="constant",
                weight_decay=0.0,
                beta=BETA,
                optim="adamw_torch_fused",
                bf16=True,
                gradient_checkpointing=task["recompute"],
                precompute_ref_log_probs=True,
                max_length=None,
                logging_strategy="no",
                save_strategy="no",
                report_to=[],
                disable_tqdm=True,
                seed=0,
            ),
            train_dataset=data,
            processing_class=transformers.AutoTokenizer.from_pretrained(work / "model"),
            peft_config=adapter,
            callbacks=[Steps()],
        )
        trainer.train()
    per_step = task["batch_size"] // micro
    sums = [float(sum(losses[i : i + per_step])) for i in range(0, len(losses), per_step)]
    return {
        "step_seconds": clock.seconds(),
        "reference_seconds": spent[0],
        "losses": sums,
        "peak_bytes": peak_bytes(task["device"]),
        **{name: task[name] for name in ("micro", "dtype", "recompute")},
    }


def save_json(path: Path, value: Any) -> None:
    """Write JSON aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    aside.replace(path)


if __name__ == "__main__":
    main()
