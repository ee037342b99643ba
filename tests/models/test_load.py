"""Models in and out of directories: equal after a round trip, whole or absent, and every bad directory refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from architectures import make
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    CohereConfig,
    LlamaConfig,
)
from transformers.utils import logging as hf_logging

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models import directory, load, reward_model
from steerwell.models.batch import build
from steerwell.models.forward import per_token_logps, reward_scores
from steerwell.models.load import (
    Policy,
    load_policy,
    weights_digest,
)
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import ScoringRecipe
from tiny import END, SIZES, VOCAB, tiny_llama, tiny_policy_dir, tiny_qwen3, tiny_tokenizer


def groups() -> list[CompletionGroup]:
    made = []
    for ask, answers in (
        ("hi you", ("yes", "no, the other")),
        ("why the", ("in an", "er", "in an")),
        ("x", ()),
    ):
        prompt = as_messages(ask)
        completions = tuple(Completion(prompt, (Message("assistant", text),)) for text in answers)
        made.append(CompletionGroup(prompt, completions))
    return made


@pytest.fixture
def policy(tmp_path: Path) -> Policy:
    return load_policy(tiny_policy_dir(tmp_path))


def step(model, batch) -> None:
    """One optimizer step on the log-probs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    per_token_logps(model, batch).sum().backward()
    torch.optim.SGD(trained, lr=0.05).step()
    model.zero_grad()


def test_load_and_save_a_policy(policy: Policy, tmp_path: Path) -> None:
    assert policy.name == "tiny"
    assert policy.device.type == "cpu"
    assert not policy.model.training
    before = policy.logps(groups())
    assert [len(values) for values in before] == [2, 3, 0]
    assert before[1][0] == pytest.approx(before[1][2], abs=1e-4)
    assert all(value < -1 for values in before for value in values)
    path = policy.save(tmp_path / "deep" / "er" / "saved")
    again = load_policy(path, name="again")
    assert again.name == "again"
    assert again.logps(groups()) == before
    assert again.digest() == policy.digest()
    assert sorted(p.name for p in path.parent.iterdir()) == ["saved"]
    config = json.loads((path / "config.json").read_text())
    assert "steerwell" not in json.dumps(config)
    theirs = AutoModelForCausalLM.from_pretrained(path)  # loads without us, with its own attention
    ids = torch.tensor([policy.tokenize(groups())[0].sequences[0].ids])
    assert theirs(input_ids=ids).logits.shape == (1, ids.shape[1], VOCAB)


def test_logps_do_not_depend_on_the_batch(policy: Policy) -> None:
    whole = policy.logps(groups())
    for values, alone in zip(policy.logps(groups(), max_tokens=1), whole, strict=True):
        assert values == pytest.approx(alone, abs=1e-4)
    policy.model.train()
    policy.logps(groups())
    assert policy.model.training  # left as it was found


def test_stop_tokens(policy: Policy) -> None:
    assert policy.stop_ids == (END,)
    policy.model.generation_config.eos_token_id = [END, 40]
    assert policy.stop_ids == (END, 40)
    policy.tokenizer.eos_token = "<|begin|>"
    assert policy.stop_ids == (END, 2, 40)


def test_a_digest_follows_the_weights(policy: Policy) -> None:
    first = policy.digest()
    assert first == policy.copy().digest() == weights_digest(policy.model)
    batch = build(policy.tokenize(groups()[:1]))
    seen = {first}
    for fused in (False, True):
        optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3, fused=fused)
        per_token_logps(policy.model, batch).sum().backward()
        optimizer.step()
        seen.add(policy.digest())
    assert len(seen) == 3
    assert policy.digest() == weights_digest(policy.model)


def test_a_digest_is_not_computed_twice(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    first = policy.digest()
    monkeypatch.setattr(directory, "weights_digest", lambda model: pytest.fail("computed again"))
    assert policy.digest() == first


def test_a_copy_is_independent(policy: Policy) -> None:
    other = policy.copy()
    step(other.model, build(other.tokenize(groups()[:1])))
    assert other.digest() != policy.digest()
    assert other.logps(groups()) != policy.logps(groups())


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_reward_model_round_trip(tmp_path: Path, make, pooling) -> None:
    policy = load_policy(tiny_policy_dir(tmp_path, model=make()))
    model = RewardModel.from_policy(policy, pooling=pooling)
    assert model.name == "tiny-reward"
    start = model.score(groups())
    assert [len(scores) for scores in start] == [2, 3, 0]
    assert max(abs(x) for scores in start for x in scores) < 0.2
    with torch.no_grad():
        model.model.score.weight.mul_(100)
    model.recipe = ScoringRecipe(pooling, mean=0.5, std=2.0)
    scores = model.score(groups())
    assert scores[0][0] == pytest.approx((100 * start[0][0] - 0.5) / 2, rel=1e-4)
    again = load_reward_model(model.save(tmp_path / "rm"))
    assert again.recipe == model.recipe
    assert again.score(groups()) == scores
    assert again.digest() == model.digest()
    assert again.digest() != RewardModel(again.model, again.tokenizer).digest()  # the recipe counts
    for max_tokens in (1, 40):
        for a, b in zip(again.score(groups(), max_tokens=max_tokens), scores, strict=True):
            assert a == pytest.approx(b, abs=1e-5)
    for layout in ("tree", "rows"):
        raw = reward_scores(model.model, build(model.tokenize(groups()[:2]), layout), pooling).tolist()
        assert [(x - 0.5) / 2 for x in raw] == pytest.approx([*scores[0], *scores[1]], abs=1e-5)
    if pooling == "last":  # what transformers itself says about the directory
        theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm")
        ids = torch.tensor([model.tokenize(groups())[0].sequences[1].ids])
        assert theirs(input_ids=ids).logits.item() * 0.5 - 0.25 == pytest.approx(scores[0][1], abs=1e-4)
    assert model.copy().score(groups()) == scores


def test_a_reward_model_starts_from_the_policys_backbone(policy: Policy) -> None:
    model = RewardModel.from_policy(policy)
    assert model.digest() == RewardModel.from_policy(policy).digest()  # the new head is always the same
    pairs = zip(policy.model.base_model.named_parameters(), model.model.base_model.parameters(), strict=True)
    for (name, a), b in pairs:
        assert torch.equal(a, b), name
        assert a.data_ptr() != b.data_ptr()
    assert all(p.requires_grad for p in model.model.parameters())
    assert model.model.config.pad_token_id == 0


def test_a_reward_model_without_a_recipe_reads_the_last_token(tmp_path: Path, policy: Policy) -> None:
    path = RewardModel.from_policy(policy).save(tmp_path / "rm")
    (path / reward_model.SCORING_FILE).unlink()
    assert load_reward_model(path).recipe == ScoringRecipe("last", 0.0, 1.0)
    for text, what in (
        ('{"pooling": "first"}', "unknown pooling 'first'"),
        ('{"std": 0}', "positive"),
        ('{"poling": "last"}', "not a scoring recipe"),
        ("[", "not JSON"),
    ):
        (path / reward_model.SCORING_FILE).write_text(text)
        with pytest.raises(InputError, match=what):
            load_reward_model(path)


def test_saving_replaces_a_model_and_nothing_else(policy: Policy, tmp_path: Path) -> None:
    path = policy.save(tmp_path / "out")
    (path / "left-over.txt").write_text("old")
    step(policy.model, build(policy.tokenize(groups()[:1])))
    policy.save(path)
    assert not (path / "left-over.txt").exists()
    assert load_policy(path).digest() == policy.digest()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    with pytest.raises(InputError, match="not a model is in the way"):
        policy.save(tmp_path / "notes")
    assert (tmp_path / "notes" / "a.txt").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    policy.save(tmp_path / "empty")


def test_an_interrupted_save_leaves_what_was_there(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = policy.save(tmp_path / "out")
    digest = policy.digest()
    step(policy.model, build(policy.tokenize(groups()[:1])))

    def interrupted(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(policy.tokenizer, "save_pretrained", interrupted)
    for target in (path, tmp_path / "new"):
        with pytest.raises(KeyboardInterrupt):
            policy.save(target)
    assert load_policy(path).digest() == digest
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny"]


def test_no_progress_bars_and_no_lasting_settings(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = tiny_policy_dir(tmp_path)
    capfd.readouterr()
    level, bars = hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()
    load_policy(path).save(tmp_path / "out")
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert (hf_logging.get_verbosity(), hf_logging.is_progress_bar_enabled()) == (level, bars)


def refused(path: str | Path, what: str, load=load_policy) -> None:
    with pytest.raises(InputError, match=what) as error:
        load(path)
    assert str(path) in str(error.value) or error.value.file is None
    assert error.value.mend
    assert "\n" not in str(error.value)


def test_a_missing_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "nowhere", "no such model directory")
    refused("./nowhere", "no such model directory")
    refused("runs/nowhere", "no such model directory")
    refused("nowhere", "no such model directory")
    refused("file", "not a directory")
    refused("nowhere", "no such model directory", load_reward_model)


def test_a_hub_name_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bool] = []

    def absent(*_args, local_files_only: bool, **_kwargs):
        asked.append(local_files_only)
        raise OSError("nobody/nothing is not a model identifier\nand more lines")

    monkeypatch.setattr(load.AutoTokenizer, "from_pretrained", absent)
    monkeypatch.setattr(load, "from_hub", lambda place: True)
    refused("nobody/nothing", "no model of this name")
    assert asked == [False]


def test_without_a_network_the_hub_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    tried: list[tuple[str, int]] = []

    def nowhere(address: tuple[str, int], timeout: float):
        tried.append(address)
        raise OSError("Name or service not known")

    monkeypatch.setattr(directory, "getproxies", dict)
    monkeypatch.setattr(directory.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(directory.constants, "ENDPOINT", "https://hub.invalid")
    monkeypatch.setattr(directory.socket, "create_connection", nowhere)
    refused("nobody/nothing", "no such directory, and no model of this name from the hub")
    assert tried == [("hub.invalid", 443)]  # asked once, and then nothing went over the network
    assert "Retrying" not in capfd.readouterr().err
    monkeypatch.setattr(directory.constants, "HF_HUB_OFFLINE", True)
    refused("nobody/nothing", "no model of this name from the hub")
    assert len(tried) == 1
    assert not directory.from_hub(str(Path(__file__).parent))
    monkeypatch.setattr(directory.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(directory, "getproxies", lambda: {"https": "http://proxy.invalid:1"})
    assert directory.from_hub("nobody/nothing")  # only the proxy knows


def test_incomplete_directories(tmp_path: Path) -> None:
    path = tiny_policy_dir(tmp_path)

    def without(*names: str) -> Path:
        target = tmp_path / "-".join(("without", *names))
        target.mkdir()
        for file in path.iterdir():
            if file.name not in names:
                (target / file.name).write_bytes(file.read_bytes())
        return target

    refused(without("config.json"), "no config.json")
    refused(without("model.safetensors"), "no weights")
    refused(without("tokenizer.json", "tokenizer_config.json"), "no tokenizer in this directory")
    refused(without("chat_template.jinja"), "no chat template")
    pickled = without("model.safetensors", "generation_config.json")
    (pickled / "pytorch_model.bin").write_bytes(b"not even read")
    refused(pickled, r"the weights are a pickle \(pytorch_model.bin\)")
    broken = without("generation_config.json", "nothing")
    (broken / "model.safetensors").write_bytes(b"cut short")
    refused(broken, "could not be loaded")
    mangled = without("nothing", "else")
    (mangled / "config.json").write_text("{")
    refused(mangled, "not JSON")
    mangled = without("nothing", "at", "all")
    (mangled / "tokenizer.json").write_text("{}")
    refused(mangled, "no tokenizer could be loaded")
    adapter = without("config.json", "model.safetensors")
    (adapter / "adapter_config.json").write_text("{}")
    refused(adapter, "an adapter without its base model")
    unknown = without("a", "b")
    (unknown / "config.json").write_text('{"model_type": "nonesuch"}')
    refused(unknown, "could not be loaded|no tokenizer")


def test_models_that_do_not_fit(tmp_path: Path) -> None:
    refused(tiny_policy_dir(tmp_path, name="small", model=tiny_llama(100)), "272 tokens but the model has")
    refused(tiny_policy_dir(tmp_path), "a LlamaForCausalLM, not a reward model", load_reward_model)
    labels = AutoModelForSequenceClassification.from_config(
        LlamaConfig(**{**SIZES, "vocab_size": VOCAB, "num_labels": 3})
    )
    refused(tiny_policy_dir(tmp_path, name="three", model=labels), "3 labels", load_reward_model)
    refused(
        tiny_policy_dir(tmp_path, name="three", model=labels),
        "weights of a LlamaForCausalLM are missing .lm_head.weight",
    )


@pytest.mark.filterwarnings("ignore")
def test_a_hybrid_is_scored_and_sampled_with_one_sequence_per_row(tmp_path: Path) -> None:
    """Convolutional layers carry a state, which no plan can part: the model keeps its own attention."""
    policy = load_policy(tiny_policy_dir(tmp_path, model=make("lfm2", vocab_size=VOCAB)))
    groups = policy.sample(["is tea hot", "why"], 3, max_new_tokens=7)
    sums = policy.logps(groups, max_tokens=40)
    for group, found in zip(groups, sums, strict=True):
        for completion, total in zip(group.completions, found, strict=True):
            assert completion.token_ids
            ids = torch.tensor([[*completion.prompt_token_ids, *completion.token_ids]])
            with torch.no_grad():
                own = (
                    policy.model(input_ids=ids).logits[0, -len(completion.token_ids) - 1 : -1].log_softmax(-1)
                )
            picked = own.gather(1, torch.tensor(completion.token_ids)[:, None])
            assert total == pytest.approx(float(picked.sum()), abs=1e-4)
            assert completion.old_logps == pytest.approx(picked[:, 0].tolist(), abs=1e-5)


def test_the_type_of_weights_follows_the_device() -> None:
    assert load.number_type(None, torch.device("cpu")) == torch.float32
    assert load.number_type(None, torch.device("cuda", 1)) == torch.bfloat16
    assert load.number_type("float32", torch.device("cuda")) == torch.float32
    assert load.number_type(torch.float64, torch.device("cuda")) == torch.float64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_model_saved_in_fp32_is_bf16_on_a_gpu(tmp_path: Path) -> None:
    path = tiny_policy_dir(tmp_path)
    assert load_policy(path).model.dtype == torch.bfloat16
    assert load_policy(path, dtype="fp32").model.dtype == torch.float32
    assert load_policy(path, device="cpu").model.dtype == torch.float32


def test_a_policy_without_a_classifier(tmp_path: Path) -> None:
    config = CohereConfig(**SIZES, vocab_size=VOCAB)
    policy = load_policy(tiny_policy_dir(tmp_path, model=AutoModelForCausalLM.from_config(config)))
    with pytest.raises(InputError, match="sequence classifier"):
        RewardModel.from_policy(policy)


def test_no_template_tokenizer_and_dtype(tmp_path: Path) -> None:
    refused(tiny_policy_dir(tmp_path, tokenizer=tiny_tokenizer(None)), "no chat template")
    path = tiny_policy_dir(tmp_path, name="half", model=tiny_llama().bfloat16())
    assert next(load_policy(path).model.parameters()).dtype == torch.float32
    half = load_policy(path, dtype="bfloat16")
    assert next(half.model.parameters()).dtype == torch.bfloat16
    for dtype in ("bf16", "torch.bfloat16", torch.bfloat16):
        assert load_policy(path, dtype=dtype).model.dtype == torch.bfloat16
    with pytest.raises(InputError, match=r"unknown dtype .bf61.\. .*.bf16."):
        load_policy(path, dtype="bf61")
    assert half.logps(groups())[0] == pytest.approx(load_policy(path).logps(groups())[0], rel=0.05)
