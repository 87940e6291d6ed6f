"""What the page shows of a verdict and a decision, beyond what a client is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from psa_vlm.model import pictures
from psa_vlm.model.verdict import ImageVerdict, Verdict
from psa_vlm.policy.policy import Decision, Policy
from psa_vlm.serving.engine import Engine
from psa_vlm.serving.images import Picture
from psa_vlm.serving.replies import scores

if TYPE_CHECKING:
    from PIL.Image import Image


def explained(
    verdict: Verdict | None,
    decision: Decision,
    shown: Sequence[Picture],
    policy: Policy,
    engine: Engine,
) -> dict[str, Any]:
    """The hint, where the rule is written, each picture with where the model looked, and each
    concept's level and score with its thresholds. JSON-ready.

    A verdict that failed has neither concepts nor places that were looked at.
    """
    usable = verdict if verdict is not None and verdict.error is None else None
    frames = [frame for picture in shown for frame in picture.frames]
    images: Sequence[ImageVerdict | None] = usable.images if usable else [None] * len(frames)
    source = decision.source
    return {
        "hint": decision.hint,
        "source": None if source is None else asdict(source),
        "worst": usable and usable.worst,
        "pictures": [_picture(*one) for one in zip(frames, images, strict=True)],
        "concepts": _concepts(usable, policy, engine) if usable else [],
    }


def _picture(frame: Image, verdict: ImageVerdict | None) -> dict[str, str | None]:
    small = pictures.small(frame)
    looked = None if verdict is None else verdict.evidence
    heat = None if looked is None else pictures.url(pictures.heat(looked, small.size))
    return {"picture": pictures.url(small), "heat": heat}


def _concepts(verdict: Verdict, policy: Policy, engine: Engine) -> list[dict[str, Any]]:
    told = []
    for name, score in scores(verdict, engine.taxonomy).items():
        limits = engine.calibration and engine.calibration.thresholds[name]
        told.append(
            {
                "type": name,
                "level": verdict.concepts[name],
                "score": score,
                "band": verdict.bands.get(name),
                "overridden": name in verdict.overridden,
                "thresholds": None if limits is None else limits.model_dump(),
                "policy_threshold": policy.thresholds.get(name),
            }
        )
    return told
