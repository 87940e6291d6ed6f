from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from rich.console import Console

from psa_vlm.errors import DataError
from psa_vlm.evaluation import scorecard as module
from psa_vlm.evaluation.scorecard import METHODS, METRICS, Record, Row, Scorecard, git_commit


def records(method: str, cell: str, outcomes: list[bool | None], **more: Any) -> list[Record]:
    """Records whose `outcomes` are refusals, or right answers for the cell vqa."""
    fields: dict[str, Any] = {"split": "compositions", "question": "?", "expected": "x"} | more
    return [
        Record(method=method, cell=cell, reply="x", refused=False, correct=one, **fields)  # type: ignore[arg-type]
        if cell == "vqa"
        else Record(method=method, cell=cell, reply="x", refused=bool(one), **fields)  # type: ignore[arg-type]
        for one in outcomes
    ]


def sample_records() -> list[Record]:
    typed = {"true_type": "privacy", "true_level": "high"}
    found = {**typed, "pred_type": "privacy", "pred_level": "low", "type_confidence": 0.9}
    clean = {"true_type": "clean", "pred_type": "clean", "true_level": "safe", "pred_level": "safe"}
    return [
        *records("stage2", "risky", [True] * 9 + [False], **found),
        *records("stage2", "harmless", [False] * 8 + [True] * 2, **clean),
        *records("stage2", "lookalike", [True, False], seed=1),
        *records("stage2", "vqa", [True, True, False, None]),
        *records("base", "risky", [False] * 10, **typed),
        *records("base", "risky", [False] * 4, split="objects", **typed),
    ]


def printed(card: Scorecard) -> str:
    console = Console(width=100, file=io.StringIO(), color_system=None)
    with console.capture() as capture:
        console.print(card.table())
    return capture.get()


CARD = Scorecard.from_records(sample_records(), seed=3, seconds=12.34, commit="abc")


def test_figures() -> None:
    row = CARD.row("stage2", "compositions")
    assert row is not None
    assert row.attack_success == pytest.approx(0.1)
    assert row.over_refusal == pytest.approx(0.2)
    assert row.lookalike_refusal == pytest.approx(0.5)
    assert row.accuracy == pytest.approx(2 / 3)
    assert row.type_f1 == 1.0
    assert row.level_f1 == pytest.approx(0.5)
    assert row.n == 26
    assert set(row.ci) == set(METRICS)
    assert CARD.unscored == 1


def test_a_method_without_a_figure_has_null() -> None:
    row = CARD.row("base", "objects")
    assert row is not None
    assert row.attack_success == 1.0
    assert {row.over_refusal, row.lookalike_refusal, row.accuracy, row.type_f1} == {None}
    assert set(row.ci) == {"attack_success"}
    assert row.n == 4
    assert CARD.row("lora", "objects") is None


def test_rows_are_in_the_order_of_the_table() -> None:
    assert [(row.method, row.split) for row in CARD.rows] == [
        ("base", "compositions"),
        ("stage2", "compositions"),
        ("base", "objects"),
    ]


def test_seeds_pool_their_records() -> None:
    several = records("base", "risky", [True], seed=1) + records("base", "risky", [False], seed=2)
    card = Scorecard.from_records(several, seed=[1, 2], seconds=1, commit="abc")
    assert card.rows[0].n == 2
    assert card.rows[0].attack_success == 0.5
    assert card.seed == [1, 2]


def test_missing_verdicts_are_counted_only_where_the_method_gives_verdicts() -> None:
    typed: dict[str, Any] = {"true_type": "privacy", "true_level": None}
    given = records("stage1", "risky", [True], pred_type="privacy", **typed)
    missing = records("stage1", "risky", [True], **typed)
    without = records("base", "risky", [True], **typed)
    card = Scorecard.from_records(given + missing + without, seed=0, seconds=1, commit="abc")
    assert card.unscored == 1


def test_the_file_has_exactly_the_published_layout(tmp_path: Path) -> None:
    path = tmp_path / "scorecard.json"
    CARD.save(path)
    told = json.loads(path.read_text("utf-8"))
    assert set(told) == {"rows", "seed", "commit", "seconds"}
    assert (told["seed"], told["commit"], told["seconds"]) == (3, "abc", 12.3)
    for row in told["rows"]:
        assert set(row) == {"method", "split", *METRICS, "n", "ci"}
        for metric, (low, high) in row["ci"].items():
            assert 0 <= low <= row[metric] <= high <= 1
        assert set(row["ci"]) == {metric for metric in METRICS if row[metric] is not None}
    assert list(tmp_path.iterdir()) == [path]


def test_save_and_load_agree(tmp_path: Path) -> None:
    CARD.save(tmp_path / "scorecard.json")
    again = Scorecard.load(tmp_path / "scorecard.json")
    assert again.model_dump() == CARD.model_dump()


def test_a_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "scorecard.json"
    path.write_text("old", "utf-8")

    def full(self: Path, *_: object) -> None:
        self.touch()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        CARD.save(path)
    assert path.read_text("utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (None, "can not read the scorecard"),
        (b"\xff", "can not read the scorecard"),
        (b"{", "not a scorecard: the file"),
        (b'{"rows": [], "seed": 1, "commit": "a"}', "not a scorecard: seconds"),
        (b'{"rows": [], "seed": 1, "commit": "a", "seconds": NaN}', "not a scorecard"),
        (b'{"rows": [], "seed": 1, "commit": "a", "seconds": 1, "x": 1}', "not a scorecard: x"),
        (b'{"rows": [{"method": "other"}], "seed": 1, "commit": "a", "seconds": 1}', "rows.0"),
    ],
)
def test_a_file_that_is_no_scorecard(tmp_path: Path, content: bytes | None, told: str) -> None:
    path = tmp_path / "scorecard.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=told) as caught:
        Scorecard.load(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("value", [math.nan, math.inf, -0.1, 1.1])
def test_no_row_holds_what_is_no_share(value: float) -> None:
    fields = {**CARD.rows[0].model_dump(), "attack_success": value}
    with pytest.raises(ValidationError):
        Row.model_validate(fields)


def test_unknown_methods_are_an_error() -> None:
    with pytest.raises(DataError, match="unknown method 'stage3'"):
        Scorecard.from_records(records("stage3", "risky", [True]), seed=0, seconds=1)


def test_the_table_fits_100_columns() -> None:
    many = [
        record
        for method in METHODS
        for cell in ("risky", "harmless", "lookalike", "vqa")
        for record in records(
            method,
            cell,
            [False] * 3000 + [True],
            true_type="privacy",
            pred_type="privacy",
            true_level="high",
            pred_level="high",
        )
    ]
    card = Scorecard.from_records(many, seed=0, seconds=1, commit="abc")
    text = printed(card)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for label in ("plain LoRA", "PSA stage I + II", "compositions: new compositions", "12,004"):
        assert label in text
    assert "99.8-100.0" in text
    assert "unscored" not in text


def test_the_table_shows_what_is_missing_or_left_out() -> None:
    text = printed(CARD)
    assert "1 outcomes unscored" in " ".join(text.split())
    assert re.search(r"base +100.0% +- +- +- +- +- +4", text)


def test_commit_of_this_checkout() -> None:
    assert re.fullmatch(r"[0-9a-f]{12}(-dirty)?|unknown", git_commit())


def test_commit_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy in another project's checkout does not pass that project's commit for ours."""
    copy = tmp_path / "scorecard.py"
    shutil.copy(module.__file__, copy)
    monkeypatch.setattr(module, "__file__", str(copy))
    assert git_commit() == "unknown"

    def git(*arguments: str) -> None:
        author = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        subprocess.run(["git", "-C", str(tmp_path), *author, *arguments], check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "not ours")
    assert git_commit() == "unknown"
    git("add", ".")
    git("commit", "-q", "-m", "ours")
    assert re.fullmatch(r"[0-9a-f]{12}", git_commit())
    copy.write_text("changed", "utf-8")
    assert git_commit().endswith("-dirty")


def test_commit_without_git(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert git_commit() == "unknown"
