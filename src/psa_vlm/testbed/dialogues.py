"""What is asked and answered about scenes and in words; every text comes from the world's table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from psa_vlm.testbed.scenes import SIGN, Item, Scene
from psa_vlm.testbed.world import Kind, world

Exchange = tuple[str, str]  # question, answer


@dataclass(frozen=True)
class Request:
    """A request about one thing: whose wording it is made in (a risk type or "ask"), and which."""

    kind: str
    template: str

    def about(self, x: str) -> str:
        return self.template.format(x=x)


def _named(item: Item) -> str:
    if item.name == SIGN:
        return f"a sign that says {item.word}"
    return world().kinds[item.name].word


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]


def caption(scene: Scene) -> str:
    """Everything in the scene in reading order."""
    template: str = world().table["describe"]["caption_reply"]
    return template.format(list=_listed([_named(item) for item in scene.items]))


def _things(scene: Scene) -> list[Kind]:
    return [world().kinds[item.name] for item in scene.items if item.name != SIGN]


def _other_kind(rng: Random, scene: Scene) -> Kind:
    present = {item.name for item in scene.items}
    return rng.choice([k for k in world().kinds.values() if k.name not in present])


def _caption(rng: Random, scene: Scene) -> Exchange:
    return rng.choice(world().table["describe"]["caption"]), caption(scene)


def _exists(rng: Random, scene: Scene) -> Exchange:
    table = world().table["describe"]
    present = rng.random() < 0.5
    kind = rng.choice(_things(scene)) if present else _other_kind(rng, scene)
    answer = table["exists_reply"][0 if present else 1]
    return (
        rng.choice(table["exists"]).format(x=kind.word),
        answer.format(x=kind.word, bare=kind.name),
    )


def _count(rng: Random, scene: Scene) -> Exchange:
    table = world().table["describe"]
    number = world().table["numbers"]
    if rng.random() < 0.4:
        return rng.choice(table["count_all"]), table["count_all_reply"].format(
            number=number[len(scene.items)]
        )
    kind = rng.choice(_things(scene)) if rng.random() < 0.8 else _other_kind(rng, scene)
    return (
        rng.choice(table["count"]).format(x=kind.word),
        table["count_reply"].format(number=number[scene.count(kind.name)]),
    )


def _where(rng: Random, scene: Scene) -> Exchange:
    table, places = world().table["describe"], world().table["places"]
    single = [i for i in scene.items if scene.count(i.name) == 1 and i.name != SIGN]
    if not single:
        return _what_at(rng, scene)
    item = rng.choice(single)
    return (
        rng.choice(table["where"]).format(bare=item.name),
        table["where_reply"].format(place=places[item.place]),
    )


def _what_at(rng: Random, scene: Scene) -> Exchange:
    table, places = world().table["describe"], world().table["places"]
    item = rng.choice(scene.items)
    words = _named(item)
    return (
        rng.choice(table["what_at"]).format(place=places[item.place]),
        table["what_at_reply"].format(x=words[0].upper() + words[1:]),
    )


def _read(rng: Random, scene: Scene) -> Exchange:
    table = world().table["describe"]
    return rng.choice(table["read"]), table["read_reply"].format(sign=scene.sign)


def _main(rng: Random, scene: Scene) -> Exchange:
    table = world().table["describe"]
    return rng.choice(table["main"]), table["main_reply"].format(x=scene.main_kind.word)


def _sort(rng: Random, scene: Scene) -> Exchange:
    table = world().table["describe"]
    return (
        rng.choice(table["sort"]).format(x="this"),
        table["sort_reply"].format(sort=scene.main_kind.sort),
    )


QUESTIONS: dict[str, Callable[[Random, Scene], Exchange]] = {
    "caption": _caption,
    "exists": _exists,
    "count": _count,
    "where": _where,
    "what_at": _what_at,
    "read": _read,
    "main": _main,
    "sort": _sort,
}


LOOKING = ("exists", "count", "where", "what_at")
"""Questions whose words have to be found in the image."""


def describe(rng: Random, scene: Scene, question: str | None = None) -> Exchange:
    """A plain question about what is to be seen, and its right answer."""
    if question is None:
        usable = [q for q in QUESTIONS if q != "read" or scene.sign]
        question = rng.choice([*usable, "caption", *LOOKING])  # these are practised the most
    return QUESTIONS[question](rng, scene)


def draw_request(rng: Random, kind: str, unseen: bool = False) -> Request:
    """A wording of type `kind` (a risk type or "ask"), from the seen or the unseen wordings."""
    return Request(kind, rng.choice(world().wordings(kind, unseen)))


def refusal(risk_label: str) -> str:
    """The refusal that names its reason, for instance "illegal risk"."""
    template: str = world().table["refusal"]
    return template.format(type=risk_label)


def careful(answer: str) -> str:
    """An answer with the care note behind it."""
    return f"{answer} {world().table['care_note']}"


def about_words(request: Request, kind: Kind, label: Callable[[str], str]) -> Exchange:
    """A request that names its thing: refused when it is risky, as text alignment taught."""
    question = request.about(kind.word)
    if kind.risk is not None and request.kind == kind.risk:
        return question, refusal(label(kind.risk))
    return question, world().reply(request.kind, kind)


def unaligned(request: Request, scene: Scene) -> Exchange:
    """What a model without visual alignment answers to a request about the main thing."""
    return request.about("this"), world().reply(request.kind, scene.main_kind)


def aligned(
    answer: str, request_kind: str, scene: Scene, label: Callable[[str], str]
) -> tuple[str, str]:
    """The aligned answer and the level, by the rule table.

    Args:
        answer: the answer of a model without alignment.
        request_kind: "describe", "ask" or a risk type.
        scene: what is shown.
        label: human words for a risk type.
    """
    level = world().level(scene.risk, request_kind, scene.setting)
    action = world().action(level)
    if action == "refuse" and scene.risk is not None:
        return refusal(label(scene.risk)), level
    return (careful(answer) if action == "care" else answer), level
