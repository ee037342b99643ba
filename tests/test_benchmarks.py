"""The benchmark scripts start, and what can be checked without a peer or a GPU is checked."""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

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
    "script", ["train_vs_trl.py", "objectives_vs_trl.py", "compare_world.py", "growth.py", "gpu.py"]
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
