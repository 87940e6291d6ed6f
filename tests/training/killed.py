"""Runs a stage in a process that kills itself, as by `kill -9`, at a named moment.

Started through `runpy` with the globals `stage` (a function), `config`, `samples` and `moment`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import Trainer

from psa_vlm.model import checkpoint
from psa_vlm.training import concepts, features, hints, language, runs
from psa_vlm.training.checkpoints import MarkComplete


def die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def nth(call: int, original: Callable[..., Any], instead: Callable[..., Any]) -> Callable[..., Any]:
    """The original, but for one call of it."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return (instead if len(calls) == call else original)(*args, **kwargs)

    return counted


def half(data: Any, path: Path, *args: Any, **kwargs: Any) -> None:
    Path(path).write_bytes(b"half of a file")
    die()


def half_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    half(data, path.with_name(path.name + runs.WRITING))


def at(owner: Any, name: str, call: int = 1, instead: Callable[..., Any] = die) -> None:
    setattr(owner, name, nth(call, getattr(owner, name), instead))


MOMENTS: dict[str, Callable[[], None]] = {
    "record half written": lambda: at(runs, "write_json", 1, half_json),
    "features half written": lambda: at(features, "save_file", 2, half),
    "features written": lambda: at(concepts, "fit"),
    "between checkpoints": lambda: at(Trainer, "training_step", 4),
    "checkpoint half written": lambda: at(Trainer, "_save_optimizer_and_scheduler"),
    "checkpoint not marked": lambda: at(MarkComplete, "on_save"),
    "all checkpoints written": lambda: at(Trainer, "_finalize_training"),
    "before the tokens": lambda: at(language, "add_safety_tokens"),
    "in the tokens": lambda: at(language._Answers, "forward", 3),
    "hints half written": lambda: at(hints, "write_json", 1, half_json),
    "run half written": lambda: at(checkpoint, "_sync"),
    "work not deleted": lambda: at(runs.Run, "clean"),
}

if moment := globals().get("moment"):
    MOMENTS[moment]()
globals()["stage"](globals()["config"], globals()["samples"])
