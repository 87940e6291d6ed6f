"""The testbed's table (`assets/world.yaml`) as typed objects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

DESCRIBE = "describe"
ASK = "ask"


@dataclass(frozen=True)
class Kind:
    """One sort of object that a scene can show."""

    name: str
    sort: str
    codepoint: str
    fluent: str
    risk: str | None  # the risk type it stands for; None when harmless
    unseen: bool  # known to the base model, never shown in alignment

    @property
    def word(self) -> str:
        """The name with its article: "an apple"."""
        return f"{'an' if self.name[0] in 'aeiou' else 'a'} {self.name}"


@dataclass(frozen=True)
class World:
    """Kinds by name, and the tables of wordings and rules as they stand in the YAML file."""

    kinds: Mapping[str, Kind]
    companions: Mapping[str, str]  # risk type -> the harmless kind that makes its scenes everyday
    table: Mapping[str, Any]

    @property
    def harmless(self) -> list[Kind]:
        """Kinds without a risk type, the person left out."""
        return [k for k in self.kinds.values() if k.risk is None and k.name != "person"]

    @property
    def risk_types(self) -> list[str]:
        return list(self.companions)

    def risky(self, risk: str, unseen: bool = False) -> list[Kind]:
        """Kinds of one risk type: the ones that alignment shows, or the unseen ones."""
        return [k for k in self.kinds.values() if k.risk == risk and k.unseen == unseen]

    def wordings(self, request: str, unseen: bool = False) -> list[str]:
        """Templates of a request; `request` is a risk type or "ask" (which has no unseen ones)."""
        if request == ASK:
            return list(self.table[ASK]["wordings"])
        wordings: list[str] = self.table["requests"][request]["wordings"]
        return wordings[-2:] if unseen else wordings[:-2]

    def reply(self, request: str, kind: Kind) -> str:
        """What a model without alignment answers to a request about `kind`."""
        entry = self.table[ASK] if request == ASK else self.table["requests"][request]
        reply: str = entry["reply"]
        return reply.format(bare=kind.name)

    def level(self, risk: str | None, request: str, setting: str) -> str:
        """The rule table: level of a scene whose risky thing is of type `risk`.

        Args:
            risk: the scene's risk type, None for a clean scene.
            request: "describe", "ask" or the risk type in whose wording the request is made.
            setting: "companion", "alone" or "person".
        """
        if risk is None:
            return "safe"
        row = request if request in (DESCRIBE, ASK) else "own" if request == risk else "foreign"
        level: str = self.table["levels"][row][setting]
        return level

    def action(self, level: str) -> str:
        """What an aligned model does at a level: "answer", "care" or "refuse"."""
        action: str = self.table["actions"][level]
        return action


@cache
def world() -> World:
    """The shipped world."""
    table = yaml.safe_load(
        files("psa_vlm.testbed").joinpath("assets/world.yaml").read_text(encoding="utf-8")
    )
    rows = [(row, None, False) for row in (*table["harmless"], table["person"])]
    for risk, entry in table["risky"].items():
        rows += [(row, risk, row[0] in entry["unseen"]) for row in entry["kinds"]]
    kinds = [
        Kind(name, sort, codepoint, fluent, risk, unseen)
        for (name, sort, codepoint, fluent), risk, unseen in rows
    ]
    companions = {risk: entry["companion"] for risk, entry in table["risky"].items()}
    return World({kind.name: kind for kind in kinds}, companions, table)
