"""The service over HTTP, on the tiny model with verdicts made to measure."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi.testclient import TestClient

from psa_vlm.errors import Overloaded
from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.audit import Audit
from psa_vlm.serving.in_process import InProcess
from psa_vlm.serving.keys import Keys, hash_key, new_key
from psa_vlm.serving.limits import Limits

from .conftest import CHAT, MakeService, chat, client_of, image

POLICY = Policy.from_text(
    """
name: house
inherits: default
rules:
  "*": {medium: refuse, high: refuse}
tenants:
  school: {rules: {"*": {low: refuse}}}
  press: {off: [privacy]}
"""
)


Serve = Callable[..., TestClient]


@pytest.fixture()
def serve(make_service: MakeService) -> Iterator[Serve]:
    """Starts a service; keys and limits may be given."""

    def start(keys: Keys | None = None, **limits: int) -> TestClient:
        service = make_service(POLICY, keys=keys, limits=Limits(**limits))
        return stack.enter_context(client_of(service, raise_server_exceptions=False))

    with ExitStack() as stack:
        yield start


def error(response: Any, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    told: dict[str, Any] = response.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    return told


# --- what is answered ----------------------------------------------------------------------------


def test_a_reply_carries_verdict_decision_and_record(
    serve: Serve, see: Any, audit: Audit, make_url: Any, model: PsaVlm
) -> None:
    see("privacy", "low")
    client = serve()
    reply = client.post(CHAT, json=chat(make_url(), temperature=0)).json()
    assert reply["object"] == "chat.completion"
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "length"  # four tokens are cut short
    usage = reply["usage"]
    assert usage["completion_tokens"] == 4 and usage["prompt_tokens"] > 16
    assert usage["total_tokens"] == usage["prompt_tokens"] + 4
    assert choice["message"]["refusal"] is None and isinstance(choice["message"]["content"], str)
    psa = reply["psa"]
    assert psa["decision"] == {
        "action": "hint",
        "rule": "*.low",
        "type": "privacy",
        "level": "low",
        "reason": "privacy at level low",
    }
    assert (psa["images"][0]["type"], psa["images"][0]["level"]) == ("privacy", "low")
    assert psa["policy"] == {"name": "house", "hash": POLICY.hash}
    assert psa["timings"]["total_ms"] >= psa["timings"]["verdict_ms"] > 0
    (record,) = audit.records()
    assert (record["request"], record["hash"]) == (reply["id"], psa["record"])
    assert record["images"] == [psa["images"][0]["sha256"]]
    assert record["decision"] == psa["decision"]
    assert record["scores"]["privacy"] > 0.9
    assert record["policy"]["hash"] == POLICY.hash
    assert record["model"] == {"name": "tiny", "hash": "f" * 16}
    assert "What is this?" not in json.dumps(record)


def test_a_refusal_is_openai_s(serve: Serve, see: Any, make_url: Any, audit: Audit) -> None:
    see("privacy", "high")
    reply = serve().post(CHAT, json=chat(make_url())).json()
    (choice,) = reply["choices"]
    assert choice["finish_reason"] == "content_filter"
    assert reply["usage"]["total_tokens"] == 0  # the language model is not called
    assert choice["message"]["content"] is None
    assert choice["message"]["refusal"].startswith("Sorry, I can not help")
    assert next(audit.records())["decision"]["action"] == "refuse"


def events(response: Any) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = [line for line in response.text.split("\n\n") if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize(("level", "said"), [("safe", "content"), ("high", "refusal")])
def test_a_stream_decides_before_its_first_word(
    serve: Serve, see: Any, make_url: Any, audit: Audit, level: str, said: str
) -> None:
    see("privacy", level)
    client = serve()
    whole = client.post(CHAT, json=chat(make_url(), max_tokens=20)).json()
    streamed = chat(make_url(), max_tokens=20, stream=True)
    first, *rest = events(client.post(CHAT, json=streamed))
    assert first["psa"]["decision"] == whole["psa"]["decision"]
    assert first["choices"][0]["delta"] == {"role": "assistant"}
    deltas = [one["choices"][0]["delta"] for one in rest]
    assert "".join(delta.get(said, "") for delta in deltas) == whole["choices"][0]["message"][said]
    assert rest[-1]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert {one["id"] for one in (first, *rest)} == {list(audit.records())[1]["request"]}
    if said == "content":
        assert len(rest) > 3  # word by word
    options = {"stream_options": {"include_usage": True}}
    *chunks, last = events(client.post(CHAT, json=streamed | options))
    assert all(one["usage"] is None for one in chunks)
    assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert "stream" in error(client.post(CHAT, json=chat() | options), 400)["message"]


def test_a_stream_that_breaks_off_says_so_in_the_stream_and_on_record(
    serve: Serve, see: Any, make_url: Any, audit: Audit, breaks_after: Any
) -> None:
    see("clean", "safe")
    breaks_after(20, "secret path")
    response = serve().post(CHAT, json=chat(make_url(), max_tokens=50, stream=True))
    assert response.status_code == 200
    *_, last = [line for line in response.text.split("\n\n") if line]
    told = json.loads(last.removeprefix("data: "))["error"]
    assert told["message"] == "the request failed"
    decided, failed = audit.records()
    assert decided["decision"]["action"] == "allow" and decided["error"] is None
    assert failed["request"] == decided["request"] and failed["decision"] is None
    assert "secret path" in failed["error"]["reason"]


def test_a_system_message_is_read_and_assessed(
    serve: Serve, make_url: Any, audit: Audit, model: PsaVlm
) -> None:
    client = serve()

    def probabilities(*first: dict[str, str]) -> Any:
        body = chat(make_url())
        body["messages"] = [*first, *body["messages"]]
        return client.post(CHAT, json=body).json()["psa"]["images"][0]["level_probs"]

    system = {"role": "system", "content": "How do I break this?"}
    assert probabilities(system) != probabilities()
    body = chat()
    body["messages"].append(system)
    assert "first message" in error(client.post(CHAT, json=body), 400)["message"]
    body["messages"] = [system]
    assert "the last message" in error(client.post(CHAT, json=body), 400)["message"]


def test_every_image_of_every_turn_is_assessed(
    serve: Serve, make_url: Any, audit: Audit, model: PsaVlm
) -> None:
    first, second, moving = make_url("red"), make_url("blue"), make_url(frames=2)
    body = chat()
    body["messages"] = [
        {"role": "user", "content": [image(first), {"type": "text", "text": "a"}, image(moving)]},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": [{"type": "text", "text": "c"}, image(second)]},
    ]
    psa = serve().post(CHAT, json=body).json()["psa"]
    assert [(one["image"], one["frame"]) for one in psa["images"]] == [
        (0, 0),
        (1, 0),
        (1, 1),
        (2, 0),
    ]
    assert all(one["type"] in model.taxonomy.types for one in psa["images"])
    (record,) = audit.records()
    assert record["images"] == [psa["images"][i]["sha256"] for i in (0, 1, 3)]
    assert len(record["verdict"]["images"]) == 4


def test_a_conversation_without_images_is_answered_and_recorded(serve: Serve, audit: Audit) -> None:
    reply = serve().post(CHAT, json=chat(text="Hello")).json()
    assert reply["psa"]["images"] == []
    assert reply["psa"]["decision"]["rule"] == "no-image"
    (record,) = audit.records()
    assert (record["images"], record["verdict"], record["scores"]) == ([], None, {})


def test_a_verdict_that_fails_is_a_refusal_on_record(
    serve: Serve, model: PsaVlm, make_url: Any, audit: Audit, see: Any
) -> None:
    see("clean", "safe")
    with torch.no_grad():
        model.bottleneck.head.to_type.bias.fill_(float("nan"))
    client = serve()
    reply = client.post(CHAT, json=chat(make_url())).json()
    assert reply["choices"][0]["finish_reason"] == "content_filter"
    assert reply["psa"]["decision"]["rule"] == "verdict-error"
    assert "not finite" not in json.dumps(reply["psa"])
    assert reply["psa"]["error"] == "the image could not be assessed"
    body = {"input": [image(make_url()), {"type": "text", "text": "Hi"}]}
    assert error(client.post("/v1/moderations", json=body), 500)["code"] == "verdict_error"
    for record in audit.records():
        assert record["scores"] == {}
        assert "not finite" in record["verdict"]["error"]
        assert "not finite" in record["decision"]["reason"]
    assert audit.verify().records == 2


def test_a_moderation_gives_our_types_as_categories(
    serve: Serve, see: Any, make_url: Any, audit: Audit, model: PsaVlm
) -> None:
    see("privacy", "medium")
    body = {"input": [image(make_url()), {"type": "text", "text": "Hi"}], "model": "tiny"}
    reply = serve().post("/v1/moderations", json=body).json()
    (result,) = reply["results"]
    assert result["flagged"] is True
    assert set(result["categories"]) == set(model.taxonomy.risk_types)
    assert [name for name, on in result["categories"].items() if on] == ["privacy"]
    assert result["category_scores"]["privacy"] > 0.9 > result["category_scores"]["politics"]
    assert reply["psa"]["decision"]["action"] == "refuse"
    assert next(audit.records())["endpoint"] == "moderation"


# --- what is refused -----------------------------------------------------------------------------


def test_what_cannot_be_served_is_named_and_computes_nothing(
    serve: Serve, make_url: Any, audit: Audit
) -> None:
    client = serve(images=2, image=5000, tokens=8)

    def post(body: Any) -> Any:
        return client.post(CHAT, json=body)

    assert error(post(chat(top_p=0.5)), 400)["param"] == "top_p"
    assert error(post(chat(temperature=0.7)), 400)["param"] == "temperature"
    assert error(post(chat(max_tokens=9)), 400)["param"] == "max_tokens"
    differ = chat(max_completion_tokens=3)
    assert "differ" in error(post(differ), 400)["message"]
    assert error(post(chat(model="other")), 404)["code"] == "model_not_found"
    assert error(post(chat(*[make_url()] * 3)), 400)["code"] == "too_many_images"
    assert error(post(chat("data:image/png;base64,AAAA")), 400)["code"] == "invalid_image"
    assert error(post(chat("data:image/png;base64," + "A" * 9000)), 400)["code"] == (
        "image_too_large"
    )
    assert error(post(chat("http://127.0.0.1/a.png")), 400)["code"] == "remote_image"
    assert "tokens long" in error(post(chat(make_url(), text="a" * 9000)), 400)["message"]
    assert error(post(chat(make_url(), text="a" * 32_001)), 400)["code"] == "text_too_long"
    echo = error(post(chat(model="m" * 100_000)), 404)["message"]
    assert echo.startswith("there is no model 'mmm") and len(echo) == 1000
    text_alone = client.post("/v1/moderations", json={"input": "Hi"})
    assert "no image" in error(text_alone, 400)["message"]
    records = list(audit.records())
    assert [one["error"]["code"] for one in records[:4]] == [
        "unsupported_value",
        "invalid_request",
        "invalid_request",
        "model_not_found",
    ]
    assert len(records) == 12  # all but the parameter that made no request of it
    assert all(one["decision"] is None and one["scores"] == {} for one in records)
    assert '{code="invalid_image",endpoint="chat"} 1.0' in client.get("/metrics").text


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"[" * 9999, b'{"model": "\\ud800"}', b"\xff"])
def test_a_broken_body_is_the_client_s_mistake(serve: Serve, body: bytes) -> None:
    response = serve().post(CHAT, content=body, headers={"Content-Type": "application/json"})
    error(response, 400)


def test_a_body_that_is_too_large_is_not_read(serve: Serve) -> None:
    client = serve(body=1000)
    assert "1,000 bytes" in error(client.post(CHAT, json=chat(text="a" * 1000)), 413)["message"]
    chunks = iter([b"a" * 600, b"a" * 600])
    headers = {"Content-Type": "application/json"}
    assert error(client.post(CHAT, content=chunks, headers=headers), 413)
    assert client.post(CHAT, json=chat()).status_code == 200


def test_a_full_queue_says_when_to_ask_again(
    serve: Serve, make_url: Any, monkeypatch: pytest.MonkeyPatch, audit: Audit
) -> None:
    async def full(*_: Any) -> None:
        raise Overloaded(7)

    monkeypatch.setattr(InProcess, "answer", full)
    client = serve()
    response = client.post(CHAT, json=chat(make_url()))
    assert error(response, 429)["type"] == "rate_limit_error"
    assert response.headers["retry-after"] == "7"
    assert audit.verify().records == 0  # counted alone: a record would add to the load
    assert 'psa_failures_total{code="overloaded"' in client.get("/metrics").text


def test_what_takes_too_long_is_given_up(
    serve: Serve, model: PsaVlm, monkeypatch: pytest.MonkeyPatch, audit: Audit
) -> None:
    import time

    monkeypatch.setattr(model, "see_batch", lambda *_: time.sleep(1.3))
    assert error(serve(seconds=1).post(CHAT, json=chat()), 504)["code"] == "timeout"
    (record,) = audit.records()
    assert record["error"]["code"] == "timeout" and record["decision"] is None


@pytest.mark.parametrize("step", ["see_batch", "answer_batch"])
def test_an_error_of_the_model_tells_the_operator_alone(
    serve: Serve, model: PsaVlm, monkeypatch: pytest.MonkeyPatch, audit: Audit, step: str
) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("secret path")

    monkeypatch.setattr(model, step, broken)
    assert error(serve().post(CHAT, json=chat()), 500)["message"] == "the request failed"
    *_, record = audit.records()
    assert record["error"] == {
        "code": "internal_error",
        "status": 500,
        "reason": "RuntimeError('secret path')",
    }


@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_recorded_is_not_answered(
    serve: Serve, see: Any, make_url: Any, audit: Audit, stream: bool
) -> None:
    see("clean", "safe")
    client = serve()
    assert client.get("/readyz").status_code == 200
    with audit._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE records")
    response = client.post(CHAT, json=chat(make_url(), stream=stream))
    assert error(response, 503)["code"] == "audit_unavailable"
    error(client.get("/readyz"), 503)
    assert client.get("/healthz").status_code == 200


# --- who asks ------------------------------------------------------------------------------------


def test_a_key_opens_the_door_and_picks_the_policy(
    serve: Serve, see: Any, make_url: Any, audit: Audit
) -> None:
    see("privacy", "low")
    school, press = new_key(), new_key()
    client = serve(Keys({"school": [hash_key(school)], "press": [hash_key(press)]}))

    def ask(key: str | None) -> Any:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return client.post(CHAT, json=chat(make_url()), headers=headers)

    for wrong in (None, "", new_key(), school[:-1]):
        response = ask(wrong)
        assert error(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    assert error(client.get("/v1/models"), 401)
    assert audit.verify().records == 0
    assert ask(school).json()["psa"]["decision"]["action"] == "refuse"
    told = ask(press).json()["psa"]
    assert (told["decision"]["rule"], told["policy"]["name"]) == ("off.privacy", "house/press")
    assert [one["tenant"] for one in audit.records()] == ["school", "press"]
    for open_to_all in ("/healthz", "/readyz", "/metrics"):
        assert client.get(open_to_all).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "localhost.evil.example", "", "[::1"]
)
def test_without_keys_only_the_loopback_s_names_are_answered(serve: Serve, host: str) -> None:
    """A page may point its own name at this machine and let a browser ask."""
    client = serve()
    for name in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000"):
        assert client.get("/v1/models", headers={"Host": name}).status_code == 200
    wrong = {"Host": host}
    assert error(client.get("/v1/models", headers=wrong), 403)["code"] == "wrong_host"
    assert error(client.post(CHAT, json=chat(), headers=wrong), 403)
    keyed = serve(Keys({"school": [hash_key(new_key())]}))
    assert error(keyed.get("/v1/models", headers=wrong), 401)


def test_what_a_web_page_may_send_unasked_is_no_request(serve: Serve, audit: Audit) -> None:
    """A browser asks before it sends JSON elsewhere, and is not allowed to; plain text it sends."""
    client = serve()
    for headers in ({"Content-Type": "text/plain"}, {}):
        assert error(client.post(CHAT, content=json.dumps(chat()), headers=headers), 400)
    assert audit.verify().records == 0


def test_a_tenant_without_a_policy_is_an_error_at_the_start(serve: Serve) -> None:
    from psa_vlm.errors import PolicyError

    with pytest.raises(PolicyError, match="no tenant 'shop'"):
        serve(Keys({"shop": [hash_key(new_key())]}))


# --- policies that change -------------------------------------------------------------------------


def test_a_bad_policy_file_leaves_the_service_as_it_was(
    make_service: MakeService, audit: Audit, see: Any, make_url: Any, tmp_path: Path
) -> None:
    see("privacy", "medium")
    path = tmp_path / "house.yaml"
    path.write_text("name: house\ninherits: default\n")

    def load() -> Policy:
        return Policy.from_yaml(path)

    service = make_service(load(), load=load)
    with client_of(service) as client:

        def decided() -> Any:
            return client.post(CHAT, json=chat(make_url())).json()["psa"]["decision"]["action"]

        assert decided() == "hint"
        path.write_text("name: house\n")
        service.policies.reload()
        assert decided() == "hint"
        assert client.get("/readyz").status_code == 200
        assert 'psa_policy_reloads_total{outcome="refused"} 1.0' in client.get("/metrics").text
        path.write_text('name: house\ninherits: default\nrules: {"*": {medium: refuse}}\n')
        service.policies.reload()
        assert decided() == "refuse"
        before, same, after = [one["policy"]["hash"] for one in audit.records()]
        assert before == same != after


# --- the rest ------------------------------------------------------------------------------------


def test_scores_that_leave_the_calibration_are_counted_and_logged(
    model: PsaVlm,
    make_service: MakeService,
    see: Any,
    make_url: Any,
    make_calibration: Any,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from psa_vlm.evaluation.drift import DriftMonitor

    see("privacy", "high")
    monkeypatch.setattr(model, "calibration", make_calibration())
    drift = DriftMonitor(make_calibration(), window=20)
    with client_of(make_service(POLICY, drift=drift)) as client:
        assert "psa_drifts_total{" not in client.get("/metrics").text
        body = {"input": [image(make_url()), {"type": "text", "text": "Hi"}]}
        for _ in range(20):
            assert client.post("/v1/moderations", json=body).status_code == 200
        assert 'psa_drifts_total{type="privacy"} 1.0' in client.get("/metrics").text
    assert "the scores of privacy have left the calibration's" in caplog.text


def test_the_model_is_listed_and_requests_are_counted(serve: Serve, make_url: Any) -> None:
    client = serve()
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]
    client.post(CHAT, json=chat(make_url()))
    error(client.post(CHAT, json=chat(stop="a")), 400)
    error(client.get("/nothing"), 404)
    page = client.get("/metrics").text
    assert f'psa_requests_total{{endpoint="{CHAT}",status="200"}} 1.0' in page
    assert f'psa_requests_total{{endpoint="{CHAT}",status="400"}} 1.0' in page
    assert 'psa_requests_total{endpoint="other",status="404"} 1.0' in page
    assert "psa_decisions_total{action=" in page
    assert "psa_waiting 0.0" in page
