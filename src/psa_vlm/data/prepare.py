"""From published sets to one prepared mix: no copies, no image on two sides, balanced as wanted.

Rows go to disk as they are read (Arrow, which is mapped into memory); what stays in memory is a few
numbers of each, and the reason why one is left out.

    OUT/train, OUT/val, ...   one Hugging Face data set each; a `path` for `data:` of a training
    OUT/images                images that stood inside a set's file
    OUT/manifest.json         sources, counts and hashes
    OUT/dropped.jsonl         every row that is in no split, and why
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from psa_vlm.data.config import PrepareConfig, Source
from psa_vlm.data.divide import Columns, divide
from psa_vlm.data.formats import find, format_named
from psa_vlm.data.hashes import Fingerprint, fingerprinter
from psa_vlm.data.images import open_images
from psa_vlm.data.readers import scan, source_name
from psa_vlm.data.sample import Sample
from psa_vlm.errors import ConfigError, DataError, InputError, MissingExtra
from psa_vlm.taxonomy import Taxonomy

MANIFEST = "manifest.json"
DROPPED = "dropped.jsonl"
ROWS = "rows.arrow"


def prepare(config: PrepareConfig, out: Path) -> dict[str, Any]:
    """Write a prepared mix; the folder appears in one piece.

    Args:
        config: what to mix, and how.
        out: the folder; it must not exist.

    Returns:
        The manifest.

    Raises:
        ConfigError: `out` exists, or a file of the configuration is malformed.
        DataError: a row can't be used (`on_problem: stop`), or nothing is left.
        ImageError: an image can't be used (`on_problem: stop`).
        MissingExtra: a package for training is not installed.
    """
    try:
        import datasets
    except ImportError:
        raise MissingExtra("datasets", "train") from None
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another folder, or delete it")
    taxonomy = Taxonomy.load(config.taxonomy)
    work = out.with_name(f"{out.name}.work")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    (work / DROPPED).touch()
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        gathered = _gather(config, taxonomy, work)
        side, reasons = divide(gathered.columns, config, taxonomy)
        manifest = _write(gathered, side, reasons, config, work)
        os.replace(work, out)
    finally:
        if not shown:
            datasets.enable_progress_bars()
        shutil.rmtree(work, ignore_errors=True)
    return manifest


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Gathered:
    """Every usable row of all sources.

    Attributes:
        rows: on disk, a `datasets.Dataset`.
        columns: what divides them.
        sources: what the manifest says of each source.
    """

    rows: Any
    columns: Columns
    sources: list[dict[str, Any]]


def _gather(config: PrepareConfig, taxonomy: Taxonomy, work: Path) -> _Gathered:
    """Put every usable row on disk; what can't be used stops it, or is written down."""
    from datasets import Dataset, Features, List, Value
    from datasets.arrow_writer import ArrowWriter

    text = Value("string")
    features = Features(
        dict.fromkeys(("id", "type", "level", "source", "tags", "where"), text)
        | {"conversation": List({"role": text, "text": text})}
        | {"images": List(text), "pixels": List(text), "looks": List(text)}
    )
    columns, sources, look_at = Columns(), [], fingerprinter()
    path = work / ROWS
    writer = ArrowWriter(features=features, path=str(path), writer_batch_size=1000)
    for number, source in enumerate(config.sources):
        record = _described(source)
        sources.append(record)
        for item in scan(source.path, source.images_dir, taxonomy, True, source.format, source.map):
            try:
                if isinstance(item, InputError):
                    raise item
                prints = [look_at(image) for image in item.images]
                columns.add(item, prints, number, taxonomy)
            except InputError as error:
                place = f"{item.where}: " if isinstance(item, Sample) else ""
                if config.on_problem == "stop":
                    raise type(error)(f"{place}{error}") from None
                _note(work, {"source": str(source.path), "reason": f"{place}{error}"})
                record["problems"] += 1
                continue
            writer.write(_row(item, prints, work))
            record["samples"] += 1
    if not len(columns):
        raise DataError("the sources hold no row that can be used")
    writer.finalize()
    return _Gathered(Dataset.from_file(str(path)), columns, sources)


def _row(sample: Sample, prints: Sequence[Fingerprint], work: Path) -> dict[str, Any]:
    return {
        "id": sample.id,
        "images": [
            str(image.resolve()) if isinstance(image, Path) else _keep(image, one.pixels, work)
            for image, one in zip(sample.images, prints, strict=True)
        ],
        "pixels": [f"{one.pixels:016x}" for one in prints],
        "looks": [f"{one.look:016x}" for one in prints],
        "conversation": [{"role": one.role, "text": one.text} for one in sample.conversation],
        "type": sample.type,
        "level": sample.level,
        "source": sample.source,
        "tags": json.dumps(dict(sample.tags), ensure_ascii=False),
        "where": sample.where,
    }


def _described(source: Source) -> dict[str, Any]:
    found, files = find(source.path, format_named(source.format) if source.format else None)
    hashes = {}
    for file in files:
        with file.open("rb") as stream:
            hashes[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "path": str(source.path),
        "name": source_name(source.path),
        "format": found.name,
        "licence": found.licence,
        "files": hashes,
        "samples": 0,
        "problems": 0,
    }


def _keep(image: Any, pixels: int, work: Path) -> str:
    """Write an image that stood inside a file, once; its path as seen from the prepared folder."""
    name = f"images/{pixels >> 56:02x}/{pixels:016x}.png"
    if not (work / name).exists():
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        first, *others = open_images(image)
        first.save(work / name, save_all=bool(others), append_images=others)
    return name


# --- writing -------------------------------------------------------------------------------------


def _write(
    gathered: _Gathered,
    side: NDArray[np.int64],
    reasons: Mapping[int, str],
    config: PrepareConfig,
    work: Path,
) -> dict[str, Any]:
    splits = {}
    for number, name in enumerate(config.splits):
        mine = np.flatnonzero(side == number)
        part = gathered.rows.select(mine)
        if len(mine):
            part.save_to_disk(str(work / name))
        splits[name] = _counts(gathered, mine, part)
    for line in _left_out(gathered, reasons):
        _note(work, line)
    manifest = {
        "config": config.model_dump(mode="json"),
        "sources": gathered.sources,
        "splits": splits,
        "left_out": _tally(reasons),
    }
    (work / ROWS).unlink()
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    (work / MANIFEST).write_text(text + "\n", encoding="utf-8")
    return manifest


def _counts(gathered: _Gathered, rows: NDArray[np.int64], part: Any) -> dict[str, Any]:
    """Samples of a split by type, level and source, and a hash of what it holds."""
    digest = hashlib.sha256()
    counts: dict[str, dict[str, int]] = {"type": {}, "level": {}, "source": {}}
    for batch in part.select_columns(
        ["id", "type", "level", "source", "conversation", "pixels"]
    ).iter(batch_size=1000):
        for i, id in enumerate(batch["id"]):
            digest.update(repr((id, batch["conversation"][i], batch["pixels"][i])).encode())
            for key, count in counts.items():
                name = batch[key][i] or "unlabelled"
                count[name] = count.get(name, 0) + 1
    return {"samples": len(rows), "hash": digest.hexdigest()[:16], **counts}


def _left_out(gathered: _Gathered, reasons: Mapping[int, str]) -> Iterator[dict[str, str]]:
    """What to write down of rows that were read and are in no split; copies name their original."""
    places = gathered.rows.select_columns(["source", "where", "id"])
    left = sorted(reasons)
    for row, place in zip(left, places.select(left), strict=True):
        head, brace, rest = reasons[row].partition("{")
        kept, _, end = rest.partition("}")
        told = f"{head}{places[int(kept)]['where']}{end}" if brace else head
        yield {**place, "reason": told}


def _tally(reasons: Mapping[int, str]) -> dict[str, int]:
    """Rows by reason, copies together."""
    found: dict[str, int] = {}
    for reason in reasons.values():
        head, brace, rest = reason.partition(" of {")
        told = head + rest.partition("}")[2] if brace else reason
        found[told] = found.get(told, 0) + 1
    return found


def _note(work: Path, line: Mapping[str, str]) -> None:
    with (work / DROPPED).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def table(manifest: Mapping[str, Any]) -> Table:
    """A line for each split, and what was left out."""
    shown = Table("split", "samples", "by type", "by source")
    for name, one in manifest["splits"].items():
        by = [", ".join(f"{k} {v:,}" for k, v in one[key].items()) for key in ("type", "source")]
        shown.add_row(name, f"{one['samples']:,}", *by)
    left = [f"{count:,} {reason}" for reason, count in manifest["left_out"].items()]
    left += [
        f"{one['problems']:,} bad rows of {one['path']}"
        for one in manifest["sources"]
        if one["problems"]
    ]
    shown.caption = f"left out: {'; '.join(left)}" if left else None
    return shown
