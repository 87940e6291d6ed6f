"""YAML files with typed fields, and the line that says what is wrong in one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from psa_vlm.errors import ConfigError
from psa_vlm.strict_yaml import read_yaml


class Section(BaseModel):
    """A part of a configuration; a key that it does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


C = TypeVar("C", bound=Section)


def load(path: str | Path, config: type[C], overrides: Sequence[str] = ()) -> C:
    """Read a configuration.

    Args:
        path: a YAML file.
        config: the class of the configuration.
        overrides: `key.key=value` from the command line; the value is YAML.

    Raises:
        ConfigError: the file can't be read, or one line for each key that is wrong, naming the
            file, the key and, if it is unknown, the known ones.
    """
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: must hold the keys {', '.join(config.model_fields)}")
    for override in overrides:
        _override(data, override)
    try:
        return config.model_validate(data)
    except ValidationError as error:
        lines = [f"{path}: {_explain(one, config)}" for one in error.errors()]
        raise ConfigError("\n".join(lines)) from None


def _override(data: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not all([*sections, last]):
        raise ConfigError(f"override {override!r}: write it as key=value or section.key=value")
    for section in sections:
        data = data.setdefault(section, {})
        if not isinstance(data, dict):
            raise ConfigError(f"override {override!r}: {section} is not a section with keys")
    try:
        data[last] = yaml.safe_load(text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"override {override!r}: not valid YAML ({reason})") from None


def _explain(error: Mapping[str, Any], config: type[Section]) -> str:
    """One pydantic error in the words of the file."""
    key = ".".join(map(str, error["loc"]))
    match error["type"]:
        case "extra_forbidden":
            known = ", ".join(_section_of(error["loc"], config).model_fields)
            return f"unknown key {key!r}; known keys: {known}"
        case "missing":
            return f"the key {key!r} is missing"
        case "value_error":
            return f"{error['ctx']['error']}"
        case _:
            return f"{key}: {error['msg']}, got {error['input']!r}"


def _section_of(loc: Sequence[str | int], section: type[Section]) -> type[Section]:
    """The section in which the last key of a place stands."""
    for key in loc[:-1]:
        if isinstance(key, str):
            section = _sections_in(section.model_fields[key].annotation)[0]
    return section


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [found for part in get_args(annotation) for found in _sections_in(part)]
