"""The benchmark scripts start, and what can be checked without a peer or a GPU is checked."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tiny_encoders import encoder_dir

FOLDER = Path(__file__).parents[1] / "benchmarks"
ROW = [[10, 11, 12], [13, 14], [15]]


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "STEERWELL_PEER_PYTHON"}
    environment |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.run(
        [sys.executable, str(FOLDER / script), *options], capture_output=True, text=True, env=environment
    )


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


@pytest.mark.parametrize(
    "script",
    [
        "train_vs_trl.py",
        "objectives_vs_trl.py",
        "compare_world.py",
        "growth.py",
        "gpu.py",
        "reward_models_on_real_language.py",
    ],
)
def test_scripts_say_what_they_do(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "python benchmarks/" in done.stdout


@pytest.mark.parametrize("script", ["train_vs_trl.py", "objectives_vs_trl.py"])
def test_a_missing_peer_is_said(script: str) -> None:
    done = run(script)
    assert done.returncode == 2
    assert "--peer PYTHON" in done.stderr


def test_the_gpu_script_checks_itself_on_a_cpu() -> None:
    done = run("gpu.py", "--self-check")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "self-check passed"


def test_useful_flops_by_hand() -> None:
    """One pair: prompt 3, completions 2 and 1 and an end token each: 3 + 3 + 2 tokens, 5 of them scored."""
    weights = 2 * (16 * (2 * 16 + 2 * 8) + 3 * 16 * 48)  # two layers: q and o 16x16, k and v 16x8, mlp 16x48
    seen = 6 + (3 * 3 + 6) + (2 * 3 + 3)  # prompt 1+2+3; 3 queries on 3 keys and 1+2+3; 2 on 3 and 1+2
    forward = 2 * weights * 8 + 2 * 4 * 16 * seen + 2 * 16 * 100 * 5
    script: Any = load("train_vs_trl")
    args = {"vocab": 100, "hidden": 16, "layers": 2, "epochs": 1, "cached": False}
    for method, passes in (("dpo", 4), ("kto", 6)):
        found = script.useful_flops(script.argparse.Namespace(method=method, **args), [ROW], 0)
        assert found == passes * forward
    cached = script.argparse.Namespace(method="dpo", **(args | {"cached": True}))
    assert script.useful_flops(cached, [ROW], 0) == 3 * forward

    gpu: Any = load("gpu")
    size = {"vocab": 100, "hidden": 16, "layers": 2, "heads": 8, "kv": 4, "head": 2, "mlp": 48}
    assert gpu.step_flops([ROW], size) == 3 * forward
    attention = 2 * 4 * 16 * seen
    assert gpu.step_flops([ROW], size, full=False) == 2 * (forward - attention) + 3 * attention


def test_pairs_of_the_growth_benchmark_are_the_same_each_time() -> None:
    script: Any = load("growth")
    pairs = script.Pairs(5, prompt=20, completion=10)
    assert [g.prompt_id for g in pairs] == [g.prompt_id for g in pairs[0:5]]
    assert len({g.prompt_id for g in pairs}) == 5


def test_cases_against_trl_name_objectives_and_hyperparameters_that_there_are() -> None:
    from steerwell.data.errors import InputError
    from steerwell.train.loop import checked
    from steerwell.train.terms import check_data

    script: Any = load("objectives_vs_trl")
    assert len({case.name for case in script.CASES}) == len(script.CASES)
    for case in script.CASES:
        terms, _ = checked(case.ours, None, case.hyper)
        if case.targets != "grpo":  # whose completions and rewards are given step by step
            check_data(terms, script.as_groups([ROW], case.targets))
    with pytest.raises(InputError, match="betta"):
        checked("dpo", None, {"betta": 0.1})


def test_the_result_against_trl_has_every_case_within_its_tolerance() -> None:
    script: Any = load("objectives_vs_trl")
    found = json.loads((FOLDER / "results" / "objectives_vs_trl.json").read_text())
    assert found["settings"]["tolerance"] == script.TOLERANCE == 1e-6
    assert found["settings"]["steps"] == script.STEPS == 20
    assert found["machine"]["cpu"]
    assert found["differ_by_design"] == script.BY_DESIGN
    assert found["not_compared"] == script.NOT_COMPARED
    assert list(found["cases"]) == [case.name for case in script.CASES]
    for case in script.CASES:
        row = found["cases"][case.name]
        assert row["steerwell"] == json.loads(json.dumps({"objective": case.ours, **case.hyper}))
        assert row["trl"] == {"trainer": case.trainer, **case.settings}
        assert row["steps"] == script.STEPS // case.every
        assert 0 <= row["largest_relative_difference"] <= script.TOLERANCE, case.name
        assert row["first_loss"] != row["last_loss"]


def test_every_loss_of_trls_preference_trainers_has_a_case() -> None:
    """The loss types of DPOTrainer, KTOTrainer, CPOTrainer and TPOTrainer of TRL 1.16, but for those without ours."""
    script: Any = load("objectives_vs_trl")
    known = {
        "dpo": "sigmoid hinge ipo exo_pair nca_pair robust bco_pair sppo_hard aot aot_unpaired apo_zero apo_down "
        "discopop sft sigmoid_norm",
        "kto": "kto apo_zero_unpaired",
        "cpo": "sigmoid hinge simpo",
        "tpo": "sigmoid tpo-l",
        "grpo": "grpo bnpo dapo",
    }
    for trainer, names in known.items():
        cases = [case.settings for case in script.CASES if case.trainer == trainer]
        given = [one.get("loss_type", "sigmoid") for one in cases]
        assert {x for one in given for x in ([one] if isinstance(one, str) else one)} == set(names.split())
    settings = [case.settings for case in script.CASES]
    divergences = {one["f_divergence_type"] for one in settings if "f_divergence_type" in one}
    assert divergences == {"reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"}
    for name in ("use_weighting", "ld_alpha", "loss_weights", "alpha", "center_rewards_coefficient"):
        assert any(name in one for one in settings), name


def test_the_rewards_of_given_completions() -> None:
    script: Any = load("objectives_vs_trl")
    assert script.rewards(0) == [-3.0, 1.0, 1.0, 1.0]
    assert script.rewards(5) == [-1.0, 3.0, -1.0, -1.0]
    assert [statistics.stdev(script.rewards(i)) for i in range(12)] == [2.0] * 12


def test_a_difference_from_trl_is_seen() -> None:
    script: Any = load("objectives_vs_trl")
    found = script.differences({"losses": [0.5, 0.4]}, {"losses": [0.5, 0.400001]})
    assert found["largest_relative_difference"] == pytest.approx(2.5e-6, rel=0.01)
    assert found["largest_relative_difference"] > script.TOLERANCE
    assert "trl: KeyError" in script.differences({"losses": [1.0]}, {"error": "KeyError: 1"})["not_compared"]
    second = script.differences({"losses": [9.0, 0.5]}, {"losses": [1.0, 0.5]}, every=2)
    assert (second["largest_relative_difference"], second["steps"]) == (0.0, 1)
    with pytest.raises(ValueError, match="longer"):
        script.differences({"losses": [0.5]}, {"losses": [0.5, 0.4]})


def test_the_readme_says_what_the_result_against_trl_says() -> None:
    found = json.loads((FOLDER / "results" / "objectives_vs_trl.json").read_text())["cases"]
    text = (FOLDER / "README.md").read_text()
    exact = sum(row["largest_relative_difference"] < 1e-12 for row in found.values())
    assert f"{len(found)} cases, {exact} of them equal within 1e-12" in " ".join(text.split())


# Reward models on real language


def test_the_folds_of_dialogues_do_not_move() -> None:
    script: Any = load("reward_models_on_real_language")
    assert [script.fold_of(words) for words in ("", "hello", "why?", "a", "b", "c")] == [1, 1, 3, 3, 3, 0]
    many = [script.fold_of(str(i)) for i in range(1000)]
    assert min(many.count(k) for k in range(5)) > 150


def test_pairs_of_dialogues(tmp_path: Path) -> None:
    """The last message is the prompt, the first one decides the fold, and pairs that differ in case are left out."""
    script: Any = load("reward_models_on_real_language")
    head = "\n\nHuman: one\n\nAssistant: two\n\nHuman: three\n\nAssistant: "
    rows = [{"chosen": head + "Good", "rejected": head + "bad"}]
    rows.append(
        {"chosen": "\n\nHuman: x\n\nAssistant: Yes  sir", "rejected": "\n\nHuman: x\n\nAssistant: yes sir"}
    )
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (group,), first, about = script.read_hh(str(tmp_path / "hh.jsonl"))
    assert [m.content for m in group.prompt] == ["three"]
    assert first == ["one"]
    assert about["equal_but_for_case"] == 1
    (pair,) = group.pairs
    assert [group.completions[i].text for i in (pair.chosen, pair.rejected)] == ["Good", "bad"]


def ukp(folder: Path) -> Path:
    """Two stances of one debate; the votes of three pairs."""
    folder.mkdir()
    (folder / "topics.json").write_text('["cats-or-dogs_cats", "cats-or-dogs_dogs"]')
    texts = [(0, "they purr"), (1, "They sleep."), (0, "no walks"), (1, "they fetch"), (0, "No walks")]
    rows = [{"arg": i, "topic": topic, "text": text} for i, (topic, text) in enumerate(texts)]
    (folder / "args.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "pairs.csv").write_text("pair,topic,arg1,arg2\n7,0,0,2\n8,1,3,1\n9,0,2,4\n")
    votes = ["a1", "a2", "a2", "equal", "a2"], ["a1", "a2"], ["a1"]
    lines = [f"{pair},w,{vote}" for pair, said in zip((7, 8, 9), votes, strict=True) for vote in said]
    (folder / "votes.csv").write_text("pair,worker,value\n" + "\n".join(lines) + "\n")
    return folder


def test_pairs_of_arguments_and_their_targets(tmp_path: Path) -> None:
    script: Any = load("reward_models_on_real_language")
    groups, debates, votes = script.read_ukp(ukp(tmp_path / "ukp"))
    assert [g.prompt[0].content for g in groups] == ["cats or dogs: cats", "cats or dogs: dogs"]
    assert debates == ["cats-or-dogs"] * 2
    assert votes[0, 0, 1] == {"a1": 1, "a2": 3, "equal": 1}
    assert votes[0, 1, 2] == {}  # the same words
    soft, hard = (script.with_votes(groups, votes, rule) for rule in ("soft", "majority"))
    assert [[(p.chosen, p.rejected, p.p) for p in g.pairs] for g in soft] == [[(1, 0, 0.75)], [(1, 0, 0.5)]]
    assert [[(p.chosen, p.rejected, p.p) for p in g.pairs] for g in hard] == [[(1, 0, 1.0)], []]


def test_calibration_by_hand() -> None:
    script: Any = load("reward_models_on_real_language")
    logit, share = np.log([3.0, 1.0, 1 / 3]), np.array([1.0, 0.5, 0.5])
    assert script.brier(logit, share) == pytest.approx((0.0625 + 0.25 + 0.5 * 0.0625 + 0.5 * 0.5625) / 3)
    expected = (-math.log(0.75) - math.log(0.5) - 0.5 * math.log(0.25) - 0.5 * math.log(0.75)) / 3
    assert script.nll(logit, share) == pytest.approx(expected)
    # by confidence: 0.5 (right 0.5) and 0.75 (right 1); then 0.75 (right 0.5)
    assert script.ece(logit, share, bins=2) == pytest.approx((2 * abs(0.625 - 0.75) + abs(0.75 - 0.5)) / 3)
    assert script.ece(logit, share, bins=3) == pytest.approx((0 + 0.25 + 0.25) / 3)


def test_a_temperature_is_found_and_never_on_its_own_pairs() -> None:
    script: Any = load("reward_models_on_real_language")
    draw = np.random.default_rng(0)
    true = draw.normal(0, 2, 40_000)
    share = (draw.random(40_000) < 1 / (1 + np.exp(-true))).astype(float)
    assert script.temperature(2.5 * true, share) == pytest.approx(2.5, rel=0.05)
    fold = np.arange(40_000) % 2
    one, zero = np.ones(40_000), np.zeros(40_000)
    margin = np.where(fold == 0, true, 4 * true)  # the folds ask for temperatures 1 and 4
    found = script.Measured(margin, share, one, zero, fold, fold)
    after = script.calibrated(found)
    assert (margin / after)[fold == 0].mean() == pytest.approx(4, rel=0.1)
    assert (margin / after)[fold == 1].mean() == pytest.approx(1, rel=0.1)
    assert script.ece(2.5 * true, share) > 0.05
    assert script.ece(true, share) < 0.01


@pytest.mark.parametrize("a", [0.5, 2.0])
def test_the_noise_ceiling_is_what_an_oracle_reaches(a: float) -> None:
    """Votes drawn from known shares: whoever knows the better side agrees with them this often."""
    script: Any = load("reward_models_on_real_language")
    draw = np.random.default_rng(1)
    p = draw.beta(a, a, 60_000)
    n = draw.integers(0, 6, 60_000)
    k = draw.binomial(n, p)
    seen = n > 0
    votes = list(zip(k[seen].tolist(), (n - k)[seen].tolist(), strict=True))
    found = script.ceiling(votes, [str(i) for i in range(len(votes))])
    vote = draw.random(60_000) < p
    assert found["single_vote"]["value"] == pytest.approx(float(((p > 0.5) == vote).mean()), abs=0.01)
    decided = 2 * k != n
    oracle = ((p > 0.5) == (2 * k > n))[decided].mean()
    assert found["majority"]["value"] == pytest.approx(float(oracle), abs=0.01)


def test_a_report_by_hand() -> None:
    """Four pairs: two right, one wrong, one that nobody decided."""
    script: Any = load("reward_models_on_real_language")
    margin, share = np.array([2.0, -1.0, 1.0, 0.5]), np.array([1.0, 0.2, 0.4, 0.5])
    fold, longer = np.array([0, 1, 0, 1]), np.array([1.0, 0.0, 0.5, 1.0])
    found = script.report(script.Measured(margin, share, np.full(4, 5), longer, fold, np.arange(4)))
    assert (found["pairs"], found["decided"], found["clusters"]) == (4, 3, 4)
    assert found["accuracy"]["value"] == pytest.approx(2 / 3)
    assert found["longer_wins"]["value"] == pytest.approx((1 + 1 + 0.5) / 3)
    assert found["shorter_wins"]["value"] == pytest.approx(0.5 / 3)
    assert found["over_the_better_rule"]["value"] == pytest.approx((0 + 0 - 0.5) / 3)
    assert found["accuracy_by_fold"] == [0.5, 1.0]


def test_the_trial_runs_on_a_tiny_encoder(tmp_path: Path) -> None:
    script: Any = load("reward_models_on_real_language")
    encoder = encoder_dir(tmp_path, "bert")
    turns = [(f"ask {i}", f"good {i}", f"bad {i} and long") for i in range(14)]
    rows = [
        {k: f"\n\nHuman: {q}\n\nAssistant: {a}" for k, a in (("chosen", c), ("rejected", r))}
        for q, c, r in turns
    ]
    (tmp_path / "hh.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = str(encoder), str(tmp_path / "hh.jsonl"), tmp_path / "runs", 14
    found = script.try_hh(*given)
    assert found["pairs"] == 14
    assert found["shorter_wins"]["value"] == 1.0
    assert len(list((tmp_path / "runs" / "hh").glob("fold-*.json"))) == len(found["accuracy_by_fold"])
    (encoder / "model.safetensors").unlink()
    assert script.try_hh(*given) == found  # nothing is trained again


def test_the_results_are_those_of_the_script() -> None:
    script: Any = load("reward_models_on_real_language")
    kept = json.loads(script.RESULT.read_text())
    assert kept["hh_harmless"]["settings"] == script.HH
    assert kept["ukp_convarg1"]["settings"] == script.UKP
    assert "/" not in kept["hh_harmless"]["encoder"]
    assert "file" not in kept["hh_harmless"]["data"]["read"]


def test_the_readme_says_what_the_trial_says() -> None:
    kept = json.loads((FOLDER / "results" / "reward_models_on_real_language.json").read_text())
    page = (FOLDER / "README.md").read_text()
    hh, words = kept["hh_harmless"], kept["ukp_convarg1"]
    found = [hh["accuracy"], words["soft"]["accuracy"], words["majority"]["accuracy"]]
    cells = [f"{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in found]
    assert f"| {' | '.join(cells)} |" in page
    ceiling = words["noise_ceiling"]["majority"]
    assert f"{ceiling['value']:.3f} [{ceiling['low']:.3f}, {ceiling['high']:.3f}]" in page
    over = [x["over_the_better_rule"] for x in (hh, words["soft"], words["majority"])]
    cells = [f"+{x['value']:.3f} [{x['low']:.3f}, {x['high']:.3f}]" for x in over]
    assert f"| {' | '.join(cells)} |" in page
