from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from psa_vlm.data.inspection import inspect


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A set with a row of each kind of fault, from line 4 on."""
    for value, name in enumerate(("a.png", "b.png")):
        Image.new("L", (8, 8), 200 * value).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes(b"no image")
    rows = [
        ("Fraud", "a.png", "One?"),
        ("Bias", "b.png", "Two?"),
        ("Bias", "a.png", "Two?"),
        ("Bias", "b.png", "two"),
        ("Bias", "gone.png", "Four?"),
        ("Bias", "broken.png", "Five?"),
        ("Weather", "a.png", "Six?"),
    ]
    path = tmp_path / "data.jsonl"
    lines = [
        json.dumps({"policy": policy, "image_path": image, "jailbreak_query": text})
        for policy, image, text in rows
    ]
    path.write_text("\n".join([*lines, "{broken"]))
    return path


def test_everything_wrong_is_listed_with_file_and_line(data: Path) -> None:
    found = inspect(data)
    told = [
        (4, f"duplicate of {data}:2"),
        (5, "gone.png"),
        (6, "broken.png: not an image"),
        (7, "category 'Weather' is not mapped to a risk type; add it to"),
        (8, "not valid JSON"),
    ]
    assert len(found.problems) == len(told)
    for problem, (line, words) in zip(found.problems, told, strict=True):
        assert problem.startswith(f"{data}:{line}: ")
        assert words in problem


def test_counts_and_samples(data: Path) -> None:
    found = inspect(data).to_dict()
    assert (found["format"], found["samples"], found["images"]) == ("jailbreakv", 4, 2)
    assert found["labels"] == [
        {"type": "fairness", "level": "high", "samples": 3},
        {"type": "illegal_risk", "level": "high", "samples": 1},
    ]
    assert found["categories"] == {"Bias": 3, "Fraud": 1}
    assert [one["id"] for one in found["shown"]] == ["data-0", "data-1", "data-2"]
    assert json.loads(json.dumps(found)) == found


def test_the_view_names_what_was_counted(data: Path) -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(inspect(data).view())
    text = console.export_text()
    for words in ("jailbreakv (JailBreakV-28K)", "MIT", "2 different ones", "Fraud", "One?"):
        assert words in text
