"""What a published layout is to us: the keys of its rows, and how a row becomes samples."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from psa_vlm.data.labels import CategoryMap, Labels
from psa_vlm.data.rows import Row
from psa_vlm.data.sample import Sample, Turn, without_image_marks
from psa_vlm.errors import DataError, ImageError
from psa_vlm.taxonomy import Taxonomy

if TYPE_CHECKING:
    from PIL import Image

IMAGE_FOLDERS = ("images", "imgs", "img")
"""Where sets keep images, beside the file or beside its folder."""


@dataclass(frozen=True)
class Reading:
    """How one set is read.

    Attributes:
        source: name of the set, which every sample carries.
        taxonomy: what labels mean.
        categories: what the set's own categories mean.
        images_dir: what image paths are relative to; None looks beside the file.
    """

    source: str
    taxonomy: Taxonomy
    categories: CategoryMap
    images_dir: Path | None = None

    def image(self, row: Row, name: str, *folders: str) -> Path:
        """The file of an image: where it is, or where it was looked for first.

        Args:
            row: the row that names it.
            name: its path.
            folders: where the layout keeps it, as seen from the row's file.
        """
        if self.images_dir is not None:
            roots = [self.images_dir]
        else:
            here = row.file.parent
            roots = [here / folder for folder in folders]
            roots += [here, here / row.file.stem]
            roots += [root / folder for root in (here, here.parent) for folder in IMAGE_FOLDERS]
        places = [root / name for root in roots]
        return next((place for place in places if place.is_file()), places[0])

    def labels(self, row: Row, *names: str) -> Labels:
        """Type and level of the most telling of a row's categories."""
        return self.categories.labels(row.where, self.taxonomy, *names)

    @property
    def clean(self) -> Labels:
        """Type and level of what holds no risk."""
        return self.taxonomy.clean, self.taxonomy.safe_level

    def prompt(self, row: Row) -> str:
        """What is asked about an image that the set asks nothing about."""
        if not self.categories.prompt:
            raise DataError(
                f"{row.where}: nothing is asked; add a 'prompt' to {self.categories.file}"
            )
        return self.categories.prompt

    def sample(
        self,
        row: Row,
        image: Path | Image.Image | None,
        question: str,
        answer: str | None = None,
        labels: Labels | None = None,
        part: str = "",
        **tags: Any,
    ) -> Sample:
        """A sample of one question; `part` tells samples of one row apart."""
        question = without_image_marks(question)
        if not question:
            raise DataError(f"{row.where}: the question is empty")
        turns = [Turn("user", question)] + ([Turn("assistant", answer)] if answer else [])
        return Sample(
            id="-".join(filter(None, (row.file.stem, row.key, part))),
            images=() if image is None else (image,),
            conversation=tuple(turns),
            type=labels[0] if labels else None,
            level=labels[1] if labels else None,
            source=self.source,
            tags={key: str(value) for key, value in tags.items() if value not in (None, "")},
        )


@dataclass(frozen=True)
class Format:
    """A published layout.

    Attributes:
        name: as `--format` has it; the set's map is `maps/<name>.yaml`.
        title: for people.
        samples: makes a row's samples.
        keys: what every row has, by which a file is recognised; none is never guessed.
        or_keys: what rows of another split have instead.
        files: patterns of its files in a set's folder, the first of which that fits something
            counts; none are all data files.
        licence: of the set, where it is known.
    """

    name: str
    title: str
    samples: Callable[[Row, Reading], Iterator[Sample]]
    keys: frozenset[str] = frozenset()
    files: tuple[str, ...] = ()
    licence: str | None = None
    or_keys: frozenset[str] = frozenset()

    def fit(self, row: Row) -> int:
        """How many keys of the layout a row has, if it has all of them; else 0."""
        fitting = (keys for keys in (self.keys, self.or_keys) if keys <= set(row.values))
        return max(map(len, fitting), default=0)


def picture(row: Row, key: str = "image") -> Image.Image:
    """An image that the row itself holds, in base64 or as Parquet's bytes; decoded when used.

    Raises:
        ImageError: it holds none.
    """
    from PIL import Image, UnidentifiedImageError

    from psa_vlm.data.images import FORMATS

    value = row.value(key)
    try:
        content = value["bytes"] if isinstance(value, dict) else value
        if isinstance(content, str):
            content = base64.b64decode(content, validate=True)
        return Image.open(io.BytesIO(content), formats=FORMATS)
    except (KeyError, TypeError, binascii.Error, UnidentifiedImageError, OSError):
        raise ImageError(f"{row.where}: {key!r} holds no image that can be read") from None
