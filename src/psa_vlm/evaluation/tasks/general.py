"""Published sets of general ability: questions with one right answer."""

from __future__ import annotations

from psa_vlm.data.sample import Sample
from psa_vlm.evaluation.tasks.base import Benchmark, Wanted, stem, tagged

MME_PARTS: dict[str, tuple[str, ...]] = {
    "perception": (
        *("existence", "count", "position", "color", "posters", "celebrity", "scene"),
        *("landmark", "artwork", "OCR"),
    ),
    "cognition": (
        *("commonsense_reasoning", "numerical_calculation", "text_translation"),
        "code_reasoning",
    ),
}
"""MME's two sums, and the categories that each is over."""


def _pope(sample: Sample) -> Wanted:
    return Wanted("target", stem(sample), form="yes-no", asked="Answer yes or no.")


def _mme(sample: Sample) -> Wanted:
    return Wanted("target", tagged("category", sample), form="yes-no")


def _choices(sample: Sample) -> Wanted:
    return Wanted("target", tagged("category", sample), form="letter")


GENERAL = (
    Benchmark(
        "pope",
        "POPE",
        "pope",
        (("*pope*.json*", "*/*pope*.json*"),),
        "github.com/AoiDragon/POPE, with the images of COCO val2014",
        _pope,
        16,
    ),
    Benchmark(
        "mme",
        "MME",
        "mme",
        (("*.tsv", "*.parquet", "data/*.parquet"),),
        "the authors of arXiv 2306.13394 (on request)",
        _mme,
        16,
    ),
    Benchmark(
        "mmbench",
        "MMBench",
        "mmbench",
        (("*.tsv",),),
        "github.com/open-compass/MMBench",
        _choices,
        32,
    ),
    Benchmark(
        "seedbench",
        "SEED-Bench",
        "mmbench",
        (("*.tsv",),),
        "github.com/AILab-CVC/SEED-Bench",
        _choices,
        32,
    ),
)
