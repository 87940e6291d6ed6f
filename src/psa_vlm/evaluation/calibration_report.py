"""A calibration for people: a table in the terminal, and a page with its reliability diagrams."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.table import Table

from psa_vlm.evaluation import figures
from psa_vlm.evaluation.report import write_page
from psa_vlm.evaluation.scorers import Bin
from psa_vlm.model.calibration import Calibration, Quality
from psa_vlm.taxonomy import Taxonomy

COLUMNS = ("type", "n", "clean below", "risky above", "missed", "review", "risky")


def table(calibration: Calibration, taxonomy: Taxonomy) -> Table:
    """One line for each risk type and one for harmless samples; shares are of the samples used."""
    shown = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "type" else "right")
    for row in _rows(calibration, taxonomy):
        shown.add_row(*row)
    heads = [
        f"{head}: temperature {getattr(calibration.temperatures, head):.3f},"
        f" ECE {change.before.ece:.4f} -> {change.after.ece:.4f},"
        f" NLL {change.before.nll:.4f} -> {change.after.nll:.4f}"
        for head, change in calibration.quality.items()
    ]
    promise = (
        f"Promised at {_percent(calibration.confidence)} confidence: at most"
        f" {_percent(calibration.miss_rate)} of each type missed, and at most"
        f" {_percent(calibration.false_refusal)} of harmless requests surely risky."
    )
    shown.caption = "\n".join([promise, *heads])
    shown.caption_justify = "left"
    return shown


def write_calibration(
    path: str | Path, calibration: Calibration, taxonomy: Taxonomy, run: str | Path
) -> None:
    """Write the page, whole or not at all.

    Raises:
        MissingExtra: plotly is not installed.
    """
    charts = {
        f"{head}-{when}": figures.reliability(_bins(getattr(change, when)))
        for head, change in calibration.quality.items()
        for when in ("before", "after")
    }
    write_page(
        path,
        "calibration.html",
        charts,
        one=calibration.model_dump(exclude={"scores"}),
        columns=COLUMNS,
        rows=_rows(calibration, taxonomy),
        percent=_percent,
        safe=taxonomy.safe_level,
        run=run,
    )


def _rows(calibration: Calibration, taxonomy: Taxonomy) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for name in (*taxonomy.risk_types, taxonomy.clean):
        limits, shares = calibration.thresholds.get(name), calibration.shares[name]
        rows.append(
            (
                taxonomy.label(name) if limits else "harmless",
                f"{calibration.n[name]:,}",
                f"{limits.clean_below:.4f}" if limits else "",
                f"{limits.risky_above:.4f}" if limits else "",
                _percent(shares["clean"]) if limits else "",
                _percent(shares["review"]),
                _percent(shares["risky"]),
            )
        )
    return rows


def _bins(quality: Quality) -> list[Bin]:
    count = len(quality.n)
    columns = zip(quality.n, quality.confidence, quality.accuracy, strict=True)
    return [Bin(i / count, (i + 1) / count, *column) for i, column in enumerate(columns)]


def _percent(share: float) -> str:
    return f"{100 * share:.4g}%"
