"""Readers of published data sets: a file or folder in, `Sample`s out.

The layouts are in `psa_vlm.data.formats`. Every error names the place: `file:line`, or
`file[index]` where a file has no lines.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from psa_vlm.data.formats import find, format_named
from psa_vlm.data.formats.base import Format, Reading
from psa_vlm.data.labels import CategoryMap
from psa_vlm.data.rows import rows
from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError, ImageError, InputError
from psa_vlm.taxonomy import Taxonomy


def read(
    path: str | Path,
    images_dir: str | Path | None = None,
    taxonomy: Taxonomy | None = None,
    check_images: bool = True,
    format: str | None = None,
    categories: str | Path | None = None,
) -> list[Sample]:
    """Read a set in any layout we know; of PSA-VLM's and LLaVA's, rows may be mixed.

    Args:
        path: a data file, or a set's folder as it was published.
        images_dir: what image paths are relative to; where the layout has them by default.
        taxonomy: what labels mean; the paper's by default.
        check_images: make sure that every image file exists.
        format: name of the layout; guessed by default.
        categories: a map of categories over the shipped one.

    Raises:
        DataError: the set or a row is malformed, or a label is outside the taxonomy.
        ImageError: an image file is missing.
        ConfigError: the map of categories is malformed.
    """
    samples = []
    for item in scan(path, images_dir, taxonomy, check_images, format, categories):
        if isinstance(item, InputError):
            raise item
        samples.append(item)
    return samples


def read_psa(
    path: str | Path,
    images_dir: str | Path | None = None,
    taxonomy: Taxonomy | None = None,
    check_images: bool = True,
) -> list[Sample]:
    """Read the layout of PSA-VLM's training file, in which every row is labelled.

    A row holds `safe_type` and `safe_level` (label ids), `image` and `conversations`
    (`[{"from": "USER" | "ASSISTANT", "value": text}]`). Arguments and errors are those of `read`.
    """
    return read(path, images_dir, taxonomy, check_images, "psa")


def read_llava(
    path: str | Path, images_dir: str | Path | None = None, check_images: bool = True
) -> list[Sample]:
    """Read LLaVA's instruction layout: `id`, `image` (optional) and `conversations`.

    Arguments and errors are those of `read`; the samples carry no labels.
    """
    return read(path, images_dir, None, check_images, "llava")


def scan(
    path: str | Path,
    images_dir: str | Path | None = None,
    taxonomy: Taxonomy | None = None,
    check_images: bool = True,
    format: str | None = None,
    categories: str | Path | None = None,
) -> Iterator[Sample | InputError]:
    """Go through a set; what is wrong with a row comes in its place, and the rest goes on.

    One row at a time is in memory, except of a JSON list. Arguments are those of `read`.

    Raises:
        DataError: no layout fits.
        ConfigError: the map of categories is malformed.
    """
    path = Path(path)
    found, files = find(path, format_named(format) if format else None)
    reading = Reading(
        source=source_name(path),
        taxonomy=taxonomy or Taxonomy.default(),
        categories=CategoryMap.load(found.name, categories),
        images_dir=None if images_dir is None else Path(images_dir),
    )
    for file in files:
        yield from _samples(file, found, reading, check_images)


def source_name(path: Path) -> str:
    """What the samples of a file or folder say they come from."""
    return path.name if path.is_dir() else path.stem


def _samples(
    file: Path, format: Format, reading: Reading, check_images: bool
) -> Iterator[Sample | InputError]:
    for row in rows(file):
        if isinstance(row, DataError):
            yield row
            continue
        try:
            for sample in format.samples(row, reading):
                for image in sample.images if check_images else ():
                    if isinstance(image, Path) and not image.is_file():
                        raise ImageError(
                            f"{row.where}: no image file {image}; is images_dir right?"
                        )
                yield replace(sample, where=row.where)
        except InputError as error:
            yield error
