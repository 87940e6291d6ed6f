"""Risk types and risk levels, by name and in order."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_vlm.errors import ConfigError, DataError, TaxonomyMismatch

_NAME = re.compile(r"\w[\w-]*")
_KEYS = ("types", "levels", "clean")


@dataclass(frozen=True)
class Taxonomy:
    """The words in which a picture's risk is described; a name's position is its label id.

    Attributes:
        types: risk types, one of which is `clean`.
        levels: risk levels, mildest first; the first means "no risk".
        clean: the type of a picture without risk.

    Raises:
        ConfigError: a name is malformed or appears twice, or there is nothing to tell apart.
    """

    types: tuple[str, ...]
    levels: tuple[str, ...]
    clean: str

    def __post_init__(self) -> None:
        for kind, names in (("types", self.types), ("levels", self.levels)):
            if not isinstance(names, tuple) or len(names) < 2:
                raise ConfigError(f"taxonomy: {kind} must be a list of two names or more")
            for name in names:
                if not isinstance(name, str) or not _NAME.fullmatch(name):
                    raise ConfigError(
                        f"taxonomy: {name!r} in {kind} is not a name; use letters, digits, _ and -"
                        " (in YAML, quote words such as no and off)"
                    )
            if len(set(names)) < len(names):
                raise ConfigError(f"taxonomy: {kind} names one twice: {', '.join(names)}")
        if self.clean not in self.types:
            raise ConfigError(
                f"taxonomy: clean is {self.clean!r}, but must be one of {', '.join(self.types)}"
            )

    @classmethod
    def default(cls) -> Taxonomy:
        """The paper's 7 types and 4 levels, in the order of the authors' label ids."""
        return cls(
            types=(
                "politics",
                "illegal_risk",
                "insults_and_bullying",
                "fairness",
                "privacy",
                "misleading",
                "clean",
            ),
            levels=("safe", "low", "medium", "high"),
            clean="clean",
        )

    @property
    def risk_types(self) -> tuple[str, ...]:
        """Every type but `clean`."""
        return tuple(name for name in self.types if name != self.clean)

    @property
    def safe_level(self) -> str:
        """The level that means "no risk"."""
        return self.levels[0]

    @property
    def hash(self) -> str:
        """16 hex digits of the content; travels with every checkpoint."""
        content = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def type_id(self, type: str | int) -> int:
        """The label id of a type given by name or id.

        Raises:
            DataError: it is not in the taxonomy.
        """
        return _index(type, self.types, "type")

    def level_id(self, level: str | int) -> int:
        """The label id of a level given by name or id.

        Raises:
            DataError: it is not in the taxonomy.
        """
        return _index(level, self.levels, "level")

    def label(self, type: str | int) -> str:
        """A type in words for people: `illegal_risk` is "illegal risk"."""
        return self.types[self.type_id(type)].replace("_", " ")

    def check_same(self, other_hash: str, where: str | Path) -> None:
        """Make sure that what was found at `where` speaks this taxonomy.

        Raises:
            TaxonomyMismatch: its hash is another.
        """
        if other_hash != self.hash:
            raise TaxonomyMismatch(
                f"{where}: made with another taxonomy (hash {other_hash}, expected {self.hash});"
                " use the taxonomy file it was trained with"
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists and strings, ready for JSON and YAML."""
        return {"types": list(self.types), "levels": list(self.levels), "clean": self.clean}

    @classmethod
    def from_dict(cls, data: object) -> Taxonomy:
        """The inverse of `to_dict`.

        Raises:
            ConfigError: a key is missing or unknown, or a value is malformed.
        """
        if not isinstance(data, Mapping) or set(data) != set(_KEYS):
            raise ConfigError(f"taxonomy: needs exactly the keys {', '.join(_KEYS)}")
        types, levels = (
            tuple(value) if isinstance(value, (list, tuple)) else value
            for value in (data["types"], data["levels"])
        )
        return cls(types=types, levels=levels, clean=data["clean"])

    def to_yaml(self, path: str | Path) -> None:
        """Write the taxonomy to a YAML file."""
        import yaml

        text = yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
        Path(path).write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path | None) -> Taxonomy:
        """The taxonomy of a YAML file, or the paper's; raises as `from_yaml`."""
        return cls.from_yaml(path) if path else cls.default()

    @classmethod
    def from_yaml(cls, path: str | Path) -> Taxonomy:
        """Read a taxonomy from a YAML file with the keys `types`, `levels` and `clean`.

        Raises:
            ConfigError: the file is missing, is not YAML, or describes no taxonomy.
        """
        from psa_vlm.strict_yaml import read_yaml

        data = read_yaml(path)
        try:
            return cls.from_dict(data)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None


def _index(value: str | int, names: tuple[str, ...], kind: str) -> int:
    if isinstance(value, str) and value in names:
        return names.index(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(names):
        return value
    valid = ", ".join(f"{position} {name}" for position, name in enumerate(names))
    raise DataError(f"{kind} {value!r} is not in the taxonomy; valid: {valid}")
