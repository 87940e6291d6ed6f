"""A service that is killed in the middle of its work: what it told anybody is on record."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import httpx2

from psa_vlm.serving.server import open_audit

from .conftest import CHAT, chat, served_by_command

CLIENTS = 6
REPLIES = 30
"""After which the service is killed."""


def test_every_reply_before_a_kill_is_on_record(
    run_dir: Path, tmp_path: Path, make_url: Any
) -> None:
    log = tmp_path / "audit.db"
    body = chat(make_url(), model="run", max_tokens=2)
    heard: dict[str, str] = {}
    """Reply -> the hash of its record, as the client was told."""
    moderated = {"input": body["messages"][0]["content"]}

    def note(reply: dict[str, Any]) -> None:
        heard[reply["id"]] = reply["psa"]["record"]

    def ask(address: str, number: int) -> None:
        with httpx2.Client(base_url=address, timeout=60) as client:
            try:
                while True:
                    if number % 3 == 0:
                        note(client.post("/v1/moderations", json=moderated).json())
                    elif number % 3 == 1:
                        note(client.post(CHAT, json=body).json())
                    else:
                        streamed = {**body, "stream": True, "max_tokens": 30}
                        with client.stream("POST", CHAT, json=streamed) as reply:
                            for line in reply.iter_lines():
                                if '"psa"' in line:
                                    note(json.loads(line.removeprefix("data: ")))
            except httpx2.TransportError:  # the service is gone
                return

    command = ("--model", run_dir, "--audit", log)
    with served_by_command(*command) as (server, address):
        clients = [threading.Thread(target=ask, args=(address, i)) for i in range(CLIENTS)]
        for client in clients:
            client.start()
        while len(heard) < REPLIES:
            assert server.poll() is None and any(client.is_alive() for client in clients)
            time.sleep(0.01)
        server.kill()
        for client in clients:
            client.join()
    with open_audit(str(log), existing=True) as audit:
        before = {one["request"]: one["hash"] for one in audit.records()}
    assert len(heard) >= REPLIES
    assert heard.items() <= before.items()
    with served_by_command(*command) as (_, address):  # and it goes on where it was
        reply = httpx2.post(f"{address}{CHAT}", json=body, timeout=60).json()
    with open_audit(str(log), existing=True) as audit:
        records = list(audit.records())
    assert [one["request"] for one in records] == [*before, reply["id"]]
