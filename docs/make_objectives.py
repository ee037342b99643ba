"""Writes docs/objectives.md and its pictures from the objectives themselves: signatures, docstrings, values.

    python docs/make_objectives.py            # writes what has changed
    python docs/make_objectives.py --check    # writes nothing; exit 1 where something would change

The pictures are computed by calling the objective on a made-up batch in which only the margin varies.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from steerwell.evals.charts import Series, line_chart
from steerwell.objectives import MIXTURES, TABLE, TENSORS, Objective, hyperparameters, needs, optional
from steerwell.objectives.mixtures import written
from steerwell.objectives.table import docstring_parts

HERE = Path(__file__).resolve().parent
KINDS = {
    "policy": ("Preference objectives", "They train a policy on data that lie there already."),
    "reward": (
        "Reward models",
        "They train a scorer; `scores` are the model's own. A reward model is trained by the same command, "
        "`steerwell train`.",
    ),
    "policy_gradient": (
        "Policy gradients",
        "They train a policy on completions that it has just sampled and that something has scored.",
    ),
}
INTRO = """\
# Objectives

Each is a plain function of tensors, `sw.objectives.NAME`, and the same page is printed by `steerwell explain NAME`.
This one is made by `docs/make_objectives.py` from signatures and docstrings: change those, then run the script.

Notation: `w` is the chosen completion of a pair and `l` the rejected one, `pi` the policy, `ref` the frozen
reference, `s` the logistic function, `|y|` the number of scored tokens. Log-probabilities are sums over the tokens of a
completion unless the formula divides. A step's loss is the sum of the losses over the step's own count
(the *reduction*), whatever the micro-batches.

The pictures show the function itself, at its defaults unless said otherwise. Left: the loss of one pair against its
margin, `(log pi - log ref)` of the chosen less that of the rejected, where the two move apart evenly from the
reference's values (completions of ten tokens, 4 nats each under the reference, a margin of up to 60 nats unless the
axis says otherwise; scores of 1 and 0 where scores are taken). Right: the push that training gives, which is minus
the derivative of the loss by the log-probability of the chosen and of the rejected completion: above 0 training makes
it likelier. Where a completion stands by itself, the axis is its own log-ratio; for reward models it is the difference
of the two scores. Of objectives for whole groups the group has two completions, and the loss is the sum of theirs.
Where an objective looks inside a completion, all its tokens share the change, have the weight 1 and lie in one step,
in two turns of the same length. An objective that ties the pairs of a batch together has no such curve and no picture.
"""
MIXED = """\
## Mixtures

Weighted sums that have a name of their own. The name is a value of `objective` in a recipe, and `losses` writes it out
with weights of your own; `steerwell explain` prints these too.

| name | what it is |
|---|---|"""
DATA = {
    "pairs": "pairs",
    "pair_strengths": "strengths of pairs",
    "labels": "labels",
    "attributes": "scores by attribute",
    "step_labels": "labels of steps",
    "ranks": "rankings",
    "token_weights": "token weights",
    "steps": "steps",
    "rewards": "rewards",
    "demonstrations": "demonstrations",
    "advantages": "samples with rewards",
}
POINTS = 61


class Scene(NamedTuple):
    """How far the margin is varied to either side, in nats, hyperparameters other than the defaults, and the figures
    that the objective carries from step to step.
    """

    span: float = 60.0
    hyper: Mapping[str, Any] = {}
    running: tuple[float, ...] = ()


# Where the defaults would show one flat or steep piece only.
SCENES = {
    "alpha_dpo": Scene(running=(0.0, 2.0)),
    "bco": Scene(running=(0.0, 0.0)),
    "cal_dpo": Scene(hyper={"beta": 0.02}),
    "chi_po": Scene(span=10.0),
    "cispo": Scene(span=3.0),
    "discopop": Scene(span=15.0),
    "dpop": Scene(hyper={"lam": 5.0}),
    "ensemble_bradley_terry": Scene(hyper={"bootstrap": False}),
    "f_dpo": Scene(hyper={"divergence": "js"}),
    "info_nca": Scene(span=600.0),
    "nca": Scene(span=600.0),
    "nca_pair": Scene(span=600.0),
    "rebel": Scene(span=6.0),
    "sppo": Scene(hyper={"eta": 50.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing, fail where something has changed"
    )
    check = parser.parse_args().check
    made = files()
    stale = [name for name, text in made.items() if not same(HERE / name, text)]
    stale += (gone := sorted(set(pictures_there()) - set(made)))
    if check:
        sys.exit(f"not up to date: {', '.join(stale)}" if stale else 0)
    (HERE / "objectives").mkdir(exist_ok=True)
    for name in stale:
        if name in gone:
            (HERE / name).unlink()
        else:
            (HERE / name).write_text(made[name], encoding="utf-8")
        print(name)


def same(file: Path, text: str) -> bool:
    return file.exists() and file.read_text("utf-8") == text


def pictures_there() -> list[str]:
    return [f"objectives/{file.name}" for file in (HERE / "objectives").glob("*.svg")]


def files() -> dict[str, str]:
    """Path within docs/ -> contents, of the page and of every picture."""
    pictures = {name: picture(fn) for name, fn in sorted(TABLE.items())}
    made = {f"objectives/{name}.svg": svg for name, svg in pictures.items() if svg}
    return {"objectives.md": page({name for name, svg in pictures.items() if svg}), **made}


# --- the page ---
def page(drawn: set[str]) -> str:
    """The whole page; ``drawn`` are the objectives that have a picture."""
    lines = [INTRO]
    for kind, (title, what) in KINDS.items():
        of_kind = {name: fn for name, fn in sorted(TABLE.items()) if fn.kind == kind}
        lines += [f"## {title}", what, "", "| name | what it is | data | reference |", "|---|---|---|---|"]
        for name, fn in of_kind.items():
            opening = docstring_parts(fn)[""].rstrip(".")
            lines.append(f"| [{name}](#{name}) | {opening} | {data(fn)} | {reference(fn)} |")
        lines.append("")
        for name, fn in of_kind.items():
            lines += [*section(name, fn, name in drawn), ""]
    lines += [MIXED, *(f"| [{name}](#{name}) | {mixed.says} |" for name, mixed in MIXTURES.items()), ""]
    for name in MIXTURES:
        lines += [*mixture_section(name), ""]
    return "\n".join(lines).rstrip() + "\n"


def data(fn: Objective) -> str:
    """What the data must hold, in a few words."""
    words = [word for tensor, word in DATA.items() if tensor in needs(fn)]
    if "scores" in needs(fn) and fn.kind != "reward":
        words.append("scores")
    return ", ".join(words)


def positional(fn: Objective) -> list[str]:
    parameters = inspect.signature(fn).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def reference(fn: Objective) -> str:
    asked = [name for name in positional(fn) if name.startswith("ref_")]
    if not asked:
        return "no"
    condition = fn.only_if.get(asked[0])
    return f"unless {condition} is 0" if condition else "yes" if asked[0] in needs(fn) else "if there"


def section(name: str, fn: Objective, drawn: bool) -> Iterator[str]:
    """The lines of one objective."""
    parts = docstring_parts(fn)
    yield f"### {name}"
    yield f"{parts['']} {linked(f'Source: {fn.source}.')}"
    yield ""
    yield f"**Use when:** {' '.join(parts['Use when'].split())}"
    yield ""
    yield from ("```text", parts["Formula"], "```")
    yield ""
    if drawn:
        yield f"![{alt(name)}](objectives/{name}.svg)"
        yield ""
        if changed := pictured_at(name):
            yield f"Pictured at {changed}."
            yield ""
    yield from ("Needs:", "", *(f"- {needed(fn, tensor)}" for tensor in positional(fn)), "")
    if settable := hyperparameters(fn):
        meanings = dict(entries(parts["Hyperparameters"]))
        yield from ("Hyperparameters:", "")
        yield from (f"- `{key} = {default!r}`: {meanings[key]}" for key, default in settable.items())
        yield ""
    alone = "" if fn.decomposable else " It ties the completions of a step together."
    yield f"Gives {' '.join(parts['Returns'].split()).rstrip('.')}. Reduction: `{fn.reduction}`.{alone}"
    for heading in ("Differs", "Failure modes"):
        if parts.get(heading):
            yield from ("", f"{heading}:", "", *(f"- {linked(item)}" for item in sentences(parts[heading])))
    rises = f"The loss may rise at the start: {fn.rises_at_start}." if fn.rises_at_start else ""
    if noted := f"{rises} {linked(fn.notes)}".strip():
        yield from ("", f"Notes: {noted}")


def needed(fn: Objective, tensor: str) -> str:
    """A tensor's shape, its meaning and when it is needed."""
    facts = TENSORS.get(tensor)
    shape = f" ({', '.join(facts.shape)})" if facts and facts.shape else ""
    when = f"; only if {fn.only_if[tensor]} is not 0" if tensor in fn.only_if else ""
    when = when or ("; used when the data have it" if tensor in optional(fn) else "")
    when = "; the loop carries them" if tensor == "running" else when
    return f"`{tensor}`{shape}: {facts.meaning if facts else 'a tensor of its own'}{when}"


def mixture_section(name: str) -> Iterator[str]:
    """The lines of one mixture."""
    mixture = MIXTURES[name]
    yield f"### {name}"
    yield f"{mixture.says} {linked(f'Source: {mixture.source}.')}"
    yield ""
    for objective, weight, given in mixture.terms:
        yield f"- {weight:g} × [{objective}](#{objective})" + (f", {settings(given)}" if given else "")
    yield from ("", "```toml", written(name), "```", "", mixture.notes)


def entries(text: str) -> list[tuple[str, str]]:
    """``name: meaning`` entries; indented lines continue the entry above."""
    found: list[tuple[str, str]] = []
    for line in text.splitlines():
        if line.startswith(" "):
            found[-1] = (found[-1][0], f"{found[-1][1]} {line.strip()}")
        else:
            key, _, meaning = line.partition(":")
            found.append((key.strip(), meaning.strip()))
    return found


def sentences(text: str) -> list[str]:
    """One item per statement: a line that ends with a full stop ends the item."""
    return [" ".join(item.split()) for item in re.split(r"(?<=\.)\n", text)]


def linked(text: str) -> str:
    """arXiv ids as links."""
    return re.sub(r"arXiv:(\d{4}\.\d{5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)


def settings(hyper: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {value!r}" for key, value in hyper.items() if value is not None)


def pictured_at(name: str) -> str:
    """What the picture of an objective has other than the defaults."""
    scene = SCENES.get(name, Scene())
    figures = ", ".join(f"{figure:g}" for figure in scene.running)
    return ", ".join(filter(None, (settings(scene.hyper), f"running = ({figures})" if figures else "")))


def alt(name: str) -> str:
    return f"{name}: loss and push against the margin"


# --- the pictures ---
def picture(fn: Objective) -> str | None:
    """The SVG with loss and push side by side, or None where one margin says nothing."""
    name, scene = fn.__name__, SCENES.get(fn.__name__, Scene())
    wanted = set(needs(fn, scene.hyper))
    alone = fn.decomposable or bool(scene.running) or "kl" in wanted  # or is so, once those figures are given
    if not alone or not wanted <= known(fn):
        return None
    if fn.kind == "policy_gradient":
        if "old_per_token_logps" not in wanted:
            return None
        x_label = "log-ratio to the sampling policy in nats"
        reach = scene.span if name in SCENES else 1.0
        curves = single(fn, scene, reach=reach, tokens=1, names=("A = 1", "A = −1"), x_label=x_label)
    elif wanted & {"pairs", "group"}:
        curves = paired(fn, scene)
    elif "labels" in wanted:
        x_label, names = "log-ratio to the reference in nats", ("desirable", "undesirable")
        curves = single(fn, scene, reach=scene.span, tokens=scene.span / 6, names=names, x_label=x_label)
    else:
        return None
    losses, pushes, x_label = curves
    said = settings({**hyperparameters(fn), **scene.hyper})
    return beside(
        line_chart(losses, alt=f"{name}: loss", x_label=x_label, y_label="loss", width=420, height=240),
        line_chart(pushes, alt=f"{name}: push", x_label=x_label, y_label="push", width=420, height=240),
        title=alt(name) + (f" at {said}" if said else ""),
    )


def known(fn: Objective) -> set[str]:
    """The tensors that can be made up for a picture. A tensor that is not among them costs the picture only."""
    two = torch.zeros(2, dtype=torch.float64)
    return set(batch_of(two, two, tokens=1, good=two == 0, reward=fn.kind == "reward"))


Curves = tuple[list[Series], list[Series], str]


def paired(fn: Objective, scene: Scene) -> Curves:
    """Pairs whose sides move apart evenly; completions of span / 6 tokens, 4 nats each under the reference."""
    reward = fn.kind == "reward"
    span = 6.0 if reward and fn.__name__ not in SCENES else scene.span
    margin = torch.linspace(-span, span, POINTS, dtype=torch.float64)
    level = 0.0 if reward else -span * 2 / 3
    level_of_all = torch.full((2, POINTS), level, dtype=torch.float64)
    values = level_of_all + torch.stack([margin / 2, -margin / 2])
    good = torch.arange(2 * POINTS) < POINTS
    losses, push = called(fn, scene, values.flatten(), level_of_all.flatten(), tokens=span / 6, good=good)
    if fn.unit == "completion":  # the loss of a group of two
        losses = losses.reshape(2, POINTS).sum(0)
    x = margin.tolist()
    chosen, rejected = push.reshape(2, POINTS).tolist()
    return (
        [Series("", x, losses.tolist(), tone="ink")],
        [Series("chosen", x, chosen, tone="good"), Series("rejected", x, rejected, tone="bad", dashed=True)],
        "difference of the scores" if reward else "margin in nats",
    )


def single(
    fn: Objective, scene: Scene, *, reach: float, tokens: float, names: tuple[str, str], x_label: str
) -> Curves:
    """Good completions and bad ones, each by itself, by the log-ratio to what it is compared with."""
    ratio = torch.linspace(-reach, reach, POINTS, dtype=torch.float64)
    level = torch.full((2 * POINTS,), -4.0 * tokens * 2, dtype=torch.float64)
    good = torch.arange(2 * POINTS) < POINTS
    losses, push = called(fn, scene, level + ratio.repeat(2), level, tokens=tokens, good=good)

    def both(values: Tensor) -> list[Series]:
        first, second = values.reshape(2, POINTS).tolist()
        return [
            Series(names[0], ratio.tolist(), first, tone="good"),
            Series(names[1], ratio.tolist(), second, tone="bad", dashed=True),
        ]

    return both(losses), both(push), x_label


def called(
    fn: Objective, scene: Scene, values: Tensor, level: Tensor, *, tokens: float, good: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses, and minus the derivative of their sum by ``values``: what training adds to each completion.

    ``values`` (N,) are the learnt log-probabilities (for reward models the scores) and ``level`` (N,) those of
    the reference; the first half are the good completions, and completion i + N / 2 is the bad one to i.
    """
    values = values.clone().requires_grad_()
    batch = batch_of(values, level, tokens=max(1, round(tokens)), good=good, reward=fn.kind == "reward")
    given = {name: batch[name] for name in needs(fn, scene.hyper)}
    if scene.running:
        given["running"] = torch.tensor(scene.running, dtype=torch.float64)
    losses, _ = fn(**given, **scene.hyper)
    (slope,) = torch.autograd.grad(losses.sum(), [values])
    return losses.detach(), -slope


def batch_of(values: Tensor, level: Tensor, *, tokens: int, good: Tensor, reward: bool) -> dict[str, Tensor]:
    """Every tensor by name for these completions. A name that is missing here costs its objectives their picture."""
    n = len(values)
    half = torch.arange(n // 2)
    owner = torch.arange(n).repeat_interleave(tokens)
    plain = good.to(torch.float64)
    per_token, ref_per_token = values[owner] / tokens, level[owner] / tokens
    return {
        "logps": values,
        "ref_logps": level,
        "old_logps": level,
        "lengths": torch.full((n,), float(tokens), dtype=torch.float64),
        "pairs": torch.stack([half, half + n // 2]),
        "labels": good,
        "ranks": (~good).long(),
        "scores": values if reward else plain,
        "rewards": plain,
        "group": torch.arange(n) % (n // 2),
        "advantages": 2 * plain - 1,
        "demonstrations": good,
        "kl": torch.zeros((), dtype=torch.float64),
        "per_token_logps": per_token,
        "ref_per_token_logps": ref_per_token,
        "old_per_token_logps": ref_per_token,
        "owner": owner,
        "head_scores": values[:, None].expand(-1, 4),  # four members that agree
        "pair_strengths": torch.ones(n // 2, dtype=torch.float64),
        "per_token_kl": torch.zeros(len(owner), dtype=torch.float64),
        "per_token_collision": ref_per_token,
        "token_weights": torch.ones(len(owner), dtype=torch.float64),
        "turns": 2 * (torch.arange(len(owner)) % tokens) // tokens,
        "steps": torch.zeros(len(owner), dtype=torch.long),
        "shared_tokens": torch.zeros(n // 2, dtype=torch.long),
    }


STYLE = """\
svg { font: 12.5px system-ui, sans-serif; }
svg { --soft: #57606a; --rule: #d8dee4; --good: #1a7f5a; --bad: #b3452c; --ink: #24292f; }
@media (prefers-color-scheme: dark) {
  svg { --soft: #9aa4ae; --rule: #3a424b; --good: #4fc59a; --bad: #ee8b70; --ink: #e6edf3; }
}
.tone-good { --tone: var(--good); } .tone-bad { --tone: var(--bad); } .tone-ink { --tone: var(--ink); }
text { fill: var(--soft); } .name { fill: var(--tone); font-weight: 600; }
.grid { stroke: var(--rule); } .zero { stroke: var(--soft); stroke-opacity: 0.6; }
.line { fill: none; stroke: var(--tone); stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round; }
.dashed { stroke-dasharray: 7 5; }
"""


def beside(left: str, right: str, *, title: str) -> str:
    """Two charts of 420 x 240 in one file."""
    placed = (
        chart.replace("<svg ", f'<svg x="{x}" y="0" width="420" height="240" ', 1)
        for x, chart in ((0, left), (440, right))
    )
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 860 240" width="860" height="240" role="img">'
    )
    return (
        f"{head}\n<title>{escape(title)}</title>\n<style>\n{STYLE}</style>\n"
        + "\n".join(placed)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    main()
