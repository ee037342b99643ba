"""The house rules that a machine can hold: floors, names, sizes, light imports."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "steerwell"

# Which room may import which. The roof (cli, pipelines, testing, the package itself) may import everything.
MAY_IMPORT: dict[str, set[str]] = {
    "data": set(),
    "objectives": set(),
    "world": {"data"},
    "models": {"data"},
    "judges": {"data", "models"},
    "evals": {"data", "judges"},
    "train": {"data", "objectives", "models"},
}
ROOF = {"cli", "pipelines", "testing", "__init__", "__main__"}
FORBIDDEN_NAMES = {"utils", "common", "helpers", "misc", "manager", "handler", "processor", "experimental"}
LONGEST_FILE = 450


def modules(root: Path = SOURCE) -> Iterator[tuple[Path, ast.Module]]:
    for file in sorted(root.rglob("*.py")):
        yield file, ast.parse(file.read_text())


def imported_rooms(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and room of every import of another part of the package, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "steerwell":
            names = [f"steerwell.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        for name in names:
            parts = name.split(".")
            if parts[0] == "steerwell" and len(parts) > 1:
                yield node.lineno, parts[1]


def type_checking_lines(tree: ast.Module) -> set[int]:
    """Lines under ``if TYPE_CHECKING``: they import nothing when the program runs."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def floor_violations(root: Path) -> list[str]:
    found = []
    for file, tree in modules(root):
        room = file.relative_to(root).parts[0].removesuffix(".py")
        if room in ROOF:
            continue
        skip = type_checking_lines(tree)
        for line, other in imported_rooms(tree):
            if line not in skip and other != room and other not in MAY_IMPORT.get(room, set()):
                found.append(f"{file.relative_to(root)}:{line}: {room} may not import {other}")
    return found


def test_imports_go_down_only() -> None:
    assert floor_violations(SOURCE) == []


def test_the_floor_test_can_fail(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "bad.py").write_text("def f():\n    from steerwell.train import loop\n")
    assert floor_violations(tmp_path) == ["data/bad.py:2: data may not import train"]


def test_every_room_has_a_floor() -> None:
    rooms = {p.name.removesuffix(".py") for p in SOURCE.iterdir() if p.is_dir() or p.suffix == ".py"}
    assert rooms - {"__pycache__"} - ROOF == set(MAY_IMPORT)


@pytest.mark.parametrize("room", ["data", "objectives"])
def test_the_ground_imports_only_what_it_may(room: str) -> None:
    heavy = {"data": {"torch", "transformers"}, "objectives": {"transformers", "numpy", "sqlalchemy"}}[room]
    for file, tree in modules(SOURCE / room):
        for node in ast.walk(tree):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else []
            )
            assert not {n.split(".")[0] for n in names} & heavy, f"{file.name} imports {names}"


def test_names_say_what_is_inside() -> None:
    assert [f for f, _ in modules() if set(f.stem.split("_")) & FORBIDDEN_NAMES] == []


def test_files_are_short_enough_to_read() -> None:
    long = {
        str(f.relative_to(SOURCE)): n for f, _ in modules() if (n := f.read_text().count("\n")) > LONGEST_FILE
    }
    assert long == {}


def test_every_module_and_public_function_says_what_it_is_for() -> None:
    silent = []
    for file, tree in modules():
        name = str(file.relative_to(SOURCE))
        if not ast.get_docstring(tree):
            silent.append(name)
        for node in tree.body:
            public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
            if public and not ast.get_docstring(node):
                silent.append(f"{name}:{node.name}")
    assert silent == []


def test_no_pickled_weights_no_remote_code_no_bare_except() -> None:
    for file, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"bare except at {file.name}:{node.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
                assert isinstance(node.value, ast.Constant), file.name
                assert node.value.value is False, file.name


def test_import_is_light() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'httpx'}"
    code = f"import sys, steerwell; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
