"""What the documentation shows is run: Python blocks, the commands it names, its links, its example files."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for kind, body in BLOCK.findall(page.read_text("utf-8")) if kind == language]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", page.read_text("utf-8")):
        if not target.startswith(("http://", "https://")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_command_in_the_docs_exists() -> None:
    shown = {
        verb
        for page in PAGES
        for body in blocks(page, "sh")
        for verb in re.findall(r"(?:^|\s)steerwell ([a-z]+)", body)
    }
    assert {"import", "train", "eval", "explain", "export", "sample", "judge"} <= shown
    for verb in sorted(shown):
        done = subprocess.run(
            [sys.executable, "-m", "steerwell", verb, "--help"], capture_output=True, text=True
        )
        assert done.returncode == 0, f"steerwell {verb}: {done.stderr}"
        assert "xample" in done.stdout, f"steerwell {verb} --help has no example"


def test_the_example_recipes_are_valid() -> None:
    from steerwell.train.config import Recipe

    recipes = sorted((ROOT / "examples").glob("*.toml"))
    assert recipes
    for file in recipes:
        assert (
            Recipe.from_toml(file).model_dump()["objective"] == tomllib.loads(file.read_text())["objective"]
        )


def test_the_toolchain_is_pinned_and_the_package_is_not() -> None:
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    assert "torch==2.13.0" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert any(re.fullmatch(r"torch>=\d+\.\d+", d) for d in project["dependencies"])
    pinned = {re.split("==", line)[0].lower().replace("_", "-") for line in pins if "==" in line}
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    for requirement in wanted:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)
        assert name
        assert name[0].lower().replace("_", "-") in pinned, f"{name[0]} is not pinned in constraints.txt"


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fifteen lines as they stand, on a tiny model under the name they use and a local endpoint."""
    import json
    import random

    import torch

    from chat_server import ChatServer, Request
    from tiny import tiny_policy_dir

    fifteen, plain = blocks(ROOT / "README.md", "python")
    assert 15 <= len([line for line in fifteen.splitlines() if line.strip()]) <= 17
    (tmp_path / "Qwen").mkdir()
    tiny_policy_dir(tmp_path / "made").rename(tmp_path / "Qwen" / "Qwen3-0.6B")
    rng = random.Random(0)
    with (tmp_path / "ultrafeedback.jsonl").open("w") as file:
        for i in range(12):
            words = rng.sample(["sun", "rain", "wind", "snow", "fog", "ice"], 2)
            row = {"prompt": f"weather {i}?", "chosen": words[0], "rejected": words[1]}
            file.write(json.dumps(row) + "\n")

    def reply(request: Request) -> str:
        return request.verdict(helpful="first", honest="tie")

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    fifteen = fifteen.replace("n=4)", "n=2, max_new_tokens=8)").replace("n=8)", "n=2, max_new_tokens=8)")
    fifteen = fifteen.replace("judge=judge))", "judge=judge, max_new_tokens=8))")
    with ChatServer(reply) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("OPENAI_API_KEY", "none")
        names: dict[str, object] = {}
        exec(compile(fifteen, "README.md", "exec"), names)
    assert (tmp_path / "runs" / "grpo" / "model" / "model.safetensors").exists()
    names = {}
    exec(compile(plain, "README.md", "exec"), names)
    margin = 0.1 * ((-4.0 + 5.0) - (-6.0 + 5.0))
    losses = names["losses"]
    assert isinstance(losses, torch.Tensor)
    assert losses.item() == pytest.approx(-torch.nn.functional.logsigmoid(torch.tensor(margin)).item())


def test_the_python_of_the_page_on_process_rewards_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from tiny import tiny_policy_dir

    page = ROOT / "docs" / "process_rewards.md"
    (tmp_path / "Qwen").mkdir()
    tiny_policy_dir(tmp_path / "made").rename(tmp_path / "Qwen" / "Qwen3-0.6B")
    rows = [
        {"prompt": f"{i}?", "completions": ["one", f"so {i}"], "labels": [True, i % 2 == 0]} for i in range(6)
    ]
    (tmp_path / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    code = "\n".join(blocks(page, "python")).replace("n=4)", "n=2, max_new_tokens=6)")
    names: dict[str, object] = {}
    exec(compile(code.replace("n=8)", "n=2, max_new_tokens=6)"), page.name, "exec"), names)
    assert [len(own) for group in names["steps"] for own in group] == [2] * 6  # type: ignore[attr-defined]
    assert len(names["labelled"]) == 1  # type: ignore[arg-type]
    text = page.read_text("utf-8")
    from steerwell.data.stepwise import READERS
    from steerwell.models.step_scores import AGGREGATES

    assert re.findall(r"^\| `([a-z0-9-]+)` \|", text, re.MULTILINE) == [*READERS, "prod", "last"]
    assert all(f"`{name}`" in text for name in AGGREGATES)


def test_the_figures_against_trl_are_those_of_the_result_files() -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    files = sorted((ROOT / "benchmarks" / "results").glob("train_vs_trl_*.json"))
    assert len(files) >= 6
    for file in files:
        row = next(line for line in page.splitlines() if f"results/{file.name})" in line)
        summary = json.loads(file.read_text())["summary"]
        seconds = [summary[side]["training_cpu_seconds"] for side in ("steerwell", "trl")]
        ratios = [summary["cpu_ratio"], summary["cpu_ratio_outside_the_kernel"]]
        cells = [cell.strip(" *") for cell in row.split("|")[2:-1]]
        assert cells[:2] == [f"{x:.1f} s" for x in seconds]
        assert cells[2:4] == [f"{x:.1f}×" for x in ratios]
        assert cells[4] == f"1/{summary['memory_ratio']:.1f}"
        assert cells[5] == f"{summary['steerwell']['share_of_matmul_rate']:.0%}"
        assert summary["largest_loss_difference"] < 1e-5


def test_the_figures_of_growth_are_those_of_the_result_file() -> None:
    page = (ROOT / "docs" / "training.md").read_text("utf-8")
    sizes = json.loads((ROOT / "benchmarks" / "results" / "growth.json").read_text())["sizes"]
    assert [one["pairs"] for one in sizes] == [1000, 4000, 16000, 64000]
    assert ", ".join(f"{1000 * one['cpu_seconds'] / one['pairs']:.1f}" for one in sizes) + " CPU ms" in page
    assert ", ".join(f"{one['peak_mib']:.0f}" for one in sizes) + " MiB" in page


def test_the_python_of_the_page_on_reward_models_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import steerwell as sw
    from tiny import tiny_policy_dir

    (page,) = blocks(ROOT / "docs" / "reward_models.md", "python")
    (tmp_path / "models").mkdir()
    tiny_policy_dir(tmp_path / "made").rename(tmp_path / "models" / "tiny")
    groups = []
    for i in range(32):
        prompt = (sw.Message("user", f"question {i}"),)
        texts = ["red " * (1 + i % 3), "blue " * (1 + i % 4)]
        made = [
            sw.Completion(prompt, (sw.Message("assistant", text.strip()),), sw.Source(index=k))
            for k, text in enumerate(texts)
        ]
        said = [
            sw.Annotation("score", (c.id,), "people", float(k + i % 2), criterion=name)
            for k, c in enumerate(made)
            for name in ("helpfulness", "verbosity")
        ]
        votes = [
            sw.Annotation(
                "preference", (made[0].id, made[1].id), f"annotator {n}", int(n == i % 5), strength=2.0
            )
            for n in range(3)
        ]
        groups.append(sw.CompletionGroup(prompt, tuple(made), (*said, *votes)))
    sw.save(groups, tmp_path / "scores.jsonl")
    monkeypatch.chdir(tmp_path)
    exec(compile(page, "reward_models.md", "exec"), {})
    outputs, probability = capsys.readouterr().out.splitlines()
    assert "helpfulness" in outputs
    assert 0 < float(probability) < 1
    recipe = json.loads((tmp_path / "runs" / "gated" / "model" / "steerwell_scoring.json").read_text())
    shown = re.findall(
        r"`(\w+)`",
        "".join(re.findall(r"^\| (`.*?) \|", (ROOT / "docs" / "reward_models.md").read_text(), re.M)),
    )
    assert set(recipe) - {"version"} <= set(shown)  # the page names all that the recipe holds


def test_the_comparison_of_the_docs_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The recipe and the command as they stand, on a tiny model and few pairs."""
    from steerwell.cli import main
    from tiny import tiny_policy_dir

    page = ROOT / "docs" / "compare.md"
    (command,) = blocks(page, "sh")[0].split("\n")[:-1]
    words = command.split()
    assert words[:3] == ["steerwell", "train", "compare.toml"]
    monkeypatch.chdir(tmp_path)
    tiny_policy_dir(tmp_path / "made").rename(tmp_path / "sft")
    (tmp_path / "runs").mkdir()
    (tmp_path / "sft").rename(tmp_path / "runs" / "sft")
    (tmp_path / "compare.toml").write_text(blocks(page, "toml")[0])
    rows = [{"prompt": f"weather {i}?", "chosen": f"sun {i}", "rejected": "rain"} for i in range(12)]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["import", "p.jsonl", "--to", "prefs.db", "--test-fraction", "0.4"]) == 0
    capsys.readouterr()
    few = ["--set", "train.steps=1", "--samples", "2", "--max-new-tokens", "3", "--json"]
    assert main([*words[1:], *few]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["name"] for row in found["contenders"]] == words[-1].split(",")
    assert (tmp_path / "runs" / "compare" / "dpo-beta=0.5" / "run.json").exists()
    assert (tmp_path / "runs" / "compare" / "compare.html").exists()


def test_the_figures_of_the_comparison_are_those_of_the_result_file() -> None:
    from steerwell.evals.display import say, signed

    page = (ROOT / "docs" / "compare.md").read_text("utf-8")
    found = json.loads((ROOT / "benchmarks" / "results" / "compare_world.json").read_text())
    (command,) = (
        line for line in blocks(ROOT / "docs" / "compare.md", "sh")[1].splitlines() if "--compare" in line
    )
    assert command == found["command"]
    assert len(found["contenders"]) == 5
    assert f"{sum(row['cpu_seconds'] for row in found['contenders']):.0f} CPU seconds of training" in page
    right = {round(row["accuracy"]["value"] * row["accuracy"]["n"], 6) for row in found["contenders"]}
    assert right == {188}
    assert "188 of 261" in page
    for row in found["contenders"]:
        line = next(line for line in page.splitlines() if line.startswith(f"| {row['name']} |"))
        cells = [cell.strip() for cell in line.split("|")[2:-1]]
        share = [say(row[name]["value"], "share") for name in ("accuracy", "win_rate")]
        change = [signed(row[name]["value"]) for name in ("margin", "chosen_shift")]
        ends = [say(row["win_rate"][end], "share").removesuffix("%") for end in ("low", "high")]
        assert cells == [
            share[0],
            *change,
            say(row["kl"]["value"]),
            f"{share[1]} ({ends[0]} … {ends[1]})",
            say(row["tokens"]["value"]),
        ]


def test_the_python_of_the_page_on_ensembles_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import random

    from tiny import tiny_policy_dir

    page = ROOT / "docs" / "reward_ensembles.md"
    (tmp_path / "models").mkdir()
    tiny_policy_dir(tmp_path / "made").rename(tmp_path / "models" / "tiny")
    rng = random.Random(0)
    with (tmp_path / "prefs.jsonl").open("w") as file:
        for i in range(8):
            words = rng.sample(["sun", "rain", "wind", "snow", "fog", "ice"], 2)
            row = {"prompt": f"weather {i}?", "chosen": words[0], "rejected": words[1]}
            file.write(json.dumps(row) + "\n")
    monkeypatch.chdir(tmp_path)
    names: dict[str, float] = {}
    exec(compile("\n".join(blocks(page, "python")), page.name, "exec"), names)
    assert names["std"] > 0
    assert abs(names["moderated"] - 0.5) <= abs(names["plain"] - 0.5)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == [
        "adapters", "average", "careful", "ensemble", "made", "models", "runs", "sure",
    ]  # fmt: skip
    for word in re.findall(r"`rm:careful(\?[^`]+)`", page.read_text("utf-8")):
        from steerwell.judges import parse

        assert parse(f"rm:careful{word}").name.startswith("rm:careful@")
