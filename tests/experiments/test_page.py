"""The page of an experiment: the same figures for people, for Markdown and for programs."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from psa_vlm.evaluation import figures
from psa_vlm.evaluation.scorers import wilson
from psa_vlm.experiments.page import Change, Page, Table, told, write_page

SHARE = wilson([True] * 3 + [False])
assert SHARE is not None
PAGE = Page(
    "What <b>x</b> does",
    "Does x help?",
    [
        Table("By [x]", ["x", "refused", "type F1", "n"], [["a | b", SHARE, SHARE, 1200]]),
        ("Plain words", ["what", "share"], [["y", "75.0%"], ["z", None]]),
    ],
    [("Refused by x", figures.shares({"x": [(1.0, SHARE)]}, "x"))],
    ["x is [better]."],
)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "new"
    write_page(folder, PAGE, "psa-vlm experiment x --seed 3", 3, time.monotonic() - 61)
    return folder


def test_a_figure_is_told_with_its_interval() -> None:
    assert told(SHARE) == "75.0% (30.1-95.4)"
    assert told(SHARE, "type F1") == "0.750 (0.30-0.95)"
    change = Change(-0.25, -0.5, 0.0, 4)
    assert told(change) == "-25.0 (-50.0 to +0.0)" and not change.clear
    assert Change(0.1, 0.05, 0.2, 9).clear
    assert [told(cell) for cell in ("as it is", 1200, 0.16667, None)] == [
        *("as it is", "1,200", "0.1667", "-")
    ]


def test_the_json_keeps_numbers_and_says_what_made_them(out: Path) -> None:
    result = json.loads((out / "result.json").read_text("utf-8"))
    assert (result["command"], result["seed"]) == ("psa-vlm experiment x --seed 3", 3)
    assert result["commit"] and result["machine"] and result["seconds"] >= 61
    (row,) = result["tables"][0]["rows"]
    assert row["refused"]["value"] == 0.75 and row["refused"]["n"] == 4 and row["n"] == 1200


def test_the_markdown_can_be_pasted(out: Path) -> None:
    text = (out / "tables.md").read_text("utf-8")
    assert "**By [x]**\n\n| x | refused | type F1 | n |\n|---|---|---|---|\n" in text
    assert "| a \\| b | 75.0% (30.1-95.4) | 0.750 (0.30-0.95) | 1,200 |" in text
    assert text.endswith("\n\n- x is [better].\n")


def test_the_page_is_whole_and_takes_words_as_words(out: Path) -> None:
    page = (out / "page.html").read_text("utf-8")
    assert 'src="http' not in page and "What &lt;b&gt;x&lt;/b&gt; does" in page
    charts = re.search(r'<script id="charts" type="application/json">(.*?)</script>', page)
    assert charts is not None and list(json.loads(charts[1])) == ["plot-0"]
    assert '<div id="plot-0">' in page and "1 min" in page


def test_the_terminal_shows_every_table_and_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_page(tmp_path, PAGE, "x", 0, time.monotonic())
    shown = capsys.readouterr().out
    for words in ("By [x]", "Plain words", "75.0%", "30.1-95.4", "- x is [better]."):
        assert words in shown
