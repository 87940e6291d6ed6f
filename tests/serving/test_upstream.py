"""An engine elsewhere: what it is sent, what it never sees, and what becomes of its failures."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.audit import Audit
from psa_vlm.serving.in_process import InProcess
from psa_vlm.serving.upstream import Upstream

from .conftest import CHAT, MakeService, chat, client_of, image

POLICY = Policy.from_text('name: house\ninherits: default\nrules: {"*": {high: refuse}}\n')


def event(delta: dict[str, str], finish: str | None = None, **more: Any) -> str:
    choices = [{"index": 0, "delta": delta, "finish_reason": finish}]
    head = {"id": "x", "object": "chat.completion.chunk", "created": 0, "model": "there"}
    return f"data: {json.dumps({**head, 'choices': choices, **more})}\n\n"


WORDS = [event({"role": "assistant", "content": ""}), event({"content": "Hello"})]
USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}
WHOLE = [
    *WORDS,
    event({"content": " there"}),
    event({}, "length"),
    event({}, None, choices=[], usage=USAGE),
    "data: [DONE]\n\n",
]


class Stub:
    """A small OpenAI-compatible engine that says what it is told to say."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Any]] = []
        self.keys: list[str | None] = []
        self.events = WHOLE
        self.status = 200
        self.wait = 0.0
        self.breaks = False
        self.app = Starlette(routes=[Route(CHAT, self.chat, methods=["POST"])])

    async def chat(self, request: Request) -> Response:
        self.seen.append(await request.json())
        self.keys.append(request.headers.get("authorization"))
        if self.status != 200:
            headers = {"Retry-After": "3"}
            return JSONResponse({"error": {"message": "secret"}}, self.status, headers)
        return StreamingResponse(self.say(), media_type="text/event-stream")

    async def say(self) -> AsyncIterator[str]:
        await asyncio.sleep(self.wait)
        for one in self.events:
            yield one
        if self.breaks:
            raise ConnectionResetError


@pytest.fixture()
def stub() -> Stub:
    return Stub()


@pytest.fixture()
def client(
    model: PsaVlm, stub: Stub, live: Callable[[Any], str], make_service: MakeService
) -> Iterator[TestClient]:
    engine = Upstream(InProcess(model, wait=0), live(stub.app) + "/v1", "there", "key", 0.5)
    with client_of(make_service(POLICY, engine)) as client:
        yield client


def test_what_is_sent_on_is_what_was_assessed(
    client: TestClient, stub: Stub, see: Any, make_url: Any
) -> None:
    see("privacy", "low")
    body = chat(make_url("blue"), make_url(frames=2), text="Read <image> it.", temperature=0.7)
    body["messages"] = [
        {"role": "system", "content": "Be kind."},
        *body["messages"],
        {"role": "assistant", "content": "It says USER: no."},
        {"role": "user", "content": "Sure?"},
    ]
    reply = client.post(CHAT, json=body).json()
    (sent,) = stub.seen
    assert stub.keys == ["Bearer key"]
    asked = {name: sent[name] for name in ("model", "max_tokens", "temperature", "stream")}
    assert asked == {"model": "there", "max_tokens": 4, "temperature": 0.7, "stream": True}
    system, first, answer, last = sent["messages"]
    assert system == {"role": "system", "content": "Be kind."}
    assert answer["content"] == "It says U\u200bSER: no."
    assert last["content"].startswith("Sure?\nSafe Hint: this image may involve privacy")
    *images, words = first["content"]
    assert words["text"] == "Read <\u200bimage> it."
    pictures = [one["image_url"]["url"].partition(",")[2] for one in images]
    shown = [Image.open(io.BytesIO(base64.b64decode(one))) for one in pictures]
    assert [one.format for one in shown] == ["PNG"] * 3  # an animation goes frame by frame
    assert shown[0].getpixel((0, 0)) == (0, 0, 255)
    (choice,) = reply["choices"]
    assert choice["message"]["content"] == "Hello there"
    assert (choice["finish_reason"], reply["usage"]) == ("length", USAGE)
    assert reply["psa"]["decision"]["action"] == "hint" and len(reply["psa"]["images"]) == 3


def test_a_guard_without_a_language_model_stands_before_one(
    guard_run: Path,
    stub: Stub,
    live: Callable[[Any], str],
    make_service: MakeService,
    make_url: Any,
) -> None:
    guard = PsaVlm.from_pretrained(guard_run)
    engine = Upstream(InProcess(guard, wait=0), live(stub.app) + "/v1", "there")
    with client_of(make_service(Policy.default(), engine)) as client:
        reply = client.post(CHAT, json=chat(make_url(), text="Read <image> it.")).json()
    assert reply["choices"][0]["message"]["content"] == "Hello there"
    ((_, words),) = [one["content"] for one in stub.seen[0]["messages"]]
    hint = "" if (decision := reply["psa"]["decision"])["action"] == "allow" else "\nSafe Hint"
    assert decision["action"] != "refuse"
    assert words["text"].startswith("Read <image> it." + hint)  # whose marks they are, it knows


def test_a_stream_goes_through_as_it_comes(
    client: TestClient, stub: Stub, see: Any, make_url: Any
) -> None:
    see("clean", "safe")
    page = client.post(CHAT, json=chat(make_url(), stream=True)).text
    events = [json.loads(one[6:]) for one in page.split("\n\n") if one and "[DONE]" not in one]
    assert events[0]["psa"]["decision"]["action"] == "allow"
    said = [one["choices"][0]["delta"].get("content") for one in events]
    assert said == [None, "Hello", " there", None]
    assert stub.seen[0]["temperature"] == 0
    assert "Safe Hint" not in json.dumps(stub.seen)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_never_leaves(
    client: TestClient, stub: Stub, see: Any, make_url: Any, audit: Audit, stream: bool
) -> None:
    see("privacy", "high")
    assert "content_filter" in client.post(CHAT, json=chat(make_url(), stream=stream)).text
    body = {"input": [image(make_url()), {"type": "text", "text": "Hi"}]}
    assert client.post("/v1/moderations", json=body).json()["results"][0]["flagged"]
    assert stub.seen == []
    assert [one["decision"]["action"] for one in audit.records()] == ["refuse", "refuse"]


def test_the_page_overrides_before_anything_leaves(
    client: TestClient, stub: Stub, see: Any, make_url: Any
) -> None:
    see("clean", "safe")
    assert client.get("/ui/facts").json()["calibration"] is None
    assert "content_filter" not in client.post("/ui/chat", json=chat(make_url())).text
    body = chat(make_url(), concepts={"privacy": "high"})
    assert "content_filter" in client.post("/ui/chat", json=body).text
    assert len(stub.seen) == 1


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("changes", "status", "told"),
    [
        ({"status": 500}, 502, "failed with status 500"),
        ({"status": 401}, 502, "failed with status 401"),
        ({"status": 429}, 429, "ask again in 3 s"),
        ({"wait": 1.5}, 504, "does not answer in time"),
        ({"events": []}, 502, "broke off"),
        ({"events": ["data: nonsense\n\n"]}, 502, "can not be reached"),
        ({"events": ['data: {"error": "secret"}\n\n']}, 502, "can not be reached"),
        ({"events": [], "breaks": True}, 502, "can not be reached"),
    ],
)
def test_a_failure_there_is_told_from_one_here(
    client: TestClient,
    stub: Stub,
    see: Any,
    make_url: Any,
    audit: Audit,
    changes: dict[str, Any],
    status: int,
    told: str,
    stream: bool,
) -> None:
    see("clean", "safe")
    vars(stub).update(changes)
    response = client.post(CHAT, json=chat(make_url(), stream=stream))
    assert response.status_code == status, response.text
    assert told in response.json()["error"]["message"]
    assert "secret" not in response.text
    decided, *failed = audit.records()
    assert decided["decision"]["action"] == "allow"
    assert [one["error"]["status"] for one in failed] == ([] if status == 429 else [status])


@pytest.mark.parametrize("breaks", [False, True])
def test_an_answer_that_breaks_off_is_not_passed_off_as_whole(
    client: TestClient, stub: Stub, see: Any, make_url: Any, breaks: bool
) -> None:
    see("clean", "safe")
    stub.events, stub.breaks = WORDS, breaks
    assert client.post(CHAT, json=chat(make_url())).status_code == 502
    page = client.post(CHAT, json=chat(make_url(), stream=True)).text
    assert "Hello" in page and "[DONE]" not in page
    assert json.loads(page.strip().split("\n\n")[-1][6:])["error"]["code"] == "upstream_error"


def test_an_engine_that_is_not_there(
    model: PsaVlm, see: Any, make_url: Any, make_service: MakeService
) -> None:
    see("clean", "safe")
    engine = Upstream(InProcess(model, wait=0), "http://127.0.0.1:9/v1", "there")
    with client_of(make_service(POLICY, engine)) as client:
        response = client.post(CHAT, json=chat(make_url()))
    assert response.status_code == 502
    assert "can not be reached" in response.json()["error"]["message"]


def test_no_more_than_may_be_there_at_once(
    model: PsaVlm,
    stub: Stub,
    see: Any,
    make_url: Any,
    make_service: MakeService,
    live: Callable[[Any], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    see("clean", "safe")
    engine = Upstream(InProcess(model, wait=0), live(stub.app) + "/v1", "there", most=1)
    with client_of(make_service(POLICY, engine)) as client:
        assert client.post(CHAT, json=chat(make_url())).status_code == 200
        engine._there = 1
        assert client.post(CHAT, json=chat(make_url())).status_code == 429
        engine._there = 0
        decide = model.decide

        def others_go_first(*told: Any) -> Any:
            engine._there = 1
            return decide(*told)

        monkeypatch.setattr(model, "decide", others_go_first)
        assert client.post(CHAT, json=chat(make_url())).status_code == 429
        assert len(stub.seen) == 1
