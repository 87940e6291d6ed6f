"""A few weights of a model, to tell whether it is the one that something was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose

from torch import nn

COUNT = 64


def is_adapter(name: str) -> bool:
    """Whether a weight of this name was added by PEFT, beside the model's own."""
    return ".lora_" in name


def probe(model: nn.Module) -> list[float]:
    """The first number of up to 64 weights, evenly spaced over the model: no time at any size.

    What an adapter added does not count.
    """
    weights = [
        weight
        for name, weight in model.named_parameters()
        if weight.is_floating_point() and not is_adapter(name)
    ]
    step = max(len(weights) / COUNT, 1)
    picked = [weights[int(i * step)] for i in range(min(COUNT, len(weights)))]
    return [float(weight.detach().flatten()[0]) for weight in picked]


def same_weights(one: Sequence[float], other: Sequence[float]) -> bool:
    """Whether two probes are of the same weights, be it at another floating-point precision."""
    return len(one) == len(other) and all(
        isclose(a, b, rel_tol=0.02, abs_tol=1e-4) for a, b in zip(one, other, strict=True)
    )
