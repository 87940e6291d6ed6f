"""Does the service hold under load? Many clients at once, and a `kill -9` in the middle.

    python benchmarks/serving.py runs/demo/stage2 --plain   # 50 clients, 2 minutes each part
    python benchmarks/serving.py runs/demo/stage2 --plain --seconds 10 --clients 8

The service runs in a process of its own. First part: load, and then a look into the audit log for
every reply that a client received. Second part: the same load, ended by `kill -9`; again every
reply must be in the log, its chain must be whole, and the service must be back soon. With `--plain`
come two more: the service under a policy that allows everything, and the same engine without
psa-vlm (`plain_engine.py`). Both give the same answers, so the difference is what psa-vlm costs.

It fails if a client got a 5xx, or a reply is not on record.
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

SERVE = [sys.executable, "-c", "from psa_vlm.cli import main; main()", "serve"]
PLAIN = [sys.executable, Path(__file__).with_name("plain_engine.py")]
ALLOW = 'name: allow\ninherits: default\nrules: {"*": {low: allow, medium: allow, high: allow}}\n'
NAME = "run"
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
            "server_errors": sum(n for status, n in self.statuses.items() if status >= 500),
            "statuses": {str(status): count for status, count in self.statuses.items()},
            "broken": self.lost,
        }


def bodies() -> list[dict[str, Any]]:
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
            made.append({"model": NAME, "messages": messages, "max_tokens": TOKENS})
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
def served(*command: object) -> Iterator[tuple[subprocess.Popen[bytes], str, float]]:
    """A service in a process of its own: it, its address, and the seconds until it listened."""
    start = time.monotonic()
    with tempfile.NamedTemporaryFile() as log:
        process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.DEVNULL, stderr=log.file
        )
        try:
            while not (found := re.search(r"http://[\d.:]+", Path(log.name).read_text())):
                if process.poll() is not None:
                    raise SystemExit(f"the service did not start:\n{Path(log.name).read_text()}")
                time.sleep(0.05)
            yield process, f"{found[0]}/v1", time.monotonic() - start
        finally:
            process.terminate()
            process.wait()


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


def loaded(url: str, asked: Any, clients: int, seconds: float) -> Load:
    """A load after a first request, which is slow."""
    asyncio.run(drive(url, asked, 1, 0.1))
    return asyncio.run(drive(url, asked, clients, seconds))


def measure(run: Path, clients: int, seconds: float, folder: Path) -> dict[str, Any]:
    """Load, and load with a kill."""
    log, asked = folder / "audit.db", bodies()
    command = (*SERVE, "--model", run, "--name", NAME, "--port", 0, "--audit", log)
    with served(*command) as (_, url, _):
        load = loaded(url, asked, clients, seconds)
    facts = {"load": load.facts(seconds) | {"not_on_record": missing(log, load.ids)}}
    with served(*command) as (process, url, _):
        load = asyncio.run(killed(process, url, asked, clients, seconds))
    with served(*command) as (_, url, start):
        asyncio.run(drive(url, asked, 1, 0.1))
    lost = {"not_on_record": missing(log, load.ids), "restart_seconds": round(start, 1)}
    return {**facts, "killed": load.facts(seconds) | lost}


def compare(run: Path, clients: int, seconds: float, folder: Path) -> dict[str, Any]:
    """The service where it allows everything, and its engine without it."""
    log, policy, asked = folder / "allowed.db", folder / "allow.yaml", bodies()
    policy.write_text(ALLOW)
    command = (*SERVE, "--model", run, "--name", NAME, "--port", 0, "--audit", log)
    with served(*command, "--policy", policy) as (_, url, _):
        load = loaded(url, asked, clients, seconds)
    allowed = load.facts(seconds) | {"not_on_record": missing(log, load.ids)}
    with served(*PLAIN, run) as (_, url, _):
        plain = loaded(url, asked, clients, seconds).facts(seconds)
    return {"allowed": allowed, "plain": plain}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("run", type=Path, help="a run on the testbed's base model")
    parser.add_argument("--clients", type=int, default=50, help="at once (50)")
    parser.add_argument("--seconds", type=float, default=120, help="of each part (120)")
    parser.add_argument("--plain", action="store_true", help="measure what psa-vlm costs, too")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: a file in results/")
    options = parser.parse_args(argv)
    told = (options.run, options.clients, options.seconds)
    with tempfile.TemporaryDirectory() as folder:
        parts = measure(*told, Path(folder))
        if options.plain:
            parts |= compare(*told, Path(folder))
    table = Table("", *parts)
    for fact in parts["killed"]:
        table.add_row(fact, *(str(facts.get(fact, "")) for facts in parts.values()))
    if options.plain:
        costs = {
            name: round(parts["allowed"][name] - parts["plain"][name], 1)
            for name in ("p50_ms", "p95_ms")
        }
        table.caption = "psa-vlm adds {p50_ms} ms at the median, {p95_ms} ms at the 95%".format(
            **costs
        )
        parts["overhead"] = costs
    Console().print(table)
    path = options.json or RESULTS / "serving.json"
    figures = {"clients": options.clients, "seconds": options.seconds, **parts}
    write(path, "serving", figures, argv, packages=["fastapi", "uvicorn", "sqlalchemy"])
    if any(part.get("server_errors") or part.get("not_on_record") for part in parts.values()):
        raise SystemExit("a client got a 5xx, or a reply is not on record")


if __name__ == "__main__":
    main()
