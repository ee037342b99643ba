"""The average of several models' weights: one model that costs what one costs, for reward models WARM
(arXiv:2401.12187).

Weights can be averaged where the models come from one pretrained start and have moved little; then the average is about
as good as the ensemble, and it keeps what the members agree on.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from steerwell.data.errors import InputError
from steerwell.models.adapter_files import is_adapter
from steerwell.models.directory import check_directory, files_digest, model_place, put_in_place, read_json
from steerwell.models.scoring import SCORING_FILE, ScoringRecipe, read_recipe

AVERAGE_FILE = "steerwell_average.json"
INDEX = "model.safetensors.index.json"
#: Files beside the weights that the average takes from the first model.
SUFFIXES = (".json", ".txt", ".model", ".jinja")
#: Keys of a configuration that say nothing about the network.
IDLE_KEYS = ("_name_or_path", "transformers_version", "use_cache")


def average_weights(
    members: Sequence[str | Path],
    out: str | Path,
    weights: Sequence[float] | None = None,
) -> Path:
    """Write the weighted average of the weights of models of one architecture into ``out``: a complete model directory.

    ``weights``: one for each member, at least 0; they are divided by their sum. None: all alike. Sums are in float32
    (in float64 for weights that are), the result has the type of the weights. It goes tensor by tensor, so that no
    more than three are in memory. What went in is told in :data:`AVERAGE_FILE`. The mean and standard deviation of
    reward models' scores cannot be averaged: the recipe has 0 and 1 again, and notes say so; see
    :meth:`RewardModel.normalised`.

    Raises :class:`InputError` for fewer than two members, an adapter, and models that differ in their configuration,
    the names, shapes or types of weights, the tokenizer, the chat template or the recipe: the message names what.
    """
    places = [Path(model_place(member)).expanduser() for member in members]
    if len(places) < 2:
        raise InputError(f"an average of {len(places)} models", mend="Give two or more directories.")
    shares = _shares(weights, len(places))
    for place in places:
        if is_adapter(place):
            raise InputError(
                "this is an adapter, and weights are averaged whole",
                file=place,
                mend="Save it whole: load_reward_model(path).save(out).",
            )
        if not place.is_dir():
            raise InputError("no such model directory", file=place, mend="Give directories.")
        check_directory(place)
    _check_alike(places)
    recipe, notes = _recipe(places)
    layouts = [_layout(place) for place in places]
    for place, layout in zip(places[1:], layouts[1:], strict=True):
        _check_layout(layouts[0], layout, place)

    def write(fresh: Path) -> None:
        fresh.mkdir(parents=True)
        for file in sorted(places[0].iterdir()):
            if file.is_file() and file.suffix in SUFFIXES and not file.name.startswith("steerwell_"):
                shutil.copyfile(file, fresh / file.name)
        for name in dict.fromkeys(file for file, _ in layouts[0].values()):
            _write_file(name, places, layouts, shares, fresh)
        if recipe is not None:
            (fresh / SCORING_FILE).write_text(recipe.to_json(), encoding="utf-8")
        about = {
            "members": [
                {"path": str(member), "weights": files_digest(place), "share": share}
                for member, place, share in zip(members, places, shares, strict=True)
            ],
            "notes": notes,
        }
        (fresh / AVERAGE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

    return put_in_place(Path(out), write)


Layout = dict[str, tuple[str, dict[str, Any]]]


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise InputError(f"{len(given)} weights for {count} models", mend="One for each.")
    if not all(math.isfinite(w) and w >= 0 for w in given) or not sum(given) > 0:
        raise InputError(
            f"weights must be at least 0, and not all 0, got {given}", mend="Use weights=None for the mean."
        )
    return [weight / sum(given) for weight in given]


def _check_alike(places: Sequence[Path]) -> None:
    """Raise :class:`InputError` where configuration, tokenizer or chat template differ."""
    first = places[0]
    for other in places[1:]:
        ours, theirs = (
            {k: v for k, v in read_json(p / "config.json").items() if k not in IDLE_KEYS}
            for p in (first, other)
        )
        for key in sorted(ours.keys() | theirs.keys()):
            if ours.get(key) != theirs.get(key):
                raise InputError(
                    f"{key} is {theirs.get(key)!r}, and {ours.get(key)!r} in {first}",
                    file=other / "config.json",
                    mend="Only weights of one architecture have an average.",
                )
        for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "chat_template.jinja"):
            one, two = ((p / name).read_bytes() if (p / name).is_file() else b"" for p in (first, other))
            if one != two:
                raise InputError(
                    f"{name} is another one than in {first}",
                    file=other,
                    mend="Only models that read texts alike have an average.",
                )
        templates = [read_json(p / "tokenizer_config.json").get("chat_template") for p in (first, other)
                     if (p / "tokenizer_config.json").is_file()]  # fmt: skip
        if len(set(map(str, templates))) > 1:
            raise InputError(
                f"the chat template is another one than in {first}",
                file=other,
                mend="Only models that read texts alike have an average.",
            )


def _recipe(places: Sequence[Path]) -> tuple[ScoringRecipe | None, list[str]]:
    """The recipe of the average, None for policies, and what is to be said of it."""
    files = [place / SCORING_FILE for place in places]
    recipes = [read_recipe(read_json(file), file) if file.is_file() else None for file in files]
    plain = [_unscaled(recipe) for recipe in recipes]
    for i, other in enumerate(plain[1:], 1):
        if other == plain[0]:
            continue
        if other is None or plain[0] is None:
            raise InputError(
                f"one of this and {places[0]} has a scoring recipe, and the other has none",
                file=places[i],
                mend="Average reward models with reward models.",
            )
        name = next(n for n, value in vars(other).items() if value != getattr(plain[0], n))
        raise InputError(
            f"{name} of the scoring recipe is {getattr(other, name)!r}, and {getattr(plain[0], name)!r} in {places[0]}",
            file=files[i],
            mend="Average models that were trained alike.",
        )
    whole = [recipe for recipe in recipes if recipe is not None]
    if not whole:
        return None, []
    notes = []
    if any((r.mean, r.std) != (0.0, 1.0) or r.scales is not None for r in whole):
        notes.append("means and scales of the members' scores are not averaged: normalise the average again")
    raw = [r.temperature * r.std for r in whole]  # of the scores before they were scaled
    alike = max(raw) - min(raw) < 1e-6 * max(raw) and all(r.scales is None for r in whole)
    if not alike:
        notes.append("temperatures of the members are not averaged: calibrate the average again")
    if any(r.uncertainty for r in whole):
        notes.append("posteriors of the members are left out: make one again, with_uncertainty")
    assert plain[0] is not None
    return replace(plain[0], temperature=raw[0] if alike else 1.0), notes


def _unscaled(recipe: ScoringRecipe | None) -> ScoringRecipe | None:
    if recipe is None:
        return None
    return replace(recipe, mean=0.0, std=1.0, temperature=1.0, levels=None, scales=None, uncertainty="")


def _layout(place: Path) -> Layout:
    """Which file each weight is in, and its type and shape, from the headers alone."""
    index = place / INDEX
    files = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    return {
        name: (file, facts)
        for file in files
        for name, facts in _header(place / file).items()
        if name != "__metadata__"
    }


def _header(file: Path) -> dict[str, Any]:
    """The header of a safetensors file: eight bytes of length, then JSON."""
    try:
        with file.open("rb") as opened:
            return json.loads(opened.read(int.from_bytes(opened.read(8), "little")))
    except (OSError, ValueError) as error:
        raise InputError("the weights could not be read", file=file, mend="Save the model again.") from error


def _check_layout(first: Layout, other: Layout, place: Path) -> None:
    for name in sorted(first.keys() | other.keys()):
        if name not in first or name not in other:
            raise InputError(
                f"only one of the models has the weight {name}",
                file=place,
                mend="Only weights of one architecture have an average.",
            )
        for key in ("shape", "dtype"):
            ours, theirs = first[name][1][key], other[name][1][key]
            if ours != theirs:
                raise InputError(
                    f"{name} has the {key} {theirs}, and {ours} in the first model",
                    file=place,
                    mend="Save all models in one type." if key == "dtype" else "Average models of one size.",
                )


def _write_file(
    name: str, places: Sequence[Path], layouts: Sequence[Layout], shares: Sequence[float], fresh: Path
) -> None:
    """One file of weights, laid out as the first member's is, tensor by tensor."""
    header = _header(places[0] / name)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    order = sorted((n for n in header if n != "__metadata__"), key=lambda n: header[n]["data_offsets"][0])
    with (fresh / name).open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for weight in order:
            value = _averaged(weight, [(p / layout[weight][0]) for p, layout in zip(places, layouts, strict=True)],
                              shares)  # fmt: skip
            out.write(value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())


def _averaged(name: str, files: Sequence[Path], shares: Sequence[float]) -> Tensor:
    total: Tensor | None = None
    first: Tensor | None = None
    for file, share in zip(files, shares, strict=True):
        with safe_open(file, framework="pt") as weights:
            own = weights.get_tensor(name)
        if not own.is_floating_point():
            if first is not None and not torch.equal(first, own):
                raise InputError(
                    f"{name} holds whole numbers that differ", file=file, mend="They have no average."
                )
            first = own
            continue
        fine = own.to(torch.float64 if own.dtype == torch.float64 else torch.float32) * share
        total, first = fine if total is None else total.add_(fine), own
    assert first is not None
    return first if total is None else total.to(first.dtype)


__all__ = ["AVERAGE_FILE", "average_weights"]
