"""How a checkpoint is loaded: attention, and a language model of few bits."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoConfig

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import CheckpointError, ConfigError, MissingExtra
from psa_vlm.inference import PsaVlm
from psa_vlm.model import loading
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.checkpoint import settled
from psa_vlm.model.families import SPECS
from psa_vlm.model.probe import probe, same_weights
from psa_vlm.training.config import Stage1Config
from psa_vlm.training.stage1 import run_stage1


class Stopped(Exception):
    """Raised in place of loading what there is no GPU for."""


@pytest.fixture()
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `from_pretrained` is asked, on a machine that pretends to have GPU and bitsandbytes."""
    from transformers import AutoModelForImageTextToText

    found: dict[str, Any] = {}

    def stop(path: str, **options: Any) -> None:
        found.update(options)
        raise Stopped

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "find_spec", lambda name: object())
    monkeypatch.setattr(AutoModelForImageTextToText, "from_pretrained", stop)
    return found


def test_the_attention_can_be_chosen(llava_dir: Path) -> None:
    backbone = Backbone.from_pretrained(llava_dir, attention="eager")
    assert backbone.model.config._attn_implementation == "eager"
    assert backbone.model.model.language_model.config._attn_implementation == "eager"


def test_attention_that_is_not_installed_is_one_line(llava_dir: Path) -> None:
    with pytest.raises(CheckpointError, match="can't load a vision-language model") as caught:
        Backbone.from_pretrained(llava_dir, attention="flash_attention_2")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_need_a_gpu_and_a_package(
    llava_dir: Path, monkeypatch: pytest.MonkeyPatch, bits: Any
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"^bits is {bits}: needs a CUDA GPU, and there is none"):
        Backbone.from_pretrained(llava_dir, bits=bits)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(loading, "find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"bitsandbytes .*pip install 'psa-vlm\[quantize\]'"):
        Backbone.from_pretrained(llava_dir, bits=bits)


@pytest.mark.parametrize("bits", [4, 8])
def test_bits_reach_the_loading(llava_dir: Path, asked: dict[str, Any], bits: Any) -> None:
    with pytest.raises(Stopped):
        Backbone.from_pretrained(llava_dir, torch.bfloat16, "cuda:0", "sdpa", bits)
    how = asked["quantization_config"]
    assert (how.load_in_4bit, how.load_in_8bit) == (bits == 4, bits == 8)
    assert how.bnb_4bit_compute_dtype == torch.bfloat16
    assert asked["device_map"] == {"": "cuda:0"} and asked["attn_implementation"] == "sdpa"
    assert "model.multi_modal_projector.linear_1" in how.llm_int8_skip_modules


def test_a_configuration_reaches_the_loading(
    llava_dir: Path, asked: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psa_vlm.training.runs.device", lambda: "cuda")
    config = Stage1Config(
        backbone=str(llava_dir), out=tmp_path / "run", bits=4, attention="eager", dtype="float16"
    )
    picture = Image.new("RGB", (8, 8))
    turns = (Turn("user", "What?"), Turn("assistant", "So."))
    with pytest.raises(Stopped):
        run_stage1(config, [Sample("a", (picture,), turns, "clean", "safe")])
    assert asked["attn_implementation"] == "eager" and asked["dtype"] == torch.float16
    assert asked["quantization_config"].load_in_4bit


def test_only_the_language_model_is_quantised(family_dir: Path, family: str) -> None:
    from transformers.quantizers.quantizers_utils import should_convert_module

    backbone = Backbone.from_pretrained(family_dir)
    skipped = loading.kept_whole(AutoConfig.from_pretrained(family_dir))
    layers = SPECS[family].language_layers
    for name, module in backbone.model.named_modules():
        if isinstance(module, torch.nn.Linear):
            assert should_convert_module(name, skipped) == bool(re.fullmatch(layers, name)), name


# --- what is made of them ------------------------------------------------------------------------


def quantised(llava_dir: Path) -> Backbone:
    """Some weights as whole numbers, as bitsandbytes keeps them."""
    backbone = Backbone.from_pretrained(llava_dir)
    for layer in backbone.model.model.language_model.layers:
        weight = layer.mlp.up_proj.weight
        layer.mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    return Backbone(backbone.model, backbone.processor, str(llava_dir))


def test_a_quantised_model_is_known_by_the_rest_of_its_weights(llava_dir: Path) -> None:
    whole, small = Backbone.from_pretrained(llava_dir), quantised(llava_dir)
    assert None in small.probe and len(small.probe) == len(whole.probe)
    kept: Any = json.loads(json.dumps(small.probe))
    assert same_weights(kept, whole.probe)
    with torch.no_grad():
        for weight in whole.model.parameters():
            weight += 0.01
    assert not same_weights(kept, probe(whole.model))


def test_no_adapter_is_merged_into_it(llava_dir: Path, aligned_run: Path, tmp_path: Path) -> None:
    small = quantised(llava_dir)
    merged = []

    class Adapter(torch.nn.Module):
        def merge_adapter(self) -> None:
            merged.append(self.model)

    adapter: Any = Adapter()
    for model in (small.model, Backbone.from_pretrained(llava_dir).model):
        adapter.model = model
        settled(adapter)
    assert len(merged) == 1 and merged[0] is not small.model
    whole = PsaVlm.from_pretrained(aligned_run)
    with pytest.raises(CheckpointError, match="is quantised; load the run without bits"):
        PsaVlm(small, whole.bottleneck).save_pretrained(tmp_path / "out", merged=True)
