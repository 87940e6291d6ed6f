"""`evaluate --task` and `compare` from the command line."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from psa_vlm import cli

pytestmark = [  # of Inspect's own
    pytest.mark.usefixtures("inspecting"),
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


def test_a_benchmark_then_a_comparison(
    run_dir: Path,
    figstep: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def psa(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["psa-vlm", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        caught = capsys.readouterr()
        return code, caught.out, caught.err

    asked = ("evaluate", "--task", "figstep", "--model", run_dir, "--logs", tmp_path)
    code, _, problem = psa(*asked)
    assert code == 2 and "give its folder with --data" in problem and "github.com" in problem
    code, out, _ = psa(*asked, "--data", figstep, "--limit", 2, "--json")
    told = json.loads(out)
    assert code == 0 and (told["task"], told["requests"], told["failed"]) == ("figstep", 2, 0)
    assert {one["judge"] for one in told["figures"]} == {"phrases", "rules"}

    page = tmp_path / "page.html"
    code, out, _ = psa("compare", tmp_path, tmp_path, "--out", page, "--json")
    assert code == 0 and {one["p"] for one in json.loads(out)["differences"]} == {1.0}
    assert "side by side" in page.read_text("utf-8")
    code, _, problem = psa("evaluate", "--judge", "rules", "--model", run_dir)
    assert code == 2 and "--judge is for --task" in problem
