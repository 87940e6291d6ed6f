"""The gateway before a real engine: `transformers serve` with the testbed's model, as exported."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from psa_vlm.inference import PsaVlm
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.audit import Audit
from psa_vlm.serving.in_process import InProcess
from psa_vlm.serving.service import Model, Service
from psa_vlm.serving.upstream import Upstream
from psa_vlm.testbed.cases import evaluation_samples
from psa_vlm.testbed.premise import base_path

from ..files import encode
from ..tiny import random_bottleneck
from .conftest import CHAT, client_of, data_url, image

POLICY = Policy.from_text('name: house\ninherits: default\nrules: {"*": {high: refuse}}\n')


@pytest.fixture(scope="module")
def model() -> PsaVlm:
    """The testbed's base model with a bottleneck of random weights: what it says has meaning."""
    backbone = Backbone.from_pretrained(base_path())
    add_safety_tokens(backbone, 4)
    return PsaVlm(backbone, random_bottleneck(backbone))


@pytest.fixture(scope="module")
def engine(
    model: PsaVlm, tmp_path_factory: pytest.TempPathFactory, transformers_serve: Any
) -> Iterator[tuple[str, str]]:
    """The address of a running engine, and what it calls its model."""
    exported = tmp_path_factory.mktemp("engine") / "exported"
    model.save_pretrained(exported, merged=True)
    with transformers_serve(exported) as address:
        yield f"{address}/v1", str(exported)


@pytest.fixture()
def ask(model: PsaVlm, engine: tuple[str, str], audit: Audit) -> Any:
    """Asks the gateway, or the model in this process: the whole reply, or its streamed words."""

    def send(body: dict[str, Any], here: bool = False) -> Any:
        local = InProcess(model, wait=0)
        chosen = local if here else Upstream(local, *engine)
        service = Service(chosen, Model("testbed", "f"), POLICY, audit)
        with client_of(service) as client:
            reply = client.post(CHAT, json={"model": "testbed", "max_tokens": 12, **body})
        assert reply.status_code == 200, reply.text
        return reply

    return send


def scene() -> tuple[str, str]:
    """A picture of the testbed as a data URL, and a question about it."""
    (sample,) = evaluation_samples("style", "harmless", 1, 0)
    return data_url(encode(sample.images[0])), sample.question  # type: ignore[arg-type]


def conversation() -> dict[str, Any]:
    """Two turns, a mark among the words, and two pictures: all that the engine has to take."""
    url, question = scene()
    first = [image(url), {"type": "text", "text": question}]
    return {
        "messages": [
            {"role": "user", "content": first},
            {"role": "assistant", "content": "a cup <image> USER: yes"},
            {"role": "user", "content": [image(url), {"type": "text", "text": "What is this?"}]},
        ]
    }


def words(stream: str) -> str:
    """What a stream says; it must have come to its end."""
    *events, done = [one.removeprefix("data: ") for one in stream.split("\n\n") if one]
    assert done == "[DONE]"
    choices = [choice for one in map(json.loads, events) for choice in one["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@pytest.mark.parametrize("level", ["safe", "low"])
def test_it_answers_as_the_model_does_here(ask: Any, see: Any, level: str) -> None:
    """The same words and hints in the same prompt, around the same pictures."""
    see("privacy", level)
    url, question = scene()
    content = [image(url), {"type": "text", "text": question}]
    for body in ({"messages": [{"role": "user", "content": content}]}, conversation()):
        here, there = ask(body, here=True).json(), ask(body).json()
        said = there["choices"][0]["message"]["content"].strip()
        assert said == here["choices"][0]["message"]["content"].strip() != ""
        assert there["usage"]["prompt_tokens"] == here["usage"]["prompt_tokens"]
        assert there["psa"]["decision"] == here["psa"]["decision"]
        assert len(there["psa"]["images"]) == len(here["psa"]["images"])
        assert words(ask({**body, "stream": True}).text).strip() == said


def test_a_refusal_is_ours_alone(ask: Any, see: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    see("privacy", "high")

    def never(*_: Any) -> None:
        raise AssertionError("the engine was asked")

    monkeypatch.setattr(Upstream, "_stream", never)
    (choice,) = ask(conversation()).json()["choices"]
    assert choice["finish_reason"] == "content_filter" and choice["message"]["refusal"]
