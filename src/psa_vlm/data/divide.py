"""Which rows of a mix go into which split, decided on a few numbers of each row."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from psa_vlm.data.config import Balance, PrepareConfig
from psa_vlm.data.hashes import Fingerprint, near_groups, prompt_hash
from psa_vlm.data.mix import Most, balanced
from psa_vlm.data.sample import Sample
from psa_vlm.data.splits import assign
from psa_vlm.taxonomy import Taxonomy


class Columns:
    """What is kept in memory of each row: some 40 bytes."""

    def __init__(self) -> None:
        self.source, self.type, self.level = array("h"), array("h"), array("h")
        self.prompt, self.images = array("Q"), array("h")
        self.pixels, self.looks = array("Q"), array("Q")

    def add(
        self, sample: Sample, prints: Sequence[Fingerprint], source: int, taxonomy: Taxonomy
    ) -> None:
        """Take a row of a source.

        Raises:
            DataError: its labels are outside the taxonomy.
        """
        type = -1 if sample.type is None else taxonomy.type_id(sample.type)
        level = -1 if sample.level is None else taxonomy.level_id(sample.level)
        self.source.append(source)
        self.type.append(type)
        self.level.append(level)
        self.prompt.append(prompt_hash(sample))
        self.images.append(len(prints))
        self.pixels.extend(one.pixels for one in prints)
        self.looks.extend(one.look for one in prints)

    def __len__(self) -> int:
        return len(self.source)


def divide(
    columns: Columns, config: PrepareConfig, taxonomy: Taxonomy
) -> tuple[NDArray[np.int64], dict[int, str]]:
    """Choose rows and splits: copies out, then `take`, splits without leaks, and the balance.

    Returns:
        The split of each row by number, -1 for none, and why a row is in none. Of a copy's reason,
        the number of the row that stays stands in braces.
    """
    rng = np.random.default_rng(config.seed)
    names = list(config.splits)
    source, types = np.array(columns.source), np.array(columns.type, np.int64)
    pins = np.array([names.index(one.split) if one.split else -1 for one in config.sources])[source]
    said, content, groups = _alike(columns, config.near)

    keep, reasons = _without_copies(said, pins, types * 1000 + np.array(columns.level))
    for number, one in enumerate(config.sources):
        mine = np.flatnonzero(keep & (source == number))
        if one.take is not None and len(mine) > one.take:
            left = rng.permutation(mine)[one.take :]
            keep[left] = False
            reasons |= dict.fromkeys(left.tolist(), f"more than take: {one.take}")

    side = _sides(keep, pins, content, groups, config)
    leaks = np.flatnonzero(keep & (pins >= 0) & (pins != side))
    for row in leaks.tolist():
        reasons[row] = f"shares an image with {names[side[row]]}"
    side[leaks] = -1

    clean, most = taxonomy.type_id(taxonomy.clean), _most(config.balance, taxonomy)
    for name in config.balance.splits:
        mine = np.flatnonzero(side == names.index(name))
        kept = balanced(types[mine], clean, most, config.balance.clean_to_risky, rng)
        left = mine[~kept]
        side[left] = -1
        reasons |= dict.fromkeys(left.tolist(), f"more than the balance of {name} asks for")
    return side, reasons


def _without_copies(
    said: NDArray[np.uint64], pins: NDArray[np.int64], labels: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], dict[int, str]]:
    """Which rows stay, and why the others do not; of copies, the one in the latest split stays."""
    keep, reasons = np.ones(len(said), bool), {}
    order = np.argsort(-pins, kind="stable")
    _, first, which = np.unique(said[order], return_index=True, return_inverse=True)
    for row, kept in zip(order, order[first][which], strict=True):
        if row != kept:
            keep[row] = False
            other = ", with another label" if labels[row] != labels[kept] else ""
            reasons[int(row)] = f"copy of {{{kept}}}{other}"
    return keep, reasons


def _sides(
    keep: NDArray[np.bool_],
    pins: NDArray[np.int64],
    content: NDArray[np.uint64],
    groups: NDArray[np.int64],
    config: PrepareConfig,
) -> NDArray[np.int64]:
    """The split of each kept row by number: that of its group's latest pin, or a share's."""
    names, count = list(config.splits), groups.max() + 1
    latest = np.full(count, -1)
    np.maximum.at(latest, groups[keep], pins[keep])
    free = keep & (latest[groups] == -1)
    least = np.full(count, np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(least, groups[free], content[free])
    open_groups, sizes = np.unique(groups[free], return_counts=True)
    keys = [str(key) for key in least[open_groups]]
    chosen = assign(keys, sizes.tolist(), config.splits, config.seed)
    latest[open_groups] = [names.index(name) for name in chosen]
    return np.where(keep, latest[groups], -1)


def _alike(
    columns: Columns, near: int | None
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64]]:
    """Three numbers of each row: what it asks about what, its content, and its group.

    Rows of one group share an image, directly or through others; without an image, the words.
    """
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    counts, prompts = np.array(columns.images), np.array(columns.prompt, np.uint64)
    pixels = np.array(columns.pixels, np.uint64)
    if near is None or not len(pixels):
        _, image = np.unique(pixels, return_inverse=True)
    else:
        image = near_groups(np.array(columns.looks, np.uint64), near)
    n = len(counts)
    _, words = np.unique(prompts, return_inverse=True)
    bare = np.flatnonzero(counts == 0)
    rows = np.concatenate([np.repeat(np.arange(n), counts), bare])
    size = int(image.max(initial=-1)) + 1
    nodes = n + np.concatenate([image, size + words[bare]])
    total = n + size + int(words.max(initial=0)) + 1
    graph = coo_array((np.ones(len(rows), bool), (rows, nodes)), shape=(total, total))
    _, groups = connected_components(graph, directed=False)

    ends = np.cumsum(counts)
    said, content = np.empty(n, np.uint64), np.empty(n, np.uint64)
    for row, (start, end) in enumerate(zip(ends - counts, ends, strict=True)):
        asked = int(prompts[row])
        said[row] = hash((asked, *image[start:end].tolist())) % 2**64
        content[row] = min(pixels[start:end].tolist(), default=asked)
    return said, content, groups[:n].astype(np.int64)


def _most(balance: Balance, taxonomy: Taxonomy) -> Most:
    if isinstance(balance.types, dict):
        return {taxonomy.type_id(name): count for name, count in balance.types.items()}
    return balance.types
