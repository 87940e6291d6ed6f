"""Trainer checkpoints that survive a crash: only a complete one is ever resumed from."""

from __future__ import annotations

import errno
import os
import re
import shutil
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from psa_vlm.errors import CheckpointError
from psa_vlm.training import processes

COMPLETE = "complete"
"""A checkpoint without this empty file was cut off while it was written."""
KEPT = 2
"""Checkpoints on disk: while the newer one is written, the older one is complete."""

SAVE_ERRORS = (OSError, RuntimeError, SafetensorError)
"""What the writers of a checkpoint raise when the disk is full: Python's, torch's, safetensors'."""


class MarkComplete(TrainerCallback):
    """Marks a checkpoint once every process has written all of it."""

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        processes.wait()
        if state.is_world_process_zero:
            (Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / COMPLETE).touch()


def checkpoints(folder: Path) -> list[Path]:
    """Every checkpoint in a folder, complete or not, the oldest first."""
    found = {
        int(match[1]): path
        for path in folder.glob("checkpoint-*")
        if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    return [found[step] for step in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint, None without one."""
    complete = [path for path in checkpoints(folder) if (path / COMPLETE).exists()]
    return complete[-1] if complete else None


def remove_incomplete(folder: Path) -> list[Path]:
    """Delete the checkpoints that were cut off; what is deleted comes back."""
    incomplete = [path for path in checkpoints(folder) if not (path / COMPLETE).exists()]
    for path in incomplete:
        shutil.rmtree(path)
    return incomplete


def save_error(error: Exception, folder: Path) -> CheckpointError | None:
    """The one line for an error that cut off a checkpoint, whose remains are deleted.

    Args:
        error: one of `SAVE_ERRORS`, raised in training.
        folder: where the checkpoints are.

    Returns:
        None if no checkpoint was being written and the disk is not full.
    """
    cut_off = remove_incomplete(folder)
    number = error.errno if isinstance(error, OSError) else None
    full = number in (errno.ENOSPC, errno.EDQUOT)
    if not cut_off and not full:
        return None
    kept = latest(folder)
    last = f"{kept.name} is kept" if kept else "there is no earlier one"
    reason = os.strerror(number) if number else " ".join(str(error).split())
    return CheckpointError(
        f"{cut_off[0] if cut_off else folder}: can't be written ({reason}); {last}: free some"
        " space and run the same command again"
    )
