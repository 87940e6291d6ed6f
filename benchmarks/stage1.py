"""Stage I, concepts: learned from cached features, against the same losses computed jointly.

    python benchmarks/stage1.py                                  # the testbed, on the CPU
    python benchmarks/stage1.py --shape llava-1.5-7b             # a CUDA machine, extrapolated
    python benchmarks/stage1.py --shape llava-1.5-7b --full      # all 14,000 samples, 3 epochs

cached  `psa_vlm.training.concepts.train_concepts`: each image goes through the vision encoder once,
        and the epochs after that touch only the bottleneck. The time of the encoding is shared out
        over the epochs.
joint   as the authors train it: every step encodes the images, runs the frozen language model, and
        goes back through it to the safety tokens (2) and through the bottleneck to the rest of what
        stage I trains, for the concept losses and the language-model loss together.

Both run on `transformers.Trainer` with the schedule of the shape's configuration, from the start of
the call to its end. Times are for one sample and epoch ("encode": for one image).
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from peft import TrainableTokensConfig, get_peft_model
from rich.console import Console
from torch import Tensor, nn

from common import SHAPES, SIZES, Ratio, Shape, arguments, device_for, report, twin, wait
from psa_vlm import Backbone, SafetyBottleneck, Sample, Taxonomy
from psa_vlm.data.images import open_images
from psa_vlm.model.bottleneck import BottleneckConfig, concept_loss
from psa_vlm.model.tokens import add_safety_tokens
from psa_vlm.testbed.cases import alignment_samples
from psa_vlm.training import processes
from psa_vlm.training.concepts import train_concepts, verdict_text
from psa_vlm.training.config import Stage1Config
from psa_vlm.training.features import FeatureCache, image_key
from psa_vlm.training.fit import Rows, Task, Work, fit

SAMPLES, EPOCHS = 14_000, 3  # the paper's
MEASURED = {"testbed": 256, "llava-1.5-7b": 512}


class Joint(Task):
    """Both losses of stage I in one step, with nothing cached."""

    def __init__(self, backbone: Backbone, bottleneck: SafetyBottleneck, model: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.bottleneck = bottleneck
        self.model = model
        self.taxonomy = Taxonomy.default()

    def forward(self, batch: list[Sample]) -> dict[str, Tensor]:
        """Args: B samples, each with one image, labels and an answer."""
        concepts, language = self.losses(batch)
        return {"loss": concepts + language}

    def losses(self, batch: list[Sample]) -> tuple[Tensor, Tensor]:
        """The concept losses, and that of the language model."""
        pictures = [picture for sample in batch for picture in open_images(sample.images[0])]
        features = self.backbone.encode(pictures)
        h_t, mask = self.backbone.embed_text([verdict_text(sample) for sample in batch])
        output = self.bottleneck(features.h_o, h_t, mask, features.grid)
        levels = [self.taxonomy.level_id(sample.level or "") for sample in batch]
        types = [self.taxonomy.type_id(sample.type or "") for sample in batch]
        concepts = concept_loss(output, torch.tensor(levels), torch.tensor(types))
        inputs = self.backbone.prompts(
            [sample.conversation[:-1] for sample in batch],
            [1] * len(batch),
            answers=[sample.answer or "" for sample in batch],
        )
        encoded = features.mm_encoder_outputs()
        return concepts, self.model(**inputs, mm_encoder_outputs=encoded, use_cache=False).loss


class Bench:
    """The two ways, on the same weights and samples.

    Args:
        shape: of the model.
        device: to run on.
        config: sizes and schedules.
        samples: labelled and answered, with one image file each.
        joint_samples: those that the joint way is measured on.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        config: Stage1Config,
        samples: Sequence[Sample],
        joint_samples: Sequence[Sample],
    ) -> None:
        torch.manual_seed(0)
        model, processor = shape.base(device)
        self.device, self.config = device, config
        self.samples, self.joint_samples = samples, joint_samples
        self.backbone = Backbone(model, processor)
        self.joint_backbone = Backbone(twin(model), copy.deepcopy(processor))
        ids = add_safety_tokens(self.joint_backbone, config.tokens.count)
        with warnings.catch_warnings():  # of an attribute that transformers renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            self.joint_model: nn.Module = get_peft_model(
                self.joint_backbone.model, TrainableTokensConfig(token_indices=list(ids))
            )

    def encode(self, folder: Path) -> None:
        """The cached way's first part: the features of every image."""
        cache = FeatureCache(folder / "features", self.backbone)
        images = [sample.images[0] for sample in self.samples]
        cache.add(
            [(image_key(image), image) for image in images], self.config.concepts.encode_batch
        )

    def train(self, folder: Path) -> None:
        """Its second part: every epoch, on the features in the folder."""
        concepts, work = self.config.concepts, Work(folder, report_to=())
        train_concepts(self.backbone, Taxonomy.default(), self.samples, concepts, work)

    def train_jointly(self, folder: Path) -> None:
        """One epoch of the joint way."""
        sizes = self.config.concepts.model_dump(include=set(SIZES))
        backbone = self.joint_backbone
        bottleneck = SafetyBottleneck(
            BottleneckConfig(backbone.vision_width, backbone.text_width, **sizes)
        )
        fit(
            Joint(backbone, bottleneck.to(self.device), self.joint_model),
            Rows(list(self.joint_samples)),
            lambda batch: {"batch": batch},
            self.config.tokens.model_copy(update={"epochs": 1}),
            Work(folder, report_to=()),
        )

    def measure(self, repeats: int) -> dict[str, list[float]]:
        """Seconds for a sample: to encode it, for each epoch after that, and by each way in all."""
        count, epochs = len(self.samples), self.config.concepts.epochs
        seconds: dict[str, list[float]] = {"encode": [], "train": [], "cached": [], "joint": []}
        for _ in range(repeats):
            with TemporaryDirectory() as folder:
                encode = self._seconds(self.encode, Path(folder, "cached"))
                train = self._seconds(self.train, Path(folder, "cached"))
                joint = self._seconds(self.train_jointly, Path(folder, "joint"))
            seconds["encode"].append(encode / count)
            seconds["train"].append(train / (count * epochs))
            seconds["cached"].append((encode + train) / (count * epochs))
            seconds["joint"].append(joint / len(self.joint_samples))
        return seconds

    def _seconds(self, part: Callable[[Path], None], folder: Path) -> float:
        wait(self.device)
        start = time.perf_counter()
        part(folder)
        wait(self.device)
        return time.perf_counter() - start


def write_samples(shape: Shape, count: int, folder: Path) -> list[Sample]:
    """Labelled, answered samples, each with an image file of its own."""
    samples = []
    for sample in alignment_samples(count, seed=0):
        path = folder / sample.id
        with path.open("wb") as stream:
            shape.write(sample.images[0], stream)
        samples.append(replace(sample, images=(path,)))
    return samples


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, help="to measure with (256; 512 at 7B)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--full", action="store_true", help="run the cached way on all 14,000")
    options = parser.parse_args(argv)
    device_for(parser, options)
    shape, measured = SHAPES[options.shape], options.samples or MEASURED[options.shape]
    config = shape.config(*options.set)
    with TemporaryDirectory() as folder:
        samples = write_samples(shape, SAMPLES if options.full else measured, Path(folder))
        bench = Bench(shape, processes.device(), config, samples, samples[:measured])
        seconds = bench.measure(options.repeats)
    middle = {what: median(values) for what, values in seconds.items()}
    facts = {
        "samples": len(samples),
        "joint_samples": measured,
        "epochs": config.concepts.epochs,
        "batch": config.concepts.batch_size,
        "joint_batch": f"{config.tokens.batch_size} x {config.tokens.accumulation}",
        "samples_per_second": {what: 1 / middle[what] for what in ("cached", "joint")},
        "paper_scale_seconds": {
            "cached": SAMPLES * (middle["encode"] + EPOCHS * middle["train"]),
            "joint": SAMPLES * EPOCHS * middle["joint"],
        },
    }
    target = 10.0 if options.shape == "testbed" else None
    ratios = [Ratio("joint", "cached", at_least=target)]
    report("stage1", options, bench.device, seconds, ratios, facts)
    for what in ("cached", "joint"):
        Console().print(
            f"{what}: {facts['samples_per_second'][what]:.0f} samples/s,"
            f" {facts['paper_scale_seconds'][what]:.0f} s for {SAMPLES:,} samples x {EPOCHS} epochs"
            f" (from {len(samples if what == 'cached' else bench.joint_samples):,} samples)"
        )


if __name__ == "__main__":
    main()
