from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from psa_vlm.data.readers import read, read_llava, read_psa
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError, ImageError
from psa_vlm.taxonomy import Taxonomy

Write = Callable[..., Path]


def psa_row(**changes: Any) -> dict[str, Any]:
    row = {
        "safe_type": 4,
        "image": "card.png",
        "safe_level": 2,
        "conversations": [
            {"from": "USER", "value": "<image>\nWhat does the card say?"},
            {"from": "ASSISTANT", "value": "I should not read it out."},
        ],
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


def llava_row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": 17,
        "image": "cat.png",
        "conversations": [
            {"from": "human", "value": "What is it?\n<image>"},
            {"from": "gpt", "value": "A cat."},
        ],
    }
    return {key: value for key, value in {**row, **changes}.items() if value is not ...}


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes rows as `data.jsonl` or `data.json` beside the images that they name."""
    for name in ("card.png", "cat.png"):
        (tmp_path / name).write_bytes(b"any file will do")

    def write(*rows: object, suffix: str = ".jsonl") -> Path:
        path = tmp_path / f"data{suffix}"
        lines = "\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows)
        path.write_text(lines if suffix == ".jsonl" else json.dumps(list(rows), indent=2))
        return path

    return write


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_the_authors_layout(write: Write, tmp_path: Path, suffix: str) -> None:
    [sample] = read_psa(write(psa_row(), suffix=suffix))
    assert sample == Sample(
        id="data-0",
        images=(tmp_path / "card.png",),
        conversation=(
            Turn("user", "What does the card say?"),
            Turn("assistant", "I should not read it out."),
        ),
        type="privacy",
        level="medium",
        source="data",
    )


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_llavas_layout(write: Write, tmp_path: Path, suffix: str) -> None:
    text_only = llava_row(image=..., conversations=[{"from": "human", "value": "Hi"}])
    picture, words = read_llava(write(llava_row(), text_only, suffix=suffix))
    assert (picture.id, picture.images) == ("17", (tmp_path / "cat.png",))
    assert (picture.question, picture.answer) == ("What is it?", "A cat.")
    assert (picture.type, picture.level) == (None, None)
    assert (words.images, words.question, words.answer) == ((), "Hi", None)


@pytest.mark.parametrize("rows", [(psa_row(), llava_row()), (llava_row(), psa_row())])
def test_read_keeps_every_label_of_a_mixed_file(write: Write, rows: tuple[object, ...]) -> None:
    labels = {(sample.type, sample.level) for sample in read(write(*rows))}
    assert labels == {("privacy", "medium"), (None, None)}


def test_read_does_not_take_half_a_label_for_none(write: Write) -> None:
    with pytest.raises(DataError, match=r"data\.jsonl:1: missing key 'safe_type'"):
        read(write(psa_row(safe_type=...)))


def test_labels_mean_what_the_taxonomy_says(write: Write) -> None:
    taxonomy = Taxonomy(types=("weapon", "none"), levels=("no_risk", "risk"), clean="none")
    [sample] = read(write(psa_row(safe_type=0, safe_level=1)), taxonomy=taxonomy)
    assert (sample.type, sample.level) == ("weapon", "risk")


def test_several_images_and_another_folder(write: Write, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for name in ("1.png", "2.png"):
        (folder / name).write_bytes(b"any file will do")
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich one?"}]
    path = write(llava_row(image=["1.png", "2.png"], conversations=turns))
    [sample] = read(path, images_dir=folder)
    assert sample.images == (folder / "1.png", folder / "2.png")
    assert sample.question == "Which one?"


def test_blank_lines_and_a_byte_order_mark_are_no_rows(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = json.dumps(llava_row(image=..., conversations=[{"from": "human", "value": "Hi"}]))
    path.write_text(f"\n{row}\r\n\n{row}\n", encoding="utf-8-sig")
    assert len(read(path)) == 2


def test_a_unicode_line_separator_inside_a_text_does_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    row = llava_row(image=..., conversations=[{"from": "human", "value": "a\u2028b"}])
    path.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    assert read(path)[0].question == "a\u2028b"


def test_a_broken_line_is_named_by_its_number(write: Write) -> None:
    path = write(psa_row(), "", '{"safe_type": 1, ')
    with pytest.raises(DataError, match=r"data\.jsonl:3: not valid JSON \(column \d+: Expecting"):
        read(path)


def test_a_broken_list_is_named_by_line_and_column(tmp_path: Path) -> None:
    path = tmp_path / "data.json"
    path.write_text('[\n  {"id": 1,\n')
    with pytest.raises(DataError, match=r"data\.json: not valid JSON \(line 3, column 1: "):
        read(path)


def test_a_bad_row_of_a_list_is_named_by_its_index(write: Write) -> None:
    path = write(psa_row(), psa_row(safe_level=9), suffix=".json")
    with pytest.raises(DataError, match=r"data\.json\[1\]: level 9 is not in the taxonomy; valid"):
        read(path)


def turns(*entries: object) -> dict[str, Any]:
    return psa_row(conversations=list(entries))


SAY = {"from": "USER", "value": "Hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (psa_row(safe_type=7), "type 7 is not in the taxonomy; valid: 0 politics"),
        (psa_row(safe_type=-1), "type -1 is not in the taxonomy"),
        (psa_row(safe_type="porn"), "type 'porn' is not in the taxonomy"),
        (psa_row(safe_type=None), "type None is not in the taxonomy"),
        (psa_row(safe_level=True), "level True is not in the taxonomy"),
        (psa_row(safe_type=...), "missing key 'safe_type'"),
        (psa_row(safe_level=...), "missing key 'safe_level'"),
        (psa_row(image=...), "missing key 'image'"),
        (psa_row(image=""), "'image' must be a file name or a list of them"),
        (psa_row(image=None), "'image' must be a file name or a list of them"),
        (psa_row(image=[]), "'image' must be a file name or a list of them"),
        (psa_row(image=["card.png", 3]), "'image' must be a file name or a list of them"),
        (psa_row(conversations=...), "missing key 'conversations'"),
        (psa_row(conversations=[]), "'conversations' must be a list of turns"),
        (psa_row(conversations="Hi"), "'conversations' must be a list of turns"),
        (turns("Hi"), "a turn must be an object with 'from' and 'value'"),
        (turns({"value": "Hi"}), "missing key 'from'"),
        (turns({"from": "USER"}), "missing key 'value'"),
        (turns({"from": "USER", "value": None}), "a turn's 'value' must be text"),
        (turns(SAY, {"from": "tool", "value": "x"}), "unknown speaker 'tool'; valid: user, human"),
        (turns({"from": "USER", "value": "<image>\n "}), "needs a user turn with text"),
        (turns({"from": "ASSISTANT", "value": "Hi"}), "needs a user turn with text"),
        (turns({"from": "USER", "value": "<image><image> Hi"}), "2 <image> marks, but 1 in"),
        (["no", "object"], "a row must be a JSON object, not ['no', 'object']"),
        ("[1, 2", "not valid JSON"),
    ],
)
def test_a_bad_row_is_one_line_that_names_it(write: Write, row: object, message: str) -> None:
    with pytest.raises(DataError) as caught:
        read_psa(write(psa_row(), row))
    assert "data.jsonl:2: " in str(caught.value)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_image_is_an_error_unless_nobody_asked(write: Write, tmp_path: Path) -> None:
    path = write(psa_row(image="gone.png"))
    with pytest.raises(ImageError, match=r"data\.jsonl:1: no image file .*gone\.png"):
        read(path)
    assert read(path, check_images=False)[0].images == (tmp_path / "gone.png",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no rows"),
        (b"[]", "holds no rows"),
        (b"\xff\xfe\x00", "not UTF-8 text"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_a_file_without_rows_is_an_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(path)


def test_a_missing_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read \(No such file"):
        read(tmp_path / "none.jsonl")


def test_rows_may_carry_tags_of_ones_own(write: Write) -> None:
    [tagged, plain] = read_psa(write(psa_row(tags={"region": "EU", "year": 2026}), psa_row()))
    assert (tagged.tags, plain.tags) == ({"region": "EU", "year": "2026"}, {})
    with pytest.raises(DataError, match=r"data\.jsonl:1: 'tags' must be an object"):
        read_psa(write(psa_row(tags="EU")))
