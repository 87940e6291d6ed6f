"""What several commands share: their options, and how what those name is loaded."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psa_vlm.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console

    from psa_vlm.inference import PsaVlm
    from psa_vlm.policy.policy import Policy


class Scale(StrEnum):
    """How much is done."""

    small = "small"
    full = "full"


DEMO_RUN = Path("runs/demo/stage2")
"""Where the demo leaves its aligned model."""

Json = Annotated[bool, typer.Option("--json", help="Print JSON for a program to read.")]
Model = Annotated[Path, typer.Option(help="A run folder, as training and the demo write it.")]
Config = Annotated[Path, typer.Argument(help="A YAML file; see configs/.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="Override a field, as in concepts.epochs=3.")
]
NAMED_POLICY = "A policy file, or the name of a shipped policy."
PolicyOption = Annotated[str | None, typer.Option("--policy", help=NAMED_POLICY)]
PolicyArgument = Annotated[str, typer.Argument(help=NAMED_POLICY)]
TaxonomyFile = Annotated[
    Path | None, typer.Option("--taxonomy", help="A taxonomy file; default: the paper's.")
]
Language = Annotated[
    str | None, typer.Option(help="Of hints and refusals, as in de; default: the policy's own.")
]
Concepts = Annotated[
    list[str] | None,
    typer.Option("--concept", help="Override a concept, as in illegal_risk=high."),
]
Log = Annotated[str, typer.Argument(help="A file, or a database URL as SQLAlchemy writes it.")]
KeysFile = Annotated[Path, typer.Argument(help="A YAML file; it holds hashes alone.")]
MapFile = Annotated[
    Path | None, typer.Option("--map", help="A map of the set's categories over the shipped one.")
]
Images = Annotated[Path | None, typer.Option(help="Folder of the images.")]
TestSet = Annotated[
    Path | None,
    typer.Option(help="A labelled set in any known layout; default: the testbed's."),
]
Run = Annotated[Path, typer.Argument(help="A run folder.")]
Base = Annotated[Path | None, typer.Option("--base", help="Where the base model is now.")]


def print_json(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def named_policy(named: str | None) -> Policy | None:
    from psa_vlm.policy.policy import Policy

    return None if named is None else Policy.load(named)


def parsed_concepts(pairs: list[str] | None) -> dict[str, str]:
    concepts = {}
    for pair in pairs or []:
        name, separator, level = pair.partition("=")
        if not separator:
            raise InputError(f"--concept {pair}: write it as type=level, as in illegal_risk=high")
        concepts[name.strip()] = level.strip()
    return concepts


def wide_enough() -> Console:
    """For tables: a log has no width of its own, and they need this much."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = 100
    return console


def quiet() -> None:
    """Keep transformers' own bars and notices out of what a command prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def load_run(run: Path, base: Path | None, calibrated: bool = True) -> PsaVlm:
    from psa_vlm.inference import PsaVlm

    quiet()
    return PsaVlm.from_pretrained(run, base=base, calibrated=calibrated)
