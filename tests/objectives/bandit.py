"""A softmax policy over a few arms, float64, where minima are known in closed form.

Expectations are exact: every ordered pair of arms is there, weighted by how often the sampler draws it times the
probability that its first arm is preferred. An arm is a completion of one token.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

LOSS = Callable[[Tensor], Tensor]
REF = torch.tensor([0.35, 0.25, 0.2, 0.15, 0.05], dtype=torch.float64)
REWARD = torch.tensor([0.3, -0.8, 1.1, 0.0, 1.6], dtype=torch.float64)
SAMPLERS = {
    "reference": REF,
    "uniform": torch.full((5,), 0.2, dtype=torch.float64),
    "skewed": torch.tensor([0.01, 0.9, 0.03, 0.02, 0.04], dtype=torch.float64),
}


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def converged(loss: LOSS, logits: Tensor, *, by: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
    """Log-probabilities at the minimum of ``loss(log-probabilities)``, by L-BFGS from ``logits``.

    ``by`` maps the parameters to the arms' logits. Fails if the gradient does not vanish.
    """
    x = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [x], max_iter=2000, tolerance_grad=1e-11, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(by(x).log_softmax(-1))
        value.backward()
        return value

    optimizer.step(closure)
    (slope,) = torch.autograd.grad(loss(by(x).log_softmax(-1)), [x])
    assert slope.abs().max() < 1e-8, f"no minimum: the gradient is still {slope}"
    return by(x).log_softmax(-1).detach()


def stepped(
    loss: LOSS,
    parameters: Tensor,
    *,
    steps: int,
    rate: float,
    by: Callable[[Tensor], Tensor] = lambda x: x,
) -> Tensor:
    """Log-probabilities after plain gradient descent, as a training run that is stopped would leave them."""
    x = parameters.clone().requires_grad_()
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss(by(x).log_softmax(-1)), [x])
        x = (x - rate * slope).detach().requires_grad_()
    return by(x).log_softmax(-1).detach()


def all_pairs(arms: int) -> Tensor:
    """Every ordered pair (2, arms^2), an arm against itself included."""
    first = torch.arange(arms).repeat_interleave(arms)
    return torch.stack([first, torch.arange(arms).repeat(arms)])


def weights(sampler: Tensor, wins: Tensor) -> Tensor:
    """How often each of ``all_pairs`` is seen with its first arm preferred. ``wins[i, j]``: i beats j."""
    return (sampler[:, None] * sampler[None] * wins).flatten()


def bradley_terry_wins(reward: Tensor) -> Tensor:
    return torch.sigmoid(reward[:, None] - reward[None])


def tilted(ref: Tensor, exponent: Tensor) -> Tensor:
    """Log-probabilities of the policy proportional to ref exp(exponent)."""
    return (ref.log() + exponent).log_softmax(-1)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-7) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)
