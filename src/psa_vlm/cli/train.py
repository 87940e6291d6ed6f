"""Commands that train a run."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import Config, Images, Set, quiet

app = typer.Typer(help="Train a run: stage I, then stage II.", no_args_is_help=True)


class BaselineKind(StrEnum):
    """What `train baseline` trains."""

    lora = "lora"
    guard = "guard"


@app.command()
def encoder(config: Config, overrides: Set = None) -> None:
    """Before stage I, if attacks matter: a base model whose vision encoder withstands them."""
    from psa_vlm.training.config import EncoderConfig, load
    from psa_vlm.training.encoder import run_encoder

    quiet()
    told = load(config, EncoderConfig, overrides or [])
    run_encoder(told)
    typer.echo(f"base model: {told.out}   next: psa-vlm train stage1 ... --set backbone={told.out}")


@app.command()
def stage1(config: Config, overrides: Set = None) -> None:
    """Safety concepts on cached features, then the safety tokens through the frozen model."""
    from psa_vlm.training.config import Stage1Config, load
    from psa_vlm.training.stage1 import run_stage1

    quiet()
    run_stage1(load(config, Stage1Config, overrides or []))


@app.command()
def stage2(config: Config, overrides: Set = None) -> None:
    """LoRA on the language model, with prompts exactly as inference builds them."""
    from psa_vlm.training.config import Stage2Config, load
    from psa_vlm.training.stage2 import run_stage2

    quiet()
    run_stage2(load(config, Stage2Config, overrides or []))


@app.command()
def baseline(
    kind: Annotated[BaselineKind, typer.Argument(help="lora: VLGuard's recipe; guard: a filter.")],
    base: Annotated[Path, typer.Option(help="The vision-language model that it is for.")],
    data: Annotated[Path, typer.Option(help="A set in any known layout.")],
    out: Annotated[Path, typer.Option(help="Folder for `evaluate --task ... --model`.")],
    images: Images = None,
    seed: Annotated[int, typer.Option(help="Of LoRA.")] = 0,
    epochs: Annotated[int, typer.Option(help="Of LoRA.", min=1)] = 3,
    rank: Annotated[int, typer.Option(help="Of LoRA; alpha is twice as large.", min=1)] = 128,
    learning_rate: Annotated[float, typer.Option(help="Of LoRA.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(help="Of LoRA.", min=1)] = 16,
) -> None:
    """A rival to compare a run with: plain LoRA on answers, or a guard before the model."""
    from psa_vlm.data.readers import read
    from psa_vlm.evaluation.baselines import save_guard, tune_lora
    from psa_vlm.evaluation.guard import train_guard
    from psa_vlm.model.backbone import Backbone
    from psa_vlm.model.checkpoint import check_free
    from psa_vlm.training.config import LoraConfig

    quiet()
    check_free(out)
    backbone, samples = Backbone.from_pretrained(base), read(data, images)
    if kind is BaselineKind.guard:
        save_guard(out, backbone, train_guard(backbone, samples))
    else:
        size = LoraConfig(
            r=rank,
            alpha=2 * rank,
            epochs=epochs,
            learning_rate=learning_rate,
            batch_size=batch_size,
        )
        tune_lora(backbone, samples, out, size, seed)
    typer.echo(f"{kind.value}: {out}   try: psa-vlm evaluate --task testbed --model {out}")
