"""How sure a reward model is: planted truth is covered, the formulas are those of numpy, and all of it is saved."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.types import Completion, CompletionGroup, Pair
from steerwell.models.attention import use_steerwell_attention
from steerwell.models.bayesian_head import Posterior, factored, likeliest_precision, pair_information
from steerwell.models.load import Policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.models.uncertainty import moderation
from tiny import tiny_llama, tiny_tokenizer

WORDS = ["alpha", "bravo", "delta", "echo", "golf", "hotel", "kilo", "lima", "mike", "oscar", "papa", "romeo"]


def policy() -> Policy:
    model = tiny_llama()
    use_steerwell_attention(model)
    return Policy(model, tiny_tokenizer(), "tiny")


def groups(n: int = 30, seed: int = 0) -> list[CompletionGroup]:
    draw = np.random.default_rng(seed)
    found = []
    for i in range(n):
        asked = (Message("user", f"say {i}"),)
        texts = [" ".join(draw.choice(WORDS, draw.integers(1, 6))) + f" {c}" for c in range(3)]
        completions = tuple(Completion(asked, (Message("assistant", text),)) for text in texts)
        scores = tuple(float(x) for x in draw.normal(0, 1, 3))
        found.append(
            CompletionGroup(
                asked,
                completions,
                pairs=(Pair(0, 1, 1.0), Pair(2, 0, 1.0)),
                scores=scores,
                attributes={"help": scores, "tone": (None, *scores[1:])},
            )
        )
    return found


def model(head: str = "score", outputs: tuple[str, ...] = ("score",), scale: float = 50.0) -> RewardModel:
    found = RewardModel.from_policy(policy(), head=head, outputs=outputs)
    found.model.score.weight.data *= scale
    return found


def states(rm: RewardModel, data: list[CompletionGroup]) -> np.ndarray:
    """The last hidden states (groups, completions, D) by the network itself, a completion at a time."""
    rows, network = [], copy.deepcopy(rm.model)
    network.set_attn_implementation("sdpa")
    for group in rm.tokenize(data):
        for sequence in group.sequences:
            hidden = network.model(input_ids=torch.tensor([list(sequence.ids)]), use_cache=False)
            rows.append(hidden.last_hidden_state[0, -1].double().detach().numpy())
    return np.array(rows).reshape(len(data), 3, -1)


def mode(differences: np.ndarray, alpha: float) -> np.ndarray:
    """The weights of highest posterior density, by Newton's method."""
    w = np.zeros(differences.shape[1])
    for _ in range(30):
        s = 1 / (1 + np.exp(-differences @ w))
        precision = alpha * np.eye(len(w)) + (differences * (s * (1 - s))[:, None]).T @ differences
        w = w + np.linalg.solve(precision, differences.T @ (1 - s) - alpha * w)
    return w


def test_the_posterior_covers_the_truth() -> None:
    """Weights from the prior, 300 pairs each: 90 % intervals hold them nine times out of ten."""
    draw, width, inside = np.random.default_rng(0), 6, []
    for _ in range(150):
        truth, x = draw.normal(0, 1, width), draw.normal(0, 1, (300, width))
        wins = draw.uniform(size=300) < 1 / (1 + np.exp(-x @ truth))
        x = np.where(wins[:, None], x, -x)
        found = mode(x, alpha=1.0)
        factor = factored(pair_information(torch.from_numpy(x), torch.from_numpy(found)), 1.0)
        posterior = Posterior(torch.zeros(width, dtype=torch.float64), factor[None], torch.ones(1))
        std = posterior.variances(torch.eye(width)).sqrt()[:, 0].numpy()
        inside.append(np.abs(found - truth) < 1.6449 * std)
    coverage = np.mean(inside)
    assert abs(coverage - 0.9) < 0.03  # 900 intervals: a standard error of 0.01
    assert abs(np.mean(inside) - 0.5) > 0.3  # the test can tell


def test_variance_grows_where_there_are_no_data() -> None:
    draw = np.random.default_rng(1)
    x = torch.from_numpy(draw.normal(0, 1, (200, 4)) * [1, 1, 1, 0.01])
    w = torch.tensor([0.5, -0.5, 0.2, 0.0], dtype=torch.float64)
    posterior = Posterior(torch.zeros(4).double(), factored(pair_information(x, w), 0.5)[None], torch.ones(1))
    within, far, outside = posterior.variances(torch.tensor([[1.0, 0, 0, 0], [9.0, 0, 0, 0], [0, 0, 0, 1]]))[
        :, 0
    ]
    assert far == pytest.approx(81 * within.item(), rel=1e-9)
    assert within < 0.1
    assert 1.9 < outside < 2.0  # the prior's own 1 / alpha, hardly less
    certain = pair_information(x, 1e3 * w)  # pairs that are settled say little
    assert certain.trace() < 0.05 * pair_information(x, w).trace()


def test_the_likeliest_prior_is_where_the_evidence_is_greatest() -> None:
    draw = np.random.default_rng(2)
    truth, x = draw.normal(0, 0.5, 20), draw.normal(0, 1, (400, 20))
    x *= np.where(draw.uniform(size=400) < 1 / (1 + np.exp(-x @ truth)), 1, -1)[:, None]
    w = torch.from_numpy(mode(x, 4.0))
    information = pair_information(torch.from_numpy(x), w)
    alpha = likeliest_precision(information, w)

    def evidence(a: float) -> float:  # what depends on a
        whole = a * np.eye(20) + information.numpy()
        return 10 * math.log(a) - a / 2 * float(w @ w) - np.linalg.slogdet(whole)[1] / 2

    assert evidence(alpha) > max(evidence(alpha * 1.05), evidence(alpha / 1.05))
    assert 1.5 < alpha < 12  # the truth is 4
    with pytest.raises(InputError, match="say nothing of a prior"):
        likeliest_precision(information, torch.zeros(20))


@pytest.mark.parametrize("std", [1.0, 2.5])
def test_pairs_give_numpys_posterior(std: float) -> None:
    data = groups()
    # scores on another scale: the same model, so the same spread on that scale
    rm = model().with_recipe(std=std, mean=0.3, temperature=1 / std)
    sure = rm.with_uncertainty(data, prior_precision=2.0)
    h, w = states(rm, data), rm.model.score.weight[0].double().detach().numpy()
    d = np.concatenate([h[:, 0] - h[:, 1], h[:, 2] - h[:, 0]])
    s = 1 / (1 + np.exp(-d @ w))
    covariance = np.linalg.inv(2 * np.eye(len(w)) + (d.T * (s * (1 - s))) @ d)
    expected = np.sqrt(np.einsum("nd,de,ne->n", d, covariance, d)).reshape(2, -1).T / std
    found = np.array(sure.margins_with_std(data))
    np.testing.assert_allclose(found[..., 1], expected, rtol=1e-4)
    scores = np.array(rm.score(data))
    np.testing.assert_allclose(
        found[..., 0], np.stack([scores[:, 0] - scores[:, 1], scores[:, 2] - scores[:, 0]], 1), atol=1e-5
    )
    centred = (h - h.mean((0, 1))).reshape(-1, len(w))
    single = np.sqrt(np.einsum("nd,de,ne->n", centred, covariance, centred)) / std
    told = np.array(sure.score_with_std(data)).reshape(-1, 2)
    np.testing.assert_allclose(told[:, 1], single, rtol=1e-4)
    np.testing.assert_allclose(told[:, 0], scores.flatten(), atol=1e-5)
    margin, spread = found[0, 0]
    logit = margin * std
    assert sure.probability(margin, 0.0) == pytest.approx(1 / (1 + math.exp(-logit)), rel=1e-6)
    moderated = logit / math.sqrt(1 + math.pi * (spread * std) ** 2 / 8)
    assert sure.probability(margin, 0.0, variance=spread**2) == pytest.approx(1 / (1 + math.exp(-moderated)))


def test_moderation_is_near_the_mean_of_the_logistic_function() -> None:
    z = np.random.default_rng(0).normal(0, 1, 200_000)
    for mean, std in ((1.0, 1.0), (-2.0, 2.0)):
        exact = np.mean(1 / (1 + np.exp(-(mean + std * z))))
        assert 1 / (1 + math.exp(-mean * moderation(std**2))) == pytest.approx(exact, abs=0.015)


def test_given_scores_give_the_exact_posterior() -> None:
    data = groups()
    rm = model("attributes", ("help", "tone")).with_recipe(weights=(0.75, 0.25))
    sure = rm.with_uncertainty(data, prior_precision=1.5)
    h, w = states(rm, data), rm.model.score.weight.double().detach().numpy()
    variance = 0.0
    for row, share, columns in ((0, 0.75, [0, 1, 2]), (1, 0.25, [1, 2])):
        x = h[:, columns].reshape(-1, h.shape[-1])
        y = np.array([group.attributes["help"] for group in data])[:, columns].flatten()  # type: ignore[index]
        noise = np.mean((y - x @ w[row]) ** 2)
        covariance = np.linalg.inv(1.5 * np.eye(len(w[0])) + x.T @ x / noise)
        flat = h.reshape(-1, h.shape[-1])
        variance = variance + share**2 * np.einsum("nd,de,ne->n", flat, covariance, flat)
    told = np.array(sure.score_with_std(data)).reshape(-1, 2)
    np.testing.assert_allclose(told[:, 1], np.sqrt(variance), rtol=1e-4)
    scored = model().with_uncertainty([replace(group, pairs=()) for group in data])
    assert not scored.posterior().centre.any()


def test_a_posterior_is_saved_and_read_when_it_is_asked_for(tmp_path: Path) -> None:
    data = groups(8)
    plain = model()
    sure = plain.with_uncertainty(data, prior_precision="likeliest")
    assert sure.score(data) == plain.score(data)
    assert sure.digest() != plain.digest()
    sure.save(tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm")
    assert again._posterior is None
    assert again.score_with_std(data) == sure.score_with_std(data)
    again.save(tmp_path / "copy")
    told = load_reward_model(tmp_path / "copy").margins_with_std(data)
    np.testing.assert_allclose(np.array(told), np.array(sure.margins_with_std(data)), rtol=1e-9)
    file = tmp_path / "rm" / "steerwell_uncertainty.safetensors"
    file.write_bytes(plain.with_uncertainty(data, 3.0).posterior().to_bytes())
    with pytest.raises(InputError, match="not the posterior that the scoring recipe names"):
        load_reward_model(tmp_path / "rm").score_with_std(data)
    file.unlink()
    with pytest.raises(InputError, match="names a posterior, and there is none"):
        load_reward_model(tmp_path / "rm").score_with_std(data)


def test_members_and_quantiles_have_a_spread_of_their_own() -> None:
    data = groups(6)
    members = model("members", ("a", "b", "c"), scale=1.0).with_recipe(std=2.0)
    each = np.array([[[*one.values()] for one in own] for own in members.outputs(data)])
    np.testing.assert_allclose(
        np.array(members.score_with_std(data)),
        np.stack([each.mean(2), each.std(2)], 2) / 2,
        rtol=1e-4,
        atol=1e-5,
    )
    apart = np.stack([each[:, 0] - each[:, 1], each[:, 2] - each[:, 0]], 1)
    np.testing.assert_allclose(np.array(members.margins_with_std(data))[..., 1], apart.std(2) / 2, rtol=1e-3)
    quantiles = model("quantiles", ("q0.05", "q0.15", "q0.5", "q0.85"))
    each = np.sort([[[*one.values()] for one in own] for own in quantiles.outputs(data)], axis=2)
    expected = (each[..., 3] - each[..., 1]) / (2 * 1.0364333894937898)  # of a normal distribution at 0.85
    np.testing.assert_allclose(
        np.array(quantiles.score_with_std(data))[..., 1], expected, rtol=1e-3, atol=1e-6
    )


def test_what_has_no_spread_says_what_to_train() -> None:
    data = groups(2)
    with pytest.raises(InputError, match=r"gives a score and no spread.*with_uncertainty"):
        model().score_with_std(data)
    with pytest.raises(InputError, match="this one gives members"):
        model("members", ("a", "b")).with_uncertainty(data)
    with pytest.raises(InputError, match="have no pairs and no scores"):
        model().with_uncertainty([replace(group, pairs=(), scores=None) for group in data])
    with pytest.raises(InputError, match="prior_precision must be a number above 0"):
        model().with_uncertainty(data, prior_precision=0.0)
