"""Commands that ask a run about images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from psa_vlm.cli.options import (
    DEMO_RUN,
    Base,
    Concepts,
    Json,
    Language,
    Model,
    PolicyOption,
    load_run,
    named_policy,
    parsed_concepts,
    print_json,
)

if TYPE_CHECKING:
    from psa_vlm.inference import Reply
    from psa_vlm.policy.policy import Decision


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
    vlm = load_run(model, base)
    verdict = vlm.assess(image, text)
    if overrides := parsed_concepts(concept):
        verdict = verdict.override(overrides, vlm.taxonomy)
    decision = (named_policy(policy) or vlm.policy).decide(verdict, vlm.taxonomy, language)
    if as_json:
        print_json({"verdict": verdict.to_dict(), "decision": decision.to_dict()})
        return
    from rich.console import Console

    from psa_vlm.evaluation.terminal import verdict_table

    console = Console()
    console.print(verdict_table(verdict))
    console.print(_told(decision), markup=False)


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

    vlm, rules, overrides = load_run(model, base), named_policy(policy), parsed_concepts(concept)
    history: list[Turn] = []
    while True:
        question = text if text is not None else typer.prompt("you", default="", show_default=False)
        if text is None and not question.strip():
            return
        reply = vlm.reply(
            image or [], question, rules, overrides, history, max_new_tokens, language
        )
        if as_json:
            print_json(reply.to_dict())
        else:
            _show(reply)
        if text is not None:
            return
        history += [Turn("user", question), Turn("assistant", reply.text)]


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
