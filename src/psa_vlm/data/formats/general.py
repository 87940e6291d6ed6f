"""Layouts of sets that measure general ability."""

from __future__ import annotations

from collections.abc import Iterator

from psa_vlm.data.formats.base import Format, Reading, picture
from psa_vlm.data.rows import Row
from psa_vlm.data.sample import Sample

_OPTIONS = "ABCD"


def _pope(row: Row, reading: Reading) -> Iterator[Sample]:
    image = reading.image(row, row.text("image"))
    yield reading.sample(row, image, row.text("text"), row.text("label"))


def _mme(row: Row, reading: Reading) -> Iterator[Sample]:
    category = row.text("category")
    yield reading.sample(
        row, picture(row), row.text("question"), row.text("answer"), category=category
    )


def _choices(row: Row, reading: Reading) -> Iterator[Sample]:
    """A hint, the question, and an option a line; the answer is a letter, if it is published."""
    options = {key: str(row.value(key) or "").strip() for key in _OPTIONS}
    lines = [str(row.values.get("hint") or "").strip(), row.text("question")]
    lines += [f"{key}. {text}" for key, text in options.items() if text]
    lines.append("Answer with the letter of the option.")
    answer = str(row.values.get("answer") or "").strip() or None
    yield reading.sample(
        row,
        picture(row),
        "\n".join(filter(None, lines)),
        answer,
        category=row.values.get("category"),
    )


GENERAL = (
    Format("pope", "POPE", _pope, frozenset({"question_id", "image", "text", "label"})),
    Format("mme", "MME", _mme, frozenset({"image", "question", "answer", "category"})),
    Format(
        "mmbench",
        "MMBench or SEED-Bench",
        _choices,
        frozenset({"image", "question", "A", "B", "C", "D"}),
    ),
)
