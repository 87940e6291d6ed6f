"""What the benchmarks share: the shapes they run on, fair timing, and results as JSON."""

from __future__ import annotations

import argparse
import copy
import json
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
)

from psa_vlm.experiments.page import processor
from psa_vlm.testbed.base_vlm import build_model, build_processor
from psa_vlm.testbed.premise import base_path
from psa_vlm.training.config import Stage1Config, load

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SIZES = ("hidden", "tokens", "heads", "depth", "readout_depth")
"""What a configuration says of the size of a bottleneck."""
PACKAGES = ("psa-vlm", "torch", "transformers", "peft", "pillow")

VISION_7B: dict[str, Any] = {  # CLIP ViT-L/14-336
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
    "projection_dim": 768,
}
LANGUAGE_7B: dict[str, Any] = {  # Vicuna-7B
    "vocab_size": 32064,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


# --- shapes --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """The size of a model, of its bottleneck and of the pictures that it is shown."""

    stage1: Path
    """Configuration of stage I: sizes, number of safety tokens, schedule."""
    picture: tuple[int, int] | None
    """Width and height of the JPEG files that it reads; None is the testbed's own PNG."""
    build: Callable[[torch.device], tuple[Any, Any]]
    """Makes model and processor."""

    def base(self, device: torch.device) -> tuple[Any, Any]:
        """Model and processor as plain transformers has them; an answer never ends early."""
        model, processor = self.build(device)
        model.generation_config.eos_token_id = None  # ours ends at the tokenizer's all the same
        with torch.no_grad():  # a logit of zero is never the highest
            model.get_output_embeddings().weight[processor.tokenizer.eos_token_id] = 0
        return model.to(device).eval().requires_grad_(False), processor

    def config(self, *overrides: str) -> Stage1Config:
        return load(self.stage1, Stage1Config, overrides)

    def write(self, picture: Image.Image, stream: Any) -> None:
        """Encode a scene as the file that a user would send."""
        if self.picture is None:
            picture.save(stream, "PNG")
        else:
            picture.resize(self.picture, Image.Resampling.BICUBIC).save(stream, "JPEG")


def _testbed(device: torch.device) -> tuple[Any, Any]:
    """The shipped base model, or random weights of its shape where it has not been built."""
    if (base_path() / "config.json").exists():
        processor = AutoProcessor.from_pretrained(base_path())
        return AutoModelForImageTextToText.from_pretrained(base_path()), processor
    processor = build_processor()
    return build_model(processor.tokenizer), processor


def _llava_7b(device: torch.device) -> tuple[Any, Any]:
    """LLaVA-1.5-7B with random weights in bfloat16 that speaks the testbed's words."""
    processor, side = build_processor(), VISION_7B["image_size"]
    processor.patch_size = VISION_7B["patch_size"]
    processor.image_processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION_7B),
        text_config=LlamaConfig(
            **LANGUAGE_7B,
            bos_token_id=processor.tokenizer.bos_token_id,
            eos_token_id=processor.tokenizer.eos_token_id,
            pad_token_id=processor.tokenizer.pad_token_id,
        ),
        image_token_id=processor.image_token_id,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=False,
    )
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16), processor


SHAPES = {
    "testbed": Shape(
        Path(str(files("psa_vlm.testbed").joinpath("assets/stage1.yaml"))), None, _testbed
    ),
    "llava-1.5-7b": Shape(ROOT / "configs" / "llava-1.5-7b-stage1.yaml", (640, 480), _llava_7b),
}


def twin(model: Any) -> Any:
    """A second model on the same weights, so that one may get tokens and the other stays plain."""
    return copy.deepcopy(model, {id(weight): weight for weight in model.parameters()})


# --- the command line ----------------------------------------------------------------------------


def arguments(description: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="testbed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a file in results/")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change the shape's configuration of stage I",
    )
    parser.add_argument(
        "--allow-cpu", action="store_true", help="run llava-1.5-7b without CUDA, for hours"
    )
    return parser


def device_for(parser: argparse.ArgumentParser, options: argparse.Namespace) -> torch.device:
    """The CPU for the testbed, CUDA for the real size; exits with one line if there is none."""
    if options.shape == "testbed":
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    if not options.allow_cpu:
        parser.error(
            f"{options.shape} needs a CUDA device with 24 GB: run it on one, or add --allow-cpu"
        )
    return torch.device("cpu")


# --- timing --------------------------------------------------------------------------------------


def interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn (a b c a b c ...): a machine's drift meets all alike."""
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            wait(device)
            start = time.perf_counter()
            call()
            wait(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def wait(device: torch.device) -> None:
    """Until the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of `n` measurements."""

    median: float
    q25: float
    q75: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        q25, _, q75 = quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3
        return cls(median(values), q25, q75, len(values))


@dataclass(frozen=True)
class Ratio:
    """Two measures, compared round by round, and the bound that the project sets itself."""

    upper: str
    lower: str
    at_most: float | None = None
    at_least: float | None = None

    def result(self, seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
        rounds = zip(seconds[self.upper], seconds[self.lower], strict=True)
        spread = Spread.of([upper / lower for upper, lower in rounds])
        met = None
        if self.at_most is not None:
            met = spread.median <= self.at_most
        if self.at_least is not None:
            met = spread.median >= self.at_least
        return {**asdict(self), **asdict(spread), "met": met}


def report(
    benchmark: str,
    options: argparse.Namespace,
    device: torch.device,
    seconds: Mapping[str, Sequence[float]],
    ratios: Sequence[Ratio],
    facts: Mapping[str, Any],
) -> None:
    """Print measures and ratios, and write them as JSON.

    Args:
        benchmark: its name.
        options: of the command line.
        device: what it ran on.
        seconds: measurements by name.
        ratios: what is compared.
        facts: what else the reader has to know.
    """
    name = processor_name(device)
    results = [ratio.result(seconds) for ratio in ratios]
    measures = {what: asdict(Spread.of(values)) for what, values in seconds.items()}
    _print(f"{benchmark}, {options.shape}, {name}", measures, results)
    slug = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    path = options.json or RESULTS / f"{benchmark}-{options.shape}-{slug}.json"
    figures = {"facts": dict(facts), "seconds": measures, "ratios": results}
    write(path, benchmark, {"shape": options.shape, **figures}, device=device)


def write(
    path: Path,
    benchmark: str,
    figures: Mapping[str, Any],
    argv: Sequence[str] | None = None,
    packages: Sequence[str] = (),
    device: torch.device | None = None,
) -> None:
    """Write figures as JSON, with all that says where they come from, and tell where they are.

    Args:
        path: the file.
        benchmark: its name.
        figures: what was measured.
        argv: the command's arguments; None is the process's own.
        packages: whose versions matter beside `PACKAGES`.
        device: what it ran on; None is the CPU.
    """
    data = {
        "benchmark": benchmark,
        "machine": {
            "name": processor_name(device or torch.device("cpu")),
            "system": platform.platform(),
            "threads": torch.get_num_threads(),
        },
        "versions": {"python": platform.python_version()}
        | {name: version(name) for name in (*PACKAGES, *packages)},
        "commit": commit(),
        "command": shlex.join(
            ["python", f"benchmarks/{benchmark}.py", *(sys.argv[1:] if argv is None else argv)]
        ),
        **figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    Console().print(f"written to {path}")


def _print(title: str, measures: Mapping[str, Any], results: Sequence[Mapping[str, Any]]) -> None:
    table = Table("what", "median", "quartiles", title=title)
    for what, one in measures.items():
        spread = f"{1e3 * one['q25']:.2f} to {1e3 * one['q75']:.2f}"
        table.add_row(what, f"{1e3 * one['median']:.2f} ms", spread)
    Console().print(table)
    table = Table("ratio", "median", "quartiles", "target", "met")
    for one in results:
        target = f"<= {one['at_most']}" if one["at_most"] else f">= {one['at_least']}"
        table.add_row(
            f"{one['upper']} / {one['lower']}",
            f"{one['median']:.3f}",
            f"{one['q25']:.3f} to {one['q75']:.3f}",
            "" if one["met"] is None else target,
            {None: "", True: "yes", False: "[red]no"}[one["met"]],
        )
    Console().print(table)


def processor_name(device: torch.device) -> str:
    """Model of the GPU or CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor()


def commit() -> str | None:
    """The commit, with "+" behind it if tracked files differ from it; None outside a checkout."""
    try:
        told = subprocess.run(
            ["git", "describe", "--always", "--abbrev=10", "--dirty=+", "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return told.stdout.strip()
