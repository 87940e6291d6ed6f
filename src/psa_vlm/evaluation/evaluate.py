"""Put samples to a method and keep what came of each: the records behind every scorecard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError
from psa_vlm.evaluation.baselines import Ask, plain, system_prompt
from psa_vlm.evaluation.scorecard import Cell, Method, Record, Split
from psa_vlm.evaluation.scorers import Interval, Judge, macro_f1, wilson
from psa_vlm.inference import PsaVlm
from psa_vlm.model.backbone import Backbone
from psa_vlm.model.verdict import Verdict
from psa_vlm.policy.policy import Policy
from psa_vlm.progress import track
from psa_vlm.taxonomy import Taxonomy

BATCH = 64
MAX_NEW_TOKENS = 40

Answer = tuple[str, Verdict | None]
AnswerFn = Callable[[Sequence[Sample]], list[Answer]]
"""A method under test: samples in, reply and verdict (None without one) out."""


def aligned(model: PsaVlm, max_new_tokens: int = MAX_NEW_TOKENS) -> AnswerFn:
    """The aligned model under its own policy."""

    def answer(samples: Sequence[Sample]) -> list[Answer]:
        replies = model.reply_batch(
            [sample.images for sample in samples],
            [sample.question for sample in samples],
            max_new_tokens=max_new_tokens,
        )
        return [(reply.text, reply.verdict) for reply in replies]

    return answer


def unaligned(
    backbone: Backbone, system: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS
) -> AnswerFn:
    """A backbone without the bottleneck, plain or under a safety system prompt."""
    method = plain(backbone) if system is None else system_prompt(backbone, system)

    def answer(samples: Sequence[Sample]) -> list[Answer]:
        asks = [Ask(sample.images, sample.conversation[:1]) for sample in samples]
        return [(told.written.text, None) for told in method(asks, max_new_tokens)]

    return answer


def run(
    answer: AnswerFn,
    samples: Sequence[Sample],
    method: Method,
    split: Split,
    label: str,
    seed: int = 0,
    batch: int = BATCH,
) -> list[Record]:
    """Put samples with a `cell` tag to a method, with a progress bar.

    Raises:
        DataError: a sample has no cell or no expected answer.
    """
    judge = Judge.for_policy(Policy.default(), Taxonomy.default())
    records = []
    for start in track(range(0, len(samples), batch), label):
        part = samples[start : start + batch]
        for sample, (reply, verdict) in zip(part, answer(part), strict=True):
            records.append(_record(sample, reply, verdict, judge, method, split, seed))
    return records


def _record(
    sample: Sample,
    reply: str,
    verdict: Verdict | None,
    judge: Judge,
    method: Method,
    split: Split,
    seed: int,
) -> Record:
    cell = sample.tags.get("cell")
    if cell not in ("risky", "harmless", "lookalike", "vqa"):
        raise DataError(f"sample {sample.id}: its tag cell is {cell!r}, so it can't be scored")
    image = verdict.images[verdict.worst] if verdict and verdict.worst is not None else None
    typed: Cell = cell  # type: ignore[assignment]
    return Record(
        method=method,
        split=split,
        cell=typed,
        question=sample.question,
        expected=sample.answer,
        reply=reply,
        refused=judge.is_refusal(reply),
        correct=judge.is_correct(reply, sample.answer) if cell == "vqa" else None,
        true_type=sample.type,
        true_level=sample.level,
        pred_type=image.type if image else None,
        pred_level=image.level if image else None,
        type_confidence=image.type_probs[image.type] if image else None,
        seed=seed,
    )


@dataclass(frozen=True)
class Summary:
    """A run on a user's labelled samples: how well it reads concepts, and what it refuses."""

    type_f1: Interval | None
    level_f1: Interval | None
    refused: dict[str, Interval]
    """Level -> share refused."""

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""

        def plain(interval: Interval | None) -> dict[str, float] | None:
            return None if interval is None else vars(interval)

        return {
            "type_f1": plain(self.type_f1),
            "level_f1": plain(self.level_f1),
            "refused": {level: plain(interval) for level, interval in self.refused.items()},
        }

    def table(self) -> Table:
        """One line a figure."""
        table = Table("figure", "value", "95% interval", "n")
        figures = {"type F1": self.type_f1, "level F1": self.level_f1}
        figures |= {f"refused at level {level}": one for level, one in self.refused.items()}
        for name, one in figures.items():
            if one is None:
                table.add_row(name, "-", "", "0")
            else:
                table.add_row(name, f"{one.value:.3f}", f"{one.low:.3f}-{one.high:.3f}", str(one.n))
        return table


def evaluate_samples(model: PsaVlm, samples: Sequence[Sample], batch: int = 16) -> Summary:
    """Score a run on labelled samples of any source; text-only samples are left out.

    Raises:
        DataError: no sample has an image and both labels.
    """
    usable = [s for s in samples if s.images and s.type is not None and s.level is not None]
    if not usable:
        raise DataError("no sample has an image, a type and a level: nothing to score")
    judge = Judge.for_policy(model.policy, model.taxonomy)
    answer = aligned(model, max_new_tokens=128)
    outcomes: list[tuple[Sample, bool, str | None, str | None]] = []
    for start in track(range(0, len(usable), batch), "evaluating"):
        part = usable[start : start + batch]
        for sample, (reply, verdict) in zip(part, answer(part), strict=True):
            found = (verdict.type, verdict.level) if verdict else (None, None)
            outcomes.append((sample, judge.is_refusal(reply), *found))
    refused = {}
    for level in model.taxonomy.levels:
        share = wilson([was for sample, was, _, _ in outcomes if sample.level == level])
        if share is not None:
            refused[level] = share
    return Summary(
        macro_f1([(sample.type or "", type_) for sample, _, type_, _ in outcomes]),
        macro_f1([(sample.level or "", level) for sample, _, _, level in outcomes]),
        refused,
    )
