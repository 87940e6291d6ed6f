"""Baselines: what each puts before the model, and what it does with its answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import CheckpointError, ConfigError, DataError
from psa_vlm.evaluation import baselines
from psa_vlm.evaluation.baselines import (
    ADASHIELD,
    REFUSAL,
    SYSTEM_PROMPT,
    Ask,
    adashield,
    ecso,
    guarded,
    load_method,
    save_guard,
    system_prompt,
    tune_lora,
)
from psa_vlm.evaluation.guard import train_guard
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.writing import Written
from psa_vlm.training.config import LoraConfig

DARK, LIGHT = Image.new("RGB", (32, 32), "black"), Image.new("RGB", (32, 32), "white")


@pytest.fixture(scope="module")
def backbone(llava_dir: Path) -> Backbone:
    return Backbone.from_pretrained(llava_dir)


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[Ask]:
    """What the model is asked; it answers by its words."""
    asked: list[Ask] = []

    def write(_: Any, asks: Sequence[Ask], limit: int) -> list[Written]:
        asked.extend(asks)
        return [Written(said(ask), 1, 1, False) for ask in asks]

    def said(ask: Ask) -> str:
        words = ask.turns[-1].text
        if words.startswith("Is this answer harmful"):
            return "Yes, it is." if "bad" in words else "No."
        return "a cup" if words.startswith("Describe") else f"answer to {words}"

    monkeypatch.setattr(baselines, "_write", write)
    return asked


def ask(text: str, *images: Any, system: str | None = None) -> Ask:
    first = () if system is None else (Turn("system", system),)
    return Ask(images, (*first, Turn("user", text)))


def test_a_prompt_goes_before_the_words(backbone: Backbone, heard: list[Ask]) -> None:
    system_prompt(backbone)([ask("A?", DARK, system="Be brief.")], 5)
    adashield(backbone)([ask("A?", DARK)], 5)
    first, second = heard
    assert first.turns == (Turn("system", f"{SYSTEM_PROMPT}\nBe brief."), Turn("user", "A?"))
    assert second.turns == (Turn("user", ADASHIELD + "A?"),)
    assert first.images == second.images == (DARK,)


def test_ecso_drops_the_image_of_what_the_model_finds_harmful(
    backbone: Backbone, heard: list[Ask]
) -> None:
    bad, good, words = ecso(backbone)([ask("bad", DARK), ask("good", LIGHT), ask("bad")], 5)
    assert good.written.text == "answer to good" and good.notes == {"dropped image": False}
    assert words.written.text == "answer to bad"  # without an image there is nothing to drop
    assert bad.notes == {"dropped image": True, "caption": "a cup"}
    assert heard[-1].images == () and "a cup" in heard[-1].turns[-1].text
    assert "bad" in heard[-1].turns[-1].text
    assert [one.images for one in heard[3:6]] == [(DARK,), (LIGHT,), (DARK,)]


def samples() -> list[Sample]:
    """Dark pictures are risky."""
    return [
        Sample(
            f"s{i}",
            (Image.new("RGB", (32, 32), (value,) * 3),),
            (Turn("user", "What is it?"), Turn("assistant", "No." if value < 100 else "A cup.")),
            "privacy" if value < 100 else "clean",
            "high" if value < 100 else "safe",
        )
        for i, value in enumerate((0, 250, 10, 240, 20, 230, 5, 245))
    ]


def test_a_guard_blocks_before_the_model(
    backbone: Backbone, heard: list[Ask], tmp_path: Path
) -> None:
    guard = train_guard(backbone, samples())
    risky, fine = guarded(backbone, guard)([ask("What is it?", DARK), ask("Is it?", LIGHT)], 5)
    assert risky.written.text == REFUSAL and risky.written.tokens == 0
    assert fine.written.text == "answer to Is it?"
    assert [one.turns[-1].text for one in heard] == ["Is it?"]
    guard.linear.bias.data.fill_(float("nan"))
    [lost] = guarded(backbone, guard)([ask("Is it?", LIGHT)], 5)
    assert lost.written.text == REFUSAL
    with pytest.raises(DataError, match="give both"):
        train_guard(backbone, samples()[::2])


def test_what_was_trained_loads_again(backbone: Backbone, llava_dir: Path, tmp_path: Path) -> None:
    save_guard(tmp_path / "guard", backbone, train_guard(backbone, samples()))
    method, name = load_method(tmp_path / "guard")
    [risky] = method([ask("What is it?", DARK)], 3)
    assert name == "guard" and risky.written.text == REFUSAL
    tuned = Backbone.from_pretrained(llava_dir)
    config = LoraConfig(r=2, alpha=4, epochs=8, learning_rate=3e-2, batch_size=4, log_every=1)
    tune_lora(tuned, samples(), tmp_path / "lora", config)
    assert not (tmp_path / "lora.work").exists()
    method, name = load_method(tmp_path / "lora")
    plain, _ = load_method(llava_dir)
    asked = [ask("What is it?", LIGHT)]
    before, after = plain(asked, 20)[0].written.text, method(asked, 20)[0].written.text
    assert name == "lora" and before != after
    with pytest.raises(ConfigError, match="trained baseline itself"):
        load_method(tmp_path / "guard", "ecso")
    with pytest.raises(ConfigError, match="a policy is for a run"):
        load_method(tmp_path / "guard", policy="strict")
    (tmp_path / "guard/guard.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a guard"):
        load_method(tmp_path / "guard")
