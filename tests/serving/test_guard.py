"""A run on a dual encoder behind the service: it moderates, and says why it does not chat."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from psa_vlm.serving.server import Settings, build, open_audit

from .conftest import image


@pytest.fixture()
def client(guard_run: Path, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(guard_run, name="guard", audit=str(tmp_path / "audit.db"))
    with TestClient(build(settings), "http://localhost") as client:
        yield client


def test_it_moderates(client: TestClient, make_url: Any) -> None:
    body = {"input": [image(make_url()), {"type": "text", "text": "What is this?"}]}
    reply = client.post("/v1/moderations", json=body)
    assert reply.status_code == 200, reply.text
    (result,) = reply.json()["results"]
    assert len(result["category_scores"]) == 6


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("pictures", [0, 1])
def test_a_chat_is_told_what_is_missing(
    client: TestClient, make_url: Any, tmp_path: Path, stream: bool, pictures: int
) -> None:
    content = [*[image(make_url())] * pictures, {"type": "text", "text": "What is this?"}]
    messages = [{"role": "user", "content": content}]
    body = {"model": "guard", "messages": messages, "stream": stream}
    reply = client.post("/v1/chat/completions", json=body)
    assert reply.status_code == 501
    told = reply.json()["error"]
    assert told["code"] == "no_language_model"
    assert told["message"].startswith("chat needs a language model") and "\n" not in told["message"]
    with open_audit(str(tmp_path / "audit.db"), existing=True) as audit:
        (record,) = audit.records()
    assert record["error"]["status"] == 501
