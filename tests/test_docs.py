"""What the documentation shows is run: Python blocks, the commands it names, its links, its example files."""

from __future__ import annotations

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
