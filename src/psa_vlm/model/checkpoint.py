"""A run on disk: everything that was trained, written so that a crash never leaves half of it.

Layout of a run folder:
    psa.json                    format, base model with a probe of its weights, sizes, taxonomy hash
    taxonomy.yaml               the words of the verdict
    bottleneck.safetensors      safety projector, safety tokens (1), safety head
    safety_tokens.safetensors   safety tokens (2): `rows` [K, D] of the embedding
    processor/                  tokenizer and chat template with the safety tokens
    adapter/                    LoRA of stage II, where there is one (PEFT's own layout)
Beside these lie policy.yaml and, where there is one, calibration.json; see `psa_vlm.inference`.
Of an exported run they lie in `psa/`, without processor and adapter: those are in the checkpoint
around it, see `psa_vlm.model.export`.
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
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from psa_vlm.errors import CheckpointError, ConfigError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.bottleneck import BottleneckConfig, SafetyBottleneck
from psa_vlm.model.loading import Attention, Bits
from psa_vlm.model.probe import is_quantised, probe, same_weights
from psa_vlm.model.tokens import get_rows, put_rows
from psa_vlm.taxonomy import Taxonomy

if TYPE_CHECKING:
    from peft import PeftModel

FORMAT = 1
MANIFEST = "psa.json"
INSIDE = "psa"
"""In an exported checkpoint: the folder of all that is not plain transformers."""


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
        full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
        fix = "free some space" if full else "check the folder"
        kept = "; what was there before is untouched" if out.exists() else ""
        raise CheckpointError(f"{out}: can't be written ({error}): {fix}{kept}") from error
    finally:
        if previous.exists() and not out.exists():  # cut off between the two
            previous.rename(out)
        shutil.rmtree(fresh, ignore_errors=True)


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
    with atomic_folder(out) as folder:
        write(folder, parts, str(backbone.source))
        backbone.processor.save_pretrained(folder / "processor")
        if parts.adapter is not None:
            parts.adapter.save_pretrained(str(folder / "adapter"))
        extra(folder)


def write(folder: Path, parts: Parts, base: str | None) -> None:
    """Write what every run folder holds.

    Args:
        folder: an empty one.
        parts: what to write; of the backbone only the rows of the safety tokens (2).
        base: where its base model is; None means that the folder around this one holds it all.
    """
    backbone = parts.backbone
    manifest = {
        "format": FORMAT,
        "base": base,
        "base_probe": probe(backbone.model) if base is None else backbone.probe,
        "bottleneck": asdict(parts.bottleneck.config),
        "safety_tokens": len(backbone.safety_token_ids),
        "taxonomy": parts.taxonomy.hash,
        "adapter": parts.adapter is not None,
        "model_type": backbone.model.config.model_type,
    }
    parts.taxonomy.to_yaml(folder / "taxonomy.yaml")
    save_file(_contiguous(parts.bottleneck.state_dict()), folder / "bottleneck.safetensors")
    save_file(_contiguous({"rows": get_rows(backbone)}), folder / "safety_tokens.safetensors")
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}


def home(folder: Path) -> Path:
    """Where the files of a run are: the folder itself or, of an exported run, a folder in it."""
    inside = Path(folder) / INSIDE
    return inside if (inside / MANIFEST).is_file() else Path(folder)


def check_free(out: Path) -> None:
    """Make sure that nothing is where a new folder shall be.

    Raises:
        ConfigError: something is.
    """
    if out.exists():
        raise ConfigError(f"{out}: exists already; choose another folder, or delete it")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a run folder.

    Raises:
        CheckpointError: there is none, or it is of another format.
    """
    path = home(folder) / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder}: not a psa-vlm run ({MANIFEST}: {error})") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path}: its format is not {FORMAT}; use the version that wrote it")
    return manifest


def fingerprint(folder: Path) -> str:
    """16 hex digits of all that decides a run's verdicts and answers: its files but the policy.

    Of the base model the probe of its weights counts, which the manifest holds; pages for people
    don't.

    Raises:
        CheckpointError: it is not a run.
    """
    read_manifest(folder)
    folder = home(folder)
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != "policy.yaml" and path.suffix not in (".html", ".md"):
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
    attention: Attention | None = None,
    bits: Bits | None = None,
) -> Parts:
    """Read a run folder and the base model that it was trained on.

    Args:
        folder: the run.
        base: where the base model is now, if it moved since training.
        taxonomy: what the caller expects the run to speak; None accepts the run's own.
        dtype, device, attention, bits: of the base model, as in
            :meth:`psa_vlm.model.backbone.Backbone.from_pretrained`.

    Raises:
        CheckpointError: something is missing, damaged, or does not fit together.
        ConfigError, MissingExtra: `bits` can't be had here.
        TaxonomyMismatch: the run was made with another taxonomy than the file or the caller says.
    """
    manifest = read_manifest(folder)
    folder = home(folder)
    found = Taxonomy.from_yaml(folder / "taxonomy.yaml")
    found.check_same(manifest["taxonomy"], folder)
    if taxonomy is not None:
        taxonomy.check_same(found.hash, folder)
    try:
        where = base or manifest["base"] or folder.parent
        backbone = Backbone.from_pretrained(where, dtype, device, attention, bits)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; if the base model moved, give its new place") from error
    try:
        kind = backbone.model.config.model_type
        if manifest.get("model_type", kind) != kind:  # older runs do not say
            raise CheckpointError(
                f"{folder}: was trained on a model of type {manifest['model_type']}, and"
                f" {backbone.source} is of type {kind}; give the place of the right one"
            )
        if not same_weights(backbone.probe, manifest["base_probe"]):
            raise CheckpointError(
                f"{folder}: was trained on a base model with other weights than {backbone.source};"
                " give the place of the right one, or train again"
            )
        bottleneck = SafetyBottleneck(BottleneckConfig(**manifest["bottleneck"]))
        bottleneck.load_state_dict(load_file(folder / "bottleneck.safetensors"))
        rows = load_file(folder / "safety_tokens.safetensors")["rows"]
        if manifest["safety_tokens"]:
            put_rows(backbone, rows)
        adapter = load_adapter(backbone, folder / "adapter") if manifest["adapter"] else None
    except (OSError, KeyError, TypeError, RuntimeError, ValueError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(f"{folder}: incomplete or damaged run ({reason})") from error
    return Parts(backbone, bottleneck.to(backbone.device).eval(), found, adapter)


def load_adapter(backbone: Backbone, folder: Path) -> PeftModel:
    """Put a saved LoRA into the backbone's layers, ready to run.

    Raises:
        FileNotFoundError: a file of it is missing.
        CheckpointError: it was made for another model.
    """
    from peft import PeftModel, get_peft_model_state_dict

    for name in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"no {folder.name}/{name}")
    try:
        with warnings.catch_warnings():
            # Of an attribute that transformers renamed, and of what is checked below.
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            adapter = PeftModel.from_pretrained(backbone.model, str(folder))
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            saved = {name for name in file.keys() if "lora_" in name}  # noqa: SIM118
        wanted = get_peft_model_state_dict(adapter, save_embedding_layers=False).keys()
        if saved != wanted:
            raise ValueError(f"{len(saved)} tensors, of which {len(saved & wanted)} fit")
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: this adapter was made for another model than {backbone.source}"
            f" ({' '.join(str(error).split())[:200]}); take the adapter of this run"
        ) from error
    return settled(adapter)


def settled(adapter: PeftModel) -> PeftModel:
    """A LoRA that is not trained any more, merged so that it costs nothing to run.

    Into quantised weights it is not merged, where most of it would be rounded away.
    """
    if not is_quantised(adapter):
        adapter.merge_adapter()
    return adapter.eval().requires_grad_(False)
