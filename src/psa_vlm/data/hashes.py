"""What an image shows and a prompt says, in 64 bits each, so that copies are found."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from psa_vlm.data.images import Source, open_images
from psa_vlm.data.sample import Sample
from psa_vlm.errors import MissingExtra

Hashes = NDArray[np.uint64]

NEAR = 4
"""Bits in which the looks of two images may differ that are called nearly the same. Another size
or a stronger compression of an image changes none to four bits of 64; different images have about
32 between them."""


class Fingerprint(NamedTuple):
    """An image in two numbers of 64 bits."""

    pixels: int
    """Equal for the same pixels, whatever file they come from."""
    look: int
    """Perceptual hash of the first frame: near for what looks nearly the same."""


def fingerprint(image: Source) -> Fingerprint:
    """Look at an image, all its frames included.

    Raises:
        ImageError: it can't be used.
        MissingExtra: imagehash is not installed.
    """
    try:
        import imagehash
    except ImportError:
        raise MissingExtra("imagehash", "train") from None
    frames = open_images(image)
    digest = hashlib.sha256()
    for frame in frames:
        digest.update(f"{frame.size}".encode() + frame.tobytes())
    bits = imagehash.phash(frames[0]).hash.flatten()
    look = int.from_bytes(np.packbits(bits).tobytes(), "big")
    return Fingerprint(_first64(digest), look)


def fingerprinter() -> Callable[[Source], Fingerprint]:
    """A `fingerprint` that looks once at a file which several rows name."""
    of_file = lru_cache(maxsize=4096)(fingerprint)
    return lambda image: of_file(image) if isinstance(image, Path) else fingerprint(image)


def prompt_hash(sample: Sample) -> int:
    """What the user says; case, spaces and punctuation at the ends make no difference."""
    said = " ".join(turn.text for turn in sample.conversation if turn.role == "user")
    words = " ".join(said.casefold().split()).strip(" .!?")
    return _first64(hashlib.sha256(words.encode()))


def array(hashes: Iterable[int]) -> Hashes:
    """Hashes as one array ``[n]``."""
    return np.fromiter(hashes, np.uint64)


def near_groups(looks: Hashes, distance: int = NEAR) -> NDArray[np.int64]:
    """Number the groups of looks that are within a distance of each other, or of a third.

    Two looks that differ in d bits are equal in one of d + 1 bands, so only those are compared.

    Args:
        looks: ``[n]``.
        distance: most bits in which neighbours differ.

    Returns:
        The group of each, ``[n]``.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    different, which = np.unique(looks, return_inverse=True)
    edges = [round(band) for band in np.linspace(0, 64, distance + 2)]
    pairs = [_pairs(different, start, stop, distance) for start, stop in pairwise(edges)]
    rows, columns = np.concatenate(pairs, axis=1)
    n = len(different)
    graph = coo_array((np.ones(len(rows), bool), (rows, columns)), shape=(n, n))
    _, groups = connected_components(graph, directed=False)
    found: NDArray[np.int64] = groups[which].astype(np.int64)
    return found


def _pairs(looks: Hashes, start: int, stop: int, distance: int) -> NDArray[np.int64]:
    """Pairs ``[2, m]`` within the distance that are equal in the bits from start to stop."""
    mask = np.uint64(((1 << (stop - start)) - 1) << start)
    order = np.argsort(looks & mask, kind="stable")
    found: list[NDArray[np.int64]] = [np.empty((2, 0), np.int64)]
    at, step = np.arange(len(looks)), 1
    while len(at := at[at + step < len(looks)]):
        first, second = order[at], order[at + step]
        same = (looks[first] & mask) == (looks[second] & mask)
        at, first, second = at[same], first[same], second[same]
        close = np.bitwise_count(looks[first] ^ looks[second]) <= distance
        found.append(np.stack([first[close], second[close]]))
        step += 1
    return np.concatenate(found, axis=1)


def near_any(looks: Sequence[int], others: Hashes, distance: int = NEAR) -> bool:
    """Whether one of the looks is within the distance of one of the others."""
    return any(
        bool((np.bitwise_count(others ^ np.uint64(look)) <= distance).any()) for look in looks
    )


def _first64(digest: Any) -> int:
    return int.from_bytes(digest.digest()[:8], "big")
