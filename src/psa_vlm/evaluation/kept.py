"""What was computed once stays on disk, so that whatever is stopped goes on from there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from safetensors.numpy import load_file, save_file

from psa_vlm.evaluation.scorecard import git_commit, write_whole
from psa_vlm.inference import PsaVlm
from psa_vlm.model.probe import is_adapter, probe

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

    Row = TypeVar("Row", bound=DataclassInstance)

Arrays = dict[str, np.ndarray[Any, Any]]


def key(*settings: object) -> str:
    """16 hex digits of all that decides what is computed: the settings, and the code's commit."""
    return hashlib.sha256(repr((*settings, _commit())).encode()).hexdigest()[:16]


def identity(model: PsaVlm) -> tuple[object, ...]:
    """What tells one run from another: its weights, its policy, its calibration."""
    calibration = model.calibration and model.calibration.to_json()
    added = [
        float(weight.detach().double().sum())
        for name, weight in model.backbone.model.named_parameters()
        if is_adapter(name)
    ]
    weights = (probe(model.backbone.model), added, probe(model.bottleneck))
    return (*weights, model.policy.hash, calibration)


def rows(path: Path, kind: type[Row], make: Callable[[], list[Row]]) -> list[Row]:
    """Dataclasses of plain values, one to a line of `path`; made where there is no such file."""
    if path.exists():
        return [kind(**json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    made = make()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(asdict(one)) + "\n" for one in made))
    return made


def arrays(path: Path, make: Callable[[], Arrays]) -> Arrays:
    """Arrays by name, as safetensors at `path`; made where there is no such file."""
    if path.exists():
        loaded: Arrays = load_file(path)
        return loaded
    made = {name: np.ascontiguousarray(value) for name, value in make().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(made, part)
    part.rename(path)
    return made


_commit = lru_cache(git_commit)  # of the code that runs, whatever is committed meanwhile
