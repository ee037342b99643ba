"""The head of a reward model that weighs its outputs by the prompt: a gate beside the linear layer.

The gate (arXiv:2406.12845, section 3.2) reads the hidden state of the prompt's last token, so that all completions of
a prompt are weighed alike. Its weights lie in the model's own file as ``score.gate.*``; a program that does not know
them reads the outputs without it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from steerwell.data.errors import InputError

GATE_WIDTH = 128


class GatedHead(nn.Linear):
    """A linear head (H outputs) with a gate of one hidden layer: logits of H weights from the prompt's state.

    A fresh gate gives all outputs the same weight.
    """

    def __init__(self, linear: nn.Linear, width: int = GATE_WIDTH) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        noise = torch.Generator().manual_seed(0)
        first = nn.Linear(linear.in_features, width)
        second = nn.Linear(width, linear.out_features)
        with torch.no_grad():
            bound = linear.in_features**-0.5
            first.weight.copy_(torch.rand(first.weight.shape, generator=noise) * 2 * bound - bound)
            first.bias.zero_()
            second.weight.zero_()
            second.bias.zero_()
        self.gate = nn.Sequential(first, nn.SiLU(), second).to(linear.weight.device, linear.weight.dtype)

    def forward(self, input: Tensor, prompt: Tensor | None = None) -> Tensor:
        """Outputs (N, H) of the pooled states (N, D); with ``prompt`` (N, D) also the gate's logits: (N, 2 H)."""
        outputs = super().forward(input)
        if prompt is None:
            return outputs
        return torch.cat([outputs, self.gate(prompt)], dim=1)


def add_gate(model: Any) -> None:
    """Give the head of a model a fresh gate, in place; one that has a gate keeps it."""
    if not isinstance(model.score, GatedHead):
        model.score = GatedHead(model.score)


def load_gate(model: Any, place: str | Path) -> None:
    """Give the head of a model the gate that its directory holds. Raises :class:`InputError` where there is none."""
    add_gate(model)
    folder, names = (
        Path(place),
        [f"score.{name}" for name in model.score.state_dict() if name.startswith("gate.")],
    )
    index = folder / "model.safetensors.index.json"
    where = json.loads(index.read_text("utf-8"))["weight_map"] if index.is_file() else {}
    found: dict[str, Tensor] = {}
    for name in names:
        file = folder / where.get(name, "model.safetensors")
        if file.is_file():
            with safe_open(file, framework="pt") as weights:
                if name in weights.keys():  # noqa: SIM118 - it is no dict
                    found[name.removeprefix("score.")] = weights.get_tensor(name)
    if len(found) != len(names):
        raise InputError(
            "the scoring recipe names a gate, and the weights have none",
            file=place,
            mend="Name the directory that the training run wrote.",
        )
    width = found["gate.0.weight"].shape[0]
    if width != GATE_WIDTH:
        model.score = GatedHead(model.score, width)
    model.score.load_state_dict(found, strict=False)


__all__ = ["GATE_WIDTH", "GatedHead", "add_gate", "load_gate"]
