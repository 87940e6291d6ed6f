"""Does the service hold under load? Many clients at once, and a `kill -9` in the middle.

    python benchmarks/serving.py runs/demo/stage2                # 50 clients, two minutes each part
    python benchmarks/serving.py runs/demo/stage2 --seconds 10 --clients 8
    python benchmarks/serving.py runs/demo/stage2 --plain http://127.0.0.1:9000/v1 --name exported

The service runs in a process of its own. First part: load, and then a look into the audit log for
every reply that a client received. Second part: the same load, ended by `kill -9`; again every
reply must be in the log, its chain must be whole, and the service must be back soon. With `--plain`
another OpenAI-compatible engine is put under the same load, to see what psa-vlm adds.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import io
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import quantiles
from typing import Any

import httpx2
from rich.console import Console
from rich.table import Table

from common import RESULTS, write
from psa_vlm.serving.server import open_audit
from psa_vlm.testbed.cases import evaluation_samples

PROGRAM = "from psa_vlm.cli import main; main()"
TOKENS = 24


@dataclass
class Load:
    """What clients saw: replies by status, their ids, and how long each took."""

    statuses: Counter[int] = field(default_factory=Counter)
    ids: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lost: int = 0
    """Requests whose connection broke."""

    def facts(self, lasted: float) -> dict[str, Any]:
        cuts = quantiles(self.seconds, n=20) if len(self.seconds) > 1 else [0.0] * 19
        return {
            "replies": len(self.ids),
            "per_second": round(len(self.ids) / lasted, 2),
            "p50_ms": round(cuts[9] * 1000, 1),
            "p95_ms": round(cuts[18] * 1000, 1),
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "broken": self.lost,
        }


def bodies(name: str) -> list[dict[str, Any]]:
    """Requests about scenes of the testbed, risky ones and others."""
    made = []
    for cell in ("harmless", "risky"):
        for sample in evaluation_samples("style", cell, 8, 0):
            stream = io.BytesIO()
            sample.images[0].save(stream, "PNG")
            url = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
            content = [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": sample.question},
            ]
            messages = [{"role": "user", "content": content}]
            made.append({"model": name, "messages": messages, "max_tokens": TOKENS})
    return made


async def drive(url: str, asked: Sequence[dict[str, Any]], clients: int, seconds: float) -> Load:
    """Ask from many clients at once, each its next request when the last is answered."""
    found, end = Load(), time.monotonic() + seconds
    limits = httpx2.Limits(max_connections=clients)

    async def one(client: httpx2.AsyncClient, seed: int) -> None:
        rng = random.Random(seed)
        while time.monotonic() < end:
            start = time.monotonic()
            try:
                response = await client.post("/chat/completions", json=rng.choice(asked))
            except httpx2.HTTPError:
                found.lost += 1
                await asyncio.sleep(0.1)
                continue
            found.statuses[response.status_code] += 1
            if response.status_code == 200:
                found.ids.append(response.json()["id"])
                found.seconds.append(time.monotonic() - start)
            elif response.status_code == 429:
                await asyncio.sleep(float(response.headers.get("Retry-After", 1)))

    async with httpx2.AsyncClient(base_url=url, timeout=600, limits=limits) as client:
        await asyncio.gather(*(one(client, seed) for seed in range(clients)))
    return found


@contextlib.contextmanager
def served(run: Path, log: Path, name: str) -> Iterator[tuple[subprocess.Popen[str], str, float]]:
    """The service in a process of its own: it, its address, and the seconds until it listened."""
    start = time.monotonic()
    command = ["serve", "--model", run, "--audit", log, "--name", name, "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *map(str, command)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        lines = (re.search(r"http://[\d.:]+", line) for line in process.stderr)
        address = next((found[0] for found in lines if found), None)
        if address is None:
            raise SystemExit("the service did not start; run psa-vlm serve to see why")
        yield process, f"{address}/v1", time.monotonic() - start
    finally:
        process.terminate()
        process.communicate()


def missing(log: Path, ids: Sequence[str]) -> int:
    """Replies that are not on record; the chain is verified on the way."""
    with open_audit(str(log), existing=True) as audit:
        recorded = {one["request"] for one in audit.records()}
    return sum(id_ not in recorded for id_ in ids)


async def killed(
    process: subprocess.Popen[str], url: str, asked: Any, clients: int, seconds: float
) -> Load:
    """A load in the middle of which the service is killed."""
    load = asyncio.create_task(drive(url, asked, clients, seconds))
    await asyncio.sleep(seconds * 0.7)
    process.kill()
    return await load


def measure(run: Path, clients: int, seconds: float, folder: Path) -> dict[str, Any]:
    name, log = "run", folder / "audit.db"
    asked = bodies(name)
    with served(run, log, name) as (_, url, _):
        asyncio.run(drive(url, asked, 1, 0.1))  # the first request is slow
        load = asyncio.run(drive(url, asked, clients, seconds))
    facts = {"load": load.facts(seconds) | {"not_on_record": missing(log, load.ids)}}
    with served(run, log, name) as (process, url, _):
        load = asyncio.run(killed(process, url, asked, clients, seconds))
    with served(run, log, name) as (_, url, start):
        asyncio.run(drive(url, asked, 1, 0.1))
    lost = {"not_on_record": missing(log, load.ids), "restart_seconds": round(start, 1)}
    return {**facts, "killed": load.facts(seconds) | lost}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run on the testbed's base model")
    parser.add_argument("--clients", type=int, default=50, help="at once (50)")
    parser.add_argument("--seconds", type=float, default=120, help="of each part (120)")
    parser.add_argument("--plain", metavar="URL", help="an engine without psa-vlm, to compare with")
    parser.add_argument("--name", default="run", help="what that engine calls its model")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a file in results/")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        parts = measure(options.run, options.clients, options.seconds, Path(folder))
    if options.plain:
        asked = bodies(options.name)
        load = asyncio.run(drive(options.plain, asked, options.clients, options.seconds))
        parts["plain"] = load.facts(options.seconds)
    table = Table("", *parts)
    for fact in parts["killed"]:
        table.add_row(fact, *(str(facts.get(fact, "")) for facts in parts.values()))
    Console().print(table)
    path = options.json or RESULTS / "serving.json"
    figures = {
        "clients": options.clients,
        "seconds": options.seconds,
        **parts,
    }
    write(path, "serving", figures, argv, packages=["fastapi", "uvicorn", "sqlalchemy"])


if __name__ == "__main__":
    main()
