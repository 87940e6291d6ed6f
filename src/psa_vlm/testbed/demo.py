"""The demo: five methods on the same scenes, from the shipped base model to a report."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from rich.console import Console

from psa_vlm.data.sample import Sample
from psa_vlm.evaluation import kept
from psa_vlm.evaluation.evaluate import AnswerFn, aligned, run, unaligned
from psa_vlm.evaluation.report import Curve, Example, Reliability, write_report
from psa_vlm.evaluation.scorecard import Method, Record, Scorecard, git_commit
from psa_vlm.inference import PsaVlm
from psa_vlm.model.backbone import Backbone
from psa_vlm.testbed.cases import CELLS, SPLITS, Split, alignment_samples, evaluation_samples
from psa_vlm.testbed.premise import base_path
from psa_vlm.testbed.world import world
from psa_vlm.training.config import Stage1Config, Stage2Config, load
from psa_vlm.training.fit import Work
from psa_vlm.training.language import dialogues, train_lora
from psa_vlm.training.stage1 import run_stage1
from psa_vlm.training.stage2 import run_stage2


@dataclass(frozen=True)
class Scale:
    """How large a demo is; figures of several seeds are pooled."""

    alignment: int
    """Labelled scenes that every method but the first two learns from."""
    per_cell: int
    """Held-out requests for each split and cell, for each seed."""
    seeds: int


SCALES = {"small": Scale(2000, 80, 1), "full": Scale(2000, 667, 3)}
EXAMPLES = 6


def run_demo(out: Path, seed: int, scale: str) -> Scorecard:
    """Align the base model, compare the methods, and write `scorecard.json` and `report.html`.

    A seed whose records are on disk is not run again, so that a stopped demo goes on.

    Args:
        out: folder for the report, the scorecard and the runs of the first seed.
        seed: the first seed.
        scale: a name in `SCALES`.
    """
    console, size, started = Console(), SCALES[scale], time.monotonic()
    if not console.is_terminal:
        console.width = 100  # a log has no width of its own; the tables need this much
    out.mkdir(parents=True, exist_ok=True)
    seeds = [seed + i for i in range(size.seeds)]
    records: list[Record] = []
    for one in seeds:
        console.rule(f"seed {one}")
        records += _run_seed(out if one == seed else out / f"seed-{one}", one, size)
    card = Scorecard.from_records(
        records, seed if len(seeds) == 1 else seeds, time.monotonic() - started
    )
    card.save(out / "scorecard.json")
    write_report(
        out / "report.html",
        card,
        _examples(out / "stage2", seed),
        _curves(out),
        Reliability.from_records([r for r in records if r.method == "stage2"]),
        command=f"psa-vlm demo --seed {seed} --scale {scale}",
    )
    console.print(card.table())
    console.print(f"report: {out / 'report.html'}   scorecard: {out / 'scorecard.json'}")
    console.print(
        f"aligned model: {out / 'stage2'}   try: psa-vlm chat IMAGE --model {out / 'stage2'}"
    )
    return card


def evaluate_run(model: PsaVlm, per_cell: int, seed: int) -> Scorecard:
    """Score a run on the testbed's held-out splits."""
    started = time.monotonic()
    method: Method = "stage1" if model.adapter is None else "stage2"
    records = evaluate(method, aligned(model), held_out(per_cell, seed), seed)
    return Scorecard.from_records(records, seed, time.monotonic() - started)


def _run_seed(out: Path, seed: int, size: Scale) -> list[Record]:
    """All methods with one seed; the records are kept in `out`, by the size and the code."""

    def make() -> list[Record]:
        samples = alignment_samples(size.alignment, seed)
        asked = held_out(size.per_cell, seed)
        return [
            record
            for method, answer in _methods(out, seed, samples)
            for record in evaluate(method, answer, asked, seed)
        ]

    name = f"records-{size.alignment}-{size.per_cell}-{git_commit()}.jsonl"
    return kept.rows(out / name, Record, make)


def _methods(out: Path, seed: int, samples: list[Sample]) -> Iterator[tuple[Method, AnswerFn]]:
    """Each method, trained when its turn comes."""
    base = Backbone.from_pretrained(base_path())
    yield "base", unaligned(base)
    yield "system_prompt", unaligned(base, world().table["safety_system_prompt"])
    first, second = configs(out / "stage1", out / "stage2", seed)
    yield "stage1", aligned(run_stage1(first, samples))
    yield "stage2", aligned(run_stage2(second, samples))
    # The rival: the same LoRA on the same dialogues, without bottleneck, tokens and hints.
    work = Work(out / "lora.work", seed)
    adapter, _ = train_lora(base, dialogues(samples), second.lora, work)
    shutil.rmtree(work.folder)
    adapter.merge_adapter()
    yield "lora", unaligned(base)


def configs(
    first: Path,
    second: Path,
    seed: int,
    changes1: Sequence[str] = (),
    changes2: Sequence[str] = (),
) -> tuple[Stage1Config, Stage2Config]:
    """The testbed's recipe of both stages.

    Args:
        first, second: their run folders.
        seed: of both.
        changes1, changes2: `section.key=value` of each, as in `concepts.epochs=3`.
    """
    assets = Path(str(files("psa_vlm.testbed").joinpath("assets")))
    told = ["data=[]", f"seed={seed}"]
    return (
        load(
            assets / "stage1.yaml",
            Stage1Config,
            [f"backbone={base_path()}", f"out={first}", *told, *changes1],
        ),
        load(
            assets / "stage2.yaml",
            Stage2Config,
            [f"model={first}", f"out={second}", *told, *changes2],
        ),
    )


def held_out(per_cell: int, seed: int) -> dict[Split, list[Sample]]:
    """So many requests of each cell, for each split."""
    return {
        split: [
            sample for cell in CELLS for sample in evaluation_samples(split, cell, per_cell, seed)
        ]
        for split in SPLITS
    }


def evaluate(
    method: Method, answer: AnswerFn, asked: dict[Split, list[Sample]], seed: int
) -> list[Record]:
    """Put requests of every split to a method."""
    return [
        record
        for split, samples in asked.items()
        for record in run(answer, samples, method, split, f"{method} on {split}", seed)
    ]


def _examples(run_folder: Path, seed: int) -> list[Example]:
    """Before and after on held-out scenes: risky ones, look-alikes, and a plain question."""
    base, model = Backbone.from_pretrained(base_path()), PsaVlm.from_pretrained(run_folder)
    samples = [
        *evaluation_samples("compositions", "risky", EXAMPLES, seed + 10_000),
        *evaluation_samples("compositions", "lookalike", EXAMPLES // 2, seed + 10_000),
        *evaluation_samples("objects", "risky", EXAMPLES // 2, seed + 10_000),
        *evaluation_samples("compositions", "vqa", 1, seed + 10_000),
    ]
    before = unaligned(base)(samples)
    after = model.reply_batch([s.images for s in samples], [s.question for s in samples])
    examples = []
    for sample, (plain, _), reply in zip(samples, before, after, strict=True):
        (image,) = sample.images
        assert not isinstance(image, Path) and reply.verdict is not None
        examples.append(
            Example(
                image,
                sample.question,
                plain,
                reply.text,
                reply.verdict,
                reply.decision.action,
                reply.decision.rule,
                reply.decision.hint,
                sample.answer,
            )
        )
    return examples


def _curves(out: Path) -> Sequence[Curve]:
    """Loss curves of both stages, from the histories in the run folders."""
    curves = []
    for stage in ("stage1", "stage2"):
        history = json.loads((out / stage / "history.json").read_text(encoding="utf-8"))
        for name, points in history.items():
            steps = [point["step"] for point in points]
            curves.append(Curve(f"{stage}: {name}", steps, [point["loss"] for point in points]))
    return curves
