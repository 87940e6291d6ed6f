"""A run on disk: everything that was trained, written so that a crash never leaves half of it.

Layout of a run folder:
    psa.json                    format, base model with a probe of its weights, sizes, taxonomy hash
    taxonomy.yaml               the words of the verdict
    bottleneck.safetensors      safety projector, safety tokens (1), safety head
    safety_tokens.safetensors   safety tokens (2): `rows` [K, D] of the embedding
    processor/                  tokenizer and chat template with the safety tokens
    adapter/                    LoRA of stage II, where there is one (PEFT's own layout)
Beside these lie policy.yaml and, where there is one, calibration.json; see `psa_vlm.inference`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from psa_vlm.errors import CheckpointError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck
from psa_vlm.model.probe import same_weights
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.taxonomy import Taxonomy

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT = 1
MANIFEST = "psa.json"


@dataclass
class Parts:
    """What a run folder holds, in memory."""

    backbone: Backbone
    bottleneck: SafetyBottleneck
    taxonomy: Taxonomy
    adapter: PeftModel | None = None


@contextmanager
def atomic_folder(out: Path) -> Iterator[Path]:
    """Write a folder beside `out` and put it in its place only when it is complete.

    Raises:
        CheckpointError: it can't be written (a full disk, say); what stood at `out` is untouched.
    """
    out = Path(out)
    fresh = out.with_name(f".{out.name}.writing")
    previous = out.with_name(f".{out.name}.previous")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        _sync(fresh)
        if out.exists():
            shutil.rmtree(previous, ignore_errors=True)
            out.rename(previous)
        fresh.rename(out)
        shutil.rmtree(previous, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(fresh, ignore_errors=True)
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        fix = "free some space" if full else "check the folder"
        kept = "; what was there before is untouched" if out.exists() else ""
        raise CheckpointError(f"{out}: can't be written ({error}): {fix}{kept}") from error


def _sync(folder: Path) -> None:
    """Push every file of a folder to the disk, so that a full disk shows before the swap."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as stream:
                os.fsync(stream.fileno())


def save(out: Path, parts: Parts, extra: Callable[[Path], None] = lambda folder: None) -> None:
    """Write a run folder atomically.

    Args:
        out: the run folder; replaced as a whole if it exists.
        parts: what to save; the base model's own weights are not copied.
        extra: writes further files into the folder.

    Raises:
        CheckpointError: it can't be written.
    """
    backbone = parts.backbone
    ids = list(backbone.safety_token_ids)
    manifest = {
        "format": FORMAT,
        "base": str(backbone.source),
        "base_probe": backbone.probe,
        "bottleneck": asdict(parts.bottleneck.config),
        "safety_tokens": len(ids),
        "taxonomy": parts.taxonomy.hash,
        "adapter": parts.adapter is not None,
    }
    with atomic_folder(out) as folder:
        parts.taxonomy.to_yaml(folder / "taxonomy.yaml")
        save_file(_contiguous(parts.bottleneck.state_dict()), folder / "bottleneck.safetensors")
        rows = backbone.model.get_input_embeddings().weight[ids]
        save_file(_contiguous({"rows": rows}), folder / "safety_tokens.safetensors")
        backbone.processor.save_pretrained(folder / "processor")
        if parts.adapter is not None:
            parts.adapter.save_pretrained(str(folder / "adapter"))
        extra(folder)
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        CheckpointError: there is none, or it is of another format.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a psa-vlm run ({MANIFEST}: {error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is not {FORMAT}; use the version that wrote it")
    return manifest


def fingerprint(folder: Path) -> str:
    """16 hex digits of all that decides a run's verdicts and answers: its files but the policy.

    Of the base model the probe of its weights counts, which the manifest holds.

    Raises:
        CheckpointError: it is not a run.
    """
    read_manifest(folder)
    digest = hashlib.sha256()
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file() and path.name != "policy.yaml" and path.suffix != ".html":
            with path.open("rb") as stream:
                content = hashlib.file_digest(stream, "sha256").hexdigest()
            digest.update(f"{path.relative_to(folder).as_posix()}\n{content}\n".encode())
    return digest.hexdigest()[:16]


def load(
    folder: Path,
    base: str | Path | None = None,
    taxonomy: Taxonomy | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
) -> Parts:
    """Read a run folder and the base model that it was trained on.

    Args:
        folder: the run.
        base: where the base model is now, if it moved since training.
        taxonomy: what the caller expects the run to speak; None accepts the run's own.
        dtype: of the base model's weights; None keeps the checkpoint's.
        device: None means the CPU.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit together.
        TaxonomyMismatch: the run was made with another taxonomy than the file or the caller says.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    found = Taxonomy.from_yaml(folder / "taxonomy.yaml")
    found.check_same(manifest["taxonomy"], folder)
    if taxonomy is not None:
        taxonomy.check_same(found.hash, folder)
    try:
        backbone = Backbone.from_pretrained(base or manifest["base"], dtype=dtype, device=device)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if the base model moved, give its new place") from error
    try:
        if not same_weights(backbone.probe, manifest["base_probe"]):
            raise CheckpointError(
                f"{folder}: was trained on a base model with other weights than {backbone.source};"
                " give the place of the right one, or train again"
            )
        bottleneck = SafetyBottleneck(BottleneckConfig(**manifest["bottleneck"]))
        bottleneck.load_state_dict(load_file(folder / "bottleneck.safetensors"))
        rows = load_file(folder / "safety_tokens.safetensors")["rows"]
        if manifest["safety_tokens"]:
            ids = add_safety_tokens(backbone, manifest["safety_tokens"])
            with torch.no_grad():
                weight = backbone.model.get_input_embeddings().weight
                weight[list(ids)] = rows.to(weight)
        adapter = _load_adapter(backbone, folder / "adapter") if manifest["adapter"] else None
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: incomplete or damaged run ({reason})") from error
    return Parts(backbone, bottleneck.to(backbone.device).eval(), found, adapter)


def _load_adapter(backbone: Backbone, folder: Path) -> PeftModel:
    """Put a saved LoRA into the backbone's layers, merged so that it costs nothing to run."""
    from peft import PeftModel

    with warnings.catch_warnings():  # of an attribute that transformers renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        adapter = PeftModel.from_pretrained(backbone.model, str(folder))
    adapter.merge_adapter()
    adapter.requires_grad_(False)
    return adapter.eval()
