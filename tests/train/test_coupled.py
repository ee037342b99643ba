"""Objectives that look at a whole step: the same gradient however the step is cut, and what they carry comes back."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from small_runs import largest_difference, lines, pair_groups, tiny_policy, weights

from steerwell.objectives import TABLE, objective
from steerwell.train import train

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 5, "steps": 4, "warmup": 0.0}


def moved_shift(
    running: Any, *, logps: Any, ref_logps: Any, labels: Any, pairs: Any, lean: float
) -> torch.Tensor:
    """Half of the shift before, half of the mean log-ratio of this step."""
    now = (logps - ref_logps).double().mean()[None]
    return now if running is None else 0.5 * running + 0.5 * now


@pytest.fixture
def sorted_margins() -> Iterator[Any]:
    """A loss on sorted log-ratios, held against a shift that moves from step to step."""

    @objective(unit="pair", decomposable=False, source="a test", running=moved_shift)
    def sorted_margins(logps, ref_logps, labels, pairs, running=None, *, lean: float = 1.0):
        """Sorted chosen against sorted rejected.

        Hyperparameters:
            lean: a factor
        """
        h = logps - ref_logps
        shift = moved_shift(
            None, logps=logps.detach(), ref_logps=ref_logps, labels=labels, pairs=pairs, lean=lean
        )
        shift = shift if running is None else running
        gap = h[pairs[0]].sort().values - h[pairs[1]].sort().values
        return F.softplus(-lean * gap) + (gap - shift[0]).square(), {
            "shift": shift[0].detach().expand(pairs.shape[1]),
            "gap": gap.detach(),
        }

    yield sorted_margins
    TABLE.pop("sorted_margins")


def run(what: Any, out: Path, **settings: Any) -> Any:
    policy = tiny_policy()
    policy.model.to(torch.float64)
    settings["reference"] = tiny_policy(seed=3)  # held against its own start, all log-ratios would be equal
    return train(
        policy, pair_groups(10), what, out=out, eval_data=pair_groups(4, seed=1), **{**SETTINGS, **settings}
    )


@pytest.mark.parametrize("mixed", [False, True], ids=["alone", "mixed"])
def test_cutting_a_step_changes_nothing(tmp_path: Path, sorted_margins: Any, mixed: bool) -> None:
    what = [(sorted_margins, 0.7), ("dpo", 1.0), ("sft", 0.1)] if mixed else sorted_margins
    whole = run(what, tmp_path / "whole", max_tokens=100_000)
    cut = run(what, tmp_path / "cut", max_tokens=1)
    assert largest_difference(weights(whole.model), weights(tiny_policy().model.double())) > 1e-3
    assert largest_difference(weights(whole.model), weights(cut.model)) < 1e-11
    for one, other in zip(lines(tmp_path / "whole"), lines(tmp_path / "cut"), strict=True):
        assert one == pytest.approx(other, rel=1e-9, abs=1e-9)


def test_a_loss_of_parts_would_have_another_gradient(tmp_path: Path, sorted_margins: Any) -> None:
    """The test above can fail: sorted within each group, as parts would be, the run ends elsewhere."""
    whole = run(sorted_margins, tmp_path / "whole", max_tokens=100_000, batch_size=5)
    parts = run(sorted_margins, tmp_path / "parts", max_tokens=100_000, batch_size=1, steps=20)
    assert largest_difference(weights(whole.model), weights(parts.model)) > 1e-4


def test_with_dropout_both_passes_see_the_same_noise(tmp_path: Path, sorted_margins: Any) -> None:
    made = {}
    for name, what in (("coupled", sorted_margins), ("plain", sorted_margins)):
        policy = tiny_policy(attention_dropout=0.3)
        made[name] = train(
            policy, pair_groups(10), what, out=tmp_path / name, dropout=True, max_tokens=1, **SETTINGS
        )
    assert largest_difference(weights(made["coupled"].model), weights(made["plain"].model)) == 0


def test_what_is_carried_moves_in_training_and_stays_in_evaluation(
    tmp_path: Path, sorted_margins: Any
) -> None:
    run(sorted_margins, tmp_path / "run", max_tokens=1, eval_every=1, steps=3)
    told = lines(tmp_path / "run")
    shifts = [line["shift"] for line in told if line["step"]]
    assert len(set(shifts)) == 3
    # what was carried to a step is what the evaluation after it uses
    assert [line["eval/shift"] for line in told if line["step"]] == pytest.approx(shifts, abs=1e-12)


def test_what_is_carried_comes_back_with_a_checkpoint(tmp_path: Path, sorted_margins: Any) -> None:

    class Stop(Exception):
        pass

    def watch(step: int, model: Any, figures: Any) -> None:
        if step == 5:
            raise Stop

    settings = {"steps": 6, "checkpoint_every": 2, "watch_every": 1}
    run(sorted_margins, tmp_path / "straight", watch=lambda *_: None, **settings)
    with pytest.raises(Stop):
        run(sorted_margins, tmp_path / "again", watch=watch, **settings)
    state = json.loads((tmp_path / "again" / "checkpoints" / "step-000004" / "state.json").read_text())
    assert state["carried"]["sorted_margins"] != [0.0]
    run(sorted_margins, tmp_path / "again", watch=lambda *_: None, **settings)
    straight, again = (lines(tmp_path / name) for name in ("straight", "again"))
    assert straight == again
