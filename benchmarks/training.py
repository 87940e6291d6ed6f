"""Training speed of every stage, beside plain Trainer + PEFT on the same model and samples.

    python benchmarks/training.py                            # the testbed: ratios on the CPU
    python benchmarks/training.py --shape llava-1.5-7b       # random weights, on a CUDA machine

concepts  `psa_vlm.training.concepts.train_concepts`, one epoch, the encoding of the images included
tokens    `psa_vlm.training.language.train_tokens`
lora      `psa_vlm.training.language.train_lora`
plain     the Hugging Face model under `peft` and `transformers.Trainer` and nothing of ours: its
          processor makes the batches, its forward encodes the images; as many rows of the
          embedding, or the same LoRA, are trained under the same schedule

Each is timed from the start of the call to its end, for a sample of one epoch. Peak memory is what
CUDA had allocated at most. MFU is the share of the device's bfloat16 peak that the operations of
one forward and backward pass make up, as torch counts them, without what gradient checkpointing
computes twice.
"""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, TrainableTokensConfig, get_peft_model
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode
from transformers import PrinterCallback, Trainer, TrainingArguments

from common import SHAPES, Ratio, Shape, arguments, device_for, report, twin, wait
from psa_vlm import Backbone, Sample, Taxonomy
from psa_vlm.training.concepts import train_concepts
from psa_vlm.training.config import LanguageSchedule, Stage1Config, Stage2Config, load
from psa_vlm.training.fit import Rows, Work
from psa_vlm.training.language import dialogues, train_lora, train_tokens
from stage1 import write_samples

MEASURED = {"testbed": 128, "llava-1.5-7b": 256}
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16 operations a second, by what a card's name holds (the makers' data sheets)."""


class Bench:
    """Every way, each on a copy of the same model that shares its weights.

    Args:
        shape: of the model.
        device: to run on.
        first: configuration of stage I.
        second: configuration of stage II.
        samples: labelled and answered, with one image file each.
    """

    def __init__(
        self,
        shape: Shape,
        device: torch.device,
        first: Stage1Config,
        second: Stage2Config,
        samples: Sequence[Sample],
    ) -> None:
        torch.manual_seed(0)
        self.model, self.processor = shape.base(device)
        self.device = device
        once: dict[str, Any] = {"epochs": 1}
        self.parts = {
            "concepts": first.concepts.model_copy(update=once),
            "tokens": first.tokens.model_copy(update=once),
            "lora": second.lora.model_copy(update=once),
        }
        self.samples = samples

    def backbone(self) -> Backbone:
        return Backbone(twin(self.model), copy.deepcopy(self.processor))

    def concepts(self, work: Work) -> None:
        taxonomy = Taxonomy.default()
        train_concepts(self.backbone(), taxonomy, self.samples, self.parts["concepts"], work)

    def tokens(self, work: Work) -> None:
        train_tokens(self.backbone(), self.samples, self.parts["tokens"], work)

    def lora(self, work: Work) -> None:
        train_lora(self.backbone(), dialogues(self.samples), self.parts["lora"], work)

    def plain_tokens(self, work: Work) -> None:
        ids = list(range(self.parts["tokens"].count))  # any rows cost the same
        self._plain(TrainableTokensConfig(token_indices=ids), self.parts["tokens"], work)

    def plain_lora(self, work: Work) -> None:
        part, layers = self.parts["lora"], self.backbone().spec.language_layers
        config = LoraConfig(
            r=part.r, lora_alpha=part.alpha, lora_dropout=part.dropout, target_modules=layers
        )
        self._plain(config, part, work)

    def _plain(self, config: Any, part: LanguageSchedule, work: Work) -> None:
        """As a model card or a tutorial would have it."""
        with warnings.catch_warnings():  # of an attribute that transformers renamed
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            model = get_peft_model(twin(self.model), config)
        if part.gradient_checkpointing:
            model.enable_input_require_grads()
        cpu = self.device.type == "cpu"
        trainer = Trainer(
            model,
            TrainingArguments(
                output_dir=str(work.folder),
                num_train_epochs=part.epochs,
                learning_rate=part.learning_rate,
                per_device_train_batch_size=part.batch_size,
                gradient_accumulation_steps=part.accumulation,
                activation_checkpointing=part.gradient_checkpointing,
                bf16=part.bfloat16,
                dataloader_num_workers=part.workers,
                dataloader_pin_memory=not cpu,
                save_strategy="no",
                report_to=[],
                remove_unused_columns=False,
                disable_tqdm=True,
                use_cpu=cpu,
            ),
            train_dataset=Rows(list(self.samples)),
            data_collator=self._collate,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()

    def _collate(self, batch: list[Sample]) -> dict[str, Any]:
        texts = []
        for sample in batch:
            said = [{"type": "image"}, {"type": "text", "text": sample.question}]
            turns = [{"role": "user", "content": said}]
            prompt = self.processor.apply_chat_template(turns, add_generation_prompt=True)
            texts.append(f"{prompt} {sample.answer}{self.processor.tokenizer.eos_token}")
        images = [Image.open(sample.images[0]).convert("RGB") for sample in batch]
        inputs = self.processor(images=images, text=texts, padding=True, return_tensors="pt")
        inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        return {**inputs, "labels": labels}

    def ways(self) -> dict[str, Callable[[Work], None]]:
        return {
            "concepts": self.concepts,
            "tokens": self.tokens,
            "plain tokens": self.plain_tokens,
            "lora": self.lora,
            "plain lora": self.plain_lora,
        }

    def measure(self, repeats: int) -> tuple[dict[str, list[float]], dict[str, int | None]]:
        """Seconds for a sample by each way, in turn, and the most memory that it took."""
        seconds: dict[str, list[float]] = {way: [] for way in self.ways()}
        memory: dict[str, int | None] = dict.fromkeys(seconds)
        for _ in range(repeats):
            for way, train in self.ways().items():
                with TemporaryDirectory() as folder:
                    if self.device.type == "cuda":
                        torch.cuda.reset_peak_memory_stats()
                    wait(self.device)
                    start = time.perf_counter()
                    train(Work(Path(folder), report_to=()))
                    wait(self.device)
                    seconds[way].append((time.perf_counter() - start) / len(self.samples))
                    if self.device.type == "cuda":
                        memory[way] = torch.cuda.max_memory_allocated()
        return seconds, memory

    def operations(self) -> dict[str, float]:
        """Operations of a forward and a backward pass for one sample, by our ways."""
        counted = {}
        whole, parts = self.samples, self.parts
        for way in ("concepts", "tokens", "lora"):
            changes = {"batch_size": 1, "accumulation": 1, "workers": 0}
            if way != "concepts":
                changes["gradient_checkpointing"] = False
            self.samples = whole[:1]
            self.parts = {**parts, way: parts[way].model_copy(update=changes)}
            with TemporaryDirectory() as folder, FlopCounterMode(display=False) as counter:
                self.ways()[way](Work(Path(folder), report_to=()))
            counted[way] = float(counter.get_total_flops())
        self.samples, self.parts = whole, parts
        return counted


def main(argv: Sequence[str] | None = None) -> None:
    parser = arguments(__doc__)
    parser.add_argument("--samples", type=int, help="to measure with (128; 256 at 7B)")
    parser.add_argument("--repeats", type=int, default=3, help="rounds (3)")
    parser.add_argument("--peak", type=float, help="the device's peak in bfloat16, operations/s")
    options = parser.parse_args(argv)
    device = device_for(parser, options)
    shape = SHAPES[options.shape]
    second = shape.stage1.with_name(shape.stage1.name.replace("stage1", "stage2"))
    configs = shape.config(*options.set), load(second, Stage2Config)
    with TemporaryDirectory() as folder:
        count = options.samples or MEASURED[options.shape]
        samples = write_samples(shape, count, Path(folder))
        bench = Bench(shape, device, *configs, samples)
        operations = bench.operations()  # the first call of each, which is slower
        seconds, memory = bench.measure(options.repeats)
    middle = {way: median(values) for way, values in seconds.items()}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = options.peak or next((PEAKS[card] for card in PEAKS if card in name), None)
    mfu = {way: peak and operations[way] / middle[way] / peak for way in operations}
    facts = {
        "samples": count,
        "samples_per_second": {way: 1 / middle[way] for way in middle},
        "peak_memory_bytes": memory,
        "operations_per_sample": operations,
        "device_peak": peak,
        "mfu": mfu,
    }
    ratios = [Ratio(f"plain {way}", way) for way in ("tokens", "lora")]
    report("training", options, device, seconds, ratios, facts)
    table = Table("way", "samples/s", "peak memory (GB)", "MFU")
    for way, value in middle.items():
        taken, share = memory[way], mfu.get(way)
        table.add_row(
            way,
            f"{1 / value:.2f}",
            "" if taken is None else f"{taken / 1e9:.1f}",
            "" if share is None else f"{share:.1%}",
        )
    Console().print(table)


if __name__ == "__main__":
    main()
