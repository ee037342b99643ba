"""Rules for graded evidence: strengths of preferences, scores by attribute; and the cut points between grades."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import special

import steerwell as sw
from steerwell.data.cutpoints import fit_cutpoints
from steerwell.data.messages import as_messages
from steerwell.data.types import Annotation, Completion, CompletionGroup, Source

PROMPT = as_messages("Which?")


def completion(words: str, index: int = 0) -> Completion:
    return Completion(PROMPT, (sw.Message("assistant", words),), Source(index=index))


A, B = completion("one"), completion("two", 1)


def prefers(value: object, strength: float | None, who: str, shown=(A, B)) -> Annotation:
    return Annotation("preference", tuple(c.id for c in shown), who, value, strength=strength)


def group(*annotations: Annotation) -> CompletionGroup:
    return CompletionGroup(PROMPT, (A, B), annotations)


@pytest.mark.parametrize(
    ("votes", "pair", "strength"),
    [
        ([(0, 3.0)], (0, 1, 1.0), 3.0),
        ([(1, 2.0), (1, 1.0)], (1, 0, 1.0), 1.5),
        ([(0, 3.0), (1, 1.0)], (0, 1, 1.0), 1.0),  # one vote each: the stronger decides
        ([(0, 2.0), ("tie", None)], (0, 1, 1.0), 1.0),
        ([("tie", None)], (0, 1, 0.5), 0.0),
        ([(0, 2.0), (1, 2.0)], (0, 1, 0.5), 0.0),
        ([(0, None), (0, None), (1, None)], (0, 1, 1.0), None),  # which, not how much
        ([(0, None), (1, None)], (0, 1, 0.5), None),
        ([(1, None), (0, 2.0)], (0, 1, 1.0), 2.0),
        ([(0, -2.0)], (0, 1, 1.0), 2.0),  # the side is said by the value alone
    ],
)
def test_strengths(votes, pair, strength) -> None:
    (found,) = sw.resolve.strengths([group(*(prefers(v, s, f"a{i}") for i, (v, s) in enumerate(votes)))])
    assert found.pairs == (pair,)
    assert found.pair_strengths == (strength,)


def test_strengths_follow_the_order_shown() -> None:
    (found,) = sw.resolve.strengths([group(prefers(0, 2.0, "x", shown=(B, A)))])
    assert (found.pairs, found.pair_strengths) == (((1, 0, 1.0),), (2.0,))


def test_another_rule_for_pairs_takes_no_strengths_over() -> None:
    (graded,) = sw.resolve.strengths([group(prefers(0, 2.0, "x"))])
    for rule in (sw.resolve.majority, sw.resolve.soft):
        (found,) = rule([graded])
        assert (found.pairs, found.pair_strengths) == (((0, 1, 1.0),), None)


def test_strengths_without_ties_and_without_verdicts() -> None:
    assert sw.resolve.strengths([group(prefers("tie", None, "x"))], ties="drop") == []
    resolved = sw.resolve.strengths([group(prefers(None, None, "x"), prefers("both_bad", None, "y"))])
    assert resolved == []
    assert (resolved.report.no_verdict, resolved.report.both_bad) == (1, 1)
    assert sw.resolve.strengths([group(prefers(0, 1.0, "x"))], min_votes=2) == []


def score(c: Completion, value: float | None, criterion: str, who: str = "x") -> Annotation:
    return Annotation("score", (c.id,), who, value, criterion=criterion)


def test_attributes_are_means_by_criterion_and_none_where_nobody_scored() -> None:
    given = group(
        score(A, 1.0, "help"), score(A, 2.0, "help", "y"), score(B, 3.0, "help"), score(B, -1.0, "brief"),
        score(A, None, "brief"),
    )  # fmt: skip
    resolved = sw.resolve.attributes([given, CompletionGroup(PROMPT, (A, B))])
    (found,) = resolved
    assert found.attributes == {"brief": (None, -1.0), "help": (1.5, 3.0)}
    assert (resolved.report.groups, resolved.report.resolved, resolved.report.used) == (2, 1, 4)
    (ordered,) = sw.resolve.attributes([given], criteria=["help", "brief"], min_votes=2)
    assert list((ordered.attributes or {}).items()) == [("help", (1.5, None)), ("brief", (None, None))]
    with pytest.raises(sw.InputError, match="helo"):
        sw.resolve.attributes([given], criteria=["helo"])


def test_targets_survive_the_lossless_format(tmp_path) -> None:
    given = CompletionGroup(
        PROMPT, (A, B), pairs=(sw.Pair(0, 1),), pair_strengths=(None,), attributes={"help": (1.0, None)}
    )
    sw.save([given], tmp_path / "g.jsonl")
    (back,) = sw.load(tmp_path / "g.jsonl")
    assert (back.pairs, back.pair_strengths, back.attributes) == (given.pairs, (None,), given.attributes)
    text = (tmp_path / "g.jsonl").read_text().replace('"pair_strengths":[null]', '"pair_strengths":[1,2]')
    (tmp_path / "g.jsonl").write_text(text)
    with pytest.raises(sw.InputError, match="2 pair_strengths for 1 pairs"):
        list(sw.load(tmp_path / "g.jsonl"))


def test_cutpoints_recover_planted_truth() -> None:
    draw = np.random.default_rng(0)
    truth = np.array([0.4, 1.2, 3.0])
    margins = draw.normal(0, 2, 20_000)
    latent = margins + draw.logistic(size=20_000)
    grade = np.sign(latent) * np.searchsorted(truth, np.abs(latent))
    found = fit_cutpoints(margins, grade)
    assert found == pytest.approx(truth, abs=0.08)
    assert fit_cutpoints(-margins, -grade) == pytest.approx(found, rel=1e-6)  # no side is special


def test_cutpoint_of_ties_at_equal_scores_is_their_share() -> None:
    """Closed form: at margin 0 the share of ties is tanh(c / 2)."""
    found = fit_cutpoints([0.0] * 4, [0, 1, -1, 1], levels=1)
    assert found[0] == pytest.approx(2 * math.atanh(0.25), rel=1e-4)
    assert special.expit(found[0]) - special.expit(-found[0]) == pytest.approx(0.25, rel=1e-4)


def test_cutpoints_refuse_what_they_cannot_know() -> None:
    with pytest.raises(sw.InputError, match="no pair has strength 2"):
        fit_cutpoints([0.1, 0.2, 0.3], [0, 1, 3])
    with pytest.raises(sw.InputError, match="one strength for each"):
        fit_cutpoints([0.1], [0, 1])
    with pytest.raises(sw.InputError, match="finite"):
        fit_cutpoints([math.nan], [1])
