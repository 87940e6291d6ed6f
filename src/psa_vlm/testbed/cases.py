"""Requests with the right behaviour beside them, drawn from the world for alignment and evaluation.

A case is of one of four cells: `risky` (must be refused), `lookalike` (a risky thing in a scene or
with a question that is fine), `harmless` (a request about a clean scene) and `vqa` (a plain
question with one right answer). Evaluation has three splits: `compositions` (new scenes), `style`
(new scenes in an art style that no training saw) and `objects` (new scenes with risky kinds that
alignment never showed, half of the requests in wordings that it never showed either).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal, get_args

from PIL.Image import Image

from psa_vlm.data.sample import Sample, Turn
from psa_vlm.progress import track
from psa_vlm.taxonomy import Taxonomy
from psa_vlm.testbed import dialogues
from psa_vlm.testbed.scenes import Scene, draw_scene, render
from psa_vlm.testbed.world import ASK, DESCRIBE, world

Cell = Literal["risky", "lookalike", "harmless", "vqa"]
Split = Literal["compositions", "style", "objects"]
CELLS: tuple[Cell, ...] = get_args(Cell)
SPLITS: tuple[Split, ...] = get_args(Split)

ALIGNMENT_MIX: dict[Cell, float] = {"risky": 0.35, "lookalike": 0.3, "harmless": 0.2, "vqa": 0.15}
UNSEEN_WORDINGS = 0.5  # share of requests in the split "objects" in wordings new to alignment

OWN, FOREIGN = "own", "foreign"
"""Requests in the wording of the thing's own, or of another risk type."""

# Cell -> (what is asked, setting of the risky thing), each with its weight.
_RISKY = {
    (OWN, "alone"): 4,
    (OWN, "person"): 2,
    (OWN, "companion"): 2,
    (ASK, "person"): 1,
    (FOREIGN, "person"): 1,
}
_LOOKALIKE = {
    (DESCRIBE, "companion"): 2,
    (DESCRIBE, "alone"): 2,
    (DESCRIBE, "person"): 1,
    (ASK, "companion"): 2,
    (ASK, "alone"): 2,
    (FOREIGN, "companion"): 1,
    (FOREIGN, "alone"): 1,
}


@dataclass(frozen=True)
class _Source:
    """Where scenes and wordings come from: alignment's own, or those of an evaluation split."""

    styles: Sequence[str]
    unseen_kinds: bool
    held_out: bool
    unseen_wordings: float

    @classmethod
    def alignment(cls) -> _Source:
        return cls(world().table["styles"]["train"], False, False, 0.0)

    @classmethod
    def evaluation(cls, split: Split) -> _Source:
        styles = world().table["styles"]
        chosen = [styles["held_out"]] if split == "style" else styles["train"]
        unseen = split == "objects"
        return cls(chosen, unseen, True, UNSEEN_WORDINGS if unseen else 0.0)

    def scene(
        self, rng: Random, risk: str | None, setting: str = "alone", sign: bool | None = None
    ) -> Scene:
        return draw_scene(rng, self.styles, risk, setting, self.unseen_kinds, self.held_out, sign)

    def request(self, rng: Random, kind: str) -> tuple[dialogues.Request, bool]:
        unseen = kind != ASK and rng.random() < self.unseen_wordings
        return dialogues.draw_request(rng, kind, unseen), unseen


@dataclass(frozen=True)
class _Case:
    """A scene, the kind of request, its words, the unaligned answer, and if the wording is new."""

    scene: Scene
    asked: str
    question: str
    unaligned: str
    unseen: bool


def _asking(
    rng: Random, source: _Source, scene: Scene, asked: str, question: str | None = None
) -> _Case:
    if asked == DESCRIBE:
        return _Case(scene, asked, *dialogues.describe(rng, scene, question), False)
    request, unseen = source.request(rng, asked)
    return _Case(scene, asked, *dialogues.unaligned(request, scene), unseen)


def _draw(rng: Random, cell: Cell, source: _Source) -> _Case:
    risk_types = world().risk_types
    risk = rng.choice(risk_types)
    if cell == "harmless":
        scene, asked = source.scene(rng, None), rng.choice([*risk_types, ASK])
    elif cell == "vqa":
        setting = rng.choice(["alone", "companion", "person"])
        scene = source.scene(rng, risk if rng.random() < 0.5 else None, setting)
        asked = DESCRIBE
    else:
        table = _RISKY if cell == "risky" else _LOOKALIKE
        asked, setting = rng.choices(list(table), weights=list(table.values()))[0]
        scene = source.scene(rng, risk, setting)
        asked = _wording(rng, asked, risk)
    return _asking(rng, source, scene, asked)


def _wording(rng: Random, asked: str, risk: str | None) -> str:
    """Whose wording a request of its "own" or of a "foreign" type is made in."""
    if asked == OWN and risk is not None:
        return risk
    if asked in (OWN, FOREIGN):
        return rng.choice([other for other in world().risk_types if other != risk])
    return asked


def _labelled(case: _Case, cell: Cell, name: str, split: str) -> Sample:
    taxonomy, scene = Taxonomy.default(), case.scene
    answer, level = dialogues.aligned(case.unaligned, case.asked, scene, taxonomy.label)
    left, top, side = scene.items[scene.main].box
    return Sample(
        id=name,
        images=(render(scene),),
        conversation=(Turn("user", case.question), Turn("assistant", answer)),
        type=scene.risk or taxonomy.clean,
        level=level,
        source="testbed",
        split=split,
        tags={
            "cell": cell,
            "style": scene.style,
            "thing": scene.main_kind.name,
            "things": "+".join(sorted(item.name for item in scene.items)),
            "setting": scene.setting,
            "sign": scene.sign or "none",
            "request": case.asked,
            "wording": "unseen" if case.unseen else "seen",
            "box": f"{left} {top} {left + side} {top + side}",  # of the main thing, in pixels
            **({"harmful": case.unaligned} if cell == "risky" else {}),  # what must not be answered
        },
    )


def alignment_samples(
    count: int, seed: int, split: str = "train", mix: Mapping[Cell, float] = ALIGNMENT_MIX
) -> list[Sample]:
    """Fresh labelled scenes with the aligned answers.

    Args:
        count: how many.
        seed: of the scenes.
        split: different names draw different scenes from the same seed.
        mix: weight of each cell.
    """
    rng = Random(f"alignment/{split}/{seed}")
    cells = rng.choices(list(mix), weights=list(mix.values()), k=count)
    source = _Source.alignment()
    return [
        _labelled(_draw(rng, cell, source), cell, f"{split}-{seed}-{i}", split)
        for i, cell in enumerate(cells)
    ]


def evaluation_samples(split: Split, cell: Cell, count: int, seed: int) -> list[Sample]:
    """Held-out cases of one split and cell: no composition, style or kind that alignment saw."""
    rng = Random(f"evaluation/{split}/{cell}/{seed}")
    source = _Source.evaluation(split)
    return [
        _labelled(_draw(rng, cell, source), cell, f"{split}-{cell}-{seed}-{i}", split)
        for i in range(count)
    ]


def draw_sample(
    rng: Random,
    split: Split,
    name: str,
    risk: str | None,
    asked: str,
    setting: str = "alone",
    sign: bool | None = None,
    question: str | None = None,
) -> Sample:
    """One held-out case of a wished content, labelled by the rule table.

    Args:
        rng: source of all choices.
        split: what is held out.
        name: its id.
        risk: risk type of the main thing, None for a clean scene.
        asked: "describe" or "ask"; "own" or "foreign" for a request in the wording of the thing's
            own or of another risk type (about a clean scene all are foreign).
        setting: "alone", "companion" or "person"; a clean scene has no companion.
        sign: with or without a sign; None leaves it to chance.
        question: which one of `dialogues.QUESTIONS` to describe by; None for any.
    """
    source = _Source.evaluation(split)
    scene = source.scene(rng, risk, setting, sign)
    while scene.setting != setting:  # clean scenes are drawn freely
        scene = source.scene(rng, risk, setting, sign)
    case = _asking(rng, source, scene, _wording(rng, asked, risk), question)
    level = world().level(risk, case.asked, setting)
    if world().action(level) == "refuse":
        cell: Cell = "risky"
    elif risk is not None:
        cell = "lookalike"
    else:
        cell = "vqa" if asked == DESCRIBE else "harmless"
    return _labelled(case, cell, name, split)


def write_samples(out: Path, count: int, seed: int) -> Path:
    """Write alignment samples in the authors' format: `out/samples.jsonl` and `out/images/`."""
    taxonomy = Taxonomy.default()
    (out / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for sample in track(alignment_samples(count, seed), "drawing scenes"):
        (image,) = sample.images
        assert isinstance(image, Image)
        image.save(out / "images" / f"{sample.id}.png")
        roles = {"user": "USER", "assistant": "ASSISTANT"}
        row = {
            "safe_type": taxonomy.type_id(sample.type or taxonomy.clean),
            "safe_level": taxonomy.level_id(sample.level or taxonomy.safe_level),
            "image": f"images/{sample.id}.png",
            "conversations": [
                {"from": roles[turn.role], "value": f"{'<image>' * (i == 0)}\n{turn.text}".strip()}
                for i, turn in enumerate(sample.conversation)
            ],
        }
        lines.append(json.dumps(row))
    path = out / "samples.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
