"""Training through the language model: the safety tokens (2) of stage I, the LoRA of stage II."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import set_seed

from psa_vlm.data.images import Source, open_images
from psa_vlm.data.sample import Sample, Turn
from psa_vlm.errors import DataError
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.prompts import IGNORED
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.training.config import LanguageSchedule, LoraConfig, TokensConfig
from psa_vlm.training.fit import History, Task, Work, fit

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from PIL.Image import Image


@dataclass(frozen=True)
class Dialogue:
    """What the language model is to say."""

    images: tuple[Source, ...]
    """Files or pictures."""
    conversation: tuple[Turn, ...]
    """Turns up to the user's last."""
    answer: str
    """The assistant's next words, on which the loss is."""
    hint: str | None = None
    """The policy's sentence beside the question."""


def dialogues(
    samples: Sequence[Sample], hints: Sequence[str | None] | None = None
) -> list[Dialogue]:
    """The last exchange of each sample, with what was said before it.

    Args:
        samples: each with an answer.
        hints: one for each sample; None is none at all.

    Raises:
        DataError: counts the samples without an answer.
    """
    unanswered = [sample for sample in samples if not sample.answer]
    if unanswered:
        raise DataError(
            f"{len(unanswered)} of {len(samples)} samples have no answer, {unanswered[0].id} the"
            " first: the language model has nothing to learn there; complete or remove them"
        )
    return [
        Dialogue(sample.images, _until_question(sample), sample.answer or "", hint)
        for sample, hint in zip(samples, hints or [None] * len(samples), strict=True)
    ]


def _until_question(sample: Sample) -> tuple[Turn, ...]:
    turns = list(sample.conversation)
    while turns[-1].role != "user":
        turns.pop()
    return tuple(turns)


class Size(NamedTuple):
    """How many tokens a dialogue has."""

    all: int
    """Prompt and answer, its images taken as small ones."""
    answer: int
    """Those that the loss is on."""


def sizes(backbone: Backbone, rows: Sequence[Dialogue]) -> list[Size]:
    """Count the tokens of each dialogue."""
    counted = []
    for row in rows:
        prompt = backbone.prompts(
            [row.conversation], [len(row.images)], [row.hint], answers=[row.answer]
        )
        counted.append(Size(prompt["labels"].numel(), _answer_tokens(prompt["labels"])))
    return counted


def _answer_tokens(labels: Tensor) -> int:
    return int((labels != IGNORED).sum())


class _Opened(Dataset[tuple[Dialogue, "list[Image]", Size]]):
    """Dialogues with their images open, read as they are needed."""

    def __init__(self, rows: Sequence[Dialogue], counted: Sequence[Size]) -> None:
        self.rows = rows
        self.sizes = counted

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Dialogue, list[Image], Size]:
        row = self.rows[index]
        images = [frame for image in row.images for frame in open_images(image)]
        return row, images, self.sizes[index]


def _collate(batch: list[tuple[Dialogue, list[Image], Size]]) -> dict[str, Any]:
    """The batch, and as many labels as its answers have tokens, for Trainer to count."""
    tokens = sum(size.answer for _, _, size in batch)
    return {"batch": [(row, images) for row, images, _ in batch], "labels": torch.zeros(tokens)}


def layers(model: nn.Module, backbone: Backbone) -> list[str]:
    """Class names of the model's layers, as its family names them, of those that it has."""
    present = {type(module).__name__ for module in model.modules()}
    return sorted(present & set(backbone.model._no_split_modules or ()))


class _Answers(Task):
    """The language-model loss on the answers, with prompts as inference builds them.

    Args:
        model: the backbone's model with what is trained inside it, as PEFT wraps it.
        backbone: builds prompts and encodes images.
    """

    accepts_loss_kwargs = True
    """Trainer tells how many tokens a step's answers have, on all devices and batches of it."""

    def __init__(self, model: nn.Module, backbone: Backbone) -> None:
        super().__init__()
        self.model = model
        self.backbone = backbone
        self._no_split_modules = layers(model, backbone)  # what FSDP shards one by one

    def train(self, mode: bool = True) -> _Answers:
        super().train(mode)
        self.backbone.model.eval()  # no dropout on the way of the image
        self.backbone.model.get_decoder().train(mode)
        return self

    def forward(
        self,
        batch: list[tuple[Dialogue, list[Image]]],
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The mean over the tokens of the answers.

        Args:
            batch: B dialogues with their images.
            labels: for Trainer.
            num_items_in_batch: tokens that the mean is over, if this batch is part of a step: so
                a step is the same in however many parts it is computed.
        """
        rows = [dialogue for dialogue, _ in batch]
        images = [image for _, images in batch for image in images]
        counts = [len(images) for _, images in batch]
        features = self.backbone.encode(images, counts) if images else None
        inputs = self.backbone.prompts(
            [row.conversation for row in rows],
            counts,
            [row.hint for row in rows],
            answers=[row.answer for row in rows],
            features=features,
        )
        arguments = self.backbone.arguments(inputs, features)
        output = self.backbone.language(**arguments, use_cache=False)
        if num_items_in_batch is None:
            return {"loss": output.loss}
        return {"loss": output.loss * (_answer_tokens(inputs["labels"]) / num_items_in_batch)}


def _fit(
    model: nn.Module,
    backbone: Backbone,
    rows: Sequence[Dialogue],
    schedule: LanguageSchedule,
    work: Work,
) -> History:
    if schedule.gradient_checkpointing:
        backbone.model.activation_checkpointing_enable()
    counted = sizes(backbone, rows)
    lengths = [size.all for size in counted] if schedule.group_by_length else None
    task = _Answers(model, backbone)
    history = fit(task, _Opened(rows, counted), _collate, schedule, work, lengths)
    if schedule.gradient_checkpointing:
        backbone.model.activation_checkpointing_disable()
    return history


def _with_adapter(backbone: Backbone, config: PeftConfig) -> PeftModel:
    """Put what is to be trained into the layers of the backbone's model."""
    from peft import get_peft_model

    with warnings.catch_warnings():  # of an attribute that transformers renamed
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(backbone.model, config)


def train_tokens(
    backbone: Backbone,
    samples: Sequence[Sample],
    config: TokensConfig,
    work: Work,
    hints: Sequence[str | None] | None = None,
) -> History:
    """Add the safety tokens (2) and train their embedding rows; every other weight stays as it is.

    The prompts hold the hints that inference will use: without them, the tokens would learn to
    refuse whatever is asked.

    Args:
        backbone: changed in place.
        samples: answered.
        config: `count` 0 adds nothing and trains nothing.
        work: where checkpoints go.
        hints: one for each sample; None is none at all (paper: stage I).

    Raises:
        DataError: samples without answer, which it counts.
        ImageError: an image can't be used.
        CheckpointError: a checkpoint can't be written.
    """
    from peft import TrainableTokensConfig

    rows = dialogues(samples, hints)
    if config.count == 0:
        return []
    ids = add_safety_tokens(backbone, config.count, work.seed)
    model = _with_adapter(backbone, TrainableTokensConfig(token_indices=list(ids)))
    history = _fit(model, backbone, rows, config, work)
    backbone.model = model.merge_and_unload().eval().requires_grad_(False)
    return history


def train_lora(
    backbone: Backbone, rows: Sequence[Dialogue], config: LoraConfig, work: Work
) -> tuple[PeftModel, History]:
    """Train LoRA on the language model's linear layers; the backbone's weights stay as they are.

    Args:
        backbone: the update is put into its layers, where it acts from now on.
        rows: what to say, and beside which hint.
        config: size and schedule.
        work: where checkpoints go.

    Returns:
        The adapter, not merged: `merge_adapter()` makes it free to run.

    Raises:
        ImageError: an image can't be used.
        CheckpointError: a checkpoint can't be written.
    """
    import peft

    set_seed(work.seed)
    adapter = _with_adapter(
        backbone,
        peft.LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            lora_dropout=config.dropout,
            target_modules=backbone.spec.language_layers,
        ),
    )
    history = _fit(adapter, backbone, rows, config, work)
    return adapter.eval().requires_grad_(False), history
