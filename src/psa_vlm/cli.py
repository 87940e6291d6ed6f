"""The command line. Heavy modules load inside the commands, so that `--help` answers at once."""

from __future__ import annotations

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from psa_vlm.errors import InputError, PsaVlmError

if TYPE_CHECKING:
    from psa_vlm.inference import PsaVlm, Reply
    from psa_vlm.policy.policy import Decision, Policy
    from psa_vlm.taxonomy import Taxonomy

app = typer.Typer(
    help="Attach a readable safety bottleneck to a vision-language model, train it, and run it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
train_app = typer.Typer(help="Train a run: stage I, then stage II.", no_args_is_help=True)
data_app = typer.Typer(help="Look at published data sets, and mix them.", no_args_is_help=True)
policy_app = typer.Typer(help="Check, read and compare policies.", no_args_is_help=True)
audit_app = typer.Typer(help="Check and read the service's audit log.", no_args_is_help=True)
keys_app = typer.Typer(help="Who may ask the service.", no_args_is_help=True)
testbed_app = typer.Typer(help="The embedded small world and its base model.", no_args_is_help=True)
app.add_typer(train_app, name="train")
app.add_typer(data_app, name="data")
app.add_typer(policy_app, name="policy")
app.add_typer(audit_app, name="audit")
app.add_typer(keys_app, name="keys")
app.add_typer(testbed_app, name="testbed")


DEMO_RUN = Path("runs/demo/stage2")
"""Where the demo leaves its aligned model."""


class Scale(StrEnum):
    """How large a demo is."""

    small = "small"
    full = "full"


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
Base = Annotated[Path | None, typer.Option("--base", help="Where the base model is now.")]


def _print(data: Any) -> None:
    typer.echo(json.dumps(data, indent=2, ensure_ascii=False))


def _policy(named: str | None) -> Policy | None:
    from psa_vlm.policy.policy import Policy

    return None if named is None else Policy.load(named)


def _checked(named: str, taxonomy: Path | None) -> tuple[Policy, Taxonomy]:
    """A policy that fits the taxonomy."""
    from psa_vlm.policy.policy import Policy
    from psa_vlm.taxonomy import Taxonomy

    words = Taxonomy.from_yaml(taxonomy) if taxonomy else Taxonomy.default()
    policy = Policy.load(named)
    policy.check(words)
    return policy, words


def _concepts(pairs: list[str] | None) -> dict[str, str]:
    concepts = {}
    for pair in pairs or []:
        name, separator, level = pair.partition("=")
        if not separator:
            raise InputError(f"--concept {pair}: write it as type=level, as in illegal_risk=high")
        concepts[name.strip()] = level.strip()
    return concepts


def _quiet() -> None:
    """Keep transformers' own bars and notices out of what a command prints."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def _load(run: Path, base: Path | None, calibrated: bool = True) -> PsaVlm:
    from psa_vlm.inference import PsaVlm

    _quiet()
    return PsaVlm.from_pretrained(run, base=base, calibrated=calibrated)


def _show(reply: Reply) -> None:
    """The reply, and beneath it what was seen and which rule fired."""
    from rich.console import Console
    from rich.markup import escape

    console = Console()
    console.print(escape(reply.text))
    console.print(f"[dim]{escape(_told(reply.decision))}[/dim]")


def _told(decision: Decision) -> str:
    """What was done, by which rule, and where that rule is written."""
    found = decision.reason or "nothing risky found"
    told = f"{decision.action} by rule {decision.rule}: {found}"
    if (source := decision.source) is None:
        return told
    return f"{told} ({source}{f': {source.comment}' if source.comment else ''})"


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for report, scorecard and runs.")] = Path(
        "runs/demo"
    ),
    seed: Annotated[int, typer.Option(help="Of data and training.")] = 0,
    scale: Annotated[Scale, typer.Option(help="full: three seeds, 2,000 requests per cell.")] = (
        Scale.small
    ),
) -> None:
    """Align the small model before your eyes and compare it with its rivals."""
    from psa_vlm.testbed.demo import run_demo

    _quiet()
    run_demo(out, seed, scale.value)


@train_app.command()
def stage1(config: Config, overrides: Set = None) -> None:
    """Safety concepts on cached features, then the safety tokens through the frozen model."""
    from psa_vlm.training.config import Stage1Config, load
    from psa_vlm.training.stage1 import run_stage1

    _quiet()
    run_stage1(load(config, Stage1Config, overrides or []))


@train_app.command()
def stage2(config: Config, overrides: Set = None) -> None:
    """LoRA on the language model, with prompts exactly as inference builds them."""
    from psa_vlm.training.config import Stage2Config, load
    from psa_vlm.training.stage2 import run_stage2

    _quiet()
    run_stage2(load(config, Stage2Config, overrides or []))


@app.command()
def assess(
    image: Annotated[list[Path], typer.Argument(help="One image or several.")],
    text: Annotated[str, typer.Option(help="What is asked about the image.")],
    model: Model = DEMO_RUN,
    policy: PolicyOption = None,
    concept: Concepts = None,
    language: Language = None,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Say what is risky about an image in the light of a text, and what the policy would do."""
    vlm = _load(model, base)
    verdict = vlm.assess(image, text)
    if overrides := _concepts(concept):
        verdict = verdict.override(overrides, vlm.taxonomy)
    decision = (_policy(policy) or vlm.policy).decide(verdict, vlm.taxonomy, language)
    if as_json:
        _print({"verdict": verdict.to_dict(), "decision": decision.to_dict()})
        return
    from rich.console import Console

    from psa_vlm.evaluation.terminal import verdict_table

    console = Console()
    console.print(verdict_table(verdict))
    console.print(_told(decision), markup=False)


@app.command()
def chat(
    model: Model = DEMO_RUN,
    image: Annotated[list[Path] | None, typer.Argument(help="Images to talk about.")] = None,
    text: Annotated[str | None, typer.Option(help="Ask this and stop.")] = None,
    policy: PolicyOption = None,
    concept: Concepts = None,
    language: Language = None,
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.", min=1)] = 256,
    as_json: Json = False,
) -> None:
    """Talk about images; each question is assessed anew. An empty line ends it."""
    from psa_vlm.data.sample import Turn

    vlm, rules, overrides = _load(model, base), _policy(policy), _concepts(concept)
    history: list[Turn] = []
    while True:
        question = text if text is not None else typer.prompt("you", default="", show_default=False)
        if text is None and not question.strip():
            return
        reply = vlm.reply(
            image or [], question, rules, overrides, history, max_new_tokens, language
        )
        if as_json:
            _print(reply.to_dict())
        else:
            _show(reply)
        if text is not None:
            return
        history += [Turn("user", question), Turn("assistant", reply.text)]


@app.command()
def evaluate(
    model: Model = DEMO_RUN,
    data: Annotated[
        Path | None,
        typer.Option(help="A labelled set in any known layout; default: the testbed's."),
    ] = None,
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    map_file: MapFile = None,
    limit: Annotated[int, typer.Option(help="Requests per cell, or samples.", min=1)] = 200,
    seed: Annotated[int, typer.Option(help="Of the testbed's requests.")] = 0,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Score a run: attack success, refusal of harmless requests, accuracy, type and level F1."""
    from rich.console import Console

    from psa_vlm.evaluation.evaluate import evaluate_samples

    vlm = _load(model, base)
    if data is None:
        from psa_vlm.testbed.demo import evaluate_run

        card = evaluate_run(vlm, limit, seed)
        if as_json:
            _print(card.model_dump(mode="json"))
        else:
            Console().print(card.table())
        return
    from psa_vlm.data.contamination import Seen, contamination
    from psa_vlm.data.readers import read

    samples = read(data, images, vlm.taxonomy, categories=map_file)[:limit]
    summary = evaluate_samples(vlm, samples)
    seen = Seen.load(model)
    shared = None if seen is None else contamination(samples, seen)
    if as_json:
        _print(summary.to_dict() | {"contamination": shared and shared.to_dict()})
    else:
        Console().print(summary.table())
        typer.echo(
            shared or f"contamination: unknown, {model} does not hold what it was trained on"
        )


@app.command()
def calibrate(
    run: Annotated[Path, typer.Argument(help="A run folder; calibration.json is put into it.")],
    data: Annotated[Path, typer.Option(help="Labelled samples that no training saw.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    miss_rate: Annotated[float, typer.Option(help="Most missed of each type.")] = 0.01,
    false_refusal: Annotated[
        float, typer.Option(help="Most harmless requests that are called surely risky.")
    ] = 0.05,
    confidence: Annotated[float, typer.Option(help="That each of these holds.")] = 0.95,
    valid_days: Annotated[int, typer.Option(help="Until it should be done again.", min=1)] = 90,
    base: Base = None,
    as_json: Json = False,
) -> None:
    """Make a run's probabilities honest, and choose thresholds under a stated bound."""
    from rich.console import Console

    from psa_vlm.data.readers import read
    from psa_vlm.evaluation.calibrate import Promise
    from psa_vlm.evaluation.calibrate import calibrate as fit
    from psa_vlm.evaluation.calibration_report import table, write_calibration
    from psa_vlm.model.calibration import FILE

    promise = Promise(miss_rate, false_refusal, confidence)
    vlm = _load(run, base, calibrated=False)
    calibration = fit(vlm, read(data, images, vlm.taxonomy), promise, valid_days)
    calibration.save(run / FILE)
    page = run / "calibration.html"
    write_calibration(page, calibration, vlm.taxonomy, run)
    if as_json:
        _print(calibration.model_dump(mode="json"))
    else:
        Console().print(table(calibration, vlm.taxonomy))
        Console().print(f"calibration: {run / FILE}   report: {page}")


@data_app.command("inspect")
def data_inspect(
    path: Annotated[Path, typer.Argument(help="A data file, or the folder of a published set.")],
    images: Annotated[Path | None, typer.Option(help="Folder of the images.")] = None,
    layout: Annotated[
        str | None, typer.Option("--format", help="Name of the layout; default: guessed.")
    ] = None,
    map_file: MapFile = None,
    taxonomy: TaxonomyFile = None,
    as_json: Json = False,
) -> None:
    """Count a set, show its labels and three samples, and list each problem: exit code 1 if any."""
    from rich.console import Console

    from psa_vlm.data.inspection import inspect
    from psa_vlm.taxonomy import Taxonomy

    words = Taxonomy.from_yaml(taxonomy) if taxonomy else Taxonomy.default()
    found = inspect(path, images, words, layout, map_file)
    if as_json:
        _print(found.to_dict())
    else:
        console = Console()
        console.print(found.view())
        for problem in found.problems:
            typer.echo(problem)
    raise typer.Exit(1 if found.problems else 0)


@data_app.command("prepare")
def data_prepare(
    config: Config,
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    overrides: Set = None,
    as_json: Json = False,
) -> None:
    """Mix sets into splits that share no image, without copies, balanced as the file says."""
    from rich.console import Console

    from psa_vlm.data.config import PrepareConfig
    from psa_vlm.data.prepare import prepare, table
    from psa_vlm.typed_yaml import load

    manifest = prepare(load(config, PrepareConfig, overrides or []), out)
    if as_json:
        _print(manifest)
    else:
        Console().print(table(manifest))
        typer.echo(f"written to {out}; what was left out, and why: {out / 'dropped.jsonl'}")


@policy_app.command("check")
def policy_check(policy: PolicyArgument, taxonomy: TaxonomyFile = None) -> None:
    """Say whether a policy can be used: exit code 0 if so, or 2 and a line for each mistake."""
    rules, words = _checked(policy, taxonomy)
    cells = len(words.risk_types) * (len(words.levels) - 1)
    typer.echo(f"{policy}: policy {rules.name} has an action for each of {cells} cells")


@policy_app.command("show")
def policy_show(
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
        _print(overview.to_dict(rules, words))
    else:
        Console().print(overview.view(rules, words))


@policy_app.command("diff")
def policy_diff(
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
        _print([change.to_dict() for change in changes])
    elif changes:
        Console().print(overview.diff_table(changes))
    raise typer.Exit(1 if changes else 0)


@policy_app.command("schema")
def policy_schema() -> None:
    """The JSON Schema of a policy file, for an editor."""
    from psa_vlm.policy.policy import Policy

    _print(Policy.json_schema())


@app.command()
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
    base: Base = None,
) -> None:
    """Serve a run through OpenAI's API, under a policy, with an audit log."""
    from psa_vlm.serving.server import Settings, serve

    _quiet()
    serve(Settings(model, policy, host, port, name, keys, audit, tuple(limits or ()), base))


@audit_app.command("verify")
def audit_verify(
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
        _print({"records": end.records, "head": end.hash})
    else:
        typer.echo(f"{log}: {end.records} records, none changed; head {end.hash}")


@audit_app.command("export")
def audit_export(log: Log) -> None:
    """Print the records of an audit log as JSON lines; stop where the chain breaks."""
    from psa_vlm.serving.server import open_audit

    with open_audit(log, existing=True) as audit:
        for record in audit.records():
            typer.echo(json.dumps(record, ensure_ascii=False))


@keys_app.command("add")
def keys_add(
    keys: KeysFile,
    tenant: Annotated[str, typer.Argument(help="As the policy names it.")],
) -> None:
    """Make a key for a tenant and print it, this once; the file gets its hash."""
    from psa_vlm.serving.keys import Keys, hash_key, new_key

    known = Keys.load(keys).hashes if keys.exists() else {}
    key = new_key()
    Keys({**known, tenant: (*known.get(tenant, ()), hash_key(key))}).save(keys)
    typer.echo(key)


@testbed_app.command("build-base")
def build_base(
    out: Annotated[Path, typer.Argument(help="Folder for the checkpoint.")] = Path("runs/base"),
    seed: Annotated[int, typer.Option(help="Of weights and data.")] = 0,
) -> None:
    """Train the base model from nothing (under two hours on two cores) and measure the premise."""
    from psa_vlm.testbed.base_vlm import Steps, build_base

    _quiet()
    build_base(out, Steps(), seed)
    premise(out)


@testbed_app.command()
def premise(
    base: Annotated[Path | None, typer.Option(help="A base model; default: the shipped.")] = None,
    count: Annotated[int, typer.Option(help="Held-out requests of each kind.", min=1)] = 1000,
    as_json: Json = False,
) -> None:
    """Measure the hole: refused in words, answered when the risky thing is in the image."""
    from psa_vlm.testbed.premise import report

    _quiet()
    report(base, count, as_json)


@testbed_app.command()
def scenes(
    out: Annotated[Path, typer.Argument(help="Folder for images and samples.jsonl.")],
    count: Annotated[int, typer.Option(help="How many.", min=1)] = 1000,
    seed: Annotated[int, typer.Option(help="Of the scenes.")] = 0,
) -> None:
    """Write labelled alignment scenes in the authors' format, ready for `train`."""
    from psa_vlm.testbed.cases import write_samples

    path = write_samples(out, count, seed)
    typer.echo(f"wrote {count} samples to {path}")


@testbed_app.command("build-sprites")
def build_sprites(
    noto_font: Annotated[Path, typer.Argument(help="NotoColorEmoji.ttf")],
    twemoji: Annotated[Path, typer.Argument(help="Folder of Twemoji SVGs.")],
    fluent: Annotated[Path, typer.Argument(help="Folder of flat Fluent SVGs.")],
    out: Annotated[Path, typer.Argument(help="Folder for the atlases.")],
) -> None:
    """Draw the pictograph atlases anew from their openly licensed originals."""
    from psa_vlm.testbed.sprites import render_atlases

    for path in render_atlases(noto_font, twemoji, fluent, out):
        typer.echo(str(path))


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
