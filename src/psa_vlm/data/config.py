"""What `psa-vlm data prepare` is told: sources, splits and balance, as a YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Self

from pydantic import Field, model_validator

from psa_vlm.data.hashes import NEAR
from psa_vlm.typed_yaml import Section


class Source(Section):
    """A published set."""

    path: Path
    """A data file, or the set's folder."""
    images_dir: Path | None = None
    """What image paths are relative to; null is where the layout has them."""
    format: str | None = None
    """Name of its layout; null guesses."""
    map: Path | None = None
    """YAML file of categories over the shipped one."""
    take: int | None = Field(default=None, ge=1)
    """At most so many of its samples, drawn by the seed; null takes all."""
    split: str | None = None
    """All of it goes into this split; null divides it by the shares."""


class Balance(Section):
    """How many samples of what."""

    splits: tuple[str, ...] = ("train",)
    """The splits that are balanced; the others stay as they are."""
    types: Literal["all", "equal"] | dict[str, int] = "all"
    """Of each risk type: all, as many as of the rarest, or at most so many by name."""
    clean_to_risky: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    """Clean samples for each risky one; null keeps all clean ones."""


class PrepareConfig(Section):
    """What `psa-vlm data prepare` is told."""

    sources: tuple[Source, ...] = Field(min_length=1)
    """The sets to mix."""
    taxonomy: Path | None = None
    """YAML file of types and levels; null is the paper's."""
    splits: dict[str, float] = Field(default={"train": 0.9, "val": 0.05, "test": 0.05})
    """Share of each split by name; what a later one holds, no earlier one may show."""
    balance: Balance = Balance()
    near: int | None = Field(default=NEAR, ge=0, le=16)
    """Bits of 64 in which the looks of images may differ that count as one; null: pixels alone."""
    on_problem: Literal["stop", "drop"] = "stop"
    """At a row that can't be used: stop, or leave it out and write it down."""
    seed: int = Field(default=0, ge=0, lt=2**32)
    """Of every draw."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        known = ", ".join(self.splits)
        for name in self.splits:
            if not name.isidentifier() or name == "images":
                raise ValueError(f"splits: {name!r} is not a name for a split")
        named = [*self.balance.splits, *(one.split for one in self.sources if one.split)]
        for name in named:
            if name not in self.splits:
                raise ValueError(f"split {name!r} is not in splits; known: {known}")
        return self
