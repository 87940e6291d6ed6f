"""Inspect without a network, and models that answer without weights."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from .. import layouts
from ..files import write_rows


@pytest.fixture(scope="session", autouse=True)
def inspect_stays_here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What Inspect keeps for itself (traces, its cache) goes to a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("inspect")
        for name in ("XDG_DATA_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
            patch.setenv(name, str(home))
        patch.setenv("INSPECT_CACHE_DIR", str(home / "cache"))
        yield


@pytest.fixture(scope="module")
def inspecting() -> Iterator[None]:
    """For tests that run Inspect, which leaves a stream of its own to the garbage collector."""
    yield
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture()
def scripted(inspecting: None) -> Callable[..., Any]:
    """Makes a model of Inspect's that answers by a function of the words it is asked."""
    from inspect_ai.model import GenerateConfig, Model, ModelAPI, ModelOutput, modelapi

    class Scripted(ModelAPI):
        def __init__(self, model_name: str, say: Callable[[str], str], **more: Any) -> None:
            super().__init__(model_name)
            self.say = say
            self.calls: list[Any] = []

        async def generate(
            self, input: list[Any], tools: Any, tool_choice: Any, config: Any
        ) -> ModelOutput:
            self.calls.append(input)
            return ModelOutput.from_content(self.model_name, self.say(input[-1].text))

    @modelapi(name="scripted")
    def provider() -> type[ModelAPI]:
        return Scripted

    def make(say: Callable[[str], str], name: str = "one") -> Model:
        from inspect_ai.model import get_model

        return get_model(f"scripted/{name}", memoize=False, say=say, config=GenerateConfig())

    return make


@pytest.fixture(scope="session")
def figstep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """FigStep's layout with three neutral rows."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("figstep")
    names = ("Fraud", "Fraud", "Legal Opinion")
    rows = [
        layouts.FIGSTEP | {"category_id": number, "category_name": name}
        for number, name in enumerate(names, 1)
    ]
    write_rows(folder / "data/question/safebench.csv", rows)
    (folder / "data/images/SafeBench").mkdir(parents=True)
    for number in range(1, 4):
        image = Image.new("RGB", (32, 32), (80 * number, 0, 0))
        image.save(folder / f"data/images/SafeBench/query_ForbidQI_{number}_1_6.png")
    return folder
