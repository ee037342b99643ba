"""Ensembles of reward models: whole models, or adapters that share one base in memory.

Members of different seeds, and better of different pretraining, disagree where they guess (arXiv:2310.02743,
arXiv:2312.09244). Heads of one backbone are the cheaper kind: the objective ``ensemble_bradley_terry``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from steerwell.data.errors import InputError, nearest
from steerwell.data.types import CompletionGroup
from steerwell.models.adapter_files import base_of, is_adapter, load_base, read_adapter
from steerwell.models.adapters import scalings
from steerwell.models.directory import model_place, put_in_place, read_json, weights_digest
from steerwell.models.load import MAX_TOKENS, how_to_read, name_of, read_tokenizer
from steerwell.models.load_reward_model import load_reward_model, recipe_beside
from steerwell.models.reward_model import RewardModel
from steerwell.models.scoring import COMBINATIONS, by_members, check_tokenizer

ENSEMBLE_FILE = "steerwell_ensemble.json"
VERSION = 1
PENALTY = 0.5


@dataclass(eq=False)
class RewardEnsemble:
    """Reward models whose scores become one. Made by :func:`reward_ensemble`.

    ``combine`` and ``penalty`` are as in :class:`~steerwell.models.scoring.ScoringRecipe`, on the members' own scores.
    """

    members: tuple[RewardModel, ...]
    combine: str = "mean"
    penalty: float = PENALTY
    name: str = "reward-ensemble"
    path: str = ""

    def __post_init__(self) -> None:
        if self.combine not in COMBINATIONS:
            raise InputError(
                f"unknown combine {self.combine!r}", mend=nearest(str(self.combine), COMBINATIONS)
            )
        if not self.penalty >= 0:
            raise InputError(f"the penalty must be >= 0, got {self.penalty}", mend="Use penalty=0.5.")
        plain = [m.name for m in self.members if (m.recipe.mean, m.recipe.std) == (0.0, 1.0)]
        if self.combine != "mean" and plain:
            raise InputError(
                f"combine = {self.combine!r} compares the levels of its members' scores, and {plain[0]} has none: "
                "pairs leave the level of a reward model free",
                mend="Give reference=groups, or members that are normalised(groups).",
            )

    @property
    def device(self) -> torch.device:
        """Where the first member is."""
        return self.members[0].device

    def each(
        self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS
    ) -> list[list[tuple[float, ...]]]:
        """The members' own scores of every completion, one list per group."""
        groups = list(groups)
        by_member = [member.score(groups, max_tokens=max_tokens) for member in self.members]
        return [list(zip(*rows, strict=True)) for rows in zip(*by_member, strict=True)]

    def score(self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS) -> list[list[float]]:
        """The score of every completion, one list per group."""
        return [
            self._combined(rows).tolist() if rows else [] for rows in self.each(groups, max_tokens=max_tokens)
        ]

    def score_with_std(
        self, groups: Iterable[CompletionGroup], *, max_tokens: int = MAX_TOKENS
    ) -> list[list[tuple[float, float]]]:
        """The score of every completion and the standard deviation of its members' scores (the sum of squares divided
        by their number), one list per group.
        """
        found: list[list[tuple[float, float]]] = []
        for rows in self.each(groups, max_tokens=max_tokens):
            spread = torch.tensor(rows, dtype=torch.float64).std(1, correction=0).tolist() if rows else []
            found.append(list(zip(self._combined(rows).tolist() if rows else [], spread, strict=True)))
        return found

    def _combined(self, rows: Sequence[tuple[float, ...]]) -> Tensor:
        return by_members(torch.tensor(rows, dtype=torch.float64), self.combine, self.penalty)

    def with_recipe(self, **changes: Any) -> RewardEnsemble:
        """This ensemble with another ``combine`` or ``penalty``; the members are shared."""
        return replace(self, **changes)

    def digest(self) -> str:
        """Identity of the members and of how they become one score."""
        whole = json.dumps([[member.digest() for member in self.members], self.combine, self.penalty])
        return hashlib.blake2b(whole.encode(), digest_size=12).hexdigest()

    def save(self, path: str | Path) -> Path:
        """Write a directory with one folder for each member: an adapter with its head where it has one over a base that
        lies in a directory, else a whole model.
        """

        def write(fresh: Path) -> None:
            fresh.mkdir(parents=True)
            names = [f"member{i + 1}" for i in range(len(self.members))]
            for name, member in zip(names, self.members, strict=True):
                adapted = hasattr(member.model, "peft_config") and member.base
                (member.save_adapter if adapted else member.save)(fresh / name)
            about = {"version": VERSION, "combine": self.combine, "penalty": self.penalty, "members": names}
            (fresh / ENSEMBLE_FILE).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")

        return put_in_place(Path(path), write)


@dataclass(eq=False)
class SharingMember(RewardModel):
    """A reward model that is one of several adapters on one network: whoever asks for its network gets it with this
    adapter and this head switched on.
    """

    adapter: str = "default"
    head: Any = None

    @property
    def model(self) -> Any:  # type: ignore[override]
        """The network, as this member has it."""
        network = self.__dict__["network"]
        inner = network.get_base_model()
        if self.head is not None and inner.score.weight is not self.head:
            network.set_adapter(self.adapter)
            inner.score.weight = self.head
        return network

    @model.setter
    def model(self, network: Any) -> None:
        self.__dict__["network"] = network

    def digest(self) -> str:
        """As if it were alone: what it shares and what is its own, by the names that they have there."""
        network, own = self.model, f".{self.adapter}"
        others = [f".{name}" for name in network.peft_config if name != self.adapter]

        def alone(name: str) -> str | None:
            parts = re.findall(r"\.[^.]+", f".{name}")
            if any(part in others for part in parts):
                return None
            return "".join(".default" if part == own else part for part in parts)[1:]

        state = {new: x for name, x in network.state_dict().items() if (new := alone(name))}
        factors = {new: x for name, x in scalings(network).items() if (new := alone(name))}
        both = weights_digest(state, factors) + self.recipe.digest()
        return hashlib.blake2b(both.encode(), digest_size=12).hexdigest()


def reward_ensemble(
    members: str | Path | Sequence[str | Path | RewardModel],
    combine: str | None = None,
    penalty: float | None = None,
    *,
    reference: Iterable[CompletionGroup] | None = None,
    name: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
) -> RewardEnsemble:
    """Put reward models together: directories, loaded models, or the one directory that :meth:`RewardEnsemble.save`
    wrote. Adapters in directories (:meth:`RewardModel.save_adapter`) of one base are held on one network.

    ``combine``: ``mean``, ``min`` (worst case) or ``uwo``, mean - ``penalty`` * variance over the members
    (arXiv:2310.02743; the variance divides by their number); as saved, else ``mean`` and 0.5. Members are compared in
    their own normalised scores: with ``reference`` each gets mean 0 and standard deviation 1 over those completions
    first, as in the paper. Without it ``mean`` takes scores as they are (a level changes no comparison, a larger scale
    weighs more), and ``min`` and ``uwo`` refuse members that are not normalised.

    Raises :class:`InputError` for fewer than two members, members with other tokenizers or chat templates, those that
    are not normalised where it matters, and what :func:`load_reward_model` refuses.
    """
    path = ""
    if isinstance(members, str | Path):
        path, folder = str(members), Path(model_place(members)).expanduser()
        about = _read(folder)
        combine = about["combine"] if combine is None else combine
        penalty = about["penalty"] if penalty is None else penalty
        members = [folder / str(member) for member in about["members"]]
        name = name or name_of(path)
    if len(members) < 2:
        raise InputError(f"an ensemble of {len(members)} reward models", mend="Give two or more.")
    loaded = _loaded(members, device, dtype)
    _check_alike(loaded)
    if reference is not None:
        reference = list(reference)
        loaded = [member.normalised(reference) for member in loaded]
    return RewardEnsemble(
        tuple(loaded),
        "mean" if combine is None else combine,
        PENALTY if penalty is None else penalty,
        name or "reward-ensemble",
        path,
    )


def load_scorer(
    path: str | Path, *, name: str | None = None, device: str | torch.device | None = None
) -> RewardModel | RewardEnsemble:
    """The reward model or the ensemble that lies there."""
    if is_ensemble(path):
        return reward_ensemble(path, name=name, device=device)
    return load_reward_model(path, name=name, device=device)


def is_ensemble(place: str | Path) -> bool:
    """Whether a directory holds an ensemble."""
    return (Path(place).expanduser() / ENSEMBLE_FILE).is_file()


def _read(folder: Path) -> dict[str, Any]:
    file = folder / ENSEMBLE_FILE
    if not file.is_file():
        raise InputError(
            "no ensemble in this directory", file=folder, mend="Give a list of reward models: [DIR, DIR]."
        )
    about = read_json(file)
    if about.get("version") != VERSION:
        raise InputError(
            f"the ensemble has version {about.get('version')!r}, this steerwell reads {VERSION}",
            file=file,
            mend="Upgrade steerwell.",
        )
    for key, kind in (("combine", str), ("penalty", int | float), ("members", list)):
        if not isinstance(about.get(key), kind):
            raise InputError(f"not an ensemble: {key!r} is wrong", file=file, mend="Save it again.")
    return about


def _loaded(
    members: Sequence[str | Path | RewardModel],
    device: str | torch.device | None,
    dtype: str | torch.dtype | None,
) -> list[RewardModel]:
    """All members; adapters of one base and as many outputs on one network."""
    networks: dict[tuple[str, int], Any] = {}
    found: list[RewardModel] = []
    for i, member in enumerate(members):
        if isinstance(member, RewardModel):
            found.append(member)
            continue
        folder = Path(model_place(member)).expanduser()
        if not is_adapter(folder):
            found.append(
                load_reward_model(folder if folder.exists() else str(member), device=device, dtype=dtype)
            )
            continue
        recipe, tokenizer = (
            recipe_beside(folder),
            read_tokenizer(str(folder), folder, how_to_read(str(folder))),
        )
        check_tokenizer(recipe, tokenizer, folder)
        base, adapter = base_of(folder), f"member{i + 1}"
        key = (base, len(recipe.outputs))
        below = networks.get(key) or load_base(base, len(recipe.outputs), device, dtype)
        networks[key], head = read_adapter(below, folder, adapter)
        found.append(
            SharingMember(
                networks[key],
                tokenizer,
                recipe,
                name_of(folder),
                str(folder),
                base,
                adapter=adapter,
                head=head,
            )
        )
    return found


def _check_alike(members: Sequence[RewardModel]) -> None:
    """Raise :class:`InputError` where one reads texts in another way than the first."""
    first = members[0]
    for other in members[1:]:
        for what, read in (
            ("tokenizer", lambda m: m.tokenizer.get_vocab()),
            ("chat template", lambda m: m.tokenizer.chat_template),
        ):
            if read(first) != read(other):
                raise InputError(
                    f"{other.name} has another {what} than {first.name}",
                    file=other.path or None,
                    mend="Put models of one family together.",
                )


__all__ = [
    "ENSEMBLE_FILE",
    "RewardEnsemble",
    "SharingMember",
    "is_ensemble",
    "load_scorer",
    "reward_ensemble",
]
