"""Killed at any moment, and resumed by the same command: the same weights, bit for bit."""

from __future__ import annotations

import json
import runpy
import signal
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from psa_vlm.data.sample import Sample
from psa_vlm.training.config import (
    EncoderConfig,
    EncoderSchedule,
    RunConfig,
    Schedule,
    Stage1Config,
    Stage2Config,
)
from psa_vlm.training.encoder import run_encoder
from psa_vlm.training.stage1 import run_stage1
from psa_vlm.training.stage2 import run_stage2

SCRIPT = str(Path(__file__).with_name("killed.py"))
# A server that has imported everything forks each process: real processes, without the waiting.
CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "psa_vlm.training.encoder",
        "psa_vlm.training.stage1",
        "psa_vlm.training.stage2",
        "peft",
        "transformers.models.clip.image_processing_pil_clip",
        "transformers.models.clip.modeling_clip",
        "transformers.models.llama.modeling_llama",
        "transformers.models.llava.modeling_llava",
        "transformers.models.llava.processing_llava",
    ]
)


def start(stage: Any, config: RunConfig, samples: list[Sample], moment: str | None) -> BaseProcess:
    known = {"stage": stage, "config": config, "samples": samples, "moment": moment}
    process = CONTEXT.Process(target=runpy.run_path, args=(SCRIPT, known))
    process.start()
    return process


def end(process: BaseProcess) -> int | None:
    process.join(120)
    code = process.exitcode
    process.close()
    return code


def weights(run: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run)): p.read_bytes() for p in sorted(run.rglob("*.safetensors"))}


def assert_same_run(run: Path, other: Path) -> None:
    for name in ("history.json", "training.json", "psa.json"):
        assert json.loads((run / name).read_text()) == json.loads((other / name).read_text())
    assert weights(run) and weights(run) == weights(other)


def stage1(out: Path, llava_dir: Path, schedules: Any, **fields: Any) -> Stage1Config:
    parts = {name: schedules[name] for name in ("concepts", "tokens")}
    return Stage1Config(backbone=str(llava_dir), out=out, report_to=(), **{**parts, **fields})


def stage2(out: Path, model: Path, schedules: Any, **fields: Any) -> Stage2Config:
    return Stage2Config(
        model=model,
        out=out,
        misstated_hints=0.5,
        report_to=(),
        **{"lora": schedules["lora"], **fields},
    )


@pytest.fixture(scope="session")
def first(
    tmp_path_factory: pytest.TempPathFactory, llava_dir: Path, samples: list[Sample], schedules: Any
) -> Path:
    """A run of stage I that nothing interrupted."""
    out = tmp_path_factory.mktemp("first") / "run"
    run_stage1(stage1(out, llava_dir, schedules), samples)
    return out


@pytest.fixture(scope="session")
def second(
    tmp_path_factory: pytest.TempPathFactory, first: Path, samples: list[Sample], schedules: Any
) -> Path:
    """A run of stage II that nothing interrupted."""
    out = tmp_path_factory.mktemp("second") / "run"
    run_stage2(stage2(out, first, schedules), samples)
    return out


def kill_at_each(
    moments: list[str], stage: Callable[..., Any], config: RunConfig, samples: list[Sample]
) -> None:
    for moment in moments:
        assert end(start(stage, config, samples, moment)) == -signal.SIGKILL, moment
        assert config.out.exists() == (moment == "work not deleted"), moment
    stage(config, samples)
    assert [path.name for path in config.out.parent.iterdir()] == [config.out.name]


def test_stage1_killed_again_and_again(
    tmp_path: Path, first: Path, llava_dir: Path, samples: list[Sample], schedules: Any
) -> None:
    config = stage1(tmp_path / "run", llava_dir, schedules)
    moments = [
        "record half written",
        "features half written",
        "features written",
        "between checkpoints",
        "checkpoint half written",
        "checkpoint not marked",
        "all checkpoints written",
        "before the tokens",
        "in the tokens",
        "run half written",
        "work not deleted",
    ]
    kill_at_each(moments, run_stage1, config, samples)
    assert_same_run(config.out, first)


def test_the_encoder_killed_again_and_again(
    tmp_path: Path, llava_dir: Path, samples: list[Sample], schedules: Any
) -> None:
    how = schedules["lora"].model_dump(include=set(Schedule.model_fields))
    fields: dict[str, Any] = {"backbone": str(llava_dir), "report_to": ()}
    fields["encoder"] = EncoderSchedule(**{**how, "batch_size": 1})
    whole, config = (EncoderConfig(out=tmp_path / n / "base", **fields) for n in "ab")
    run_encoder(whole, samples)
    moments = [
        "record half written",
        "between checkpoints",
        "checkpoint half written",
        "checkpoint not marked",
        "all checkpoints written",
        "run half written",
        "work not deleted",
    ]
    kill_at_each(moments, run_encoder, config, samples)
    assert weights(config.out) and weights(config.out) == weights(whole.out)


def test_stage2_killed_again_and_again(
    tmp_path: Path, first: Path, second: Path, samples: list[Sample], schedules: Any
) -> None:
    config = stage2(tmp_path / "run", first, schedules)
    moments = [
        "hints half written",
        "between checkpoints",
        "checkpoint half written",
        "checkpoint not marked",
        "run half written",
        "work not deleted",
    ]
    kill_at_each(moments, run_stage2, config, samples)
    assert_same_run(config.out, second)


def test_killed_from_outside(
    tmp_path: Path, first: Path, llava_dir: Path, samples: list[Sample], schedules: Any
) -> None:
    config = stage1(tmp_path / "run", llava_dir, schedules)
    process = start(run_stage1, config, samples, None)
    wanted = tmp_path / "run.work" / "concepts" / "checkpoint-4"
    while not wanted.exists():
        assert process.is_alive(), "the run ended before it could be killed"
        time.sleep(0.001)
    process.kill()
    end(process)
    run_stage1(config, samples)
    assert_same_run(config.out, first)
