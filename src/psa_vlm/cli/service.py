"""Commands of the service: serving, its audit log, and its keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from psa_vlm.cli.options import (
    DEMO_RUN,
    Base,
    Json,
    KeysFile,
    Log,
    Model,
    PolicyOption,
    print_json,
    quiet,
)

audit_app = typer.Typer(help="Check and read the service's audit log.", no_args_is_help=True)
keys_app = typer.Typer(help="Who may ask the service.", no_args_is_help=True)


def serve(
    model: Model = DEMO_RUN,
    policy: PolicyOption = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.", min=0, max=65535)] = 8000,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; default: the run's folder.")
    ] = None,
    keys: Annotated[
        Path | None, typer.Option(help="Keys of the tenants; needed but on a loopback.")
    ] = None,
    audit: Annotated[
        str, typer.Option(help="The audit log: a file, or a database URL.")
    ] = "audit.db",
    limits: Annotated[
        list[str] | None, typer.Option("--limit", help="Change a limit, as in images=4.")
    ] = None,
    upstream: Annotated[
        str | None,
        typer.Option(
            help="URL of an OpenAI-compatible engine that answers instead; its key is taken from"
            " PSA_VLM_UPSTREAM_KEY."
        ),
    ] = None,
    upstream_model: Annotated[
        str | None, typer.Option(help="What that engine calls the model; default: as clients do.")
    ] = None,
    remote: Annotated[
        list[str] | None,
        typer.Option(
            "--remote-host", help="A host that images may be fetched from; default: none."
        ),
    ] = None,
    risky_share: Annotated[
        float | None,
        typer.Option(
            help="How many of the requests are risky (0 to 1), for the drift monitor; default: as"
            " many as among the calibration samples.",
        ),
    ] = None,
    base: Base = None,
) -> None:
    """Serve a run through OpenAI's API, under a policy, with an audit log."""
    from psa_vlm.serving.server import Settings, serve

    quiet()
    serve(
        Settings(
            model,
            policy,
            host,
            port,
            name,
            keys,
            audit,
            tuple(limits or ()),
            base,
            upstream,
            upstream_model,
            tuple(remote or ()),
            risky_share,
        )
    )


@audit_app.command()
def verify(
    log: Log,
    head: Annotated[
        str | None, typer.Option(help="A hash that was printed before and must still be there.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Follow the chain of an audit log: exit code 0 if it is whole, and the hash at its end."""
    from psa_vlm.serving.server import open_audit

    with open_audit(log, existing=True) as audit:
        end = audit.verify(head)
    if as_json:
        print_json({"records": end.records, "head": end.hash})
    else:
        typer.echo(f"{log}: {end.records} records, none changed; head {end.hash}")


@audit_app.command()
def export(log: Log) -> None:
    """Print the records of an audit log as JSON lines; stop where the chain breaks."""
    from psa_vlm.serving.server import open_audit

    with open_audit(log, existing=True) as audit:
        for record in audit.records():
            typer.echo(json.dumps(record))  # plain letters: a terminal obeys some of the others


@keys_app.command()
def add(
    keys: KeysFile,
    tenant: Annotated[str, typer.Argument(help="As the policy names it.")],
) -> None:
    """Make a key for a tenant and print it, this once; the file gets its hash."""
    from psa_vlm.serving.keys import Keys, hash_key, new_key

    known = Keys.load(keys).hashes if keys.exists() else {}
    key = new_key()
    Keys({**known, tenant: (*known.get(tenant, ()), hash_key(key))}).save(keys)
    typer.echo(key)
