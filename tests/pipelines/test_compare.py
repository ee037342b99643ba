"""A comparison of objectives: who is let in, what each is trained on, and the one yardstick for all."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from steerwell import world
from steerwell.data.errors import InputError
from steerwell.data.messages import Message
from steerwell.data.types import Annotation, Completion, CompletionGroup, Pair, Prompt
from steerwell.evals.stats import Estimate
from steerwell.models.load import load_policy
from steerwell.pipelines import compare as comparison
from steerwell.pipelines.compare import compare, curves
from steerwell.pipelines.compare_report import table, write_page
from steerwell.pipelines.contenders import check_contender, contenders, groups_for
from steerwell.pipelines.yardstick import Figures, Yardstick, divergences, token_logps
from steerwell.train.config import Recipe, TrainConfig
from steerwell.train.recipe import run_recipe
from tiny import tiny_policy_dir

WORDS = ("sun", "rain", "wind", "snow", "fog", "ice", "hail", "storm")


def recipe(**changes: Any) -> Recipe:
    table = {"model": "m", "data": "d.jsonl", "objective": "dpo", "out": "o", **changes}
    return Recipe.model_validate(table)


def group(asked: str, *texts: str, **targets: Any) -> CompletionGroup:
    prompt = (Message("user", asked),)
    return CompletionGroup(
        prompt, tuple(Completion(prompt, (Message("assistant", text),)) for text in texts), **targets
    )


def write_pairs(path: Path, n: int, seed: int) -> Path:
    """Pairs in which the chosen completion is always the same word: easily learnt."""
    draw = random.Random(seed)
    rows = [
        {
            "prompt": f"{seed} {i} {draw.choice(WORDS)}?",
            "chosen": "sun sun",
            "rejected": draw.choice(WORDS[1:]),
        }
        for i in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# ---------------------------------------------------------------- who is let in


def test_the_recipes_hyperparameters_go_to_those_that_have_them() -> None:
    found = contenders(
        ["dpo", "dpo:beta=0.5", "ipo:reduction=sum", "kto", "sft", "mpo", "rpo"],
        recipe(hyperparameters={"beta": 0.2}),
    )
    hyper = {one.name: one.terms[0].hyper for one in found}
    assert hyper["dpo"]["beta"] == 0.2
    assert hyper["dpo:beta=0.5"]["beta"] == 0.5
    assert hyper["ipo:reduction=sum"] == {"tau": 0.1, "reduction": "sum"}
    assert hyper["kto"]["beta"] == 0.2
    assert hyper["sft"] == {}
    assert [term.hyper["beta"] for term in found[5].terms[:2]] == [
        0.1,
        0.1,
    ]  # two terms have it: neither gets it
    assert hyper["rpo"]["beta"] == 0.01  # the mixture sets it itself


def test_an_entry_may_have_a_learning_rate_of_its_own() -> None:
    slow, fast = contenders(["simpo", "simpo:learning_rate=3e-5"], recipe(train={"learning_rate": 1e-6}))
    assert (slow.config.learning_rate, fast.config.learning_rate) == (1e-6, 3e-5)
    assert fast.folder == "simpo-learning_rate=3e-05"


@pytest.mark.parametrize(
    ("entries", "changes", "parts"),
    [
        (["dppo"], {}, ["unknown objective 'dppo'", "Did you mean 'dpo'?"]),
        (["dpo:betta=1"], {}, ["dpo has no hyperparameter 'betta'", "Did you mean 'beta'?"]),
        (["dpo:0.5"], {}, ["'0.5' in 'dpo:0.5' is no key=value"]),
        (["dpo:beta="], {}, ["no key=value"]),
        (["dpo:beta=-1"], {}, ["beta must be > 0"]),
        (["dpo:epochs=2"], {}, ["dpo has no hyperparameter 'epochs'"]),
        (["mpo:beta=0.2"], {}, ["'beta' is a hyperparameter of dpo and of bco_pair"]),
        (["dpo", "dpo"], {}, ["dpo and dpo are the same contender"]),
        (["dpo", "dpo:beta=0.1"], {}, ["dpo and dpo:beta=0.1 are the same contender"]),
        (["dpo", "bradley_terry"], {}, ["bradley_terry trains a reward model"]),
        (["dpo", "ipo"], {"hyperparameters": {"gamma": 1.0}}, ["none of dpo, ipo takes", "'gamma'"]),
        (["dpo", "ipo"], {"hyperparameters": {"bet": 1.0}}, ["'bet'", "Did you mean 'beta'?"]),
        (["dpo"], {"judge": "refusal"}, ["recorded data"]),
        (
            ["dpo"],
            {"train": {"steps": 2, "patience": 2, "betas": (0.9, 0.9)}, "rollouts": {"n": 2}},
            ["online"],
        ),
    ],
)
def test_what_is_refused(entries: list[str], changes: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(InputError) as caught:
        contenders(entries, recipe(**changes))
    assert [part for part in parts if part not in str(caught.value)] == []


def test_a_learner_from_labels_gets_those_of_the_pairs() -> None:
    kto, dpo = contenders(["kto", "dpo"], recipe())
    ring = group("ring?", "a", "b", "c", pairs=(Pair(0, 1), Pair(1, 2), Pair(2, 0)))
    several = group("q?", "a", "b", "c", "d", pairs=(Pair(0, 1), Pair(0, 2, 0.4), Pair(1, 3, 0.5)))
    notes: list[str] = []
    found = groups_for(kto, [several, ring, group("r?", "x")], "none", notes)
    assert [g.labels for g in found] == [(None, False, True, None), (None, None, None)]
    assert notes == ["kto has its labels from the pairs: chosen is desirable, rejected is not"]
    assert groups_for(dpo, [several], "none", [])[0].labels is None


def test_labels_that_somebody_gave_are_taken() -> None:
    (kto,) = contenders(["kto"], recipe())
    labelled = group("q?", "a", "b", pairs=(Pair(0, 1),), labels=(False, True))
    assert groups_for(kto, [labelled], "none", [])[0].labels == (False, True)
    voted = group("q?", "a", "b")
    ids = tuple(c.id for c in voted.completions)
    said = (
        Annotation("preference", ids, value="first", annotator="p"),
        Annotation("label", (ids[1],), value=True, annotator="p"),
    )
    notes: list[str] = []
    found = groups_for(
        kto, [CompletionGroup(voted.prompt, voted.completions, annotations=said)], "auto", notes
    )
    assert found[0].labels == (None, True)
    assert not any("from the pairs" in note for note in notes)


def test_data_that_lack_what_a_contender_takes() -> None:
    odpo, kto, dpo = contenders(["odpo", "kto", "dpo"], recipe())
    pairs = [group(f"{i}?", "a", "b", pairs=(Pair(0, 1),)) for i in range(2)]
    with pytest.raises(InputError, match="odpo needs scores; 0 of 4 completions in the data for odpo"):
        check_contender(odpo, pairs, pairs, "start")
    with pytest.raises(InputError, match="no step has two prompts"):
        check_contender(
            kto, groups_for(kto, pairs[:1], "none", []), groups_for(kto, pairs, "none", []), "start"
        )
    with pytest.raises(InputError, match="dpo needs a reference, and reference is none"):
        check_contender(dpo, pairs, pairs, "none")
    check_contender(dpo, pairs, pairs, "start")


# ---------------------------------------------------------------- the yardstick


def test_divergences_by_hand() -> None:
    """Two tokens: the policy says 1/2 and 1/4, the start 1/4 and 1/2."""
    half, quarter = math.log(0.5), math.log(0.25)
    k3, k1 = divergences([[[half, quarter]]], [[[quarter, half]]])
    assert k3 == pytest.approx([(0.5 - 1 - math.log(0.5)) + (2 - 1 - math.log(2))])
    assert k1 == pytest.approx([0.0], abs=1e-15)
    assert divergences([[[half]]], [[[half]]]) == ([0.0], [0.0])


def test_both_estimates_of_the_divergence_are_right_on_average() -> None:
    """A token of three words drawn from pi: k3 and k1 have KL(pi || start) as their mean."""
    pi, start = [0.6, 0.3, 0.1], [0.2, 0.3, 0.5]
    kl = sum(p * math.log(p / q) for p, q in zip(pi, start, strict=True))
    k3, k1 = divergences([[[math.log(p)]] for p in pi], [[[math.log(q)]] for q in start])
    assert sum(p * x for p, x in zip(pi, k3, strict=True)) == pytest.approx(kl)
    assert sum(p * x for p, x in zip(pi, k1, strict=True)) == pytest.approx(kl)
    assert min(k3) >= 0


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A tiny start model, and one near it."""
    folder = tmp_path_factory.mktemp("models")
    start = tiny_policy_dir(folder / "start")
    policy = load_policy(start)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return start, policy.save(folder / "other")


def held_out() -> list[CompletionGroup]:
    """Six prompts of three completions with pairs, one of them turned round and one undecided."""
    draw = random.Random(5)
    return [
        group(
            f"say {i}",
            *(" ".join(draw.choices(WORDS, k=draw.randint(1, 4))) + f" {k}" for k in range(3)),
            pairs=(Pair(0, 1), Pair(1, 2, 0.3), Pair(0, 2, 0.5)),
        )
        for i in range(6)
    ]


def test_the_figures_are_those_of_summed_log_ratios(models: tuple[Path, Path]) -> None:
    start, other = load_policy(models[0]), load_policy(models[1])
    groups = held_out()
    yard = Yardstick(str(models[0]), groups, [Prompt(g.prompt) for g in groups], max_new_tokens=5)
    found = yard.measure(other)
    gains, shifts = [], []
    for one in groups:
        now, then = other.logps([one])[0], start.logps([one])[0]
        sizes = [len(s.ids) - s.n_prompt for s in start.tokenize([one])[0].sequences]
        h = [a - b for a, b in zip(now, then, strict=True)]
        gains += [h[0] - h[1], h[2] - h[1]]
        shifts += [h[0] / sizes[0], h[2] / sizes[2]]
    assert found.margin.value == pytest.approx(sum(gains) / 12, abs=1e-4)
    assert found.chosen_shift.value == pytest.approx(sum(shifts) / 12, abs=1e-5)
    assert found.accuracy.value == sum(gain > 0 for gain in gains) / 12
    assert found.accuracy.n == 12
    assert found.accuracy.low is not None
    assert found.accuracy.low < sum(gain > 0 for gain in gains) / 12
    assert found.win_rate is None  # no gold for prompts of our own
    samples = yard.sample(other)
    k1 = [
        a - b
        for x, y in zip(other.logps(samples), start.logps(samples), strict=True)
        for a, b in zip(x, y, strict=True)
    ]
    assert found.kl_k1.value == pytest.approx(sum(k1) / 6, abs=1e-4)
    assert found.kl.value is not None
    assert found.kl.low is not None
    assert found.kl.value > found.kl.low >= 0
    assert found.tokens.value == sum(len(g.completions[0].token_ids or ()) for g in samples) / 6
    assert Figures.from_dict(json.loads(json.dumps(found.to_dict()))) == found


def test_the_start_itself_is_at_zero(models: tuple[Path, Path]) -> None:
    groups = held_out()
    yard = Yardstick(str(models[0]), groups, [Prompt(g.prompt) for g in groups], max_new_tokens=5)
    found = yard.measure(load_policy(models[0]))
    assert found.accuracy.value == 0.5
    assert (found.margin.value, found.chosen_shift.value, found.kl.value) == (0.0, 0.0, 0.0)


def test_prompts_that_leave_no_room_are_left_out(models: tuple[Path, Path]) -> None:
    groups = [*held_out(), group("long " * 40, "a", "b", pairs=(Pair(0, 1),))]
    yard = Yardstick(str(models[0]), groups, [Prompt(groups[0].prompt)], max_new_tokens=5, max_length=40)
    assert yard.fitting == groups[:-1]
    assert yard.measure(load_policy(models[1])).accuracy.n == 12


def test_gold_is_there_for_prompts_of_the_world_only(models: tuple[Path, Path]) -> None:
    asked = list(world.prompts(12, seed=1))
    groups = [group("say 1", "a", "b", pairs=(Pair(0, 1),))]
    yard = Yardstick(str(models[0]), groups, asked, max_new_tokens=5)
    rate = yard.measure(load_policy(models[1])).win_rate
    assert rate is not None
    assert rate.n == 12
    same = Yardstick(str(models[0]), groups, asked, max_new_tokens=5).measure(load_policy(models[0])).win_rate
    assert same is not None
    assert same.value == 0.5
    mixed = Yardstick(str(models[0]), groups, [*asked, Prompt((Message("user", "mine"),))], max_new_tokens=5)
    assert not mixed.gold


def test_token_log_probs_add_up_and_are_in_order(models: tuple[Path, Path]) -> None:
    policy, groups = load_policy(models[1]), held_out()
    found = token_logps(policy, groups)
    for tokens, sums in zip(found, policy.logps(groups), strict=True):
        assert [math.fsum(own) for own in tokens] == pytest.approx(sums, abs=1e-4)
    alone = [token_logps(policy, [one])[0] for one in groups]
    for together, one in zip(found, alone, strict=True):
        for a, b in zip(together, one, strict=True):
            assert a == pytest.approx(b, abs=1e-4)


def test_what_a_measurement_depends_on() -> None:
    groups = held_out()
    prompts = [Prompt(g.prompt) for g in groups]
    yard = Yardstick("m", groups, prompts, 5)
    same = Yardstick("elsewhere", held_out(), prompts, 5)  # the run's own identity knows the start model
    assert yard.key("run") == same.key("run")
    others = [
        yard.key("another run"),
        Yardstick("m", groups[1:], prompts, 5).key("run"),
        Yardstick("m", groups, prompts[1:], 5).key("run"),
        Yardstick("m", groups, prompts, 6).key("run"),
        Yardstick("m", groups, prompts, 5, seed=1).key("run"),
    ]
    assert len({yard.key("run"), *others}) == 6


def test_an_interval_of_a_divergence_ends_at_zero(models: tuple[Path, Path]) -> None:
    groups = held_out()[:2]
    yard = Yardstick(str(models[0]), groups, [Prompt(g.prompt) for g in groups], max_new_tokens=3)
    found = yard.measure(load_policy(models[1]))
    assert found.kl.low == 0.0  # two samples: their t interval alone would go far below
    assert found.kl_k1.low is not None
    assert found.kl_k1.low < 0  # k1 may be negative, and its interval too


def test_curves_are_changes_since_the_start() -> None:
    metrics = [
        {"step": 0, "eval/loss": 0.7, "eval/logps/chosen": -10.0, "eval/logps/rejected": -12.0},
        {"step": 1, "loss": 0.6},
        {
            "step": 2,
            "eval/loss": 0.5,
            "eval/logps/chosen": -11.0,
            "eval/logps/rejected": -16.0,
            "eval/rewards/accuracies": 0.8,
        },
    ]
    assert curves(metrics) == [
        {"step": 0, "accuracy": None, "margin": 0.0, "chosen_shift": 0.0},
        {"step": 2, "accuracy": 0.8, "margin": 3.0, "chosen_shift": -1.0},
    ]
    assert curves([{"step": 1, "loss": 0.5}]) == []
    assert curves([{"step": 0, "eval/loss": 0.5}])[0]["margin"] is None


# ---------------------------------------------------------------- the whole


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, dict[str, Any]]:
    """A comparison of three on easily learnt pairs."""
    folder = tmp_path_factory.mktemp("comparison")
    asked = recipe(
        model=str(tiny_policy_dir(folder / "m")),
        data=str(write_pairs(folder / "train.jsonl", 16, 1)),
        eval_data=str(write_pairs(folder / "held.jsonl", 6, 2)),
        out=str(folder / "out"),
        train=TrainConfig(steps=4, batch_size=8, learning_rate=5e-3, reference_cache="off"),
    )
    found = compare(asked, ["dpo", "simpo", "kto"], samples=3, max_new_tokens=4)
    assert json.loads((folder / "out" / "compare.json").read_text()) == json.loads(json.dumps(found))
    assert "Objectives compared" in (folder / "out" / "compare.html").read_text("utf-8")
    return asked, found


def test_all_learn_and_are_told_apart(made: tuple[Recipe, dict[str, Any]]) -> None:
    _, found = made
    assert [row["name"] for row in found["contenders"]] == ["dpo", "simpo", "kto"]
    for row in found["contenders"]:
        assert row["accuracy"]["value"] > 0.9
        assert row["margin"]["low"] > 0
        assert row["kl"]["value"] > 0
        assert row["win_rate"] is None
        assert [line["step"] for line in row["curves"]] == [
            0,
            1,
            2,
            3,
            4,
        ]  # about ten looks, so at every step
        assert row["curves"][-1]["margin"] == pytest.approx(row["margin"]["value"], abs=1e-3)
    assert len({row["margin"]["value"] for row in found["contenders"]}) == 3
    assert found["held_out"] == {"prompts": 6, "pairs": 6}
    assert any("kto has its labels from the pairs" in note for note in found["notes"])
    assert sum("Terms that hold them" in note for note in found["notes"]) <= 1


def test_each_folder_is_an_ordinary_run(
    made: tuple[Recipe, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, _ = made
    folder = Path(asked.out) / "dpo"
    config = asked.train.model_copy(update={"eval_every": 1})
    before = (folder / "metrics.jsonl").read_bytes()
    done = run_recipe(asked.model_copy(update={"out": str(folder), "train": config}))
    assert done.record["status"] == "done"
    assert (folder / "metrics.jsonl").read_bytes() == before  # the recipe by itself is that very run
    load_policy(folder / "model")


def test_called_again_nothing_is_trained_or_measured(
    made: tuple[Recipe, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, found = made
    files = {f: f.read_bytes() for f in Path(asked.out).rglob("*") if f.is_file()}
    measured: list[str] = []
    monkeypatch.setattr(Yardstick, "measure", lambda *_: measured.append("one"))
    again = compare(asked, ["dpo", "simpo", "kto"], samples=3, max_new_tokens=4)
    assert measured == []
    assert again == found
    after = {f: f.read_bytes() for f in Path(asked.out).rglob("*") if f.is_file()}
    assert [f.name for f in files if after[f] != files[f]] == []
    assert after.keys() == files.keys()


def test_one_more_contender_trains_only_itself(made: tuple[Recipe, dict[str, Any]]) -> None:
    asked, found = made
    times = {f: f.stat().st_mtime_ns for f in Path(asked.out).glob("*/model/*")}
    more = compare(asked, ["dpo:beta=0.5", "dpo"], samples=3, max_new_tokens=4)
    assert {f: f.stat().st_mtime_ns for f in times} == times
    assert more["contenders"][1] == found["contenders"][0]
    assert more["contenders"][0]["margin"] != more["contenders"][1]["margin"]
    assert (Path(asked.out) / "dpo-beta=0.5" / "run.json").exists()


def test_an_interrupted_comparison_goes_on(tmp_path: Path, made: tuple[Recipe, dict[str, Any]]) -> None:
    """Stopped in the second of three: the first is not trained again, and the figures are those of a straight one."""
    asked, found = made
    asked = asked.model_copy(update={"out": str(tmp_path / "out")})

    def stop(stage: str, done: int, total: int, note: str = "") -> None:
        if stage == "simpo" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(asked, ["dpo", "simpo", "kto"], samples=3, max_new_tokens=4, progress=stop)
    assert not (tmp_path / "out" / "compare.json").exists()
    first = (tmp_path / "out" / "dpo" / "run.json").stat().st_mtime_ns
    again = compare(asked, ["dpo", "simpo", "kto"], samples=3, max_new_tokens=4)
    assert (tmp_path / "out" / "dpo" / "run.json").stat().st_mtime_ns == first
    figures = ("accuracy", "margin", "chosen_shift", "kl", "curves")
    for one, straight in zip(again["contenders"], found["contenders"], strict=True):
        assert {name: one[name] for name in figures} == {name: straight[name] for name in figures}


def test_a_torn_measurement_is_made_again(made: tuple[Recipe, dict[str, Any]]) -> None:
    asked, found = made
    path = Path(asked.out) / "kto" / comparison.MEASURED
    whole = path.read_bytes()
    path.write_bytes(whole[:40])
    again = compare(asked, ["kto"], samples=3, max_new_tokens=4)
    assert again["contenders"][0] == found["contenders"][2]
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("entries", "changes", "message"),
    [
        (["dpo", "odpo"], {}, "odpo needs pairs and scores; 0 groups of the data have them"),
        (["dpo"], {"eval_data": None}, "a comparison needs held-out pairs, and the recipe names none"),
        (["dpo", "kto"], {"train": TrainConfig(steps=2, batch_size=1)}, "no step has two prompts"),
        (["simpo", "dpo"], {"reference": "none"}, "dpo needs a reference"),
    ],
)
def test_nothing_is_trained_where_something_is_lacking(
    made: tuple[Recipe, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    entries: list[str],
    changes: dict[str, Any],
    message: str,
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("training began")

    monkeypatch.setattr(comparison, "train", refuse)
    asked = made[0].model_copy(update={"out": str(tmp_path / "out"), **changes})
    with pytest.raises(InputError, match=message):
        compare(asked, entries)
    assert not (tmp_path / "out").exists()


def test_an_out_that_holds_something_else(made: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> None:
    asked = made[0]
    run = asked.model_copy(update={"out": str(Path(asked.out) / "dpo")})
    with pytest.raises(InputError, match="out holds a run, and a comparison makes a folder"):
        compare(run, ["dpo"])
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="out is a file"):
        compare(asked.model_copy(update={"out": str(tmp_path / "file")}), ["dpo"])


def test_one_process_only(made: tuple[Recipe, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="in one process"):
        compare(made[0], ["dpo"])


def test_the_table_and_the_page(made: tuple[Recipe, dict[str, Any]], tmp_path: Path) -> None:
    _, found = made
    shown = table(found)
    assert [
        line.split()[0] for line in shown.splitlines() if line.lstrip().startswith(("dpo", "simpo", "kto "))
    ] == [
        "dpo",
        "simpo",
        "kto",
    ]
    assert "gold win rate" not in shown
    assert "6 held-out pairs of 6 prompts" in shown
    page = write_page(tmp_path / "compare.html", found).read_text("utf-8")
    for words in ("pair accuracy", "chosen shift", "beta = 0.1", "Held-out margin since the start"):
        assert words in page
    assert "http://" not in page.replace("http://www.w3.org", "")
    assert page.count('<svg class="chart wide"') == 3
    with_gold = json.loads(json.dumps(found))
    with_gold["samples"]["gold"] = True
    for row in with_gold["contenders"]:
        row["win_rate"] = Estimate(0.61, 0.55, 0.67, 200).to_dict()
    assert "61.0% (55.0 … 67.0)" in table(with_gold)
