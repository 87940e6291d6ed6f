"""Commands for policies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psa_vlm.cli.options import Json, PolicyArgument, TaxonomyFile, print_json

if TYPE_CHECKING:
    from psa_vlm.policy.policy import Policy
    from psa_vlm.taxonomy import Taxonomy


app = typer.Typer(help="Check, read and compare policies.", no_args_is_help=True)


@app.command()
def check(policy: PolicyArgument, taxonomy: TaxonomyFile = None) -> None:
    """Say whether a policy can be used: exit code 0 if so, or 2 and a line for each mistake."""
    rules, words = _checked(policy, taxonomy)
    cells = len(words.risk_types) * (len(words.levels) - 1)
    typer.echo(f"{policy}: policy {rules.name} has an action for each of {cells} cells")


@app.command()
def show(
    policy: PolicyArgument,
    tenant: Annotated[str | None, typer.Option(help="As this tenant has it.")] = None,
    taxonomy: TaxonomyFile = None,
    as_json: Json = False,
) -> None:
    """What is done for each risk type and level, and where that is written."""
    from rich.console import Console

    from psa_vlm.policy import overview

    rules, words = _checked(policy, taxonomy)
    rules = rules if tenant is None else rules.for_tenant(tenant)
    if as_json:
        print_json(overview.to_dict(rules, words))
    else:
        Console().print(overview.view(rules, words))


@app.command()
def diff(
    first: PolicyArgument,
    second: PolicyArgument,
    taxonomy: TaxonomyFile = None,
    as_json: Json = False,
) -> None:
    """What changes from one policy to another: exit code 1 if anything does, else 0."""
    from rich.console import Console

    from psa_vlm.policy import overview

    before, words = _checked(first, taxonomy)
    after, _ = _checked(second, taxonomy)
    changes = overview.diff(before, after, words)
    if as_json:
        print_json([change.to_dict() for change in changes])
    elif changes:
        Console().print(overview.diff_table(changes))
    raise typer.Exit(1 if changes else 0)


@app.command()
def replay(
    policy: PolicyArgument,
    audit: Annotated[str, typer.Option(help="The audit log: a file, or a database URL.")],
    taxonomy: TaxonomyFile = None,
    examples: Annotated[int, typer.Option(help="Requests to name for each change.", min=0)] = 3,
    as_json: Json = False,
) -> None:
    """Which past decisions of the service a new policy would change: exit code 1 if any, else 0."""
    from rich.console import Console

    from psa_vlm.policy import replay
    from psa_vlm.serving.server import open_audit

    rules, words = _checked(policy, taxonomy)
    with open_audit(audit, existing=True) as log:
        found = replay.replay(log.records(), rules, words, examples)
    if as_json:
        print_json(found.to_dict())
    else:
        Console().print(replay.view(found))
    raise typer.Exit(1 if found.changes else 0)


@app.command()
def schema() -> None:
    """The JSON Schema of a policy file, for an editor."""
    from psa_vlm.policy.policy import Policy

    print_json(Policy.json_schema())


def _checked(named: str, taxonomy: Path | None) -> tuple[Policy, Taxonomy]:
    """A policy that fits the taxonomy."""
    from psa_vlm.policy.policy import Policy
    from psa_vlm.taxonomy import Taxonomy

    words = Taxonomy.load(taxonomy)
    policy = Policy.load(named)
    policy.check(words)
    return policy, words
