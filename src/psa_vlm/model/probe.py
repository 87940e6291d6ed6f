"""A few weights of a model, to tell whether it is the one that something was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from math import isclose

from torch import nn

COUNT = 64


def is_adapter(name: str) -> bool:
    """Whether a weight of this name was added by PEFT, beside the model's own."""
    return ".lora_" in name


def is_quantised(model: nn.Module) -> bool:
    """Whether weights of a model are kept as whole numbers, and so are not what they were."""
    return not all(weight.is_floating_point() for weight in model.parameters())


def probe(model: nn.Module) -> list[float | None]:
    """The first number of up to 64 weights, evenly spaced over the model: no time at any size.

    It is None where the weight is quantised. What an adapter added does not count.
    """
    weights = [
        weight
        for name, weight in model.named_parameters()
        if not is_adapter(name) and weight.numel()
    ]
    step = max(len(weights) / COUNT, 1)
    picked = [weights[int(i * step)] for i in range(min(COUNT, len(weights)))]
    return [
        float(weight.detach().flatten()[0]) if weight.is_floating_point() else None
        for weight in picked
    ]


def same_weights(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    """Whether two probes are of the same weights, be it at another floating-point precision.

    Of a quantised model the weights count that are not.
    """
    return len(one) == len(other) and all(
        a is None or b is None or isclose(a, b, rel_tol=0.02, abs_tol=1e-4)
        for a, b in zip(one, other, strict=True)
    )
