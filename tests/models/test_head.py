"""The head: log-probs and entropies are those of the plain formula, chunked or kept, and so are all gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, LlamaConfig

from steerwell.data.errors import InputError
from steerwell.models import head as room
from steerwell.models.attention import use_steerwell_attention
from steerwell.models.batch import tree
from steerwell.models.forward import per_token_logps
from steerwell.models.head import Head, LowRank, head, token_logps
from tiny import SIZES, random_groups, tiny_llama, tiny_qwen3

S, E, V, R = 11, 6, 23, 3


def plain(hidden: Tensor, head: Head, target: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """(S,) log-probs and entropies from whole logits, as the formulas have them."""
    logits = hidden @ head.weight.t()
    for adapter in head.adapters:
        logits = logits + adapter.scaling * (hidden @ adapter.down.t() @ adapter.up.t())
    if head.bias is not None:
        logits = logits + head.bias
    logits = logits * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    logps = (logits / temperature).log_softmax(-1)
    return logps.gather(1, target[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


def leaves(seed: int, **dtype) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    shapes = {"hidden": (S, E), "weight": (V, E), "bias": (V,), "down": (R, E), "up": (V, R)}
    return {k: torch.randn(shape, generator=made, **dtype).requires_grad_() for k, shape in shapes.items()}


def of(x: dict[str, Tensor], parts: set[str], scale: float, softcap: float | None) -> Head:
    adapters = (LowRank(x["down"], x["up"], 1.7),) if "up" in parts else ()
    return Head(x["weight"], x["bias"] if "bias" in parts else None, scale, softcap, adapters)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    chunk=st.sampled_from([1, 3, 7, 50, None]),
    scale=st.sampled_from([1.0, 0.3]),
    softcap=st.sampled_from([None, 2.0]),
    temperature=st.sampled_from([1.0, 0.6]),
    entropy=st.booleans(),
    parts=st.sets(st.sampled_from(["bias", "up"])),
    frozen=st.sets(st.sampled_from(["hidden", "weight", "bias", "down", "up"]), max_size=4),
)
def test_values_and_gradients_equal_the_plain_formula(
    seed, chunk, scale, softcap, temperature, entropy, parts, frozen
) -> None:
    """In float64, whatever is frozen: with the head frozen, another way is taken through the backward pass."""
    x = leaves(seed, dtype=torch.float64)
    for name in frozen:
        x[name].requires_grad_(False)
    target = torch.randint(0, V, (S,), generator=torch.Generator().manual_seed(seed))
    one = of(x, parts, scale, softcap)
    logps, entropies = plain(x["hidden"], one, target, temperature)
    if entropy:
        found = token_logps(x["hidden"], one, target, temperature=temperature, chunk=chunk, entropy=True)
    else:
        found = (token_logps(x["hidden"], one, target, temperature=temperature, chunk=chunk),)
    expected = (logps, entropies)[: len(found)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    learned = [v for v in x.values() if v.requires_grad]
    if not found[0].requires_grad:
        assert not expected[0].requires_grad
        return
    upstream = torch.randn(2, S, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = [
        torch.autograd.grad(
            sum((v * u).sum() for v, u in zip(values, upstream, strict=False)), learned, allow_unused=True
        )
        for values in (found, expected)
    ]
    for a, b in zip(*grads, strict=True):
        assert (a is None) == (b is None)
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("parts", [set(), {"bias", "up"}])
@pytest.mark.parametrize("keep", [33, 40])
def test_some_positions_kept_and_the_rest_made_again(
    parts: set[str], keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chunks of 16 of 40 positions: 32 are kept, or all. Rows are passed over two at a time."""
    monkeypatch.setattr(room, "CHUNK_CPU", 16 * V)
    monkeypatch.setattr(room, "KEEP_CPU", keep * V)
    monkeypatch.setattr(room, "CACHED", 2 * V)
    made = counted(monkeypatch)
    x = leaves(3, dtype=torch.float64)
    hidden = torch.randn(40, E, dtype=torch.float64, requires_grad=True)
    target = torch.arange(40) % V
    one = of(x, parts, 0.7, None)
    found, upstream = token_logps(hidden, one, target), torch.linspace(-1, 2, 40, dtype=torch.float64)
    expected, _ = plain(hidden, one, target, 1.0)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    learned = [hidden, x["weight"], *(x[name] for name in ("bias", "down", "up") if parts)]
    grads = [torch.autograd.grad((v * upstream).sum(), learned) for v in (found, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert sum(shape[0] for shape in made) == {33: 40 + 8, 40: 40}[keep]


def test_the_entropy_alone_has_a_gradient() -> None:
    x = leaves(0, dtype=torch.float64)
    target = torch.zeros(S, dtype=torch.long)
    _, found = token_logps(x["hidden"], Head(x["weight"]), target, entropy=True, chunk=4)
    _, expected = plain(x["hidden"], Head(x["weight"]), target, 1.0)
    for a, b in zip(
        torch.autograd.grad(found.sum(), (x["hidden"], x["weight"])),
        torch.autograd.grad(expected.sum(), (x["hidden"], x["weight"])),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


def test_entropy_at_its_ends() -> None:
    """ln V for equal logits; nothing where one token has it all, also where others underflow."""
    weight = torch.zeros(V, 1)
    _, flat = token_logps(torch.ones(2, 1), Head(weight), torch.tensor([0, 1]), entropy=True)
    assert flat.tolist() == pytest.approx([torch.log(torch.tensor(float(V))).item()] * 2)
    weight[3] = 1.0
    hidden = torch.full((1, 1), 5000.0, requires_grad=True)
    logps, sharp = token_logps(hidden, Head(weight), torch.tensor([1]), entropy=True)
    assert sharp.tolist() == [0.0]
    assert logps.tolist() == [-5000.0]
    (sharp.sum() + logps.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.tolist() == [[-1.0]]


@pytest.mark.parametrize("frozen", [set(), {"weight"}])
@pytest.mark.parametrize("entropy", [False, True])
def test_bf16_weights_with_an_fp32_log_sum_exp(frozen: set[str], entropy: bool) -> None:
    """Values are exact given the rounded logits; gradients are as near to float64 as bf16 lets them be."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16).bfloat16().requires_grad_(), torch.randn(5000, 16).bfloat16()
    weight.requires_grad_("weight" not in frozen)
    target = torch.randint(0, 5000, (40,))
    logits = (hidden.detach() @ weight.detach().t()).float()
    inputs = [x for x in (hidden, weight) if x.requires_grad]
    exact = plain(hidden.double(), Head(weight.double()), target, 1.0)
    total = exact[0].sum() + (exact[1].sum() if entropy else 0)
    expected_grads = torch.autograd.grad(total, inputs)
    for chunk in (9, 100):
        out = token_logps(hidden, Head(weight), target, chunk=chunk, entropy=True)
        values = out if entropy else (token_logps(hidden, Head(weight), target, chunk=chunk),)
        assert {v.dtype for v in values} == {torch.float32}
        expected = logits.log_softmax(-1).gather(1, target[:, None])[:, 0]
        torch.testing.assert_close(values[0], expected, rtol=1e-6, atol=1e-5)
        for a, b in zip(
            torch.autograd.grad(sum(v.sum() for v in values), inputs), expected_grads, strict=True
        ):
            assert a.dtype == torch.bfloat16
            assert (a - b).double().norm() < 0.02 * b.norm()


def counted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    made: list[tuple[int, ...]] = []
    real = room._logits

    def spy(*args):
        z = real(*args)
        made.append(tuple(z.shape))
        return z

    monkeypatch.setattr(room, "_logits", spy)
    return made


def test_no_more_logits_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    made = counted(monkeypatch)
    model, groups = tiny_qwen3(), random_groups(2)
    use_steerwell_attention(model)
    batch = tree(groups)
    s = len(batch.target)
    assert s > 20
    per_token_logps(model, batch, chunk=7).sum().backward()
    assert max(shape[0] for shape in made) == 7
    assert sum(shape[0] for shape in made) == 2 * s  # once forward, once backward
    made.clear()
    per_token_logps(model, batch, chunk=s).sum().backward()
    assert made == [(s, 272)]  # fits: nothing is computed twice
    made.clear()
    monkeypatch.setattr(room, "CHUNK_CPU", 16 * 272)
    per_token_logps(model, batch).sum().backward()
    assert max(shape[0] for shape in made) == 16
    assert sum(shape[0] for shape in made) == s  # chunked, and kept for the backward pass
    made.clear()
    monkeypatch.setattr(room, "KEEP_CPU", (s - 1) * 272)
    per_token_logps(model, batch).sum().backward()
    kept = (s - 1) // 16 * 16
    assert sum(shape[0] for shape in made) == s + s - kept  # too many to keep all: whole chunks are kept


def test_a_frozen_head_runs_once_and_nothing_is_kept_without_a_backward_pass(monkeypatch) -> None:
    made = counted(monkeypatch)
    x = leaves(0)
    target = torch.arange(S)
    saved: list[tuple[int, ...]] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        frozen = Head(x["weight"].detach())
        token_logps(x["hidden"], frozen, target, chunk=4).sum().backward()
        assert sum(shape[0] for shape in made) == S
        assert (S, V) not in saved
        with torch.no_grad():
            assert not token_logps(x["hidden"], Head(x["weight"]), target).requires_grad
    assert (S, V) not in saved


def adapted(**settings):
    peft = pytest.importorskip("peft")
    settings = {"r": 4, "lora_alpha": 12, "target_modules": ["q_proj", "lm_head"], **settings}
    model = peft.get_peft_model(tiny_llama(), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0.0, 0.3)
    return model


def test_a_lora_on_the_head() -> None:
    """Log-probs and gradients of the adapters are those of the wrapped model's own logits."""
    model = adapted()
    ids = torch.tensor([[9, 30, 31, 80, 200, 17, 42]])
    own = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
    learned = [w for w in model.parameters() if w.requires_grad]
    assert len(learned) == 2 * 2 + 2  # two layers and the head
    expected = torch.autograd.grad((own * torch.arange(6)).sum(), learned)
    hidden = model.get_base_model().model(input_ids=ids).last_hidden_state[0, :-1]
    for chunk in (2, None):
        found = token_logps(hidden, head(model), ids[0, 1:], chunk=chunk)
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
        grads = torch.autograd.grad((found * torch.arange(6)).sum(), learned, retain_graph=True)
        for a, b in zip(grads, expected, strict=True):
            assert (a - b).norm() <= 1e-5 * b.norm()
    with model.disable_adapter():
        assert head(model).adapters == ()
    model.merge_adapter()
    merged = head(model)
    assert merged.adapters == ()
    torch.testing.assert_close(token_logps(hidden, merged, ids[0, 1:]), own, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["use_dora", "lora_bias"])
def test_a_lora_of_another_kind_on_the_head_is_refused(kind: str) -> None:
    with pytest.raises(InputError, match="plain LoRA"):
        head(adapted(**{kind: True}))


def test_a_head_that_is_trained_beside_adapters() -> None:
    model = adapted(target_modules=["q_proj"], modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_base_model().lm_head.modules_to_save["default"].weight.mul_(2)
    assert torch.equal(head(model).weight, 2 * tiny_llama().lm_head.weight)
    assert head(model).weight.requires_grad
    with model.disable_adapter():
        assert torch.equal(head(model).weight, tiny_llama().lm_head.weight)


def test_a_model_without_a_linear_head() -> None:
    config = LlamaConfig(**SIZES, vocab_size=64, num_labels=1)
    with pytest.raises(InputError, match="no plain linear language-model head"):
        head(AutoModelForSequenceClassification.from_config(config))

    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    model = tiny_llama()
    model.lm_head = Scaled(32, 272, bias=False)
    with pytest.raises(InputError, match="no plain linear language-model head"):
        head(model)
