"""The demo end to end, with a recipe cut down to seconds: its JSON, its report, its folder, its resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from steerwell.data.errors import InputError
from steerwell.pipelines.demo import run_demo
from steerwell.pipelines.stages import Recipe

METRICS = {"gold", "harmful_compliance", "over_refusal", "fact_accuracy", "flattery", "words"}
ESTIMATE = {"value", "low", "high", "n"}


def small() -> Recipe:
    recipe = Recipe()
    return replace(
        recipe,
        demonstrations=64,
        prompts=60,
        samples=2,
        grpo={**recipe.grpo, "steps": 2},
        rollouts={"n": 2, "prompts_per_step": 4},
        watch_every=1,
        watch_prompts=16,
        evaluation_prompts=64,
        max_new_tokens=24,
    )


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[tuple[Any, ...]]]:
    out = tmp_path_factory.mktemp("demo") / "run"
    seen: list[tuple[Any, ...]] = []
    result = run_demo(out, seed=3, progress=lambda *call: seen.append(call), recipe=small())
    return out, result, seen


def test_the_json_is_the_promised_one(demo: Any) -> None:
    out, result, _ = demo
    assert set(result["before"]) == METRICS
    assert set(result["after"]) == METRICS
    for metric in METRICS:
        assert set(result["before"][metric]) == ESTIMATE
    assert set(result["win_rate"]) == ESTIMATE
    assert set(result["reward_model"]) == {"accuracy_annotators", "accuracy_gold", "ceiling"}
    assert set(result["overoptimization"]) == {
        "gold_start", "gold_peak", "gold_end", "proxy_start", "proxy_end", "kl_at_peak",
    }  # fmt: skip
    assert {"sft", "sample", "reward_model", "ipo", "dpo", "overoptimize"} <= set(result["seconds"])
    assert json.loads((out / "result.json").read_text()) == json.loads(json.dumps(result))


def test_every_figure_leads_back_to_texts(demo: Any) -> None:
    out, result, _ = demo
    rows = json.loads((out / "measured" / "ipo.json").read_text())
    assert len(rows) == 64
    gold = [row["gold"] for row in rows]
    assert result["after"]["gold"]["value"] == pytest.approx(sum(gold) / len(gold))
    assert all(row["prompt"] for row in rows)


def test_the_report_is_one_self_contained_page_with_the_texts(demo: Any) -> None:
    out, result, _ = demo
    page = (out / "report" / "index.html").read_text("utf-8")
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert "src=" not in page.replace('src="data:', "")
    row = json.loads((out / "measured" / "ipo.json").read_text())[0]
    assert row["prompt"][:20] in page
    assert f"{100 * result['win_rate']['value']:.1f}%" in page


def test_progress_comes_from_every_process(demo: Any) -> None:
    seen = demo[2]
    stages = {call[0] for call in seen}
    assert {"demo", "sft", "reward_model", "ipo", "grpo"} <= stages
    assert ("demo", 11, 11) in [call[:3] for call in seen]


def test_a_finished_demo_is_not_done_again(demo: Any) -> None:
    out, result, _ = demo
    before = {p: p.stat().st_mtime_ns for p in out.glob("*/model/*.safetensors")}
    again = run_demo(out, seed=3, recipe=small())
    assert again["after"] == result["after"]
    assert {p: p.stat().st_mtime_ns for p in out.glob("*/model/*.safetensors")} == before


def test_another_demo_in_the_folder_is_refused(demo: Any) -> None:
    out = demo[0]
    with pytest.raises(InputError, match=r"holds another demo \(different seed\)"):
        run_demo(out, seed=4, recipe=small())


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="not empty"):
        run_demo(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.txt"]


def test_ctrl_c_leaves_it_resumable(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "steerwell", "demo", "--out", str(tmp_path / "run")]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    claimed = tmp_path / "run" / "demo.json"
    deadline = time.monotonic() + 120
    while not claimed.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1.0)
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    assert out == ""
    assert json.loads(claimed.read_text())["identity"]["seed"] == 0
