"""A scan from start to end: Ray Data hands the parts of the plan to a pool of actors."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from psa_vlm.errors import ConfigError, InputError, PsaVlmError
from psa_vlm.inference import PsaVlm
from psa_vlm.model.checkpoint import fingerprint, home
from psa_vlm.policy.policy import Policy
from psa_vlm.scan import BATCH, ROWS, TEXT
from psa_vlm.scan.assess import opened, rows
from psa_vlm.scan.output import Counts, Output
from psa_vlm.scan.source import Source, absolute, one_line
from psa_vlm.taxonomy import Taxonomy

RETRIES = 2
"""Times that a part is tried again whose actor died."""
_OBJECT_STORE = 100 * 2**20


@dataclass(frozen=True)
class Scan:
    """What a scan is told."""

    source: str
    """A folder, a tar or a Parquet file, as a path or a URL that fsspec knows."""
    out: str
    """Folder of the result, likewise."""
    model: Path
    """The run folder; every machine of a cluster must have it there."""
    policy: Policy
    """What decides on the action."""
    text: str = TEXT
    """The question put to each image: a verdict is one on image and question."""
    base: Path | None = None
    """Where the base model is now, if it moved."""
    column: str | None = None
    """Of Parquet files, the one that holds encoded images; None finds it."""
    batch: int = BATCH
    """Images in one pass of the model."""
    rows: int = ROWS
    """Image files in a part: what a kill costs each actor at most."""


@dataclass(frozen=True)
class Summary:
    """What came of a scan."""

    counts: Counts
    """Of the whole result, what an earlier call assessed included."""
    left_out: dict[str, int]
    """Files that are no images by their names, by suffix."""
    assessed: int = 0
    """Images that this call assessed."""
    seconds: float = 0.0
    """From the first actor that was ready to the end."""

    @property
    def rate(self) -> float | None:
        """Images a second, None if none was assessed."""
        return self.assessed / self.seconds if self.seconds else None


@dataclass
class Progress:
    """How far a scan is, for whoever watches."""

    parts: int
    done: int = 0
    images: int = 0
    begun: float = field(default=float("inf"))
    ended: float = 0.0

    @property
    def seconds(self) -> float:
        return max(self.ended - self.begun, 0.0)

    def add(self, part: dict[str, Any]) -> None:
        self.done += 1
        self.images += part["images"]
        self.begun = min(self.begun, part["begun"])
        self.ended = max(self.ended, part["ended"])


def scan(
    job: Scan,
    address: str | None = None,
    actors: int | None = None,
    watch: Callable[[Progress], None] = lambda progress: None,
) -> Summary:
    """Assess every image of the source, or go on where a scan was killed.

    Args:
        job: what to do.
        address: of a Ray cluster; None is this machine.
        actors: copies of the model; None is one for each GPU or, without any, one for each CPU
            but one.
        watch: told after each part.

    Raises:
        InputError: there is nothing to scan, or the cluster can't hold the actors.
        ConfigError: `out` holds another scan.
        CheckpointError: the run can't be used.
        PsaVlmError: it could not be finished; what is done is kept.
    """
    if not job.text.strip():
        raise InputError("the text is empty: say what is asked about the images")
    job = replace(
        job,
        source=absolute(job.source),
        out=absolute(job.out),
        model=job.model.resolve(),
        base=job.base and job.base.resolve(),
    )
    job.policy.check(Taxonomy.from_yaml(home(job.model) / "taxonomy.yaml"))
    source, output = Source(job.source, job.column), Output(job.out)
    units, left_out = source.units(job.rows)
    if f"{job.out}/".startswith(f"{job.source}/"):
        raise ConfigError(f"{job.out}: lies in {job.source}, which is scanned; choose another")
    output.begin(
        {
            "source": job.source,
            "text": job.text,
            "model": fingerprint(job.model),
            "policy": job.policy.hash,
        }
    )
    parts = output.plan(units, job.rows)
    progress = Progress(len(parts))
    if parts:
        with _ray(address, actors) as (size, gpus):
            for done in _assessed(job, parts, size, gpus):
                if done["failed"]:
                    raise PsaVlmError(done["failed"])
                progress.add(done)
                watch(progress)
    return Summary(output.counts(), dict(left_out), progress.images, progress.seconds)


class Worker:
    """One copy of the model: reads, assesses and writes one part after the other."""

    def __init__(self, job: Scan, gpus: float) -> None:
        import torch

        self.job = job
        self.source, self.output = Source(job.source, job.column), Output(job.out)
        self.failed = ""
        if not gpus:
            torch.set_num_threads(1)
        try:
            device = "cuda" if gpus else None
            self.model = PsaVlm.from_pretrained(job.model, job.base, device=device)
        except PsaVlmError as error:  # told by the first part, in one line
            self.failed = str(error)

    def __call__(self, batch: Any) -> dict[str, Any]:
        """Do a part; what comes back is how much that was and how long it took."""
        (part,), begun, images = batch["part"].tolist(), time.time(), 0
        try:
            images = 0 if self.failed else self.assess(part)
        except PsaVlmError as error:
            self.failed = str(error)
        figures = {"images": images, "begun": begun, "ended": time.time(), "failed": self.failed}
        return {name: [value] for name, value in figures.items()}

    def assess(self, part: int) -> int:
        """Write a part; its number of rows."""
        images = opened(self.source.read(self.output.units(part)))
        found = list(rows(self.model, self.job.policy, self.job.text, images, self.job.batch))
        self.output.write(part, found, self.model.taxonomy)
        return len(found)


def _assessed(job: Scan, parts: list[int], actors: int, gpus: float) -> Iterator[dict[str, Any]]:
    import ray.data
    from ray.exceptions import RayError

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield from (
            ray.data.from_items(
                [{"part": part} for part in parts], override_num_blocks=min(len(parts), 2000)
            )
            .map_batches(
                Worker,
                fn_constructor_args=(job, gpus),
                batch_size=1,
                compute=ray.data.ActorPoolStrategy(size=actors),
                num_cpus=1,
                num_gpus=gpus,
                ray_remote_args_fn=lambda: {
                    "max_restarts": RETRIES,
                    "max_task_retries": RETRIES,
                },
            )
            .iter_rows()
        )
    except RayError as error:
        reason = one_line(str(error).strip().rpartition("\n")[2] or type(error).__name__)
        raise PsaVlmError(
            f"the scan stopped ({reason}); what is done is kept: run the same command again"
        ) from error


@contextmanager
def _ray(address: str | None, actors: int | None) -> Iterator[tuple[int, float]]:
    """Ray without a dashboard or a word to anyone: the number of actors, and GPUs for each.

    A CPU is left for Ray's own tasks: a pool that takes them all waits for ever.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    here: dict[str, Any] = {
        "num_cpus": max(os.cpu_count() or 1, (actors or 1) + 1),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE,
    }
    try:
        with _no_stderr():
            ray.init(
                address or "local",
                log_to_driver=False,
                logging_level=logging.CRITICAL,
                **({} if address else here),
            )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise InputError(
            f"{address or 'this machine'}: no Ray there ({one_line(error)})"
        ) from error
    try:
        found = ray.cluster_resources()  # type: ignore[no-untyped-call]
        cpus, gpus = int(found.get("CPU", 0)), int(found.get("GPU", 0))
        size = actors or gpus or max(cpus - 1, 1)
        if size >= cpus:
            raise InputError(
                f"--actors {size}: Ray has {cpus} CPUs, of which one must stay free; use at most"
                f" {cpus - 1}"
            )
        yield size, min(1.0, gpus / size)
    finally:
        ray.shutdown()


@contextmanager
def _no_stderr() -> Iterator[None]:
    """Drop what is written to stderr past Python, as Ray's core does of its own log level."""
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
