"""How many images a second a scan assesses, and how that grows with its actors.

    python benchmarks/scan.py runs/demo/stage2                        # 2,000 scenes of the testbed
    python benchmarks/scan.py runs/mine --source photos --actors 1 2 4 8

Every scan is a new one on the same files, with Ray started anew. The rate counts from the moment
when the first actor has loaded its model; `wall` counts from the start of the call, Ray's own start
and the loading included.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from common import RESULTS, write
from psa_vlm.model.checkpoint import home
from psa_vlm.policy.policy import Policy
from psa_vlm.scan.run import Scan, scan
from psa_vlm.testbed.cases import alignment_samples


def write_scenes(folder: Path, count: int) -> None:
    """PNG files of the testbed's scenes."""
    folder.mkdir()
    for index, sample in enumerate(alignment_samples(count, seed=0)):
        sample.images[0].save(folder / f"{index:06d}.png")


def measure(run: Path, source: Path, out: Path, actors: int, rows: int) -> dict[str, Any]:
    """One scan of the source."""
    policy = Policy.from_yaml(home(run) / "policy.yaml")
    start = time.perf_counter()
    summary = scan(Scan(str(source), str(out), run, policy, rows=rows), actors=actors)
    return {
        "actors": actors,
        "images": summary.assessed,
        "errors": summary.counts.errors,
        "images_per_second": round(summary.rate or 0.0, 2),
        "seconds": round(summary.seconds, 2),
        "wall": round(time.perf_counter() - start, 2),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run folder")
    parser.add_argument("--source", type=Path, help="what to scan; default: scenes")
    parser.add_argument("--images", type=int, default=2000, help="scenes to draw (2000)")
    parser.add_argument("--actors", type=int, nargs="+", help="default: 1, 2, 4 ... up to the CPUs")
    parser.add_argument("--rows", type=int, default=50, help="images in a part (50)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a file in results/")
    options = parser.parse_args(argv)
    cpus = os.cpu_count() or 1
    counts = options.actors or [n for n in (1, 2, 4, 8, 16, 32, 64) if n <= cpus]
    with TemporaryDirectory() as folder:
        source = options.source or Path(folder, "scenes")
        if options.source is None:
            write_scenes(source, options.images)
        scans = [
            measure(options.run, source, Path(folder, str(actors)), actors, options.rows)
            for actors in counts
        ]
    table = Table("actors", "images/s", "times the first", "errors", "wall (s)")
    for one in scans:
        one["speedup"] = round(one["images_per_second"] / scans[0]["images_per_second"], 2)
        figures = ("actors", "images_per_second", "speedup", "errors", "wall")
        table.add_row(*(str(one[figure]) for figure in figures))
    Console().print(table)
    figures = {"cpus": cpus, "rows": options.rows, "scans": scans}
    write(options.json or RESULTS / "scan.json", "scan", figures, argv, packages=["ray", "pyarrow"])


if __name__ == "__main__":
    main()
