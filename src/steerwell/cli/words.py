"""What the words of a command line mean: a model, a store, prompts, a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import Prompt

if TYPE_CHECKING:
    from steerwell.data.store import Store
    from steerwell.judges import Judge
    from steerwell.models.load import Policy
    from steerwell.models.reward_ensemble import RewardEnsemble
    from steerwell.models.reward_model import RewardModel

SQLITE = b"SQLite format 3\x00"


def prepare_torch() -> None:
    """Threads as asked for, and no chatter from libraries on standard error."""
    from steerwell.cli.app import threads
    from steerwell.models.load import set_threads

    set_threads(threads())
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def model_path(word: str) -> str:
    """A model's place: a directory, a run directory (its ``model/``), a hub name, or ``world:base``."""
    if word == "world:base":
        from steerwell.world import base_path

        return str(base_path())
    if word.startswith("world:"):
        raise InputError(f"unknown model {word!r}", mend="The embedded world has one: world:base.")
    inside = Path(word) / "model"
    if inside.is_dir() and not (Path(word) / "config.json").exists():
        return str(inside)
    return word


def load_model(word: str) -> Policy | RewardModel | RewardEnsemble:
    """The reward model, ensemble or policy that lies there; its name is the word as given."""
    path = model_path(word)
    config = Path(path) / "config.json"
    classifier = config.is_file() and "ForSequenceClassification" in config.read_text("utf-8")
    if classifier or any(
        (Path(path) / f"steerwell_{name}.json").exists() for name in ("scoring", "ensemble")
    ):
        from steerwell.models.reward_ensemble import load_scorer

        return load_scorer(path, name=word)
    from steerwell.models.load import load_policy

    return load_policy(path, name=word)


def is_store(word: str) -> bool:
    """Whether the word names a store: a database URL, or a file that is (or is called) a SQLite database."""
    path = Path(word)
    if path.is_file():
        with path.open("rb") as file:
            return file.read(len(SQLITE)) == SQLITE
    return "://" in word or path.suffix in (".db", ".sqlite", ".sqlite3")


def existing_store(word: str) -> Store:
    """Open a store that must be there already (opening would otherwise make an empty one)."""
    from steerwell.data.store import open_store

    if "://" not in word:
        if not Path(word).is_file():
            raise InputError(
                "no such store", file=word, mend="Make one with: steerwell import FILE --to STORE."
            )
        if not is_store(word):
            raise InputError(
                "this is a file and no store",
                file=word,
                mend=f"Import it: steerwell import {word} --to STORE.",
            )
    return open_store(word)


def check_new_store(word: str) -> None:
    """Raise for a place where no store can be made or opened, before any work is done for it."""
    path = Path(word)
    if "://" in word or word == ":memory:":
        return
    if path.is_file() and path.stat().st_size and not is_store(word):
        raise InputError("this file is no store", file=word, mend="Give a new name, such as prefs.db.")
    if path.is_dir() or not path.parent.is_dir():
        what = "this is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(what, file=word, mend="Give a file name in a folder that is there.")


def new_store(word: str) -> Store:
    """Open a store, or make one; refuses to write into a file that is something else."""
    from steerwell.data.store import open_store

    check_new_store(word)
    return open_store(word)


def prompts(word: str, *, split: str | None = None, seed: int = 0, limit: int | None = None) -> list[Prompt]:
    """The prompts that a word names: a store, a file of any format, or ``world:COUNT``; each prompt once.

    ``split`` is for stores (and ``train``, ``test`` or ``any`` for the world); ``seed`` is for the world.
    """
    if word.startswith("world:"):
        found = _world_prompts(word, split, seed)
    elif is_store(word):
        with existing_store(word) as store:
            found = store.prompts(split=split)
    else:
        from steerwell.data.formats import load

        if split is not None:
            raise InputError(
                "--split is for stores", file=word, mend="Leave it out, or import the file first."
            )
        found = [Prompt(group.prompt, group.meta) for group in load(word)]
    unique = list({prompt.id: prompt for prompt in found}.values())[:limit]
    if not unique:
        part = f" in the split {split!r}" if split else ""
        raise InputError(f"there are no prompts{part}", file=word, mend="Give another file, store or split.")
    return unique


def _world_prompts(word: str, split: str | None, seed: int) -> list[Prompt]:
    from steerwell import world

    count = word.removeprefix("world:")
    if not count.isdigit() or not int(count):
        raise InputError(f"{word!r} names no prompts", mend="Write world:200 for 200 prompts of the world.")
    if split not in (None, "train", "test", "any"):
        raise InputError(f"the world has no split {split!r}", mend=nearest(split, ("train", "test", "any")))
    return list(world.prompts(int(count), seed=seed, split=split or "any"))


def judge(word: str, **settings: Any) -> Judge:
    """The judge that a word names: ``world:gold``, or what :func:`steerwell.judges.parse` knows."""
    from steerwell import judges

    if word == "world:gold":
        from steerwell.world import gold_judge

        return gold_judge()
    if word.startswith("world:"):
        raise InputError(f"unknown judge {word!r}", mend="The embedded world has one: world:gold.")
    if word.partition(":")[0] not in judges.KINDS:
        known = [*(f"{kind}:…" if kind != "refusal" else kind for kind in judges.KINDS), "world:gold"]
        raise InputError(f"unknown judge {word!r}", mend=nearest(word, known))
    if word.startswith(("rm:", "verifier:")):
        prepare_torch()
    if word.startswith("verifier:world:"):
        word = "verifier:" + model_path(word.removeprefix("verifier:"))
    return judges.parse(word, **{k: v for k, v in settings.items() if v})


def names(text: str, what: str) -> list[str]:
    """A comma list from the command line, without blanks; raises when it is empty."""
    found = [part.strip() for part in text.split(",") if part.strip()]
    if not found:
        raise InputError(f"no {what} given", mend=f"Write one or more, with commas: {what}1,{what}2.")
    return found


def in_chunks(items: Sequence[Any], size: int, step: Callable[..., None]) -> Any:
    """Slices of ``items``, with the progress reported after each one is worked off."""
    step(0, len(items))
    for start in range(0, len(items), size):
        yield items[start : start + size]
        step(min(start + size, len(items)), len(items))


__all__ = [
    "check_new_store",
    "existing_store",
    "in_chunks",
    "is_store",
    "judge",
    "load_model",
    "model_path",
    "names",
    "new_store",
    "prepare_torch",
    "prompts",
]
