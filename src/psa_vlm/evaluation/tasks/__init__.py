"""The published benchmarks that we score, by name; each reads its layout from a folder of yours."""

from __future__ import annotations

from psa_vlm.errors import DataError
from psa_vlm.evaluation.tasks.base import Benchmark
from psa_vlm.evaluation.tasks.general import GENERAL
from psa_vlm.evaluation.tasks.safety import SAFETY

BENCHMARKS: dict[str, Benchmark] = {one.name: one for one in (*SAFETY, *GENERAL)}


def benchmark_named(name: str) -> Benchmark:
    """The benchmark of this name.

    Raises:
        DataError: there is none.
    """
    if name not in BENCHMARKS:
        raise DataError(f"task {name!r} is unknown; known: testbed, {', '.join(BENCHMARKS)}")
    return BENCHMARKS[name]
