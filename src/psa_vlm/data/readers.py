"""Readers of published data sets: a JSON list or JSONL file in, `Sample`s out.

Every error names the place: `file:line` in JSONL, `file[index]` in a JSON list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from psa_vlm.data.sample import IMAGE_MARK, Role, Sample, Turn, without_image_marks
from psa_vlm.errors import DataError, ImageError
from psa_vlm.taxonomy import Taxonomy

Row = Mapping[str, Any]

_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_LABELS = ("safe_type", "safe_level")


def read_psa(
    path: str | Path,
    images_dir: str | Path | None = None,
    taxonomy: Taxonomy | None = None,
    check_images: bool = True,
) -> list[Sample]:
    """Read the layout of PSA-VLM's training file.

    A row holds `safe_type` and `safe_level` (label ids), `image` and `conversations`
    (`[{"from": "USER" | "ASSISTANT", "value": text}]`).

    Args:
        path: a JSON list or JSONL file.
        images_dir: what image paths are relative to; the file's own folder by default.
        taxonomy: what label ids mean; the paper's by default.
        check_images: make sure that every image file exists.

    Raises:
        DataError: the file or a row is malformed, or a label is outside the taxonomy.
        ImageError: an image file is missing.
    """
    labels = _labels_of(taxonomy)
    return _read(path, images_dir, check_images, lambda row, where: labels(row, where))


def read_llava(
    path: str | Path, images_dir: str | Path | None = None, check_images: bool = True
) -> list[Sample]:
    """Read LLaVA's instruction layout: `id`, `image` (optional) and `conversations`.

    Arguments and errors are those of `read_psa`; the samples carry no labels.
    """
    return _read(path, images_dir, check_images, lambda row, where: None)


def read(
    path: str | Path,
    images_dir: str | Path | None = None,
    taxonomy: Taxonomy | None = None,
    check_images: bool = True,
) -> list[Sample]:
    """Read either layout, also mixed: a row with a label is PSA-VLM's, any other LLaVA's.

    Arguments and errors are those of `read_psa`.
    """
    labels = _labels_of(taxonomy)
    return _read(
        path,
        images_dir,
        check_images,
        lambda row, where: labels(row, where) if any(key in row for key in _LABELS) else None,
    )


Labels = tuple[str, str]
"""(type, level) by name."""


def _labels_of(taxonomy: Taxonomy | None) -> Callable[[Row, str], Labels]:
    words = taxonomy or Taxonomy.default()

    def labels(row: Row, where: str) -> Labels:
        type_id, level_id = (_value(row, key, where) for key in _LABELS)
        try:
            return words.types[words.type_id(type_id)], words.levels[words.level_id(level_id)]
        except DataError as error:
            raise DataError(f"{where}: {error}") from None

    return labels


def _read(
    path: str | Path,
    images_dir: str | Path | None,
    check_images: bool,
    labels_of: Callable[[Row, str], Labels | None],
) -> list[Sample]:
    path = Path(path)
    root = path.parent if images_dir is None else Path(images_dir)
    samples = []
    for index, (where, row) in enumerate(_rows(path)):
        labels = labels_of(row, where)
        images = _images(row, root, where, required=labels is not None)
        for image in images if check_images else ():
            if not image.is_file():
                raise ImageError(f"{where}: no image file {image}; is images_dir right?")
        type, level = labels or (None, None)
        samples.append(
            Sample(
                id=str(row.get("id", f"{path.stem}-{index}")),
                images=images,
                conversation=_conversation(row, len(images), where),
                type=type,
                level=level,
                source=path.stem,
            )
        )
    return samples


def _rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Each row with the words for its place."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise DataError(f"{path}: not UTF-8 text") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None
    if text.lstrip().startswith("["):
        parsed = [(f"{path}[{i}]", row) for i, row in enumerate(_json(text, str(path)))]
    else:
        parsed = [
            (f"{path}:{number}", _json(line, f"{path}:{number}"))
            for number, line in enumerate(text.split("\n"), start=1)
            if line.strip()
        ]
    if not parsed:
        raise DataError(f"{path}: holds no rows")
    for where, row in parsed:
        if not isinstance(row, dict):
            raise DataError(f"{where}: a row must be a JSON object, not {row!r:.40}")
        yield where, row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(
            f"{where}: not valid JSON ({line}column {error.colno}: {error.msg})"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: not valid JSON (nested too deeply)") from None


def _value(row: Row, key: str, where: str) -> Any:
    if key not in row:
        raise DataError(f"{where}: missing key {key!r}")
    return row[key]


def _images(row: Row, root: Path, where: str, required: bool) -> tuple[Path, ...]:
    value = _value(row, "image", where) if required else row.get("image")
    if value is None and not required:
        return ()
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{where}: 'image' must be a file name or a list of them")
    return tuple(root / str(name) for name in names)


def _conversation(row: Row, image_count: int, where: str) -> tuple[Turn, ...]:
    """The turns, without image marks: images stand before the text they belong to."""
    entries = _value(row, "conversations", where)
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: 'conversations' must be a list of turns")
    turns, marks = [], 0
    for entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{where}: a turn must be an object with 'from' and 'value'")
        speaker, text = _value(entry, "from", where), _value(entry, "value", where)
        role = _ROLES.get(str(speaker).lower())
        if role is None:
            raise DataError(f"{where}: unknown speaker {speaker!r}; valid: {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise DataError(f"{where}: a turn's 'value' must be text")
        if role == "user":
            marks += text.count(IMAGE_MARK)
            text = without_image_marks(text)
        turns.append(Turn(role, text))
    if marks > image_count:
        raise DataError(f"{where}: {marks} {IMAGE_MARK} marks, but {image_count} in 'image'")
    if not any(turn.role == "user" and turn.text for turn in turns):
        raise DataError(f"{where}: the conversation needs a user turn with text")
    return tuple(turns)
