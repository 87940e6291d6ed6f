"""How much memory does preparing a data set take? Synthetic rows, and the peak while mixing them.

    python benchmarks/prepare.py                  # a million rows, 10,000 images
    python benchmarks/prepare.py --rows 20000

Rows are written in the authors' layout and then prepared in a process of its own, whose peak is
measured (on Linux): near copies compared, splits without leaks, types and the ratio balanced. What
the process holds before its first row (Python and the libraries) is shown beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from rich.console import Console
from rich.table import Table

from common import RESULTS, write

WORK = """
import json, re, sys, time
import datasets, imagehash, scipy.sparse.csgraph
from pathlib import Path
from psa_vlm.data.config import PrepareConfig
from psa_vlm.data.prepare import prepare
status = Path("/proc/self/status")
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+) kB", status.read_text())[1]) / 1e3
before, start = peak(), time.monotonic()
manifest = prepare(PrepareConfig.model_validate_json(sys.argv[1]), Path(sys.argv[2]))
facts = {"before": before, "peak": peak(), "seconds": time.monotonic() - start}
facts["splits"] = {name: one["samples"] for name, one in manifest["splits"].items()}
print(json.dumps(facts))
"""


def write_rows(folder: Path, rows: int, images: int, seed: int = 0) -> Path:
    """A set in the authors' layout: types in turn, each question asked once of an image."""
    rng = np.random.default_rng(seed)
    for number in range(images):
        grid = rng.integers(0, 256, (6, 6, 3), np.uint8)
        Image.fromarray(grid).resize((64, 64)).save(folder / f"{number}.png")
    path = folder / "rows.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for number in range(rows):
            type = number % 7
            question = f"<image>\nWhat is number {number // images} of this picture?"
            row = {
                "safe_type": type,
                "safe_level": 0 if type == 6 else 1 + number % 3,
                "image": f"{number % images}.png",
                "conversations": [
                    {"from": "USER", "value": question},
                    {"from": "ASSISTANT", "value": "It is a picture of coloured squares."},
                ],
            }
            file.write(json.dumps(row) + "\n")
    return path


def measure(rows: int, images: int, folder: Path) -> dict[str, Any]:
    """Prepare the rows in a new process; memory in MB."""
    path = write_rows(folder, rows, images)
    balance = {"types": "equal", "clean_to_risky": 0.27}
    config = {"sources": [{"path": str(path)}], "balance": balance}
    command = [sys.executable, "-c", WORK, json.dumps(config), str(folder / "out")]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    facts["bytes_a_row"] = 1e6 * (facts["peak"] - facts["before"]) / rows
    facts["file"] = path.stat().st_size / 1e6
    return facts


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=1_000_000, help="(1,000,000)")
    parser.add_argument("--images", type=int, default=10_000, help="different ones (10,000)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a file in results/")
    options = parser.parse_args(argv)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        facts = measure(options.rows, min(options.images, options.rows), Path(name))
    table = Table("what", "value")
    table.add_row("rows", f"{options.rows:,}")
    table.add_row("their file", f"{facts['file']:,.0f} MB")
    table.add_row("memory before the first row", f"{facts['before']:,.0f} MB")
    table.add_row("peak", f"{facts['peak']:,.0f} MB")
    table.add_row("a row", f"{facts['bytes_a_row']:,.0f} bytes")
    table.add_row("rows a second", f"{options.rows / facts['seconds']:,.0f}")
    Console().print(table)
    path = options.json or RESULTS / "prepare.json"
    figures = {
        "rows": options.rows,
        "images": options.images,
        **facts,
        "total_seconds": round(time.monotonic() - started, 1),
    }
    write(path, "prepare", figures, argv, packages=["datasets"])


if __name__ == "__main__":
    main()
