"""A reward model as a judge: its scores, its name, run directories, and scores that are no numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup, Source
from steerwell.judges import Judge, parse, reward_model
from steerwell.models.load import load_policy
from steerwell.models.reward_model import RewardModel
from tiny import tiny_policy_dir


def groups() -> list[CompletionGroup]:
    found = []
    for prompt, texts in (("Hello", ("Hi", "Go away")), ("Bye", ()), ("Why?", ("Because.",))):
        messages = as_messages(prompt)
        completions = (
            Completion(messages, (Message("assistant", t),), Source(index=i)) for i, t in enumerate(texts)
        )
        found.append(CompletionGroup(messages, tuple(completions)))
    return found


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a reward model in ``model/``."""
    folder = tmp_path_factory.mktemp("runs") / "rm"
    policy = load_policy(tiny_policy_dir(folder.parent))
    RewardModel.from_policy(policy).save(folder / "model")
    return folder


def test_one_score_per_completion(run: Path) -> None:
    judge = reward_model(run)
    data = groups()
    found = judge(data)
    assert [a.completions for a in found] == [(c.id,) for g in data for c in g.completions]
    wanted = [score for scores in judge.model.score([data[0], data[2]]) for score in scores]
    assert [a.value for a in found] == pytest.approx(wanted, abs=1e-6)
    assert {(a.kind, a.annotator) for a in found} == {("score", judge.name)}
    assert isinstance(judge, Judge)
    assert judge([data[1]]) == []


def test_the_name_holds_the_weights(run: Path) -> None:
    judge = reward_model(run)
    assert judge.name == f"rm:rm@{judge.model.digest()[:10]}"
    assert (
        parse(f"rm:{run}").name == judge.name == reward_model(run / "model").name.replace("rm:model", "rm:rm")
    )
    assert reward_model(judge.model).name.endswith(judge.name.rpartition("@")[2])
    changed = reward_model(run).model
    changed.model.score.weight.data.add_(1.0)
    assert reward_model(changed).name.rpartition("@")[2] != judge.name.rpartition("@")[2]


class Broken:
    """Scores that are no numbers."""

    name = "broken"

    def digest(self) -> str:
        return "0" * 24

    def score(self, given: list[CompletionGroup]) -> list[list[float]]:
        return [[float("nan") if i else 1.5 for i in range(len(g.completions))] for g in given]


def test_a_score_that_is_no_number_is_no_verdict() -> None:
    broken: Any = Broken()
    found = reward_model(broken)(groups())
    assert [a.value for a in found] == [1.5, None, 1.5]
    assert found[1].rationale == "the score was nan"


def test_a_policy_or_nothing_at_all_is_no_reward_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a reward model"):
        reward_model(tiny_policy_dir(tmp_path))
    with pytest.raises(InputError, match="no such model directory"):
        reward_model(tmp_path / "nothing")


def test_the_word_says_how_members_are_put_together(run: Path, tmp_path: Path) -> None:
    policy = load_policy(tiny_policy_dir(tmp_path))
    RewardModel.from_policy(policy, head="members", outputs=("a", "b")).save(tmp_path / "rm")
    plain, careful = parse(f"rm:{tmp_path}/rm"), parse(f"rm:{tmp_path}/rm?combine=uwo&penalty=0.25")
    assert plain.name != careful.name
    rows = [one for own in plain.model.outputs([groups()[0]]) for one in own]  # type: ignore[attr-defined]
    expected = [(r["a"] + r["b"]) / 2 - 0.25 * ((r["a"] - r["b"]) / 2) ** 2 for r in rows]
    assert [a.value for a in careful([groups()[0]])] == pytest.approx(expected, abs=1e-6)
    for word, what in (
        (f"rm:{tmp_path}/rm?combine=max", "unknown combine 'max'"),
        (f"rm:{tmp_path}/rm?combin=min", "unknown setting 'combin'"),
        (f"rm:{tmp_path}/rm?penalty=x", "penalty must be a number, got 'x'"),
        (f"rm:{run}?combine=min", "combine say how members are put together, and rm has one score"),
    ):
        with pytest.raises(InputError, match=re.escape(what)):
            parse(word)
