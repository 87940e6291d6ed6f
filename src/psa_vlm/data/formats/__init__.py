"""The published layouts that we read, by name, and how one is recognised."""

from __future__ import annotations

from pathlib import Path

from psa_vlm.data.formats.base import Format
from psa_vlm.data.formats.conversations import CONVERSATIONS, LLAVA, PREPARED, PSA
from psa_vlm.data.formats.general import GENERAL
from psa_vlm.data.formats.safety import SAFETY
from psa_vlm.data.rows import SUFFIXES, Row, rows
from psa_vlm.errors import DataError

FORMATS: dict[str, Format] = {
    one.name: one for one in (CONVERSATIONS, PSA, LLAVA, *SAFETY, *GENERAL, PREPARED)
}


def format_named(name: str) -> Format:
    """The layout of this name.

    Raises:
        DataError: there is none.
    """
    if name not in FORMATS:
        raise DataError(f"format {name!r} is unknown; known: {', '.join(FORMATS)}")
    return FORMATS[name]


def find(path: Path, format: Format | None = None) -> tuple[Format, list[Path]]:
    """The layout of a file or folder, and the files that hold its rows.

    Args:
        path: a data file, or a set's folder.
        format: if it is known.

    Raises:
        DataError: nothing is there, no layout fits, or files of several lie together.
    """
    if not path.is_dir():
        return format or _guess(path), [path]
    everything = _data_files(path)
    claims: dict[str, list[Path]] = {}
    for one in [format] if format else FORMATS.values():
        for pattern in one.files:
            files = [file for file in everything if file.relative_to(path).match(pattern)]
            files = [file for file in files if format or _fits(one, file)]
            if files:
                claims[one.name] = files
                break
    if format and format.name not in claims:
        claims[format.name] = everything
    if not claims:
        for file in everything:
            claims.setdefault(_guess(file).name, []).append(file)
    if not any(claims.values()):
        raise DataError(f"{path}: holds no data file ({', '.join(SUFFIXES)})")
    if len(claims) > 1:
        told = ", ".join(f"{name} ({files[0].name})" for name, files in claims.items())
        raise DataError(f"{path}: holds several layouts: {told}; name a file, or a format")
    [(name, files)] = claims.items()
    return FORMATS[name], files


def _data_files(folder: Path) -> list[Path]:
    found = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    return sorted(path for path in found if path.is_file())


def _first(file: Path) -> Row | DataError:
    """The first row that can be read; if there is none, why."""
    problem = None
    for row in rows(file):
        if isinstance(row, Row):
            return row
        problem = problem or row
    return problem or DataError(f"{file}: holds no rows")


def _fits(format: Format, file: Path) -> bool:
    row = _first(file)
    return isinstance(row, Row) and format.fit(row) > 0


def _guess(file: Path) -> Format:
    """The layout with most keys of those that fit the first row."""
    row = _first(file)
    if isinstance(row, DataError):
        raise row
    fitting = [one for one in FORMATS.values() if one.fit(row)]
    if not fitting:
        held = ", ".join(map(str, row.values))
        raise DataError(
            f"{row.where}: no known layout has these keys: {held}; name one of"
            f" {', '.join(FORMATS)} with --format, and what is missing shows"
        )
    return max(fitting, key=lambda one: one.fit(row))
