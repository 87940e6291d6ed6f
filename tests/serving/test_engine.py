"""The engine in this process: batches, one bad request among good ones, a bounded queue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from psa_vlm.data.sample import Turn
from psa_vlm.errors import InputError, Overloaded
from psa_vlm.inference import PsaVlm, Reply
from psa_vlm.model.verdict import Verdict
from psa_vlm.policy.policy import Policy
from psa_vlm.serving.engine import Ask, InProcess

POLICY = Policy.shipped("strict")
RED = Image.new("RGB", (32, 32), "red")


def ask(text: str = "What is this?", policy: Policy = POLICY, max_tokens: int = 4) -> Ask:
    return Ask((RED,), (Turn("user", text),), policy, max_tokens)


@pytest.fixture(scope="module")
def model(run_dir: Path) -> PsaVlm:
    return PsaVlm.from_pretrained(run_dir)


@pytest.fixture()
def batches(model: PsaVlm, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The texts of each call of the model, which goes on to compute them."""
    seen: list[list[str]] = []
    reply_batch = model.reply_batch

    def spy(images: Any, texts: Sequence[str], *args: Any, **named: Any) -> list[Reply]:
        seen.append(list(texts))
        return reply_batch(images, texts, *args, **named)

    monkeypatch.setattr(model, "reply_batch", spy)
    return seen


async def replies(engine: InProcess, *asks: Ask) -> list[Any]:
    async with engine:
        return await asyncio.gather(*map(engine.reply, asks), return_exceptions=True)


def test_requests_that_come_together_are_computed_together(
    model: PsaVlm, batches: list[list[str]]
) -> None:
    found = asyncio.run(replies(InProcess(model, wait=1.0, batch=3), *map(ask, "abcd")))
    assert batches == [["a", "b", "c"], ["d"]]
    alone = [model.reply(RED, text, POLICY, max_new_tokens=4) for text in "abcd"]
    assert [one.text for one in found] == [one.text for one in alone]
    assert [one.decision for one in found] == [one.decision for one in alone]


def test_each_request_has_its_own_policy_and_length(
    model: PsaVlm, batches: list[list[str]]
) -> None:
    house = Policy.default()
    asks = [ask("a"), ask("b", house), ask("c", house, 5), ask("d")]
    found = asyncio.run(replies(InProcess(model, wait=1.0, batch=4), *asks))
    assert batches == [["a", "d"], ["b"], ["c"]]
    alone = [
        model.reply(RED, one.turns[-1].text, one.policy, max_new_tokens=one.max_tokens)
        for one in asks
    ]
    assert [one.decision for one in found] == [one.decision for one in alone]


def test_earlier_turns_are_part_of_the_request(model: PsaVlm) -> None:
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))
    (found,) = asyncio.run(replies(InProcess(model), Ask((RED,), turns, POLICY, 4)))
    alone = model.reply(RED, "c", POLICY, history=turns[:-1], max_new_tokens=4)
    assert found.verdict.images == alone.verdict.images
    assert found.verdict.images != model.assess(RED, "c").images


def test_a_bad_request_does_not_spoil_its_neighbours(model: PsaVlm) -> None:
    asks = [ask("a"), ask("b" * 9999), ask("c")]
    first, second, third = asyncio.run(replies(InProcess(model, wait=1.0, batch=3), *asks))
    assert isinstance(second, InputError)
    assert first.verdict.error is None and third.verdict.error is None


def test_a_failed_verdict_does_not_spread(model: PsaVlm, monkeypatch: pytest.MonkeyPatch) -> None:
    def assess_batch(images: Any, texts: Sequence[str]) -> list[Verdict]:
        if "b" in texts:
            return [Verdict.failed("broken") for _ in texts]
        return PsaVlm.assess_batch(model, images, texts)

    monkeypatch.setattr(model, "assess_batch", assess_batch)

    async def verdicts() -> list[Verdict]:
        async with InProcess(model, wait=1.0, batch=3) as engine:
            return await asyncio.gather(*(engine.assess(ask(text)) for text in "abc"))

    assert [one.error for one in asyncio.run(verdicts())] == [None, "broken", None]


@pytest.fixture()
def slow(model: PsaVlm, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The model computes nothing until this is set."""
    go = threading.Event()

    def reply_batch(images: Any, texts: Sequence[str], *_: Any, **__: Any) -> list[Reply]:
        assert go.wait(30)
        return PsaVlm.reply_batch(model, images, texts, POLICY, max_new_tokens=1)

    monkeypatch.setattr(model, "reply_batch", reply_batch)
    return go


def test_one_more_than_may_wait_is_refused(model: PsaVlm, slow: threading.Event) -> None:
    async def crowd() -> None:
        async with InProcess(model, batch=1, wait=0, waiting=2) as engine:
            taken = [asyncio.create_task(engine.reply(ask()))]
            await asyncio.sleep(0.05)  # the first is computed, the next two wait
            taken += [asyncio.create_task(engine.reply(ask())) for _ in range(2)]
            await asyncio.sleep(0)
            assert engine.waiting == 2
            with pytest.raises(Overloaded) as caught:
                await engine.reply(ask())
            assert caught.value.retry_after >= 1
            slow.set()
            assert len(await asyncio.gather(*taken)) == 3

    asyncio.run(crowd())


def test_who_gave_up_is_not_computed(
    model: PsaVlm, slow: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    wait = model.reply_batch

    def spy(images: Any, asked: Sequence[str], *args: Any, **named: Any) -> list[Reply]:
        texts.extend(asked)
        return wait(images, asked, *args, **named)

    monkeypatch.setattr(model, "reply_batch", spy)

    async def impatient() -> None:
        async with InProcess(model, batch=1, wait=0) as engine:
            first = asyncio.create_task(engine.reply(ask("first")))
            await asyncio.sleep(0.05)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.reply(ask("gone")), 0.05)
            slow.set()
            await first
            await engine.reply(ask("last"))

    asyncio.run(impatient())
    assert texts == ["first", "last"]
