"""The brief audit: hand-counted figures, and planted agreement, side and length biases that it must find."""

from __future__ import annotations

import random

import pytest

from steerwell.data.messages import Message
from steerwell.data.quality import Share, audit, krippendorff_alpha
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source

ASK = (Message("user", "why?"),)


def completion(text: str, index: int = 0) -> Completion:
    return Completion(ASK, (Message("assistant", text),), Source(index=index))


def test_counts_by_hand() -> None:
    a, b, c = completion("one"), completion("one two three"), completion("one", 1)
    notes = (
        Annotation("preference", (a.id, b.id), "ann", 1),
        Annotation("preference", (b.id, a.id), "bob", 0),
        Annotation("preference", (a.id, c.id), "ann", "tie"),
        Annotation("preference", (a.id, b.id), "eve", None),
    )
    found = audit([CompletionGroup(ASK, (a, b, c), notes)])
    assert (found.prompts, found.completions, found.annotations) == (1, 3, 4)
    assert (found.no_verdict, found.comparisons, found.ties, found.duplicates) == (1, 3, 1, 1)
    assert found.by_annotator == {"ann": 2, "bob": 1, "eve": 1}
    assert (found.overlapping, found.agreement.value, found.agreement.n) == (1, 1.0, 1)
    assert (found.first_shown.value, found.first_shown.n) == (0.5, 2)
    assert (found.longer.value, found.longer.n) == (1.0, 2)
    assert found.contradictions == 0


def test_an_annotator_who_contradicts_himself_is_counted() -> None:
    a, b = completion("x"), completion("y")
    notes = (
        Annotation("preference", (a.id, b.id), "ann", 0),
        Annotation("preference", (b.id, a.id), "ann", 0),
    )
    assert audit([CompletionGroup(ASK, (a, b), notes)]).contradictions == 1


def test_nothing_is_not_zero() -> None:
    found = audit([])
    assert found.agreement == Share(None, None, None, 0)
    assert found.alpha is None


def test_wilson_against_literals() -> None:
    share = Share.of(8, 10)
    assert share.value == 0.8
    assert share.low == pytest.approx(0.4901625, abs=1e-6)
    assert share.high == pytest.approx(0.9433178, abs=1e-6)


def test_alpha_against_a_worked_example() -> None:
    """Krippendorff's two-observer binary example (2011): ten units, alpha 0.095."""
    first, second = "0100000000", "1110010001"
    units = [[x, y] for x, y in zip(first, second, strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.095, abs=5e-4)
    assert krippendorff_alpha([["a", "a"], ["b", "b"]]) == 1.0
    assert krippendorff_alpha([["a", "a"], ["a", "a"]]) is None


def test_planted_biases_are_found() -> None:
    rng = random.Random(0)
    groups = []
    for i in range(400):
        ask = (Message("user", f"q{i}"),)
        pair = [Completion(ask, (Message("assistant", "word " * n),)) for n in (3, 9)]
        rng.shuffle(pair)
        notes = []
        for name, keeps in (("a", 0.8), ("b", 0.8)):
            shown = pair if rng.random() < 0.5 else pair[::-1]
            longer = 0 if len(shown[0].text) > len(shown[1].text) else 1
            value = longer if rng.random() < keeps else 1 - longer
            if rng.random() < 0.3:
                value = 0  # a taste for the first shown
            notes.append(Annotation("preference", (shown[0].id, shown[1].id), name, value))
        groups.append(CompletionGroup(ask, tuple(pair), tuple(notes)))
    found = audit(groups)
    assert found.first_shown.low is not None
    assert found.first_shown.low > 0.55
    assert found.longer.value == pytest.approx(0.7 * 0.8 + 0.3 * 0.5, abs=0.05)
    chance = 0.71**2 + 0.29**2
    assert found.agreement.value == pytest.approx(chance, abs=0.06)


def test_an_unknown_order_says_nothing_about_sides() -> None:
    """Imported pairs name the chosen first: that is no taste for the first shown."""
    a, b = completion("x"), completion("y z")
    notes = (Annotation("preference", (a.id, b.id), "dataset:f", 0, order_known=False),)
    found = audit([CompletionGroup(ASK, (a, b), notes)])
    assert found.first_shown == Share(None, None, None, 0)
    assert (found.longer.value, found.longer.n) == (0.0, 1)
