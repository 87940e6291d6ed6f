"""What a run was made from: base model, data and configuration of each stage, as far as is known.

A run keeps it as `provenance.json`, for its model card and for the runs that go on from it:
    base     hub id or name of the folder, and the licence that its own card states
    stages   of each stage of training its number, data and configuration
    note     in words, what else is known of it, or that nothing is
What is not known is null.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from psa_vlm.data.formats import find, format_named
from psa_vlm.data.formats.conversations import PREPARED
from psa_vlm.data.prepare import MANIFEST
from psa_vlm.data.readers import source_name
from psa_vlm.data.sample import Sample
from psa_vlm.model.checkpoint import home, read_manifest

FILE = "provenance.json"
RECORD = "training.json"
"""In a run folder: the configuration and the data that it was made with."""
HISTORY = "history.json"
"""In a run folder: the loss curve of each part that was trained."""
NOT_KNOWN = "What it was trained on is not known."
TERMS = ("license", "license_name", "license_link")
"""What of a base model's card is carried over."""

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def of_base(place: str) -> dict[str, Any]:
    """What is known of a base model.

    Args:
        place: folder or hub id.
    """
    folder = Path(place)
    known: dict[str, Any] = {"id": None, "folder": None, **dict.fromkeys(TERMS)}
    if place and folder.is_dir():
        return known | {"folder": folder.resolve().name} | _terms(folder)
    return known | {"id": place if _HUB_ID.fullmatch(place) else None}


def _terms(folder: Path) -> dict[str, Any]:
    from huggingface_hub import metadata_load

    try:
        data = metadata_load(folder / "README.md") or {}
    except (OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: data.get(key) for key in TERMS}


def of_data(samples: Sequence[Sample], files: Iterable[tuple[Path, str | None]]) -> dict[str, Any]:
    """Counts by label and source, and layout and licence of each source.

    Args:
        samples: what was trained on.
        files: path and layout (None: guessed) of the files that they were read from.
    """
    known: dict[str, dict[str, str | None]] = {}
    for path, format in files:
        known |= _sets(path, format)
    sources = Counter(sample.source for sample in samples)
    unknown = {"layout": None, "licence": None}
    return {
        "samples": len(samples),
        "type": Counter(sample.type or "unlabelled" for sample in samples),
        "level": Counter(sample.level or "unlabelled" for sample in samples),
        "sources": [
            {"name": name or None, "samples": count, **known.get(name, unknown)}
            for name, count in sorted(sources.items())
        ],
    }


def _sets(path: Path, format: str | None) -> dict[str, dict[str, str | None]]:
    """Layout and licence of the sets in a file, by the name that their samples carry."""
    found, _ = find(path, format_named(format) if format else None)
    if found is not PREPARED:
        return {source_name(path): {"layout": found.title, "licence": found.licence}}
    try:
        manifest = json.loads((path.resolve().parent / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return {
        one["name"]: {"layout": format_named(one["format"]).title, "licence": one["licence"]}
        for one in manifest["sources"]
    }


def load(run: Path) -> dict[str, Any]:
    """What a run folder, exported or not, says of itself.

    Raises:
        CheckpointError: it is not a run.
    """
    base = read_manifest(run)["base"]
    try:
        found: dict[str, Any] = json.loads((home(run) / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = {"base": of_base(base or ""), "stages": [], "note": NOT_KNOWN}
    return found


def save(run: Path, known: dict[str, Any]) -> None:
    """Write it into a run folder."""
    text = json.dumps(known, indent=1, ensure_ascii=False)
    (run / FILE).write_text(text + "\n", encoding="utf-8")
