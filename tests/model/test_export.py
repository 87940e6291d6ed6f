"""Exported runs: nothing is left out, nothing half written, and what doesn't fit is named.

That an export equals its run, on every family, is in `test_families.py`.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, LlamaConfig

from psa_vlm.errors import CheckpointError, ConfigError
from psa_vlm.inference import PsaVlm
from psa_vlm.model import export
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.tokens import add_safety_tokens

from ..tiny import random_bottleneck


@pytest.fixture(scope="module")
def run(aligned_run: Path) -> Path:
    return aligned_run


def exported(run: Path, out: Path, **changes: Any) -> Path:
    PsaVlm.from_pretrained(run, **changes).save_pretrained(out, merged=True)
    return out


def test_it_holds_the_run_and_needs_no_other_folder(
    run: Path, llava_dir: Path, picture: Path, tmp_path: Path
) -> None:
    expected = PsaVlm.from_pretrained(run).assess(picture, "Hi").to_dict()
    base = Path(shutil.copytree(llava_dir, tmp_path / "base"))
    made = exported(run, tmp_path / "made", base=base)
    shutil.rmtree(base)
    moved = made.rename(tmp_path / "moved")
    model = PsaVlm.from_pretrained(moved)
    assert model.assess(picture, "Hi").to_dict() == expected
    assert model.calibration is not None and expected["scores"]
    assert not [p for p in moved.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]
    again = exported(moved, tmp_path / "again")  # an export can be exported
    assert PsaVlm.from_pretrained(again).assess(picture, "Hi").to_dict() == expected


def test_an_adapter_that_is_not_merged_yet_is(
    run_dir: Path, random_lora: Callable[[Any], Any], tmp_path: Path
) -> None:
    weights = []
    for merged in (True, False):
        model = PsaVlm.from_pretrained(run_dir)
        model.adapter = random_lora(model.backbone)
        if not merged:
            model.adapter.unmerge_adapter()
        model.save_pretrained(tmp_path / str(merged), merged=True)
        weights.append(load_file(tmp_path / str(merged) / "model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-5, rtol=1e-5)


def test_the_model_in_memory_is_still_the_run(run: Path, tmp_path: Path) -> None:
    model = PsaVlm.from_pretrained(run)
    model.save_pretrained(tmp_path / "out", merged=True)
    model.save_pretrained(tmp_path / "again")
    before, after = PsaVlm.from_pretrained(run), PsaVlm.from_pretrained(tmp_path / "again")
    weights = after.backbone.model.state_dict()
    for name, weight in before.backbone.model.state_dict().items():
        assert torch.equal(weights[name], weight), name


def test_embeddings_that_are_the_output_head_too(
    tied_llava_dir: Path, random_lora: Callable[[Any], Any], picture: Path, tmp_path: Path
) -> None:
    backbone = Backbone.from_pretrained(tied_llava_dir)
    add_safety_tokens(backbone, 4)
    model = PsaVlm(backbone, random_bottleneck(backbone), adapter=random_lora(backbone))
    model.save_pretrained(tmp_path / "out", merged=True)
    again = PsaVlm.from_pretrained(tmp_path / "out")
    low = {"privacy": "low"}
    replies = [m.reply(picture, "Hi", concepts=low, max_new_tokens=4) for m in (model, again)]
    assert replies[0].text == replies[1].text != ""
    assert replies[0].verdict == replies[1].verdict
    plain: Any = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert plain.get_output_embeddings().weight is plain.get_input_embeddings().weight


def test_safety_tokens_are_never_generated(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out")
    model: Any = AutoModelForImageTextToText.from_pretrained(out)
    ids = list(Backbone.from_pretrained(out).safety_token_ids)
    assert len(ids) == 4 and set(ids) <= set(model.generation_config.suppress_tokens)
    # An engine that reads no generation config does not say them either: never the highest score.
    logits = model.get_output_embeddings()(torch.randn(50, 32))
    assert (logits[:, ids] <= logits.max(-1, keepdim=True).values - 1e-4).all()


STEPS = {
    "weights": "transformers.PreTrainedModel.save_pretrained",
    "processor": "transformers.ProcessorMixin.save_pretrained",
    "bottleneck": "psa_vlm.model.checkpoint.save_file",
    "disk": "psa_vlm.model.checkpoint._sync",
}
ERRORS = {
    "full": (OSError(errno.ENOSPC, "No space left on device"), "free some space"),
    "safetensors": (SafetensorError("I/O error: No space left on device"), "free some space"),
    "config": (ValueError("GenerationConfig is invalid"), "can't save the model"),
    "stopped": (KeyboardInterrupt("stopped"), "stopped"),
}


@pytest.mark.parametrize(
    ("step", "error"),
    [*((step, "full") for step in STEPS), *(("weights", error) for error in list(ERRORS)[1:])],
)
def test_a_stopped_export_leaves_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, error: str
) -> None:
    raised, told = ERRORS[error]

    def fail(*args: Any, **kwargs: Any) -> None:
        raise raised

    model = PsaVlm.from_pretrained(run)
    monkeypatch.setattr(STEPS[step], fail)
    with pytest.raises((CheckpointError, KeyboardInterrupt), match=told) as caught:
        model.save_pretrained(tmp_path / "out", merged=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_what_a_killed_export_left_is_written_anew(run: Path, tmp_path: Path) -> None:
    half = tmp_path / ".out.writing"
    half.mkdir()
    (half / "stale.safetensors").write_bytes(b"half")
    out = exported(run, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert not (out / "stale.safetensors").exists()


def test_what_is_there_already_is_left_alone(run: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ConfigError, match=rf"{tmp_path}: exists already; choose another"):
        exported(run, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_an_export_without_its_bottleneck_is_no_run(run: Path, tmp_path: Path) -> None:
    out = exported(run, tmp_path / "out")
    (out / export.INSIDE / "bottleneck.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"out/psa: incomplete or damaged run"):
        PsaVlm.from_pretrained(out)
    shutil.rmtree(out / export.INSIDE)
    with pytest.raises(CheckpointError, match="not a psa-vlm run"):
        PsaVlm.from_pretrained(out)


# --- what doesn't fit together -------------------------------------------------------------------


def test_a_base_that_reads_no_images(run: Path, tmp_path: Path) -> None:
    LlamaConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"llama does not read images.*give its new place"):
        PsaVlm.from_pretrained(run, base=tmp_path)


def another_depth(adapter: Path) -> None:
    """As of a language model with one layer instead of two."""
    tensors = load_file(adapter / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if ".layers.0." in name}
    assert kept and kept.keys() != tensors.keys()
    save_file(kept, adapter / "adapter_model.safetensors")


def another_width(adapter: Path) -> None:
    tensors = load_file(adapter / "adapter_model.safetensors")
    save_file(
        {name: torch.cat([tensor, tensor]) for name, tensor in tensors.items()},
        adapter / "adapter_model.safetensors",
    )


def another_family(adapter: Path) -> None:
    """As of Idefics3, whose layers have other names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["target_modules"] = config["target_modules"].replace("language_model", "text_model")
    (adapter / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("change", [another_depth, another_width, another_family])
def test_an_adapter_of_another_model_is_named(
    run: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    change(copy / "adapter")
    with pytest.raises(
        CheckpointError, match=r"run/adapter: .* was made for another model than"
    ) as e:
        PsaVlm.from_pretrained(copy)
    assert "\n" not in str(e.value)


def test_an_adapter_that_is_missing_is_named(run: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    (copy / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"damaged run \(no adapter/adapter_model"):
        PsaVlm.from_pretrained(copy)
