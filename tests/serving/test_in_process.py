"""The engine in this process: batches, one bad request among good ones, a bounded queue."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from PIL import Image

from psa_vlm.data.sample import Turn
from psa_vlm.errors import InputError, Overloaded, RequestError
from psa_vlm.inference import PsaVlm, Seen
from psa_vlm.model.verdict import Verdict
from psa_vlm.model.writing import Written
from psa_vlm.policy.policy import Decision, Policy
from psa_vlm.serving.engine import Answer, Ask, End
from psa_vlm.serving.in_process import InProcess

POLICY = Policy.shipped("strict")
RED = Image.new("RGB", (32, 32), "red")


def ask(text: str = "What is this?", policy: Policy = POLICY, max_tokens: int = 4) -> Ask:
    return Ask((RED,), (Turn("user", text),), policy, max_tokens)


@pytest.fixture()
def batches(model: PsaVlm, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The last words of what is seen together, and of what is answered together."""
    calls: list[list[str]] = []
    see_batch, answer_batch = model.see_batch, model.answer_batch

    def see(images: Any, texts: Sequence[str], histories: Any) -> list[Seen]:
        calls.append(["see", *texts])
        return see_batch(images, texts, histories)

    def answer(seen: Sequence[Seen], *args: Any) -> list[Written]:
        calls.append(["answer", *(one.conversation[-1].text for one in seen)])
        return answer_batch(seen, *args)

    monkeypatch.setattr(model, "see_batch", see)
    monkeypatch.setattr(model, "answer_batch", answer)
    return calls


async def whole(answer: Answer) -> tuple[Decision, str, End]:
    """Decision, text and end of an answer."""
    *words, end = [part async for part in answer.parts]
    assert isinstance(end, End)
    return answer.decision, "".join(map(str, words)), end


async def answered(engine: InProcess, ask: Ask) -> tuple[Decision, str, End]:
    return await whole(await engine.answer(ask))


def answers(engine: InProcess, *asks: Ask) -> list[Any]:
    async def all_of_them() -> list[Any]:
        async with engine:
            return await asyncio.gather(
                *(answered(engine, one) for one in asks), return_exceptions=True
            )

    return asyncio.run(all_of_them())


def alone(model: PsaVlm, one: Ask) -> tuple[Decision, str]:
    reply = model.reply(RED, one.turns[-1].text, one.policy, max_new_tokens=one.max_tokens)
    return reply.decision, reply.text


def test_requests_that_come_together_are_computed_together(
    model: PsaVlm, batches: list[list[str]], see: Any
) -> None:
    see("clean", "safe")
    asks = [ask(text) for text in "abcd"]
    found = answers(InProcess(model, wait=1.0, batch=3), *asks)
    assert batches[:3] == [["see", *"abc"], ["answer", *"abc"], ["see", "d"]]
    assert [(decision, text) for decision, text, _ in found] == [alone(model, a) for a in asks]


def test_each_request_has_its_own_policy_and_length(
    model: PsaVlm, batches: list[list[str]], see: Any
) -> None:
    see("privacy", "high")
    house = Policy.default()
    asks = [ask("a"), ask("b", house), ask("c", house, 5), ask("d", house)]
    found = answers(InProcess(model, wait=1.0, batch=4), *asks)
    assert batches == [["see", *"abcd"], ["answer", "b", "d"], ["answer", "c"]]
    assert [(decision, text) for decision, text, _ in found] == [alone(model, a) for a in asks]
    assert [(end.finish, end.usage.completion) for _, _, end in found] == [
        ("content_filter", 0),
        ("length", 4),
        ("length", 5),
        ("length", 4),
    ]


def test_the_decision_comes_before_the_first_word(model: PsaVlm, see: Any) -> None:
    see("clean", "safe")
    go = threading.Event()

    def wait(*_: Any) -> None:
        assert go.wait(30)

    hook = model.backbone.model.get_decoder().register_forward_pre_hook(wait)

    async def steps() -> list[str | End]:
        async with InProcess(model) as engine:
            answer = await engine.answer(ask(max_tokens=8))
            assert answer.decision.action == "allow"
            go.set()
            return [part async for part in answer.parts]

    try:
        parts = asyncio.run(steps())
    finally:
        hook.remove()
    assert len(parts) > 2 and all(isinstance(part, str) for part in parts[:-1])


def test_an_answer_that_is_closed_is_written_no_further(model: PsaVlm, see: Any) -> None:
    see("clean", "safe")
    steps = 0

    def count(*_: Any) -> None:
        nonlocal steps
        steps += 1

    async def leave() -> None:
        async with InProcess(model) as engine:
            answer = await engine.answer(ask(max_tokens=200))
            await anext(answer.parts)
            await answer.parts.aclose()
            assert [part async for part in answer.parts] == []

    hook = model.backbone.model.get_decoder().register_forward_pre_hook(count)
    try:
        asyncio.run(leave())
    finally:
        hook.remove()
    assert 0 < steps < 200


def test_earlier_turns_are_part_of_the_request(model: PsaVlm) -> None:
    turns = (Turn("system", "s"), Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"))

    async def verdict() -> Any:
        async with InProcess(model) as engine:
            return (await engine.assess(Ask((RED,), turns, POLICY, 4))).verdict

    found = asyncio.run(verdict())
    assert found.images == model.reply(RED, "c", POLICY, history=turns[:-1]).verdict.images
    assert found.images != model.assess(RED, "c").images


def test_a_bad_request_does_not_spoil_its_neighbours(model: PsaVlm, see: Any) -> None:
    see("clean", "safe")
    long = Turn("assistant", "b" * 1100)
    asks = [
        ask("a"),
        ask("b" * 9999),
        Ask((RED,), (Turn("user", "a"), long, Turn("user", "b")), POLICY, 4),
        ask("c"),
    ]
    first, second, third, fourth = answers(InProcess(model, wait=1.0, batch=4), *asks)
    assert isinstance(second, InputError)  # too long to assess
    assert isinstance(third, InputError)  # too long to answer
    assert first[:2] == alone(model, asks[0]) and fourth[:2] == alone(model, asks[3])


def test_an_override_is_for_its_request_alone(model: PsaVlm, see: Any) -> None:
    see("clean", "safe")
    given = [replace(ask(), concepts=one) for one in ({}, {"privacy": "high"}, {"privacy": "ill"})]
    plain, over, wrong = answers(InProcess(model, wait=1.0, batch=3), *given)
    assert (plain[0].action, plain[0].rule) == ("allow", "clean")
    assert (over[0].action, over[0].level) == ("refuse", "high")
    assert isinstance(wrong, InputError) and "'ill'" in str(wrong)


def test_a_failed_verdict_does_not_spread(model: PsaVlm, monkeypatch: pytest.MonkeyPatch) -> None:
    def see_batch(images: Any, texts: Sequence[str], histories: Any) -> list[Seen]:
        found = PsaVlm.see_batch(model, images, texts, histories)
        failed = Verdict.failed("broken")
        return [replace(one, verdict=failed) for one in found] if "b" in texts else found

    monkeypatch.setattr(model, "see_batch", see_batch)

    async def verdicts() -> list[Verdict | None]:
        async with InProcess(model, wait=1.0, batch=3) as engine:
            found = await asyncio.gather(*(engine.assess(ask(text)) for text in "abc"))
            return [one.verdict for one in found]

    assert [one and one.error for one in asyncio.run(verdicts())] == [None, "broken", None]


@pytest.fixture()
def slow(model: PsaVlm, monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """The model sees nothing until this is set."""
    go = threading.Event()

    def see_batch(*args: Any) -> list[Seen]:
        assert go.wait(30)
        return PsaVlm.see_batch(model, *args)

    monkeypatch.setattr(model, "see_batch", see_batch)
    return go


def test_one_more_than_may_wait_is_refused(model: PsaVlm, slow: threading.Event) -> None:
    async def crowd() -> None:
        async with InProcess(model, batch=1, wait=0, waiting=2) as engine:
            taken = [asyncio.create_task(engine.assess(ask()))]
            await asyncio.sleep(0.05)  # the first is computed, the next two wait
            taken += [asyncio.create_task(engine.assess(ask())) for _ in range(2)]
            await asyncio.sleep(0)
            assert engine.waiting == 2
            with pytest.raises(Overloaded) as caught:
                await engine.answer(ask())
            assert caught.value.retry_after >= 1
            slow.set()
            assert len(await asyncio.gather(*taken)) == 3

    asyncio.run(crowd())


def test_who_gave_up_is_not_computed(
    model: PsaVlm, batches: list[list[str]], slow: threading.Event, see: Any
) -> None:
    see("clean", "safe")

    async def impatient() -> None:
        async with InProcess(model, batch=1, wait=0) as engine:
            first = asyncio.create_task(answered(engine, ask("first")))
            await asyncio.sleep(0.05)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(engine.answer(ask("gone")), 0.05)
            slow.set()
            await first
            await answered(engine, ask("last"))

    asyncio.run(impatient())
    assert [call for call in batches if call[0] == "answer"] == [
        ["answer", "first"],
        ["answer", "last"],
    ]


def test_who_waits_when_the_service_stops_is_told(model: PsaVlm, slow: threading.Event) -> None:
    async def stop() -> list[Any]:
        async with InProcess(model, batch=1, wait=0) as engine:
            waiting = [asyncio.create_task(engine.assess(ask())) for _ in range(2)]
            await asyncio.sleep(0.05)
            slow.set()
        return await asyncio.gather(*waiting, return_exceptions=True)

    assert any(isinstance(one, RequestError) and one.status == 503 for one in asyncio.run(stop()))
