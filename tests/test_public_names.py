"""``import steerwell``: quick, and every promised name is there, in whatever order things are imported."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import steerwell

# What design and README promise: Python in fifteen lines.
FIFTEEN_LINES = [
    "open",
    "load",
    "load_policy",
    "load_reward_model",
    "judges.pairwise",
    "judges.reward_model",
    "judges.rules",
    "judges.refusal",
    "judges.scored",
    "judges.verifier",
    "judges.verification_groups",
    "resolve.majority",
    "resolve.soft",
    "resolve.mean",
    "resolve.labels",
    "train",
    "rollouts",
    "objectives.dpo",
    "objectives.grpo",
    "objectives.ipo",
    "objectives.sft",
    "objectives.bradley_terry",
    "evaluate",
    "world.prompts",
    "world.gold_judge",
]


def run(code: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize("name", FIFTEEN_LINES)
def test_the_promised_names_are_there(name: str) -> None:
    found = steerwell
    for part in name.split("."):
        found = getattr(found, part)
    assert callable(found)


def test_every_name_loads_and_is_listed() -> None:
    assert len(set(steerwell.__all__)) == len(steerwell.__all__)
    for name in steerwell.__all__:
        assert getattr(steerwell, name) is getattr(steerwell, name)
        assert name in dir(steerwell)
    assert set(steerwell.__all__) == set(steerwell._PLACES)
    assert steerwell.__version__[0].isdigit()


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(steerwell.__file__).read_text())
    seen = {
        alias.asname
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for line in node.body
        if isinstance(line, ast.ImportFrom)
        for alias in line.names
    }
    assert seen == set(steerwell.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        steerwell.trian  # noqa: B018
    assert not hasattr(steerwell, "cat")


def test_importing_loads_nothing_heavy() -> None:
    heavy = "{'torch', 'transformers', 'matplotlib', 'httpx', 'sqlalchemy', 'numpy', 'typer', 'pydantic'}"
    assert run(f"import sys, steerwell; print({heavy} & set(sys.modules))") == "set()"
    assert run(f"import sys, steerwell; steerwell.InputError; print({heavy} & set(sys.modules))") == "set()"
    assert run("import sys, steerwell.judges; print({'torch', 'httpx'} & set(sys.modules))") == "set()"


@pytest.mark.parametrize(
    "before",
    [
        "import steerwell.train.loop; import steerwell as sw",
        "import steerwell as sw; sw.train; import steerwell.train.sources",
        "import steerwell as sw; sw.rollouts; from steerwell.train.loop import train",
    ],
)
def test_train_is_a_verb_whatever_was_imported_before(before: str) -> None:
    code = (
        f"{before}\n"
        "try:\n"
        "    sw.train(None, [], 'no_such_objective', out='/nonexistent/x')\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "from steerwell import train\n"
        "assert train is sw.train\n"
        "import steerwell.train.config as config\n"
        "print(config.TrainConfig.__name__)"
    )
    lines = run(code).splitlines()
    assert "unknown objective 'no_such_objective'" in lines[0]
    assert lines[1] == "TrainConfig"


@pytest.mark.parametrize("room", ["judges", "objectives", "world", "resolve"])
def test_rooms_are_the_modules_themselves(room: str) -> None:
    place = "steerwell.data.resolve" if room == "resolve" else f"steerwell.{room}"
    assert getattr(steerwell, room) is sys.modules[place]


def test_judges_are_functions_and_their_files_can_be_imported() -> None:
    code = (
        "import steerwell.judges.rules; import steerwell.judges.reward_model; import steerwell as sw\n"
        "from steerwell.judges.rules import RULES\n"
        "print(callable(sw.judges.rules), callable(sw.judges.reward_model), len(RULES) > 3)"
    )
    assert run(code) == "True True True"


def test_the_functions_say_what_they_are_for() -> None:
    for name in FIFTEEN_LINES:
        found = steerwell
        for part in name.split("."):
            found = getattr(found, part)
        assert inspect.getdoc(found), name
