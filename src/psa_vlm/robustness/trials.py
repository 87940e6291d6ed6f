"""The trials of the standard suite: every attack in every setting, as something to be run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from psa_vlm.data.sample import Sample
from psa_vlm.errors import DataError, InputError
from psa_vlm.evaluation.scorers import Judge
from psa_vlm.inference import PsaVlm
from psa_vlm.model.bottleneck import SafetyBottleneck
from psa_vlm.model.pixels import Pixels, pictures_of
from psa_vlm.robustness.adaptive import WEIGHTS, joint, on_head
from psa_vlm.robustness.corruptions import CORRUPTIONS, HANDLING, STRENGTHS, corrupt, handle
from psa_vlm.robustness.gradient import Bounds, Found, apgd, square
from psa_vlm.robustness.outcomes import Court, Goal, Outcome
from psa_vlm.robustness.text import REWRITES, rewritten
from psa_vlm.robustness.typographic import LABELS, asked_in_picture, labelled
from psa_vlm.robustness.victim import HARMFUL, Victim, picture_of, with_picture

EPS = (2, 4, 8, 16)
"""Most change of a value, of 255."""
CENTRAL_EPS = 8
CENTRAL_WEIGHT = 0.5
PATCHES = (0.25, 0.4)
"""Sides of the patches, in shares of the image's shorter side."""
ATTACK_BATCH = 16

Change = Callable[[Sample], Sample]
Search = Callable[[Victim], Found]
MakeSurrogate = Callable[[], SafetyBottleneck]


@dataclass(frozen=True)
class Plan:
    """How much is tried."""

    samples: int
    """Requests of each goal."""
    adaptive: int
    """How many of these the adaptive attack is put to: it costs the most."""
    steps: int
    """Of APGD."""
    restarts: int
    """Of the adaptive attack."""
    queries: int
    """Of Square."""
    every_pair: bool
    """Sweep the trade-off at each eps, and not at `CENTRAL_EPS` alone."""
    draws: int
    """Noisy copies of each image behind a certificate."""
    seed: int = 0
    """Of all chance in the attacks."""


PLANS = {
    "small": Plan(16, 6, 100, 5, 300, False, 200),
    "full": Plan(200, 100, 100, 10, 5000, True, 1000),
}


@dataclass(frozen=True)
class Cases:
    """What is attacked.

    Attributes:
        risky: requests that must not be answered, one image each.
        harmless: requests that must be.
        judge: of replies; None judges by the head's decision alone, and no reply is written.
        data: what they are, for the report.
    """

    risky: list[Sample]
    harmless: list[Sample]
    judge: Judge | None
    data: str

    @classmethod
    def of_labelled(cls, samples: Sequence[Sample], model: PsaVlm, data: str) -> Cases:
        """A user's own labelled samples, judged by the head's decision.

        Raises:
            DataError: no sample has one image, a type and a level above safe.
        """
        words = model.taxonomy
        usable = [s for s in samples if len(s.images) == 1 and s.level and s.type]
        fine = [s.level == words.safe_level or s.type == words.clean for s in usable]
        risky = [s for s, is_fine in zip(usable, fine, strict=True) if not is_fine]
        if not risky:
            raise DataError(f"{data}: no sample has one image, a type and a level above safe")
        harmless = [s for s, is_fine in zip(usable, fine, strict=True) if is_fine]
        return cls(risky, harmless, None, data)

    def first(self, count: int) -> Cases:
        """At most so many of each goal."""
        return replace(self, risky=self.risky[:count], harmless=self.harmless[:count])


@dataclass(frozen=True)
class Trial:
    """One attack in one setting."""

    attack: str
    setting: str
    goal: Goal
    run: Callable[[], list[Outcome]]


@dataclass
class Suite:
    """Makes the trials.

    Attributes:
        model: the run, under the policy that is attacked.
        cases: requests.
        plan: how much is tried.
        surrogate: makes a bottleneck of another training on the same backbone, to attack by
            transfer; None leaves that out.
        notes: what was left out, and why.
    """

    model: PsaVlm
    cases: Cases
    plan: Plan
    surrogate: MakeSurrogate | None = None
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.court = Court(self.model, self.cases.judge)
        if self.surrogate is None:
            self.notes.append("transfer was left out: give another run with --surrogate")

    def trials(self) -> Iterator[Trial]:
        """Every trial, the cheap ones first."""
        yield from self._of_pictures("none", "as they are", lambda picture, _: picture)
        yield from self._of_words()
        for way in HANDLING:
            yield from self._of_pictures("handling", way, partial(_handled, way=way))
        for kind in CORRUPTIONS:
            for strength in STRENGTHS:
                change = partial(_corrupted, kind=kind, strength=strength)
                yield from self._of_pictures("corruption", f"{kind} {strength}", change)
        try:
            pixels = Pixels(self.model.backbone.processor)
        except InputError as error:
            self.notes.append(f"attacks by gradients were left out: {error}")
            return
        yield from self._of_pixels(pixels)
        yield from self._adaptive(pixels)

    # --- the same change of every request --------------------------------------------------------

    def _of_pictures(
        self, attack: str, setting: str, change: Callable[[Any, str], Any]
    ) -> Iterator[Trial]:
        """A change of every picture, risky and harmless; it is told the sample's id."""

        def changed(sample: Sample) -> Sample:
            return with_picture(sample, change(picture_of(sample), sample.id))

        yield self._trial(attack, setting, "miss", changed)
        if self.cases.harmless:
            yield self._trial(attack, setting, "alarm", changed)

    def _of_words(self) -> Iterator[Trial]:
        for how in REWRITES:
            yield self._trial("text", how, "miss", partial(rewritten, how=how))
        for words in LABELS:
            yield self._trial("typographic", f'label "{words}"', "miss", partial(_label, words))
        yield self._trial("typographic", "request in the picture", "miss", asked_in_picture)

    def _trial(self, attack: str, setting: str, goal: Goal, change: Change) -> Trial:
        def run() -> list[Outcome]:
            changed = [change(sample) for sample in self._samples(goal)]
            return self.court.try_(attack, setting, goal, changed)

        return Trial(attack, setting, goal, run)

    def _samples(self, goal: Goal) -> list[Sample]:
        return self.cases.risky if goal == "miss" else self.cases.harmless

    # --- pictures that are searched for ----------------------------------------------------------

    def _of_pixels(self, pixels: Pixels) -> Iterator[Trial]:
        for share in PATCHES:
            search = partial(self._patch, share=share)
            yield self._found(pixels, "patch", f"{share:.0%} of the side", "miss", search)
        for eps in EPS:
            at = f"eps {eps}/255"
            query, white = partial(self._square, eps=eps), partial(self._white, eps=eps)
            yield self._found(pixels, "Square on the head", at, "miss", query)
            yield self._found(pixels, "APGD on the head", at, "miss", white)
            if self.cases.harmless:
                alarm = partial(self._white, eps=eps, alarm=True)
                yield self._found(pixels, "false alarm", at, "alarm", alarm)
        if self.surrogate is not None:
            made: list[SafetyBottleneck] = []
            for eps in sorted({CENTRAL_EPS, EPS[-1]}):
                search = partial(self._transfer, eps=eps, make=self.surrogate, made=made)
                yield self._found(pixels, "transfer", f"eps {eps}/255", "miss", search)

    def _adaptive(self, pixels: Pixels) -> Iterator[Trial]:
        aimed = [one for one in self.cases.risky if HARMFUL in one.tags][: self.plan.adaptive]
        if not aimed:
            self.notes.append(
                f"the adaptive attack was left out: no sample has a tag '{HARMFUL}' that says which"
                " answer must not be given"
            )
            return
        for eps in EPS:
            sweep = self.plan.every_pair or eps == CENTRAL_EPS
            for weight in WEIGHTS if sweep else (CENTRAL_WEIGHT,):
                setting = f"eps {eps}/255, weight {weight:g}"
                search = partial(self._joint, eps=eps, weight=weight)
                yield self._found(pixels, "adaptive", setting, "miss", search, aimed)

    def _patch(self, victim: Victim, share: float) -> Found:
        side = round(share * min(victim.clean.shape[-2:]))
        bounds = Bounds.patch(victim.clean, side, self.plan.seed)
        return apgd(on_head(victim), victim.clean, bounds, self.plan.steps)

    def _square(self, victim: Victim, eps: float) -> Found:
        return square(on_head(victim), victim.clean, eps, self.plan.queries, self.plan.seed)

    def _white(self, victim: Victim, eps: float, alarm: bool = False) -> Found:
        bounds = Bounds.ball(victim.clean, eps)
        return apgd(on_head(victim, alarm), victim.clean, bounds, self.plan.steps)

    def _transfer(
        self, victim: Victim, eps: float, make: MakeSurrogate, made: list[SafetyBottleneck]
    ) -> Found:
        if not made:  # once, and only if a trial asks for it
            made.append(make())
        bounds = Bounds.ball(victim.clean, eps)
        objective = on_head(victim, bottleneck=made[0])
        return apgd(objective, victim.clean, bounds, self.plan.steps)

    def _joint(self, victim: Victim, eps: float, weight: float) -> Found:
        plan, bounds = self.plan, Bounds.ball(victim.clean, eps)
        objective = joint(victim, weight)
        return apgd(objective, victim.clean, bounds, plan.steps, plan.restarts, plan.seed)

    def _found(
        self,
        pixels: Pixels,
        attack: str,
        setting: str,
        goal: Goal,
        search: Search,
        samples: list[Sample] | None = None,
    ) -> Trial:
        chosen = self._samples(goal) if samples is None else samples

        def run() -> list[Outcome]:
            attacked: list[Sample] = []
            dead: list[bool] = []
            for group in _alike(chosen):
                found = search(Victim(self.model, group, pixels))
                attacked += map(with_picture, group, pictures_of(found.images))
                dead += found.dead.tolist()
            return self.court.try_(attack, setting, goal, attacked, dead)

        return Trial(attack, setting, goal, run)


def _alike(samples: Sequence[Sample]) -> Iterator[list[Sample]]:
    """Batches of samples with images of one size."""
    sizes: dict[tuple[int, int], list[Sample]] = {}
    for sample in samples:
        sizes.setdefault(picture_of(sample).size, []).append(sample)
    for group in sizes.values():
        for start in range(0, len(group), ATTACK_BATCH):
            yield group[start : start + ATTACK_BATCH]


def _label(words: str, sample: Sample) -> Sample:
    return with_picture(sample, labelled(picture_of(sample), words))


def _handled(picture: Any, id_: str, way: str) -> Any:
    return handle(picture, way)


def _corrupted(picture: Any, id_: str, kind: str, strength: int) -> Any:
    seed = int(hashlib.sha256(id_.encode()).hexdigest()[:8], 16)
    return corrupt(picture, kind, strength, seed)
