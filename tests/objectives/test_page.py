"""docs/objectives.md and its pictures are what the docstrings and the functions say today."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from steerwell.objectives import MIXTURES, TABLE, dpo, explain, needs, objective, table

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_objectives", DOCS / "make_objectives.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(maker: ModuleType) -> dict[str, str]:
    return maker.files()


def test_the_page_is_up_to_date(made: dict[str, str], maker: ModuleType) -> None:
    stale = [name for name, text in made.items() if not maker.same(DOCS / name, text)]
    left = sorted(set(maker.pictures_there()) - set(made))
    assert stale + left == [], "run python docs/make_objectives.py"


def test_every_objective_has_its_section(made: dict[str, str], maker: ModuleType) -> None:
    page = made["objectives.md"]
    for name, fn in TABLE.items():
        section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        for part in ("**Use when:** ", "```text\n", "Source: ", "Needs:\n\n- `", "Failure modes:\n\n- "):
            assert part in section, f"{name} has no {part!r}"
        assert f"[{name}](#{name})" in page
        drawn = f"objectives/{name}.svg"
        assert (drawn in section) == (drawn in made)
        known = set(needs(fn)) <= maker.known(fn)
        assert known or fn.kind == "reward", f"the pictures make up no {set(needs(fn)) - maker.known(fn)}"
        if fn.unit == "pair" and fn.decomposable and known:
            assert drawn in made


def test_every_mixture_has_its_section(made: dict[str, str]) -> None:
    page = made["objectives.md"]
    for name, mixture in MIXTURES.items():
        section = page.split(f"\n### {name}\n")[1].split("\n### ")[0]
        for term, weight, _ in mixture.terms:
            assert f"- {weight:g} × [{term}](#{term})" in section
        assert f"[{name}](#{name})" in page
        assert "losses = [[" in section
    assert "- 0.005 × [sft](#sft), reduction = 'sequence_sum'" in page


def test_a_tensor_that_the_pictures_do_not_know_costs_the_picture_only(
    maker: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table, "TABLE", dict(table.TABLE))

    @objective(unit="pair", kind="reward", source="nobody")
    def headed(moon_phases, pairs):
        """Nothing.

        Formula:
            loss = 0
        Returns:
            nothing
        Use when:
            Never.
        """
        return moon_phases.sum(), {}

    assert maker.picture(headed) is None
    section = "\n".join(maker.section("headed", headed, False))
    assert "- `moon_phases`: a tensor of its own" in section
    assert ".svg" not in section


def test_the_picture_of_a_group_is_that_of_its_pair(maker: ModuleType) -> None:
    """Plackett-Luce over two completions is DPO, in value and in push."""
    group, pair = (maker.paired(TABLE[name], maker.Scene()) for name in ("plackett_luce", "dpo"))
    for one, other in zip([*group[0], *group[1]], [*pair[0], *pair[1]], strict=True):
        assert one.y == pytest.approx(other.y, rel=1e-12)


def test_explain_and_the_page_say_the_same(made: dict[str, str]) -> None:
    said = " ".join(explain("ipo").split())
    section = made["objectives.md"].split("\n### ipo\n")[1].split("\n### ")[0]
    for line in section.splitlines():
        if line.startswith("- ") and "`" not in line:
            assert line[2:] in said


def test_a_picture_holds_the_functions_own_values(maker: ModuleType) -> None:
    """DPO at beta 0.1: ln 2 and a push of beta / 2 on either side where the margin is 0."""
    (loss,), (chosen, rejected), _ = maker.paired(dpo, maker.Scene())
    middle = loss.x.index(0.0)
    assert loss.y[middle] == pytest.approx(0.6931471805599453, rel=1e-12)
    assert (chosen.y[middle], rejected.y[middle]) == (pytest.approx(0.05), pytest.approx(-0.05))
    # margin -60: loss = log(1 + e^6), push = 0.1 s(6)
    assert loss.y[0] == pytest.approx(6.002475685, rel=1e-9)
    assert chosen.y[0] == pytest.approx(0.0997527377, rel=1e-9)


def test_a_picture_of_single_completions(maker: ModuleType) -> None:
    """KTO at beta 0.1: 1/2 where the policy agrees with the reference, and a push of beta / 4."""
    losses, pushes, _ = maker.single(
        TABLE["kto"], maker.Scene(), reach=60.0, tokens=10, names=("good", "bad"), x_label=""
    )
    middle = losses[0].x.index(0.0)
    assert [s.y[middle] for s in losses] == [0.5, 0.5]
    assert [s.y[middle] for s in pushes] == [pytest.approx(0.025), pytest.approx(-0.025)]
    assert losses[0].y[-1] == pytest.approx(1 / 404.4287934927351, rel=1e-12)  # 1 / (1 + e^6)
