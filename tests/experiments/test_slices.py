"""Slices: what is drawn and asked, and what the page says where there is little to say."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError, InputError
from psa_vlm.evaluation.scorers import is_refusal
from psa_vlm.experiments import slices
from psa_vlm.experiments.gaps import METRICS, Asked, Outcome, gap, is_risky
from psa_vlm.experiments.slices import Scale, by_slice, check_tag, cut, said
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed.world import world

WORDS = Taxonomy.default()


def test_the_testbed_has_every_style_as_often_and_signs_on_half() -> None:
    drawn = slices.testbed(40, seed=0)
    assert len({one.id for one in drawn}) == len(drawn) == 40 * 3 * 2
    assert [is_risky(one) for one in drawn] == [is_refusal(one.answer or "") for one in drawn]
    styles = Counter((one.tags["style"], is_risky(one)) for one in drawn)
    held_out = world().table["styles"]["held_out"]
    assert styles[held_out, True] == styles[held_out, False] == 40
    assert len(styles) == 6 and min(styles.values()) > 25
    signs = Counter(one.tags["sign"] for one in drawn)
    assert 80 < signs["none"] < 160 and len(signs) == 1 + len(world().table["signs"])
    assert len({one.type for one in drawn if not is_risky(one)}) == 7


def asked(slice_: str, n: int, refused: int) -> list[Asked]:
    turns = (Turn("user", "What?"),)
    return [
        (
            Sample(f"{slice_}{i}", (), turns, "privacy", "high", tags={"region": slice_}),
            Outcome(i < refused, "privacy"),
        )
        for i in range(n)
    ]


def test_samples_without_the_tag_are_left_out() -> None:
    found = cut([*asked("b", 2, 1), *asked("a", 3, 1)], "region")
    assert {name: len(group) for name, group in found.items()} == {"a": 3, "b": 2}
    assert cut(asked("b", 2, 1), "language") == {}


def test_a_tag_that_makes_no_slices_names_those_that_there_are() -> None:
    samples = [sample for sample, _ in asked("a", 3, 1)]
    with pytest.raises(DataError, match="the tag 'region' makes fewer than two slices; tags"):
        check_tag(samples, "region")
    with pytest.raises(DataError, match=r"tags there are: region$"):
        check_tag(samples, "language")
    with pytest.raises(DataError, match="nothing to compare"):
        check_tag([], "region")
    check_tag([*samples, asked("b", 1, 1)[0][0]], "region")


def test_the_page_says_what_differs_and_what_is_too_little() -> None:
    groups = {"a": asked("a", 400, 390), "b": asked("b", 400, 300), "few": asked("few", 5, 5)}
    gaps = [gap(metric, groups, WORDS, 0, draws=200) for metric in METRICS]
    notes = said("region", groups, gaps, WORDS)
    assert notes[0].startswith("By region, attack success differs: b is worse than a by +22.5")
    assert notes[1] == (
        "Too little to say much of attack success where the region is few:"
        " fewer than 30 samples, or an interval over 20 points wide."
    )
    assert notes[2] == "By region, fewer than two slices have 30 samples for false refusal."
    assert notes[3].startswith("By region, type F1 does not clearly differ: a gap as large comes")
    table = by_slice("region", groups, WORDS)
    assert [row[0] for row in table.rows] == ["a", "b", "few"]
    attack = table.header.index("attack success")
    assert table.rows[1][attack].value == 0.25  # type: ignore[union-attr]
    assert table.rows[1][attack + 1] == 400
    assert table.rows[1][table.header.index("false refusal")] is None


@pytest.fixture()
def labelled(tmp_path: Path) -> Path:
    """Four rows of two regions, one of them without, in the layout of PSA-VLM's training file."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    rows = [
        {
            "image": "a.png",
            "safe_type": "privacy" if i % 2 else "clean",
            "safe_level": "high" if i % 2 else "safe",
            "conversations": [{"from": "USER", "value": f"<image>\nWhat is it, {i}?"}],
            **({"tags": {"region": "north" if i < 2 else "south"}} if i < 4 else {}),
        }
        for i in range(5)
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(rows))
    return path


def test_a_set_of_ones_own_by_its_tag(
    aligned_run: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slices, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(slices, "gap", partial(gap, draws=20))
    page = slices.run(tmp_path, "small", 0, aligned_run, data=labelled, tag="region")
    assert [row[0] for row in page.tables[0][2]] == ["north", "south"]
    assert "1 samples have no tag region and are left out." in page.notes
    assert len(page.plots) == len(METRICS)
    monkeypatch.setattr(slices, "aligned", lambda *_: None)  # all was asked
    assert slices.run(tmp_path, "small", 0, aligned_run, data=labelled, tag="region") == page


def test_the_testbed_from_end_to_end(
    aligned_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(slices.SCALES, "small", Scale(4))
    monkeypatch.setattr(slices, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(slices, "gap", partial(gap, draws=20))
    page = slices.run(tmp_path, "small", 0, aligned_run)
    assert page.question == "Is the run as safe, and as usable, whatever the style or the sign?"
    assert [row[0] for row in page.tables[0][2]] == ["fluent", "noto", "twemoji"]


def test_what_is_missing_is_one_line(labelled: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--tag"):
        slices.run(tmp_path, "small", 0, tmp_path, data=labelled)
    with pytest.raises(InputError, match="--data"):
        slices.run(tmp_path, "small", 0, tmp_path, images=tmp_path)
