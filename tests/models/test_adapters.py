"""Adapters: a fresh one changes nothing, off it is the model below, and what is saved is what was trained."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models import adapters, load
from steerwell.models.adapters import Adapter, adapter_below_head, add_adapter, merged
from steerwell.models.attention import use_steerwell_attention
from steerwell.models.batch import build
from steerwell.models.forward import per_token_logps, reward_scores
from steerwell.models.load import Policy, load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from tiny import tiny_llama, tiny_policy_dir, tiny_qwen3, tiny_tokenizer

KINDS = ("lora", "dora")


def groups() -> list[CompletionGroup]:
    made = []
    for ask, answers in (("hi you", ("yes", "no, the other")), ("why the", ("in an", "er"))):
        prompt = as_messages(ask)
        made.append(
            CompletionGroup(prompt, tuple(Completion(prompt, (Message("assistant", a),)) for a in answers))
        )
    return made


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_policy_dir(tmp_path_factory.mktemp("models"))


def logps(model: Any, policy: Policy) -> torch.Tensor:
    """Log-probs of all tokens, to the last bit."""
    with torch.no_grad():
        return per_token_logps(model, build(policy.tokenize(groups())))


def train_a_little(model: Any, loss: torch.Tensor) -> None:
    """One step of every trained weight by the sign of its gradient."""
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained)
    with torch.no_grad():
        for parameter, gradient in zip(trained, gradients, strict=True):
            parameter -= 0.05 * gradient.sign()


def disturb(model: Any) -> None:
    """Give every new weight a part of its own."""
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_magnitude" in name:
                parameter *= 1 + 0.1 * torch.rand(parameter.shape, generator=draw)
            elif "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=draw))


@pytest.mark.parametrize("kind", KINDS)
def test_fresh_it_changes_nothing_and_off_it_is_the_model_below(path: Path, kind: Any) -> None:
    plain = load_policy(path)
    policy = load_policy(path, lora=4, adapter=kind)
    start = logps(plain.model, plain)
    # to rounding only: DoRA divides each row by its own length
    torch.testing.assert_close(logps(policy.model, policy), start, atol=2e-5, rtol=0)
    assert adapters.fresh_adapter(policy.model)
    trained = [name for name, p in policy.model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * (3 if kind == "dora" else 2)
    assert all("lora_" in name and "lm_head" not in name for name in trained)
    train_a_little(policy.model, per_token_logps(policy.model, build(policy.tokenize(groups()))).sum())
    assert not adapters.fresh_adapter(policy.model)
    disturb(policy.model)
    assert (logps(policy.model, policy) - start).abs().max() > 0.05
    with policy.model.disable_adapter():
        assert torch.equal(logps(policy.model, policy), start)  # exactly, DoRA as well


@pytest.mark.parametrize("kind", KINDS)
def test_saved_it_is_merged(path: Path, tmp_path: Path, kind: Any) -> None:
    policy = load_policy(path, lora=4, adapter=kind)
    disturb(policy.model)
    after, digest = policy.logps(groups()), policy.digest()
    again = load_policy(policy.save(tmp_path / "merged"))
    assert not any("lora" in name for name, _ in again.model.named_parameters())
    for found, expected in zip(again.logps(groups()), after, strict=True):
        assert found == pytest.approx(expected, abs=1e-3)
    assert (policy.logps(groups()), policy.digest()) == (after, digest)  # in memory it is as it was
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # loads without us
    ids = policy.tokenize(groups())[0].sequences[0]
    own = theirs(input_ids=torch.tensor([ids.ids])).logits[0, ids.n_prompt - 1 : -1].log_softmax(-1)
    expected = own.gather(1, torch.tensor(ids.ids[ids.n_prompt :])[:, None]).sum().item()
    assert after[0][0] == pytest.approx(expected, abs=1e-3)


def test_loading_is_repeatable_and_leaves_the_generator_alone(path: Path) -> None:
    state = torch.get_rng_state()
    first = load_policy(path, lora=4)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert load_policy(path, lora=4).digest() == first.digest()


def test_alpha_is_part_of_what_a_model_is(path: Path) -> None:
    models = [load_policy(path, lora=4, lora_alpha=alpha) for alpha in (None, 8, 16)]
    for policy in models:
        disturb(policy.model)
    start, twice, four_times = (logps(p.model, p) for p in models)
    assert torch.equal(start, twice)  # alpha is 2 * rank by default
    assert (start - four_times).abs().max() > 0.05
    assert models[0].digest() == models[1].digest() != models[2].digest()


def test_targets(path: Path) -> None:
    policy = load_policy(path, lora=2, lora_targets=["q_proj", "layers.1.mlp.up_proj"])
    inside = {n.split(".lora_A")[0] for n, p in policy.model.named_parameters() if "lora_A" in n}
    layers = "base_model.model.model.layers"
    assert inside == {
        f"{layers}.0.self_attn.q_proj",
        f"{layers}.1.self_attn.q_proj",
        f"{layers}.1.mlp.up_proj",
    }
    assert adapter_below_head(load_policy(path, lora=2, lora_targets="q_proj").model) == Adapter(
        2, "lora", 4, ("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj")
    )
    assert adapter_below_head(load_policy(path).model) is None


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"lora": 0}, "positive rank, got 0"),
        ({"lora": True}, "positive rank"),
        ({"lora": 4, "adapter": "lorra"}, "unknown adapter 'lorra'.*'lora'"),
        ({"adapter": "dora"}, "adapter is given without lora"),
        ({"adapter": "drora"}, "unknown adapter 'drora'.*'dora'"),
        ({"lora_alpha": 8}, "lora_alpha is given without lora"),
        ({"lora_targets": ["q_proj"]}, "lora_targets is given without lora"),
        ({"lora": 4, "lora_alpha": 0}, "lora_alpha must be above 0"),
        ({"lora": 4, "lora_targets": []}, "lora_targets is empty"),
        ({"lora": 4, "adapter": "qlora", "device": "cpu"}, "qlora needs a CUDA GPU"),
    ],
)
def test_what_is_refused_is_refused_before_weights_are_read(
    path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], what: str
) -> None:
    def read(*_args, **_kwargs):
        pytest.fail("the model was read")

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", read)
    monkeypatch.setattr(load.AutoModelForCausalLM, "from_pretrained", read)
    with pytest.raises(InputError, match=what) as error:
        load_policy(path, **settings)
    assert error.value.mend
    if "device" not in settings:
        with pytest.raises(InputError, match=what):
            load_reward_model(path, **settings)


def test_qlora_needs_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, cuda = Adapter(4, "qlora"), torch.device("cuda")
    monkeypatch.setattr(adapters, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="qlora needs bitsandbytes"):
        adapters.four_bits(asked, cuda)
    assert adapters.four_bits(Adapter(4, "dora"), cuda) is None
    assert adapters.four_bits(None, cuda) is None


def test_targets_that_are_not_there(path: Path) -> None:
    for target, what in (("q_prj", "no linear layer 'q_prj'.*'q_proj'"), ("score", "no linear layer")):
        with pytest.raises(InputError, match=what):
            load_policy(path, lora=4, lora_targets=["v_proj", target])
    with pytest.raises(InputError, match="dora cannot be put on the head"):
        load_policy(path, lora=4, adapter="dora", lora_targets=["lm_head"])


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])  # the head of the second is the embedding
def test_an_adapter_on_the_head_is_merged_into_the_head_alone(tmp_path: Path, make: Any) -> None:
    policy = load_policy(tiny_policy_dir(tmp_path, model=make()), lora=4, lora_targets=["q_proj", "lm_head"])
    embedding = policy.model.get_input_embeddings().weight.clone()
    disturb(policy.model)
    ids = torch.tensor([policy.tokenize(groups())[0].sequences[1].ids])
    inner = policy.model.get_base_model()
    inner.set_attn_implementation("sdpa")
    logits = inner(input_ids=ids).logits.detach()
    policy.save(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again.get_input_embeddings().weight, embedding)
    assert not torch.equal(again.get_output_embeddings().weight, embedding)
    torch.testing.assert_close(again(input_ids=ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(policy.model.get_input_embeddings().weight, embedding)
    below = RewardModel.from_policy(policy)  # the head of a policy has no place in a reward model
    assert not any("lm_head" in name for name, _ in below.model.named_parameters())


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize("kind", KINDS)
def test_a_reward_model_with_an_adapter(tmp_path: Path, make: Any, kind: Any) -> None:
    path = tiny_policy_dir(tmp_path, model=make())
    model = RewardModel.from_policy(load_policy(path, lora=4, adapter=kind))
    assert model.score(groups())[0] == pytest.approx(
        RewardModel.from_policy(load_policy(path)).score(groups())[0], abs=1e-6
    )
    trained = [name for name, p in model.model.named_parameters() if p.requires_grad]
    assert sum("lora_" in name for name in trained) == 2 * 7 * (3 if kind == "dora" else 2)
    assert [name for name in trained if "lora_" not in name] == ["base_model.model.score.weight"]
    head = model.model.get_base_model().score.weight
    before = head.detach().clone()
    for _ in range(2):
        batch = build(model.tokenize(groups()))
        train_a_little(model.model, reward_scores(model.model, batch)[::2].sum())
    assert (head - before).abs().max() > 0.01
    scores = model.score(groups())
    again = load_reward_model(model.save(tmp_path / "rm"))  # the trained head is saved with it
    assert torch.equal(again.model.score.weight, head)
    for found, expected in zip(again.score(groups()), scores, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)
    assert model.copy().score(groups()) == scores
    assert model.copy().digest() == model.digest() != again.digest()
    further = load_reward_model(tmp_path / "rm", lora=2, adapter=kind)
    assert further.score(groups())[1] == pytest.approx(scores[1], abs=1e-4)
    assert sum(p.requires_grad for p in further.model.parameters()) > 1


def test_a_trained_adapter_is_under_the_reward_models_new_one(path: Path) -> None:
    policy = load_policy(path, lora=4)
    disturb(policy.model)
    model = RewardModel.from_policy(policy)
    assert adapters.fresh_adapter(model.model)
    plain = merged(policy.model).base_model.state_dict()
    found = merged(model.model).base_model.state_dict()
    assert plain.keys() == found.keys()
    assert all(torch.equal(plain[name], found[name]) for name in plain)


class FourBit(nn.Parameter):
    """A stand-in for bitsandbytes' parameter: whole numbers, and a factor in ``quant_state``."""

    quant_state: torch.Tensor

    def __new__(cls, data: torch.Tensor, quant_state: torch.Tensor) -> FourBit:
        made = torch.Tensor._make_subclass(cls, data, False)
        made.quant_state = quant_state
        return made

    def __deepcopy__(self, memo: Any) -> FourBit:
        return FourBit(self.data.clone(), self.quant_state.clone())


class FourBitLinear(nn.Linear):
    """A linear layer over such a parameter, which it makes whole in its forward pass only."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(input, dequantize(self.weight.data, self.weight.quant_state))


def dequantize(data: torch.Tensor, quant_state: torch.Tensor) -> torch.Tensor:
    return data.float() * quant_state


def in_four_bits(model: Any) -> Any:
    """The model with every layer below the head in 4 bits, as transformers leaves it."""
    for module in list(model.base_model.modules()):
        for name, layer in list(module.named_children()):
            if type(layer) is nn.Linear:
                small = FourBitLinear(layer.in_features, layer.out_features, bias=False)
                factor = layer.weight.detach().abs().max() / 7
                codes = (layer.weight.detach() / factor).round().to(torch.int8)
                small.weight = FourBit(codes, factor)
                setattr(module, name, small)
    model.config.quantization_config = {"load_in_4bit": True}
    model.is_quantized = model.is_loaded_in_4bit = True
    return model


def test_qlora_is_merged_into_whole_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in = ModuleType("bitsandbytes")
    stand_in.functional = ModuleType("bitsandbytes.functional")  # type: ignore[attr-defined]
    stand_in.functional.dequantize_4bit = dequantize  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "bitsandbytes", stand_in)
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", stand_in.functional)  # type: ignore[attr-defined]
    model = in_four_bits(tiny_llama())
    use_steerwell_attention(model)
    policy = Policy(add_adapter(model, Adapter(4, "qlora")), tiny_tokenizer(), "tiny")
    assert adapters.is_quantised(policy.model)
    fresh = policy.logps(groups())
    reward = RewardModel.from_policy(policy)
    assert adapters.is_quantised(reward.model)  # a fresh adapter: the weights stay as small as they are
    disturb(policy.model)
    after = policy.logps(groups())
    assert abs(after[0][0] - fresh[0][0]) > 0.01
    again = load_policy(policy.save(tmp_path / "merged"))
    assert "quantization" not in (tmp_path / "merged" / "config.json").read_text()
    assert again.logps(groups())[0] == pytest.approx(after[0], abs=1e-3)
    assert policy.logps(groups()) == after
    disturb(reward.model)
    scores = reward.score(groups())
    again = load_reward_model(reward.save(tmp_path / "rm"))
    assert again.score(groups())[0] == pytest.approx(scores[0], abs=1e-4)


@pytest.mark.skipif(
    not torch.cuda.is_available() or find_spec("bitsandbytes") is None,
    reason="needs a CUDA GPU and bitsandbytes",
)
def test_qlora_on_a_gpu(tmp_path: Path) -> None:
    path = tiny_policy_dir(tmp_path, model=tiny_llama(hidden_size=64, intermediate_size=128))
    policy = load_policy(path, lora=4, adapter="qlora")
    assert adapters.is_quantised(policy.model)
    start = policy.logps(groups())
    assert start[0] == pytest.approx(load_policy(path).logps(groups())[0], rel=0.2)
    train_a_little(
        policy.model, per_token_logps(policy.model, build(policy.tokenize(groups())).to("cuda")).sum()
    )
    after = policy.logps(groups())
    assert after != start
    again = load_policy(policy.save(tmp_path / "merged"))
    assert again.logps(groups())[0] == pytest.approx(after[0], rel=0.05)
