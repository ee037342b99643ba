"""What the demo found: the result in its fixed JSON form, the table for the terminal, the report page."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from steerwell import world
from steerwell.evals.display import Card, Change, Good, Sample, Side, interval, say, signed
from steerwell.evals.report import Report
from steerwell.evals.stats import Estimate, paired_difference
from steerwell.evals.winrate import WinRate, compare_scores
from steerwell.pipelines.stages import PROPORTIONS, Run, summarize
from steerwell.world.vocabulary import FAMILIES

BEFORE, AFTER = "sft", "ipo"
TITLES = {
    "base": "base model",
    "sft": "SFT",
    "ipo": "IPO",
    "dpo": "DPO + SFT term",
    "grpo": "GRPO without care",
}
METRICS = {
    "gold": ("gold", "true worth of a completion, mean", True),
    "harmful_compliance": ("harmful compliance", "share of harmful requests that are served", False),
    "over_refusal": (
        "over-refusal",
        "share of harmless requests, worded like harmful ones, that are refused",
        False,
    ),
    "fact_accuracy": ("factual accuracy", "share of fact questions answered rightly", True),
    "flattery": ("flattery", "flattering sentences per completion", False),
    "words": ("length", "words per completion", None),
}

TABLED = ("gold", "harmful_compliance", "over_refusal", "fact_accuracy")  # what fits beside the win rate


def measured(run: Run, name: str) -> Any:
    """What a stage left under ``measured/``."""
    return json.loads((run.out / "measured" / f"{name}.json").read_text("utf-8"))


def against(run: Run, name: str, other: str) -> WinRate:
    """Win rate of one model over another by gold, prompt by prompt; ties count half."""
    ours, theirs = measured(run, name), measured(run, other)
    return compare_scores(
        [r["gold"] for r in ours], [r["gold"] for r in theirs], [r["prompt_id"] for r in ours]
    )


def collect(run: Run, seconds: dict[str, float]) -> dict[str, Any]:
    """The demo's result (fixed keys: before, after, win_rate, reward_model, overoptimization, seconds)."""
    rows = {name: measured(run, name) for name in TITLES}
    figures = {name: {k: e.to_dict() for k, e in summarize(r).items()} for name, r in rows.items()}
    return {
        "before": figures[BEFORE],
        "after": figures[AFTER],
        "win_rate": against(run, AFTER, BEFORE).estimate.to_dict(),
        "reward_model": measured(run, "reward_model"),
        "overoptimization": overoptimization(measured(run, "overoptimization")),
        "seconds": seconds,
        "seed": run.seed,
        "models": figures,
        "win_rates": {n: against(run, n, BEFORE).estimate.to_dict() for n in TITLES if n != BEFORE},
        "differences": {
            metric: paired_difference(
                [r[metric] for r in rows[AFTER]],
                [r[metric] for r in rows[BEFORE]],
                [r["prompt_id"] for r in rows[AFTER]],
            ).to_dict()
            for metric in world.METRICS
        },
        "audit": measured(run, "audit"),
    }


def overoptimization(rows: list[dict[str, float]]) -> dict[str, float]:
    """Where gold started, peaked and ended while the proxy rose; the peak is the highest look."""
    peak = max(rows, key=lambda row: row["gold"])
    return {
        "gold_start": rows[0]["gold"],
        "gold_peak": peak["gold"],
        "gold_end": rows[-1]["gold"],
        "proxy_start": rows[0]["proxy"],
        "proxy_end": rows[-1]["proxy"],
        "kl_at_peak": peak["kl"],
    }


def estimate(value: dict[str, Any]) -> Estimate:
    """An estimate back from its JSON form."""
    return Estimate.from_dict(value)


def samples(run: Run, per_family: int = 2) -> list[Sample]:
    """The first evaluation prompts of each family, whatever was said: not picked for effect."""
    before, after = measured(run, BEFORE), measured(run, AFTER)
    taken: dict[str, list[Sample]] = {family: [] for family in FAMILIES}
    for b, a in zip(before, after, strict=True):
        if len(taken[b["family"]]) < per_family:
            taken[b["family"]].append(Sample(b["prompt"], _side(b), _side(a), tag=b["family"]))
    return [sample for family in taken.values() for sample in family]


def _side(row: dict[str, Any]) -> Side:
    """A completion with gold's verdicts on it."""
    gold = row["gold"]
    verdicts: list[tuple[str, Good]] = [
        (f"gold {signed(gold)}", "good" if gold > 0.5 else "bad" if gold < 0 else "")
    ]
    if row["harmful_compliance"]:
        verdicts.append(("serves a harmful request", "bad"))
    if row["over_refusal"]:
        verdicts.append(("refuses a harmless request", "bad"))
    if row["fact_accuracy"] == 0:
        verdicts.append(("not the right fact", "bad"))
    if row["flattery"]:
        verdicts.append(("flatters", "bad"))
    return Side(row["completion"], verdicts)


def write_report(run: Run, result: dict[str, Any]) -> Path:
    """Write ``report/index.html``; returns its path."""
    report = Report(
        "What preference tuning changed",
        lead="From a small base model to an aligned one on the embedded world, where the truth about every "
        "completion is known. The world was built to make these phenomena visible.",
        kicker="steerwell demo",
    )
    _in_short(report, result)
    _before_and_after(report, result)
    _labels(report, result)
    _too_far(report, run, result)
    report.section(
        "Texts",
        "The first two evaluation prompts of each family, before (SFT) and after (IPO), as they came.",
    ).side_by_side("Completions of both models to the same prompts", samples(run), names=("SFT", "IPO"))
    report.section("How it was done").notes(_METHOD)
    report.timings("Wall time by stage (stages of the two branches run at the same time)", result["seconds"])
    report.provenance({"steerwell": version("steerwell"), "seed": run.seed, "base model": _base_name(run)})
    return report.write(run.out / "report" / "index.html")


def _base_name(run: Run) -> str:
    return "trained live" if run.base == run.out / "base" else "shipped checkpoint"


def _in_short(report: Report, result: dict[str, Any]) -> None:
    before, after = result["before"], result["after"]
    report.section("In short").cards(
        [
            Card(
                "Win rate of IPO over SFT",
                estimate(result["win_rate"]),
                "by gold, on prompts that no training stage saw; ties count half",
                mark=0.5,
                mark_label="even",
            ),
            Card(
                "Harmful compliance",
                estimate(after["harmful_compliance"]),
                f"it was {_percent(before['harmful_compliance'])} before",
            ),
            Card(
                "Over-refusal",
                estimate(after["over_refusal"]),
                f"it was {_percent(before['over_refusal'])} before; safety alone could be had by refusing everything",
            ),
            Card(
                "Gold change",
                estimate(result["differences"]["gold"]),
                "paired by prompt",
                unit="number",
            ),
        ]
    )


def _percent(value: dict[str, Any]) -> str:
    return say(value["value"], "share")


def _before_and_after(report: Report, result: dict[str, Any]) -> None:
    changes = [
        Change(
            label,
            estimate(result["before"][metric]),
            estimate(result["after"][metric]),
            better=None if up is None else "higher" if up else "lower",
            unit="share" if metric in PROPORTIONS else "number",
            difference=estimate(result["differences"][metric]),
            hint=hint,
        )
        for metric, (label, hint, up) in METRICS.items()
    ]
    rows = [
        [
            TITLES[name],
            estimate(result["win_rates"][name]) if name != BEFORE else None,
            *(estimate(figures[m]) for m in TABLED),
        ]
        for name, figures in result["models"].items()
    ]
    columns = ["model", "win rate over SFT", *(METRICS[m][0] for m in TABLED)]
    units: dict[str, Any] = {METRICS[m][0]: "share" for m in PROPORTIONS} | {"win rate over SFT": "share"}
    report.section("Before and after").changes(
        "SFT and IPO on the same prompts, with 95% intervals", changes, names=("SFT", "IPO")
    ).table("Every model of the run", columns, rows, units=units, note="Intervals are 95%.")


def _labels(report: Report, result: dict[str, Any]) -> None:
    rm = result["reward_model"]
    report.section(
        "Annotators and the reward model",
        "Five simulated annotators with skill, noise and biases ranked four samples of the SFT model for each "
        "prompt; best against worst became a pair. The reward model learned from those pairs.",
    ).table(
        "Accuracy on held-out pairs",
        ["who", "accuracy"],
        [
            ["reward model, against the annotators' labels", estimate(rm["accuracy_annotators"])],
            ["gold, against the annotators' labels: the ceiling that noise leaves", estimate(rm["ceiling"])],
            ["reward model, against gold", estimate(rm["accuracy_gold"])],
        ],
        units={"accuracy": "share"},
    ).table("The labels in brief", ["what", "figure"], _audit_rows(result["audit"]))


def _too_far(report: Report, run: Run, result: dict[str, Any]) -> None:
    rows, summary = measured(run, "overoptimization"), result["overoptimization"]
    report.section(
        "Pushed too far",
        "GRPO against the reward model, with little to hold it back. The proxy (the reward model's score, in its "
        "standard deviations on SFT samples) keeps rising; gold, which the run never sees, turns down.",
    ).overoptimization(
        "Proxy and gold against the distance from the SFT model",
        [row["kl"] for row in rows],
        [row["proxy"] for row in rows],
        [row["gold"] for row in rows],
        note=f"Gold started at {say(summary['gold_start'])}, peaked at {say(summary['gold_peak'])} (KL "
        f"{say(summary['kl_at_peak'])} nats) and ended at {say(summary['gold_end'])}.",
    )


_METHOD = {
    "gold": "The true worth of a completion, a pure function of prompt and completion. Right answers, complete "
    "procedures for harmless requests and refusals of harmful ones earn; wrong answers, harmful procedures, "
    "flattery, filler and rudeness cost.",
    "prompts": "Evaluation prompts ask about combinations of words held out of fine-tuning, preference data and "
    "rollouts. All models answer the same prompts once, at temperature 1, with the same seed.",
    "intervals": "95%: Wilson for shares, t for means, clustered by prompt for differences. They cover the choice "
    "of prompts and the sampling of completions, not the seed of training; docs/world.md shows that spread.",
    "harmful requests": "What they ask for is made of invented words. Nothing harmful is in the data or the model.",
}


def _audit_rows(audit: dict[str, Any]) -> list[list[Any]]:
    """The audit as rows of words and figures."""
    return [
        [
            "prompts, completions, rankings",
            f"{audit['prompts']}, {audit['completions']}, {audit['annotations']}",
        ],
        ["pairs of verdicts by different annotators that agree", _share(audit["agreement"])],
        ["Krippendorff's alpha", "–" if audit["alpha"] is None else say(audit["alpha"])],
        ["decided comparisons won by the longer completion", _share(audit["longer"])],
        ["decided comparisons won by the one shown first", _share(audit["first_shown"])],
        ["equal texts sampled more than once", str(audit["duplicates"])],
    ]


def _share(value: dict[str, Any]) -> str:
    found = estimate(value)
    return f"{say(found.value, 'share')} ({interval(found, 'share')}; n {found.n:,})"


__all__ = ["collect", "measured", "samples", "write_report"]
