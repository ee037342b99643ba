"""Bad input to a run: a clear line that names what it is about, and nothing lost."""

from __future__ import annotations

import json
import math
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from small_runs import LengthJudge, largest_difference, lines, pair_groups, text_group, tiny_policy, weights
from transformers import AutoModelForCausalLM, CohereConfig

from steerwell.cli import main
from steerwell.data.errors import InputError
from steerwell.data.messages import Message, conversation_id
from steerwell.data.types import Completion, CompletionGroup, Pair
from steerwell.models.load import Policy
from steerwell.train import TrainingError, checkpoint, rollouts, train
from tiny import END, SIZES, VOCAB, tiny_llama, tiny_policy_dir, tiny_tokenizer

SETTINGS: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 4, "steps": 3, "warmup": 0.0}
PAIR = (Pair(0, 1),)
STRICT = (
    "{% for m in messages %}{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
    "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Outcome:
    """What a command left."""

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of an error, after whatever progress was told."""
        found = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(found) == 1, self.err
        assert "Traceback" not in self.err
        return found[0]


@pytest.fixture
def steerwell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Outcome]:
    """Write rows to ``prefs.jsonl`` and train on them by the command line, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(rows: list[Any], *words: str, objective: str = "dpo", **settings: Any) -> Outcome:
        Path("prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"steps": 3, "batch_size": 4, "learning_rate": 1e-3, **settings}
        table = "".join(f"{name} = {value}\n" for name, value in settings.items())
        Path("r.toml").write_text(
            f'model = "tiny"\ndata = "prefs.jsonl"\nobjective = "{objective}"\nout = "run"\n[train]\n{table}'
        )
        capsys.readouterr()
        status = main(["train", "r.toml", *words])
        said = capsys.readouterr()
        return Outcome(status, said.out, said.err)

    tiny_policy_dir(tmp_path)
    return command


def row(prompt: Any, chosen: str = "yes", rejected: str = "not at all") -> dict[str, Any]:
    if isinstance(prompt, list):
        return {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
        }
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


ROWS = [row(f"Say {i} times {word}.") for i, word in enumerate(("apple", "brick", "cloud", "drum"))]


def test_a_prompt_that_is_too_long_is_left_out_and_counted(steerwell: Any) -> None:
    done = steerwell([*ROWS, row("why " * 60)], max_length=60)
    assert done.status == 0, done.err
    assert "left out 1 of 5 groups: the prompt leaves no room in max_length=60" in done.out
    assert json.loads(Path("run/run.json").read_text())["data"]["groups"] == 4


def test_when_most_prompts_are_too_long_the_run_is_refused(steerwell: Any) -> None:
    done = steerwell([*ROWS, *(row(f"{word} " * 60) for word in "abcde")], max_length=60)
    assert done.status == 2
    assert "prefs.jsonl: 5 of 9 groups cannot be used; the first: a prompt of" in done.error
    assert "(prompt m1-" in done.error
    assert "'a a a" in done.error
    assert "Raise max_length" in done.error
    assert not Path("run").exists()


def test_a_row_that_is_longer_than_the_model_reads(steerwell: Any) -> None:
    done = steerwell([*ROWS, row("why", "on and on " * 200)])
    assert done.status == 2
    assert "prefs.jsonl: a prompt with its completion has" in done.error
    assert "the model reads 1024 (prompt m1-" in done.error
    assert "'why')" in done.error
    assert "Give max_length = 1024 or less" in done.error
    assert not Path("run").exists()


def test_a_completion_that_is_cut_to_nothing_that_is_scored(tmp_path: Path) -> None:
    asked = (Message("user", "a"), Message("assistant", "b"))
    long = (Message("user", "word " * 20), Message("assistant", "c"))
    other = (Message("user", "x"), Message("assistant", "d"))
    turns = CompletionGroup(asked, (Completion(asked, long), Completion(asked, other)), pairs=PAIR)
    train(tiny_policy(), [*pair_groups(3), turns], "dpo", out=tmp_path / "a", max_length=48, **SETTINGS)
    data = json.loads((tmp_path / "a" / "run.json").read_text())["data"]
    assert data["left_out"] == {"a completion has no token to score": 1}
    with pytest.raises(InputError, match=r"1 of 1 groups cannot be used.*after it was cut.*Raise max_length"):
        train(tiny_policy(), [turns], "dpo", out=tmp_path / "b", max_length=48, **SETTINGS)


@pytest.mark.parametrize("text", ["", " \n"])
def test_an_empty_completion_is_refused_by_name(tmp_path: Path, text: str) -> None:
    empty = text_group("why the silence", ["something", text], pairs=PAIR)
    with pytest.raises(InputError, match=r"an empty completion to 'why the silence' \(prompt") as error:
        train(tiny_policy(), [*pair_groups(), empty], "dpo", out=tmp_path / "a" / "b", **SETTINGS)
    assert empty.prompt_id in str(error.value)
    assert "Drop it" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_loss_that_is_not_finite(steerwell: Any, tmp_path: Path) -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids("z")] = math.nan
    tiny_policy_dir(tmp_path, model=model)
    done = steerwell([*ROWS, row("zoo")], steps=5, batch_size=1, checkpoint_every=1)
    assert done.status == 1
    step = len(lines(Path("run"))) + 1
    zoo = conversation_id((Message("user", "zoo"),))
    assert done.error == f"error: the loss of step {step} is not finite; prompts: {zoo}"
    assert step > 1
    kept = checkpoint.latest_checkpoint(Path("run/checkpoints"), Path("run/metrics.jsonl"))
    assert kept is not None
    assert (kept[0].name, kept[1]["step"]) == (f"step-{step - 1:06d}", step - 1)
    assert json.loads(Path("run/run.json").read_text())["status"] == "failed"
    assert not Path("run/model").exists()


def test_a_tokenizer_without_a_chat_template(steerwell: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "chat_template.jinja").unlink()
    done = steerwell(ROWS)
    assert done.status == 2
    assert "tiny: the tokenizer has no chat template. Put a chat_template.jinja" in done.error
    assert not Path("run").exists()


def test_a_template_that_refuses_the_roles(steerwell: Any, tmp_path: Path) -> None:
    (tmp_path / "tiny" / "chat_template.jinja").write_text(STRICT)
    turns = [("system", "be"), ("user", "a"), ("tool", "b"), ("user", "c"), ("user", "so what")]
    mixed = row([{"role": role, "content": text} for role, text in turns])
    asked = [row([{"role": "user", "content": f"go {i}"}]) for i in range(3)]  # a file has rows of one kind
    done = steerwell([*asked, mixed])
    assert done.status == 2
    for part in (
        "prefs.jsonl: ",
        "roles must alternate",
        "'tool', 'user', 'user'",
        "(prompt m1-",
        "'so what')",
    ):
        assert part in done.error
    assert not Path("run").exists()
    assert steerwell(asked).status == 0
    (tmp_path / "tiny" / "chat_template.jinja").write_text(tiny_tokenizer().chat_template)
    assert steerwell([*asked, mixed], "--set", "out=mixed").status == 0


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "bradley_terry", "grpo"])
def test_a_pad_token_that_is_the_end_token_changes_nothing(tmp_path: Path, objective: str) -> None:
    trained = {}
    for name, pad in (("own", "<|pad|>"), ("eos", "<|end|>")):
        policy = Policy(tiny_policy().model, tiny_tokenizer(), "tiny")
        policy.tokenizer.pad_token = pad
        policy.model.config.pad_token_id = policy.tokenizer.pad_token_id
        assert (policy.tokenizer.pad_token_id == END) == (name == "eos")
        data: Any = pair_groups()
        if objective == "grpo":
            data = rollouts(["go", "on"], LengthJudge(), n=4, prompts_per_step=2, max_new_tokens=6)
        settings = {k: v for k, v in SETTINGS.items() if objective != "grpo" or k != "batch_size"}
        model = train(policy, data, objective, out=tmp_path / name, **settings)
        trained[name] = weights(model.model)
        sequences = [s for tokens in policy.tokenize(pair_groups()) for s in tokens.sequences]
        assert all(s.ids[-1] == END and len(s.ids) - 1 in s.scored() for s in sequences)
    assert largest_difference(trained["own"], trained["eos"]) == 0.0
    assert lines(tmp_path / "own") == lines(tmp_path / "eos")


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """A disk with so little room: no file can grow above ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fills_up_between_two_checkpoints(tmp_path: Path) -> None:
    """The real error of the real writer, which is no OSError."""
    settings = {**SETTINGS, "steps": 4, "checkpoint_every": 1}
    straight = train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "straight", **settings)
    room: list[Any] = []

    def fill(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == 3:
            room.append(no_file_above(50_000))
            room[0].__enter__()

    try:
        with pytest.raises(TrainingError) as error:
            train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "full", progress=fill, **settings)
    finally:
        room[0].__exit__(None, None, None)
    assert str(error.value) == (
        "the checkpoint of step 3 could not be written (File too large): earlier ones are kept; "
        "make room and run the same again"
    )
    left = sorted(path.name for path in (tmp_path / "full" / "checkpoints").iterdir())
    assert left == ["step-000001", "step-000002"]  # whole ones, and nothing half written
    record = json.loads((tmp_path / "full" / "run.json").read_text())
    assert (record["status"], record["step"]) == ("failed", 2)
    again = train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "full", **settings)
    assert largest_difference(weights(again.model), weights(straight.model)) == 0.0
    metrics = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("full", "straight")]
    assert metrics[0] == metrics[1]


def test_a_disk_without_room_for_the_model(tmp_path: Path) -> None:
    class Room:
        def __call__(self, stage: str, done: int, total: int, note: str) -> None:
            if stage == "train" and done == 3:
                self.limit = no_file_above(50_000)
                self.limit.__enter__()

    room = Room()
    try:
        with pytest.raises(TrainingError, match=r"the model could not be written \(File too large\)"):
            train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", progress=room, **SETTINGS)
    finally:
        room.limit.__exit__(None, None, None)
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "checkpoints",
        "metrics.jsonl",
        "reference.db",
        "run.json",
        "timing.jsonl",
    ]
    train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", **SETTINGS)
    assert json.loads((tmp_path / "a" / "run.json").read_text())["status"] == "done"


def test_a_full_disk_by_the_command_line(steerwell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        done = steerwell(ROWS, checkpoint_every=1)
    assert done.status == 1
    assert "the checkpoint of step 1 could not be written (No space left on device)" in done.error
    assert list(Path("run/checkpoints").iterdir()) == []
    assert steerwell(ROWS, checkpoint_every=1).status == 0


def test_a_metrics_line_that_does_not_fit(tmp_path: Path) -> None:
    room: list[Any] = []

    def fill(stage: str, done: int, total: int, note: str) -> None:
        if stage == "train" and done == 2:
            size = (tmp_path / "a" / "metrics.jsonl").stat().st_size
            room.append(no_file_above(size + 20))  # half of a line, and less than run.json takes
            room[0].__enter__()

    settings = {**SETTINGS, "checkpoint_every": 1}
    try:
        with pytest.raises(TrainingError, match=r"step \d could not be written \(File too large\)"):
            train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", progress=fill, **settings)
    finally:
        room[0].__exit__(None, None, None)
    assert [path.name for path in (tmp_path / "a" / "checkpoints").iterdir()] == ["step-000001"]
    train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "a", **settings)
    assert [line["step"] for line in lines(tmp_path / "a")] == [1, 2, 3]
    assert all(math.isfinite(line["loss"]) for line in lines(tmp_path / "a"))


def test_a_late_refusal_leaves_nothing_and_what_was_done_stays(tmp_path: Path) -> None:
    config = CohereConfig(**SIZES, vocab_size=VOCAB)
    cohere = tiny_policy_dir(tmp_path, name="cohere", model=AutoModelForCausalLM.from_config(config))
    with pytest.raises(InputError, match="no sequence classifier"):
        train(cohere, pair_groups(), "bradley_terry", out=tmp_path / "runs" / "a", **SETTINGS)
    assert [path.name for path in tmp_path.iterdir()] == ["cohere"]
    train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "c", **SETTINGS)
    before = (tmp_path / "c" / "run.json").read_bytes()
    with pytest.raises(InputError, match="another run"):
        train(tiny_policy(), pair_groups(), "dpo", out=tmp_path / "c", **SETTINGS, beta=0.5)
    assert (tmp_path / "c" / "run.json").read_bytes() == before


def test_a_model_that_is_nowhere(steerwell: Any) -> None:
    done = steerwell(ROWS, "--set", "model=nobody/nothing")
    assert done.status == 2
    assert "nobody/nothing: no such directory, and no model of this name from the hub" in done.error
    assert not Path("run").exists()
