"""How many samples of each risk type a mix holds, and how many clean ones beside them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Most = Literal["all", "equal"] | Mapping[int, int]
"""Of each risk type: all there are, as many as of the rarest, or at most so many by label id."""


def balanced(
    types: NDArray[np.int64], clean: int, most: Most, ratio: float | None, rng: np.random.Generator
) -> NDArray[np.bool_]:
    """Draw samples so that types and the clean : risky ratio are as wanted.

    Nothing is repeated: where clean samples are too few for the ratio, risky ones are left out of
    every type alike. Unlabelled samples are always kept.

    Args:
        types: label id of each sample, -1 for unlabelled ones, ``[n]``.
        clean: label id of clean samples.
        most: of each risk type.
        ratio: clean samples for each risky one; None keeps all clean ones.
        rng: draws.

    Returns:
        What is kept, ``[n]``; clean samples are within ``max(0.5, ratio)`` of what the risky ones
        ask for.
    """
    risks = [int(one) for one in np.unique(types) if one not in (clean, -1)]
    counts = wanted(
        {one: int((types == one).sum()) for one in risks}, int((types == clean).sum()), most, ratio
    )
    keep: NDArray[np.bool_] = types == -1
    for one, count in zip([*risks, clean], counts, strict=True):
        keep[rng.permutation(np.flatnonzero(types == one))[:count]] = True
    return keep


def wanted(risky: Mapping[int, int], clean: int, most: Most, ratio: float | None) -> list[int]:
    """Samples to keep of each risk type in turn, and of clean ones last."""
    least = min(risky.values(), default=0)
    if most == "all":
        counts = list(risky.values())
    elif most == "equal":
        counts = [least] * len(risky)
    else:
        counts = [min(n, most.get(one, n)) for one, n in risky.items()]
    total = sum(counts)
    if ratio is None or not total:
        return [*counts, clean]
    if clean < round(ratio * total):
        scale = (fewer := int(clean / ratio)) / total
        parts = [count * scale for count in counts]
        counts = [int(part) for part in parts]
        rest = sorted(range(len(parts)), key=lambda i: counts[i] - parts[i])
        for i in rest[: fewer - sum(counts)]:
            counts[i] += 1
    return [*counts, min(clean, round(ratio * sum(counts)))]
