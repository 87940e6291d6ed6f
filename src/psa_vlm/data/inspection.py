"""A look at a data set: what layout it has, what it holds, and everything that is wrong with it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from psa_vlm.data.formats import find, format_named
from psa_vlm.data.hashes import fingerprinter, prompt_hash
from psa_vlm.data.readers import scan
from psa_vlm.data.sample import Sample
from psa_vlm.errors import ImageError, InputError
from psa_vlm.taxonomy import Taxonomy

SHOWN = 3
"""Samples that are shown."""


@dataclass
class Inspection:
    """What was found in a set.

    Attributes:
        layout: name of the layout, and its words for people.
        licence: of the set, where it is known.
        files: that hold rows.
        samples: that can be used.
        images: different ones by their pixels.
        labels: samples by type and level; None is unlabelled.
        categories: samples by the set's own category.
        shown: the first samples.
        problems: one line each, with the place.
    """

    layout: str
    title: str
    licence: str | None
    files: list[str]
    samples: int = 0
    images: int = 0
    labels: Counter[tuple[str | None, str | None]] = field(default_factory=Counter)
    categories: Counter[str] = field(default_factory=Counter)
    shown: list[Sample] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {
            "format": self.layout,
            "licence": self.licence,
            "files": self.files,
            "samples": self.samples,
            "images": self.images,
            "labels": [
                {"type": type, "level": level, "samples": count}
                for (type, level), count in sorted(self.labels.items(), key=str)
            ],
            "categories": dict(sorted(self.categories.items())),
            "shown": [
                {
                    "id": one.id,
                    "images": [
                        str(image) if isinstance(image, Path) else "inside" for image in one.images
                    ],
                    "conversation": [vars(turn) for turn in one.conversation],
                    "type": one.type,
                    "level": one.level,
                    "tags": dict(one.tags),
                }
                for one in self.shown
            ],
            "problems": self.problems,
        }

    def view(self) -> Group:
        """For the terminal; the problems are lines of their own."""
        head = Table.grid(padding=(0, 2))
        head.add_row("format", f"{self.layout} ({self.title})")
        head.add_row("licence", self.licence or "see the set's own page")
        head.add_row("files", f"{len(self.files):,}")
        head.add_row("samples", f"{self.samples:,}")
        head.add_row("images", f"{self.images:,} different ones")
        head.add_row("problems", f"{len(self.problems):,}")
        labels = Table("type", "level", "samples")
        for (type, level), count in sorted(self.labels.items(), key=str):
            labels.add_row(type or "unlabelled", level or "", f"{count:,}")
        parts: list[Any] = [head, labels]
        if self.categories:
            categories = Table("category of the set", "samples")
            for name, count in sorted(self.categories.items()):
                categories.add_row(escape(name), f"{count:,}")
            parts.append(categories)
        shown = Table("sample", "question", "answer")
        for one in self.shown:
            shown.add_row(
                *(escape(f"{text or '':.200}") for text in (one.id, one.question, one.answer))
            )
        return Group(*parts, shown)


def inspect(
    path: Path,
    images_dir: Path | None = None,
    taxonomy: Taxonomy | None = None,
    format: str | None = None,
    categories: Path | None = None,
) -> Inspection:
    """Go through a set, every image included, one row at a time.

    A problem is what `scan` finds wrong, an image that can't be used, or a question that was asked
    about the same pixels before. Arguments and errors are those of `scan`.
    """
    found, files = find(path, format_named(format) if format else None)
    result = Inspection(found.name, found.title, found.licence, [str(file) for file in files])
    look_at = fingerprinter()
    pixels: set[int] = set()
    asked: dict[tuple[int, ...], str] = {}
    for item in scan(path, images_dir, taxonomy, True, found.name, categories):
        if isinstance(item, InputError):
            result.problems.append(str(item))
            continue
        try:
            seen = [look_at(image).pixels for image in item.images]
        except ImageError as error:
            result.problems.append(f"{item.where}: {error}")
            continue
        pixels.update(seen)
        question = (prompt_hash(item), *seen)
        if question in asked:
            result.problems.append(f"{item.where}: duplicate of {asked[question]}")
        asked.setdefault(question, item.where)
        result.samples += 1
        result.labels[item.type, item.level] += 1
        if "category" in item.tags:
            result.categories[item.tags["category"]] += 1
        if len(result.shown) < SHOWN:
            result.shown.append(item)
    result.images = len(pixels)
    return result
