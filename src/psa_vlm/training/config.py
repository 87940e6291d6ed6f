"""What a training run is told: a YAML file with typed fields, and command-line overrides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from psa_vlm.model.head import Pooling
from psa_vlm.model.loading import Attention, Bits
from psa_vlm.model.projector import Projector
from psa_vlm.typed_yaml import Section
from psa_vlm.typed_yaml import load as load


class DataFile(Section):
    """A data set on disk, in any layout that `psa-vlm data inspect` knows."""

    path: Path
    """A data file, a set's folder, or a split that `psa-vlm data prepare` wrote."""
    images_dir: Path | None = None
    """What its image paths are relative to; null is where the layout has them."""
    format: str | None = None
    """Name of its layout; null guesses."""
    map: Path | None = None
    """YAML file of categories over the shipped one."""


class Schedule(Section):
    """How one part is trained; AdamW throughout."""

    epochs: int = Field(default=3, ge=0)
    """Passes over the samples; 0 trains nothing."""
    learning_rate: float = Field(default=1e-5, ge=0, allow_inf_nan=False)
    """Highest learning rate, reached after the warm-up."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises from 0."""
    scheduler: Literal["constant_with_warmup", "cosine", "linear"] = "cosine"
    """How the learning rate goes on after the warm-up."""
    batch_size: int = Field(default=2, ge=1)
    """Samples at a time on each device."""
    accumulation: int = Field(default=1, ge=1)
    """Batches whose gradients make one step."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Of AdamW."""
    max_grad_norm: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """Longer gradients are scaled down to this norm; 0 leaves them alone."""
    bfloat16: bool = False
    """Compute in bfloat16 where that is safe; what is trained stays in float32."""
    workers: int = Field(default=0, ge=0)
    """Processes that read samples ahead; 0 reads them in the training process."""
    log_every: int = Field(default=10, ge=1)
    """Steps from one point of the loss curve to the next."""
    checkpoint_every: int = Field(default=100, ge=1)
    """Steps from one checkpoint to the next."""


class Hardening(Section):
    """What the bottleneck is trained to withstand; nothing by default."""

    feature_noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Gaussian noise on cached vision features, in standard deviations of each image's own."""
    pixel_noise: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Standard deviation of Gaussian noise on pixel values, of 255."""
    eps: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Most change of a pixel value by an attack in training, of 255; 0 attacks nothing."""
    steps: int = Field(default=2, ge=1)
    """Gradient steps of such an attack, each a pass through the vision encoder and back."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Of each batch, and of the loss, that stands under noisy or attacked pixels."""

    @property
    def on_pixels(self) -> bool:
        """Whether images have to be encoded anew at each step."""
        return bool(self.pixel_noise or self.eps)


class ConceptsConfig(Schedule):
    """Stage I, concepts: safety projector, safety tokens (1) and safety head."""

    weight: float = Field(default=10.0, gt=0, allow_inf_nan=False)
    """Factor of the concept losses."""
    class_balance: bool = False
    """Weigh each type and level by the inverse of its frequency in the samples."""
    encode_batch: int = Field(default=32, ge=1)
    """Images in one pass of the vision encoder, whose features are kept on disk."""
    cache_gb: float = Field(default=100.0, ge=0)
    """Most that they may take, in 10^9 bytes; past it images are encoded in every epoch."""
    hidden: int = Field(default=1088, ge=1)
    """Channels of the safety projector."""
    tokens: int = Field(default=64, ge=0)
    """Number of safety tokens (1); 0 is none."""
    heads: int = Field(default=8, ge=1)
    """Heads of the cross-attention."""
    depth: int = Field(default=3, ge=1)
    """Projector blocks before, and again after, the pooling."""
    readout_depth: int = Field(default=2, ge=1)
    """Linear layers of the projector's closing MLP."""
    pooling: Pooling = "text"
    """How the head reads the text: "text" is all of it under its mask, "first" the authors' way;
    "none" leaves text and cross-attention out."""
    queries: tuple[int, int] | None = None
    """Rows and columns of the safety features; null keeps the grid of the image."""
    projector: Projector = "abstractor"
    """The paper's C-Abstractor, or "linear": one linear layer, without `hidden` and the depths."""
    hardening: Hardening = Hardening()
    """Noise and attacks that the bottleneck learns to withstand."""


class EncoderSchedule(Schedule):
    """Hardening of the vision encoder, before stage I."""

    eps: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Most change of a pixel value by an attack in training, of 255."""
    steps: int = Field(default=10, ge=1)
    """Gradient steps of such an attack, each a pass through the vision encoder and back."""


class LanguageSchedule(Schedule):
    """Training through the language model."""

    gradient_checkpointing: bool = False
    """Compute activations twice instead of keeping them: less memory, more time."""
    group_by_length: bool = False
    """Put samples of like length into a batch, so that little of it is padding."""


class TokensConfig(LanguageSchedule):
    """Stage I, tokens: the embedding rows of the safety tokens (2)."""

    count: int = Field(default=64, ge=0)
    """Number of safety tokens (2); 0 is none."""


class LoraConfig(LanguageSchedule):
    """LoRA on every linear layer of the language model; the paper's sizes."""

    r: int = Field(default=256, ge=1)
    """Rank."""
    alpha: float = Field(default=16.0, gt=0, allow_inf_nan=False)
    """The update is scaled by alpha / r."""
    dropout: float = Field(default=0.05, ge=0, lt=1)
    """Share of a layer's inputs that the update does not see."""


class RunConfig(Section):
    """What both stages are told."""

    out: Path
    """The run folder to write; while training, `<out>.work` stands beside it."""
    data: tuple[DataFile, ...] = ()
    """Training data; empty only where the caller passes samples."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of weights, order and dropout."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Of the frozen backbone; "auto" keeps its checkpoint's."""
    attention: Attention | None = None
    """Implementation of the backbone's attention; null leaves it to transformers."""
    bits: Bits | None = None
    """Quantise the frozen language model to 4 or 8 bits, on a GPU; null keeps it as it is."""
    report_to: tuple[str, ...] = ("tensorboard",)
    """Where loss curves go besides `history.json`: names that transformers knows."""

    @property
    def schedules(self) -> dict[str, Schedule]:
        """The parts that are trained, by name."""
        sections = {name: getattr(self, name) for name in type(self).model_fields}
        return {name: part for name, part in sections.items() if isinstance(part, Schedule)}

    def inputs(self) -> dict[str, str | Path]:
        """Every path that is read, by key."""
        return {f"data.{i}.path": file.path for i, file in enumerate(self.data)}

    @model_validator(mode="after")
    def _check(self) -> Self:
        """All that concerns more than one field."""
        for key, path in self.inputs().items():
            if Path(path).resolve() == self.out.resolve():
                raise ValueError(f"out is {self.out}, which {key} reads; choose another out")
        for name, part in self.schedules.items():
            if part.checkpoint_every % part.log_every:
                raise ValueError(
                    f"{name}.checkpoint_every is {part.checkpoint_every}; make it a multiple of"
                    f" {name}.log_every ({part.log_every}), so that a resumed loss curve is whole"
                )
        return self


class EncoderConfig(RunConfig):
    """Before stage I: a base model whose vision encoder withstands changed pixels."""

    backbone: str
    """Folder or hub id of the vision-language model."""
    dtype: Literal["float32"] = "float32"
    """The encoder's weights are trained; `encoder.bfloat16` computes in bfloat16."""
    bits: None = None
    """What is written is a whole base model, whose language model can't be quantised."""
    encoder: EncoderSchedule = EncoderSchedule()

    def inputs(self) -> dict[str, str | Path]:
        return {**super().inputs(), "backbone": self.backbone}


class Stage1Config(RunConfig):
    """Stage I: safety concept extraction."""

    backbone: str
    """Folder or hub id of the vision-language model."""
    taxonomy: Path | None = None
    """YAML file of types and levels; null is the paper's."""
    policy: Path | None = None
    """YAML file or shipped name that the run is saved with; null is the paper's behaviour."""
    concepts: ConceptsConfig = ConceptsConfig()
    tokens: TokensConfig = TokensConfig()

    def inputs(self) -> dict[str, str | Path]:
        return {**super().inputs(), "backbone": self.backbone}


class Stage2Config(RunConfig):
    """Stage II: safety alignment of the language model."""

    model: Path
    """Run folder of stage I."""
    policy: Path | None = None
    """YAML file or shipped name: hints are drawn from it, and the run is saved with it; null is
    stage I's."""
    misstated_hints: float = Field(default=0.0, ge=0, le=1)
    """Share of verdicts whose hint is that of another level below the highest, or is left out, so
    that the language model weighs the image and the request itself."""
    assess_batch: int = Field(default=16, ge=1)
    """Samples whose verdicts are computed at a time."""
    lora: LoraConfig = LoraConfig()

    def inputs(self) -> dict[str, str | Path]:
        return {**super().inputs(), "model": self.model}


def changes(old: object, new: object, prefix: str = "") -> list[str]:
    """The keys in which two dumped configurations differ, as `section.key`."""
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return [] if old == new else [prefix]
    keys = [*old, *(key for key in new if key not in old)]
    missing = object()
    return [
        found
        for key in keys
        for found in changes(
            old.get(key, missing), new.get(key, missing), f"{prefix}.{key}" if prefix else key
        )
    ]
