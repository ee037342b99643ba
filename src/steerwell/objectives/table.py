"""What an objective is, and the table of those we have.

An objective is a plain function. Its positional arguments are tensors that the training loop provides by name
(:data:`TENSORS`); its keyword-only arguments are the hyperparameters, and they are the configuration: file
keys, help texts and documents come from the signature. It returns ``(losses, metrics)``, both unreduced.

The decorator :func:`objective` only notes a few facts on the function and enters it in :data:`TABLE`.
Everything else here reads signatures and docstrings.

Shape letters: N completions, S scored tokens, M pairs, U steps, R figures that are carried along; of reward models H
outputs of the head, A named attributes, D the width of what the head reads.
"""

from __future__ import annotations

import difflib
import inspect
import numbers
import textwrap
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor

from steerwell.objectives.mixtures import MIXTURES, mixture_page

Unit = Literal["pair", "completion", "token", "step"]
Kind = Literal["policy", "reward", "policy_gradient"]
HeadKind = Literal["score", "attributes", "quantiles", "members", "quality_length"]
Metrics = dict[str, Tensor]


class ObjectiveError(ValueError):
    """A wrong objective name, hyperparameter or input. ``str(error)`` is one line that a user can act on."""


class TensorFacts(NamedTuple):
    """Shape (letters as in the module docstring), dtype and meaning of a tensor by name."""

    shape: tuple[str, ...]
    dtype: torch.dtype
    meaning: str


TENSORS: dict[str, TensorFacts] = {
    "logps": TensorFacts(
        ("N",), torch.float32, "log-probability of each completion under the policy, summed"
    ),
    "ref_logps": TensorFacts(("N",), torch.float32, "the same under the frozen reference model"),
    "old_logps": TensorFacts(("N",), torch.float32, "the same under the policy that sampled the completion"),
    "lengths": TensorFacts(("N",), torch.float32, "scored tokens of each completion"),
    "pairs": TensorFacts(("2", "M"), torch.long, "completion indices: row 0 preferred, row 1 not preferred"),
    "pair_probs": TensorFacts(
        ("M",), torch.float32, "probability that row 0 is indeed preferred (vote share)"
    ),
    "labels": TensorFacts(("N",), torch.bool, "True where the completion is desirable"),
    "ranks": TensorFacts(("N",), torch.long, "place of the completion within its group, 0 is best"),
    "scores": TensorFacts(
        ("N",), torch.float32, "score of each completion: the data's, or the model's own for reward models"
    ),
    "rewards": TensorFacts(("N",), torch.float32, "given reward of each completion, NaN where there is none"),
    "group": TensorFacts(("N",), torch.long, "which prompt a completion answers"),
    "advantages": TensorFacts(("N",), torch.float32, "how much better than its peers a completion is"),
    "demonstrations": TensorFacts(("N",), torch.bool, "True where the completion is to be imitated"),
    "kl": TensorFacts((), torch.float32, "mean log-ratio over mismatched prompts and completions"),
    "per_token_logps": TensorFacts(("S",), torch.float32, "log-probability of each scored token (policy)"),
    "ref_per_token_logps": TensorFacts(("S",), torch.float32, "the same under the frozen reference model"),
    "old_per_token_logps": TensorFacts(("S",), torch.float32, "the same under the policy that sampled"),
    "owner": TensorFacts(("S",), torch.long, "which completion a scored token belongs to"),
    "per_token_kl": TensorFacts(
        ("S",),
        torch.float32,
        "KL from the reference to the policy, over the vocabulary, where each token stands",
    ),
    "per_token_collision": TensorFacts(
        ("S",), torch.float32, "log of the sum of the policy's squared probabilities there, without gradient"
    ),
    "token_weights": TensorFacts(("S",), torch.float32, "given weight of each scored token"),
    "turns": TensorFacts(("S",), torch.long, "which of the assistant's turns in its completion, from 0"),
    "steps": TensorFacts(("S",), torch.long, "which step of its completion a scored token is of, from 0"),
    "step_scores": TensorFacts(("U",), torch.float32, "log-odds that a step is right, by the reward model"),
    "step_owner": TensorFacts(("U",), torch.long, "which completion a step belongs to"),
    "step_labels": TensorFacts(
        ("U",), torch.float32, "probability that the step is right, NaN where there is no label"
    ),
    "shared_tokens": TensorFacts(
        ("M",), torch.long, "how many scored tokens both completions of the pair begin with"
    ),
    "head_scores": TensorFacts(
        ("N", "H"), torch.float32, "all outputs of a reward model's head, by completion"
    ),
    "head_weights": TensorFacts(("H", "D"), torch.float32, "the weights of a reward model's head"),
    "attributes": TensorFacts(
        ("N", "A"), torch.float32, "given score of each completion by attribute, NaN where there is none"
    ),
    "pair_strengths": TensorFacts(
        ("M",),
        torch.float32,
        "by how much row 0 is better: 0 a tie, 1 slightly, 2 clearly, 3 by far; NaN: unknown",
    ),
    "pair_draws": TensorFacts(
        ("M",),
        torch.long,
        "a number below 2^48 that is always the same for this pair, and another for others",
    ),
    "running": TensorFacts(("R",), torch.float32, "figures that the objective carries from step to step"),
}
UNIT_LETTER: dict[str, str] = {"pair": "M", "completion": "N", "token": "S", "step": "U"}
DEFAULT_REDUCTION: dict[str, str] = {
    "pair": "pair_mean",
    "completion": "completion_mean",
    "token": "token_mean",
    "step": "step_mean",
}
UNIT_REDUCTIONS: dict[str, tuple[str, ...]] = {
    "pair": ("pair_mean",),
    "completion": ("completion_mean",),
    "token": ("token_mean", "sequence_mean", "sequence_sum"),
    "step": ("step_mean", "step_sequence_mean"),
}


class Running(Protocol):
    """How an objective moves the figures that it carries from step to step (a moving average, for example)."""

    def __call__(self, running: Tensor | None, **given: Any) -> Tensor:
        """The figures (R,) for this step, float64 and without gradient, from those of the step before (None at the
        first). ``given`` holds the objective's tensors over the whole step, and its hyperparameters.
        """
        ...


class Objective(Protocol):
    """A function that carries the facts noted by :func:`objective`."""

    __name__: str
    __doc__: str | None
    unit: Unit
    reduction: str
    source: str
    kind: Kind
    decomposable: bool
    surrogate: bool
    advantages: str | None
    mask: str | None
    only_if: Mapping[str, str]
    running: Running | None
    rises_at_start: str
    notes: str
    head: HeadKind

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Metrics]: ...


TABLE: dict[str, Objective] = {}
F = TypeVar("F", bound=Callable[..., tuple[Tensor, Metrics]])


def objective(
    *,
    unit: Unit,
    reduction: str | None = None,
    source: str = "",
    kind: Kind = "policy",
    decomposable: bool = True,
    surrogate: bool = False,
    advantages: str | None = None,
    mask: str | None = None,
    only_if: Mapping[str, str] | None = None,
    running: Running | None = None,
    rises_at_start: str = "",
    notes: str = "",
    head: HeadKind = "score",
) -> Callable[[F], F]:
    """Note these facts on a function and enter it in :data:`TABLE` under its name.

    unit: what one entry of the losses stands for. reduction: a name of ``reduce.REDUCTIONS``.
    kind: what is trained and where the data come from ("policy_gradient": sampled and rewarded).
    decomposable: False if the losses of one completion depend on others of the batch (beyond its own group).
    surrogate: True if a part of the value is held constant, so that the gradient is not the value's
    derivative.
    advantages: the usual name in ``advantages.ADVANTAGES``. mask: the bool tensor (N,) that selects
    completions.
    only_if: tensor -> hyperparameter; the tensor is needed only while that hyperparameter is not 0.
    running: makes the optional tensor ``running``, which the loop carries from step to step and into checkpoints.
    Without it, as in a plain call, the objective takes the figures of the batch at hand.
    rises_at_start: why the loss, by its definition, may rise at the start of a run when the better completion
    gets likelier, although it falls far from there; empty for all losses that go down from the first step.
    head: of a reward objective, what the outputs of the model's head are: one score; the attributes of the data; the
    quantiles of a score (hyperparameter levels); members of an ensemble (hyperparameter members); quality and length.
    Raises ObjectiveError if the signature breaks the rules of the module docstring.
    """

    def note(fn: F) -> F:
        chosen = reduction or DEFAULT_REDUCTION[unit]
        _check_signature(fn, unit, chosen, mask, only_if or {})
        if (running is not None) != ("running" in _positional(fn)):
            raise ObjectiveError(
                f"{fn.__name__} takes the tensor running if and only if it says how it moves"
            )
        name = fn.__name__
        known = TABLE.get(name)
        if known is not None and known.__module__ != fn.__module__:
            raise ObjectiveError(f"there is already an objective {name!r} (in {known.__module__})")
        noted = cast(Any, fn)
        noted.unit, noted.reduction, noted.source, noted.kind = unit, chosen, source, kind
        noted.decomposable, noted.surrogate, noted.advantages = decomposable, surrogate, advantages
        noted.mask, noted.only_if, noted.notes = mask, dict(only_if or {}), notes
        noted.running = running
        noted.rises_at_start, noted.head = rises_at_start, head
        TABLE[name] = cast(Objective, fn)
        return fn

    return note


def get(name: str | Callable[..., Any]) -> Objective:
    """The objective of that name; an objective given as a function comes back as it is."""
    if isinstance(name, str):
        if name not in TABLE:
            raise ObjectiveError(f"unknown objective {name!r}. {_nearest(name, TABLE)}")
        return TABLE[name]
    if not hasattr(name, "unit"):
        called = getattr(name, "__name__", repr(name))
        raise ObjectiveError(f"{called} is not an objective: decorate it with @objective(unit=...)")
    return cast(Objective, name)


def needs(fn: Callable[..., Any], hyper: Mapping[str, Any] | None = None) -> tuple[str, ...]:
    """Names of the tensors that must be given, with these hyperparameters (the defaults where not given)."""
    values = {**hyperparameters(fn), **(hyper or {})}
    only_if: Mapping[str, str] = getattr(fn, "only_if", {})
    return tuple(
        name
        for name, p in _positional(fn).items()
        if (p.default is p.empty if name not in only_if else values[only_if[name]] != 0)
    )


def optional(fn: Callable[..., Any]) -> tuple[str, ...]:
    """Names of the tensors that are used when there and not missed otherwise, such as ``pair_probs``."""
    only_if: Mapping[str, str] = getattr(fn, "only_if", {})
    carried = ("running",)  # the loop's own business, not the data's
    return tuple(
        n
        for n, p in _positional(fn).items()
        if p.default is not p.empty and n not in only_if and n not in carried
    )


def hyperparameters(fn: Callable[..., Any]) -> dict[str, Any]:
    """Name -> default of every hyperparameter, in the order of the signature."""
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_hyperparameters(fn: Callable[..., Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults with the given values over them. Raises ObjectiveError for unknown names and wrong values.

    The values are tried on an empty batch, so the objective's own range checks speak before any model is
    loaded.
    """
    known, name = hyperparameters(fn), getattr(fn, "__name__", "objective")
    for key in given:
        if key not in known:
            hint = _nearest(key, known) if known else "It has none."
            raise ObjectiveError(f"{name} has no hyperparameter {key!r}. {hint}")
    values = {**known, **given}
    try:
        wanted = needs(fn, values)
        if all(tensor in TENSORS for tensor in wanted):
            fn(**{tensor: _empty(tensor) for tensor in wanted}, **values)
    except ObjectiveError as error:
        raise ObjectiveError(f"{name}: {error}") from None
    return values


def in_range(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    at_most: float | None = None,
) -> None:
    """Raise ObjectiveError unless ``value`` is a number within the bounds: ``beta must be > 0, got -1``."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ObjectiveError(f"{name} must be a number, got {value!r}")
    number = float(value)
    tests = (
        (">", above, above is None or number > above),
        (">=", at_least, at_least is None or number >= at_least),
        ("<", below, below is None or number < below),
        ("<=", at_most, at_most is None or number <= at_most),
    )
    wanted = " and ".join(f"{sign} {bound:g}" for sign, bound, _ in tests if bound is not None)
    if not all(holds for *_, holds in tests) or number != number or abs(number) == float("inf"):
        raise ObjectiveError(f"{name} must be {wanted or 'finite'}, got {value!r}")


def one_of(name: str, value: Any, choices: Iterable[str]) -> None:
    """Raise ObjectiveError unless ``value`` is one of the choices."""
    known = tuple(choices)
    if value not in known:
        raise ObjectiveError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")


def explain(name: str | Callable[..., Any]) -> str:
    """A page of plain text: formula, source, when to use it, what it needs, hyperparameters, how it can fail. For the
    name of a mixture: its terms.
    """
    if isinstance(name, str) and name in MIXTURES:
        return mixture_page(name)
    fn = get(name)
    parts = docstring_parts(fn)
    meaning = dict(_entries(parts.get("Hyperparameters", "")))
    lines = [f"{fn.__name__}: {parts['']}", ""]
    lines += ["Formula", *_indent(parts.get("Formula", "")), "", "Source", *_wrap(fn.source), "", "Needs"]
    for tensor, parameter in _positional(fn).items():
        facts = TENSORS.get(tensor)
        shape = f" ({', '.join(facts.shape)})" if facts and facts.shape else ""
        when = ""
        if tensor == "running":
            when = "; the loop carries them"
        elif tensor in fn.only_if:
            when = f"; only if {fn.only_if[tensor]} is not 0"
        elif parameter.default is not parameter.empty:
            when = "; used when the data have it"
        lines += _wrap(f"{tensor}{shape}: {facts.meaning if facts else 'your own tensor'}{when}")
    lines += ["", "Hyperparameters"]
    for key, default in hyperparameters(fn).items():
        lines += _wrap(f"{key} = {default!r}: {meaning.get(key, 'not described')}")
    if lines[-1] == "Hyperparameters":
        lines.append("  none")
    lines += ["", "Gives", *_indent(parts.get("Returns", f"one loss per {fn.unit}"))]
    lines.append(
        f"  reduction: {fn.reduction}" + ("" if fn.decomposable else "; couples the batch's completions")
    )
    if fn.advantages:
        lines.append(f"  advantages: {fn.advantages}")
    for heading in ("Differs", "Use when", "Failure modes"):
        if parts.get(heading):
            lines += ["", heading, *_indent(parts[heading])]
    if fn.notes or fn.rises_at_start:
        rises = f"The loss may rise at the start: {fn.rises_at_start}." if fn.rises_at_start else ""
        lines += ["", "Notes", *_wrap(f"{rises} {fn.notes}".strip())]
    return "\n".join(lines) + "\n"


def docstring_parts(fn: Callable[..., Any]) -> dict[str, str]:
    """The sections of a docstring: "" is its opening, then "Formula", "Hyperparameters" and so on.

    A section is a line ``Name:`` at the margin with indented lines below it.
    """
    parts: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.cleandoc(fn.__doc__ or "no description").splitlines():
        if line and not line.startswith(" ") and line.endswith(":") and len(line) < 30:
            current = line[:-1]
            parts[current] = []
        else:
            parts[current].append(line)
    return {name: inspect.cleandoc("\n".join(lines)).strip() for name, lines in parts.items()}


def _entries(section: str) -> list[tuple[str, str]]:
    """``name: meaning`` entries of a section; indented lines continue the entry above."""
    entries: list[tuple[str, str]] = []
    for line in section.splitlines():
        if line.startswith(" ") and entries:
            entries[-1] = (entries[-1][0], f"{entries[-1][1]} {line.strip()}")
        elif ":" in line:
            key, _, text = line.partition(":")
            entries.append((key.strip(), text.strip()))
    return entries


def _indent(text: str) -> list[str]:
    return [f"  {line}".rstrip() for line in text.splitlines()]


def _wrap(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent="  ", subsequent_indent="      ")


def _positional(fn: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    parameters = inspect.signature(fn).parameters.values()
    return {p.name: p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def _check_signature(
    fn: Callable[..., Any], unit: str, reduction: str, mask: str | None, only_if: Mapping[str, str]
) -> None:
    name, positional, hyper = fn.__name__, _positional(fn), hyperparameters(fn)
    wrong = ""
    if len(positional) + len(hyper) != len(inspect.signature(fn).parameters):
        wrong = "takes only plain positional tensors and keyword-only hyperparameters"
    elif any(default is inspect.Parameter.empty for default in hyper.values()):
        wrong = "needs a default for every hyperparameter"
    elif any(p.default not in (p.empty, None) for p in positional.values()):
        wrong = "can have only None as a tensor's default"
    elif reduction not in UNIT_REDUCTIONS[unit]:
        wrong = f"gives one loss per {unit}, which {reduction!r} cannot reduce"
    elif mask is not None and mask not in positional:
        wrong = f"is masked by {mask!r}, which it does not take"
    elif any(t not in positional or h not in hyper for t, h in only_if.items()):
        wrong = "names an unknown tensor or hyperparameter in only_if"
    if wrong:
        raise ObjectiveError(f"{name} {wrong}")


def _empty(tensor: str) -> Tensor:
    facts = TENSORS[tensor]
    return torch.zeros([2 if letter == "2" else 0 for letter in facts.shape], dtype=facts.dtype)


def _nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    match = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"Did you mean {match[0]!r}?" if match else f"Known: {', '.join(names)}."
