"""The command line. Heavy modules load inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from psa_vlm.cli import (
    ask,
    compare,
    data,
    evaluate,
    experiment,
    measure,
    policy,
    scan,
    service,
    sharing,
    testbed,
    train,
)
from psa_vlm.errors import PsaVlmError

app = typer.Typer(
    help="Attach a readable safety bottleneck to a vision-language model, train it, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
for command in (
    testbed.demo,
    ask.assess,
    ask.chat,
    evaluate.evaluate,
    measure.calibrate,
    compare.compare,
    measure.attack,
    measure.faithfulness,
    experiment.experiment,
    scan.scan,
    service.serve,
    sharing.export,
    sharing.import_official,
    sharing.push,
):
    app.command()(command)
for name, group in {
    "train": train.app,
    "data": data.app,
    "ab": compare.app,
    "policy": policy.app,
    "audit": service.audit_app,
    "keys": service.keys_app,
    "testbed": testbed.app,
}.items():
    app.add_typer(group, name=name)


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        from psa_vlm import __version__

        typer.echo(__version__)
        raise typer.Exit


def main() -> None:
    """Entry point: an error of ours becomes one line on stderr and its exit code."""
    try:
        app()
    except PsaVlmError as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        typer.echo("stopped", err=True)
        sys.exit(130)
