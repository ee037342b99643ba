"""steerwell: from annotations to an aligned model, with a report one can trust.

The names of ``__all__`` are loaded when they are first used, so ``import steerwell`` is quick and loads no
torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerwell import judges as judges
    from steerwell import objectives as objectives
    from steerwell import world as world
    from steerwell.data import resolve as resolve
    from steerwell.data.calibration import fit_temperature as fit_temperature
    from steerwell.data.cutpoints import fit_cutpoints as fit_cutpoints
    from steerwell.data.errors import InputError as InputError
    from steerwell.data.formats import load as load
    from steerwell.data.formats import save as save
    from steerwell.data.messages import Message as Message
    from steerwell.data.quality import audit as audit
    from steerwell.data.store import Store as Store
    from steerwell.data.store import open_store as open
    from steerwell.data.types import Annotation as Annotation
    from steerwell.data.types import Completion as Completion
    from steerwell.data.types import CompletionGroup as CompletionGroup
    from steerwell.data.types import Pair as Pair
    from steerwell.data.types import Prompt as Prompt
    from steerwell.data.types import Source as Source
    from steerwell.evals.stats import Estimate as Estimate
    from steerwell.evals.task import evaluate as evaluate
    from steerwell.models.average import average_weights as average_weights
    from steerwell.models.load import Policy as Policy
    from steerwell.models.load import load_policy as load_policy
    from steerwell.models.load_reward_model import load_reward_model as load_reward_model
    from steerwell.models.monte_carlo import monte_carlo_step_labels as monte_carlo_step_labels
    from steerwell.models.reward_ensemble import reward_ensemble as reward_ensemble
    from steerwell.models.reward_model import RewardModel as RewardModel
    from steerwell.models.self_play import self_play_pairs as self_play_pairs
    from steerwell.models.token_weights import contrast_weights as contrast_weights
    from steerwell.train.loop import train as train
    from steerwell.train.sources import rollouts as rollouts

# Where a name comes from: a module and the name in it, or (with no name) the module itself. ``train`` is a
# room as well as a verb: its package can be called, so that no order of imports hides the verb (see
# train/__init__).
_PLACES: dict[str, tuple[str, str]] = {
    "Annotation": ("steerwell.data.types", "Annotation"),
    "Completion": ("steerwell.data.types", "Completion"),
    "CompletionGroup": ("steerwell.data.types", "CompletionGroup"),
    "Estimate": ("steerwell.evals.stats", "Estimate"),
    "InputError": ("steerwell.data.errors", "InputError"),
    "Message": ("steerwell.data.messages", "Message"),
    "Pair": ("steerwell.data.types", "Pair"),
    "Policy": ("steerwell.models.load", "Policy"),
    "Prompt": ("steerwell.data.types", "Prompt"),
    "RewardModel": ("steerwell.models.reward_model", "RewardModel"),
    "Source": ("steerwell.data.types", "Source"),
    "Store": ("steerwell.data.store", "Store"),
    "contrast_weights": ("steerwell.models.token_weights", "contrast_weights"),
    "average_weights": ("steerwell.models.average", "average_weights"),
    "audit": ("steerwell.data.quality", "audit"),
    "evaluate": ("steerwell.evals.task", "evaluate"),
    "fit_cutpoints": ("steerwell.data.cutpoints", "fit_cutpoints"),
    "fit_temperature": ("steerwell.data.calibration", "fit_temperature"),
    "judges": ("steerwell.judges", ""),
    "load": ("steerwell.data.formats", "load"),
    "load_policy": ("steerwell.models.load", "load_policy"),
    "load_reward_model": ("steerwell.models.load_reward_model", "load_reward_model"),
    "monte_carlo_step_labels": ("steerwell.models.monte_carlo", "monte_carlo_step_labels"),
    "objectives": ("steerwell.objectives", ""),
    "open": ("steerwell.data.store", "open_store"),
    "resolve": ("steerwell.data.resolve", ""),
    "reward_ensemble": ("steerwell.models.reward_ensemble", "reward_ensemble"),
    "rollouts": ("steerwell.train.sources", "rollouts"),
    "save": ("steerwell.data.formats", "save"),
    "self_play_pairs": ("steerwell.models.self_play", "self_play_pairs"),
    "train": ("steerwell.train", ""),
    "world": ("steerwell.world", ""),
}

__all__ = [  # noqa: RUF022 (in the order in which they are used)
    "open",
    "load",
    "save",
    "audit",
    "load_policy",
    "load_reward_model",
    "reward_ensemble",
    "average_weights",
    "judges",
    "resolve",
    "objectives",
    "train",
    "rollouts",
    "contrast_weights",
    "self_play_pairs",
    "fit_temperature",
    "fit_cutpoints",
    "monte_carlo_step_labels",
    "evaluate",
    "world",
    "InputError",
    "Annotation",
    "Completion",
    "CompletionGroup",
    "Estimate",
    "Message",
    "Pair",
    "Policy",
    "Prompt",
    "RewardModel",
    "Source",
    "Store",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("steerwell")
    elif name in _PLACES:
        module, inside = _PLACES[name]
        found = import_module(module)
        value = getattr(found, inside) if inside else found
    else:
        raise AttributeError(f"module 'steerwell' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *_PLACES, "__version__"})
