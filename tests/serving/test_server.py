"""From settings to a server: what is refused at the start, and a real one with a real client."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx2
import pytest

from psa_vlm.errors import AuditError, ConfigError, PolicyError, PsaVlmError
from psa_vlm.serving.keys import Keys, hash_key, new_key
from psa_vlm.serving.server import Settings, build, open_audit

from .conftest import served_by_command


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "example.com"])
def test_without_keys_only_a_loopback_is_served(host: str) -> None:
    with pytest.raises(ConfigError, match="without a key"):
        Settings(Path("run"), host=host)
    assert Settings(Path("run"), host=host, keys=Path("keys.yaml")).host == host


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"limits": ("images=0",)}, ConfigError),
        ({"keys": Path("missing.yaml")}, ConfigError),
        ({"policy": "missing.yaml"}, PolicyError),
        ({"audit": "sqlite:////no/such/folder/audit.db"}, AuditError),
    ],
)
def test_a_mistake_in_the_settings_shows_at_the_start(
    run_dir: Path, tmp_path: Path, changes: dict[str, Any], error: type[PsaVlmError]
) -> None:
    settings = {"model": run_dir, "audit": str(tmp_path / "audit.db"), **changes}
    with pytest.raises(error):
        build(Settings(**settings))


def test_a_calibrated_run_is_watched_for_drift(aligned_run: Path, tmp_path: Path) -> None:
    """With fewer risky requests than the calibration had, the limits are others."""
    audit = str(tmp_path / "audit.db")
    limits = []
    for share in (None, 0.02):
        settings = Settings(aligned_run, audit=audit, risky_share=share)
        service = build(settings).state.service
        service.audit.close()
        limits.append(service.drift.limit)
    assert limits[0] != limits[1]


def test_a_log_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "audit.db"
    with pytest.raises(AuditError, match="no such audit log"), open_audit(str(path), existing=True):
        pass
    assert not path.exists()


def test_the_command_serves_reloads_and_finishes_what_it_took(
    run_dir: Path, tmp_path: Path, make_url: Any
) -> None:
    log, keys, policy = (tmp_path / name for name in ("audit.db", "keys.yaml", "policy.yaml"))
    allowed = (
        'name: house\ninherits: default\nrules: {"*": {low: allow, medium: allow, high: allow}}'
    )
    policy.write_text(allowed + "\ntenants: {school: {}}\n")
    key = new_key()
    Keys({"school": [hash_key(key)]}).save(keys)
    command = ("--model", run_dir, "--policy", policy, "--keys", keys, "--audit", log)
    with served_by_command(*command) as (server, address):
        content = [
            {"type": "image_url", "image_url": {"url": make_url()}},
            {"type": "text", "text": "Hi"},
        ]
        body = {"model": "run", "messages": [{"role": "user", "content": content}]}
        with httpx2.Client(
            base_url=address, headers={"Authorization": f"Bearer {key}"}, timeout=60
        ) as client:
            reply = client.post("/v1/chat/completions", json={**body, "max_tokens": 4})
            assert reply.status_code == 200
            told = reply.json()["psa"]["policy"]
            assert told["name"] == "house/school"

            policy.write_text(allowed + "\ntenants: {school: {off: [privacy]}}\n")
            server.send_signal(signal.SIGHUP)
            models = client.get("/v1/models")  # the signal is taken before a new request is
            again = client.post("/v1/chat/completions", json={**body, "max_tokens": 4})
            assert models.status_code == 200
            assert again.json()["psa"]["policy"]["hash"] != told["hash"]

            long = {**body, "max_tokens": 300, "stream": True}
            with client.stream("POST", "/v1/chat/completions", json=long) as stream:
                lines = stream.iter_lines()
                assert "decision" in next(lines)
                server.send_signal(signal.SIGTERM)
                rest = [line for line in lines if line]
            assert rest[-1] == "data: [DONE]" and len(rest) > 10
    with open_audit(str(log), existing=True) as audit:
        assert [one["request"] for one in audit.records()][:2] == [
            reply.json()["id"],
            again.json()["id"],
        ]
        assert audit.verify().records == 3
