"""Run folders: begun, resumed, finished; never mixed up with another run."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from psa_vlm.data.contamination import Fingerprints
from psa_vlm.data.readers import read
from psa_vlm.data.sample import Sample
from psa_vlm.errors import CheckpointError, ConfigError
from psa_vlm.model.checkpoint import home
from psa_vlm.model.probe import probe
from psa_vlm.sharing import provenance
from psa_vlm.sharing.card import write_card
from psa_vlm.sharing.provenance import HISTORY, RECORD
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.training.config import RunConfig, changes
from psa_vlm.training.features import image_key
from psa_vlm.training.fit import History, Work, check_extras
from psa_vlm.training.processes import device, is_main, main_first

if TYPE_CHECKING:
    from psa_vlm.inference import PsaVlm

WRITING = ".writing"
"""Ends the name of a file that is not complete yet."""

_logger = logging.getLogger(__name__)


class Run:
    """One `out` folder on its way to completion.

    Until then everything is in `<out>.work`: checkpoints, features, and a record of what the run
    was told, so that the same command goes on and another one is refused.

    Args:
        stage: 1 or 2; 0 is what comes before.
        config: what the run is told.
        samples: what it is trained on.
        start: what it starts from.
        before: run folder that it goes on from, whose training data count as its own.

    Raises:
        ConfigError: `out`, or its work folder, holds something else.
        MissingExtra: a package for training is not installed.
    """

    def __init__(
        self,
        stage: int,
        config: RunConfig,
        samples: Sequence[Sample],
        start: Sequence[nn.Module],
        before: Path | None = None,
    ) -> None:
        check_extras(config.report_to)
        self.out = config.out
        self.folder = config.out.with_name(f"{config.out.name}.work")
        self.config = config
        self.samples = samples
        self.before = before
        self.record = {
            "stage": stage,
            "samples": fingerprint(samples),
            "weights": [probe(model) for model in start],
            **config.model_dump(mode="json", exclude={"out", "data"}),
        }
        self.finished = self._is_ours(self.out)
        with main_first():
            if not self.finished and not self._is_ours(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                write_json(self.folder / RECORD, self.record)
        if self.finished:
            _logger.warning("%s: already finished with this configuration", self.out)

    def work(self, part: str) -> Work:
        """Where a part of the run is trained."""
        return Work(self.folder / part, self.config.seed, self.config.report_to)

    def finish(self, model: PsaVlm, histories: Mapping[str, History]) -> None:
        """Put the run folder in its place, in one piece, and delete the work folder.

        Raises:
            CheckpointError: it can't be written; the work folder stays.
        """
        with main_first():
            if is_main():
                model.save_pretrained(self.out, lambda folder: self._extras(folder, histories))
                self.clean()

    def clean(self) -> None:
        """Delete what is left of the way to a finished run."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _extras(self, folder: Path, histories: Mapping[str, History]) -> None:
        write_json(folder / RECORD, self.record)
        write_json(folder / HISTORY, histories)
        self._seen().save(folder)
        provenance.save(folder, self._provenance(folder))
        write_card(folder)
        for part in histories:
            for events in (self.folder / part).rglob("events.out.*"):
                target = folder / "tensorboard" / part
                target.mkdir(parents=True, exist_ok=True)
                shutil.copy(events, target)

    def _seen(self) -> Fingerprints:
        """Hashes of all that the model was trained on."""
        seen = Fingerprints.of(self.samples)
        earlier = Fingerprints.load(home(self.before)) if self.before else None
        return seen | earlier if earlier else seen

    def _provenance(self, folder: Path) -> dict[str, Any]:
        """What the run in `folder` was made from, the run before it included."""
        known = provenance.load(self.before or folder)
        files = [(file.path, file.format) for file in self.config.data]
        stage = {
            "stage": self.record["stage"],
            "data": provenance.of_data(self.samples, files),
            "config": self.config.model_dump(mode="json", exclude={"out"}),
        }
        note = known["note"] if self.before else None
        return {**known, "stages": [*known["stages"], stage], "note": note}

    def _is_ours(self, folder: Path) -> bool:
        """Whether a folder was made by this very run; False if there is none, or nothing in it."""
        try:
            found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            if not folder.is_dir() or all(path.suffix == WRITING for path in folder.iterdir()):
                return False
            raise ConfigError(
                f"{folder}: exists and is no training run of psa-vlm; choose another out"
            ) from None
        unknown = {key: None for key in self.record if key not in found}  # to an older version
        if differing := changes({**unknown, **found}, self.record):
            raise ConfigError(
                f"{folder}: holds a run with other {', '.join(differing)}; choose another out, or"
                " delete it"
            )
        return True


def read_samples(config: RunConfig, taxonomy: Taxonomy) -> list[Sample]:
    """The training data that a configuration names.

    Raises:
        ConfigError: it names none.
        DataError, ImageError: a file is malformed, or an image is missing.
    """
    if not config.data:
        raise ConfigError("data is empty; name a file: data=[{path: train.json}]")
    return [
        sample
        for file in config.data
        for sample in read(
            file.path, file.images_dir, taxonomy, format=file.format, categories=file.map
        )
    ]


def loading(config: RunConfig) -> dict[str, Any]:
    """How a configuration wants the backbone to be loaded, in the process that trains it."""
    return {
        "dtype": None if config.dtype == "auto" else getattr(torch, config.dtype),
        "device": device(),
        "attention": config.attention,
        "bits": config.bits,
    }


def fingerprint(samples: Sequence[Sample]) -> str:
    """16 hex digits of what samples say and show, in their order."""
    keys: dict[Path, str] = {}
    digest = hashlib.sha256()
    for sample in samples:
        for image in sample.images:
            if not isinstance(image, Path):
                digest.update(image_key(image).encode())
                continue
            if image not in keys:
                keys[image] = image_key(image)
            digest.update(keys[image].encode())
        turns = [(turn.role, turn.text) for turn in sample.conversation]
        digest.update(repr((sample.id, turns, sample.type, sample.level)).encode())
    return digest.hexdigest()[:16]


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file in one piece.

    Raises:
        CheckpointError: it can't be written.
    """
    writing = path.with_name(path.name + WRITING)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        writing.write_text(json.dumps(data, indent=1), encoding="utf-8")
        os.replace(writing, path)
    except OSError as error:
        writing.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: can't be written ({error.strerror})") from error
