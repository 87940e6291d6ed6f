"""Every benchmark on rows in its published layout: what it asks, wants, and says is missing."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from psa_vlm.errors import DataError
from psa_vlm.evaluation.judges import rubric_named
from psa_vlm.evaluation.tasks import BENCHMARKS, benchmark_named
from psa_vlm.evaluation.tasks.base import Wanted

from .. import layouts
from ..files import in_base64, write_images, write_rows


@dataclass
class Case:
    """A set as it lies on disk, and what its requests ask for."""

    name: str
    files: dict[str, Any]
    images: tuple[str, ...]
    wanted: list[tuple[str, str, str, str | None]]
    """Words, expectation, group, rubric."""


ASKED = "Which?\nA. a cup\nB. a cat\nAnswer with the letter of the option."
SCENARIOS = ("01-Illegal_Activitiy", "10-Legal_Opinion")
MADE = ("SD", "SD_TYPO", "TYPO")
"""Of MM-SafetyBench."""

CASES = [
    Case(
        "rtvlm",
        {
            "data/Captcha/captcha.jsonl": [layouts.CAPTCHA],
            "data/Politics/politics.jsonl": [{"id": 1, "instruction": "Who wins?"}],
        },
        ("data/Captcha/img/3.png", "data/Politics/img/1.png"),
        [
            ("Read it.", "refuse", "captcha", "rtvlm captcha"),
            ("Who wins?", "rating", "politics", "rtvlm politics"),
        ],
    ),
    Case(
        "risk-sets",
        {
            "politics.jsonl": [
                {
                    "safe_type": kind,
                    "safe_level": level,
                    "image": "1.png",
                    "conversations": [{"from": "USER", "value": "<image>\nWhat is this?"}],
                }
                for kind, level in ((0, 3), (6, 0))
            ]
        },
        ("1.png",),
        [
            ("What is this?", "rating", "politics", "risk politics"),
            ("What is this?", "answer", "politics", "harmless"),
        ],
    ),
    Case(
        "vlguard",
        {
            "test.json": layouts.VLGUARD,
            "train.json": [],
        },
        ("test/bad_ads/a.png", "test/b.png"),
        [
            ("Read the card.", "refuse", "unsafe image", "attack"),
            ("What is it?", "answer", "safe image, safe request", "harmless"),
            ("How do I spoil it?", "refuse", "safe image, unsafe request", "attack"),
        ],
    ),
    Case(
        "mm-safetybench",
        {f"processed_questions/{name}.json": {"0": layouts.MM_SAFETY} for name in SCENARIOS},
        tuple(f"imgs/{name}/{made}/0.jpg" for name in SCENARIOS for made in MADE),
        [
            (words, *rest)
            for rest in (
                ("refuse", "01-Illegal_Activitiy", "attack"),
                ("care", "10-Legal_Opinion", "advice"),
            )
            for words in ("On the scene?", "On the words?", "On the words?")
        ],
    ),
    Case(
        "mossbench",
        {"information.csv": [layouts.MOSSBENCH]},
        ("images/1.png",),
        [("May I?", "answer", "type 1", "harmless")],
    ),
    Case(
        "siuo",
        {"siuo_gen.json": [layouts.SIUO | {"category": "morality"}]},
        ("images/1.png",),
        [("Good?", "care", "morality", "siuo")],
    ),
    Case(
        "vlsbench",
        {"data.json": [layouts.VLSBENCH]},
        ("imgs/0.png",),
        [("Go.", "care", "Privacy", "vlsbench")],
    ),
    Case(
        "holisafe",
        {
            "holisafe_bench.json": [
                layouts.HOLISAFE | {"id": 1, "type": "SSU"},
                layouts.HOLISAFE | {"type": "SSS"},
            ]
        },
        ("images/h/1.png",),
        [
            ("What now?", "refuse", "SSU", "attack"),
            ("What now?", "answer", "SSS", "harmless"),
        ],
    ),
    Case(
        "jailbreakv",
        {"JailBreakV_28K.csv": [layouts.JAILBREAKV | {"jailbreak_query": "A request."}]},
        ("llm/1.png",),
        [("A request.", "refuse", "Template", "attack")],
    ),
    Case("mme", {"MME.tsv": [layouts.MME]}, (), [("Two?", "target", "count", None)]),
    Case(
        "mmbench",
        {"MMBench_DEV_EN.tsv": [layouts.CHOICE]},
        (),
        [(ASKED, "target", "c", None)],
    ),
    Case("seedbench", {"SEEDBench.tsv": [layouts.CHOICE]}, (), [(ASKED, "target", "c", None)]),
]


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest, tmp_path: Path) -> Case:
    found: Case = request.param
    for name, rows in found.files.items():
        write_rows(tmp_path / name, rows)
    write_images(tmp_path, *found.images)
    return found


def told(samples: list[Any]) -> list[tuple[str, str, str, str | None]]:
    return [
        (s.input[0].text, s.metadata["expects"], s.metadata["group"], s.metadata["rubric"])
        for s in samples
    ]


def test_a_published_layout_becomes_requests(case: Case, tmp_path: Path) -> None:
    samples = BENCHMARKS[case.name].read(tmp_path)
    assert told(samples) == case.wanted
    assert len({one.id for one in samples}) == len(samples)
    for one in samples:
        [image] = [part for part in one.input[0].content if part.type == "image"]
        assert Path(image.image).is_file() or image.image.startswith("data:image/png;base64,")
        assert one.metadata["where"].startswith(str(tmp_path))
        if one.metadata["rubric"]:
            assert rubric_named(one.metadata["rubric"])


def test_what_is_missing_is_named_with_where_to_ask(case: Case, tmp_path: Path) -> None:
    for name in case.files:
        (tmp_path / name).unlink()
    benchmark = BENCHMARKS[case.name]
    with pytest.raises(DataError, match=r"holds no .*you get it from") as caught:
        benchmark.read(tmp_path)
    assert benchmark.ask in str(caught.value) and benchmark.needs[0][0] in str(caught.value)
    with pytest.raises(DataError, match="give its folder with --data"):
        benchmark.read(None)


def test_figstep_as_published(tmp_path: Path) -> None:
    write_rows(tmp_path / "data/question/safebench.csv", [layouts.FIGSTEP])
    with pytest.raises(DataError, match=r"holds no data/images/SafeBench\*"):
        benchmark_named("figstep").read(tmp_path)
    write_images(tmp_path, layouts.FIGSTEP_IMAGE)
    [sample] = benchmark_named("figstep").read(tmp_path)
    assert sample.metadata is not None and sample.metadata["expects"] == "refuse"
    assert sample.metadata["group"] == "Privacy Violation" and sample.target == ""


def test_pope_as_published(tmp_path: Path) -> None:
    """JSON lines in a file called .json; the groups are its three files."""
    for kind in ("random", "popular"):
        line = {"question_id": 1, "image": "1.png", "text": "Is there a cup?", "label": "yes"}
        (tmp_path / f"coco_pope_{kind}.json").write_text(json.dumps(line) + "\n")
    write_images(tmp_path, "1.png")
    samples = benchmark_named("pope").read(tmp_path)
    asked = "Is there a cup?\nAnswer yes or no."
    assert told(samples) == [
        (asked, "target", "coco_pope_popular", None),
        (asked, "target", "coco_pope_random", None),
    ]
    assert {(one.target, one.metadata["form"]) for one in samples if one.metadata} == {
        ("yes", "yes-no")
    }


def test_questions_about_one_image_are_known_to_be_so(tmp_path: Path) -> None:
    rows = [layouts.MME | {"index": i, "image": in_base64(v)} for i, v in enumerate((1, 1, 2))]
    write_rows(tmp_path / "MME.tsv", rows)
    found = [one.metadata["picture"] for one in benchmark_named("mme").read(tmp_path)]  # type: ignore[index]
    assert found[0] == found[1] != found[2]


def test_a_rubric_that_is_missing_is_known_before_anything_runs(tmp_path: Path) -> None:
    write_rows(tmp_path / "information.csv", [layouts.MOSSBENCH])
    write_images(tmp_path, layouts.MOSSBENCH["image_path"])
    own = replace(BENCHMARKS["mossbench"], wanted=lambda _: Wanted("rating", "g", "weather"))
    with pytest.raises(DataError, match="no rubric for 'weather'"):
        own.read(tmp_path)


def test_every_benchmark_of_the_list_is_there() -> None:
    assert set(BENCHMARKS) == {
        *("rtvlm", "risk-sets", "vlguard", "figstep", "mm-safetybench", "mossbench", "siuo"),
        *("vlsbench", "holisafe", "jailbreakv", "pope", "mme", "mmbench", "seedbench"),
    }
    with pytest.raises(DataError, match="'mmee' is unknown; known: testbed, rtvlm"):
        benchmark_named("mmee")
