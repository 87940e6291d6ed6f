"""The suite end to end at a size that shows that everything is wired."""

from __future__ import annotations

import io
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from psa_vlm import cli
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError
from psa_vlm.inference import PsaVlm
from psa_vlm.robustness import suite, trials
from psa_vlm.robustness.results import Results
from psa_vlm.robustness.trials import Cases, Plan
from psa_vlm.testbed.cases import write_samples

TINY = Plan(2, 1, 1, 1, 2, False, 4)


@pytest.fixture(scope="module")
def out(run_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("attack")
    with pytest.MonkeyPatch.context() as patch:
        small(patch)
        attack(patch, run_dir, "--surrogate", run_dir, "--out", folder)
    return folder


def small(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(trials.PLANS, "small", TINY)
    patch.setattr(trials, "STRENGTHS", (1, 5))
    patch.setattr(trials, "CORRUPTIONS", {"fog": None, "pixelate": None})
    patch.setattr(trials, "REWRITES", {"capitals": None, "role play": None})
    patch.setattr(trials, "EPS", (4, 8))
    patch.setattr("psa_vlm.robustness.outcomes.MAX_NEW_TOKENS", 2)


def attack(patch: pytest.MonkeyPatch, *arguments: object) -> None:
    patch.setattr(sys, "argv", ["psa-vlm", "attack", *map(str, arguments)])
    try:
        cli.main()
    except SystemExit as stop:
        assert not stop.code


def test_every_attack_has_its_rates(out: Path, run_dir: Path) -> None:
    found = json.loads((out / "attack.json").read_text())
    rates = {(one["attack"], one["setting"], one["goal"]): one for one in found["rates"]}
    assert {attack for attack, _, _ in rates} == {
        *("none", "text", "typographic", "handling", "corruption", "patch"),
        *("Square on the head", "APGD on the head", "false alarm", "transfer", "adaptive"),
    }
    for name in ("fog 1", "fog 5"):
        assert ("corruption", name, "miss") in rates and ("corruption", name, "alarm") in rates
    for weight in ("0", "0.25", "0.5", "0.75", "1"):
        assert ("adaptive", f"eps 8/255, weight {weight}", "miss") in rates
    assert ("adaptive", "eps 4/255, weight 0.5", "miss") in rates
    for one in found["rates"]:
        assert one["n"] == (1 if one["attack"] == "adaptive" else 2)
        share = one["success"]
        assert share["low"] <= share["value"] <= share["high"]
        assert one["answered"] is not None
    pooled = [one for one in found["summary"] if one["setting"] == "fog"]
    assert [one["n"] for one in pooled] == [4, 4]
    assert found["judge"] == "refusal phrases and exact match" and found["notes"] == []
    assert found["certificate"]["draws"] == 4
    assert found["run"] == str(run_dir)


def test_the_report_is_one_page(out: Path) -> None:
    page = (out / "attack.html").read_text(encoding="utf-8")
    for words in ("adaptive", "no certificate of the run", "Square on the head", "by-eps"):
        assert words in page
    assert 'src="http' not in page


def test_the_tables_fit_80_columns(out: Path) -> None:
    """Nothing is cut off, and a goal that nothing was tried for has no table."""
    results = Results.model_validate_json((out / "attack.json").read_text())
    whole = [
        replace(rate, setting="jpeg_compression") if rate.attack == "corruption" else rate
        for rate in results.summary
    ]
    missed = [rate for rate in whole if rate.goal == "miss"]
    for summary, alarms in ((whole, True), (missed, False)):
        told = io.StringIO()
        Console(width=80, file=told).print(results.model_copy(update={"summary": summary}).table())
        shown = told.getvalue()
        assert "\u2026" not in shown and "compression " in shown and "risky requests" in shown
        assert ("harmless requests" in shown) == alarms


def test_a_stopped_suite_goes_on(
    out: Path, run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    again = tmp_path / "again"
    shutil.copytree(out, again)
    (folder,) = (again / "trials").iterdir()
    gone = sorted(folder.iterdir())[0]
    before = gone.read_text()
    gone.unlink()
    calls: list[str] = []
    ask = suite.Suite._samples
    monkeypatch.setattr(
        suite.Suite, "_samples", lambda self, goal: calls.append(goal) or ask(self, goal)
    )
    small(monkeypatch)
    attack(monkeypatch, run_dir, "--surrogate", run_dir, "--out", again)
    assert gone.read_text() == before
    first, second = (json.loads((one / "attack.json").read_text()) for one in (out, again))
    assert first["rates"] == second["rates"]


def test_own_data_is_judged_by_the_head(
    run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small(monkeypatch)
    data = write_samples(tmp_path / "scenes", 8, 0)
    attack(monkeypatch, run_dir, "--data", data, "--policy", "strict", "--out", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "attack.json").read_text())
    assert found["judge"] == "the decision of the head" and found["policy"] == "strict"
    assert all(one["answered"] is None for one in found["rates"])
    assert any("--surrogate" in note for note in found["notes"])
    assert any("adaptive" in note and "harmful" in note for note in found["notes"])
    assert "adaptive" not in {one["attack"] for one in found["rates"]}


def test_data_without_risk_is_an_error(run_dir: Path, picture: Path) -> None:
    model = PsaVlm.from_pretrained(run_dir)
    fine = Sample("one", (picture,), (Turn("user", "hello"),), type="clean", level="safe")
    with pytest.raises(DataError, match="above safe"):
        Cases.of_labelled([fine], model, "mine")
