"""Training: one loop for every objective, on recorded data or on fresh rollouts, with exact resume.

The room is also the verb: ``steerwell.train(policy, pairs, "dpo", out=…)`` calls
:func:`steerwell.train.loop.train`. Names are loaded when they are first used, so that reading a recipe
loads no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from steerwell.train.config import Recipe as Recipe
    from steerwell.train.config import TrainConfig as TrainConfig
    from steerwell.train.loop import train as train
    from steerwell.train.metrics import read_metrics as read_metrics
    from steerwell.train.recipe import run_recipe as run_recipe
    from steerwell.train.rundir import TrainingError as TrainingError
    from steerwell.train.sources import rollouts as rollouts

_PLACES = {
    "Recipe": "config",
    "TrainConfig": "config",
    "TrainingError": "rundir",
    "read_metrics": "metrics",
    "rollouts": "sources",
    "run_recipe": "recipe",
    "train": "loop",
}
__all__ = [  # noqa: RUF022 (in the order in which they are used)
    "train",
    "rollouts",
    "TrainConfig",
    "Recipe",
    "run_recipe",
    "read_metrics",
    "TrainingError",
]


def __getattr__(name: str) -> Any:
    """Load a public name on first use (PEP 562)."""
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_PLACES[name]}"), name)
    globals()[name] = value
    return value


class _Verb(ModuleType):
    """The room as a verb. (A room that is imported hides a function of its name in the package above.)"""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return import_module(f"{__name__}.loop").train(*args, **kwargs)


sys.modules[__name__].__class__ = _Verb
