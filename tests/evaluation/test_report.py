from __future__ import annotations

import base64
import io
import json
import math
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from psa_vlm.errors import DataError, MissingExtra
from psa_vlm.evaluation.report import Curve, Example, Reliability, finding, write_report
from psa_vlm.evaluation.scorecard import METRICS, Record, Row, Scorecard
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.taxonomy import Taxonomy

TAXONOMY = Taxonomy.default()
EVIL = "</script><script>alert('x')</script><img src=x onerror=alert(1)>\"'&{{ 7 * 7 }}"


def image_verdict() -> ImageVerdict:
    types = dict.fromkeys(TAXONOMY.types, 0.05) | {"privacy": 0.7}
    levels = {"safe": 0.1, "low": 0.2, "medium": 0.1, "high": 0.6}
    return ImageVerdict(types, levels, np.array([[0.0, 0.5], [0.25, 0.0]]))


EXAMPLE = Example(
    image=Image.new("RGB", (40, 20), (10, 200, 30)),
    question="What is the number?",
    before="It is 427.",
    after="Sorry, I can not help with this because it involves privacy.",
    verdict=Verdict.from_probs([image_verdict()], TAXONOMY),
    decision_action="hint",
    decision_rule="*.high",
    hint="Safe Hint: mind it.",
    expected="Sorry, I can not help with this because it involves privacy.",
)


def row(method: str, attack: float | None, harmless: float = 0.01, **more: Any) -> Row:
    values = {"attack_success": attack, "over_refusal": harmless, "lookalike_refusal": 0.02}
    values |= {"accuracy": 0.95, "type_f1": None, "level_f1": None} | more
    ci = {
        name: (max(0, value - 0.01), min(1, value + 0.01))
        for name, value in values.items()
        if value is not None and name in METRICS
    }
    return Row.model_validate(
        {"method": method, "split": "compositions", "n": 1000, "ci": ci} | values
    )


def card(*rows: Row) -> Scorecard:
    return Scorecard(rows=list(rows), seed=7, commit="abc123", seconds=3723.0)


CARD = card(row("base", 0.97), row("lora", 0.03, lookalike_refusal=0.2), row("stage2", 0.008))


class Page(HTMLParser):
    """The tags, the visible text and the scripts of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.source = text
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.scripts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data + " "

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())

    @property
    def charts(self) -> dict[str, Any]:
        """The charts' JSON; a NaN in it is an error."""

        def refuse(constant: str) -> None:
            raise AssertionError(constant)

        charts: dict[str, Any] = json.loads(self.scripts[1], parse_constant=refuse)
        return charts


def written(
    path: Path,
    scorecard: Scorecard = CARD,
    examples: tuple[Example, ...] = (EXAMPLE,),
    curves: tuple[Curve, ...] = (),
    reliability: Reliability | None = None,
    **more: Any,
) -> Page:
    write_report(path / "report.html", scorecard, examples, curves, reliability, **more)
    return Page((path / "report.html").read_text("utf-8"))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Page:
    return written(
        tmp_path_factory.mktemp("report"),
        curves=(Curve("stage I: loss", [1, 2, 3], [2.0, math.nan, 0.5]),),
        reliability=Reliability([0.95, 0.85, 0.85], [True, True, False]),
        command="psa-vlm demo --seed 7",
    )


def test_the_page_is_whole_and_needs_no_network(page: Page) -> None:
    assert page.open == []
    assert not page.all("link") and not page.all("iframe")
    assert all("src" not in script for script in page.all("script"))
    assert all((image["src"] or "").startswith("data:image/png") for image in page.all("img"))
    assert "@import" not in page.source and "url(" not in page.source.split("<script>")[0]
    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    assert policy is not None and "default-src 'none'" in policy


def test_plotly_is_in_the_page_once(page: Page) -> None:
    assert len(page.scripts) == 3
    assert page.source.count("plotly.js v") == 1
    assert len(page.scripts[0]) > 1_000_000


def test_every_chart_has_its_place(page: Page) -> None:
    places = {one["id"] for one in page.all("div") if "id" in one}
    assert set(page.charts) == places
    assert places == {
        *(f"bars-{name}" for name in ("attack_success", "over_refusal", "lookalike_refusal")),
        "curve-0",
        "reliability",
    }


def test_every_colour_of_a_chart_is_a_variable_of_the_page(page: Page) -> None:
    used = set(re.findall(r'color": "(--\w+)"', json.dumps(page.charts)))
    style = page.source.split("</style>")[0]
    assert used
    for name in used:
        assert len(re.findall(rf"{name}: #", style)) == 2, name  # light and dark


def test_bars_carry_the_intervals(page: Page) -> None:
    base = page.charts["bars-attack_success"]["data"][0]
    assert (base["name"], base["x"], base["y"]) == ("base", ["compositions"], [0.97])
    assert base["error_y"]["array"] == pytest.approx([0.01])
    assert base["error_y"]["arrayminus"] == pytest.approx([0.01])


def test_what_is_not_finite_is_a_gap(page: Page) -> None:
    assert page.charts["curve-0"]["data"][0]["y"] == [2.0, None, 0.5]


def test_reliability_shows_accuracy_and_counts(page: Page) -> None:
    accuracy, _, counts = page.charts["reliability"]["data"]
    assert accuracy["x"] == pytest.approx([0.85, 0.95])
    assert accuracy["y"] == [0.5, 1.0]
    assert counts["y"] == [2, 1]
    assert "Expected calibration error: 0.250" in page.words


def test_the_table_has_every_figure(page: Page) -> None:
    for text in ("97.0%", "96.0-98.0", "0.8%", "95.0%", "1,000", "plain LoRA", "compositions"):
        assert text in page.words


def test_an_example_shows_all_of_it(page: Page) -> None:
    for text in (
        EXAMPLE.question,
        "base · answered",
        EXAMPLE.before,
        "PSA · refused",
        EXAMPLE.after,
        "hint by the rule *.high",
        "Safe Hint: mind it.",
        "insults and bullying",
        "privacy 70%",
        "high 60%",
    ):
        assert text in page.words
    top = re.findall(r'<div class="bar top"><span>([^<]+)', page.source)
    assert top == ["privacy", "high"]
    assert [one["class"] for one in page.all("div") if "reply " in (one.get("class") or "")] == [
        "reply bad",
        "reply good",
    ]


def test_the_heat_map_lies_over_the_picture(page: Page) -> None:
    def opened(uri: str | None) -> Image.Image:
        return Image.open(io.BytesIO(base64.b64decode((uri or "").split(",")[1])))

    picture, under, heat = (opened(one["src"]) for one in page.all("img"))
    assert picture.size == under.size == heat.size == (40, 20)
    assert picture.getpixel((3, 3)) == (10, 200, 30)
    alpha = np.asarray(heat)[..., 3]
    assert alpha[2, 37] > 200  # the 0.5 at the top right is the most there is
    assert 60 < alpha[17, 2] < alpha[2, 37]
    assert alpha[2, 2] == 0


def test_the_footer_says_how_to_get_it_again(page: Page) -> None:
    footer = " ".join(page.text.split("command")[-1].split())
    for text in ("psa-vlm demo --seed 7", "seed 7", "abc123", "1 h 2 min 3 s", "refusal phrases"):
        assert text in footer


def test_all_text_is_data(tmp_path: Path) -> None:
    example = Example(
        image=EXAMPLE.image,
        question=EVIL,
        before=EVIL,
        after=EVIL,
        verdict=Verdict.failed(EVIL),
        decision_action=EVIL,
        decision_rule=EVIL,
        hint=EVIL,
        expected=EVIL,
    )
    page = written(
        tmp_path,
        card(row("base", 0.9), row("stage1", 0.1)).model_copy(update={"commit": EVIL}),
        (example,),
        (Curve(EVIL, [1], [1.0]),),
        command=EVIL,
    )
    assert len(page.scripts) == 3
    assert all("onerror" not in one for one in page.all("img"))
    assert page.text.count(EVIL) == 11
    assert not page.all("img")[0].get("onerror")


def test_a_dict_an_image_verdict_and_a_verdict_look_the_same(tmp_path: Path) -> None:
    verdict = Verdict.from_probs([image_verdict()], TAXONOMY)
    pages = [
        written(tmp_path, examples=(replace(EXAMPLE, verdict=one),)).source
        for one in (verdict, verdict.images[0], json.loads(json.dumps(verdict.to_dict())))
    ]
    assert pages[0] == pages[1] == pages[2]


def test_the_image_that_decided_is_shown(tmp_path: Path) -> None:
    clean = ImageVerdict(
        {one: float(one == "clean") for one in TAXONOMY.types},
        {one: float(one == "safe") for one in TAXONOMY.levels},
    )
    verdict = Verdict.from_probs([clean, image_verdict()], TAXONOMY)
    assert "privacy 70%" in written(tmp_path, examples=(replace(EXAMPLE, verdict=verdict),)).words


@pytest.mark.parametrize("image", [Image.new("L", (5, 900)), Image.new("RGBA", (900, 5))])
def test_odd_pictures_and_flat_evidence(tmp_path: Path, image: Image.Image) -> None:
    verdict = replace(image_verdict(), evidence=np.zeros((3, 5)))
    page = written(tmp_path, examples=(replace(EXAMPLE, image=image, verdict=verdict),))
    assert len(page.all("img")) == 3


def test_an_empty_run_is_a_page_too(tmp_path: Path) -> None:
    page = written(tmp_path, card(), (), (), Reliability([], []))
    assert "PSA was not scored in this run." in page.words
    assert "Before and after" not in page.words
    assert "Training" not in page.words
    assert "confidence" not in page.words


def test_a_curve_with_a_step_too_few(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="curve loss: 1 steps for 2 values"):
        written(tmp_path, curves=(Curve("loss", [1], [1.0, 2.0]),))
    assert list(tmp_path.iterdir()) == []


def test_without_plotly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(MissingExtra, match=r"psa-vlm\[eval\]"):
        written(tmp_path)


def test_the_finding_when_it_works() -> None:
    told = finding(CARD)
    assert told["title"] == (
        "The base model answered 97% of risky requests. With PSA stage I + II it answers 0.8%."
    )
    assert told["sentences"] == [
        "This is on new compositions, 1,000 requests for each method.",
        "Refusal of harmless requests (1% to 1%), refusal of harmless look-alikes (2% to 2%) and "
        "general accuracy (95% to 95%) did not clearly change.",
        "Plain LoRA on the same data answers 3% of risky requests and refuses 20% of harmless "
        "look-alikes.",
    ]
    assert told["tiles"][0] == {"label": "attack success", "before": "97%", "after": "0.8%"}


def test_the_finding_does_not_flatter() -> None:
    told = finding(card(row("base", 0.5), row("stage2", 0.495, 0.3, accuracy=0.6)))
    assert told["title"] == (
        "PSA stage I + II did not clearly lower the attack success: 50% before, 49.5% after."
    )
    assert "General accuracy (95% to 60%) fell." in told["sentences"]
    assert "Refusal of harmless requests (1% to 30%) rose." in told["sentences"]


def test_the_finding_without_a_base_or_with_stage_one_alone() -> None:
    assert finding(card(row("stage1", 0.04)))["title"] == (
        "With PSA stage I the model answers 4% of risky requests."
    )
    assert finding(card(row("base", 0.9)))["title"] == "PSA was not scored in this run."
    both = card(row("base", 0.9), row("stage1", 0.05))
    assert "With PSA stage I it answers 5%" in finding(both)["title"]


def test_reliability_takes_what_is_scored() -> None:
    record = Record("stage2", "style", "risky", "?", None, "x", True)
    seen = replace(record, true_type="privacy", pred_type="privacy", type_confidence=0.9)
    records = [record, seen, replace(seen, pred_type="clean"), replace(seen, true_type=None)]
    assert Reliability.from_records(records) == Reliability([0.9, 0.9], [True, False])
