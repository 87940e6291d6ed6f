"""Splits that share no image: what is tested was never trained on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError, ImageError

if TYPE_CHECKING:
    from PIL import Image


def split(
    samples: Sequence[Sample], fractions: Mapping[str, float], seed: int
) -> dict[str, list[Sample]]:
    """Divide samples so that the same image content never stands on two sides.

    Samples that share an image, directly or through others, stay together; so do conversations
    in text only that are the same word for word. The outcome depends on contents and seed, not on
    the order given, and each side exceeds its share by less than the largest such group.

    Args:
        samples: what to divide.
        fractions: share of each split by name, summing to 1.
        seed: another seed, another division.

    Returns:
        Each split's samples in the order given, with `Sample.split` set.

    Raises:
        DataError: the fractions are negative or do not sum to 1.
        ImageError: an image file can't be read.
    """
    groups = _groups(samples)
    sides = assign(list(groups), [len(group) for group in groups.values()], fractions, seed)
    side: dict[int, str] = {}
    for group, name in zip(groups.values(), sides, strict=True):
        side.update(dict.fromkeys(group, name))

    parts: dict[str, list[Sample]] = {name: [] for name in fractions}
    for index, sample in enumerate(samples):
        parts[side[index]].append(replace(sample, split=side[index]))
    return parts


def assign(
    keys: Sequence[str], sizes: Sequence[int], fractions: Mapping[str, float], seed: int
) -> list[str]:
    """Choose a split for each group: the largest first, each to where most room is left.

    Args:
        keys: a name for each group that depends on its content alone.
        sizes: samples in each group.
        fractions: share of each split by name, summing to 1.
        seed: another seed, another choice.

    Raises:
        DataError: the fractions are negative or do not sum to 1.
    """
    shares = fractions.values()
    if not all(share >= 0 for share in shares) or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise DataError(f"split fractions must be 0 or more and sum to 1: {dict(fractions)}")
    ranks = [_digest(f"{seed}:{key}".encode())[:16] for key in keys]
    order = sorted(range(len(keys)), key=lambda i: (-sizes[i], ranks[i]))
    room = {name: share * sum(sizes) for name, share in fractions.items()}
    chosen = [""] * len(keys)
    for i in order:
        chosen[i] = max(room, key=lambda name: room[name])
        room[chosen[i]] -= sizes[i]
    return chosen


def _groups(samples: Sequence[Sample]) -> dict[str, list[int]]:
    """Indices of samples that must stay together, by the least content key of the group."""
    file_key = cache(_file_key)
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    firsts = []
    for sample in samples:
        keys = [
            file_key(image) if isinstance(image, Path) else _pixel_key(image)
            for image in sample.images
        ] or [_digest(repr(sample.conversation).encode())]
        firsts.append(keys[0])
        for key in keys:
            low, high = sorted((root(keys[0]), root(key)))
            parent[high] = low

    groups: dict[str, list[int]] = {}
    for index, key in enumerate(firsts):
        groups.setdefault(root(key), []).append(index)
    return groups


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_key(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ImageError(f"{path}: cannot be read ({error.strerror})") from None


def _pixel_key(image: Image.Image) -> str:
    return _digest(f"{image.mode} {image.size} ".encode() + image.tobytes())
