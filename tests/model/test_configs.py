"""Every shipped configuration, built at toy size on its family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.inference import PsaVlm
from psa_vlm.model.families import ENCODERS, SPECS
from psa_vlm.training.config import Stage1Config, Stage2Config, load
from psa_vlm.training.stage1 import run_stage1
from psa_vlm.training.stage2 import run_stage2

CONFIGS = Path(__file__).parents[2] / "configs"
OF = {
    "llava": ["llava-1.5-7b", "llava-1.5-13b"],
    "llava-next": ["llava-next-mistral-7b"],
    "llava-onevision": ["llava-onevision-0.5b"],
    "qwen2-vl": ["qwen2-vl-2b"],
    "qwen2.5-vl": ["qwen2.5-vl-3b"],
    "qwen3-vl": ["qwen3-vl-2b"],
    "internvl": ["internvl3-1b"],
    "idefics3": ["smolvlm-256m"],
    "gemma3": ["gemma3-4b"],
    "paligemma": ["paligemma-3b"],
    "mistral3": ["ministral3-3b"],
    "instructblip": ["instructblip-vicuna-7b"],
    "clip": ["clip-vit-base"],
    "siglip": ["siglip-base"],
}
"""The names of each family's."""
SMALL = {
    "concepts": {"epochs": 0, "hidden": 8, "depth": 1, "tokens": 2},
    "tokens": {"epochs": 0},
    "lora": {"epochs": 0, "r": 2},
}
"""What is cut down; the rest is as shipped."""
SAMPLE = Sample(
    "one",
    (Image.new("RGB", (48, 48), "red"),),
    (Turn("user", "What is this?"), Turn("assistant", "It is red.")),
    "clean",
    "safe",
)


def toy(config: Any, **changes: Any) -> Any:
    """A configuration at toy size, with no data but what is passed."""
    parts = {name: part.model_copy(update=SMALL[name]) for name, part in config.schedules.items()}
    return config.model_copy(update={"data": (), "dtype": "float32", **parts, **changes})


def built(name: str, base: Path, out: Path) -> PsaVlm:
    config = load(CONFIGS / f"{name}-stage1.yaml", Stage1Config)
    assert config.out == Path(f"runs/{name}/stage1")
    return run_stage1(toy(config, backbone=str(base), out=out), [SAMPLE])


def test_each_family_has_one_and_each_is_here() -> None:
    assert OF.keys() == {*SPECS, *ENCODERS}
    shipped = {path.stem.removesuffix("-stage1") for path in CONFIGS.glob("*-stage1.yaml")}
    assert shipped == {name for names in OF.values() for name in names}


def test_it_builds(family_dir: Path, family: str, tmp_path: Path) -> None:
    for name in OF[family]:
        model = built(name, family_dir, tmp_path / name)
        assert len(model.backbone.safety_token_ids) == 64
        own = CONFIGS / f"{name}-stage2.yaml"
        config = load(own if own.exists() else CONFIGS / "stage2.yaml", Stage2Config)
        out = tmp_path / f"{name}-2"
        aligned = run_stage2(toy(config, model=tmp_path / name, out=out), [SAMPLE])
        assert aligned.adapter is not None
        assert not aligned.reply(list(SAMPLE.images), "What?", max_new_tokens=1).verdict.error


@pytest.mark.parametrize(("name", "kind"), [("clip", "CLIP"), ("siglip", "Siglip")])
def test_a_guard_builds(
    name: str, kind: str, make_dual_encoder: Callable[[str], Path], tmp_path: Path
) -> None:
    for config in OF[name]:
        model = built(config, make_dual_encoder(kind), tmp_path / config)
        assert model.assess(list(SAMPLE.images), "What?").error is None
