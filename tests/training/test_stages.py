"""Both stages as runs: what they write, what they leave alone, and which runs they refuse."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from PIL import Image

from psa_vlm.data.contamination import Fingerprints, contamination
from psa_vlm.data.sample import Sample
from psa_vlm.errors import CheckpointError, ConfigError, DataError
from psa_vlm.inference import PsaVlm
from psa_vlm.policy.policy import Policy
from psa_vlm.sharing import provenance
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training import runs, stage2
from psa_vlm.training.config import DataFile, Stage1Config, Stage2Config
from psa_vlm.training.hints import hints_for
from psa_vlm.training.runs import Run, fingerprint, read_samples, write_json
from psa_vlm.training.stage1 import run_stage1
from psa_vlm.training.stage2 import run_stage2


@pytest.fixture(scope="module")
def config(
    tmp_path_factory: pytest.TempPathFactory, llava_dir: Path, schedules: Any
) -> Stage1Config:
    short = {"epochs": 1, "batch_size": 6}
    return Stage1Config(
        backbone=str(llava_dir),
        out=tmp_path_factory.mktemp("stages") / "first",
        concepts=schedules["concepts"].model_copy(update=short),
        tokens=schedules["tokens"].model_copy(update=short),
    )


@pytest.fixture(scope="module")
def aligned(config: Stage1Config, samples: list[Sample]) -> PsaVlm:
    return run_stage1(config, samples)


def test_a_run_folder_is_whole(aligned: PsaVlm, config: Stage1Config) -> None:
    history = json.loads((config.out / "history.json").read_text())
    assert {name: len(points) for name, points in history.items()} == {"concepts": 1, "tokens": 1}
    for part in history:
        assert list((config.out / "tensorboard" / part).glob("events.out.*"))
    assert not config.out.with_name("first.work").exists()
    loaded = PsaVlm.from_pretrained(config.out)
    for name, tensor in aligned.bottleneck.state_dict().items():
        assert torch.equal(tensor, loaded.bottleneck.state_dict()[name])
    for name, tensor in aligned.backbone.model.state_dict().items():
        assert torch.equal(tensor, loaded.backbone.model.state_dict()[name])


def test_a_run_folder_knows_what_it_was_trained_on(
    aligned: PsaVlm, config: Stage1Config, samples: list[Sample], tmp_path: Path
) -> None:
    seen = Fingerprints.load(config.out)
    assert seen is not None
    assert contamination(samples, seen).images == len(samples)
    new = replace(samples[0], images=(Image.radial_gradient("L"),))
    assert contamination([new], seen).to_dict() | {"ids": ()} == {
        "samples": 1,
        "images": 0,
        "near_images": 0,
        "prompts": 1,
        "both": 0,
        "ids": (),
    }


def test_a_run_folder_says_what_it_was_made_from(
    aligned: PsaVlm, config: Stage1Config, llava_dir: Path
) -> None:
    known = provenance.load(config.out)
    (stage,) = known["stages"]
    assert (known["base"]["folder"], known["note"]) == (llava_dir.name, None)
    assert (stage["stage"], stage["data"]["samples"]) == (1, 6)
    assert stage["data"]["type"] == {"privacy": 3, "clean": 3}
    assert stage["config"]["tokens"]["count"] == 3 and "out" not in stage["config"]
    assert "By type: privacy 3, clean 3." in (config.out / "README.md").read_text()


def test_a_finished_run_is_not_trained_again(
    aligned: PsaVlm,
    config: Stage1Config,
    samples: list[Sample],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("psa_vlm.training.stage1.train_concepts", lambda *a: pytest.fail("again"))
    again = run_stage1(config, samples)
    assert "already finished with this configuration" in caplog.text
    for name, tensor in aligned.bottleneck.state_dict().items():
        assert torch.equal(tensor, again.bottleneck.state_dict()[name])


def test_another_configuration_needs_another_folder(
    aligned: PsaVlm, config: Stage1Config, samples: list[Sample], tmp_path: Path
) -> None:
    other = config.model_copy(update={"seed": 1})
    with pytest.raises(ConfigError, match=r"holds a run with other seed; choose another out"):
        run_stage1(other, samples)
    with pytest.raises(ConfigError, match="with other samples"):
        run_stage1(config, samples[:-1])
    begun = config.model_copy(update={"out": tmp_path / "begun"})
    weights = [aligned.bottleneck]
    Run(1, begun, samples, weights)
    Run(1, begun, samples, weights)
    with pytest.raises(ConfigError, match=r"begun\.work: holds a run with other seed"):
        Run(1, begun.model_copy(update={"seed": 1}), samples, weights)
    with pytest.raises(ConfigError, match="with other weights"):
        Run(1, begun, samples, [torch.nn.Linear(2, 2)])


def test_a_folder_of_other_things_is_left_alone(
    config: Stage1Config, samples: list[Sample], tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match="exists and is no training run"):
        run_stage1(config.model_copy(update={"out": tmp_path}), samples)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_bad_samples_show_before_anything_is_written(
    config: Stage1Config, samples: list[Sample], tmp_path: Path
) -> None:
    new = config.model_copy(update={"out": tmp_path / "run"})
    for change in ({"type": None}, {"conversation": samples[0].conversation[:1]}):
        with pytest.raises(DataError, match="1 of 6 samples"):
            run_stage1(new, [replace(samples[0], **change), *samples[1:]])
    assert not list(tmp_path.iterdir())


# --- stage II ------------------------------------------------------------------------------------


def certain(model: PsaVlm, type: str, level: str) -> PsaVlm:
    """The model with a bottleneck that always gives this verdict."""
    head = model.bottleneck.head
    with torch.no_grad():
        head.to_type.bias[model.taxonomy.type_id(type)] = 1e4
        head.to_level.bias[model.taxonomy.level_id(level)] = 1e4
    return model


def test_hints_are_those_of_inference(
    aligned: PsaVlm, config: Stage1Config, samples: list[Sample]
) -> None:
    model = certain(PsaVlm.from_pretrained(config.out), "privacy", "medium")
    expected = Policy.default().hints["medium"].format(type="privacy")
    text_only = replace(samples[1], images=())
    assert hints_for(model, [samples[0], text_only, samples[2]]) == [expected, None, expected]
    assert hints_for(model, [text_only]) == [None]
    assert model.reply(list(samples[0].images), "?", max_new_tokens=1).decision.hint == expected
    clean = certain(PsaVlm.from_pretrained(config.out), "clean", "high")
    assert hints_for(clean, samples[:1]) == [None]


def test_misstated_hints_are_milder_than_the_strongest(
    aligned: PsaVlm, config: Stage1Config, samples: list[Sample]
) -> None:
    model = certain(PsaVlm.from_pretrained(config.out), "privacy", "high")
    told = {level: text.format(type="privacy") for level, text in Policy.default().hints.items()}
    many = samples[:1] * 60
    assert set(hints_for(model, many, 0.0)) == {told["high"]}
    assert set(hints_for(model, many, 1.0)) == {told["medium"], told["low"], None}
    some = hints_for(model, many, 0.5, Random(1))
    assert 15 < some.count(told["high"]) < 45
    assert some == hints_for(model, many, 0.5, Random(1)) != hints_for(model, many, 0.5, Random(2))
    low = certain(PsaVlm.from_pretrained(config.out), "privacy", "low")
    assert set(hints_for(low, many, 1.0)) == {told["medium"], None}
    clean = certain(PsaVlm.from_pretrained(config.out), "clean", "high")
    assert hints_for(clean, samples[:1], 1.0) == [None]


def test_stage2_trains_beside_the_hints_and_leaves_the_rest(
    aligned: PsaVlm,
    config: Stage1Config,
    samples: list[Sample],
    schedules: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    train, rows = stage2.train_lora, []

    def spy(backbone: Any, dialogues: Any, *rest: Any) -> Any:
        rows.extend(dialogues)
        return train(backbone, dialogues, *rest)

    monkeypatch.setattr(stage2, "train_lora", spy)
    policy = Policy.default().model_copy(update={"off": ("fairness",)})
    policy.to_yaml(tmp_path / "policy.yaml")
    second = Stage2Config(
        model=config.out,
        out=tmp_path / "second",
        policy=tmp_path / "policy.yaml",
        lora=schedules["lora"].model_copy(update={"epochs": 1, "batch_size": 6}),
        assess_batch=4,
        report_to=(),
    )
    earlier = replace(samples[0], images=(Image.linear_gradient("L"),))
    Fingerprints.of([earlier, *samples]).save(config.out)
    model = run_stage2(second, samples)
    assert [row.hint for row in rows] == hints_for(PsaVlm.from_pretrained(config.out), samples)
    for name in ("bottleneck.safetensors", "safety_tokens.safetensors"):
        assert (second.out / name).read_bytes() == (config.out / name).read_bytes()
    seen = Fingerprints.load(second.out)
    assert seen and contamination([earlier, *samples], seen).images == 1 + len(samples)
    assert [stage["stage"] for stage in provenance.load(second.out)["stages"]] == [1, 2]
    assert "LoRA on the language model" in (second.out / "README.md").read_text()
    loaded = PsaVlm.from_pretrained(second.out)
    assert policy.hash == model.policy.hash == loaded.policy.hash
    for name, tensor in model.backbone.model.state_dict().items():
        assert torch.equal(tensor, loaded.backbone.model.state_dict()[name]), name
    changed = {
        name.replace(".base_layer", "")
        for name, tensor in loaded.backbone.model.state_dict().items()
        if "lora_" not in name
        and not torch.equal(
            tensor, aligned.backbone.model.state_dict()[name.replace(".base_layer", "")]
        )
    }
    assert changed and all("language_model.layers" in name for name in changed)


# --- data and records ----------------------------------------------------------------------------


def test_samples_are_read_from_the_configuration(tmp_path: Path, images_dir: Path) -> None:
    row = {
        "image": "0.png",
        "safe_type": 4,
        "safe_level": 3,
        "conversations": [{"from": "USER", "value": "?"}, {"from": "ASSISTANT", "value": "!"}],
    }
    (tmp_path / "a.json").write_text(json.dumps([row]))
    file = DataFile(path=tmp_path / "a.json", images_dir=images_dir)
    config = Stage1Config(backbone="b", out=tmp_path / "run", data=(file, file))
    read = read_samples(config, Taxonomy.default())
    assert [(sample.type, sample.level, sample.answer) for sample in read] == [
        ("privacy", "high", "!")
    ] * 2
    with pytest.raises(ConfigError, match="data is empty; name a file"):
        read_samples(config.model_copy(update={"data": ()}), Taxonomy.default())


def test_fingerprints_see_every_part_of_a_sample(samples: list[Sample], tmp_path: Path) -> None:
    (one, *_), (path,) = samples, samples[0].images
    picture = Image.new("RGB", (4, 4), "red")
    others = [
        one,
        replace(one, id="x"),
        replace(one, level="low"),
        replace(one, type="fairness"),
        replace(one, conversation=one.conversation[:1]),
        replace(one, images=samples[-1].images),
        replace(one, images=(picture,)),
        replace(one, images=(path, path)),
    ]
    assert len({fingerprint([other]) for other in others}) == len(others)
    assert fingerprint(samples) == fingerprint(list(samples)) != fingerprint(samples[::-1])


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, [1])

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.os, "replace", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        write_json(path, [2])
    assert json.loads(path.read_text()) == [1]
    assert [file.name for file in tmp_path.iterdir()] == ["a.json"]
