"""What the service sends back, in the form of OpenAI's API, with a `psa` object beside it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from psa_vlm.errors import RequestError
from psa_vlm.model.verdict import Verdict
from psa_vlm.policy.policy import Decision, Policy
from psa_vlm.serving.engine import End, Usage
from psa_vlm.serving.images import Picture
from psa_vlm.serving.protocol import error_body
from psa_vlm.taxonomy import Taxonomy

Psa = Mapping[str, Any]
"""The `psa` object of a reply."""
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
    record: str,
    timings: Mapping[str, float],
) -> Psa:
    """What was seen in each image, what was decided, by which rule of which policy, the hash of its
    record, how fast.

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
        "record": record,
        "timings": {name: round(value, 2) for name, value in timings.items()},
    }


def completion(
    request: str, model: str, decision: Decision, text: str, end: End, psa: Psa
) -> dict[str, Any]:
    """A whole chat completion."""
    refused = decision.action == "refuse"
    message = {
        "role": "assistant",
        "content": None if refused else text,
        "refusal": text if refused else None,
    }
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish}
    head = _head(request, "chat.completion", model)
    return {**head, "choices": [choice], "usage": _usage(end.usage), "psa": psa}


class Chunks:
    """The same as server-sent events; the first carries the decision, before any word.

    Args:
        request: its id.
        model: what the service calls it.
        decision: that was taken.
        usage: whether one more chunk tells the tokens.
    """

    def __init__(self, request: str, model: str, decision: Decision, usage: bool) -> None:
        self._head = _head(request, "chat.completion.chunk", model)
        self._said = "refusal" if decision.action == "refuse" else "content"
        self._usage = usage
        if usage:
            self._head["usage"] = None

    def decision(self, psa: Psa) -> str:
        """The first event."""
        return self._event({"role": "assistant"}, None, psa=psa)

    def words(self, piece: str) -> str:
        """The next piece of the text."""
        return self._event({self._said: piece}, None)

    def end(self, end: End) -> str:
        """The last events of a whole stream."""
        last = self._event({}, end.finish)
        if self._usage:
            last += _event({**self._head, "choices": [], "usage": _usage(end.usage)})
        return f"{last}data: [DONE]\n\n"

    def failure(self, error: RequestError) -> str:
        """The last event of a stream that breaks off."""
        return _event(error_body(error))

    def _event(self, delta: Mapping[str, str], finish: str | None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event({**self._head, "choices": [choice], **more})


def moderation(
    request: str, model: str, verdict: Verdict, taxonomy: Taxonomy, psa: Psa
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


def _usage(usage: Usage | None) -> dict[str, int] | None:
    if usage is None:
        return None
    return {
        "prompt_tokens": usage.prompt,
        "completion_tokens": usage.completion,
        "total_tokens": usage.prompt + usage.completion,
    }


def _event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"
