"""Requests made from the service's own OpenAPI document: never a 5xx, never an unassessed image."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode

from psa_vlm.policy.policy import Policy
from psa_vlm.serving.app import create_app
from psa_vlm.serving.audit import Audit

from .conftest import MakeService, data_url, encoded

GOOD = [data_url(encoded(colour)) for colour in ("red", "green", "blue")]
GOOD.append(data_url(encoded(frames=2)))
BAD = [
    data_url(encoded()[:60]),  # cut
    data_url(b"\xff\xd8\xff" + encoded()),  # a wrong header
    data_url(encoded(size=(4000, 1))),  # no picture
    "data:image/png;base64,%%%",
    "https://example.com/a.png",
    "",
]


def narrowed(document: dict[str, Any], images: list[str]) -> dict[str, Any]:
    """The document with what this service has: its model, short greedy answers, and images."""
    schemas = document["components"]["schemas"]
    for name in ("ChatRequest", "ModerationRequest"):
        schemas[name]["properties"]["model"] = {"const": "tiny"}
    chat = schemas["ChatRequest"]["properties"]
    chat |= {"max_tokens": {"const": 2}, "max_completion_tokens": {"const": 2}}
    chat["temperature"] = {"const": 0}
    del chat["stream_options"]  # for streams alone
    schemas["ImageUrl"]["properties"]["url"] = {"enum": images}
    return document


def ended(body: dict[str, Any]) -> dict[str, Any]:
    """A valid body as a conversation: the system speaks first if at all, and the user last."""
    if "messages" in body:
        first, *rest = body["messages"]
        rest = [one for one in rest if one["role"] != "system"]
        body["messages"] = [first, *rest, {"role": "user", "content": "Go on."}]
    elif isinstance(body["input"], list):
        body["input"] = [*body["input"], {"type": "text", "text": "What is this?"}]
    return body


def images_of(body: Any) -> int:
    """How many images a valid body has."""
    messages = body["messages"] if "messages" in body else [{"content": body["input"]}]
    contents = [one.get("content") for one in messages]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return sum(part["type"] == "image_url" for part in parts)


def told(response: Any) -> dict[str, Any]:
    """The reply, or the first chunk of its stream."""
    text = response.text
    first = text.partition("\n\n")[0].removeprefix("data: ") if text.startswith("data:") else text
    found: dict[str, Any] = json.loads(first)
    return found


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/moderations"])
@pytest.mark.parametrize(
    ("mode", "images"),
    [
        (GenerationMode.POSITIVE, GOOD),
        (GenerationMode.POSITIVE, GOOD + BAD),
        (GenerationMode.NEGATIVE, GOOD),
    ],
)
def test_whatever_is_asked(
    make_service: MakeService,
    audit: Audit,
    live: Callable[[Any], str],
    path: str,
    mode: GenerationMode,
    images: list[str],
) -> None:
    app = create_app(make_service(Policy.default()))
    url = live(app)
    schema = schemathesis.openapi.from_dict(narrowed(app.openapi(), images))
    cases = schema[path]["POST"].as_strategy(generation_mode=mode)
    valid = mode is GenerationMode.POSITIVE
    statuses: list[int] = []

    @settings(max_examples=25, phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def ask(case: Any) -> None:
        body = ended(case.body) if valid else case.body
        response = client.post(path, content=json.dumps(body, default=str))
        statuses.append(response.status_code)
        reply = told(response)
        if response.status_code == 200:
            assert len(reply["psa"]["images"]) >= images_of(body)
        else:
            assert response.status_code in (400, 404)
            assert set(reply["error"]) == {"message", "type", "param", "code"}

    headers = {"Content-Type": "application/json"}
    with httpx2.Client(base_url=url, headers=headers, timeout=60) as client:
        ask()
    assert not (valid and images is GOOD) or statuses.count(200) > 3
    assert audit.verify().records >= statuses.count(200)
