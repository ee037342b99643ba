"""Tensors by name: what the loop gives to objectives, against a plain computation one sequence at a time."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from small_runs import pair_groups, text_group, tiny_policy
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import CompletionGroup, Pair
from steerwell.models.load import Policy
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import ScoringRecipe
from steerwell.train.items import Item, gather, items_digest, prepare, set_advantages
from steerwell.train.loop import checked
from steerwell.train.metrics import Totals
from steerwell.train.provide import Provider
from steerwell.train.reference import Reference
from steerwell.train.step import kl_figures
from steerwell.train.terms import demonstrations, needed, prune

CPU = torch.device("cpu")


def items_for(objective: object, groups: list[CompletionGroup], policy: Policy) -> list[Item]:
    terms, config = checked(objective, None, {})  # type: ignore[arg-type]
    return prepare(groups, terms, policy.tokenizer, config.max_length).items


def provider(policy: Policy, names: set[str], reference: Policy | None = None, **more: object) -> Provider:
    return Provider(
        **{
            "model": policy.model,
            "names": frozenset(names),
            "reference": Reference("policy", "", reference.model) if reference else Reference("none"),
            "max_tokens": 10_000,
            "layout": "auto",
            "device": CPU,
            **more,
        }  # type: ignore[arg-type]
    )


def plain_logps(policy: Policy, ids: list[int], n_prompt: int, temperature: float = 1.0) -> Tensor:
    """Log-probs of the completion's tokens, by the model's own attention and full logits."""
    policy.model.set_attn_implementation("eager")
    with torch.no_grad():
        logits = policy.model(torch.tensor([ids])).logits[0] / temperature
    policy.model.set_attn_implementation("steerwell")
    logps = logits[n_prompt - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(ids[n_prompt:])[:, None])[:, 0]


@pytest.mark.parametrize("layout", ["tree", "rows"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_by_name_equal_the_plain_ones(layout: str, temperature: float) -> None:
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    items = items_for("dpo", pair_groups(4), policy)
    names = {"logps", "ref_logps", "per_token_logps", "ref_per_token_logps", "pairs", "lengths"}
    source = provider(policy, names, reference, layout=layout, temperature=temperature)
    out = source.tensors(items, source.targets(items))
    sequences = [s for item in items for s in item.tokens.sequences]
    want = [plain_logps(policy, s.ids, s.n_prompt, temperature) for s in sequences]
    want_ref = [plain_logps(reference, s.ids, s.n_prompt, temperature) for s in sequences]
    torch.testing.assert_close(out["per_token_logps"].detach(), torch.cat(want), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(out["ref_per_token_logps"], torch.cat(want_ref), atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        out["logps"].detach(), torch.stack([w.sum() for w in want]), atol=1e-3, rtol=1e-5
    )
    torch.testing.assert_close(
        out["ref_logps"], torch.stack([w.sum() for w in want_ref]), atol=1e-3, rtol=1e-5
    )
    assert out["lengths"].tolist() == [len(w) for w in want]


def test_reference_log_probs_computed_once_equal_those_computed_in_the_step() -> None:
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    items = items_for("dpo", pair_groups(5), policy)
    names = {"logps", "ref_logps", "ref_per_token_logps"}
    live = provider(policy, names, reference).tensors(items, gather(items, set(), CPU))
    once = provider(policy, names, reference, max_tokens=60)
    once.fill_reference(items)
    stored = gather(items, names, CPU)
    torch.testing.assert_close(stored["ref_logps"], live["ref_logps"], atol=1e-3, rtol=1e-5)
    torch.testing.assert_close(
        stored["ref_per_token_logps"], live["ref_per_token_logps"], atol=1e-4, rtol=1e-5
    )
    assert once.tensors(items, stored)["ref_logps"] is stored["ref_logps"]


def test_targets_of_several_groups_are_moved_to_their_places() -> None:
    policy = tiny_policy()
    groups = [
        text_group("a", ["x one", "x two", "x three"], pairs=(Pair(2, 0, 0.75),), labels=(True, None, False)),
        text_group("b", ["y one", "y two"], pairs=(Pair(0, 1), Pair(1, 0, 0.25)), labels=(None, True)),
    ]
    items = items_for([("dpo", 1.0), ("kto", 1.0)], groups, policy)
    out = gather(items, needed(checked([("dpo", 1.0), ("kto", 1.0)], None, {})[0]), CPU)
    # "x two" has neither a pair nor a label, so it is not read at all
    assert out["pairs"].tolist() == [[1, 2, 3], [0, 3, 2]]
    assert out["pair_probs"].tolist() == [0.75, 1.0, 0.25]
    assert out["group"].tolist() == [0, 0, 1, 1]
    assert [len(item.lengths) for item in items] == [2, 2]


def test_completions_without_a_label_take_no_part_in_kto() -> None:
    group = text_group("a", ["x one", "x two", "x three"], labels=(True, None, False))
    (item,) = items_for("kto", [group], tiny_policy())
    assert gather([item], {"labels"}, CPU)["labels"].tolist() == [True, False]


def test_which_completions_are_demonstrations() -> None:
    texts = ["one", "two", "three"]
    assert demonstrations(text_group("q", texts)) == [True, True, True]
    assert demonstrations(text_group("q", texts, labels=(False, True, None))) == [False, True, False]
    ranked = (Pair(0, 1), Pair(1, 2), Pair(0, 2))
    assert demonstrations(text_group("q", texts, pairs=ranked)) == [True, False, False]
    circle = (Pair(0, 1), Pair(1, 0))
    assert demonstrations(text_group("q", texts, pairs=circle, labels=(False, False, True))) == [
        True,
        True,
        False,
    ]


def test_pruning_keeps_targets_with_their_completions() -> None:
    terms, _ = checked("dpo", None, {})
    group = text_group(
        "q", ["a", "b", "c", "d"], pairs=(Pair(3, 1, 0.6),), scores=(0.0, 1.0, 2.0, 3.0), labels=(None,) * 4
    )
    kept = prune(group, terms)
    assert kept is not None
    assert [c.text for c in kept.completions] == ["b", "d"]
    assert kept.pairs == (Pair(1, 0, 0.6),)
    assert kept.scores == (1.0, 3.0)
    assert prune(text_group("q", ["a", "b"]), terms) is None


def test_the_kl_of_kto_is_that_of_completions_under_the_next_prompt() -> None:
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    groups = pair_groups(3, k=2)
    twin = text_group(groups[0].prompt[0].content, ["of the same prompt"], labels=(True,))
    items = items_for("kto", [groups[0], twin, groups[1], groups[2]], policy)
    source = provider(policy, {"kl"}, reference)
    ratios = []
    for i, j in ((0, 2), (1, 2), (2, 3), (3, 0)):  # the twin of the first prompt is passed over
        prompt = items[j].tokens.sequences[0]
        for own in items[i].tokens.sequences:
            ids = prompt.ids[: prompt.n_prompt] + own.ids[own.n_prompt :]
            mine, ref = (plain_logps(p, ids, prompt.n_prompt) for p in (policy, reference))
            ratios.append(float((mine - ref).sum()))
    want = sum(ratios) / len(ratios)
    assert want > 0 or want < 0
    back = provider(reference, {"kl"}, policy)
    both = [source.mismatched_kl(items).item(), back.mismatched_kl(items).item()]
    assert both == pytest.approx([max(0.0, want), max(0.0, -want)], abs=1e-3)
    cut = provider(policy, {"kl"}, reference, max_tokens=50)
    assert len(cut.micro_batches(items)) > 2
    assert cut.mismatched_kl(items).item() == pytest.approx(both[0], abs=1e-3)
    assert source.mismatched_kl(items[:2]).item() == 0.0


def test_a_mismatched_completion_never_outgrows_the_model() -> None:
    policy = tiny_policy()
    groups = [
        text_group("p " * 20, ["short"], labels=(True,)),
        text_group("q", ["long " * 20], labels=(False,)),
    ]
    items = items_for("kto", groups, policy)
    longest = max(len(s.ids) for item in items for s in item.tokens.sequences)
    source = provider(policy, {"kl"}, policy, limit=longest)
    assert source.mismatched_kl(items).item() == 0.0


def test_reward_scores_are_provided_and_nothing_else_is_computed() -> None:
    policy = tiny_policy()
    model = RewardModel.from_policy(policy)
    items = items_for("bradley_terry", pair_groups(3), policy)
    source = provider(model, {"scores", "pairs", "pair_probs"}, scoring=ScoringRecipe())  # type: ignore[arg-type]
    out = source.tensors(items, source.targets(items))
    want = [score for scores in model.score([item.tokens.group for item in items]) for score in scores]
    assert out["scores"].tolist() == pytest.approx(want, abs=1e-6)
    assert "logps" not in out


def test_advantages_are_taken_within_groups() -> None:
    items = items_for("reinforce", pair_groups(2), tiny_policy())
    items[1].rewards = [5.0, 5.0, 8.0]
    set_advantages(items, "group_mean")
    assert items[0].advantages == pytest.approx([1.0, 0.0, -1.0])
    assert items[1].advantages == pytest.approx([-1.0, -1.0, 2.0])


def test_completions_of_several_messages_score_only_the_assistant() -> None:
    policy = tiny_policy()
    asked = as_messages("hello")
    turns = (Message("assistant", "first"), Message("user", "and then"), Message("assistant", "second"))
    base = text_group("hello", ["only"])
    several = CompletionGroup(asked, (*base.completions, type(base.completions[0])(asked, turns)))
    items = items_for("sft", [several], policy)
    sequence = items[0].tokens.sequences[1]
    assert sequence.unscored
    assert items[0].lengths[1] < len(sequence.ids) - sequence.n_prompt
    out = provider(policy, {"per_token_logps", "demonstrations"}).tensors(items, gather(items, set(), CPU))
    assert len(out["per_token_logps"]) == sum(items[0].lengths)


def test_the_digest_sees_tokens_targets_and_order() -> None:
    policy = tiny_policy()
    groups = pair_groups(3)
    digest = items_digest(items_for("dpo", groups, policy))
    assert digest == items_digest(items_for("dpo", pair_groups(3), policy))
    assert digest != items_digest(items_for("dpo", groups[::-1], policy))
    assert digest != items_digest(items_for("dpo", pair_groups(3, seed=1), policy))
    flipped = [text_group("q", ["a", "b"], pairs=(Pair(*edge),)) for edge in ((0, 1), (1, 0))]
    one, other = (items_digest(items_for("dpo", [group], policy)) for group in flipped)
    assert one != other


def test_an_old_log_prob_for_every_token_or_an_error() -> None:
    policy = tiny_policy()
    (group,) = policy.sample(["go"], 2, max_new_tokens=4, seed=1)
    scored = CompletionGroup(group.prompt, group.completions, scores=(1.0, 0.0))
    (item,) = items_for("ppo_clip", [scored], policy)
    assert item.old_per_token_logps == pytest.approx(
        [x for c in group.completions for x in c.old_logps or ()]
    )
    broken = [
        type(c)(c.prompt, c.messages, c.source, c.token_ids, c.prompt_token_ids, ())
        for c in group.completions
    ]
    with pytest.raises(InputError, match="has no old_logps"):
        items_for("ppo_clip", [CompletionGroup(group.prompt, tuple(broken), scores=(1.0, 0.0))], policy)


def test_a_reference_of_float64_is_summed_in_float64() -> None:
    """Rounded to float32 the sum over a completion of 20 nats is off by a millionth."""
    policy, reference = tiny_policy(), tiny_policy(seed=1)
    for one in (policy, reference):
        one.model.double()
    items = items_for("dpo", pair_groups(4), policy)
    names = {"logps", "ref_logps", "ref_per_token_logps"}
    fine = provider(policy, names, reference, precision="float64")
    fine.fill_reference(items)
    recorded = fine.targets(items)
    assert recorded["ref_logps"].dtype == torch.float64
    starts = torch.tensor([0, *(n for item in items for n in item.lengths)]).cumsum(0)
    sums = [
        math.fsum(recorded["ref_per_token_logps"][a:b].tolist())
        for a, b in itertools.pairwise(starts.tolist())
    ]
    assert recorded["ref_logps"].tolist() == sums
    assert recorded["ref_logps"].float().double().tolist() != sums  # so rounding would show
    coarse = provider(policy, names, reference, precision="float32").targets(items)
    assert coarse["ref_logps"].dtype == torch.float32
    torch.testing.assert_close(coarse["ref_logps"], recorded["ref_logps"].float(), atol=0, rtol=0)


def test_kl_figures_of_a_float64_policy() -> None:
    """One completion of two tokens that the policy finds e times as likely as the reference: k1 is 2 nats."""
    totals = Totals()
    fine = torch.tensor([-1.0, -2.0], dtype=torch.float64)
    tensors = {
        "per_token_logps": fine,
        "ref_per_token_logps": fine - 1,
        "owner": torch.tensor([0, 0]),
        "lengths": torch.tensor([2.0]),
    }
    kl_figures(tensors, totals)
    assert totals.means() == pytest.approx({"kl/k1": 2.0, "kl/k3": 2 * (math.exp(-1) - 1 + 1)}, rel=1e-12)
