"""Every published layout: its rows become samples, and a bad row is one line with its place."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from psa_vlm.data.formats import FORMATS, find
from psa_vlm.data.labels import CategoryMap
from psa_vlm.data.readers import read, scan
from psa_vlm.data.sample import Sample
from psa_vlm.errors import ConfigError, DataError, ImageError
from psa_vlm.taxonomy import Taxonomy

from .. import layouts
from ..files import png, write_images, write_rows


@dataclass
class Case:
    """A set as it lies on disk, and what its samples should say."""

    name: str
    file: str
    rows: Any
    images: tuple[str, ...]
    expected: list[tuple[str, str | None, str | None, str | None]]
    """Question, answer, type, level."""


UNSAFE = {"image": {"bytes": png(), "path": None}, "category": "Hate", "source": "s", "text": "t"}

CASES = [
    Case(
        "vlguard",
        "train.json",
        layouts.VLGUARD,
        ("train/bad_ads/a.png", "train/b.png"),
        [
            ("Read the card.", "I would rather not.", "privacy", "high"),
            ("What is it?", "A cake.", "clean", "safe"),
            ("How do I spoil it?", "I won't say.", "illegal_risk", "high"),
        ],
    ),
    Case(
        "rtvlm",
        "data/Captcha/captcha.jsonl",
        [layouts.CAPTCHA],
        ("data/Captcha/img/3.png",),
        [("Read it.", "xyz", "privacy", "medium")],
    ),
    Case(
        "rtvlm",
        "data/Jailbreak/jailbreak.jsonl",
        [{"index": 7, "instruction": "Fill the list.", "refused_to_answer": False}],
        ("data/Jailbreak/img/7.png",),
        [("Fill the list.", None, "illegal_risk", "high")],
    ),
    Case(
        "mm-safetybench",
        "processed_questions/01-Illegal_Activitiy.json",
        {"0": layouts.MM_SAFETY},
        tuple(f"imgs/01-Illegal_Activitiy/{one}/0.jpg" for one in ("SD", "SD_TYPO", "TYPO")),
        [
            ("On the scene?", None, "illegal_risk", "high"),
            ("On the words?", None, "illegal_risk", "high"),
            ("On the words?", None, "illegal_risk", "high"),
        ],
    ),
    Case(
        "mossbench",
        "information.csv",
        [layouts.MOSSBENCH],
        ("images/1.png",),
        [("May I?", None, "clean", "safe")],
    ),
    Case(
        "mossbench",
        "images_information/information.json",
        [{"pid": 1, "question": "May I?", "image_path": "images/1.png", "description": "d"}],
        ("images/1.png",),
        [("May I?", None, "clean", "safe")],
    ),
    Case(
        "spa-vl",
        "data/train.parquet",
        [
            {
                "image": {"bytes": png(), "path": None},
                "question": "Q",
                "chosen": "A",
                "rejected": "B",
            }
        ],
        (),
        [("Q", "A", None, None)],
    ),
    Case(
        "spa-vl",
        "test/harm.parquet",
        [
            {
                "image": {"bytes": png(), "path": None},
                "question": "Q",
                "class1": "Misinformation Harms",
                "class2": "x",
                "class3": "y",
            }
        ],
        (),
        [("Q", None, "misleading", "high")],
    ),
    Case(
        "jailbreakv",
        "JailBreakV_28K.csv",
        [layouts.JAILBREAKV | {"jailbreak_query": "Two\nlines."}],
        ("llm/1.png",),
        [("Two\nlines.", None, "illegal_risk", "high")],
    ),
    Case(
        "siuo",
        "siuo_gen.json",
        [layouts.SIUO | {"category": "controversial topics, politics"}],
        ("images/1.png",),
        [("Good?", "Careful.", "politics", "medium")],
    ),
    Case(
        "vlsbench",
        "data.json",
        [layouts.VLSBENCH],
        ("imgs/0.png",),
        [("Go.", None, "privacy", "high")],
    ),
    Case(
        "holisafe",
        "holisafe_bench.json",
        [layouts.HOLISAFE | {"id": 1, "type": "SSU"}, layouts.HOLISAFE | {"id": 2, "type": "SSS"}],
        ("images/h/1.png",),
        [("What now?", None, "privacy", "high"), ("What now?", None, "clean", "safe")],
    ),
    Case(
        "unsafebench",
        "train.parquet",
        [UNSAFE | {"safety_label": "Unsafe"}, UNSAFE | {"safety_label": "Safe"}],
        (),
        [
            ("What does this image show?", None, "insults_and_bullying", "high"),
            ("What does this image show?", None, "clean", "safe"),
        ],
    ),
    Case(
        "pope",
        "coco_pope_random.json",
        '{"question_id": 1, "image": "1.png", "text": "Is there a cup?", "label": "yes"}\n',
        ("1.png",),
        [("Is there a cup?", "yes", None, None)],
    ),
    Case(
        "mme",
        "MME.tsv",
        [layouts.MME, layouts.MME | {"index": 2, "question": "Three?", "answer": "No"}],
        (),
        [("Two?", "Yes", None, None), ("Three?", "No", None, None)],
    ),
    Case(
        "mmbench",
        "MMBench_DEV_EN.tsv",
        [layouts.CHOICE | {"hint": "Look."}],
        (),
        [
            (
                "Look.\nWhich?\nA. a cup\nB. a cat\nAnswer with the letter of the option.",
                "B",
                None,
                None,
            )
        ],
    ),
]


@pytest.fixture(params=CASES, ids=lambda case: f"{case.name}-{Path(case.file).stem}")
def case(request: pytest.FixtureRequest) -> Case:
    found: Case = request.param
    return found


@pytest.fixture
def folder(case: Case, tmp_path: Path) -> Path:
    if isinstance(case.rows, str):
        (tmp_path / case.file).write_text(case.rows)
    else:
        write_rows(tmp_path / case.file, case.rows)
    write_images(tmp_path, *case.images)
    return tmp_path


def told(samples: list[Sample]) -> list[tuple[str, str | None, str | None, str | None]]:
    return [(one.question, one.answer, one.type, one.level) for one in samples]


def test_a_published_layout_is_recognised_and_read(case: Case, folder: Path) -> None:
    for path in (folder, folder / case.file):
        assert find(path)[0].name == case.name
        samples = read(path)
        assert told(samples) == case.expected
        assert len({one.id for one in samples}) == len(samples)
        assert all(len(one.images) == 1 for one in samples)
        assert all(one.where.startswith(f"{folder / case.file}") for one in samples)


def test_a_row_without_a_key_is_named(case: Case, folder: Path) -> None:
    """Whatever key of the layout is taken away, the error names the row, and the key or the fix."""
    if isinstance(case.rows, str) or case.name == "spa-vl":
        return
    rows = list(case.rows.values()) if isinstance(case.rows, dict) else case.rows
    lost = "question" if "question" in rows[0] else min(FORMATS[case.name].keys)
    needed = {"mm-safetybench": "Rephrased Question", "vlsbench": "instruction"}
    lost = needed.get(case.name, lost)
    bad = [{key: value for key, value in row.items() if key != lost} for row in rows]
    write_rows(folder / case.file, dict(enumerate(bad)) if isinstance(case.rows, dict) else bad)
    with pytest.raises(DataError, match=lost) as caught:
        read(folder / case.file, format=case.name)
    assert str(folder / case.file) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_figstep_as_published(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/question/safebench.csv", [layouts.FIGSTEP])
    write_images(tmp_path, layouts.FIGSTEP_IMAGE)
    [sample] = read(tmp_path)
    assert (sample.type, sample.level) == ("privacy", "high")
    assert sample.tags["drawn"] == "A list." and "list" in sample.question
    [path] = sample.images
    assert isinstance(path, Path) and path.samefile(tmp_path / layouts.FIGSTEP_IMAGE)


def test_every_scenario_of_a_shipped_map_means_something() -> None:
    words = Taxonomy.default()
    for name in FORMATS:
        shipped = CategoryMap.load(name)
        for category in shipped.categories:
            shipped.labels("here", words, category)


# --- what is wrong -------------------------------------------------------------------------------


def vlguard(folder: Path, **changes: Any) -> Path:
    (folder / "a.png").write_bytes(png())
    return write_rows(folder / "train.json", [layouts.VLGUARD[0] | {"image": "a.png"} | changes])


def test_an_unmapped_category_names_itself_and_the_file_to_edit(tmp_path: Path) -> None:
    path = vlguard(tmp_path, harmful_category="weather", harmful_subcategory="hail")
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert message.startswith(f"{path}[0]: category 'weather / hail' / 'weather' is not mapped")
    assert message.endswith("maps/vlguard.yaml")


def test_a_map_of_ones_own_goes_over_the_shipped_one(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    own.write_text("level: low\ncategories: {Weather: politics, privacy / personal_data: clean}\n")
    [weather] = read(vlguard(tmp_path, harmful_category="weather"), categories=own)
    assert (weather.type, weather.level) == ("politics", "low")
    [card] = read(vlguard(tmp_path), categories=own)
    assert (card.type, card.level) == ("clean", "safe")
    [other] = read(vlguard(tmp_path, harmful_category="deception"), categories=own)
    assert (other.type, other.level) == ("misleading", "high")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("categories: [a]", "needs the key categories"),
        ("colour: red", "unknown key 'colour'; known keys: level, prompt, categories"),
        ("categories: {a: privacy}", "a: has no level"),
        ("categories: {a: {kind: b}}", "a: write a type, or"),
        ("categories: {a: b, a: c}", "the key 'a' is given twice"),
    ],
)
def test_a_malformed_map_is_an_error(tmp_path: Path, text: str, message: str) -> None:
    own = tmp_path / "own.yaml"
    own.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read(vlguard(tmp_path), categories=own)
    assert str(own) in str(caught.value)


def test_a_type_outside_the_taxonomy_is_an_error(tmp_path: Path) -> None:
    words = Taxonomy(types=("weapon", "none"), levels=("no_risk", "risk"), clean="none")
    with pytest.raises(DataError, match=r"type 'privacy' is not in the taxonomy.*vlguard\.yaml"):
        read(vlguard(tmp_path), taxonomy=words)


def test_scan_goes_on_behind_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "data.csv"
    path.write_text(
        "jailbreak_query,policy,image_path\n"
        'Hi,Fraud,a.png\n"two\nlines",Fraud,gone.png\ntoo,few\nHi,Weather,a.png\nHi,Bias,a.png\n'
    )
    (tmp_path / "a.png").write_bytes(png())
    good = [item for item in scan(path) if isinstance(item, Sample)]
    bad = [str(item) for item in scan(path) if isinstance(item, Exception)]
    assert [(one.type, one.where) for one in good] == [
        ("illegal_risk", f"{path}:2"),
        ("fairness", f"{path}:7"),
    ]
    assert [one.partition(": ")[0] for one in bad] == [f"{path}:{line}" for line in (3, 5, 6)]
    for problem, words in zip(bad, ("no image file", "2 fields under 3", "'Weather'"), strict=True):
        assert words in problem


@pytest.mark.parametrize("content", ["not base64!", "", base64.b64encode(b"no image").decode()])
def test_a_broken_image_inside_a_file_is_named(tmp_path: Path, content: str) -> None:
    row = {"image": content, "question": "Two?", "answer": "Yes", "category": "count"}
    path = write_rows(tmp_path / "MME.tsv", [row])
    with pytest.raises(ImageError, match=r"MME\.tsv:2: 'image' holds no image that can be read"):
        read(path)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_a_damaged_file_is_one_line(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    path.write_bytes(b"no such thing")
    with pytest.raises(DataError, match=r"data\.\w+: not an? \w+.*damaged"):
        read(path)


def test_an_unknown_layout_says_what_it_has_and_what_is_known(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "data.json", [{"picture": "a.png", "words": "Hi"}])
    with pytest.raises(DataError, match=r"\[0\]: no known layout has these keys: picture, words"):
        read(path)
    with pytest.raises(DataError, match=r"format 'nonsense' is unknown; known: .*vlguard"):
        read(path, format="nonsense")


def test_a_folder_of_several_layouts_is_not_guessed(tmp_path: Path) -> None:
    vlguard(tmp_path)
    row = {"question_id": 1, "image": "a", "text": "t", "label": "no"}
    write_rows(tmp_path / "pope.jsonl", [row])
    with pytest.raises(DataError, match=r"several layouts: .*vlguard \(train\.json\)"):
        read(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no data file"):
        read(tmp_path / "empty")
