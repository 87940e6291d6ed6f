"""Settings that every test shares: one thread per worker, no network, reproducible examples."""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

# Read by torch and Hugging Face at import, so they are set before any test module is.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
from hypothesis import HealthCheck, settings

from .tiny import dual_encoder, random_bottleneck, save_llava

settings.register_profile(  # a busy machine is no failure
    "psa_vlm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("psa_vlm")


class Outcome(NamedTuple):
    """Of a command: its exit code, and what it printed."""

    code: int
    out: str
    err: str


Psa = Callable[..., Outcome]


@pytest.fixture()
def psa(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Psa:
    """Runs `psa-vlm` in this process."""
    from psa_vlm import cli

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["psa-vlm", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return Outcome(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random LLaVA checkpoint that loads with plain transformers."""
    folder = tmp_path_factory.mktemp("llava")
    save_llava(folder)
    return folder


@pytest.fixture(scope="session")
def tied_llava_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the output head tied to the input embeddings."""
    folder = tmp_path_factory.mktemp("tied-llava")
    save_llava(folder, tied=True)
    return folder


@pytest.fixture(scope="session")
def run_dir(llava_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder on the tiny LLaVA: random bottleneck, four safety tokens, no adapter."""
    from psa_vlm.inference import PsaVlm
    from psa_vlm.model.backbone import Backbone
    from psa_vlm.model.tokens import add_safety_tokens

    backbone = Backbone.from_pretrained(llava_dir)
    add_safety_tokens(backbone, 4)
    folder = tmp_path_factory.mktemp("runs") / "run"
    PsaVlm(backbone, random_bottleneck(backbone)).save_pretrained(folder)
    return folder


@pytest.fixture()
def run(run_dir: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may break."""
    return Path(shutil.copytree(run_dir, tmp_path / "run"))


@pytest.fixture(scope="module")
def model(run_dir: Path) -> Any:
    """The model of that run."""
    from psa_vlm.inference import PsaVlm

    return PsaVlm.from_pretrained(run_dir)


@pytest.fixture(scope="session")
def make_dual_encoder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint folder of a tiny random CLIP or SigLIP."""

    def make(kind: str) -> Path:
        folder = tmp_path_factory.mktemp(kind)
        for part in dual_encoder(kind):
            part.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def guard_run(
    make_dual_encoder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run folder on a tiny CLIP, with a random bottleneck; nothing may write into it."""
    from psa_vlm.inference import PsaVlm
    from psa_vlm.model.backbone import Backbone

    backbone = Backbone.from_pretrained(make_dual_encoder("CLIP"))
    folder = tmp_path_factory.mktemp("guards") / "run"
    PsaVlm(backbone, random_bottleneck(backbone)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_lora() -> Callable[[Any], Any]:
    """Puts a LoRA of random weights into a backbone, merged as a loaded one is."""
    import warnings

    import peft
    import torch

    def add(backbone: Any) -> Any:
        layers = backbone.spec.language_layers
        config = peft.LoraConfig(r=2, target_modules=layers, init_lora_weights=False)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
            torch.manual_seed(1)
            adapter = peft.get_peft_model(backbone.model, config)
        adapter.merge_adapter()
        return adapter

    return add


@pytest.fixture(scope="session")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A PNG of four coloured squares."""
    from PIL import Image

    image = Image.new("RGB", (32, 32), "white")
    for x, y, colour in ((0, 0, "red"), (16, 0, "green"), (0, 16, "blue")):
        image.paste(colour, (x, y, x + 16, y + 16))
    path = tmp_path_factory.mktemp("pictures") / "squares.png"
    image.save(path)
    return path


@pytest.fixture()
def see(model: Any) -> Iterator[Callable[[str, str], None]]:
    """Makes the bottleneck of `model` see one type at one level, whatever it is shown."""
    import torch

    head = model.bottleneck.head
    before = {name: value.clone() for name, value in head.state_dict().items()}

    def set_to(type_: str, level: str) -> None:
        with torch.no_grad():
            for linear, index in (
                (head.to_type, model.taxonomy.type_id(type_)),
                (head.to_level, model.taxonomy.level_id(level)),
            ):
                linear.weight.zero_()
                linear.bias.zero_()
                linear.bias[index] = 9.0

    yield set_to
    head.load_state_dict(before)


@pytest.fixture()
def prompts(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the language model is asked: the first prompt of each generation."""
    seen: list[str] = []
    write = model.backbone.write

    def noted(inputs: Any, *told: Any) -> Any:
        seen.append(model.backbone.tokenizer.decode(inputs["input_ids"][0]))
        return write(inputs, *told)

    monkeypatch.setattr(model.backbone, "write", noted)
    return seen


@pytest.fixture(scope="session")
def make_calibration() -> Any:
    """Makes a calibration of a bottleneck by hand: limits by type, (0.2, 0.6) by default."""
    from datetime import date

    from psa_vlm.model.calibration import Calibration
    from psa_vlm.model.probe import probe
    from psa_vlm.taxonomy import Taxonomy

    def make(bottleneck: Any = None, limits: Any = None, **changes: Any) -> Calibration:
        words = Taxonomy.default()
        quality = {"nll": 0.5, "ece": 0.1, "n": [0, 9], "confidence": [None, 0.9]}
        quality |= {"accuracy": [None, 0.8]}
        spread = [i / 100 for i in range(101)]
        chosen = dict.fromkeys(words.risk_types, (0.2, 0.6)) | (limits or {})
        data: dict[str, Any] = {
            "made": date(2026, 1, 1),
            "valid_until": date.max,
            "taxonomy": words.hash,
            "weights": [] if bottleneck is None else probe(bottleneck),
            "data": "0" * 16,
            "method": "by hand",
            "miss_rate": 0.01,
            "false_refusal": 0.05,
            "confidence": 0.95,
            "samples": {"temperatures": 200, "thresholds": 4000},
            "n": dict.fromkeys(words.types, 400) | {words.clean: 1600},
            "temperatures": {"type": 1.0, "level": 1.0},
            "thresholds": {
                name: {"clean_below": low, "risky_above": high}
                for name, (low, high) in chosen.items()
            },
            "shares": {name: {"clean": 0.5, "review": 0.3, "risky": 0.2} for name in words.types},
            "quality": {head: {"before": quality, "after": quality} for head in ("type", "level")},
            "scores": {name: {"harmless": spread, "risky": spread} for name in words.risk_types},
        }
        return Calibration.model_validate(data | changes)

    return make


@pytest.fixture(scope="session")
def aligned_run(
    run_dir: Path,
    random_lora: Callable[[Any], Any],
    make_calibration: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """The tiny run with a LoRA and a calibration; nothing may write into it."""
    from psa_vlm.inference import PsaVlm

    model = PsaVlm.from_pretrained(run_dir)
    model.adapter = random_lora(model.backbone)
    model.calibration = make_calibration(model.bottleneck)
    folder = tmp_path_factory.mktemp("aligned") / "run"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def transformers_serve() -> Any:
    """Serves an export with `transformers serve`, and gives its address."""
    from transformers.cli.serve import Serve

    class Closing(Serve):
        """It leaves its event loop open; uvicorn's own start closes it."""

        def start_server(self) -> None:
            self._thread = threading.Thread(target=self.server.run)
            self._thread.start()

    @contextmanager
    def serve(exported: Path) -> Iterator[str]:
        server: Any = Closing(
            str(exported), device="cpu", host="127.0.0.1", port=0, non_blocking=True
        )
        while not server.server.started:
            assert server._thread.is_alive()
            time.sleep(0.05)
        port = server.server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
        server.kill_server()

    return serve
