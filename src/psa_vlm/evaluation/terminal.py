"""What the terminal shows of a verdict."""

from __future__ import annotations

from rich import box
from rich.table import Table

from psa_vlm.model.verdict import Verdict

BAR = 24  # characters of a full bar


def _bar(share: float) -> str:
    return "█" * round(share * BAR)


def verdict_table(verdict: Verdict) -> Table:
    """Probabilities of types and levels, image by image; the deciding image is marked."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("image", "concept", "probability", ""):
        table.add_column(column, justify="right" if column == "probability" else "left")
    if verdict.error:
        table.caption = f"not assessed: {verdict.error}"
        return table
    for i, image in enumerate(verdict.images):
        name = f"{i}{' (decides)' if i == verdict.worst and len(verdict.images) > 1 else ''}"
        for probs in (image.type_probs, image.level_probs):
            top = max(probs, key=lambda key: probs[key])
            for concept, share in probs.items():
                style = "bold" if concept == top else "dim"
                table.add_row(
                    name, concept.replace("_", " "), f"{share:.3f}", _bar(share), style=style
                )
                name = ""
            table.add_section()
    notes = []
    for band, words in (("risky", "surely risky"), ("review", "to be reviewed")):
        if names := [name for name, found in verdict.bands.items() if found == band]:
            notes.append(f"{words}: {', '.join(names).replace('_', ' ')}")
    if verdict.overridden:
        given = ", ".join(f"{name}: {verdict.concepts[name]}" for name in verdict.overridden)
        notes.append(f"overridden: {given}")
    table.caption = "\n".join(notes) or None
    return table
