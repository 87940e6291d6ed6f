"""Reading policy files: what they inherit, and the line and the comment of all they say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from psa_vlm.errors import PolicyError
from psa_vlm.policy.schema import FILE, NEEDED, SEVERITY, keys_at, merged
from psa_vlm.strict_yaml import StrictLoader

Key = tuple[str, ...]
"""Where in a policy: ("rules", "privacy", "high"), ("off", "privacy"), ("refusal",)."""
_SHIPPED = resources.files("psa_vlm") / "policies"


@dataclass(frozen=True)
class Source:
    """Where something is written.

    Attributes:
        file: the file, as it was named.
        line: counted from 1.
        comment: on that line or above it, or, for an action without one, by its risk type.
        text: of the line, without the space around it.
    """

    file: str
    line: int
    comment: str | None = None
    text: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True)
class Document:
    """A policy as plain data with everything it inherits, where each part is written, and the files
    that it was read from."""

    data: dict[str, Any]
    sources: dict[Key, Source]
    files: tuple[str, ...]


def shipped_names() -> tuple[str, ...]:
    """The names of the policies that come with the package."""
    files = (Path(file.name) for file in _SHIPPED.iterdir())
    return tuple(sorted(file.stem for file in files if file.suffix == ".yaml"))


def read_shipped(name: str, chain: tuple[str, ...] = ()) -> Document:
    """Read a policy that comes with the package.

    Raises:
        PolicyError: there is none of this name.
    """
    if name not in shipped_names():
        known = ", ".join(shipped_names())
        raise PolicyError(f"'{name}' is not a shipped policy; use one of {known}")
    where = f"psa_vlm/policies/{name}.yaml"
    text = (_SHIPPED / f"{name}.yaml").read_text("utf-8")
    return read_text(text, where, None, (*chain, where))


def read_file(path: Path, chain: tuple[str, ...] = ()) -> Document:
    """Read a policy file, and the files that it inherits.

    Raises:
        PolicyError: a line for each thing that is wrong: the file, the line, and the fix.
    """
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PolicyError(f"{path}: can not read the policy: {error}") from error
    return read_text(text, str(path), path.parent, (*chain, str(path.resolve())))


def read_text(
    text: str, where: str, folder: Path | None = None, chain: tuple[str, ...] = ()
) -> Document:
    """Read a policy from text; `where` names it in errors.

    Args:
        text: YAML.
        where: its file.
        folder: where the files that it may inherit lie; None allows shipped policies alone.
        chain: the files that led here, this one included.

    Raises:
        PolicyError: as `read_file`.
    """
    page = _Page(text, where)
    data: dict[str, Any] = page.checked()
    sources = {key: page.source(key) for key in _leaves(data)}
    parent = data.pop("inherits", None)
    if parent is None:
        return Document(data, sources, (where,))
    base = _parent(parent, sources[("inherits",)], folder, chain)
    return Document(merged(base.data, data), {**base.sources, **sources}, (*base.files, where))


def commented(text: str, sources: Mapping[Key, Source]) -> str:
    """The YAML of a whole policy with the comments about its actions, each on its line."""
    page = _Page(text, "policy")
    lines = text.splitlines()
    for key in _leaves(page.checked()):
        comment = sources[key].comment if key in sources else None
        if comment and _own(key)[0] in ("rules", "off"):
            lines[page.source(key).line - 1] += f"  # {comment}"
    return "\n".join(lines) + "\n"


def _parent(name: str, at: Source, folder: Path | None, chain: tuple[str, ...]) -> Document:
    shipped = shipped_names()
    if name in shipped:
        return read_shipped(name, chain)
    path = None if folder is None else folder / name
    if path is None or not path.is_file():
        missing = "" if path is None else f", and there is no file {path}"
        raise PolicyError(
            f"{at}: inherits: '{name}' is not a shipped policy ({', '.join(shipped)}){missing}"
        )
    if str(path.resolve()) in chain:
        files = [*chain[chain.index(str(path.resolve())) :], name]
        circle = " -> ".join(Path(file).name for file in files)
        raise PolicyError(f"{at}: inherits: a circle, {circle}; take one of them out")
    return read_file(path, chain)


class _Page:
    """The text of one file, and where its keys stand."""

    def __init__(self, text: str, where: str) -> None:
        self.where = where
        self.lines = text.splitlines()
        try:
            loader = _Loader(text)
            self.root = loader.get_single_node()
            self.data = loader.construct_document(self.root) if self.root else None
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise PolicyError(self._malformed(error)) from error
        self.comments = loader.comments

    def checked(self) -> Any:
        """The data, known to be a policy file or a part of one."""
        if not isinstance(self.data, dict):
            known = ", ".join(keys_at(("",)))
            raise PolicyError(f"{self.where}: a policy is a mapping with the keys {known}")
        wrong: list[tuple[int, str]] = []
        if "inherits" not in self.data:
            fix = "write it, or inherit it with 'inherits: default'"
            missing = [key for key in NEEDED[1:] if key not in self.data]
            wrong += [(1, f"the key '{key}' is missing; {fix}") for key in missing]
        try:
            data = FILE.validate_python(self.data)
        except ValidationError as error:
            for one in error.errors():
                loc = tuple(part for part in one["loc"] if part != "[key]")
                wrong.append((self._line(loc), _explain(one, loc)))
            data = None
        if wrong:
            lines = [f"{self.where}:{line}: {told}" for line, told in sorted(wrong)]
            raise PolicyError("\n".join(lines))
        return data

    def source(self, key: Key) -> Source:
        """Where `key` is written, and the comment about it."""
        line = self._line(key)
        comment = self._comment(line)
        if comment is None and _own(key)[0] == "rules":
            comment = self._comment(self._line(key[:-1]))
        return Source(self.where, line, comment, self.lines[line - 1].strip())

    def _line(self, path: Iterable[int | str]) -> int:
        """The line of the key or list item at the end of `path`, as far as the path is there."""
        node, line = self.root, 1
        for part in path:
            if isinstance(node, yaml.MappingNode):
                found = [(key, value) for key, value in node.value if key.value == str(part)]
            elif isinstance(node, yaml.SequenceNode):
                items = enumerate(node.value)
                found = [(item, item) for i, item in items if part in (i, item.value)]
            else:
                break
            if not found:
                break
            key, node = found[-1]
            line = key.start_mark.line + 1
        return line

    def _comment(self, line: int) -> str | None:
        """The comment on a line, or else the block of comment that ends right above it."""
        if line in self.comments:
            return self.comments[line]
        block: list[str] = []
        indents: set[int] = set()
        while (line := line - 1) in self.comments:
            text = self.lines[line - 1]
            indents.add(text.find("#"))
            if text.lstrip()[0] != "#" or len(indents) > 1:
                break
            block.insert(0, self.comments[line])
        return " ".join(filter(None, block)) or None

    def _malformed(self, error: Exception) -> str:
        mark = getattr(error, "problem_mark", None)
        told = " ".join(str(getattr(error, "problem", None) or error).split())
        at = f"{self.where}:{mark.line + 1}" if mark else self.where
        fix = ' (write "*" with its quotes)' if mark and "alias" in str(error) else ""
        return f"{at}: not valid YAML: {told}{fix}"


class _Loader(StrictLoader):
    """YAML in which `off`, `on`, `yes` and `no` are words, and comments are kept by their line."""

    yaml_implicit_resolvers = {  # noqa: RUF012
        first: [(tag, regex) for tag, regex in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def __init__(self, text: str) -> None:
        self.comments: dict[int, str] = {}
        super().__init__(text)

    def scan_to_next_token(self) -> None:
        """Between two tokens there is nothing but space, line ends and comments."""
        start, line = self.pointer, self.line + 1
        super().scan_to_next_token()
        for offset, skipped in enumerate(self.buffer[start : self.pointer].splitlines()):
            _, mark, comment = skipped.partition("#")
            if mark:
                self.comments[line + offset] = comment.strip()


def _own(key: Key) -> Key:
    """The key within its tenant, if it is a tenant's."""
    return key[2:] if key[0] == "tenants" else key


def _leaves(data: Mapping[str, Any], path: Key = ()) -> Iterator[Key]:
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, (*path, name))
        elif isinstance(value, tuple):
            yield from ((*path, name, item) for item in value)
        else:
            yield (*path, name)


def _explain(error: Any, loc: tuple[int | str, ...]) -> str:
    """One pydantic error in the words of the file."""
    key, given = ".".join(map(str, loc)), error["input"]
    match error["type"]:
        case "extra_forbidden":
            return f"unknown key '{key}'; known keys: {', '.join(keys_at(loc))}"
        case "missing":
            return f"the key '{key}' is missing; write it"
        case "literal_error":
            return f"{key}: '{given}' is not an action; use one of {', '.join(SEVERITY)}"
        case "greater_than" | "less_than" | "float_type":
            return f"{key}: {given!r} is not a number between 0 and 1; write one, as in 0.5"
        case "string_pattern_mismatch":
            return f"{key}: '{given}' is not a language; write a tag such as de or pt-BR"
        case "dict_type":
            return f"{key}: write keys and values beneath it, not {given!r}"
        case "tuple_type":
            return f"{key}: write a list, as in [privacy], not {given!r}"
        case "string_type" | "invalid_key":
            return f"{key}: write words (in quotes if YAML takes them for another thing)"
        case "value_error":
            return f"{key}: {error['ctx']['error']}"
        case _:
            return f"{key}: {error['msg']}, got {given!r}"
