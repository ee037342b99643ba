"""The sampler: the texts of Hugging Face `generate`, exact log-probs, right frequencies, no side effects."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from architectures import make
from scipy.stats import chisquare
from torch import nn
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.types import Prompt
from steerwell.models import sampler, stateful
from steerwell.models.kv_cache import CachePlan
from steerwell.models.load import Policy
from steerwell.models.render import tokenize_groups
from steerwell.models.sampler import Sampled, generate
from tiny import END, PAD, VOCAB, tiny_llama, tiny_qwen3, tiny_tokenizer

WINDOW = 6
STOPS = [END, *range(100, 112)]  # enough for random weights to stop now and then


def tiny_mistral(**settings) -> MistralForCausalLM:
    """A Mistral whose window is shorter than prompts and completions."""
    config = MistralConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=WINDOW,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
        **settings,
    )
    return _large_weights(MistralForCausalLM(config))


def tiny_gemma2() -> Gemma2ForCausalLM:
    """Soft-capped scores and logits, windows in every other layer, heads of their own size."""
    config = Gemma2Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        sliding_window=WINDOW,
        query_pre_attn_scalar=16,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=5.0,
        max_position_embeddings=1024,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = _large_weights(Gemma2ForCausalLM(config))
    model.set_attn_implementation("eager")  # Hugging Face's own SDPA drops the soft cap
    return model


def tiny_gpt_oss() -> GptOssForCausalLM:
    """Attention sinks, windows in every other layer, experts."""
    config = GptOssConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=2,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=END,
    )
    model = _large_weights(GptOssForCausalLM(config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("sinks"):
                weight.copy_(torch.tensor([1.0, -1.0, 2.0, 0.5]))
    model.set_attn_implementation("eager")
    return model


def _large_weights(model):
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(0.0, 0.15)
    return model.eval()


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "qwen3": tiny_qwen3,
    "mistral": tiny_mistral,
    "gemma2": tiny_gemma2,
    "gpt_oss": tiny_gpt_oss,
}


def make_prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 20) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(120, VOCAB) for _ in range(rng.randint(shortest, longest))] for _ in range(count)]


@torch.no_grad()
def reference_logps(model, prompt: list[int], one: Sampled, temperature: float = 1.0) -> list[float]:
    """Log-probs of a sample by one plain forward pass of the unchanged model."""
    ids = torch.tensor([[*prompt, *one.token_ids]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double() / temperature
    chosen = torch.tensor(one.token_ids)[:, None]
    return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()


def their_greedy(model, prompt: list[int], new: int) -> list[int]:
    out = model.generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=new, eos_token_id=STOPS, pad_token_id=PAD
    )
    return out[0, len(prompt) :].tolist()


def tokens_of(drawn: list[list[Sampled]]) -> list[list[tuple[int, ...]]]:
    return [[one.token_ids for one in samples] for samples in drawn]


@pytest.mark.parametrize("name", MODELS)
def test_greedy_gives_what_generate_gives(name: str) -> None:
    """A batch smaller than the list, so that prompts join while others are half way and the cache moves."""
    model, new = MODELS[name](), 24
    prompts = make_prompts(64)
    drawn = generate(model, prompts, greedy=True, stop=STOPS, max_new_tokens=new, batch_size=12)
    theirs = [their_greedy(model, prompt, new) for prompt in prompts]
    assert [list(samples[0].token_ids) for samples in drawn] == theirs
    assert len({len(ids) for ids in theirs}) > 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logps_are_those_of_a_forward_pass(name: str, temperature: float) -> None:
    model, prompts = MODELS[name](), make_prompts(12, seed=3)
    drawn = generate(model, prompts, 3, stop=STOPS, max_new_tokens=20, temperature=temperature, batch_size=8)
    for prompt, samples in zip(prompts, drawn, strict=True):
        for one in samples:
            assert len(one.logps) == len(one.token_ids)
            assert one.logps == pytest.approx(reference_logps(model, prompt, one, temperature), abs=1e-5)


def test_long_prompts_are_read_in_parts_and_waves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "PREFILL_TOKENS", 100)
    model = tiny_llama()
    prompts = [*make_prompts(6, 1, 90, 150), *make_prompts(6, 2, 1, 70)]
    drawn = generate(model, prompts, 2, max_new_tokens=5, batch_size=5)
    for prompt, samples in zip(prompts, drawn, strict=True):
        for one in samples:
            assert one.logps == pytest.approx(reference_logps(model, prompt, one), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_tokens_come_with_their_probabilities(temperature: float) -> None:
    """Chi-square of 6000 first and second tokens against the softmax, rare tokens taken together."""
    model, prompt, n = tiny_llama(vocab=24), [5, 9, 13], 6000
    drawn = generate(model, [prompt], n, max_new_tokens=2, temperature=temperature, batch_size=3000, seed=11)[
        0
    ]
    for place in range(2):
        before = [one for one in drawn if place == 0 or one.token_ids[0] == drawn[0].token_ids[0]]
        start = [*prompt, *drawn[0].token_ids[:place]]
        with torch.no_grad():
            logits = model(torch.tensor([start])).logits[0, -1].double() / temperature
        expected = logits.softmax(-1).numpy() * len(before)
        counts = Counter(one.token_ids[place] for one in before)
        seen = np.array([counts[token] for token in range(24)], dtype=float)
        common = expected >= 5
        assert common.sum() > 3
        observed = [*seen[common], seen[~common].sum()]
        wanted = [*expected[common], max(expected[~common].sum(), 1e-9)]
        assert chisquare(observed, wanted).pvalue > 1e-3


def test_the_pick_stays_inside_what_can_be() -> None:
    """The ends of the unit interval, tokens of probability zero at both ends of the vocabulary."""
    logits = torch.full((3, 6), -torch.inf)
    logits[:, 2], logits[:, 4] = 1.0, 1.0
    token, logp = sampler._pick(logits, 1.0, torch.tensor([0.0, 0.75, 1.0]))
    assert token.tolist() == [2, 4, 4]
    assert logp.tolist() == pytest.approx([-np.log(2)] * 3)


def test_numbers_are_uniform_and_independent_of_each_other() -> None:
    keys = sampler._row_keys([[1], [2], [1]], 400, seed=3)
    assert len(set(keys.tolist())) == 1200  # the repeated prompt gets numbers of its own
    drawn = np.stack([sampler._uniforms(keys, np.full(1200, step)) for step in range(4)])
    assert drawn.min() >= 0
    assert drawn.max() <= 1
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    assert chisquare(counts).pvalue > 1e-3
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.1


@pytest.mark.parametrize("batch_size", [1, 5, 64])
def test_batch_size_order_and_neighbours_change_no_sample(batch_size: int) -> None:
    model, prompts = tiny_llama(), make_prompts(9, seed=5)
    whole = generate(model, prompts, 4, stop=STOPS, max_new_tokens=12, seed=7)
    other = generate(model, prompts[::-1], 4, stop=STOPS, max_new_tokens=12, seed=7, batch_size=batch_size)
    assert tokens_of(other)[::-1] == tokens_of(whole)
    fewer = generate(model, prompts[3:4], 2, stop=STOPS, max_new_tokens=12, seed=7, batch_size=batch_size)
    assert tokens_of(fewer)[0] == tokens_of(whole)[3][:2]


def test_samples_seeds_and_repeated_prompts_differ() -> None:
    model, prompt = tiny_llama(), make_prompts(1, seed=2)[0]
    first, second = tokens_of(generate(model, [prompt, prompt], 8, max_new_tokens=10))
    assert len({*first, *second}) == 16
    assert tokens_of(generate(model, [prompt], 16, max_new_tokens=10))[0] == [*first, *second]
    again = tokens_of(generate(model, [prompt], 8, max_new_tokens=10, seed=1))[0]
    assert not {*again} & {*first, *second}
    greedy = tokens_of(generate(model, [prompt], 8, max_new_tokens=10, greedy=True))[0]
    assert len(set(greedy)) == 1


def test_a_sample_ends_with_a_stop_token_or_at_the_limit() -> None:
    model, prompts = tiny_llama(), make_prompts(40, seed=8)
    drawn = [one for samples in generate(model, prompts, 2, stop=STOPS, max_new_tokens=15) for one in samples]
    assert {one.finished for one in drawn} == {True, False}
    for one in drawn:
        assert one.finished == (one.token_ids[-1] in STOPS)
        assert not set(one.token_ids[:-1]) & set(STOPS)
        assert one.finished or len(one.token_ids) == 15
    endless = generate(model, prompts, stop=(), max_new_tokens=3)
    assert {(len(s[0].token_ids), s[0].finished) for s in endless} == {(3, False)}


def test_never_beyond_the_context() -> None:
    model = tiny_llama(max_position_embeddings=16)
    prompts = [[130] * length for length in (15, 3, 10)]
    drawn = generate(model, prompts, 2, max_new_tokens=8)
    assert [[len(one.token_ids) for one in samples] for samples in drawn] == [[1, 1], [8, 8], [6, 6]]
    for prompt, samples in zip(prompts, drawn, strict=True):
        assert samples[0].logps == pytest.approx(reference_logps(model, prompt, samples[0]), abs=1e-5)
    with pytest.raises(InputError, match=r"prompt 2 has 16 tokens, and the model reads 16.* Shorten"):
        generate(model, [[130] * 3, [130] * 16], max_new_tokens=1)


def test_no_prompts_and_bad_settings() -> None:
    model = tiny_llama()
    assert generate(model, []) == []
    with pytest.raises(InputError, match="prompt 1 has no tokens"):
        generate(model, [[]])
    for name in ("n", "max_new_tokens", "batch_size"):
        settings: dict[str, Any] = {name: 0}
        with pytest.raises(InputError, match=f"{name} must be at least 1"):
            generate(model, [[130]], **settings)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(InputError, match="greedy=True"):
            generate(model, [[130]], temperature=temperature)


def test_diverged_weights_are_an_error() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight[7] = float("nan")
    with pytest.raises(InputError, match="diverged"):
        generate(model, [[130]])


class CountingModel(nn.Module):
    """Counts the tokens that a model reads while it is read."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner, self.seen = model, []

    def get_base_model(self) -> PreTrainedModel:
        return self.inner

    def forward(self, **inputs):
        self.seen.append(tuple(inputs["input_ids"].shape))
        return self.inner(**inputs)


# What each is read with: its own cache, or (its cache is inexact, or not where others have it) whole sequences.
IN_STEP = {
    "qwen3_5_text": stateful._Cached,
    "falcon_h1": stateful._Cached,
    "lfm2": stateful._Cached,
    "mamba2": stateful._Whole,
    "bamba": stateful._Whole,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", IN_STEP)
def test_models_with_a_state_are_sampled_in_step(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Prompts of several lengths, more rows than a batch, rows that end early; the same samples in any order."""
    model = make(name, vocab_size=VOCAB)
    used = []
    monkeypatch.setattr(IN_STEP[name], "choose", recorded(IN_STEP[name].choose, used))
    prompts = [
        [131],
        *make_prompts(5, seed=6, shortest=2, longest=9),
        *make_prompts(2, seed=7, shortest=5, longest=5),
    ]
    drawn = generate(model, prompts, 3, stop=STOPS, max_new_tokens=9, temperature=0.8, batch_size=4)
    assert used
    for prompt, samples in zip(prompts, drawn, strict=True):
        for one in samples:
            assert one.finished == (one.token_ids[-1] in STOPS)
            assert one.logps == pytest.approx(reference_logps(model, prompt, one, 0.8), abs=1e-5)
    lengths = {len(one.token_ids) for samples in drawn for one in samples}
    assert len(lengths) > 2
    again = generate(model, prompts[::-1], 3, stop=STOPS, max_new_tokens=9, temperature=0.8, batch_size=100)
    assert tokens_of(again)[::-1] == tokens_of(drawn)
    assert model.config._attn_implementation != "steerwell"


def recorded(real, used: list):
    def choose(self, index):
        used.append(len(index))
        return real(self, index)

    return choose


@pytest.mark.filterwarnings("ignore")
def test_draws_in_step_follow_the_same_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that takes either way gives the same samples by both."""
    model, prompts = tiny_llama(), make_prompts(6, seed=2)
    packed = generate(model, prompts, 3, stop=STOPS, max_new_tokens=10, seed=4)
    monkeypatch.setattr(sampler, "takes_tree", lambda model: False)
    for exact in (True, False):
        monkeypatch.setattr(stateful, "_cache_is_exact", lambda model, exact=exact: exact)
        in_step = generate(model, prompts, 3, stop=STOPS, max_new_tokens=10, seed=4, batch_size=5)
        assert tokens_of(in_step) == tokens_of(packed)


def test_each_prompt_is_read_once_and_finished_rows_leave() -> None:
    model, prompts = CountingModel(tiny_llama()), make_prompts(6, seed=4)
    drawn = generate(model, prompts, 4, stop=STOPS, max_new_tokens=30, batch_size=24)
    lengths = sorted(len(one.token_ids) for samples in drawn for one in samples)
    assert model.seen[0] == (1, sum(map(len, prompts)))
    # A row with k tokens is read k - 1 times: the last token needs no pass.
    live = [sum(length > step for length in lengths) for step in range(1, lengths[-1])]
    assert model.seen[1:] == [(rows, 1) for rows in live]


def test_an_interruption_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    model.train()
    model.model.layers[0].eval()
    before = [module.training for module in model.modules()]
    attention = model.config._attn_implementation

    def interrupt(done: int, total: int) -> None:
        assert model.config._attn_implementation == "steerwell"
        assert not any(module.training for module in model.modules())
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(model, [[130, 140]], max_new_tokens=3, progress=interrupt)
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == attention
    assert torch.is_grad_enabled()
    generate(model, [[130, 140]], max_new_tokens=3)
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == attention
    model(torch.tensor([[130, 140]])).logits.sum().backward()  # and it can be trained


def test_progress_counts_to_the_end() -> None:
    calls: list[tuple[int, int]] = []
    generate(
        tiny_llama(),
        make_prompts(10),
        3,
        stop=STOPS,
        max_new_tokens=10,
        batch_size=8,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert calls[-1] == (30, 30)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def test_the_cache_refuses_what_it_cannot_hold() -> None:
    plan = CachePlan(rows=2, slots=4, device=torch.device("cpu"))
    plan.admit([3], [1])
    with pytest.raises(ValueError, match="no room"):
        plan.admit([4], [1])
    with pytest.raises(ValueError, match="no room"):
        plan.admit([2], [2])
    plan.step()
    with pytest.raises(ValueError, match="longer than the cache"):
        plan.step()


def policy() -> Policy:
    return Policy(tiny_llama(), tiny_tokenizer(), "tiny")


def test_groups_carry_what_was_sampled() -> None:
    it = policy()
    it.model.generation_config.eos_token_id = [END, 101]
    asked = (Message("system", "be brief"), Message("user", "is tea hot"))
    prompts = [
        Prompt(asked, {"family": "fact"}),
        "is tea hot",
        [{"role": "user", "content": "why"}],
        "is tea hot",
    ]
    groups = it.sample(prompts, 3, max_new_tokens=12, temperature=0.8, seed=5)
    assert [group.prompt[-1].content for group in groups] == ["is tea hot", "is tea hot", "why", "is tea hot"]
    assert groups[0].meta == {"family": "fact"}
    all_of_them = [completion for group in groups for completion in group.completions]
    assert len({completion.id for completion in all_of_them}) == 12
    assert [c.source.index for c in groups[3].completions] == [3, 4, 5]
    for group, back in zip(groups, tokenize_groups(it.tokenizer, groups), strict=True):
        for completion, sequence in zip(group.completions, back.sequences, strict=True):
            assert completion.token_ids is not None
            assert completion.prompt_token_ids is not None
            assert completion.old_logps is not None
            assert completion.prompt == group.prompt
            assert completion.source.name == "tiny"
            assert completion.source.revision == it.digest()
            assert completion.source.sampling == '{"greedy":false,"max_new_tokens":12,"temperature":0.8}'
            assert completion.finished == (completion.token_ids[-1] in (END, 101))
            assert completion.text == it.tokenizer.decode(
                list(completion.token_ids), skip_special_tokens=True
            )
            assert sequence.ids == [*completion.prompt_token_ids, *completion.token_ids]
            one = Sampled(completion.token_ids, completion.old_logps, False)
            wanted = reference_logps(it.model, list(completion.prompt_token_ids), one, 0.8)
            assert completion.old_logps == pytest.approx(wanted, abs=1e-5)
    assert it.sample([]) == []


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
def test_a_policy_with_adapters_is_sampled_with_them() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.5)
    prompt = make_prompts(1, seed=9)[0]
    one = generate(model.eval(), [prompt], max_new_tokens=8)[0][0]
    assert one.logps == pytest.approx(reference_logps(model, prompt, one), abs=1e-5)
    with model.disable_adapter():
        assert one.logps != pytest.approx(reference_logps(model, prompt, one), abs=1e-3)
