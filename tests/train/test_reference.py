"""Reference log-probs on disk: what hits, what misses, and what becomes of a torn file."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import largest_difference, lines, pair_groups, tiny_policy, weights

from steerwell.data.errors import InputError
from steerwell.models.load import load_policy
from steerwell.train import provide, train
from steerwell.train.reference import Kept, base_digest, cache_path, group_key, reference_key
from tiny import token_group

SETTINGS: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 4}


def counts(out: Path) -> dict[str, Any]:
    return json.loads((out / "run.json").read_text())["reference_logps"]


@pytest.fixture
def cache(tmp_path: Path) -> str:
    return str(tmp_path / "cache" / "reference.db")


def test_what_changes_no_number_hits_and_what_changes_one_misses(tmp_path: Path, cache: str) -> None:
    data = pair_groups(8)

    def found(name: str, policy: Any = None, objective: str = "dpo", **changes: Any) -> tuple[int, int]:
        settings = {**SETTINGS, "reference_cache": cache, **changes}
        train(policy or tiny_policy(), data, objective, out=tmp_path / name, **settings)
        told = counts(tmp_path / name)
        return told["groups"], told["computed"]

    assert found("first") == (8, 8)
    changed = {
        "learning_rate": 2e-3,
        "seed": 5,
        "batch_size": 3,
        "max_tokens": 90,
        "beta": 0.3,
        "layout": "rows",
    }
    assert found("second", **changed) == (8, 0)
    assert found("third", objective="ipo", epochs=2.0) == (8, 0)
    longest = max(len(s.ids) for g in tiny_policy().tokenize(data) for s in g.sequences)
    assert found("cut", max_length=longest - 1)[1] in range(1, 8)  # only the groups that were cut
    assert found("weights", policy=tiny_policy(seed=1)) == (8, 8)
    assert found("again") == (8, 0)


def test_another_template_misses(tmp_path: Path, cache: str) -> None:
    policy = tiny_policy()
    train(policy, pair_groups(4), "dpo", out=tmp_path / "a", reference_cache=cache, **SETTINGS)
    policy.tokenizer.chat_template = "{{ 'hey ' }}" + str(policy.tokenizer.chat_template)
    train(policy, pair_groups(4), "dpo", out=tmp_path / "b", reference_cache=cache, **SETTINGS)
    assert counts(tmp_path / "b")["computed"] == 4


def test_a_hit_gives_the_same_run_without_a_pass(
    tmp_path: Path, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**SETTINGS, "reference_cache": cache}
    first = train(tiny_policy(), pair_groups(6), "dpo", out=tmp_path / "a", **settings)
    passes: list[int] = []
    true = provide.per_token_logps
    monkeypatch.setattr(
        provide, "per_token_logps", lambda *a, **k: passes.append(torch.is_grad_enabled()) or true(*a, **k)
    )
    second = train(tiny_policy(), pair_groups(6), "dpo", out=tmp_path / "b", **settings)
    assert passes
    assert all(passes)  # none without gradient
    assert largest_difference(weights(first.model), weights(second.model)) == 0.0
    assert lines(tmp_path / "a") == lines(tmp_path / "b")


def test_with_adapters_the_base_model_is_the_reference(tmp_path: Path, cache: str) -> None:
    base = tiny_policy().save(tmp_path / "base")
    settings = {**SETTINGS, "reference_cache": cache}
    train(base, pair_groups(6), "dpo", out=tmp_path / "full", **settings)
    train(base, pair_groups(6), "dpo", out=tmp_path / "lora", lora=4, **settings)
    assert counts(tmp_path / "lora") | {"trouble": []} == counts(tmp_path / "full") | {"computed": 0}
    assert base_digest(load_policy(base, lora=2).model) == base_digest(load_policy(base).model)


def test_a_file_that_was_cut_in_half_is_set_aside(tmp_path: Path, cache: str) -> None:
    settings = {**SETTINGS, "reference_cache": cache}
    first = train(tiny_policy(), pair_groups(30), "dpo", out=tmp_path / "a", **settings)
    file = Path(cache)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    notes: list[str] = []
    second = train(
        tiny_policy(), pair_groups(30), "dpo", out=tmp_path / "b",
        progress=lambda stage, done, total, note: notes.append(note), **settings,
    )  # fmt: skip
    assert largest_difference(weights(first.model), weights(second.model)) < 1e-6
    assert "set aside" in counts(tmp_path / "b")["trouble"][0]
    assert any("set aside" in note for note in notes)
    assert file.with_name("reference.db.broken").exists()
    train(tiny_policy(), pair_groups(30), "dpo", out=tmp_path / "c", **settings)
    assert counts(tmp_path / "c")["computed"] == 0


def test_a_changed_value_is_not_believed(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "r.db")
    kept.put("ref", {b"a": [-1.0, -2.0], b"b": [-3.0]})
    assert kept.get("ref", [b"a", b"b", b"c"]) == {b"a": [-1.0, -2.0], b"b": [-3.0]}
    assert kept.get("other", [b"a"]) == {}
    with sqlite3.connect(kept.path) as file:
        file.execute("UPDATE logps SET logps = zeroblob(8) WHERE key = ?", (b"a",))
    file.close()
    assert kept.get("ref", [b"a", b"b"]) == {b"b": [-3.0]}


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    kept = Kept(tmp_path / "r.db", limit=100)
    for name in ("old", "middle"):
        kept.put(name, {bytes([i]): [float(i)] * 2 for i in range(5)})  # 40 bytes each
    assert kept.get("old", [b"\x01"])  # used again: now "middle" is the oldest
    kept.put("new", {bytes([i]): [float(i)] * 2 for i in range(5)})
    assert [bool(kept.get(name, [b"\x01"])) for name in ("old", "middle", "new")] == [True, False, True]


def test_a_place_that_cannot_be_written_is_done_without(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    out = tmp_path / "run"
    settings = {**SETTINGS, "reference_cache": str(tmp_path / "file" / "below.db")}
    train(tiny_policy(), pair_groups(4), "dpo", out=out, steps=1, **settings)
    assert "were not kept" in counts(out)["trouble"][0]
    with pytest.raises(InputError, match="reference_cache is a folder"):
        train(tiny_policy(), pair_groups(4), "dpo", out=tmp_path / "b", reference_cache=str(tmp_path))


def test_off_uses_no_shared_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERWELL_CACHE", str(tmp_path / "cache"))
    train(tiny_policy(), pair_groups(4), "dpo", out=tmp_path / "a", reference_cache="off", **SETTINGS)
    assert not (tmp_path / "cache").exists()
    assert cache_path("auto") == tmp_path / "cache" / "reference.db"
    train(tiny_policy(), pair_groups(4), "dpo", out=tmp_path / "b", **SETTINGS)
    assert (tmp_path / "cache" / "reference.db").exists()


def test_keys_tell_apart_what_differs() -> None:
    one = token_group([1, 2, 3], [[4, 5], [6]])
    assert group_key(one) == group_key(token_group([1, 2, 3], [[4, 5], [6]]))
    others = [
        token_group([1, 2], [[3, 4, 5], [3, 6]]),  # the same ids, cut elsewhere
        token_group([1, 2, 3], [[6], [4, 5]]),
        token_group([1, 2, 3], [[4, 5]]),
    ]
    assert len({group_key(group) for group in [one, *others]}) == 4
    keys = {reference_key("w", 1.0, "torch.float32"), reference_key("v", 1.0, "torch.float32"),
            reference_key("w", 0.7, "torch.float32"), reference_key("w", 1.0, "torch.bfloat16")}  # fmt: skip
    assert len(keys) == 4
