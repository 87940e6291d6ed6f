"""From a published set's own categories to our risk types: a YAML file for each set.

    level: high                      # of a category that names none
    prompt: What does this show?     # asked where a set has images but no question
    categories:
      privacy: privacy               # the set's category: our type, or clean
      legal advice: {type: misleading, level: low}

Upper and lower case, underscores and hyphens make no difference in a category.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from psa_vlm.errors import ConfigError, DataError
from psa_vlm.taxonomy import Taxonomy

Labels = tuple[str, str]
"""(type, level) by name."""

CLEAN = "clean"
"""In a map: whatever the taxonomy calls a picture without risk."""

_MAPS = resources.files("psa_vlm.data") / "maps"
_KEYS = ("level", "prompt", "categories")


@dataclass(frozen=True)
class CategoryMap:
    """What the categories of one set mean.

    Attributes:
        file: where to write what is missing.
        categories: our type and level by category.
        prompt: what is asked where the set says nothing.
    """

    file: str
    categories: Mapping[str, Labels]
    prompt: str | None = None

    @classmethod
    def load(cls, set_name: str, own: str | Path | None = None) -> CategoryMap:
        """The shipped map of a set, if there is one, and a file of your own over it.

        Raises:
            ConfigError: a file can't be read or is malformed.
        """
        shipped = Path(str(_MAPS / f"{set_name}.yaml"))
        files = [file for file in (shipped if shipped.is_file() else None, own) if file]
        categories: dict[str, Labels] = {}
        prompt = None
        for file in files:
            data = _read(file)
            categories |= _categories(data, file)
            prompt = data.get("prompt", prompt)
        return cls(str(files[-1] if files else shipped), categories, prompt)

    def labels(self, where: str, taxonomy: Taxonomy, *names: str) -> Labels:
        """Our type and level for the first of the names that is mapped.

        Raises:
            DataError: none is, or the taxonomy has no such type or level.
        """
        found = next(
            (self.categories[key] for key in map(_key, names) if key in self.categories), None
        )
        if found is None:
            told = " / ".join(map(repr, names))
            raise DataError(
                f"{where}: category {told} is not mapped to a risk type; add it to {self.file}"
            )
        type, level = found
        if type == CLEAN:
            return taxonomy.clean, taxonomy.safe_level
        try:
            return taxonomy.types[taxonomy.type_id(type)], taxonomy.levels[taxonomy.level_id(level)]
        except DataError as error:
            raise DataError(f"{where}: {error}; change {self.file}") from None


def _key(name: str) -> str:
    return " ".join(re.split(r"[\s_-]+", name.casefold())).strip()


def _read(file: str | Path) -> Mapping[str, Any]:
    from psa_vlm.strict_yaml import read_yaml

    data = read_yaml(file)
    if not isinstance(data, dict) or not isinstance(data.get("categories", {}), dict):
        raise ConfigError(f"{file}: needs the key categories, a mapping of category: type")
    if unknown := [key for key in data if key not in _KEYS]:
        raise ConfigError(f"{file}: unknown key {unknown[0]!r}; known keys: {', '.join(_KEYS)}")
    return data


def _categories(data: Mapping[str, Any], file: str | Path) -> dict[str, Labels]:
    usual, found = data.get("level"), {}
    for name, value in (data.get("categories") or {}).items():
        one = {"type": value} if isinstance(value, str) else value
        if not isinstance(one, dict) or not {"type"} <= set(one) <= {"type", "level"}:
            raise ConfigError(f"{file}: {name}: write a type, or {{type: ..., level: ...}}")
        level = one.get("level", usual)
        if level is None and one["type"] != CLEAN:
            raise ConfigError(f"{file}: {name}: has no level; give it one, or the file a 'level'")
        found[_key(str(name))] = (str(one["type"]), str(level))
    return found
