"""Published scores by hand and by a second way, on small files in the published formats."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as correlations

from steerwell.data.benchmarks import BenchmarkItem
from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.evals.benchmark_scores import Scored
from steerwell.evals.task import Evaluation, evaluate
from steerwell.evals.tasks.ppe import area, ppe
from steerwell.evals.tasks.rewardbench import SECTIONS, rewardbench
from steerwell.evals.tasks.rewardbench2 import WEIGHTS, best_credit, rewardbench2, ties_score, ties_terms
from steerwell.evals.tasks.rm_bench import matrix, rm_bench
from steerwell.evals.tasks.rm_bench import scores as rm_scores


class Says:
    """A reward model whose score is the number that the text ends with; it refuses empty texts."""

    name = "says"

    def score(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        found = []
        for group in groups:
            if any(not c.text.strip() for c in group.completions):
                raise InputError("the completion is empty")
            found.append([float(c.text.split()[-1]) for c in group.completions])
        return found


class Contrary(Says):
    name = "contrary"

    def score(self, groups: Sequence[CompletionGroup]) -> list[list[float]]:
        return [[-s for s in scores] for scores in super().score(groups)]


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def value(found: Evaluation, metric: str, policy: str = "says") -> float | None:
    return found.get(policy, metric).measure.estimate.value


def scored(right: Sequence[float], wrong: Sequence[float], **facts: Any) -> Scored:
    prompt = as_messages("q")
    numbers = [*right, *wrong]
    made = tuple(
        Completion(prompt, (Message("assistant", str(n)),), Source(index=i)) for i, n in enumerate(numbers)
    )
    item = BenchmarkItem("k", CompletionGroup(prompt, made), "part", len(right), facts)
    return Scored(item, tuple(numbers))


# RewardBench


def v1(subset: str, *outcomes: bool, mark: str = "") -> list[dict[str, Any]]:
    return [
        {
            "prompt": f"{subset}{mark} {i}",
            "chosen": "c 1",
            "rejected": f"r {0 if right else 1}",
            "subset": subset,
        }
        for i, right in enumerate(outcomes)
    ]


def test_rewardbench_sections_are_weighted_by_the_published_numbers(tmp_path: Path) -> None:
    rows = [
        *v1("alpacaeval-easy", True, True),
        *v1("mt-bench-med", True, False),
        *v1("mt-bench-hard", True, True, False, False),
        *v1("llmbar-natural", True),
        *v1("donotanswer", False),
        *v1("math-prm", True, False, False, False),
        *v1("hep-rust", True),
    ]
    found = evaluate([Says()], [rewardbench(jsonl(tmp_path / "filtered.jsonl", rows))])
    chat, hard = (100 * 1 + 40 * 0.5) / 140, (37 * 0.5 + 100 * 1) / 137
    reasoning = (984 * 0.25 + 164 * 1) / 1148
    assert value(found, "rewardbench/section=Chat") == pytest.approx(chat)
    assert value(found, "rewardbench/section=Chat Hard") == pytest.approx(hard)
    assert (
        value(found, "rewardbench/section=Safety") == 0.0
    )  # an equal score is wrong, as in the authors' code
    assert value(found, "rewardbench/section=Reasoning") == pytest.approx(reasoning)
    assert value(found, "rewardbench") == pytest.approx((chat + hard + 0 + reasoning) / 4)
    assert value(found, "rewardbench/subset=math-prm") == 0.25
    assert "without alpacaeval-length" in found.get("says", "rewardbench/section=Chat").measure.notes[0]


def test_prior_sets_count_half(tmp_path: Path) -> None:
    core = [
        *v1("alpacaeval-easy", True),
        *v1("mt-bench-hard", True),
        *v1("donotanswer", False),
        *v1("hep-go", True),
    ]
    files = [jsonl(tmp_path / "filtered.jsonl", core)]
    for name, right in (("anthropic_helpful", True), ("shp", False), ("mtbench_gpt4", False)):
        files.append(jsonl(tmp_path / f"{name}-00000-of-00001.jsonl", v1("any", right, mark=name)))
    found = evaluate([Says()], [rewardbench(files)])
    assert value(found, "rewardbench/section=Prior Sets") == 0.5  # mtbench_gpt4 is not one of the four
    assert value(found, "rewardbench") == pytest.approx((1 + 1 + 0 + 1 + 0.5 * 0.5) / 4.5)


def test_a_part_of_rewardbench_has_no_whole(tmp_path: Path) -> None:
    found = evaluate([Says()], [rewardbench(jsonl(tmp_path / "f.jsonl", v1("hep-go", True, False)))])
    assert value(found, "rewardbench") is None
    assert value(found, "rewardbench/section=Reasoning") == 0.5
    with pytest.raises(InputError, match=r"f\.jsonl, row 1: unknown subset 'hep-goo'.*hep-go"):
        rewardbench(jsonl(tmp_path / "f.jsonl", v1("hep-goo", True)))
    assert sum(SECTIONS["Reasoning"].values()) == 984 + 6 * 164


def test_the_difference_of_two_models_is_that_of_their_scores(tmp_path: Path) -> None:
    rows = [
        *v1("alpacaeval-easy", True, True),
        *v1("mt-bench-med", True, False, True),
        *v1("mt-bench-hard", True),
        *v1("donotanswer", True, False),
        *v1("math-prm", False, True, True),
        *v1("hep-go", True),
    ]
    found = evaluate([Contrary(), Says()], [rewardbench(jsonl(tmp_path / "f.jsonl", rows))])
    for metric in ("rewardbench", "rewardbench/section=Chat", "rewardbench/section=Reasoning"):
        ours, theirs = value(found, metric), value(found, metric, "contrary")
        difference = found.get("says", metric).difference
        assert ours is not None
        assert theirs is not None
        assert difference is not None
        assert difference.value == pytest.approx(ours - theirs)


# RewardBench 2


def test_best_of_four_shares_the_credit() -> None:
    assert best_credit(scored([3.0], [2.0, 1.0, 0.0])) == 1.0
    assert best_credit(scored([3.0], [3.0, 1.0, 3.0])) == pytest.approx(1 / 3)
    assert best_credit(scored([3.0], [4.0, 1.0, 0.0])) == 0.0


def test_the_terms_of_ties_by_hand() -> None:
    # question 1: right answers 5 and 4, wrong 1: gap 3, spread 1; with one right answer a gap of 2
    # question 2: gap 1, spread 2; ref 4. Question 3: gap -1, spread 0; ref 1. Question 4 has no ref.
    ref = {"1": 2.0, "2": 4.0, "3": 1.0}
    tied = {"1": (3.0, 1.0), "2": (1.0, 2.0), "3": (-1.0, 0.0), "4": (1.0, 0.5)}
    margin = (math.tanh(2.0 - 1) + math.tanh(0.5 - 1) + -1.0) / 3
    by_hand = 0.3 * 3 / 4 + 0.3 * 1 + 0.2 * 1 / 3 + 0.2 * 1 / 3 + 0.01 * margin
    assert ties_score(ties_terms(ref, tied)) == pytest.approx(by_hand)
    assert sum(WEIGHTS.values()) == pytest.approx(1.01)
    # 0 / 0 counts 0, a gap over no spread counts 1
    assert ties_score(ties_terms({"1": 0.0}, {"1": (2.0, 0.0)})) == pytest.approx(0.3 + 0.2)
    assert ties_score(ties_terms({"1": 1.0}, {"1": (2.0, 0.0)})) == pytest.approx(1.01)
    assert math.isnan(ties_score(ties_terms({"1": 1.0}, {"2": (2.0, 0.0)})))


@pytest.mark.parametrize("seed", range(5))
def test_ties_by_a_second_way(tmp_path: Path, seed: int) -> None:
    """All comparisons of single answers, question by question, in plain loops."""
    rng = np.random.default_rng(seed)
    rows, accurate = [], {"ref": [], "tied": []}
    sides: dict[int, dict[str, tuple[list[float], list[float]]]] = {}
    for question in range(8):
        for kind, many in (("ref", 1), ("tied", 4)):
            right = rng.integers(2, 9, many).astype(float).tolist()
            wrong = rng.integers(0, 5, 5).astype(float).tolist()
            sides.setdefault(question, {})[kind] = (right, wrong)
            accurate[kind].append(all(r > w for r in right for w in wrong))
            rows.append(
                {
                    "id": f"{kind}:{question}",
                    "prompt": f"{kind} {question}",
                    "chosen": [f"c {r}" for r in right],
                    "rejected": [f"r {w}" for w in wrong],
                    "num_correct": many,
                    "subset": "Ties",
                }
            )
    preferred, hard, margins = [], [], []
    for both in sides.values():
        right, wrong = both["tied"]
        apart = max((abs(a - b) for a, b in combinations(right, 2)), default=0.0)
        between = min(r - w for r in right for w in wrong)
        least = min(between, min(r - w for r in both["ref"][0] for w in both["ref"][1]))
        preferred.append(between > apart)
        hard.append(least > apart)
        with np.errstate(divide="ignore", invalid="ignore"):
            margins.append(np.nan_to_num(np.tanh(np.float64(least) / np.float64(apart) - 1)))
    expected = (
        0.3 * np.mean(accurate["tied"])
        + 0.3 * np.mean(accurate["ref"])
        + 0.2 * np.mean(preferred)
        + 0.2 * np.mean(hard)
        + 0.01 * np.mean(margins)
    )
    found = evaluate([Says()], [rewardbench2(jsonl(tmp_path / "t.jsonl", rows))])
    result = found.get("says", "rewardbench2/subset=Ties").measure.estimate
    assert result.value == pytest.approx(expected)
    assert result.low is not None
    assert result.high is not None
    assert result.low < result.value < result.high  # type: ignore[operator]


def test_rewardbench2_is_the_mean_of_its_subsets(tmp_path: Path) -> None:
    def row(i: int, subset: str, chosen: int) -> dict[str, Any]:
        rejected = ["r 1", "r 2", "r 3"]
        return {
            "id": str(i),
            "prompt": f"q{i}",
            "chosen": [f"c {chosen}"],
            "rejected": rejected,
            "subset": subset,
        }

    rows = [row(0, "Math", 4), row(1, "Math", 0), row(2, "Focus", 3), row(3, "Focus", 9), row(4, "Focus", 9)]
    rows[3]["rejected"] = ["r 1", "", "r 3"]  # refused by the model: left out and counted
    found = evaluate([Says()], [rewardbench2(jsonl(tmp_path / "t.jsonl", rows))])
    assert value(found, "rewardbench2/subset=Math") == 0.5
    assert value(found, "rewardbench2/subset=Focus") == 0.75
    assert value(found, "rewardbench2") == 0.625
    assert found.get("says", "rewardbench2/subset=Focus").measure.coverage.missing == {"no score": 1}


# RM-Bench


def test_the_style_matrix_by_hand() -> None:
    values = [1.0, 5.0, 9.0, 0.0, 5.0, 10.0]
    assert matrix(values) == [[1, 0, 0], [1, 0, 0], [1, 1, 0]]
    chat = scored(values[:3], values[3:])
    found = {m.name: m.estimate.value for m in rm_scores([chat])}
    assert found["rm_bench/domain=part/easy"] == 1.0
    assert found["rm_bench/domain=part/normal"] == pytest.approx(1 / 3)
    assert found["rm_bench/domain=part/hard"] == 0.0
    assert found["rm_bench/domain=part"] == pytest.approx(4 / 9)
    assert "rm_bench" not in found  # one domain is not the benchmark


def test_rm_bench_whole(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    domains = ["chat", "code", "math", "safety-refuse", "safety-response"]
    rows, tables = [], {d: [] for d in domains}
    for i in range(60):
        domain = domains[i % 5 if i < 40 else i % 2]  # of unequal size
        right, wrong = rng.integers(0, 6, 3), rng.integers(0, 6, 3)
        rows.append(
            {
                "id": i,
                "prompt": f"q{i}",
                "domain": domain,
                "chosen": [f"c {r}" for r in right],
                "rejected": [f"r {w}" for w in wrong],
            }
        )
        tables[domain].append(np.greater.outer(right, wrong))
    mean = {d: np.mean(t, axis=0) for d, t in tables.items()}
    four = [mean["chat"], mean["code"], mean["math"], (mean["safety-refuse"] + mean["safety-response"]) / 2]
    cells = np.mean(four, axis=0)
    path = tmp_path / "total_dataset.json"
    path.write_text(json.dumps(rows))
    found = evaluate([Says()], [rm_bench(path)])
    assert value(found, "rm_bench/hard") == pytest.approx(cells[np.triu_indices(3, 1)].mean())
    assert value(found, "rm_bench/normal") == pytest.approx(np.diag(cells).mean())
    assert value(found, "rm_bench/easy") == pytest.approx(cells[np.tril_indices(3, -1)].mean())
    assert value(found, "rm_bench") == pytest.approx(cells.mean())
    assert value(found, "rm_bench/domain=safety") == pytest.approx(four[3].mean())
    assert value(found, "rm_bench/domain=code") == pytest.approx(four[1].mean())


# PPE


def human(i: int, models: tuple[str, str], scores: tuple[float, float], winner: str) -> dict[str, Any]:
    return {
        "prompt": f"q{i}",
        "response_1": f"one {scores[0]}",
        "response_2": f"two {scores[1]}",
        "model_a": models[0],
        "model_b": models[1],
        "winner": winner,
        "hard_prompt": i % 2 == 0,
    }


def test_ppe_human_leaves_ties_out_of_accuracy(tmp_path: Path) -> None:
    rows = [
        human(0, ("x", "y"), (2, 1), "model_a"),
        human(1, ("x", "y"), (2, 1), "model_b"),
        human(2, ("y", "z"), (1, 1), "model_a"),
        human(3, ("y", "z"), (2, 1), "tie"),
        human(4, ("x", "z"), (1, 2), "model_b"),
    ]
    found = evaluate([Says()], [ppe(jsonl(tmp_path / "human.jsonl", rows))])
    assert value(found, "ppe/human/accuracy") == pytest.approx((1 + 0 + 0.5 + 1) / 4)
    assert value(found, "ppe/human/accuracy/hard_prompt") == pytest.approx(2.5 / 3)
    assert "1 ties of 5 votes left out" in found.get("says", "ppe/human/accuracy").measure.notes
    # Win rates by people: x (1 + 0 + 0)/3, y (0 + 1 + 1 + 1/2)/4, z (0 + 1/2 + 1)/3.
    # By the model: x 2/3, y (0 + 0 + 1/2 + 1)/4, z (1/2 + 0 + 1)/3.
    people, model = [1 / 3, 2.5 / 4, 1.5 / 3], [2 / 3, 1.5 / 4, 1.5 / 3]
    assert value(found, "ppe/human/spearman") == pytest.approx(
        correlations.spearmanr(people, model).statistic
    )
    assert value(found, "ppe/human/kendall") == pytest.approx(-1.0)


def test_area_under_the_curve() -> None:
    assert area(np.array([3.0, 2.0, 1.0]), np.array([1.0, 0.0, 1.0])) == 0.5
    assert area(np.array([3.0, 2.0, 2.0]), np.array([1.0, 1.0, 0.0])) == pytest.approx(0.75)
    rng = np.random.default_rng(0)
    scores, right = rng.integers(0, 5, 40).astype(float), rng.integers(0, 2, 40).astype(float)
    pairs = [(a > b) + (a == b) / 2 for a in scores[right == 1] for b in scores[right == 0]]
    assert area(scores, right) == pytest.approx(np.mean(pairs))


def correct(i: int, scores: Sequence[float], right: Sequence[bool], pairs: list[list[int]]) -> dict[str, Any]:
    texts = {f"response_{j}": f"t {s}" for j, s in enumerate(scores, 1)}
    return {"prompt": f"q{i}", **texts, "scores": list(right), "sampled_conflict_pairs": pairs}


def test_ppe_correctness_by_hand(tmp_path: Path) -> None:
    rows = [
        correct(0, [3, 2, 1], [True, False, True], [[0, 1], [1, 2]]),
        correct(1, [3, 2, 1], [False, True, True], [[0, 1], [0, 2]]),
        correct(2, [1, 2, 3], [False, False, False], []),
    ]
    found = evaluate([Says()], [ppe(jsonl(tmp_path / "math_best_of_k.jsonl", rows))])
    at = "ppe/math_best_of_k"
    assert value(found, f"{at}/accuracy") == pytest.approx((0.5 + 0.0) / 2)
    assert value(found, f"{at}/auc") == pytest.approx((0.5 + 0.0) / 2)
    # C(k): prompt 0 has right at places 1 and 3: 2/3, 2/3, 1. Prompt 1 at places 2 and 3: 2/3, 1/3, 0.
    curve = [(2 / 3 + 2 / 3) / 3, (2 / 3 + 1 / 3) / 3, 1 / 3]
    oracle = [(2 / 3 + 2 / 3) / 3, 2 / 3, 2 / 3]
    assert value(found, f"{at}/max_score") == pytest.approx(curve[0])
    assert value(found, f"{at}/end_score") == pytest.approx(curve[2])
    assert value(found, f"{at}/loss") == pytest.approx(np.mean(np.subtract(oracle, curve)))
    assert value(found, f"{at}/random") == pytest.approx(4 / 9)
    assert value(found, f"{at}/auc_pooled") == pytest.approx(
        area(np.array([3, 2, 1, 3, 2, 1, 1, 2, 3]), np.array([1, 0, 1, 0, 1, 1, 0, 0, 0]))
    )
    assert found.get("says", f"{at}/accuracy").measure.estimate.n == 2


def test_several_files_of_ppe(tmp_path: Path) -> None:
    files = [
        jsonl(tmp_path / "math_best_of_k.jsonl", [correct(0, [2, 1], [True, False], [[0, 1]])]),
        jsonl(tmp_path / "gpqa_best_of_k.jsonl", [correct(0, [1, 2], [True, False], [[0, 1]])]),
        jsonl(tmp_path / "human.jsonl", [human(0, ("x", "y"), (2, 1), "model_a")]),
    ]
    found = evaluate([Says()], [ppe(files)])
    assert value(found, "ppe/correctness") == 0.5
    assert value(found, "ppe/human/accuracy") == 1.0
    assert value(found, "ppe/human/spearman") is None  # two models have no ranking to speak of


# all of them


def test_a_policy_needs_its_reference_and_a_name_its_file(tmp_path: Path) -> None:
    class Mute:
        name = "mute"

    path = jsonl(tmp_path / "f.jsonl", v1("hep-go", True))
    with pytest.raises(InputError, match="measures rewards, and mute has none"):
        evaluate([Mute()], [rewardbench(path)])
    with pytest.raises(InputError, match="rm_bench needs its published file"):
        evaluate([Says()], ["rm_bench"])
    with pytest.raises(InputError, match="needs its published file"):
        rewardbench([])
