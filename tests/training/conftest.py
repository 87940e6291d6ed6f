"""A handful of labelled, answered samples, and schedules of a few steps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.model.backbone import Backbone
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training import concepts
from psa_vlm.training.config import ConceptsConfig, LoraConfig, TokensConfig
from psa_vlm.training.fit import Work

STEPS: dict[str, Any] = {
    "epochs": 2,
    "batch_size": 2,
    "learning_rate": 1e-2,
    "log_every": 1,
    "checkpoint_every": 2,
}
CONCEPTS = ConceptsConfig(hidden=16, tokens=2, heads=4, depth=1, encode_batch=2, **STEPS)
TOKENS = TokensConfig(count=3, **STEPS)
LORA = LoraConfig(r=2, alpha=4, **STEPS)


@pytest.fixture(scope="session")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Sample]:
    """Six samples about three image files, two questions to each."""
    folder = tmp_path_factory.mktemp("images")
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (40, 50, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return [
        Sample(
            id=f"s{i}",
            images=(folder / f"{i // 2}.png",),
            conversation=(Turn("user", f"What is {i}?"), Turn("assistant", f"It is {i}.")),
            type="clean" if i % 2 else "privacy",
            level="safe" if i % 2 else "high",
        )
        for i in range(6)
    ]


@pytest.fixture(scope="session")
def schedules() -> dict[str, Any]:
    """The sections `concepts`, `tokens` and `lora`."""
    return {"concepts": CONCEPTS, "tokens": TOKENS, "lora": LORA}


@pytest.fixture()
def backbone(llava_dir: Path) -> Backbone:
    return Backbone.from_pretrained(llava_dir)


class Fitted:
    """Stands in for `fit`: keeps what it would train, and trains nothing."""

    def __call__(self, task: Any, rows: Any, collate: Any, config: Any, work: Any) -> list[Any]:
        self.task, self.batch = task, collate(rows.rows)
        return []


@pytest.fixture()
def fitted(monkeypatch: pytest.MonkeyPatch) -> Fitted:
    """What the concepts would be fitted with: `task`, and `batch` of all the samples."""
    stub = Fitted()
    monkeypatch.setattr(concepts, "fit", stub)
    return stub


@pytest.fixture()
def train(
    backbone: Backbone, samples: list[Sample], schedules: dict[str, Any], tmp_path: Path
) -> Callable[..., Any]:
    """Trains the concepts on `samples` or on others, with changes of their schedule."""

    def run(some: list[Sample] = samples, **changes: Any) -> Any:
        config = schedules["concepts"].model_copy(update=changes)
        return concepts.train_concepts(backbone, Taxonomy.default(), some, config, Work(tmp_path))

    return run


@pytest.fixture()
def images_dir(samples: list[Sample]) -> Path:
    """Where the image files of `samples` are."""
    image = samples[0].images[0]
    assert isinstance(image, Path)
    return image.parent
