"""Hardening of the vision encoder: what changes, what does not, and what it is good for."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from psa_vlm.data.images import open_images
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import ConfigError, DataError, NoLanguageModel
from psa_vlm.model.backbone import Backbone
from psa_vlm.testbed.cases import write_samples
from psa_vlm.training.config import EncoderConfig, EncoderSchedule, Hardening
from psa_vlm.training.encoder import run_encoder, train_encoder
from psa_vlm.training.fit import Work
from psa_vlm.training.hardening import Hardener

from ..conftest import Psa

SCHEDULE = EncoderSchedule(
    eps=16,
    steps=2,
    epochs=8,
    batch_size=3,
    learning_rate=3e-3,
    log_every=1,
    checkpoint_every=2,
)


def config(out: Path, backbone: Path, **fields: Any) -> EncoderConfig:
    given = {"encoder": SCHEDULE, "report_to": (), **fields}
    return EncoderConfig(backbone=str(backbone), out=out, **given)


def moved(backbone: Backbone, samples: list[Sample]) -> float:
    """How far an attack brings h_o from what it is."""
    torch.manual_seed(0)
    shown = [open_images(sample.images[0])[0] for sample in samples[::2]]
    plain = backbone.encode(shown).maps

    def distance(maps: list[Tensor], rows: list[int]) -> Tensor:
        pairs = [(one, plain[row]) for one, row in zip(maps, rows, strict=True)]
        return torch.stack([(one - two).square().mean() / two.var() for one, two in pairs]).sum()

    found = Hardener(backbone, Hardening(eps=16, steps=8))(shown, distance)
    return float(distance(found, list(range(len(shown)))))


def test_only_the_vision_encoder_learns_and_attacks_move_it_less(
    backbone: Backbone, samples: list[Sample], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    movable = moved(backbone, samples)
    history = train_encoder(backbone, samples, SCHEDULE, Work(tmp_path, report_to=()))
    after = backbone.model.state_dict()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all(".vision_tower." in name for name in changed)
    assert history[-1]["loss"] < history[0]["loss"]
    assert moved(backbone, samples) < 0.8 * movable
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_an_image_is_learned_once_an_epoch(
    backbone: Backbone, samples: list[Sample], tmp_path: Path
) -> None:
    """Six samples show three images, so that a batch of three is a whole epoch."""
    history = train_encoder(backbone, samples, SCHEDULE, Work(tmp_path, report_to=()))
    assert [point["step"] for point in history] == list(range(1, SCHEDULE.epochs + 1))


def test_what_is_written_is_a_base_model(
    llava_dir: Path, samples: list[Sample], tmp_path: Path
) -> None:
    told = config(tmp_path / "base", llava_dir)
    hardened = run_encoder(told, samples)
    again = Backbone.from_pretrained(told.out)
    torch.testing.assert_close(
        again.model.state_dict(), hardened.model.state_dict(), rtol=0, atol=0
    )
    assert again.processor.chat_template == hardened.processor.chat_template
    assert json.loads((told.out / "history.json").read_text())["encoder"]
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
    written = {path: path.stat().st_mtime_ns for path in told.out.iterdir()}
    run_encoder(told, samples)  # finished already
    assert written == {path: path.stat().st_mtime_ns for path in told.out.iterdir()}
    other = told.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match="a run with other seed"):
        run_encoder(other, samples)


def test_samples_without_images_teach_nothing(backbone: Backbone, tmp_path: Path) -> None:
    words = [Sample("t", (), (Turn("user", "Hi?"), Turn("assistant", "Hello.")))]
    with pytest.raises(DataError, match="have no images"):
        train_encoder(backbone, words, SCHEDULE, Work(tmp_path))
    with pytest.raises(DataError, match="have no images"):
        run_encoder(config(tmp_path / "base", Path(backbone.source)), words)
    assert not list(tmp_path.iterdir())


def test_a_dual_encoder_is_told_so(
    make_dual_encoder: Callable[[str], Path], samples: list[Sample], tmp_path: Path
) -> None:
    with pytest.raises(NoLanguageModel, match="hardening a vision encoder"):
        run_encoder(config(tmp_path / "base", make_dual_encoder("CLIP")), samples)
    assert not list(tmp_path.iterdir())  # the same folder can be used for another base


def test_trained_weights_are_float32(tmp_path: Path, llava_dir: Path, psa: Psa) -> None:
    file = tmp_path / "encoder.yaml"
    file.write_text(f"backbone: {llava_dir}\nout: {tmp_path / 'base'}\ndtype: bfloat16\n")
    told = psa("train", "encoder", file)
    assert told.code == 2
    assert told.err.strip().endswith("dtype: Input should be 'float32', got 'bfloat16'")


def test_the_command_reads_a_set_and_says_what_comes_next(
    tmp_path: Path, llava_dir: Path, psa: Psa
) -> None:
    write_samples(tmp_path / "scenes", 4, seed=0)
    file = tmp_path / "encoder.yaml"
    file.write_text(
        f"backbone: {llava_dir}\n"
        f"data: [{{path: {tmp_path / 'scenes/samples.jsonl'}}}]\n"
        f"out: {tmp_path / 'base'}\n"
        "encoder: {epochs: 1, steps: 1, batch_size: 4}\n"
    )
    told = psa("train", "encoder", file)
    assert told.code == 0, told.err
    assert f"next: psa-vlm train stage1 ... --set backbone={tmp_path / 'base'}" in told.out
    Backbone.from_pretrained(tmp_path / "base")
