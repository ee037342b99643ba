"""Reward models on encoders: what transformers says, whatever else is in the batch, and back from a directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BertConfig,
    LlamaConfig,
    ModernBertDecoderConfig,
)

import steerwell as sw
from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.types import Completion, CompletionGroup
from steerwell.models import encoder
from steerwell.models.batch import build, layout_for, padded, rows
from steerwell.models.encoder import head_parts, is_encoder, output_layer, positions
from steerwell.models.forward import reward_scores
from steerwell.models.load import load_policy
from steerwell.models.load_reward_model import load_reward_model
from steerwell.models.pairs import pair_frame, tokenize_pairs
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import ScoringRecipe
from tiny import tiny_policy_dir, tiny_tokenizer
from tiny_encoders import (
    FAMILIES,
    byte_pieces,
    classifier_dir,
    encoder_dir,
    tiny_encoder,
    word_pieces,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*reference_compile.*")


def group(prompt: str, *texts: str) -> CompletionGroup:
    asked = (Message("user", prompt),)
    return CompletionGroup(asked, tuple(Completion(asked, (Message("assistant", t),)) for t in texts))


GROUPS = [
    group("why is it so?", "because it is.", "no idea, ask me again some other day if you like"),
    group("a", "b"),
    group("say a few words about the sea, please", "blue", "wet and wide and old", "x"),
]


def theirs(path: Path, groups: list[CompletionGroup]) -> list[list[float]]:
    """The logits of transformers' own classifier, one pair of texts at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    with torch.no_grad():
        return [
            [
                model(**tokenizer(g.prompt[0].content, c.text, return_tensors="pt")).logits.item()
                for c in g.completions
            ]
            for g in groups
        ]


def flat(values: list[list[float]]) -> torch.Tensor:
    return torch.tensor([x for some in values for x in some])


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_the_logits_of_transformers(family: str, tmp_path: Path) -> None:
    path = classifier_dir(tmp_path, family)
    expected = theirs(path, GROUPS)
    assert flat(expected).std() > 0.02  # it tells texts apart
    model = load_reward_model(path)
    assert model.recipe == ScoringRecipe("cls", template="pair")
    torch.testing.assert_close(flat(model.score(GROUPS)), flat(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_score_does_not_depend_on_its_neighbours(family: str, pooling: str, tmp_path: Path) -> None:
    model = load_reward_model(classifier_dir(tmp_path, family))
    model.recipe = ScoringRecipe(pooling, template="pair")  # type: ignore[arg-type]
    together = flat(model.score(GROUPS))
    alone = torch.cat(
        [flat(model.score([group(g.prompt[0].content, c.text)])) for g in GROUPS for c in g.completions]
    )
    assert alone.std() > 0.02
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    shuffled = flat(model.score([GROUPS[2], GROUPS[0]], max_tokens=40))
    torch.testing.assert_close(shuffled, torch.cat([together[3:], together[:2]]), rtol=1e-5, atol=1e-5)


def test_the_mean_is_over_the_tokens_of_the_completion(tmp_path: Path) -> None:
    """By hand: hidden states after the first [SEP], the last [SEP] among them."""
    model = load_reward_model(classifier_dir(tmp_path, "bert"))
    ids = model.tokenizer("why", "no, so", return_tensors="pt")
    with torch.no_grad():
        hidden = model.model.bert(**ids).last_hidden_state[0]
        second = ids["token_type_ids"][0].bool()
        expected = model.model.classifier(hidden[second].mean(0)).item()
    model.recipe = ScoringRecipe("mean", template="pair")
    assert model.score([group("why", "no, so")])[0][0] == pytest.approx(expected, abs=1e-6)


def test_token_types_are_told_only_where_the_tokenizer_tells_them(tmp_path: Path) -> None:
    path = classifier_dir(tmp_path, "bert")
    with_types = load_reward_model(path).score(GROUPS)
    word_pieces(model_input_names=["input_ids", "attention_mask"]).save_pretrained(path)
    without = load_reward_model(path).score(GROUPS)
    torch.testing.assert_close(flat(without), flat(theirs(path, GROUPS)), rtol=1e-5, atol=1e-5)
    assert (flat(with_types) - flat(without)).abs().max() > 1e-3


# Pairs of texts


@pytest.mark.parametrize("make", [word_pieces, byte_pieces])
def test_a_pair_is_the_tokenizers_own(make) -> None:
    tokenizer = make()
    made = tokenize_pairs(tokenizer, GROUPS)
    for tokens in made:
        for sequence, completion in zip(tokens.sequences, tokens.group.completions, strict=True):
            own = tokenizer(tokens.group.prompt[0].content, completion.text)
            assert sequence.ids == own.input_ids
            if "token_type_ids" in own:
                assert own.token_type_ids.index(1) == sequence.n_prompt
    assert [t.truncated for t in made] == [[False] * 2, [False], [False] * 3]
    assert not any(t.cut_prompts for t in made)


def test_frames_by_hand() -> None:
    frame = pair_frame(word_pieces())
    assert (frame.before, frame.between, frame.after, frame.segments) == ((2,), (3,), (3,), True)
    frame = pair_frame(byte_pieces())
    assert (frame.before, frame.between, frame.after, frame.segments) == ((0,), (2, 2), (2,), False)
    with pytest.raises(InputError, match="nothing between the two texts"):
        pair_frame(tiny_tokenizer())


def test_conversations_are_lines_of_role_and_words() -> None:
    prompt = (
        Message("system", "be kind"),
        Message("user", "hi"),
        Message("assistant", "yes?"),
        Message("user", "go"),
    )
    call = Message("assistant", "", '{"tool_calls":["x"]}')
    completions = (
        Completion(prompt, (Message("assistant", "well, no"),)),
        Completion(prompt, (call, Message("tool", "done"), Message("assistant", "ok"))),
    )
    tokenizer = word_pieces()
    first, second = tokenize_pairs(tokenizer, [CompletionGroup(prompt, completions)])[0].sequences
    asked = "system: be kind\nuser: hi\nassistant: yes?\nuser: go"
    assert first.ids == tokenizer(asked, "well, no").input_ids
    said = 'assistant: {"tool_calls":["x"]}\ntool: done\nassistant: ok'
    assert second.ids == tokenizer(asked, said).input_ids


def test_what_is_too_long_loses_the_beginning_of_its_prompt_first() -> None:
    tokenizer = word_pieces()
    long = group("abcdefgh", "xyz", "klmnopqrstuv")
    letters = tokenizer("abcdefgh", add_special_tokens=False).input_ids
    short, other = (
        tokenizer("xyz", add_special_tokens=False).input_ids,
        tokenizer("klmnopqrstuv", add_special_tokens=False).input_ids,
    )
    found = tokenize_pairs(tokenizer, [long], 10)[0]  # 3 special tokens, 7 of text
    assert found.sequences[0].ids == [2, *letters[-4:], 3, *short, 3]
    assert found.sequences[1].ids == [2, 3, *other[:7], 3]
    assert [s.n_prompt for s in found.sequences] == [6, 2]
    assert found.truncated == [False, True]
    assert found.cut_prompts == 2
    alone = tokenize_pairs(tokenizer, [group("abcdefgh", "xyz")], 10)[0]
    assert alone.sequences[0] == found.sequences[0]
    whole = tokenize_pairs(tokenizer, [long], 15)[0]
    assert (whole.truncated, whole.cut_prompts) == ([False, False], 1)
    with pytest.raises(InputError, match="holds no text beside 3 special tokens"):
        tokenize_pairs(tokenizer, [long], 3)


def test_completions_that_say_nothing_are_refused() -> None:
    asked = (Message("user", "well?"),)
    for messages, what in (
        ((Message("assistant", " "),), "an empty completion"),
        ((Message("user", "me"),), "no assistant message"),
    ):
        silent = CompletionGroup(asked, (Completion(asked, messages),))
        with pytest.raises(InputError, match=f"{what}.*well"):
            tokenize_pairs(word_pieces(), [silent])


def test_a_score_reads_no_more_than_the_model_can(tmp_path: Path) -> None:
    """RoBERTa counts positions from behind the padding's: 130 in its configuration are 128 tokens."""
    long = [group("q " * 300, "no"), group("why", "z " * 500)]
    for family, limit in (("bert", 128), ("roberta", 128), ("deberta", 128)):
        model = load_reward_model(classifier_dir(tmp_path, family))
        assert positions(model.model) == limit
        assert [len(s.ids) for t in model.tokenize(long) for s in t.sequences] == [limit, limit]
        assert flat(model.score(long)).isfinite().all()
        model.recipe = ScoringRecipe("cls", template="pair", max_length=40)
        assert [len(s.ids) for t in model.tokenize(long, 50) for s in t.sequences] == [40, 40]


# What an encoder is, and what is refused


def test_what_an_encoder_is() -> None:
    assert all(is_encoder(tiny_encoder(family).config) for family in FAMILIES)
    others = (LlamaConfig(), BartConfig(), BertConfig(is_decoder=True), ModernBertDecoderConfig())
    assert not any(map(is_encoder, others))


def test_a_batch_of_an_encoder_is_padded(tmp_path: Path) -> None:
    model = load_reward_model(classifier_dir(tmp_path, "bert"))
    assert [layout_for(wish, model.model) for wish in ("auto", "rows")] == ["padded", "padded"]
    with pytest.raises(InputError, match="cannot share prompts: it has attention that reads both ways"):
        layout_for("tree", model.model)
    with pytest.raises(RuntimeError, match="takes padded rows"):
        reward_scores(model.model, rows(model.tokenize(GROUPS)), "cls")
    with pytest.raises(ValueError, match="choose cls or mean"):
        reward_scores(model.model, build(model.tokenize(GROUPS), "padded"), "last")


def test_the_padding_is_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the mask the check on loading fires."""
    path = classifier_dir(tmp_path, "bert")
    own = encoder._inputs

    def all_seen(model, batch):
        return {**own(model, batch), "attention_mask": torch.ones_like(batch.input_ids)}

    monkeypatch.setattr(encoder, "_inputs", all_seen)
    with pytest.raises(InputError, match="gives other numbers for a row beside longer ones"):
        load_reward_model(path)


def test_an_encoder_writes_nothing(tmp_path: Path) -> None:
    path = encoder_dir(tmp_path, "bert")
    with pytest.raises(InputError, match="BertModel, an encoder: it reads both ways and cannot write"):
        load_policy(path)
    with pytest.raises(InputError, match="cannot write"):
        load_policy(encoder_dir(tmp_path, "modernbert", AutoModelForMaskedLM))


def test_recipes_of_encoders_and_of_decoders() -> None:
    with pytest.raises(InputError, match="pooling 'cls' is for encoders"):
        ScoringRecipe("cls")
    with pytest.raises(InputError, match=r"pooling 'last' is for decoders.*mean or cls"):
        ScoringRecipe("last", template="pair")
    with pytest.raises(InputError, match="unknown template 'pairs'"):
        ScoringRecipe("cls", template="pairs")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="max_length of a scoring recipe is for encoders"):
        ScoringRecipe(max_length=10)


def test_directories_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="BertModel, not a reward model"):
        load_reward_model(encoder_dir(tmp_path, "bert"))
    with pytest.raises(InputError, match="has 3 labels"):
        load_reward_model(classifier_dir(tmp_path / "three", "bert", labels=3))
    with pytest.raises(InputError, match="this is no encoder"):
        RewardModel.from_encoder(tiny_policy_dir(tmp_path))
    with pytest.raises(InputError, match="qlora is for language models"):
        RewardModel.from_encoder(encoder_dir(tmp_path, "bert"), lora=2, adapter="qlora")
    path = classifier_dir(tmp_path / "chat", "bert")
    (path / "steerwell_scoring.json").write_text('{"version": 1, "pooling": "last"}')
    with pytest.raises(InputError, match="the template of an encoder is pair"):
        load_reward_model(path)
    path = classifier_dir(tmp_path / "plain", "bert")
    tiny_tokenizer().save_pretrained(path)
    with pytest.raises(InputError, match="nothing between the two texts"):
        load_reward_model(path)


# New reward models


@pytest.mark.parametrize("kind", ["bare", "masked", "labels"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_new_head_is_close_to_zero_and_always_the_same(family: str, kind: str, tmp_path: Path) -> None:
    if kind == "labels":
        path = classifier_dir(tmp_path, family, labels=3)
    else:
        path = encoder_dir(tmp_path, family, *([AutoModelForMaskedLM] if kind == "masked" else []))
    one, two = RewardModel.from_encoder(path), RewardModel.from_encoder(path)
    assert one.digest() == two.digest()
    assert output_layer(one.model).out_features == 1
    scores = flat(one.score(GROUPS))
    assert 0 < scores.abs().max() < 0.05
    assert scores.tolist() == flat(two.score(GROUPS)).tolist()
    saved = one.save(tmp_path / "saved")
    assert load_reward_model(saved).digest() == one.digest()
    torch.testing.assert_close(flat(theirs(saved, GROUPS)), scores, rtol=1e-4, atol=1e-7)


def test_the_head_of_a_new_mean_is_its_output_layer_alone(tmp_path: Path) -> None:
    model = RewardModel.from_encoder(encoder_dir(tmp_path, "deberta"), pooling="mean", max_length=30)
    trained = {name for name, p in model.model.named_parameters() if p.requires_grad}
    assert "classifier.weight" in trained
    assert "classifier.bias" not in trained
    assert not any(name.startswith("pooler") for name in trained)
    again = load_reward_model(model.save(tmp_path / "saved"))
    assert again.recipe == ScoringRecipe("mean", template="pair", max_length=30)
    assert {name for name, p in again.model.named_parameters() if p.requires_grad} == trained
    torch.testing.assert_close(flat(again.score(GROUPS)), flat(model.score(GROUPS)), rtol=1e-5, atol=1e-8)


def test_a_backbone_must_be_whole(tmp_path: Path) -> None:
    path = encoder_dir(tmp_path, "bert")
    weights = load_file(path / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        InputError, match=r"1 weights of a BertForSequenceClassification are missing \(bert.encoder"
    ):
        RewardModel.from_encoder(path)


def test_a_directory_of_sentence_transformers(tmp_path: Path) -> None:
    """Its model lies in the same folder, or in that of its first module."""
    inside = encoder_dir(tmp_path, "bert")
    expected = RewardModel.from_encoder(inside).digest()
    outer = tmp_path / "sentences"
    shutil.copytree(inside, outer / "0_Transformer")
    modules = [{"idx": 0, "path": "0_Transformer"}, {"idx": 1, "path": "1_Pooling"}]
    (outer / "modules.json").write_text(json.dumps(modules))
    assert RewardModel.from_encoder(outer).digest() == expected
    (inside / "modules.json").write_text(json.dumps([{"idx": 0, "path": ""}]))
    assert RewardModel.from_encoder(inside).digest() == expected
    (outer / "modules.json").write_text("[]")
    with pytest.raises(InputError, match=r"no config\.json"):
        RewardModel.from_encoder(outer)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_adapter_leaves_the_head_to_be_trained_whole(family: str, tmp_path: Path) -> None:
    path = encoder_dir(tmp_path, family)
    plain = RewardModel.from_encoder(path)
    model = RewardModel.from_encoder(path, lora=2)
    torch.testing.assert_close(flat(model.score(GROUPS)), flat(plain.score(GROUPS)), rtol=1e-5, atol=1e-8)
    inner = model.model.get_base_model()
    bias = output_layer(inner).bias  # it moves all scores alike, and stays at 0
    head = {id(p) for part in head_parts(inner) for p in part.parameters() if p is not bias}
    trained = {id(p) for n, p in model.model.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == head
    assert not any("lora_" in name for part in head_parts(inner) for name, _ in part.named_parameters())
    batch = padded(model.tokenize(GROUPS))
    reward_scores(model.model, batch, "cls").sum().backward()
    stepped = [p for p in model.model.parameters() if p.requires_grad]
    torch.optim.SGD(stepped, lr=0.5).step()
    after = flat(model.score(GROUPS))
    assert (after - flat(plain.score(GROUPS))).abs().max() > 1e-3
    saved = model.save(tmp_path / "saved")
    torch.testing.assert_close(flat(load_reward_model(saved).score(GROUPS)), after, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(flat(theirs(saved, GROUPS)), after, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="has no linear layer 'classifier'"):
        RewardModel.from_encoder(path, lora=2, lora_targets=["classifier"])


def test_a_causal_model_of_bert_is_no_policy(tmp_path: Path) -> None:
    path = encoder_dir(tmp_path, "bert", AutoModelForCausalLM)
    with pytest.raises(InputError, match="cannot write"):
        sw.load_policy(path)
