"""Items in a file: they come back equal, a run with them is the run with a list, and memory stays where it is."""

from __future__ import annotations

import errno
import gc
import math
import os
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import pair_groups, text_group, tiny_policy, weights

from steerwell.data.errors import InputError
from steerwell.data.messages import Message, as_messages
from steerwell.data.types import Completion, CompletionGroup, Pair
from steerwell.models.render import Sequence as TokenSequence
from steerwell.models.render import TokenizedGroup
from steerwell.train import item_file, loop, provide
from steerwell.train.item_file import Chosen, ItemFile
from steerwell.train.items import Item, items_digest, prepare
from steerwell.train.loop import checked, train
from steerwell.train.reference import Kept
from tiny import tiny_tokenizer


def full_item() -> Item:
    """An item with something in each field: a nested prompt, somebody else's turns, what is unknown."""
    sequences = [
        TokenSequence([5, 6, 7, 300, 70_000], 3),
        TokenSequence([5, 6, 7, 1, 2, 3, 4], 3, ((4, 5), (6, 7))),
        TokenSequence([5, 9, 7, 8], 2),
    ]
    return Item(
        tokens=TokenizedGroup(sequences, CompletionGroup(as_messages("hello")), [False, True, False]),
        prompt_id="m1-é",
        size=13,
        lengths=[2, 2, 2],
        pairs=[(0, 1), (2, 1)],
        pair_probs=[1.0, 0.1],
        labels=[True, False, True],
        rewards=[0.1, math.inf, -3.5],
        demonstrations=[False, True, False],
        old_per_token_logps=[-0.1, -0.2, -0.3],
        advantages=[1 / 3, 2 / 3],
        ref_logps=[-1.1, -2.2, -3.3],
        ref_per_token_logps=[-0.7, -0.4],
        finished=[True, False, None],
    )


def plain(item: Item) -> Item:
    """The item with a group of nothing, to compare all the rest."""
    return replace(item, tokens=replace(item.tokens, group=CompletionGroup(())))


def dpo_items(n: int) -> Sequence[Item]:
    return prepare(pair_groups(n), checked("dpo", None, {})[0], tiny_tokenizer(), None).items


def test_an_item_comes_back_as_it_was(tmp_path: Path) -> None:
    first, (second, third) = full_item(), dpo_items(2)
    bare = Item(TokenizedGroup([], CompletionGroup(()), []), "", 0, [], [], [], [], [], [], [])
    file = ItemFile(tmp_path)
    for item in (first, second, bare, third):
        file.append(item)
    assert [plain(item) for item in file] == [plain(item) for item in (first, second, bare, third)]
    assert file[-1].prompt_id == file[-1].tokens.group.prompt_id == third.prompt_id
    assert [item.prompt_id for item in file[1:3]] == [second.prompt_id, ""]
    assert list(file.sizes) == [13, second.size, 0, third.size]
    assert items_digest(file) == items_digest([first, second, bare, third])
    with pytest.raises(IndexError):
        file[4]
    assert list(tmp_path.iterdir()) == []


def test_a_prompt_of_no_tokens_shares_nothing(tmp_path: Path) -> None:
    sequences = [TokenSequence([1, 2], 0), TokenSequence([3, 4, 5], 2), TokenSequence([6], 0)]
    item = replace(
        full_item(), tokens=TokenizedGroup(sequences, CompletionGroup(()), [False] * 3), prompt_id="x"
    )
    file = ItemFile(tmp_path)
    file.append(item)
    assert file[0].tokens.sequences == sequences


def test_items_are_new_each_time_and_only_the_reference_is_kept(tmp_path: Path) -> None:
    file = ItemFile(tmp_path)
    for item in dpo_items(3):
        file.append(item)
    changed = file[1]
    changed.advantages, changed.ref_logps = [1.0, 2.0, 3.0], [-1.0, -2.0, 1e-300]
    view = Chosen(file, [2, 1], [full_item()])
    view.keep_reference(1, changed)
    view.keep_reference(2, changed)  # an item of a list: nothing to do
    assert [item.ref_logps for item in file] == [[], [-1.0, -2.0, 1e-300], []]
    assert [item.advantages for item in file] == [[], [], []]
    assert [item.prompt_id for item in view] == [file[2].prompt_id, file[1].prompt_id, "m1-é"]
    file.append(full_item())
    assert file[3].ref_per_token_logps == [-0.7, -0.4]


class Listed(list[Item]):
    """A plain list in the place of the file."""

    def __init__(self, folder: Path) -> None:
        super().__init__()


@pytest.mark.parametrize("objective", ["dpo", "kto", "sft", "bradley_terry"])
def test_a_run_with_items_in_a_file_is_the_run_with_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: str
) -> None:
    done = []
    for kind in (ItemFile, Listed):
        monkeypatch.setattr(loop, "ItemFile", kind)
        out = tmp_path / kind.__name__
        model = train(
            tiny_policy(),
            pair_groups(12),
            objective,
            out=out,
            eval_data=pair_groups(3, seed=5),
            batch_size=4,
            epochs=1.5,
            learning_rate=1e-3,
            reference_cache="off",
        )
        done.append((weights(model.model), (out / "metrics.jsonl").read_bytes()))
    (one, figures), (other, same) = done
    assert figures == same
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("files", [0, 1])
def test_the_reference_goes_by_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: int) -> None:
    policy = tiny_policy()
    source = provide.Provider(
        model=policy.model,
        names=frozenset({"ref_logps", "ref_per_token_logps"}),
        reference=provide.Reference("policy", "", policy.model, weights="w"),
        max_tokens=100,
        layout="auto",
        device=torch.device("cpu"),
    )
    want = dpo_items(7)
    assert source.fill_reference(want) == {"groups": 7, "computed": 7}
    monkeypatch.setattr(provide, "REFERENCE_AT_ONCE", 3)
    file, told = ItemFile(tmp_path), []
    for item in (*dpo_items(7), dpo_items(1)[0]):  # the last is the first again, in another part
        file.append(item)
    kept = [Kept(tmp_path / "reference.db")][:files]
    found = source.fill_reference(file, kept, lambda *words: told.append(words))
    assert found == {"groups": 7, "computed": 8 - files}
    for item, other in zip([*want, want[0]], file, strict=True):
        assert item.ref_logps == pytest.approx(other.ref_logps, abs=1e-5)
        assert len(other.ref_per_token_logps) == sum(other.lengths)
    assert [done for _, done, _, _ in told] == sorted(done for _, done, _, _ in told)
    assert told[-1][1] == told[-1][2] == 8 - files
    if files:
        assert source.fill_reference(file, kept) == {"groups": 7, "computed": 0}


class Lazy(Sequence[CompletionGroup]):
    """Pairs that are made when they are asked for, and how often they were."""

    def __init__(self, n: int) -> None:
        self.n, self.asked = n, 0

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < self.n:
            raise IndexError(i)
        self.asked += 1
        return text_group(f"say {i}", ["alpha " * 20 + f"{i}", "bravo " * 20], pairs=(Pair(0, 1),))


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    terms, tokenizer = checked("dpo", None, {})[0], tiny_tokenizer()
    held = []
    prepare(Lazy(10), terms, tokenizer, None, into=ItemFile(tmp_path))  # what is made once
    for n in (500, 2500):
        gc.collect()
        tracemalloc.start()
        data = prepare(Lazy(n), terms, tokenizer, None, into=ItemFile(tmp_path))
        data.items[0]  # what waited to be written is written
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
        assert len(data.items) == n
    assert (held[1] - held[0]) / 2000 < 40  # bytes for each further pair


def test_groups_that_are_given_lazily_are_asked_for_once(tmp_path: Path) -> None:
    data = Lazy(20)
    train(
        tiny_policy(),
        data,
        "dpo",
        out=tmp_path / "run",
        batch_size=10,
        learning_rate=1e-4,
        reference_cache="off",
    )
    assert data.asked == 21  # and the first, to see that there are pairs


def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(item_file.os, "pwrite", full)
    with pytest.raises(InputError, match=r"tokenised data could not be written \(No space left"):
        train(tiny_policy(), pair_groups(4), "dpo", out=tmp_path / "run", learning_rate=1e-4)
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_not_there_is_not_needed(tmp_path: Path) -> None:
    file = ItemFile(tmp_path / "nowhere")
    file.append(full_item())
    assert file[0].size == 13
    assert file.place != tmp_path / "nowhere"


def test_a_file_that_takes_a_few_bytes_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that takes only a few bytes at a time, for reading and for writing."""
    pread, pwrite = os.pread, os.pwrite
    monkeypatch.setattr(item_file.os, "pwrite", lambda f, data, at: pwrite(f, data[:7], at))
    monkeypatch.setattr(item_file.os, "pread", lambda f, n, at: pread(f, min(n, 5), at))
    file = ItemFile(tmp_path)
    for item in (full_item(), *dpo_items(2)):
        file.append(item)
    assert plain(file[0]) == plain(full_item())
    assert [plain(item) for item in file[1:]] == [plain(item) for item in dpo_items(2)]


def test_the_longest_sequence_is_refused_after_all_was_read(tmp_path: Path) -> None:
    asked = (Message("user", "q"),)
    long = CompletionGroup(asked, (Completion(asked, (Message("assistant", "alpha " * 50),)),))
    terms = checked("sft", None, {})[0]
    with pytest.raises(InputError, match="the model reads 20") as error:
        prepare([long], terms, tiny_tokenizer(), None, context=20)
    assert "'q'" in error.value.what
    equal = text_group("e", ["same", "same"], pairs=(Pair(0, 1),))
    with pytest.raises(InputError, match="chosen and rejected are equal"):
        prepare(
            [long, equal],
            checked([("dpo", 1.0), ("sft", 1.0)], None, {})[0],
            tiny_tokenizer(),
            None,
            context=20,
        )
