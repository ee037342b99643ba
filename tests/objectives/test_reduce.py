"""The one owner of denominators: literals, global counts over uneven parts, empty parts, wrong input."""

from __future__ import annotations

import pytest
import torch

from steerwell.objectives import ObjectiveError, denominator, reduce
from steerwell.objectives.reduce import REDUCTIONS

LENGTHS = torch.tensor([1.0, 3.0, 2.0])
OWNER = torch.tensor([0, 1, 1, 1, 2, 2])
LOSSES = torch.tensor([6.0, 1.0, 2.0, 3.0, 4.0, 10.0], dtype=torch.float64)


def test_denominators_count_units() -> None:
    tensors = {
        "pairs": torch.tensor([[0, 1], [1, 2]]),
        "lengths": LENGTHS,
        "demonstrations": torch.tensor([True, False, True]),
        "step_labels": torch.tensor([1.0, 0.2, float("nan"), float("nan"), 0.0]),
        "step_owner": torch.tensor([0, 0, 0, 1, 2]),
    }
    assert [denominator(name, tensors) for name in REDUCTIONS] == [2.0, 3.0, 6.0, 3.0, 3.0, 3.0, 2.0]
    masked = [denominator(name, tensors, mask="demonstrations") for name in REDUCTIONS[:5]]
    assert masked == [2.0, 2.0, 3.0, 2.0, 2.0]


def test_sequence_mean_does_not_count_completions_without_tokens() -> None:
    lengths = {"lengths": torch.tensor([1.0, 0.0, 2.0])}
    assert denominator("sequence_mean", lengths) == 2.0
    assert denominator("completion_mean", lengths) == 3.0


def test_counts_of_many_tokens_are_exact() -> None:
    lengths = torch.ones(3).mul(2.0**24).add(torch.tensor([0.0, 0.0, 2.0]))
    assert denominator("token_mean", {"lengths": lengths}) == 3 * 2**24 + 2


def test_literals() -> None:
    assert reduce(LOSSES, "token_mean", denominator=6).item() == pytest.approx(26 / 6)
    assert reduce(LOSSES[:3], "pair_mean", denominator=3).item() == 3.0
    assert reduce(LOSSES[:3], "completion_mean", denominator=3).item() == 3.0
    expected = (6 + (1 + 2 + 3) / 3 + (4 + 10) / 2) / 3
    assert reduce(LOSSES, "sequence_mean", owner=OWNER, denominator=3).item() == pytest.approx(expected)
    assert expected == 5.0
    assert expected != 26 / 6, "the two token reductions must differ here"


def test_the_two_reductions_of_steps() -> None:
    assert reduce(LOSSES, "step_mean", denominator=6).item() == pytest.approx(26 / 6)
    assert reduce(LOSSES, "step_sequence_mean", owner=OWNER, denominator=3).item() == pytest.approx(5.0)


def test_sequence_mean_does_not_care_where_the_tokens_lie() -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    value = reduce(LOSSES[order], "sequence_mean", owner=OWNER[order], denominator=3)
    assert value.item() == pytest.approx(5.0)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("cut", [1, 2])
def test_uneven_microbatches_with_the_global_denominator_equal_the_whole(reduction: str, cut: int) -> None:
    whole_losses = LOSSES.clone().requires_grad_()
    total = denominator(reduction, {"lengths": LENGTHS})
    whole = reduce(whole_losses, reduction, owner=OWNER, denominator=total)
    whole.backward()
    parts_losses = LOSSES.clone().requires_grad_()
    parts = [cut > OWNER, cut <= OWNER]
    counts = [denominator(reduction, {"lengths": x}) for x in (LENGTHS[:cut], LENGTHS[cut:])]
    assert sum(counts) == total
    value = 0.0
    for part in parts:
        piece = reduce(parts_losses[part], reduction, owner=OWNER[part], denominator=sum(counts))
        piece.backward()
        value += piece.item()
    assert value == pytest.approx(whole.item(), rel=1e-14)
    torch.testing.assert_close(parts_losses.grad, whole_losses.grad)
    naive = sum(
        reduce(LOSSES[part], reduction, owner=OWNER[part], denominator=count).item() / 2
        for part, count in zip(parts, counts, strict=True)
    )
    assert naive != pytest.approx(whole.item()), (
        "the mean of means is the trap, and this example must show it"
    )


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("total", [0.0, 5.0])
def test_an_empty_microbatch_is_zero_with_a_gradient(reduction: str, total: float) -> None:
    scores = torch.ones(3, requires_grad=True)
    value = reduce(scores[:0], reduction, owner=OWNER[:0], denominator=total)
    value.backward()
    assert value.item() == 0.0
    assert scores.grad is not None
    assert scores.grad.tolist() == [0.0] * 3


def test_wrong_input_is_told() -> None:
    with pytest.raises(ObjectiveError, match=r"reduction must be one of 'pair_mean', .*, got 'mean'"):
        reduce(LOSSES, "mean", denominator=1)
    with pytest.raises(ObjectiveError, match=r"losses must be unreduced, of shape \(units,\), got \(\)"):
        reduce(LOSSES.mean(), "pair_mean", denominator=1)
    with pytest.raises(ObjectiveError, match=r"the denominator must be > 0, got 0"):
        reduce(LOSSES, "pair_mean", denominator=0)
    with pytest.raises(ObjectiveError, match=r"the denominator must be > 0, got nan"):
        reduce(LOSSES, "pair_mean", denominator=float("nan"))
    with pytest.raises(ObjectiveError, match=r"sequence_mean needs owner of shape \(6,\), got \(2,\)"):
        reduce(LOSSES, "sequence_mean", owner=OWNER[:2], denominator=1)
    with pytest.raises(ObjectiveError, match=r"sequence_mean needs owner of shape \(6,\), got None"):
        reduce(LOSSES, "sequence_mean", denominator=1)
    with pytest.raises(ObjectiveError, match=r"step_sequence_mean needs owner of shape \(6,\), got None"):
        reduce(LOSSES, "step_sequence_mean", denominator=1)
    with pytest.raises(ObjectiveError, match="the denominator of step_sequence_mean needs step_owner"):
        denominator("step_sequence_mean", {"step_labels": LENGTHS})
    with pytest.raises(ObjectiveError, match="the denominator of token_mean needs lengths"):
        denominator("token_mean", {})
    with pytest.raises(ObjectiveError, match="the denominator of token_mean needs demonstrations"):
        denominator("token_mean", {"lengths": LENGTHS}, mask="demonstrations")
