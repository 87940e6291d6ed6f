"""Run folders: what is saved comes back, what is broken is named, and a full disk loses nothing."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from psa_vlm.errors import CheckpointError, TaxonomyMismatch
from psa_vlm.inference import PsaVlm
from psa_vlm.model import checkpoint
from psa_vlm.model.backbone import Backbone
from psa_vlm.taxonomy import Taxonomy


def state(model: PsaVlm) -> dict[str, torch.Tensor]:
    return {**model.bottleneck.state_dict(), **model.backbone.model.state_dict()}


def test_a_saved_model_comes_back_bit_for_bit(run: Path, picture: Path, tmp_path: Path) -> None:
    model = PsaVlm.from_pretrained(run)
    model.save_pretrained(tmp_path / "again")
    again = PsaVlm.from_pretrained(tmp_path / "again")
    before, after = state(model), state(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.policy == model.policy
    assert again.assess(picture, "Hi").to_dict() == model.assess(picture, "Hi").to_dict()


def test_nothing_in_a_run_is_pickled(run: Path) -> None:
    assert not [p for p in run.rglob("*") if p.suffix in (".pt", ".bin", ".pkl", ".pth")]


def test_another_taxonomy_is_refused(run: Path) -> None:
    other = Taxonomy(("weapons", "clean"), ("safe", "high"), "clean")
    with pytest.raises(TaxonomyMismatch, match="another taxonomy"):
        PsaVlm.from_pretrained(run, taxonomy=other)
    other.to_yaml(run / "taxonomy.yaml")  # somebody edited the file
    with pytest.raises(TaxonomyMismatch, match="another taxonomy"):
        PsaVlm.from_pretrained(run)


@pytest.mark.parametrize(
    "name", ["psa.json", "bottleneck.safetensors", "safety_tokens.safetensors"]
)
def test_a_missing_or_cut_off_file_is_one_clear_line(run: Path, name: str) -> None:
    path = run / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(CheckpointError, match="run") as caught:
        PsaVlm.from_pretrained(run)
    assert "\n" not in str(caught.value)
    path.unlink()
    with pytest.raises(CheckpointError):
        PsaVlm.from_pretrained(run)


def test_a_folder_that_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a psa-vlm run"):
        PsaVlm.from_pretrained(tmp_path)


def test_a_run_of_another_format_is_refused(run: Path) -> None:
    manifest = json.loads((run / "psa.json").read_text())
    (run / "psa.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(CheckpointError, match="format"):
        PsaVlm.from_pretrained(run)


def test_a_base_model_that_moved_can_be_given(run: Path, llava_dir: Path, tmp_path: Path) -> None:
    manifest = json.loads((run / "psa.json").read_text())
    (run / "psa.json").write_text(json.dumps({**manifest, "base": str(tmp_path / "gone")}))
    with pytest.raises(CheckpointError, match=r"gone.*give its new place"):
        PsaVlm.from_pretrained(run)
    PsaVlm.from_pretrained(run, base=llava_dir)


def test_a_base_model_with_other_weights_is_refused(
    run: Path, llava_dir: Path, tmp_path: Path
) -> None:
    other = Backbone.from_pretrained(llava_dir)
    for weight in other.model.parameters():
        weight.data += 0.01
    other.model.save_pretrained(tmp_path / "other")
    other.processor.save_pretrained(tmp_path / "other")
    with pytest.raises(CheckpointError, match="trained on a base model with other weights"):
        PsaVlm.from_pretrained(run, base=tmp_path / "other")
    PsaVlm.from_pretrained(run, base=llava_dir, dtype=torch.bfloat16)  # the same, less exact


def test_a_base_model_of_another_family_is_refused(run: Path, make_dual_encoder: Any) -> None:
    told = r"trained on a model of type llava, and .* is of type clip; give the place"
    with pytest.raises(CheckpointError, match=told):
        PsaVlm.from_pretrained(run, base=make_dual_encoder("CLIP"))


def test_an_adapter_of_another_family_is_refused(
    aligned_run: Path, make_dual_encoder: Any, tmp_path: Path
) -> None:
    broken = Path(shutil.copytree(aligned_run, tmp_path / "run"))
    clip = Backbone.from_pretrained(make_dual_encoder("CLIP"))
    manifest = json.loads((broken / "psa.json").read_text())
    manifest |= {"base": clip.source, "base_probe": clip.probe, "model_type": "clip"}
    (broken / "psa.json").write_text(json.dumps({**manifest, "safety_tokens": 0}))
    with pytest.raises(CheckpointError, match="adapter was made for another model") as caught:
        PsaVlm.from_pretrained(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("step", ["weights", "manifest"])
def test_a_full_disk_leaves_the_last_good_run(
    run: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    model = PsaVlm.from_pretrained(run)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if step == "weights":
        monkeypatch.setattr(checkpoint, "save_file", full)
    else:
        monkeypatch.setattr(checkpoint, "_sync", full)
    with pytest.raises(CheckpointError, match=r"free some space.*untouched"):
        model.save_pretrained(run)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert [p.name for p in run.parent.iterdir()] == ["run"]
    monkeypatch.undo()
    PsaVlm.from_pretrained(run)


def test_a_run_that_is_not_replaced_in_the_end_is_put_back(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def stopped(self: Path, target: Path) -> Path:
        if self.name.endswith(".writing"):
            raise KeyboardInterrupt
        return rename(self, target)

    model = PsaVlm.from_pretrained(run)
    before = checkpoint.fingerprint(run)
    monkeypatch.setattr(Path, "rename", stopped)
    with pytest.raises(KeyboardInterrupt):
        model.save_pretrained(run)
    assert checkpoint.fingerprint(run) == before
    assert [path.name for path in run.parent.iterdir()] == ["run"]


def test_saving_replaces_a_run_as_a_whole(run: Path) -> None:
    (run / "adapter").mkdir()
    (run / "adapter" / "stale.txt").write_text("of an older run")
    PsaVlm.from_pretrained(run).save_pretrained(run)
    assert not (run / "adapter").exists()
    assert [p.name for p in run.parent.iterdir()] == ["run"]


def test_a_fingerprint_tells_runs_apart_but_not_their_policies(run: Path, run_dir: Path) -> None:
    before = checkpoint.fingerprint(run)
    assert before == checkpoint.fingerprint(run_dir)  # wherever it lies
    (run / "policy.yaml").write_text("name: other\ninherits: strict\n")
    (run / "README.md").write_text("its card")
    assert checkpoint.fingerprint(run) == before
    weights = run / "bottleneck.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    changed = checkpoint.fingerprint(run)
    (run / "calibration.json").write_text("{}")
    assert len({before, changed, checkpoint.fingerprint(run)}) == 3
