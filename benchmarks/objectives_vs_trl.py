"""The same twenty steps through steerwell and through TRL 1.16, for every loss that both have.

    python benchmarks/objectives_vs_trl.py --peer PYTHON
    python benchmarks/objectives_vs_trl.py --peer PYTHON --only dpo kto     # a look; writes no file

PYTHON is the interpreter of an environment with TRL (benchmarks/README.md says how to make it); it may be
given as STEERWELL_PEER_PYTHON instead. Both sides start from the same tiny GPT-2 in float64 (an architecture without
float32 islands) and see the same token ids in the same order under the same AdamW. The losses of all steps
must agree within a relative difference of 1e-6, or the script fails. steerwell's side is its public ``train``, TRL's
are its own trainers with their loss code untouched (``peers/trl_objectives.py`` says what is replaced around it).

Where the two name a hyperparameter differently, or mean something else by it, the case says how one maps to the
other. Losses that differ by design are listed with the reason, and are not compared.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
if (HERE.parent / "src" / "steerwell").is_dir():
    sys.path.insert(0, str(HERE.parent / "src"))

from machine import machine  # noqa: E402
from synthetic import END, FIRST_WORD, PAD, as_groups, save_json, word_tokenizer  # noqa: E402

TOLERANCE = 1e-6
STEPS, BATCH, VOCAB = 20, 8, 96
EVEN_TOKENS = 7  # scored tokens of a chosen completion in "even" data: six words and the end token
LEARNING_RATE, BETAS, MAX_GRAD_NORM = 2e-3, (0.9, 0.999), 1.0
UPDATES, GROUP, PROMPTS, LONGEST = 2, 4, 4, 16  # of policy gradients: a step has 4 prompts of 4 completions
DEFAULT_OUT = HERE / "results" / "objectives_vs_trl.json"


class Case(NamedTuple):
    """One loss on both sides. ``data`` is "ragged" (lengths differ) or "even" (see :func:`make_data`), ``targets``
    what our groups hold.
    """

    name: str
    ours: Any  # an objective's name or a mixture
    hyper: dict[str, Any]
    trainer: str  # dpo, kto, cpo, orpo, tpo, sft, reward, grpo
    settings: dict[str, Any]
    note: str = ""
    data: str = "ragged"
    batch_size: int = BATCH
    # dpo: pairs; kto: labels; sft: the chosen completion alone; reward: pairs; strengths: graded ones; grpo: scores
    targets: str = "dpo"
    every: int = 1  # which losses are compared: each, or each second one


def dpo_case(
    name: str, ours: Any, hyper: dict[str, Any], note: str = "", *, data: str = "ragged", **settings: Any
) -> Case:
    """A case of TRL's DPOTrainer."""
    return Case(name, ours, hyper, "dpo", settings, note, data)


def grpo_case(name: str, ours: Any, hyper: dict[str, Any], note: str = "", **settings: Any) -> Case:
    """A case of TRL's GRPOTrainer: two updates on each set of given completions. At the first of the two the ratio is
    1 and the advantages of a group add up to 0, so the value may be nothing but rounding: the second is compared, and
    it depends on all updates before it.
    """
    shared = {
        "num_iterations": UPDATES,
        "num_generations": GROUP,
        "per_device_train_batch_size": PROMPTS * GROUP,
        "max_completion_length": LONGEST,
        "shuffle_dataset": False,
        "use_bias_correction_kl": False,
    }
    return Case(name, ours, hyper, "grpo", shared | settings, note, "groups", PROMPTS, "grpo", UPDATES)


CASES = (
    dpo_case("dpo", "dpo", {"beta": 0.1}, loss_type="sigmoid", beta=0.1),
    Case(
        "dpo with label_smoothing (cDPO)",
        "dpo",
        {"beta": 0.1, "label_smoothing": 0.1},
        "dpo",
        {"loss_type": "aot", "beta": 0.1, "label_smoothing": 0.1},
        "steps of one pair: TRL's sigmoid loss takes label_smoothing and leaves it out, its aot loss of a single "
        "pair is cDPO",
        batch_size=1,
    ),
    dpo_case(
        "robust_dpo",
        "robust_dpo",
        {"beta": 0.1, "flip_rate": 0.1},
        "flip_rate is TRL's label_smoothing",
        loss_type="robust",
        beta=0.1,
        label_smoothing=0.1,
    ),
    dpo_case("hinge", "hinge", {"beta": 0.1}, loss_type="hinge", beta=0.1),
    dpo_case("ipo", "ipo", {"tau": 0.1}, "tau is TRL's beta", loss_type="ipo", beta=0.1),
    dpo_case(
        "exo_pair",
        "exo_pair",
        {"beta": 0.1, "epsilon": 1e-3},
        "epsilon is TRL's label_smoothing; TRL makes it a float32 number",
        loss_type="exo_pair",
        beta=0.1,
        label_smoothing=1e-3,
    ),
    dpo_case("nca_pair", "nca_pair", {"beta": 0.01}, loss_type="nca_pair", beta=0.01),
    dpo_case("bco_pair", "bco_pair", {"beta": 0.1, "delta": 0.0}, loss_type="bco_pair", beta=0.1),
    dpo_case(
        "sppo",
        [["sppo", 2.0]],
        {"eta": 100.0},
        "eta is 1 / TRL's beta; hard win rates on both sides; TRL adds the two squares, ours and the paper's code "
        "take their mean: twice the weight",
        loss_type="sppo_hard",
        beta=0.01,
    ),
    dpo_case("aot", "aot", {"beta": 0.1}, loss_type="aot", beta=0.1),
    Case(
        "aot_unpaired",
        "aot_unpaired",
        {"beta": 0.1},
        "dpo",
        {"loss_type": "aot_unpaired", "beta": 0.1},
        "ours takes labels: the chosen are the desirable ones",
        targets="kto",
    ),
    dpo_case("apo_zero", "apo_zero", {"beta": 0.1}, loss_type="apo_zero", beta=0.1),
    dpo_case("apo_down", "apo_down", {"beta": 0.1}, loss_type="apo_down", beta=0.1),
    dpo_case(
        "discopop",
        "discopop",
        {"beta": 0.05, "tau": 0.05},
        loss_type="discopop",
        beta=0.05,
        discopop_tau=0.05,
    ),
    dpo_case("sft", "sft", {}, "TRL's sft loss inside DPOTrainer: the chosen side", loss_type="sft"),
    dpo_case("ln_dpo", "ln_dpo", {"beta": 5.0}, "TRL: sigmoid_norm", loss_type="sigmoid_norm", beta=5.0),
    dpo_case(
        "ld_dpo", "ld_dpo", {"beta": 0.1, "alpha": 0.5}, "alpha is TRL's ld_alpha", beta=0.1, ld_alpha=0.5
    ),
    dpo_case(
        "wpo",
        "wpo",
        {"beta": 0.1, "clamp": False},
        "TRL: use_weighting, without the upper limit of the authors' code",
        loss_type="sigmoid",
        beta=0.1,
        use_weighting=True,
    ),
    *(
        dpo_case(
            f"f_dpo, {ours}",
            "f_dpo",
            {"beta": 0.1, "divergence": ours},
            loss_type="sigmoid",
            beta=0.1,
            f_divergence_type=theirs,
        )
        for ours, theirs in (
            ("reverse_kl", "reverse_kl"),
            ("forward_kl", "forward_kl"),
            ("js", "js_divergence"),
        )
    ),
    dpo_case(
        "f_dpo, alpha",
        "f_dpo",
        {"beta": 0.1, "divergence": "alpha", "alpha": 0.3},
        "the paper's alpha is 1 less TRL's coefficient; TRL computes this divergence in float32",
        loss_type="sigmoid",
        beta=0.1,
        f_divergence_type="alpha_divergence",
        f_alpha_divergence_coef=0.7,
    ),
    dpo_case(
        "RPO: dpo and sft",
        [["dpo", 1.0], ["sft", 0.5]],
        {"beta": 0.1},
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.5],
        beta=0.1,
    ),
    dpo_case(
        "MPO: dpo, bco_pair and sft",
        [["dpo", 0.8, {"beta": 0.1}], ["bco_pair", 0.2, {"beta": 0.1}], ["sft", 1.0]],
        {},
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        beta=0.1,
    ),
    dpo_case(
        "mpo",
        "mpo",
        {},
        "the mixture by its name; chosen completions of one length: its likelihood is a mean over each completion "
        "first, TRL's over the batch's tokens",
        data="even",
        loss_type=["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        beta=0.1,
    ),
    dpo_case(
        "irpo",
        "irpo",
        {},
        "the mixture by its name; chosen completions of one length, as for mpo",
        data="even",
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 1.0],
        beta=0.1,
    ),
    dpo_case(
        "rpo",
        "rpo",
        {},
        "the mixture by its name; its likelihood is summed over a completion, here of 7 tokens: 7 times the weight",
        data="even",
        loss_type=["sigmoid", "sft"],
        loss_weights=[1.0, 0.005 * EVEN_TOKENS],
        beta=0.01,
    ),
    Case("kto", "kto", {"beta": 0.1}, "kto", {"loss_type": "kto", "beta": 0.1}, targets="kto"),
    Case(
        "kto with weights",
        "kto",
        {"beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.3},
        "kto",
        {"loss_type": "kto", "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.3},
        targets="kto",
    ),
    Case(
        "apo_zero, unpaired",
        [["apo_zero", 0.5]],
        {"beta": 0.1},
        "kto",
        {"loss_type": "apo_zero_unpaired", "beta": 0.1},
        "TRL's mean is over completions, ours over pairs: half the weight",
    ),
    Case(
        "cpo",
        "cpo",
        {"beta": 0.1, "alpha": 1.0},
        "cpo",
        {"loss_type": "sigmoid", "beta": 0.1, "cpo_alpha": 1.0},
        "chosen completions of one length: TRL's imitation term is a mean over the batch's tokens",
        data="even",
    ),
    Case(
        "slic",
        "slic",
        {"delta": 1.0, "lam": 0.1},
        "cpo",
        {"loss_type": "hinge", "beta": 1.0, "cpo_alpha": 0.1 * EVEN_TOKENS},
        "TRL: CPOTrainer with hinge; its imitation is per token, ours per completion (of 7 tokens): 7 times the weight",
        data="even",
    ),
    Case(
        "CPO-SimPO: simpo and sft",
        [["simpo", 1.0], ["sft", 1.0]],
        {"beta": 2.5, "gamma": 1.375},
        "cpo",
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.375, "cpo_alpha": 1.0},
        "prompts of one token, as TRL's imitation term covers the prompt too",
        data="even",
    ),
    Case(
        "TPO: cpo and sft",
        [["cpo", 1.0, {"beta": 0.1, "alpha": 0.0}], ["sft", 1.0]],
        {},
        "tpo",
        {"loss_type": "sigmoid", "beta": 0.1, "tpo_alpha": 1.0},
        "TRL: TPOTrainer, with the chosen completion as the gold one",
    ),
    Case(
        "TPO-L: simpo and sft",
        [["simpo", 1.0], ["sft", 1.0]],
        {"beta": 2.5, "gamma": 1.375},
        "tpo",
        {"loss_type": "tpo-l", "beta": 2.5, "tpo_l_gamma": 1.375, "tpo_alpha": 1.0},
        "TRL: TPOTrainer, with the chosen completion as the gold one",
    ),
    Case(
        "simpo",
        "simpo",
        {"beta": 2.5, "gamma": 1.375},
        "cpo",
        {"loss_type": "simpo", "beta": 2.5, "simpo_gamma": 1.375, "cpo_alpha": 0.0},
    ),
    Case(
        "alpha_po",
        "alpha_po",
        {"beta": 2.5, "gamma": 0.1, "alpha": 0.25},
        "cpo",
        {"loss_type": "simpo", "alpha": 0.25, "beta": 2.5, "simpo_gamma": 0.1, "cpo_alpha": 0.0},
        "TRL: CPOTrainer with alpha",
    ),
    Case(
        "orpo",
        "orpo",
        {"lam": 0.1},
        "orpo",
        {"beta": 0.1},
        "lam is TRL's beta; prompts of one token, as TRL's imitation term covers the prompt too, and chosen "
        "completions of one length, as it is a mean over the batch's tokens; TRL computes the odds in float32",
        data="even",
    ),
    grpo_case("grpo", "grpo", {"beta": 0.04}, loss_type="grpo", beta=0.04),
    grpo_case(
        "grpo, token mean (bnpo)",
        "grpo",
        {"beta": 0.01, "reduction": "token_mean"},
        loss_type="bnpo",
        beta=0.01,
    ),
    grpo_case(
        "DAPO's loss",
        "ppo_clip",
        {"epsilon": 0.2, "epsilon_high": 0.28, "reduction": "token_mean"},
        "advantages of ppo_clip are those of grpo here",
        loss_type="dapo",
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
    ),
    Case("sft, SFTTrainer", "sft", {}, "sft", {}, targets="sft"),
    Case("bradley_terry", "bradley_terry", {}, "reward", {}, targets="reward"),
    Case(
        "bradley_terry, centred",
        "bradley_terry",
        {"centering": 0.01},
        "reward",
        {"center_rewards_coefficient": 0.01},
        targets="reward",
    ),
    Case(
        "bradley_terry, margin by strength",
        "bradley_terry",
        {"margin": 0.5},
        "reward",
        {},
        "TRL takes the margin itself from a column: margin times strength here",
        targets="strengths",
    ),
)

BY_DESIGN = {
    "sigmoid with label_smoothing": "TRL 1.16 accepts label_smoothing with loss_type sigmoid and ignores it; ours "
    "is cDPO, compared by TRL's aot",
    "aot, simpo, cpo and tpo with label_smoothing": "ours take soft labels of pairs instead (pair_probs)",
    "an f-divergence under hinge, ipo, exo_pair, robust, discopop or sigmoid_norm": "f_dpo is logistic, as in its "
    "paper",
    "cpo and tpo with loss_type ipo, tpo with hinge and a beta": "without a reference we have no ipo, and slic has "
    "no beta",
    "several losses with betas of their own": "TRL has one beta for all losses of a list",
    "several losses with use_weighting, ld_alpha or an f-divergence": "in TRL these change every loss of the list; "
    "here wpo, ld_dpo and f_dpo are objectives of their own",
    "bco": "TRL 1.16 has no BCOTrainer any more; its bco_pair is compared",
    "sync_ref_model (TR-DPO)": "our reference stands still during a run",
    "dft in SFTTrainer": "we have no objective of that kind",
    "grpo with use_bias_correction_kl": "TRL multiplies its KL estimate by the ratio unless told not to; ours is the "
    "paper's",
    "rloo": "TRL's loss is a clipped ratio of whole completions, ours the log-prob times the advantage; equal "
    "gradients, other values",
    "dr_grpo, cispo, luspo, sapo and vespo in GRPOTrainer": "we have no objectives of these kinds",
    "router_aux_loss_coef": "our loop adds no loss of the router",
}
NOT_COMPARED = {
    "process reward models": "TRL 1.16 has no PRMTrainer any more",
    "online DPO": "ours is sample, judge, train on pairs",
}


def main() -> None:
    args = arguments()
    cases = [case for case in CASES if not args.only or case.name.split(",")[0].split(" ")[0] in args.only]
    with tempfile.TemporaryDirectory(prefix="objectives-vs-trl-") as work:
        result = compare(cases, args.peer, Path(work))
    for name, row in result["cases"].items():
        print(f"{name:32} {row.get('largest_relative_difference', row.get('not_compared'))}")
    if not args.only:
        save_json(args.out, result)
    failed = [
        n for n, row in result["cases"].items() if row.get("largest_relative_difference", 0) > TOLERANCE
    ]
    missing = [name for name, row in result["cases"].items() if "not_compared" in row]
    if failed or missing:
        sys.exit(
            f"beyond {TOLERANCE:g}: {', '.join(failed) or 'none'}; not compared: {', '.join(missing) or 'none'}"
        )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--peer", default=os.environ.get("STEERWELL_PEER_PYTHON"), help="interpreter of TRL's environment")
    add("--only", nargs="+", help="first words of the cases to run; writes no result file")
    add("--out", type=Path, default=DEFAULT_OUT, help="result file")
    args = parser.parse_args()
    if not args.peer:
        parser.error("give --peer PYTHON, the interpreter of an environment with TRL (see README.md)")
    return args


def make_data(kind: str, seed: int = 3) -> list[list[list[int]]]:
    """Rows [prompt, chosen, rejected] of token ids. "ragged": lengths of 3 to 12. "even": prompts of one token and
    chosen completions of six, so that means over tokens and means over completions agree. "groups": rows [prompt,
    four completions], with prompts of six tokens (TRL pads shorter ones on the left, which moves GPT-2's positions).
    """
    import numpy as np

    draw = np.random.default_rng(seed)

    def ids(n: int) -> list[int]:
        return draw.integers(FIRST_WORD, VOCAB, n).tolist()

    def length() -> int:
        return int(draw.integers(3, 13))

    if kind == "groups":
        return [[ids(6), *(ids(length()) for _ in range(GROUP))] for _ in range(STEPS // UPDATES * PROMPTS)]
    if kind == "even":
        return [[ids(1), ids(EVEN_TOKENS - 1), ids(length())] for _ in range(STEPS * BATCH)]
    return [[ids(length()), ids(length()), ids(length())] for _ in range(STEPS * BATCH)]


def write_models(folder: Path) -> None:
    """The two start models, in float64: a language model, and a classifier with one label."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCAB,
        n_positions=64,
        n_embd=32,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=END,
        pad_token_id=PAD,
        num_labels=1,
    )
    for name, kind in (("policy", GPT2LMHeadModel), ("reward", GPT2ForSequenceClassification)):
        torch.manual_seed(0)
        kind(config).double().save_pretrained(folder / name)
        word_tokenizer(VOCAB).save_pretrained(folder / name)


def compare(cases: list[Case], peer: str, work: Path) -> dict[str, Any]:
    """Both sides of every case, and how far apart they are."""
    import torch
    import transformers

    import steerwell as sw
    from steerwell.train.sources import epoch_order

    torch.set_num_threads(1)
    rows = {kind: make_data(kind) for kind in ("ragged", "even", "groups")}
    order = epoch_order(STEPS * BATCH, 0, 0)
    for kind, those in rows.items():
        save_json(work / f"rows-{kind}.json", those if kind == "groups" else [those[i] for i in order])
    write_models(work)
    theirs = of_trl(cases, peer, work)
    found: dict[str, Any] = {}
    for number, case in enumerate(cases):
        row: dict[str, Any] = {
            "steerwell": {"objective": case.ours, **case.hyper},
            "trl": {"trainer": case.trainer, **case.settings},
        }
        row |= {"note": case.note} if case.note else {}
        found_here = of_steerwell(case, rows[case.data], work, number)
        row |= differences(found_here, theirs["cases"][case.name], case.every)
        found[case.name] = row
    return {
        "machine": machine(),
        "versions": {
            "steerwell": {
                "steerwell": sw.__version__,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
            "trl": theirs["versions"],
        },
        "settings": {
            "steps": STEPS,
            "batch_size": BATCH,
            "learning_rate": LEARNING_RATE,
            "betas": BETAS,
            "max_grad_norm": MAX_GRAD_NORM,
            "dtype": "float64",
            "tolerance": TOLERANCE,
        },
        "cases": found,
        "differ_by_design": BY_DESIGN,
        "not_compared": NOT_COMPARED,
    }


def of_trl(cases: list[Case], peer: str, work: Path) -> dict[str, Any]:
    """TRL's losses of all cases, from one process of the peer's interpreter."""
    save_json(
        work / "task.json",
        {
            "steps": STEPS,
            "learning_rate": LEARNING_RATE,
            "betas": BETAS,
            "max_grad_norm": MAX_GRAD_NORM,
            "cases": [case._asdict() for case in cases],
            "rewards": [rewards(i) for i in range(STEPS // UPDATES * PROMPTS)],
        },
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_CACHE": str(work / "datasets")}
    environment.pop("PYTHONPATH", None)
    command = [peer, str(HERE / "peers" / "trl_objectives.py"), str(work)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"trl failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    return json.loads((work / "result-trl.json").read_text())


def of_steerwell(case: Case, rows: list[list[list[int]]], work: Path, number: int) -> dict[str, Any]:
    """The losses of our own training of a case, or why there are none."""
    import torch

    import steerwell as sw
    from steerwell.train.loop import train

    reward = case.trainer == "reward"
    start = (sw.load_reward_model if reward else sw.load_policy)(
        work / ("reward" if reward else "policy"), dtype=torch.float64
    )
    out = work / f"out-{number}"
    try:
        train(
            start,
            Given(rows) if case.targets == "grpo" else as_groups(rows, case.targets),
            case.ours,
            out=out,
            learning_rate=LEARNING_RATE,
            steps=STEPS,
            schedule="constant",
            warmup=0.0,
            weight_decay=0.0,
            betas=BETAS,
            max_grad_norm=MAX_GRAD_NORM,
            seed=0,
            reference_cache="off",
            checkpoint_every=10**9,
            **({} if case.targets == "grpo" else {"batch_size": case.batch_size}),
            **case.hyper,
        )
    except sw.InputError as error:
        return {"error": str(error)}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {"losses": [line["loss"] for line in lines if "loss" in line]}


class Given:
    """A source of rollouts that samples nothing: each step has the next prompts with their given completions."""

    temperature = 1.0
    updates = UPDATES

    def __init__(self, rows: list[list[list[int]]]) -> None:
        self.rows = rows

    def steps(self, epochs: float) -> int:
        return STEPS

    def step(self, policy: Any, step: int, seed: int) -> list[Any]:
        """The groups with their rewards, and the log-probs that ``policy`` gives their tokens now."""
        from dataclasses import replace

        from steerwell.pipelines.yardstick import token_logps

        first = step // UPDATES * PROMPTS
        groups = as_groups(self.rows[first : first + PROMPTS], "sample")
        found = []
        for number, (group, logps) in enumerate(zip(groups, token_logps(policy, groups), strict=True), first):
            sequences = policy.tokenize([group])[0].sequences
            completions = tuple(
                replace(
                    completion,
                    prompt_token_ids=tuple(s.ids[: s.n_prompt]),
                    token_ids=tuple(s.ids[s.n_prompt :]),
                    old_logps=tuple(own),
                    finished=True,
                )
                for completion, s, own in zip(group.completions, sequences, logps, strict=True)
            )
            found.append(replace(group, completions=completions, scores=tuple(rewards(number))))
        return found

    def identity(self) -> dict[str, Any]:
        return {"kind": "given"}


def rewards(number: int) -> list[float]:
    """The rewards of a prompt's four completions. One stands out, so that every group's standard deviation is 2,
    and advantages in float32 (TRL) and in float64 (ours) differ by one factor near 1, the same for all.
    """
    sign = -1.0 if number // 3 % 2 else 1.0
    return [sign * (-3.0 if i == number % GROUP else 1.0) for i in range(GROUP)]


def differences(ours: dict[str, Any], theirs: dict[str, Any], every: int = 1) -> dict[str, Any]:
    """How far the losses of each step, or of each ``every``-th, lie apart, relative to TRL's."""
    for side, one in (("steerwell", ours), ("trl", theirs)):
        if "error" in one:
            return {"not_compared": f"{side}: {one['error']}"}
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))[every - 1 :: every]
    return {
        "largest_relative_difference": float(f"{max(abs(a - b) / abs(b) for a, b in pairs):.2g}"),
        "first_loss": pairs[0][0],
        "last_loss": pairs[-1][0],
        "steps": len(pairs),
    }


if __name__ == "__main__":
    main()
