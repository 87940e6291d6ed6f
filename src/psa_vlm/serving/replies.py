"""What the service sends back, in the form of OpenAI's API, with a `psa` object beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from psa_vlm.inference import Reply
from psa_vlm.model.verdict import Verdict
from psa_vlm.policy.policy import Decision, Policy
from psa_vlm.serving.images import Picture
from psa_vlm.taxonomy import Taxonomy

REFUSED = "content_filter"
"""The finish reason of a refusal."""
NOT_ASSESSED = "the image could not be assessed"


def scores(verdict: Verdict | None, taxonomy: Taxonomy) -> dict[str, float]:
    """Risk type -> its score, the highest over the images; empty where there is no verdict."""
    if verdict is None or verdict.error is not None:
        return {}
    found = [image.scores(taxonomy) for image in verdict.images]
    return {name: round(max(one[name] for one in found), 6) for name in taxonomy.risk_types}


def decided(decision: Decision) -> dict[str, Any]:
    """A decision in short: the texts are elsewhere, and where the rule is written stays here."""
    told = decision.to_dict()
    return {name: told[name] for name in ("action", "rule", "type", "level", "reason")}


def without_evidence(verdict: Verdict | None) -> dict[str, Any] | None:
    """A verdict in numbers and names alone."""
    if verdict is None:
        return None
    told = verdict.to_dict()
    for image in told["images"]:
        del image["evidence"]
    return told


def psa(
    verdict: Verdict | None,
    decision: Decision,
    pictures: Sequence[Picture],
    policy: Policy,
    timings: Mapping[str, float],
) -> dict[str, Any]:
    """What was seen in each image, what was decided, by which rule of which policy, how fast.

    Why a verdict failed is for the audit log alone: it can tell of the machine's insides.
    """
    told = without_evidence(verdict) or {"images": []}
    failed = NOT_ASSESSED if verdict is not None and verdict.error is not None else None
    short = decided(decision)
    places = [
        {"image": index, "frame": frame, "sha256": picture.sha256}
        for index, picture in enumerate(pictures)
        for frame in range(len(picture.frames))
    ]
    seen = told["images"] or [{} for _ in places]  # a verdict that failed may hold none
    return {
        "decision": {**short, "reason": failed or short["reason"]},
        "images": [{**place, **one} for place, one in zip(places, seen, strict=True)],
        "error": failed,
        "policy": {"name": policy.name, "hash": policy.hash},
        "timings": {name: round(value, 2) for name, value in timings.items()},
    }


def completion(request: str, model: str, reply: Reply, psa: Mapping[str, Any]) -> dict[str, Any]:
    """A whole chat completion."""
    refused = reply.decision.action == "refuse"
    message = {
        "role": "assistant",
        "content": None if refused else reply.text,
        "refusal": reply.text if refused else None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(reply)}
    return {**_head(request, "chat.completion", model), "choices": [choice], "psa": psa}


def chunks(request: str, model: str, reply: Reply, psa: Mapping[str, Any]) -> Iterator[str]:
    """The same as server-sent events; the first carries the decision, before any word."""
    said = "refusal" if reply.decision.action == "refuse" else "content"
    head = _head(request, "chat.completion.chunk", model)
    for delta, finish, more in (
        ({"role": "assistant"}, None, {"psa": psa}),
        ({said: reply.text}, None, {}),
        ({}, _finish(reply), {}),
    ):
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        yield f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n"
    yield "data: [DONE]\n\n"


def moderation(
    request: str, model: str, verdict: Verdict, taxonomy: Taxonomy, psa: Mapping[str, Any]
) -> dict[str, Any]:
    """A moderation; the risk types are its categories, flagged at a level above safe."""
    flagged = {name: level != taxonomy.safe_level for name, level in verdict.concepts.items()}
    result = {
        "flagged": any(flagged.values()),
        "categories": flagged,
        "category_scores": scores(verdict, taxonomy),
        "category_applied_input_types": {name: ["text", "image"] for name in flagged},
    }
    return {"id": request, "model": model, "results": [result], "psa": psa}


def _head(request: str, kind: str, model: str) -> dict[str, Any]:
    return {"id": request, "object": kind, "created": int(time.time()), "model": model}


def _finish(reply: Reply) -> str:
    return REFUSED if reply.decision.action == "refuse" else "stop"
