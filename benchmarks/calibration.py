"""Does a calibration keep its promise? Recalibrations on fresh scenes against what they promise.

    python benchmarks/calibration.py runs/demo/stage2                 # 10,000 scenes, 100 times
    python benchmarks/calibration.py runs/demo/stage2 --scenes 30000 --recalibrations 1000

Every scene is scored once, and the scored scenes are the whole world of this benchmark: each
recalibration draws as many scenes from them, with replacement, and fits temperatures and thresholds
on its draw as `psa-vlm calibrate` does; its true rates are those over all scenes. So nothing is
estimated but the share of recalibrations that keep the promise, which stands beside its 95%
interval. A promise is contradicted ("no") where the whole interval is below the confidence.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from common import RESULTS, write
from psa_vlm import PsaVlm, Taxonomy
from psa_vlm.evaluation.calibrate import (
    FIT_SHARE,
    Promise,
    Readings,
    band_shares,
    fit_temperatures,
    fit_thresholds,
    read,
)
from psa_vlm.evaluation.scorers import wilson
from psa_vlm.testbed.cases import alignment_samples

CHUNK = 1000
"""Scenes that are drawn at a time."""


def score(model: PsaVlm, scenes: int, seed: int) -> Readings:
    """Readings of fresh scenes, in the mix of alignment and unseen by it."""
    parts = [
        read(model, alignment_samples(min(CHUNK, scenes - start), seed + i, split="calibration"))
        for i, start in enumerate(range(0, scenes, CHUNK))
    ]
    columns = zip(*(vars(part).values() for part in parts), strict=True)
    return Readings(*(np.concatenate(column) for column in columns))


def recalibrate(
    readings: Readings, taxonomy: Taxonomy, promise: Promise, count: int, seed: int
) -> dict[str, np.ndarray]:
    """True rate in each recalibration: misses of each type, and false refusals under clean."""
    rng, n = np.random.default_rng(seed), len(readings.type_ids)
    groups = readings.groups(taxonomy)
    rates: dict[str, list[float]] = {name: [] for name in taxonomy.types}
    for _ in range(count):
        fit, bound = np.split(rng.integers(0, n, n), [round(FIT_SHARE * n)])
        temperatures = fit_temperatures(readings.take(fit))
        everything = readings.divided(temperatures)
        thresholds = fit_thresholds(everything.take(bound), taxonomy, promise)
        shares = band_shares(everything.scores(taxonomy), groups, thresholds, taxonomy)
        for name, values in rates.items():
            values.append(shares[name]["risky" if name == taxonomy.clean else "clean"])
    return {name: np.array(values) for name, values in rates.items()}


def summarise(
    rates: dict[str, np.ndarray], taxonomy: Taxonomy, promise: Promise
) -> list[dict[str, Any]]:
    """One row for each promise."""
    rows = []
    for name, values in rates.items():
        harmless = name == taxonomy.clean
        most = promise.false_refusal if harmless else promise.miss_rate
        kept = wilson((values <= most).tolist())
        assert kept is not None
        rows.append(
            {
                "what": "false refusals" if harmless else f"{name} missed",
                "promised": most,
                "mean": float(values.mean()),
                "worst": float(values.max()),
                "kept": kept.value,
                "interval": [kept.low, kept.high],
                "met": kept.high >= promise.confidence,
            }
        )
    return rows


def show(rows: Sequence[dict[str, Any]], promise: Promise) -> None:
    table = Table("what", "promised", "mean", "worst", "kept", "95% interval", "met")
    for row in rows:
        rates = (f"{100 * row[key]:.2f}%" for key in ("promised", "mean", "worst", "kept"))
        interval = " to ".join(f"{end:.1%}" for end in row["interval"])
        table.add_row(row["what"], *rates, interval, "yes" if row["met"] else "[red]no")
    table.caption = f"promised to be kept: {promise.confidence:.1%}"
    Console().print(table)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder on the testbed's base model")
    parser.add_argument("--scenes", type=int, default=10_000, help="to score once (10,000)")
    parser.add_argument("--recalibrations", type=int, default=100, help="drawn from them (100)")
    parser.add_argument("--miss-rate", type=float, default=0.01)
    parser.add_argument("--false-refusal", type=float, default=0.05)
    parser.add_argument("--confidence", type=float, default=0.95)
    parser.add_argument("--seed", type=int, default=0, help="of scenes and draws")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a file in results/")
    options = parser.parse_args(argv)
    promise = Promise(options.miss_rate, options.false_refusal, options.confidence)
    started = time.monotonic()
    model = PsaVlm.from_pretrained(options.run, calibrated=False)
    readings = score(model, options.scenes, options.seed)
    rates = recalibrate(readings, model.taxonomy, promise, options.recalibrations, options.seed)
    rows = summarise(rates, model.taxonomy, promise)
    show(rows, promise)
    path = options.json or RESULTS / "calibration-testbed.json"
    figures = {
        "scenes": options.scenes,
        "recalibrations": options.recalibrations,
        "promise": vars(promise),
        "rows": rows,
        "seconds": round(time.monotonic() - started, 1),
    }
    write(path, "calibration", figures, argv)


if __name__ == "__main__":
    main()
