"""Mixtures that have a name of their own in the field: weighted sums of objectives of the table.

A mixture is written out as terms, (objective, weight, settings); a name from here stands for its terms, which any
recipe may write out with other weights.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple


class Mixture(NamedTuple):
    """What a name stands for."""

    terms: tuple[tuple[str, float, Mapping[str, Any]], ...]
    says: str
    source: str
    notes: str


MIXTURES: Mapping[str, Mixture] = MappingProxyType(
    {
        "rpo": Mixture(
            (("dpo", 1.0, {"beta": 0.01}), ("sft", 0.005, {"reduction": "sequence_sum"})),
            "DPO with the log-likelihood of the chosen completion: provably held against overoptimisation.",
            "arXiv:2405.16436, the practical objective of section 5",
            "The likelihood is summed over a completion's tokens, so the small weight of 0.005 is not small.",
        ),
        "irpo": Mixture(
            (("dpo", 1.0, {"beta": 0.1}), ("sft", 1.0, {"reduction": "sequence_mean"})),
            "DPO with the chosen completion's log-likelihood per token, for chains of thought.",
            "arXiv:2404.19733, equations 1 and 2, alpha = 1",
            "The likelihood is averaged over each completion first, so long ones weigh no more. The paper repeats "
            "the whole with fresh samples: each round's model is the reference of the next.",
        ),
        "mpo": Mixture(
            (("dpo", 0.8, {}), ("bco_pair", 0.2, {}), ("sft", 1.0, {"reduction": "sequence_mean"})),
            "Preference, quality and generation: which is better, whether each is good, and how to write it.",
            "arXiv:2411.10442, equation 1 with the weights of its experiments",
            "The paper's quality loss has BCO's moving shift; bco_pair holds its shift fixed.",
        ),
        "odin": Mixture(
            (("odin_pairs", 1.0, {}), ("orthogonal_heads", 1.0, {})),
            "A reward model of two outputs: one takes what length explains, and the score is the other, quality.",
            "arXiv:2402.07319, with the weights of its code",
            "The correlations are over the whole optimizer step, however it is cut: large steps estimate them "
            "better. A score is the quality alone, in judging and as a reward.",
        ),
    }
)


def mixture_page(name: str) -> str:
    """A page of plain text about a mixture: its terms, its source and where ours differs."""
    mixture = MIXTURES[name]
    lines = [f"{name}: {mixture.says}", "", "Terms"]
    for objective, weight, settings in mixture.terms:
        told = ", ".join(f"{key} = {value}" for key, value in settings.items())
        lines.append(f"  {weight:g} × {objective}{f' ({told})' if told else ''}")
    lines += ["", "Source", f"  {mixture.source}", "", "Notes"]
    lines += textwrap.wrap(mixture.notes, 110, initial_indent="  ", subsequent_indent="  ")
    lines += [
        "",
        "In a recipe",
        f'  objective = "{name}", or written out with weights of your own:',
        f"  {written(name)}",
    ]
    return "\n".join(lines) + "\n"


def written(name: str) -> str:
    """The mixture as the key ``losses`` of a recipe."""
    parts = []
    for objective, weight, settings in MIXTURES[name].terms:
        inner = ", ".join(
            f'{key} = "{v}"' if isinstance(v, str) else f"{key} = {v}" for key, v in settings.items()
        )
        parts.append(f'["{objective}", {weight:g}{f", {{ {inner} }}" if inner else ""}]')
    return f"losses = [{', '.join(parts)}]"


__all__ = ["MIXTURES", "Mixture", "mixture_page", "written"]
