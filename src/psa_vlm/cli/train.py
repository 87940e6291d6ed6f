"""Commands that train a run."""

from __future__ import annotations

import typer

from psa_vlm.cli.options import Config, Set, quiet

app = typer.Typer(help="Train a run: stage I, then stage II.", no_args_is_help=True)


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
