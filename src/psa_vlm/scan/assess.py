"""From images as they were found to rows of the result; whatever fails is a row that says so."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

from PIL.Image import Image

from psa_vlm.data.images import open_images
from psa_vlm.errors import ImageError
from psa_vlm.inference import PsaVlm
from psa_vlm.model.verdict import Verdict
from psa_vlm.policy.policy import Policy
from psa_vlm.scan.source import Read, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Opened:
    """An image with its frames, or what is wrong with it."""

    key: str
    sha256: str | None
    frames: list[Image]
    error: str | None = None


def opened(reads: Iterable[Read]) -> Iterator[Opened]:
    """Decode what was read."""
    for key, content, error in reads:
        digest = None if content is None else hashlib.sha256(content).hexdigest()
        if content is None:
            yield Opened(key, digest, [], error or "can't be read")
            continue
        try:
            yield Opened(key, digest, open_images(content))
        except ImageError as wrong:
            yield Opened(key, digest, [], one_line(wrong))


def rows(
    model: PsaVlm, policy: Policy, text: str, images: Iterable[Opened], batch: int
) -> Iterator[dict[str, Any]]:
    """A row of `psa_vlm.scan.output.schema` for each image, in their order.

    The next batch is read and decoded while one is assessed.
    """
    for some in _ahead(_batches(images, batch)):
        verdicts = iter(_verdicts(model, [one for one in some if not one.error], text))
        for one in some:
            verdict = Verdict.failed(one.error) if one.error else next(verdicts)
            yield _row(model, policy, one, verdict)


def _verdicts(model: PsaVlm, images: Sequence[Opened], text: str) -> list[Verdict]:
    """A failure is computed again alone, so that no image fails because of its neighbour."""
    if not images:
        return []
    try:
        verdicts = model.assess_batch([one.frames for one in images], [text] * len(images))
    except Exception as error:
        verdicts = [Verdict.failed(f"{type(error).__name__}: {error}")] * len(images)
    if len(images) == 1 or not any(verdict.error for verdict in verdicts):
        return verdicts
    return [
        _verdicts(model, [one], text)[0] if verdict.error else verdict
        for one, verdict in zip(images, verdicts, strict=True)
    ]


def _row(model: PsaVlm, policy: Policy, image: Opened, verdict: Verdict) -> dict[str, Any]:
    decision = policy.decide(verdict, model.taxonomy)
    problem = verdict.problem(model.taxonomy)
    seen = None if problem or verdict.worst is None else verdict.images[verdict.worst]
    return {
        "key": image.key,
        "sha256": image.sha256,
        "type": seen and seen.type,
        "level": seen and seen.level,
        "type_probs": seen and dict(seen.type_probs),
        "level_probs": seen and dict(seen.level_probs),
        "action": decision.action,
        "rule": decision.rule,
        "error": one_line(problem) if problem else None,
    }


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while some := list(islice(iterator, size)):
        yield some


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items; the next is made while one is used."""
    with ThreadPoolExecutor(1) as pool:
        pending = pool.submit(lambda: next(items, None))
        while (item := pending.result()) is not None:
            pending = pool.submit(lambda: next(items, None))
            yield item
