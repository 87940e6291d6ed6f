"""`psa-vlm experiment`: the right module is run, and asked for what it needs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

from psa_vlm import cli
from psa_vlm.experiments import EXPERIMENTS
from psa_vlm.experiments.page import Page

Psa = Callable[..., tuple[int, str]]


@pytest.fixture()
def psa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Psa:
    """Runs `psa-vlm experiment` with made-up experiments; gives the exit code and stderr."""

    def trains(out: Path, scale: str, seed: int, seeds: int | None = None) -> Page:
        return Page("trains", f"{scale} {seed} {seeds}", [])

    def reads(out: Path, scale: str, seed: int, run: Path) -> Page:
        return Page("reads", str(run), [])

    def cuts(
        out: Path, scale: str, seed: int, run: Path, base: Path, tag: str | None = None
    ) -> Page:
        return Page("cuts", f"{base} by {tag}", [])

    for function in (trains, reads, cuts):
        module = ModuleType(function.__name__)
        module.run = function  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, function.__name__, module)
        monkeypatch.setitem(EXPERIMENTS, function.__name__, function.__name__)

    def run(*arguments: object) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["psa-vlm", "experiment", *map(str, arguments)])
        try:
            cli.main()
        except SystemExit as stop:
            return int(stop.code or 0), capsys.readouterr().err
        return 0, ""

    return run


def result(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "result.json").read_text("utf-8"))
    return found


def test_an_experiment_is_told_scale_and_seed(psa: Psa, tmp_path: Path) -> None:
    assert psa("trains", "--scale", "full", "--seed", 7, "--out", tmp_path)[0] == 0
    assert result(tmp_path)["question"] == "full 7 None"
    assert result(tmp_path)["command"] == "psa-vlm experiment trains --scale full --seed 7"
    assert psa("trains", "--seeds", 3, "--out", tmp_path)[0] == 0
    assert result(tmp_path)["question"] == "small 0 3"
    assert result(tmp_path)["command"] == (
        "psa-vlm experiment trains --seeds 3 --scale small --seed 0"
    )


def test_an_experiment_that_reads_a_run_is_given_it(psa: Psa, tmp_path: Path) -> None:
    assert psa("reads", "--run", "my runs/--trained", "--out", tmp_path)[0] == 0
    assert result(tmp_path)["question"] == "my runs/--trained"
    assert "reads --run 'my runs/--trained' --scale small" in str(result(tmp_path)["command"])


def test_an_experiment_is_given_the_options_that_it_has(psa: Psa, tmp_path: Path) -> None:
    arguments = ("--run", "runs/x", "--base", "moved", "--tag", "region", "--out", tmp_path)
    assert psa("cuts", *arguments)[0] == 0
    assert result(tmp_path)["question"] == "moved by region"
    assert result(tmp_path)["command"] == (
        "psa-vlm experiment cuts --run runs/x --base moved --tag region --scale small --seed 0"
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nonsense"], "no experiment 'nonsense'; there are: "),
        (["reads"], "the experiment reads reads a run: name one with --run"),
        (["trains", "--run", "x"], "leave --run out"),
        (["reads", "--run", "x", "--tag", "y"], "the experiment reads has no --tag"),
        (["reads", "--run", "x", "--seeds", "2"], "the experiment reads has no --seeds"),
    ],
)
def test_what_is_wrong_is_one_line(
    psa: Psa, tmp_path: Path, arguments: list[str], words: str
) -> None:
    code, problem = psa(*arguments, "--out", tmp_path)
    assert code == 2 and words in problem and len(problem.splitlines()) == 1
