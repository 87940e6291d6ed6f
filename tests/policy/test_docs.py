"""Every example of docs/policy.md does what it says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from psa_vlm.policy import Policy
from psa_vlm.policy.files import shipped_names
from psa_vlm.taxonomy import Taxonomy

from ..conftest import Psa

PAGE = (Path(__file__).parents[2] / "docs" / "policy.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(autouse=True)
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The page's policies, each under the name in its first line."""
    monkeypatch.chdir(tmp_path)
    paths = []
    for text in blocks("yaml"):
        path = tmp_path / text.splitlines()[0].removeprefix("# ")
        path.write_text(text, "utf-8")
        paths.append(path)
    return paths


def test_every_policy_can_be_used(files: list[Path]) -> None:
    assert len(files) == 4
    for path in files:
        Policy.from_yaml(path).check(Taxonomy.default())


def commands() -> list[str]:
    return [line for text in blocks("sh") for line in text.splitlines()]


@pytest.mark.parametrize("line", commands())
def test_every_command_ends_as_it_says(line: str, psa: Psa) -> None:
    command, _, comment = line.partition("#")
    _, *arguments = command.split()
    assert psa(*arguments).code == int(comment.rpartition(" ")[2] or 0)


@pytest.mark.parametrize("code", blocks("python"))
def test_every_program_runs(code: str) -> None:
    exec(compile(code, "docs/policy.md", "exec"), {})


def test_every_shipped_policy_is_told_of() -> None:
    names = ["default", "strict", "research", "kids", "captcha-allowed"]
    assert sorted(names) == list(shipped_names())
    table = PAGE.partition("## Start from a shipped policy")[2].partition("```")[0]
    assert re.findall(r"^\| `(.+?)`", table, re.MULTILINE) == names
