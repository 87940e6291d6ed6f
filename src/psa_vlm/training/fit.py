"""One training, start to end, on `transformers.Trainer`; a run that was killed goes on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainingArguments
from transformers.trainer_pt_utils import get_length_grouped_indices

from psa_vlm.errors import CheckpointError, DataError, MissingExtra
from psa_vlm.training import processes
from psa_vlm.training.checkpoints import (
    KEPT,
    SAVE_ERRORS,
    MarkComplete,
    latest,
    remove_incomplete,
    save_error,
)
from psa_vlm.training.config import Schedule

T = TypeVar("T")
History = list[dict[str, float]]
"""The loss curve: `{"step", "epoch", "loss", "grad_norm", "learning_rate"}` for each point."""


@dataclass(frozen=True)
class Work:
    """Where a training keeps its checkpoints, and what it shares with the others of its run."""

    folder: Path
    """For checkpoints, and event files for TensorBoard; a complete checkpoint in it is resumed."""
    seed: int = 0
    """Of new weights, order and dropout."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where the loss curve goes besides the `History`."""


class Task(nn.Module):
    """What Trainer trains: its forward gives the loss, its state is what is trained, no more.

    So a checkpoint holds exactly the parameters that require a gradient, and a frozen backbone
    of any size is neither saved nor read again.
    """

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:  # type: ignore[override]
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        state: Mapping[str, Tensor] = super().state_dict(*args, **kwargs)
        return {name: tensor for name, tensor in state.items() if name in trained}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load what `state_dict` gave.

        Raises:
            CheckpointError: it holds other parameters.
        """
        differing = sorted(set(state_dict) ^ set(self.state_dict()))
        if differing:
            raise CheckpointError(
                f"the checkpoint holds other parameters than this training ({differing[0]}, "
                f"{len(differing)} in all): delete it and start again"
            )
        super().load_state_dict(state_dict, strict=False, assign=assign)
        return nn.modules.module._IncompatibleKeys([], [])


class Rows(Dataset[T]):
    """Samples in memory, as torch wants them."""

    def __init__(self, rows: Sequence[T]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> T:
        return self.rows[index]


class ByLength(Sampler[int]):
    """Rows of like length side by side, in an order that seed and epoch decide on every process.

    Args:
        lengths: of the rows.
        batch: rows of a step.
        seed: of the order.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int) -> None:
        self.lengths = list(lengths)
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def set_epoch(self, epoch: int) -> None:
        """Called by Trainer, so that a run that is resumed goes on in the same order."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        order = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=order))


class _Trainer(Trainer):
    """Trainer that knows how long the rows are, and groups them if it does."""

    lengths: Sequence[int] | None = None

    def _get_train_sampler(self, train_dataset: Dataset[Any] | None = None) -> Sampler[int] | None:
        if self.lengths is None:
            found: Sampler[int] | None = super()._get_train_sampler(train_dataset)
            return found
        rows = self.args.train_batch_size * self.args.gradient_accumulation_steps
        return ByLength(self.lengths, rows * self.args.world_size, self.args.seed)


class _Bar(ProgressCallback):
    """Trainer's progress bar, with the loss in it instead of a dictionary below it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)  # type: ignore[no-untyped-call]
        if self.training_bar is not None:
            self.training_bar.set_description(self.name)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{float(logs['loss']):.3g}")


def check_extras(report_to: Sequence[str]) -> None:
    """See that what training needs is installed.

    Raises:
        MissingExtra: a package of the extra `train` is not.
    """
    needed = ["accelerate", *(["tensorboard"] if "tensorboard" in report_to else [])]
    for package in needed:
        if find_spec(package) is None:
            raise MissingExtra(package, "train")


def fit(
    task: Task,
    rows: Dataset[Any],
    collate: Any,
    schedule: Schedule,
    work: Work,
    lengths: Sequence[int] | None = None,
) -> History:
    """Train a task in place, from the newest complete checkpoint in `work.folder` if there is one.

    The outcome is the same, bit for bit, however often the process was killed on the way.

    Args:
        task: its forward takes what `collate` makes, and returns `{"loss": scalar}`.
        rows: the samples.
        collate: makes a dictionary of a list of rows.
        schedule: how long and how fast.
        work: where checkpoints go.
        lengths: of the rows; those of like length are put together. None leaves it to chance.

    Raises:
        DataError: there are no samples.
        CheckpointError: a checkpoint can't be written; the last good one is kept.
    """
    if not len(rows):  # type: ignore[arg-type]
        raise DataError("no samples to train on")
    if schedule.epochs == 0:
        task.eval()
        return []
    cpu = not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=str(work.folder),
        num_train_epochs=schedule.epochs,
        learning_rate=schedule.learning_rate,
        warmup_steps=schedule.warmup_steps,
        lr_scheduler_type=schedule.scheduler,
        per_device_train_batch_size=schedule.batch_size,
        gradient_accumulation_steps=schedule.accumulation,
        weight_decay=schedule.weight_decay,
        max_grad_norm=schedule.max_grad_norm,
        bf16=schedule.bfloat16,
        dataloader_num_workers=schedule.workers,
        dataloader_pin_memory=not cpu,
        logging_steps=schedule.log_every,
        save_strategy="steps",
        save_steps=schedule.checkpoint_every,
        save_total_limit=KEPT,
        seed=work.seed,
        report_to=list(work.report_to),
        remove_unused_columns=False,
        use_cpu=cpu,
    )
    with processes.main_first():
        remove_incomplete(work.folder)
        newest = latest(work.folder)
    trainer = _Trainer(
        task, arguments, train_dataset=rows, data_collator=collate, callbacks=[MarkComplete()]
    )
    trainer.lengths = lengths
    for theirs in (PrinterCallback, ProgressCallback):  # whichever Trainer chose
        trainer.remove_callback(theirs)
    trainer.add_callback(_Bar(work.folder.name))
    try:
        trainer.train(resume_from_checkpoint=None if newest is None else str(newest))
    except SAVE_ERRORS as error:
        if told := save_error(error, work.folder):
            raise told from error
        raise
    processes.unshard(task)
    task.eval()
    return [point for point in trainer.state.log_history if "loss" in point]
