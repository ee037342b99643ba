"""``train``: one call for every objective, recorded data or rollouts, policies and reward models.

It checks everything that can be checked before work starts, takes the run's folder, and hands a
:class:`~steerwell.train.fit.Run` to :func:`~steerwell.train.fit.fit`, which does the steps. A run is a
function of its arguments: killed at any moment, the same call continues it to the same weights and the same
``metrics.jsonl``, byte for byte (on a CPU, with the same number of threads).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steerwell.data.errors import InputError
from steerwell.data.types import CompletionGroup
from steerwell.models.adapters import (
    Adapter,
    AdapterKind,
    asked_adapter,
)
from steerwell.models.batch import layout_for
from steerwell.models.load import Policy
from steerwell.models.reward_model import RewardModel
from steerwell.objectives.table import hyperparameters
from steerwell.train.best import Best, check_best
from steerwell.train.config import (
    FREE_SETTINGS,
    TrainConfig,
    parse,
    split_settings,
)
from steerwell.train.displacement import Displacement
from steerwell.train.fit import Run, Watch, fit
from steerwell.train.heads import asked_head
from steerwell.train.item_file import Chosen, ItemFile, sizes
from steerwell.train.items import Item, Prepared, Progress, items_digest, prepare
from steerwell.train.layers import needs_checkpointing, set_layers
from steerwell.train.precision import (
    MasterWeights,
    set_precision,
)
from steerwell.train.preflight import check_ends, stop_tokens
from steerwell.train.provide import Provider, check_mismatch
from steerwell.train.ranks import Ranks, join
from steerwell.train.reference import LIVE_NAMES, REFERENCE_NAMES, Kept, Reference, cache_path
from steerwell.train.rundir import RunDir
from steerwell.train.sinks import check_sinks
from steerwell.train.sources import Rollouts, Source, epoch_order, passes, steps_in
from steerwell.train.start import (
    Model,
    completed,
    live_reference,
    load_model,
    named_reference,
    spread,
    start_digest,
    to_train,
)
from steerwell.train.terms import Spec, Term, check_data, describe, functions_of, make_terms, needed


@dataclass(frozen=True)
class _Order:
    """What was asked for, checked before any model is touched."""

    terms: list[Term]
    config: TrainConfig
    source: Source | None
    groups: Sequence[CompletionGroup]
    eval_groups: Sequence[CompletionGroup]
    reference: Any
    adapter: Adapter | None
    watch: Watch | None
    progress: Progress | None


def train(
    policy: Policy | RewardModel | str | Path,
    data: Sequence[CompletionGroup] | Source,
    objective: Spec,
    *,
    out: str | Path,
    eval_data: Sequence[CompletionGroup] | None = None,
    reference: Policy | str | Path | None = "start",
    config: TrainConfig | Mapping[str, Any] | None = None,
    lora: int | None = None,
    adapter: AdapterKind = "lora",
    lora_alpha: float | None = None,
    lora_targets: Sequence[str] | None = None,
    progress: Progress | None = None,
    watch: Watch | None = None,
    **settings: Any,
) -> Any:
    """Train a policy (or, with a reward objective, a reward model) and save it in ``out/model``.

    ``policy`` is left as it is; the trained copy is returned. Given as a path (a model or a run directory),
    it is loaded here, and no second copy is kept; ``lora`` then adds a new adapter of that rank, to a policy or
    a reward model (``adapter``, ``lora_alpha`` and ``lora_targets`` as for
    :func:`~steerwell.models.load.load_policy`). ``data`` are groups with resolved targets, or a source such as
    :func:`rollouts`. ``objective`` is a name, an objective function, or a mixture: a list of (objective, weight)
    or (objective, weight, hyperparameters). ``reference`` is "start" (the weights the run starts from), a
    policy or a path, or None. ``settings`` are fields of :class:`TrainConfig` and hyperparameters of the
    objective, told apart by name.

    ``eval_data`` is measured before the first step, every ``eval_every`` steps and at the end; its figures
    do not depend on batch size. ``watch(step, model, figures)`` is called at the same ends and every
    ``watch_every`` steps; the numbers it returns join the metrics. ``progress(stage, done, total, note)``
    is told how it goes.

    The same call with the same ``out`` continues an interrupted run exactly, and gives a finished one back
    without work. Raises :class:`InputError` before any work for unknown names, data that lack what the
    objective takes, pairs of equal tokens, an ``out`` that can't be written or holds another run; raises
    :class:`TrainingError` for a loss that is not finite and for a failed check at the first step.
    """
    terms, made = checked(objective, config, settings)
    source = data if isinstance(data, Source) else None
    groups = () if isinstance(data, Source) else _sequence(data)
    asked = asked_adapter(lora, adapter, lora_alpha, lora_targets)
    held_out = () if eval_data is None else _sequence(eval_data)
    order = _Order(terms, made, source, groups, held_out, reference, asked, watch, progress)
    _check(policy, order, eval_data is not None)
    ranks = join()
    folder = RunDir(out, ranks)
    try:
        return _train(policy, order, folder, ranks)
    except InputError:
        folder.forget()
        raise
    finally:
        folder.close()


def _sequence(data: Iterable[CompletionGroup]) -> Sequence[CompletionGroup]:
    """The groups as they were given, if one can ask for each by its place: a data set may be read as it is used."""
    return data if isinstance(data, Sequence) else list(data)


def checked(
    objective: Spec, config: TrainConfig | Mapping[str, Any] | None, settings: Mapping[str, Any]
) -> tuple[list[Term], TrainConfig]:
    """The terms of an objective and the configuration, from settings of both; ``settings`` come first.

    Raises :class:`InputError` for an unknown objective, hyperparameter or setting, and for a value that is
    out of range.
    """
    parts = functions_of(objective)
    own, hyper = split_settings(
        settings, {"reduction", *(name for fn, _, _ in parts for name in hyperparameters(fn))}
    )
    base = config.model_dump(exclude_unset=True) if isinstance(config, TrainConfig) else dict(config or {})
    return make_terms(parts, hyper), parse(TrainConfig, base | own)


def _check(policy: Any, order: _Order, evaluated: bool) -> None:
    """What can be said before a model is touched."""
    terms = order.terms
    _refuse_unused(order.config, terms, order.source, evaluated, order.watch is not None)
    check_best(order.config, evaluated=evaluated, watched=order.watch is not None)
    check_sinks(order.config.sinks)
    if order.source is None:
        check_data(terms, order.groups)
    if evaluated:
        check_data(terms, order.eval_groups, "the evaluation data")
    if order.config.calibrate and not any(group.pairs for group in order.eval_groups):
        raise InputError(
            "calibrate needs held-out pairs; no group of the evaluation data has one",
            mend="Resolve the annotations first: steerwell.resolve.majority(groups).",
        )
    if order.reference in (None, "none"):
        for term in terms:
            if (REFERENCE_NAMES | LIVE_NAMES) & set(term.tensors):
                raise InputError(
                    f"{term.name} needs a reference, and reference is none", mend='Say reference = "start".'
                )
    elif not _wants_reference(order) and not (
        isinstance(order.reference, str) and order.reference == "start"
    ):
        raise InputError(f"{terms[0].name} takes no reference", mend="Leave reference out.")
    if isinstance(policy, RewardModel) and "pooling" in order.config.model_fields_set:
        raise InputError("a reward model keeps its pooling", mend="Leave pooling out.")
    if isinstance(policy, RewardModel) and policy.recipe.aggregate is not None:
        for name in sorted({"aggregate", "step_separator"} & order.config.model_fields_set):
            raise InputError(f"a process reward model keeps its {name}", mend=f"Leave {name} out.")
    if isinstance(policy, RewardModel) and terms[0].kind != "reward":
        raise InputError(f"{terms[0].name} trains a policy, and a reward model was given")
    if order.adapter is not None and not isinstance(policy, str | Path):
        raise InputError("lora is for a policy given as a path", mend="Say load_policy(path, lora=…).")


def _wants_reference(order: _Order) -> bool:
    """Whether a reference would be used: by the objective, or for the KL figures of rollouts."""
    return order.source is not None or bool(needed(order.terms) & (REFERENCE_NAMES | LIVE_NAMES))


def _refuse_unused(
    config: TrainConfig, terms: Sequence[Term], source: Source | None, evaluated: bool, watched: bool
) -> None:
    """A setting that would change nothing is an error, never ignored."""
    given = config.model_fields_set
    if {"steps", "epochs"} <= given and config.steps is not None:
        raise InputError("steps and epochs are both given", mend="Give one of the two.")
    if source is not None and "batch_size" in given:
        raise InputError("batch_size is not used with rollouts", mend="Say prompts_per_step in rollouts(…).")
    if source is not None and evaluated:
        raise InputError(
            "eval_data is not used with rollouts", mend="Judge samples in a watcher: watch=callable."
        )
    if isinstance(source, Rollouts) and needed(terms) & {"pairs", "labels", "demonstrations"}:
        name = next(t.name for t in terms if {"pairs", "labels", "demonstrations"} & set(t.tensors))
        raise InputError(
            f"{name} cannot learn from rollouts: they have scores only",
            mend="Use grpo, cispo, rloo, reinforce or ppo_clip.",
        )
    if config.eval_every is not None and not evaluated:
        raise InputError("eval_every is given without eval_data", mend="Give eval_data.")
    if "watch_every" in given and not watched:
        raise InputError("watch_every is given without watch", mend="Give watch=callable.")
    if "pooling" in given and terms[0].kind != "reward":
        raise InputError(f"pooling is not used by {terms[0].name}", mend="It is a setting of reward models.")
    for name in ("train_only", "normalise", "calibrate"):
        if getattr(config, name) and terms[0].kind != "reward":
            raise InputError(
                f"{name} is not used by {terms[0].name}", mend="It is a setting of reward models."
            )
    if (config.normalise or config.calibrate) and "step_scores" in needed(terms):
        raise InputError(
            f"normalise and calibrate are not used by {terms[0].name}",
            mend="Say model.normalised(groups) when it is trained.",
        )
    if config.calibrate and not evaluated:
        raise InputError(
            "calibrate is given without eval_data", mend="Give held-out pairs: never those of training."
        )
    for name, wanted in (("aggregate", "step_scores"), ("step_separator", "steps")):
        if name in given and wanted not in needed(terms):
            raise InputError(f"{name} is not used by {terms[0].name}", mend="It is for objectives of steps.")


def _train(policy: Any, order: _Order, folder: RunDir, ranks: Ranks) -> Model:
    reward = order.terms[0].kind == "reward"
    owned = isinstance(policy, str | Path)
    head = asked_head(order.terms, order.groups) if reward else None
    asked = order.adapter, order.config, head
    given: Model = ranks.together(lambda: load_model(policy, reward, *asked)) if owned else policy
    config = completed(order.config, order.terms, given)
    start = start_digest(given)
    data = _prepared(order, order.groups, given, config, ItemFile(folder.path))
    held_out = _prepared(order, order.eval_groups, given, config, [])
    if "kl" in needed(order.terms) and order.source is None:
        check_mismatch(data.items, config.batch_size)
    wanted = order.reference not in (None, "none") and _wants_reference(order)
    reference = named_reference(order.reference, given, start) if wanted else Reference("none")
    identity = {
        "objective": describe(order.terms),
        "train": config.model_dump(exclude=set(FREE_SETTINGS)),
        "model": start,
        "reference": {"kind": reference.kind, "digest": reference.digest},
        "data": items_digest(data.items) if order.source is None else order.source.identity(),
        "eval_data": items_digest(held_out.items) if held_out.items else None,
    }
    about = {
        "policy": {"name": given.name, "path": str(given.path) if given.path else None},
        "data": data.about,
        "eval_data": held_out.about if held_out.items else None,
        "processes": ranks.size,
    }
    state = folder.open(identity, about)
    if state == "done":
        if order.progress is not None:
            order.progress("train", 1, 1, f"{folder.path} holds this run, finished; nothing was trained")
        return load_model(folder.model, reward)
    trained, dtype = to_train(given, head, owned, config), getattr(torch, config.dtype)
    once = order.source is None and not LIVE_NAMES & needed(order.terms)
    lent = not owned and ranks.alone
    live = live_reference(reference, given, trained, first_only=once, lent=lent, dtype=dtype)
    bones = None if ranks.alone else spread(trained, live, ranks, dtype)
    masters = set_precision(trained.model, dtype) if ranks.alone else None
    run = _run(order, config, data, held_out, trained, masters, live, folder, ranks)
    run.bones = bones
    fit(run)
    if bones is not None:
        return load_model(folder.model, reward)
    trained.name, trained.path = folder.path.name, str(folder.model)
    return trained


def _run(
    order: _Order,
    config: TrainConfig,
    data: Prepared,
    held_out: Prepared,
    trained: Model,
    masters: MasterWeights | None,
    reference: Reference,
    folder: RunDir,
    ranks: Ranks,
) -> Run:
    """Put the run together; the log-probs of the reference are computed here, once, for recorded data."""
    names = needed(order.terms)
    release = _set_layers(trained.model, config, data.items, folder)
    if order.source is not None:
        steps = config.steps or order.source.steps(config.epochs)
        stream = 0
        names |= {"old_per_token_logps"}
        if reference.kind != "none":
            names |= {"ref_per_token_logps"}
    else:
        steps = config.steps or steps_in(len(data.items), config.batch_size, config.epochs)
        stream = steps * config.batch_size if config.steps else passes(len(data.items), config.epochs)
    provider = Provider(
        model=trained.model,
        names=frozenset(names),
        reference=reference,
        max_tokens=config.max_tokens,
        layout=config.layout,
        temperature=1.0 if order.source is None else order.source.temperature,
        limit=config.max_length or context_of(trained.model),
        device=trained.device,
        ranks=ranks,
        precision=config.dtype,
        scoring=trained.recipe if isinstance(trained, RewardModel) else None,
    )
    if order.source is None and names & REFERENCE_NAMES:
        reached = epoch_order(len(data.items), 0, config.seed)[:stream]  # all, unless the run is short
        _fill_reference(provider, Chosen(data.items, reached, held_out.items), config, folder, order.progress)
    displacement = None
    if order.source is None:
        displacement = Displacement.of(provider, order.terms, data.items, steps, config.batch_size)
    return Run(
        trained=trained,
        terms=order.terms,
        config=config,
        provider=provider,
        folder=folder,
        optimizer=make_optimizer(masters.names if masters else trained.model.parameters(), config),
        steps=steps,
        items=data.items,
        stream=stream,
        eval_items=list(held_out.items),
        source=order.source,
        watch=order.watch,
        progress=order.progress if ranks.writes else None,
        best=Best.of(config, folder.checkpoints / "best"),
        masters=masters,
        release=release,
        displacement=displacement,
    )


def _set_layers(model: Any, config: TrainConfig, items: Sequence[Item], folder: RunDir) -> Callable[[], None]:
    """Layers as the settings say; whether activations are recomputed is recorded with the run."""
    recompute = config.gradient_checkpointing
    if recompute == "auto":
        lengths = sizes(items)
        tokens = max(config.max_tokens, max(lengths, default=0))
        recompute = needs_checkpointing(model, min(tokens, sum(lengths) or tokens))
    folder.write(gradient_checkpointing=recompute)
    return set_layers(model, recompute=recompute, compiled=config.compile, dropout=config.dropout)


def _fill_reference(
    provider: Provider, items: Sequence[Item], config: TrainConfig, folder: RunDir, progress: Progress | None
) -> None:
    """Reference log-probs for recorded items: the run's own, for a run that is continued; else those of the
    shared file; else computed. The run keeps them, so that it goes on with the very same numbers.
    """
    own, shared = Kept(folder.path / "reference.db"), cache_path(config.reference_cache)
    files = [own] if shared is None else [own, Kept(shared)]
    told = progress if provider.ranks.writes else None
    counts = provider.fill_reference(items, files, told)
    trouble = [file.trouble for file in files if file.trouble]
    folder.write(reference_logps={**counts, "file": str(shared) if shared else None, "trouble": trouble})
    if told is not None:
        known = counts["groups"] - counts["computed"]
        note = f"{known} of {counts['groups']} known" if known else ""
        told("reference", counts["groups"], counts["groups"], "; ".join([note, *trouble]).strip("; "))


def make_optimizer(parameters: Iterable[Any], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW over those of the parameters that are trained; weight decay (decoupled) only on matrices."""
    parameters = [p for p in parameters if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate or 0.0,
        betas=config.betas,
        fused=all(p.is_floating_point() for p in parameters),
    )


def _prepared(
    order: _Order,
    groups: Sequence[CompletionGroup],
    given: Model,
    config: TrainConfig,
    into: ItemFile | list[Item],
) -> Prepared:
    """Tokenised groups, put ``into`` a file or a list; raises :class:`InputError` for one that is longer than the
    model can read, and where no completion ends with a stop token.
    """
    if not groups:
        return Prepared([], {})
    own = given.recipe if isinstance(given, RewardModel) else None
    separator = own.step_separator if own is not None and own.aggregate is not None else config.step_separator
    reader = given if isinstance(given, RewardModel) and given.recipe.template == "pair" else None
    data = prepare(
        groups,
        order.terms,
        given.tokenizer,
        config.max_length,
        layout_for(config.layout, given.model),
        order.progress,
        into=into,
        context=context_of(given.model),
        step_separator=separator,
        reader=reader,
    )
    notes, about = list(data.about["notes"]), dict(data.about)
    if reader is None:  # an encoder's pairs end with no turn
        stops = given.stop_ids if isinstance(given, Policy) else stop_tokens(given.tokenizer)
        ends = check_ends(data.items, given.tokenizer, stops, learns=order.terms[0].kind != "reward")
        notes += ends.pop("notes")
        about["ends"] = ends
    if notes and order.progress is not None:
        order.progress("data", len(data.items), len(data.items), "; ".join(notes))
    return Prepared(data.items, {**about, "notes": notes})


def context_of(model: Any) -> int | None:
    """How many positions the model knows; None where its configuration names no limit."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


__all__ = ["make_optimizer", "train"]
