"""The stages of the whole way on the embedded world, each one a plain function of a run's folder.

Every stage goes through the same public code as any other model and data; the world supplies prompts, a judge
called gold, annotators and a base model. A stage reads what earlier stages left in the folder and leaves its own:

=============== ===========================================================================================
sft             ``sft/``            the base, fine-tuned on demonstrations
sample          ``preferences.db``  completions of the SFT model, then the annotators' rankings of them
reward_model    ``reward_model/``   Bradley–Terry on the resolved pairs
prefer          ``ipo/``, ``dpo/``  preference tuning on the same pairs
overoptimize    ``grpo/``           GRPO against the reward model, with gold watching
measure         ``measured/*.json`` each model's verdicts on fresh prompts
=============== ===========================================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from steerwell import judges, world
from steerwell.data import resolve
from steerwell.data.quality import audit
from steerwell.data.store import Store, open_store
from steerwell.data.types import CompletionGroup, Prompt
from steerwell.evals.stats import Estimate, mean, proportion
from steerwell.models.load import Policy, load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.pipelines.progress import Progress, silent
from steerwell.train import train
from steerwell.train.sources import rollouts


@dataclass(frozen=True)
class Recipe:
    """The numbers of the demo. They were fixed before they were confirmed; docs/world.md shows the spread."""

    demonstrations: int = 3000
    sft: dict[str, Any] = field(default_factory=lambda: {"learning_rate": 1e-3, "batch_size": 32})
    prompts: int = 2000
    samples: int = 4
    overlap: float = 0.15
    reward_model: dict[str, Any] = field(
        default_factory=lambda: {"learning_rate": 2e-3, "epochs": 2, "batch_size": 32, "pooling": "mean"}
    )
    ipo: dict[str, Any] = field(
        default_factory=lambda: {
            "tau": 0.1,
            "reduction": "sum",
            "learning_rate": 1e-3,
            "epochs": 2,
            "batch_size": 32,
        }
    )
    dpo: dict[str, Any] = field(
        default_factory=lambda: {"beta": 0.1, "learning_rate": 1e-3, "epochs": 2, "batch_size": 32}
    )
    dpo_sft_weight: float = 0.2
    grpo: dict[str, Any] = field(
        default_factory=lambda: {"beta": 0.03, "learning_rate": 5e-4, "steps": 100, "schedule": "constant"}
    )
    rollouts: dict[str, int] = field(default_factory=lambda: {"n": 4, "prompts_per_step": 16})
    watch_every: int = 10
    watch_prompts: int = 240
    evaluation_prompts: int = 800
    max_new_tokens: int = 72


@dataclass(frozen=True)
class Run:
    """A folder, a seed and a recipe: all that a stage needs to know."""

    out: Path
    seed: int = 0
    base: Path = field(default_factory=world.base_path)
    recipe: Recipe = field(default_factory=Recipe)

    def store(self) -> Store:
        """The run's store of prompts, completions and annotations."""
        return open_store(self.out / "preferences.db")

    def model(self, name: str) -> Path:
        """Where the model called ``name`` lies."""
        return self.base if name == "base" else self.out / name / "model"

    def policy(self, name: str) -> Policy:
        """The policy called ``base``, ``sft``, ``ipo``, ``dpo`` or ``grpo``."""
        return load_policy(str(self.model(name)), name=name)

    def train(self, name: str, progress: Progress) -> dict[str, Any]:
        """Arguments that every training run of the demo shares."""

        def relay(part: str, done: int, total: int, note: str = "") -> None:
            progress(name if part == "train" else f"{name}: {part}", done, total, note)

        return {"out": self.out / name, "seed": self.seed, "progress": relay}


def write_json(path: Path, value: Any) -> None:
    """Write JSON aside and rename it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(path.name + ".tmp")
    aside.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, path)


def sft(run: Run, progress: Progress = silent) -> None:
    """Fine-tune the base on demonstrations: imperfect, but better than the web."""
    data = world.demonstrations(run.recipe.demonstrations, seed=run.seed + 1)
    train(run.policy("base"), data, "sft", **run.train("sft", progress), **run.recipe.sft)


def sample(run: Run, progress: Progress = silent) -> dict[str, Any]:
    """Sample completions of the SFT model, have the annotators rank them, keep both; returns the audit."""
    recipe = run.recipe
    prompts = world.prompts(recipe.prompts, seed=run.seed + 2, mix=world.PREFERENCE_MIX)
    groups = run.policy("sft").sample(
        prompts,
        recipe.samples,
        max_new_tokens=recipe.max_new_tokens,
        seed=run.seed,
        progress=lambda done, total: progress("sample", done, total, "completions"),
    )
    rankings = world.annotate(groups, world.panel(run.seed), recipe.overlap, run.seed)
    with run.store() as store:
        store.add(groups, rankings)
        report = audit(store.groups()).to_dict()
    write_json(run.out / "measured" / "audit.json", report)
    return report


def pairs(
    run: Run, split: str = "train", keep: Callable[[Prompt], bool] | None = None
) -> list[CompletionGroup]:
    """The groups of a split with best-against-worst pairs; ``keep`` may choose prompts."""
    with run.store() as store:
        groups = store.groups(split=split)
    if keep is not None:
        groups = [group for group in groups if keep(Prompt(group.prompt, group.meta))]
    return [group for group in resolve.majority(groups, pairs="best_worst") if group.pairs]


def reward_model(run: Run, progress: Progress = silent) -> dict[str, Any]:
    """Train the reward model and measure it on held-out pairs, against annotators and against gold."""
    train(
        run.policy("sft"),
        pairs(run),
        "bradley_terry",
        **run.train("reward_model", progress),
        **run.recipe.reward_model,
    )
    with run.store() as store:
        model = normalize(
            load_reward_model(str(run.model("reward_model"))), store.groups(split="train")[:400]
        )
    model.save(run.model("reward_model"))
    held = pairs(run, "test")
    scores, gold = model.score(held), [[v.gold for v in world.verdicts([group])[0]] for group in held]
    annotators, truth, ceiling = [], [], []
    for group, score, worth in zip(held, scores, gold, strict=True):
        for chosen, rejected, _ in group.pairs:
            says, is_better = score[chosen] - score[rejected], worth[chosen] - worth[rejected]
            annotators.append(_half(says))
            if is_better:
                truth.append(_half(says * is_better))
                ceiling.append(_half(is_better))
    result = {
        "accuracy_annotators": mean(annotators).to_dict(),
        "accuracy_gold": mean(truth).to_dict(),
        "ceiling": mean(ceiling).to_dict(),
    }
    write_json(run.out / "measured" / "reward_model.json", result)
    return result


def normalize(model: RewardModel, groups: Sequence[CompletionGroup]) -> RewardModel:
    """The model with scores of mean 0 and standard deviation 1 on the completions of ``groups``."""
    model.recipe = replace(model.recipe, mean=0.0, std=1.0)
    scores = [score for found in model.score(groups) for score in found]
    model.recipe = replace(model.recipe, mean=fmean(scores), std=stdev(scores))
    return model


def _half(difference: float) -> float:
    """1 for a win, 0 for a loss, a half for a tie."""
    return 0.5 if difference == 0 else float(difference > 0)


def prefer(run: Run, name: str, progress: Progress = silent) -> None:
    """Preference tuning of the SFT model: ``ipo``, or ``dpo`` with an SFT term beside it."""
    recipe = run.recipe
    objective: Any = "ipo" if name == "ipo" else [("dpo", 1.0), ("sft", recipe.dpo_sft_weight)]
    settings = recipe.ipo if name == "ipo" else recipe.dpo
    train(run.policy("sft"), pairs(run), objective, **run.train(name, progress), **settings)


def trap(run: Run, progress: Progress = silent) -> None:
    """Preference tuning on pairs about harmful prompts only, which teaches to refuse everything."""
    data = pairs(run, keep=lambda prompt: prompt.meta.get("family") == "harmful")
    settings = {**run.recipe.dpo, "epochs": 3}
    train(run.policy("sft"), data, "dpo", **run.train("trap", progress), **settings)


def overoptimize(run: Run, progress: Progress = silent) -> list[dict[str, float]]:
    """A short GRPO run against the reward model; every few steps gold looks at what the policy writes.

    Returns one row per look: step, ``kl`` (nats per completion, from the SFT model), ``proxy`` (the reward
    model's score, in its standard deviations on SFT samples) and ``gold``, all means over the same prompts.
    """
    recipe = run.recipe
    judge = judges.reward_model(str(run.model("reward_model")))
    model = load_reward_model(str(run.model("reward_model")))
    start = run.policy("sft")
    watched = world.prompts(recipe.watch_prompts, seed=run.seed + 4, split="test", mix=world.PREFERENCE_MIX)
    path = run.out / "measured" / "overoptimization.json"
    rows: dict[int, dict[str, float]] = (
        {row["step"]: row for row in json.loads(path.read_text())} if path.exists() else {}
    )

    def look(step: int, policy: Policy, _figures: Mapping[str, float]) -> dict[str, float]:
        groups = policy.sample(watched, 1, max_new_tokens=recipe.max_new_tokens, seed=run.seed + 5)
        reference = start.logps(groups)
        kl = [
            sum(c.old_logps or ()) - logp
            for group, logps in zip(groups, reference, strict=True)
            for c, logp in zip(group.completions, logps, strict=True)
        ]
        proxy = [score for scores in model.score(groups) for score in scores]
        gold = [verdict.gold for found in world.verdicts(groups) for verdict in found]
        rows[step] = {
            "step": step,
            "kl": sum(kl) / len(kl),
            "proxy": sum(proxy) / len(proxy),
            "gold": sum(gold) / len(gold),
        }
        write_json(path, [rows[s] for s in sorted(rows)])
        return {f"watch/{name}": value for name, value in rows[step].items() if name != "step"}

    prompts = world.prompts(1500, seed=run.seed + 3, mix=world.PREFERENCE_MIX)
    source = rollouts(prompts, judge, max_new_tokens=recipe.max_new_tokens, **recipe.rollouts)
    train(
        run.policy("sft"),
        source,
        "grpo",
        **run.train("grpo", progress),
        watch=look,
        watch_every=recipe.watch_every,
        **recipe.grpo,
    )
    return [rows[s] for s in sorted(rows)]


def evaluation_prompts(run: Run) -> list[Prompt]:
    """Prompts over combinations that no training stage has seen, the same for every model of the run."""
    return world.prompts(
        run.recipe.evaluation_prompts, seed=run.seed + 1000, split="test", mix=world.EVALUATION_MIX
    )


def measure(run: Run, name: str, progress: Progress = silent) -> list[dict[str, Any]]:
    """Sample one completion per evaluation prompt from the model ``name`` and have gold look at each."""
    groups = run.policy(name).sample(
        evaluation_prompts(run), 1, max_new_tokens=run.recipe.max_new_tokens, seed=run.seed + 6
    )
    rows = [
        {
            "prompt": group.prompt[-1].content,
            "completion": group.completions[0].text,
            "family": found[0].family,
            **world.metrics([group])[0],
        }
        for group, found in zip(groups, world.verdicts(groups), strict=True)
    ]
    write_json(run.out / "measured" / f"{name}.json", rows)
    progress("measure", 1, 1, name)
    return rows


PROPORTIONS = ("harmful_compliance", "over_refusal", "fact_accuracy")


def summarize(rows: Sequence[dict[str, Any]]) -> dict[str, Estimate]:
    """Metric → estimate: Wilson intervals for shares, t intervals for means; rows without a value are left out."""
    found: dict[str, Estimate] = {}
    for metric in world.METRICS:
        values = [row[metric] for row in rows]
        found[metric] = proportion(values) if metric in PROPORTIONS else mean(values)
    return found


def recipe_dict(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON-like values."""
    return asdict(recipe)
