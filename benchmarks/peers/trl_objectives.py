"""TRL's side of objectives_vs_trl.py: run by the interpreter of the peer's environment, with a folder as argument.

The folder holds ``task.json`` (the cases), the rows of each data set as token ids in the order of training, and
the two start models. Loss code, collators, training loop and optimizer are TRL's as they are. Around them:

- Its fused head computes in float32, so it is replaced by the plain one, which computes in the model's own float64;
  that is what makes differences of 1e-6 mean something.
- The reference's log-probs are rounded to float32, the type that steerwell files them in: both sides get the same
  reference.
- The alpha-divergence looks up a limit by type, and its table lacks float64: it is given that one entry, with the
  limit of float32, in which it computes.
"""

import inspect
import json
import sys
import tempfile
import textwrap
import types
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import datasets
import torch
import transformers
import trl
from torch.utils.data import SequentialSampler
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl.experimental.tpo import TPOConfig, TPOTrainer
from trl.trainer import dpo_trainer, grpo_trainer, kto_trainer, sft_trainer
from trl.trainer.utils import FusedCausalLMOutput
from trl_side import dataset

TRAINERS = {
    "dpo": (trl.DPOTrainer, trl.DPOConfig),
    "kto": (trl.KTOTrainer, trl.KTOConfig),
    "cpo": (CPOTrainer, CPOConfig),
    "orpo": (ORPOTrainer, ORPOConfig),
    "tpo": (TPOTrainer, TPOConfig),
    "sft": (trl.SFTTrainer, trl.SFTConfig),
    "reward": (trl.RewardTrainer, trl.RewardConfig),
    "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
}


def plain_head(model, temperature=1.0, cast_lm_head_to_fp32=False, outputs=("log_probs",)):
    """What ``trl.trainer.utils.add_fused_lm_head`` adds, from whole logits in the model's dtype."""
    original = model.forward

    def forward(self, *args, fused_lm_head=False, labels=None, **kwargs):
        if not fused_lm_head:
            return original(*args, **({} if labels is None else {"labels": labels}), **kwargs)
        logits = original(*args, **kwargs).logits[:, :-1] / temperature
        mask = labels[:, 1:] != -100
        wanted = labels[:, 1:].clamp(min=0)
        logps = logits.log_softmax(-1)
        with torch.no_grad():
            p = logps.exp()
            entropy = -(p * logps).sum(-1).masked_fill(~mask, 0)
            sum_sq = p.square().sum(-1).log().masked_fill(~mask, 0)
            mean, top = logits.mean(-1).masked_fill(~mask, 0), (logits.argmax(-1) == wanted) & mask
        picked = logps.gather(-1, wanted[..., None])[..., 0].masked_fill(~mask, 0)
        if not self.training:  # the reference
            picked = picked.float().to(logps.dtype)
        return FusedCausalLMOutput(
            loss=-picked.sum() / mask.sum().clamp(min=1),
            log_probs=picked,
            entropy=entropy,
            log_sum_sq_probs=sum_sq,
            mean_logits=mean,
            is_top1=top,
            label_mask=mask,
        )

    forward.__signature__ = inspect.signature(original)
    model.forward = types.MethodType(forward, model)


def with_float64_limit(method):
    """``DPOTrainer._compute_loss`` with an entry for float64 in the table of the alpha-divergence."""
    source = textwrap.dedent(inspect.getsource(method))
    before = "torch.float32: 80.0}"
    if source.count(before) != 1:
        raise RuntimeError("DPOTrainer is not the one of TRL 1.16: its alpha-divergence looks different")
    made = {}
    exec(source.replace(before, "torch.float32: 80.0, torch.float64: 80.0}"), method.__globals__, made)
    return made[method.__name__]


for module in (dpo_trainer, grpo_trainer, kto_trainer, sft_trainer):
    module.add_fused_lm_head = plain_head
trl.DPOTrainer._compute_loss = with_float64_limit(trl.DPOTrainer._compute_loss)


def settings(task, case, folder):
    batch = case["batch_size"]
    chosen = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 * batch if case["trainer"] == "kto" else batch,
        "max_steps": task["steps"],
        "learning_rate": task["learning_rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "adam_beta1": task["betas"][0],
        "adam_beta2": task["betas"][1],
        "adam_epsilon": 1e-8,
        "max_grad_norm": task["max_grad_norm"],
        "optim": "adamw_torch",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "seed": 0,
    }
    if case["trainer"] != "grpo":
        chosen["max_length"] = None
    if case["trainer"] == "kto":
        chosen["train_sampling_strategy"] = "sequential"
    return {**chosen, **case["settings"]}


def given_completions(rows, rewards):
    """What GRPOTrainer takes in place of sampling: the prompts, and the completions and rewards that they have."""
    place = {spell(prompt): number for number, (prompt, *_) in enumerate(rows)}

    def roll_out(prompts, trainer):
        seen, found = {}, {"prompt_ids": [], "completion_ids": [], "logprobs": [], "given": []}
        for prompt in prompts:
            number = place[prompt]
            which = seen[prompt] = seen.get(prompt, -1) + 1
            ids = [*rows[number][1 + which], trainer.processing_class.eos_token_id]
            found["prompt_ids"].append(rows[number][0])
            found["completion_ids"].append(ids)
            found["logprobs"].append([0.0] * len(ids))
            found["given"].append(rewards[number][which])
        return found

    def reward(completions, given, **others):
        return given

    data = datasets.Dataset.from_list([{"prompt": text} for text in place])
    return data, {"reward_funcs": reward, "rollout_func": roll_out}


def spell(ids):
    return " ".join(f"t{i}" for i in ids) + " "


def run(task, case, folder):
    """The losses of one case, one per step."""
    rows = json.loads((folder / f"rows-{case['data']}.json").read_text())
    kind, size = case["trainer"], case["batch_size"]
    more = {}
    if kind == "grpo":
        data, more = given_completions(rows, task["rewards"])
    elif kind == "kto":
        data = dataset("kto", [rows[i : i + size] for i in range(0, len(rows), size)])
    else:
        data = dataset(kind if kind in ("reward", "sft") else "dpo", rows)
    if kind == "tpo":
        data = data.add_column("reference", data["chosen"])
    if case["targets"] == "strengths":
        factor = case["hyper"]["margin"]
        data = data.add_column("margin", [factor * (1.0 + chosen[0] % 3) for _, chosen, _ in rows])
    make = (
        transformers.AutoModelForSequenceClassification
        if kind == "reward"
        else transformers.AutoModelForCausalLM
    )
    start = folder / ("reward" if kind == "reward" else "policy")
    model = make.from_pretrained(start, dtype=torch.float64)
    tokenizer = transformers.AutoTokenizer.from_pretrained(start)
    trainer_class, config_class = TRAINERS[kind]
    losses = []

    class Watched(trainer_class):
        def _get_train_sampler(self, *args, **kwargs):
            if kind == "grpo":  # in order by itself, each prompt as often as it has completions
                return super()._get_train_sampler(*args, **kwargs)
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            losses.append(float(loss))
            return loss

    with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = config_class(**settings(task, case, out))
        Watched(model=model, args=config, train_dataset=data, processing_class=tokenizer, **more).train()
    return losses


def main(folder: Path) -> None:
    task = json.loads((folder / "task.json").read_text())
    found = {}
    for case in task["cases"]:
        try:
            found[case["name"]] = {"losses": run(task, case, folder)}
        except (ValueError, TypeError, RuntimeError, KeyError, AttributeError) as error:
            found[case["name"]] = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(case["name"], flush=True)
    versions = {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (folder / "result-trl.json").write_text(json.dumps({"versions": versions, "cases": found}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
