"""What docs/serving.md and docs/threat-model.md name is there."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from psa_vlm.serving.limits import Limits
from psa_vlm.serving.metrics import Metrics
from psa_vlm.serving.server import UPSTREAM_KEY

ROOT = Path(__file__).parents[2]
SERVING = (ROOT / "docs" / "serving.md").read_text("utf-8")
THREATS = (ROOT / "docs" / "threat-model.md").read_text("utf-8")


def test_every_limit_and_its_default() -> None:
    table = SERVING.partition("| limit |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| `(\w+)`.*?\| ([\d,]+) \|", table, re.MULTILINE)
    assert {name: int(value.replace(",", "")) for name, value in rows} == asdict(Limits())


def test_every_metric() -> None:
    told = set(re.findall(r"^\| `(psa_\w+)`", SERVING, re.MULTILINE))
    page = Metrics(SimpleNamespace(waiting=0)).page().decode()  # type: ignore[arg-type]
    assert told == set(re.findall(r"^# TYPE (psa_\w+)", page, re.MULTILINE))


def test_the_key_s_variable() -> None:
    assert f"`{UPSTREAM_KEY}`" in SERVING


def test_every_test_that_a_threat_names() -> None:
    code = "".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(?:tests/serving/)?(test_\w+)`", THREATS)
    assert len(named) > 10
    assert [name for name in named if f"def {name}(" not in code] == []
    files = re.findall(r"`(tests/\S+\.py)`", THREATS)
    assert all((ROOT / file).is_file() for file in files) and files
