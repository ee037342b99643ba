"""The pair losses once more, one pair at a time in float64 numpy, written from the papers' equations.

Nothing is shared with the package: ratios are exponentials here, softmaxes are spelt out, and soft labels are the
expectation over two pairs. The inputs are mild, so plain formulas are accurate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np


@dataclass
class Side:
    """One completion of a pair: log-probabilities, length, score, and its tokens under policy and reference."""

    lp: float
    ref: float
    size: float
    score: float
    tokens: np.ndarray
    ref_tokens: np.ndarray

    @property
    def h(self) -> float:
        return self.lp - self.ref


def s(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def ls(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def robust_dpo(w: Side, r: Side, beta: float = 0.1, flip_rate: float = 0.1) -> float:
    m, e = beta * (w.h - r.h), flip_rate
    return (-(1 - e) * ls(m) + e * ls(-m)) / (1 - 2 * e)


def hinge(w: Side, r: Side, beta: float = 0.1) -> float:
    return max(0.0, 1 - beta * (w.h - r.h))


def dpop(w: Side, r: Side, beta: float = 0.1, lam: float = 50.0) -> float:
    return -ls(beta * (w.h - r.h - lam * max(0.0, w.ref - w.lp)))


def discopop(w: Side, r: Side, beta: float = 0.05, tau: float = 0.05) -> float:
    x = beta * (w.h - r.h)
    m = s(x / tau)
    return (1 - m) * -ls(x) + m * math.exp(-x)


def dpo_shift(w: Side, r: Side, beta: float = 0.1, lam: float = 0.95) -> float:
    return -ls(beta * ((w.lp - lam * r.lp) - (w.ref - lam * r.ref)))


def spin(w: Side, r: Side, beta: float = 0.1) -> float:
    return math.log(1 + math.exp(-beta * (w.h - r.h)))


def apo_zero(w: Side, r: Side, beta: float = 0.1) -> float:
    return 1 - s(beta * w.h) + s(beta * r.h)


def apo_down(w: Side, r: Side, beta: float = 0.1) -> float:
    return s(beta * w.h) + 1 - s(beta * (w.h - r.h))


def nca_pair(w: Side, r: Side, beta: float = 0.01) -> float:
    return -(ls(beta * w.h) + 0.5 * ls(-beta * w.h) + 0.5 * ls(-beta * r.h))


def bco_pair(w: Side, r: Side, beta: float = 0.1, delta: float = 0.0) -> float:
    return -ls(beta * w.h - delta) - ls(-(beta * r.h - delta))


def cal_dpo(w: Side, r: Side, beta: float = 1e-3) -> float:
    return -ls(w.h - r.h) + (w.h - 1 / (2 * beta)) ** 2 + (r.h + 1 / (2 * beta)) ** 2


def f_dpo(w: Side, r: Side, beta: float = 0.1, divergence: str = "reverse_kl", alpha: float = 0.5) -> float:
    slope = {
        "reverse_kl": lambda u: math.log(u) + 1,
        "forward_kl": lambda u: -1 / u,
        "js": lambda u: math.log(2 * u / (1 + u)),
        "alpha": lambda u: (1 - u**-alpha) / alpha,
        "chi2": lambda u: 2 * (u - 1),
    }[divergence]
    return -ls(beta * (slope(math.exp(w.h)) - slope(math.exp(r.h))))


def chi_po(w: Side, r: Side, beta: float = 0.1, r_max: float | None = None) -> float:
    def phi(u: float) -> float:
        return u + math.log(u)

    m = beta * phi(math.exp(w.h)) - beta * phi(math.exp(r.h))
    return -ls(m if r_max is None else min(max(m, -2 * r_max), 2 * r_max))


def r_dpo(w: Side, r: Side, beta: float = 0.1, alpha: float = 0.01) -> float:
    return -ls(beta * w.h - beta * r.h + (alpha * w.size - alpha * r.size))


def ln_dpo(w: Side, r: Side, beta: float = 5.0) -> float:
    return -ls(beta * w.h / w.size - beta * r.h / r.size)


def ld_dpo(w: Side, r: Side, beta: float = 0.1, alpha: float = 0.5) -> float:
    shared = int(min(w.size, r.size))

    def likelihood(tokens: np.ndarray) -> float:
        return float(sum(x if t < shared else alpha * x for t, x in enumerate(tokens)))

    ratios = [likelihood(y.tokens) - likelihood(y.ref_tokens) for y in (w, r)]
    return -ls(beta * ratios[0] - beta * ratios[1])


def odpo(w: Side, r: Side, beta: float = 0.1, alpha: float = 1.0) -> float:
    if w.score <= r.score:
        return 0.0
    return -ls(beta * (w.h - r.h) - alpha * math.log(w.score - r.score))


def rebel(w: Side, r: Side, eta: float = 1.0) -> float:
    return (1 / eta * (w.h - r.h) - (w.score - r.score)) ** 2


def cpo(w: Side, r: Side, beta: float = 0.1, alpha: float = 1.0, nll: str = "mean") -> float:
    return -ls(beta * w.lp - beta * r.lp) - alpha * w.lp / (w.size if nll == "mean" else 1)


def orpo(w: Side, r: Side, lam: float = 0.1) -> float:
    def odds(y: Side) -> float:
        p = math.exp(y.lp / y.size)
        return p / (1 - p)

    return -w.lp / w.size - lam * math.log(s(math.log(odds(w) / odds(r))))


def slic(w: Side, r: Side, delta: float = 1.0, lam: float = 0.1) -> float:
    return max(0.0, delta - w.lp + r.lp) - lam * w.lp


def alpha_po(w: Side, r: Side, beta: float = 2.5, gamma: float = 0.1, alpha: float = 0.25) -> float:
    def reward(y: Side) -> float:
        p = math.exp(y.lp / y.size)
        return beta * (math.log(p) if alpha == 0 else (1 - p**-alpha) / alpha)

    return -ls(reward(w) - reward(r) - gamma)


# Losses in which a soft label is the target and not an expectation take it themselves.
def exo_pair(w: Side, r: Side, p: float, beta: float = 0.1, epsilon: float = 1e-3) -> float:
    z = np.exp(beta * np.array([w.h, r.h]))
    policy = z / z.sum()
    target = p * np.array([1 - epsilon, epsilon]) + (1 - p) * np.array([epsilon, 1 - epsilon])
    return float((policy * np.log(policy / target)).sum())


def sppo(w: Side, r: Side, p: float, eta: float = 1000.0, scores_are_win_rates: bool = False) -> float:
    wins = (w.score, r.score) if scores_are_win_rates else (p, 1 - p)
    return ((w.h - eta * (wins[0] - 0.5)) ** 2 + (r.h - eta * (wins[1] - 0.5)) ** 2) / 2


TARGETS = {"exo_pair": exo_pair, "sppo": sppo}


def paper(name: str, w: Side, r: Side, p: float | None, **hyper: object) -> float:
    """The loss of one pair; with a soft label p, the expectation over which side is preferred."""
    if name in TARGETS:
        return TARGETS[name](w, r, 1.0 if p is None else p, **hyper)  # type: ignore[arg-type]
    loss = globals()[name]
    if p is None:
        return loss(w, r, **hyper)
    return p * loss(w, r, **hyper) + (1 - p) * loss(r, w, **hyper)
