"""Our sampler against Hugging Face `generate`, in useful tokens per CPU second on one thread.

    OMP_NUM_THREADS=1 python benchmarks/sampler_vs_generate.py

The model has the size of the world's (3 layers of 96, vocabulary 1024) and random weights, which give all
tokens about the same probability. Fifty-one of the 1024 tokens end a text, so that texts have about 20
tokens; useful tokens are those up to and with the first of them. Both contenders draw from the same
distribution over the same prompts, at most 256 rows at a time. `generate` runs at its best: batches sorted by
length, left padding, SDPA, a key/value cache (dynamic and static are both measured, the faster counts), no
top-k or top-p, no scores kept. The sampler returns log-probs as well. The contenders take turns within one
run; the median counts.

Three settings: one sample of each prompt, groups of eight samples of a prompt, and texts that all run to the
limit of 32 tokens (where no row finishes early, so that only the cost of a step is compared).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as hf_logging

from steerwell.models.sampler import generate

VOCAB, PAD = 1024, 0
STOPS = list(range(1, 52))
BATCH = 256
Model = LlamaForCausalLM
RESULT = Path(__file__).parent / "results" / "sampler_vs_generate.json"


def build_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=STOPS,
    )
    return LlamaForCausalLM(config).eval()


def make_prompts(count: int, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(52, VOCAB) for _ in range(rng.randint(10, 20))] for _ in range(count)]


def useful(ids: list[int], stops: set[int]) -> int:
    return next((i + 1 for i, token in enumerate(ids) if token in stops), len(ids))


def ours(model: Model, prompts: list[list[int]], n: int, new: int, stops: list[int], seed: int) -> int:
    drawn = generate(model, prompts, n, stop=stops, max_new_tokens=new, seed=seed, batch_size=BATCH)
    return sum(len(one.token_ids) for samples in drawn for one in samples)


def theirs(
    model: Model,
    prompts: list[list[int]],
    n: int,
    new: int,
    stops: list[int],
    seed: int,
    cache: str,
) -> int:
    torch.manual_seed(seed)
    count, marks = 0, set(stops)
    order = sorted(prompts, key=len)
    for start in range(0, len(order), BATCH // n):
        block = order[start : start + BATCH // n]
        width = max(map(len, block))
        ids = torch.tensor([[PAD] * (width - len(p)) + p for p in block])
        with torch.no_grad():
            out = model.generate(  # type: ignore[attr-defined]
                input_ids=ids,
                attention_mask=(ids != PAD).long(),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                num_return_sequences=n,
                max_new_tokens=new,
                eos_token_id=stops or None,
                pad_token_id=PAD,
                use_cache=True,
                cache_implementation=cache,
            )
        count += sum(useful(row, marks) for row in out[:, width:].tolist())
    return count


def clock(run: Callable[[int], int], seed: int) -> float:
    """Useful tokens per CPU second of this process."""
    start = time.process_time()
    tokens = run(seed)
    return tokens / (time.process_time() - start)


def measure(model: Model, prompts: int, n: int, new: int, stops: list[int], turns: int) -> dict:
    given = make_prompts(prompts)
    model.generation_config.eos_token_id = stops or None
    contenders: dict[str, Callable[[int], int]] = {
        "steerwell": lambda seed: ours(model, given, n, new, stops, seed),
        "generate_dynamic": lambda seed: theirs(model, given, n, new, stops, seed, "dynamic"),
        "generate_static": lambda seed: theirs(model, given, n, new, stops, seed, "static"),
    }
    for run in contenders.values():
        run(0)
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(turns):
        for name, run in contenders.items():
            speeds[name].append(clock(run, turn + 1))
    middle = {name: statistics.median(all_of_it) for name, all_of_it in speeds.items()}
    best = max(middle["generate_dynamic"], middle["generate_static"])
    per_turn = [
        o / max(d, s)
        for o, d, s in zip(
            speeds["steerwell"], speeds["generate_dynamic"], speeds["generate_static"], strict=True
        )
    ]
    return {
        "prompts": prompts,
        "n": n,
        "max_new_tokens": new,
        "mean_tokens": round(ours(model, given, n, new, stops, 1) / (prompts * n), 2),
        "tokens_per_cpu_second": {name: round(speed) for name, speed in middle.items()},
        "ratio": round(middle["steerwell"] / best, 2),
        "ratio_per_turn": [round(r, 2) for r in per_turn],
    }


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    names = [line for line in info.read_text().splitlines() if "model name" in line] if info.exists() else []
    return names[0].split(":", 1)[1].strip() if names else platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--turns", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    hf_logging.set_verbosity_error()
    model = build_model()
    settings = {
        "early_stop": {"prompts": 512, "n": 1, "new": 64, "stops": STOPS},
        "early_stop_groups_of_8": {"prompts": 64, "n": 8, "new": 64, "stops": STOPS},
        "no_stop": {"prompts": 256, "n": 1, "new": 32, "stops": []},
    }
    result = {
        "machine": {"cpu": cpu_model(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "batch": BATCH,
        "settings": {},
    }
    for name, setting in settings.items():
        result["settings"][name] = measure(model, turns=args.turns, **setting)
        print(name, json.dumps(result["settings"][name]), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    temporary = args.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=2) + "\n")
    os.replace(temporary, args.out)


if __name__ == "__main__":
    main()
