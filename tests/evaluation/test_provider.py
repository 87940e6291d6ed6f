"""Our models behind Inspect: what they are given, what comes back, and figures end to end."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from inspect_ai.log import list_eval_logs
from inspect_ai.model import (
    ChatMessageAssistant,
    ChatMessageSystem,
    ChatMessageUser,
    ContentAudio,
    ContentImage,
    ContentText,
    GenerateConfig,
)

from psa_vlm.data.sample import Turn
from psa_vlm.errors import ConfigError, ImageError, InputError
from psa_vlm.evaluation.baselines import Ask, Told
from psa_vlm.evaluation.outcomes import read_log
from psa_vlm.evaluation.provider import Batches, PsaAPI, to_ask
from psa_vlm.evaluation.running import Asked, evaluate, model_named
from psa_vlm.evaluation.tasks import benchmark_named
from psa_vlm.model.writing import Written

pytestmark = [  # of Inspect's own
    pytest.mark.filterwarnings("ignore:The 'initial' parameter:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Unclosed <MemoryObject:ResourceWarning"),
]


def url(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def user(text: str, *images: str) -> ChatMessageUser:
    shown = [ContentImage(image=image) for image in images]
    return ChatMessageUser(content=[*shown, ContentText(text=text)])


def test_a_conversation_of_inspects_as_ours(picture: Path) -> None:
    told = to_ask(
        [
            ChatMessageSystem(content="Be kind."),
            user("What is it?", url(picture)),
            ChatMessageAssistant(content="A square."),
            user("And now?"),
        ]
    )
    assert told.images == (picture.read_bytes(),)
    assert told.turns == (
        Turn("system", "Be kind."),
        Turn("user", "What is it?"),
        Turn("assistant", "A square."),
        Turn("user", "And now?"),
    )


@pytest.mark.parametrize("place", ["http://127.0.0.1/a.png", "a.png", "data:image/png;base64,?"])
def test_an_image_from_elsewhere_is_refused(place: str) -> None:
    with pytest.raises(ImageError):
        to_ask([user("What is it?", place)])


def test_no_content_is_dropped_in_silence() -> None:
    sound = ContentAudio(audio="data:audio/wav;base64,", format="wav")
    with pytest.raises(InputError, match="not audio"):
        to_ask([ChatMessageUser(content=[sound, ContentText(text="Listen.")])])


def test_a_run_answers_with_usage_and_its_decision(run_dir: Path, picture: Path) -> None:
    api = PsaAPI(str(run_dir))

    async def ask(limit: int) -> Any:
        config = GenerateConfig(max_tokens=limit)
        return await api.generate([user("What is it?", url(picture))], [], "none", config)

    output = asyncio.run(ask(3))
    api.close()
    assert output.metadata["method"] == "psa stage I"
    decision = output.metadata["decision"]
    assert decision["action"] in ("allow", "hint", "refuse")
    assert output.metadata["verdict"]["images"][0]["type_probs"]
    if decision["action"] == "refuse":
        assert output.completion == decision["refusal"]
        assert output.usage.output_tokens == 0
    else:
        assert output.usage.input_tokens > 16 and output.usage.output_tokens <= 3


def test_what_comes_together_is_computed_together_and_fails_alone() -> None:
    groups: list[list[str]] = []

    def method(asks: Sequence[Ask], limit: int) -> list[Told]:
        words = [ask.turns[-1].text for ask in asks]
        groups.append(words)
        if "bad" in words:
            raise InputError("bad")
        return [Told(Written(word.upper(), limit, 1, False)) for word in words]

    batches = Batches(method, 3)

    async def all_of(*words: str) -> list[Any]:
        asks = [Ask((), (Turn("user", word),)) for word in words]
        waiting = [batches.answer(ask, 5) for ask in asks]
        return await asyncio.gather(*waiting, return_exceptions=True)

    good = asyncio.run(all_of("a", "b"))
    assert [one.written.text for one in good] == ["A", "B"]
    mixed = asyncio.run(all_of("a", "bad", "c"))
    batches.close()
    assert [type(one).__name__ for one in mixed] == ["Told", "InputError", "Told"]
    assert max(map(len, groups)) > 1


@pytest.mark.usefixtures("inspecting")
def test_figstep_end_to_end(run_dir: Path, figstep: Path, tmp_path: Path) -> None:
    """Every request is asked as often as told, by a run and by a baseline of its base model."""
    samples = benchmark_named("figstep").read(figstep)
    asked = Asked(epochs=2, limit=2)
    for baseline, method in ((None, "psa stage I"), ("adashield", "adashield")):
        model = model_named(str(run_dir), baseline=baseline)
        results, log = evaluate("figstep", samples, model, asked, tmp_path, 4)
        assert (results.method, results.requests, results.epochs) == (method, 2, 2)
        assert results.failed == 0 and len(log.samples or []) == 4
        [whole] = [f for f in results.figures if (f.group, f.judge) == ("all", "phrases")]
        assert whole.measure == "attack success" and whole.n + whole.unscored // 2 >= 2
        assert read_log(tmp_path).location == log.location
    assert len(list_eval_logs(str(tmp_path))) == 2


def test_a_model_that_is_none(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        model_named(str(tmp_path / "no"))
    with pytest.raises(InputError, match="baseline are for a model in a folder"):
        model_named("scripted/one", baseline="ecso")
    with pytest.raises(ConfigError, match="'nonsense' is unknown; known: plain"):
        model_named(str(run_dir), baseline="nonsense")
