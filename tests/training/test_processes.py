"""Several processes do what one does: gradients averaged, weights in parts, rows of like length."""

from __future__ import annotations

import json
import runpy
import socket
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file
from safetensors.torch import load_file

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.training.config import Stage1Config, Stage2Config

SCRIPT = str(Path(__file__).with_name("several.py"))
CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["psa_vlm.training.stage1", "psa_vlm.training.stage2", "peft"])

SHARE = 0.99
"""Of weights that are equal to within 1e-4 after AdamW, which makes steps of the rounding of
gradients that are zero, such as those of the biases of attention keys."""


def run(world: int, what: str, **needs: Any) -> None:
    """Run a function of `several.py` in so many processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        known = {"world": world, "port": free.getsockname()[1], "what": what}
    processes = [
        CONTEXT.Process(
            target=runpy.run_path, args=(SCRIPT, {"rank": rank, **known, "needs": needs[str(rank)]})
        )
        for rank in range(world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(1200)
    assert [process.exitcode for process in processes] == [0] * world


@pytest.fixture(scope="session")
def eight(samples: list[Sample]) -> list[Sample]:
    """Samples with answers of many lengths."""
    return [
        replace(
            samples[i % 6],
            id=str(i),
            conversation=(Turn("user", "What?"), Turn("assistant", f"It is {'very ' * i}good.")),
        )
        for i in range(8)
    ]


def test_two_processes_are_one(
    tmp_path: Path, llava_dir: Path, eight: list[Sample], schedules: Any
) -> None:
    states, histories = [], []
    for world, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(world)
        changed = {"batch_size": batch}
        parts = {
            name: part.model_copy(update=changed | ({"dropout": 0.0} if name == "lora" else {}))
            for name, part in schedules.items()
        }
        lora = parts.pop("lora").model_copy(update={"group_by_length": True})
        first = Stage1Config(backbone=str(llava_dir), out=out / "first", report_to=(), **parts)
        second = Stage2Config(model=first.out, out=out / "second", report_to=(), lora=lora)
        needs = {"first": first, "second": second, "samples": eight}
        run(world, "stages", **dict.fromkeys(map(str, range(world)), needs))
        states.append(
            {
                name: tensor
                for file in ("bottleneck", "safety_tokens", "adapter/adapter_model")
                for name, tensor in load_file(second.out / f"{file}.safetensors").items()
            }
        )
        histories.append(
            [
                [point[figure] for point in part for figure in ("loss", "grad_norm")]
                for path in (first.out, second.out)
                for part in json.loads((path / "history.json").read_text()).values()
            ]
        )
    one, two = states
    assert len(histories[0]) == 3
    for curve, other in zip(*histories, strict=True):
        assert curve == pytest.approx(other, rel=1e-3)
    equal = [torch.isclose(one[name], two[name], rtol=0, atol=1e-4).flatten() for name in one]
    assert one.keys() == two.keys() and torch.cat(equal).float().mean() > SHARE


def test_weights_in_parts_compute_the_same(
    tmp_path: Path, llava_dir: Path, eight: list[Sample]
) -> None:
    shared = {"base": llava_dir, "samples": eight[:4], "world": 2}
    run(2, "sharding", **{str(i): {**shared, "out": tmp_path / f"{i}.json"} for i in range(2)})
    for i in range(2):
        found = json.loads((tmp_path / f"{i}.json").read_text())
        assert found["layers"] == 5  # patches, two of the vision encoder, two of the language model
        assert 0.4 < found["held"] < 0.6
        assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-5)
        assert found["gradients"] < 1e-5 * found["largest"]
        assert found["same"]


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_shipped_configuration_is_one_of_accelerate(path: Path) -> None:
    config = load_config_from_file(str(path))
    assert isinstance(config, ClusterConfig)
    assert config.mixed_precision == "bf16" and not config.use_cpu
    kind = {"ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED"}[path.stem]
    assert config.distributed_type == kind
