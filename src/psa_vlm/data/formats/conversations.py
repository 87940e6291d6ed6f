"""The layouts of PSA-VLM's training file and of LLaVA's instruction data, and our own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from psa_vlm.data.formats.base import Format, Reading
from psa_vlm.data.labels import Labels
from psa_vlm.data.rows import Row
from psa_vlm.data.sample import IMAGE_MARK, Role, Sample, Turn, without_image_marks
from psa_vlm.errors import DataError

_ROLES: dict[str, Role] = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_LABELS = ("safe_type", "safe_level")


def _labelled(row: Row, reading: Reading) -> Iterator[Sample]:
    yield _sample(row, reading, _labels(row, reading))


def _unlabelled(row: Row, reading: Reading) -> Iterator[Sample]:
    yield _sample(row, reading, None)


def _either(row: Row, reading: Reading) -> Iterator[Sample]:
    labelled = any(key in row.values for key in _LABELS)
    yield _sample(row, reading, _labels(row, reading) if labelled else None)


def _labels(row: Row, reading: Reading) -> Labels:
    words = reading.taxonomy
    type_id, level_id = (row.value(key) for key in _LABELS)
    try:
        return words.types[words.type_id(type_id)], words.levels[words.level_id(level_id)]
    except DataError as error:
        raise DataError(f"{row.where}: {error}") from None


def _sample(row: Row, reading: Reading, labels: Labels | None) -> Sample:
    images = _images(row, reading, required=labels is not None)
    type, level = labels or (None, None)
    return Sample(
        id=str(row.values.get("id", f"{row.file.stem}-{row.key}")),
        images=images,
        conversation=_conversation(row, len(images)),
        type=type,
        level=level,
        source=reading.source,
        tags=_tags(row),
    )


def _tags(row: Row) -> dict[str, str]:
    """Free notes on a row, of our own: `"tags": {"region": "EU"}`."""
    tags = row.values.get("tags", {})
    if not isinstance(tags, dict):
        raise DataError(f"{row.where}: 'tags' must be an object of names and words")
    return {str(name): str(value) for name, value in tags.items()}


def _images(row: Row, reading: Reading, required: bool) -> tuple[Path, ...]:
    value = row.value("image") if required else row.values.get("image")
    if value is None and not required:
        return ()
    names = value if isinstance(value, list) else [value]
    if not names or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"{row.where}: 'image' must be a file name or a list of them")
    root = reading.images_dir or row.file.parent
    return tuple(root / str(name) for name in names)


def _conversation(row: Row, image_count: int) -> tuple[Turn, ...]:
    """The turns, without image marks: images stand before the text they belong to."""
    where = row.where
    entries = row.value("conversations")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{where}: 'conversations' must be a list of turns")
    turns, marks = [], 0
    for entry in entries:
        if not isinstance(entry, dict):
            raise DataError(f"{where}: a turn must be an object with 'from' and 'value'")
        turn = Row(where, entry, row.file, row.key)
        speaker, text = turn.value("from"), turn.value("value")
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


def _prepared(row: Row, reading: Reading) -> Iterator[Sample]:
    """What `psa-vlm data prepare` wrote; paths are relative to the folder of all splits."""
    root = reading.images_dir or row.file.parent.parent
    yield Sample(
        id=row.text("id"),
        images=tuple(root / name for name in row.value("images")),
        conversation=tuple(Turn(one["role"], one["text"]) for one in row.value("conversation")),
        type=row.value("type"),
        level=row.value("level"),
        source=row.value("source"),
        split=row.file.parent.name,
        tags=json.loads(row.value("tags")),
    )


PSA = Format("psa", "PSA-VLM's training file", _labelled)
LLAVA = Format("llava", "LLaVA's instruction data", _unlabelled)
CONVERSATIONS = Format(
    "conversations", "PSA-VLM's or LLaVA's layout", _either, frozenset({"conversations"})
)
PREPARED = Format(
    "prepared",
    "a split that psa-vlm prepared",
    _prepared,
    frozenset({"images", "conversation", "pixels", "looks"}),
    ("*.arrow",),
)
