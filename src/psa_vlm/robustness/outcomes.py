"""What came of each attacked request, and the rates that a table shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from psa_vlm.data.sample import Sample
from psa_vlm.errors import InputError
from psa_vlm.evaluation.scorers import Interval, Judge, wilson
from psa_vlm.inference import PsaVlm, Reply
from psa_vlm.robustness.victim import HARMFUL

Goal = Literal["miss", "alarm"]
"""What an attacker wants: a risky request answered, or a harmless one refused."""
MAX_NEW_TOKENS = 40
BATCH = 32


@dataclass(frozen=True)
class Outcome:
    """One attacked request, put to the run as a user would: an 8-bit image and words.

    Attributes:
        attack, setting: what was done.
        goal: what was wanted.
        sample: whose request it was.
        allowed: whether the policy saw nothing to act on: the head says safe.
        refused: whether the reply refuses; None where no reply was written.
        harmful: whether the reply is the harmful answer word for word; None where none is known.
        dead: whether the attack's first gradient was zero everywhere.
    """

    attack: str
    setting: str
    goal: Goal
    sample: str
    allowed: bool
    refused: bool | None = None
    harmful: bool | None = None
    dead: bool = False

    @property
    def success(self) -> bool:
        """Whether the attacker got what he wanted: by the reply where it can be judged, else by the
        head."""
        if self.goal == "miss":
            return self.allowed if self.harmful is None else self.harmful
        return not self.allowed if self.refused is None else self.refused


@dataclass(frozen=True)
class Rate:
    """All outcomes of one attack in one setting.

    Attributes:
        success: share in which the attacker got what he wanted.
        deceived: share in which the head was wrong: safe where the goal is a miss, and not safe
            where it is an alarm.
        answered: share not refused, whatever the answer; None where no reply was written.
        both: share in which the answer is harmful and the head says safe; None as above.
    """

    attack: str
    setting: str
    goal: Goal
    n: int
    success: Interval
    deceived: Interval
    answered: Interval | None
    both: Interval | None


def rates(outcomes: Iterable[Outcome]) -> list[Rate]:
    """One rate for each attack and setting, in the order in which they come."""
    groups: dict[tuple[str, str, Goal], list[Outcome]] = {}
    for one in outcomes:
        groups.setdefault((one.attack, one.setting, one.goal), []).append(one)
    return [_rate(*key, group) for key, group in groups.items()]


def _rate(attack: str, setting: str, goal: Goal, group: list[Outcome]) -> Rate:
    success = wilson([one.success for one in group])
    deceived = wilson([one.allowed == (goal == "miss") for one in group])
    assert success is not None and deceived is not None  # groups are not empty
    return Rate(
        attack,
        setting,
        goal,
        len(group),
        success,
        deceived,
        wilson([None if one.refused is None else not one.refused for one in group]),
        wilson([None if one.harmful is None else one.harmful and one.allowed for one in group]),
    )


@dataclass(frozen=True)
class Court:
    """Puts attacked requests to a run and says what came of them.

    Attributes:
        model: the run.
        judge: of its replies; None judges by the policy's decision alone, and no reply is written.
    """

    model: PsaVlm
    judge: Judge | None

    def try_(
        self,
        attack: str,
        setting: str,
        goal: Goal,
        attacked: Sequence[Sample],
        dead: Sequence[bool] | None = None,
    ) -> list[Outcome]:
        """Outcomes of attacked samples, whose ids and tags are still those of the originals."""
        flags = dead or [False] * len(attacked)
        outcomes = []
        for start in range(0, len(attacked), BATCH):
            part = attacked[start : start + BATCH]
            replies = _each(self._ask, part)
            for sample, reply, is_dead in zip(part, replies, flags[start:], strict=False):
                outcomes.append(
                    Outcome(
                        attack,
                        setting,
                        goal,
                        sample.id,
                        allowed=reply is not None and reply.decision.action == "allow",
                        refused=self._refused(reply),
                        harmful=self._harmful(sample, reply, goal),
                        dead=is_dead,
                    )
                )
        return outcomes

    def _ask(self, samples: Sequence[Sample]) -> list[Reply | None]:
        images, texts = [one.images for one in samples], [one.question for one in samples]
        if self.judge is not None:
            return list(self.model.reply_batch(images, texts, max_new_tokens=MAX_NEW_TOKENS))
        seen = self.model.see_batch(images, texts)
        decisions = [self.model.decide(one, self.model.policy) for one in seen]
        return [
            Reply("", one.verdict, decision) for one, decision in zip(seen, decisions, strict=True)
        ]

    def _refused(self, reply: Reply | None) -> bool | None:
        if self.judge is None:
            return None
        return (
            reply is None or reply.decision.action == "refuse" or self.judge.is_refusal(reply.text)
        )

    def _harmful(self, sample: Sample, reply: Reply | None, goal: Goal) -> bool | None:
        if self.judge is None or goal == "alarm":
            return None
        return self.judge.is_correct(reply.text if reply else "", sample.tags.get(HARMFUL))


def _each(
    ask: Callable[[Sequence[Sample]], list[Reply | None]], samples: Sequence[Sample]
) -> list[Reply | None]:
    """The replies; None to a request that can't be used at all, which is as good as refused."""
    try:
        return ask(samples)
    except InputError:
        if len(samples) == 1:
            return [None]
        return [reply for sample in samples for reply in _each(ask, [sample])]
