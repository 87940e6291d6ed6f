"""The model card of a run: `README.md`, from what lies in the run folder and nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from psa_vlm.errors import CheckpointError
from psa_vlm.model.calibration import FILE as CALIBRATION
from psa_vlm.model.calibration import Calibration
from psa_vlm.model.checkpoint import home, read_manifest
from psa_vlm.model.families import encoder_for
from psa_vlm.policy.policy import Policy
from psa_vlm.sharing import provenance
from psa_vlm.taxonomy import Taxonomy

NAME = "README.md"
SCORECARD = "scorecard.json"
"""In a run folder: how it was scored, if somebody put it there."""
TAGS = ["psa-vlm", "safety", "concept-bottleneck"]


def write_card(folder: Path) -> None:
    """Write the card of a run folder, exported or not; what is not known is said to be so.

    Raises:
        CheckpointError: it is not a run, its scorecard is damaged, or the card can't be written.
    """
    from huggingface_hub import ModelCard, ModelCardData

    run = home(folder)
    known = provenance.load(run)
    base = known["base"]
    exported, writes = run != folder, _writes(read_manifest(folder))
    data = ModelCardData(
        library_name="transformers" if exported else "psa-vlm",
        base_model=base["id"],
        pipeline_tag="image-text-to-text" if writes else None,
        tags=TAGS,
        **{key: base[key] for key in provenance.TERMS},
    )
    template = files("psa_vlm.sharing").joinpath("card.md").read_text(encoding="utf-8")
    card = ModelCard.from_template(data, template_str=template, **_values(folder, known))
    try:
        (folder / NAME).write_text(f"{str(card).rstrip()}\n", encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{folder / NAME}: can't be written ({error.strerror})") from error


def _values(folder: Path, known: Mapping[str, Any]) -> dict[str, Any]:
    """What the template shows."""
    from psa_vlm import __version__

    run, manifest = home(folder), read_manifest(folder)
    words, policy = Taxonomy.from_yaml(run / "taxonomy.yaml"), Policy.from_yaml(run / "policy.yaml")
    calibration = Calibration.load(run / CALIBRATION) if (run / CALIBRATION).exists() else None
    base, stages = known["base"], known["stages"]
    parts = {1: "concepts and safety tokens (stage I)", 2: "LoRA on the language model (stage II)"}
    return {
        "exported": run != folder,
        "writes": _writes(manifest),
        "base": base["id"] or (base["folder"] and _cell(f"{base['folder']} (a local folder)")),
        "licence": _cell(base["license_name"] or base["license"]),
        "types": ", ".join(words.types),
        "levels": ", ".join(words.levels),
        "tokens": manifest["safety_tokens"],
        "trained": ", ".join(parts[stage["stage"]] for stage in stages) or "not known",
        "policy": _cell(f"{policy.name}, in `policy.yaml`"),
        "calibration": "none" if calibration is None else _promise(calibration),
        "calibrated": calibration is not None,
        "version": __version__,
        "stages": [_stage(stage) for stage in stages],
        "note": known["note"],
        "results": _results(run / SCORECARD),
    }


def _writes(manifest: Mapping[str, Any]) -> bool:
    """Whether a run has a language model; older ones do not name their base's type, and have."""
    return encoder_for(manifest.get("model_type", "")) is None


def _promise(calibration: Calibration) -> str:
    return (
        f"of each type at most {calibration.miss_rate:.1%} missed, at most"
        f" {calibration.false_refusal:.1%} of harmless requests called surely risky, each with"
        f" {calibration.confidence:.0%} confidence; made {calibration.made}, valid until"
        f" {calibration.valid_until}"
    )


def _stage(stage: Mapping[str, Any]) -> dict[str, Any]:
    data = stage["data"]
    counts = {
        key: ", ".join(f"{name} {count:,}" for name, count in data[key].items())
        for key in ("type", "level")
    }
    sources = [{key: _cell(value) for key, value in source.items()} for source in data["sources"]]
    config = yaml.safe_dump(stage["config"], sort_keys=False, allow_unicode=True).strip()
    shown = {"samples": f"{data['samples']:,}", **counts, "sources": sources}
    return {"stage": "I" * stage["stage"], "data": shown, "config": config}


def _cell(value: Any) -> Any:
    """A value that can't end its cell of a table."""
    return " ".join(value.replace("|", r"\|").split()) if isinstance(value, str) else value


def _results(path: Path) -> dict[str, Any] | None:
    """The scorecard of a run as columns and rows; None without one."""
    if not path.exists():
        return None
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"]
        metrics = [
            name
            for name in rows[0]
            if name not in ("method", "split", "n", "ci")
            and any(row[name] is not None for row in rows)
        ]
        return {
            "columns": ["method", "split", *(name.replace("_", " ") for name in metrics), "n"],
            "rows": [
                [row["method"], row["split"], *(_figure(row, name) for name in metrics), row["n"]]
                for row in rows
            ],
        }
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise CheckpointError(f"{path}: not a scorecard ({error!r}); take it away") from None


def _figure(row: Mapping[str, Any], name: str) -> str:
    if row[name] is None:
        return "-"
    low, high = row["ci"].get(name, (None, None))
    return f"{row[name]:.3f}" + ("" if low is None else f" ({low:.3f} to {high:.3f})")
