"""Exports as others use them: what goes along, plain transformers, its server, and the Hub."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from psa_vlm.data.contamination import Fingerprints
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import CheckpointError, ConfigError
from psa_vlm.inference import PsaVlm
from psa_vlm.model.checkpoint import fingerprint
from psa_vlm.sharing.export import export_run, push


@pytest.fixture(scope="module")
def run(aligned_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of a LoRA and a calibration, with records."""
    folder = Path(shutil.copytree(aligned_run, tmp_path_factory.mktemp("export") / "run"))
    Fingerprints.of([Sample("s", (), (Turn("user", "Hi"),))]).save(folder)
    for name in ("training.json", "README.md", "calibration.html", "notes.json"):
        (folder / name).write_text(name)
    return folder


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    out = run.with_name("exported")
    export_run(run, out)
    return out


def test_records_go_along_and_nothing_else_does(run: Path, exported: Path) -> None:
    inside = exported / "psa"
    assert (inside / "training.json").read_text() == "training.json"
    assert (inside / "calibration.json").read_bytes() == (run / "calibration.json").read_bytes()
    for name in ("calibration.html", "README.md", "notes.json"):
        assert not (inside / name).exists()
    assert "aligned with psa-vlm" in (exported / "README.md").read_text()
    assert fingerprint(exported) == fingerprint(inside) != fingerprint(run)
    again = exported.with_name("again")
    export_run(exported, again)
    assert sorted(path.name for path in (again / "psa").iterdir()) == sorted(
        path.name for path in inside.iterdir()
    )


def test_nothing_is_loaded_for_a_folder_that_exists(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="exists already"):
        export_run(tmp_path / "no-run", tmp_path)
    with pytest.raises(CheckpointError, match="not a psa-vlm run"):
        export_run(tmp_path / "no-run", tmp_path / "out")


# --- without psa-vlm -----------------------------------------------------------------------------

ASKED = "What is this?"


@pytest.fixture(scope="module")
def answer(run: Path, picture: Path) -> str:
    """What psa-vlm says where its policy does not step in."""
    model = PsaVlm.from_pretrained(run, calibrated=False)
    policy = model.policy.model_copy(update={"off": model.taxonomy.risk_types})
    reply = model.reply(picture, ASKED, policy, max_new_tokens=8)
    assert reply.decision.action == "allow" and reply.text
    return reply.text


def test_the_pipeline_of_its_card(exported: Path, picture: Path, answer: str) -> None:
    from transformers import pipeline

    ask: Any = pipeline("image-text-to-text", model=str(exported))
    image = {"type": "image", "path": str(picture)}
    said = ask(
        text=[{"role": "user", "content": [image, {"type": "text", "text": ASKED}]}],
        max_new_tokens=8,
        return_full_text=False,
    )
    assert said[0]["generated_text"].strip() == answer


@pytest.fixture(scope="module")
def address(exported: Path, transformers_serve: Any) -> Iterator[str]:
    """Where `transformers serve` serves the export."""
    with transformers_serve(exported) as address:
        yield address


def test_transformers_serve_answers_with_it(
    exported: Path, address: str, picture: Path, answer: str
) -> None:
    url = f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"
    content = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": ASKED},
    ]
    with httpx2.Client() as client:
        reply = client.post(
            f"{address}/v1/chat/completions",
            json={
                "model": str(exported),
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 8,
                "temperature": 0,
            },
            timeout=60,
        )
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"].strip() == answer


# --- the Hub -------------------------------------------------------------------------------------


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, dict[str, Any]]]:
    """What is asked of the Hub, in its place."""
    calls: list[tuple[str, str, dict[str, Any]]] = []

    class Stub:
        def __init__(self, **told: Any) -> None:
            assert told == {"library_name": "psa-vlm"}

        def create_repo(self, repo_id: str, **told: Any) -> None:
            calls.append(("create", repo_id, told))

        def upload_folder(self, repo_id: str, **told: Any) -> Any:
            calls.append(("upload", repo_id, told))
            return SimpleNamespace(commit_url="https://hub/commit/1")

    monkeypatch.setattr("huggingface_hub.HfApi", Stub)
    return calls


def test_a_push_is_one_commit_of_a_private_repository(exported: Path, hub: list[Any]) -> None:
    assert push(exported, "me/mine") == "https://hub/commit/1"
    (create, create_id, created), (upload, upload_id, uploaded) = hub
    assert (create, create_id, created) == (
        "create",
        "me/mine",
        {"private": True, "exist_ok": True},
    )
    assert (upload, upload_id, uploaded["folder_path"]) == ("upload", "me/mine", exported)


def test_only_runs_are_pushed(tmp_path: Path, hub: list[Any]) -> None:
    with pytest.raises(CheckpointError, match="not a psa-vlm run"):
        push(tmp_path, "me/mine")
    assert not hub


@pytest.mark.parametrize("repo", ["me/mine/deep", "me/mine"])
def test_what_the_hub_does_not_take_is_one_line(run: Path, repo: str) -> None:
    """A name that is none, and no network: tests are offline."""
    with pytest.raises(CheckpointError, match=rf"{repo}: can't push .*hf auth login") as caught:
        push(run, repo)
    assert "\n" not in str(caught.value)


def test_a_stopped_export_of_the_command_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("psa_vlm.sharing.export.write_card", full)
    with pytest.raises(CheckpointError, match="free some space"):
        export_run(run, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    monkeypatch.undo()
    export_run(run, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "psa")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llava"
