"""`evaluate --task` and `compare` from the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ..conftest import Psa

pytestmark = [  # of Inspect's own
    pytest.mark.usefixtures("inspecting"),
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


def test_a_benchmark_then_a_comparison(
    psa: Psa, run_dir: Path, figstep: Path, tmp_path: Path
) -> None:
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


def test_without_inspect_each_command_says_what_to_install() -> None:
    program = """
import sys
from psa_vlm.cli import main

sys.modules["inspect_ai"] = None  # importing it fails
for asked in ("compare a b", "ab serve a b", "ab results x", "evaluate --task figstep --model m"):
    sys.argv = ["psa-vlm", *asked.split()]
    try:
        main()
    except SystemExit as ended:
        assert ended.code == 1, (asked, ended.code)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True
    )
    told = "error: inspect_ai is not installed; run: pip install 'psa-vlm[eval]'"
    assert (done.returncode, done.stdout, done.stderr.splitlines()) == (0, "", [told] * 4)
