"""Rows of data files, each with the words for its place: JSON, JSONL, CSV, TSV, Parquet, Arrow.

A place is `file:line` in JSONL, CSV and TSV, `file[index]` in a JSON list, Parquet or Arrow, and
`file[key]` in a JSON object of rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from psa_vlm.errors import DataError, MissingExtra

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".arrow")

_BATCH = 64
"""Rows of Parquet that are in memory at a time: each may hold an image."""
_LONGEST_FIELD = 2**31 - 1
"""Of CSV and TSV, whose fields may hold an image in base64."""


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        where: its place, for messages.
        values: what it holds.
        file: the file it stands in.
        key: its number in the file from 0, or its key in a JSON object.
    """

    where: str
    values: Mapping[str, Any]
    file: Path
    key: str

    def value(self, *keys: str) -> Any:
        """What stands under the first of the keys that is there.

        Raises:
            DataError: none of them is.
        """
        for key in keys:
            if key in self.values:
                return self.values[key]
        raise DataError(f"{self.where}: missing key {' or '.join(map(repr, keys))}")

    def text(self, *keys: str) -> str:
        """The words under the first of the keys that is there; a number is its digits.

        Raises:
            DataError: none of them is, or it holds no words.
        """
        value = self.value(*keys)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if not isinstance(value, str) or not value.strip():
            raise DataError(f"{self.where}: {keys[0]!r} must be text, not {value!r:.40}")
        return value.strip()


def rows(path: Path) -> Iterator[Row | DataError]:
    """Every row of a file in turn; for one that can't be read, the error in its place."""
    read = {
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
        ".arrow": _arrow,
    }.get(path.suffix.lower(), _json_or_jsonl)
    empty = True
    try:
        for row in read(path):
            empty = False
            yield row
    except UnicodeDecodeError:
        yield DataError(f"{path}: not UTF-8 text")
    except OSError as error:
        yield DataError(f"{path}: cannot be read ({error.strerror or error})")
    except DataError as error:
        yield error
    else:
        if empty:
            yield DataError(f"{path}: holds no rows")


def _json_or_jsonl(path: Path) -> Iterator[Row | DataError]:
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        start = ""
        while not start.strip() and (more := file.read(1)):
            start = more
        file.seek(0)
        if start == "[":
            for i, value in enumerate(_json(file.read(), str(path))):
                yield _row(f"{path}[{i}]", value, path, str(i))
        elif (keyed := _keyed(path)) is not None:
            for key, value in keyed.items():
                yield _row(f"{path}[{key}]", value, path, key)
        else:
            yield from _jsonl(file, path)


def _keyed(path: Path) -> dict[str, Any] | None:
    """A JSON object whose values are rows; None if the file holds something else."""
    if path.suffix.lower() != ".json":
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    rows = isinstance(data, dict) and data and all(isinstance(v, dict) for v in data.values())
    return data if rows else None


def _jsonl(lines: Iterator[str], path: Path) -> Iterator[Row | DataError]:
    index = 0
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}:{number}"
            try:
                yield _row(where, _json(line, where), path, str(index))
            except DataError as error:
                yield error
            index += 1


def _csv(path: Path) -> Iterator[Row | DataError]:
    csv.field_size_limit(_LONGEST_FIELD)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter)
        header, start = next(reader, []), reader.line_num + 1
        index = 0
        try:
            for fields in reader:
                where, start = f"{path}:{start}", reader.line_num + 1
                if not fields:
                    continue
                if len(fields) == len(header):
                    values = dict(zip(header, fields, strict=True))
                    yield Row(where, values, path, str(index))
                else:
                    yield DataError(f"{where}: {len(fields)} fields under {len(header)} headings")
                index += 1
        except csv.Error as error:
            raise DataError(f"{path}:{reader.line_num}: not valid CSV ({error})") from None


def _parquet(path: Path) -> Iterator[Row | DataError]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise MissingExtra("pyarrow", "train") from None
    try:
        with pq.ParquetFile(path) as file:
            yield from _batches(file.iter_batches(batch_size=_BATCH), path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not a Parquet file, or damaged ({error})") from None


def _arrow(path: Path) -> Iterator[Row | DataError]:
    try:
        import pyarrow as pa
    except ImportError:
        raise MissingExtra("pyarrow", "train") from None
    try:
        with pa.memory_map(str(path)) as source:
            yield from _batches(pa.ipc.open_stream(source), path)
    except pa.ArrowException as error:
        raise DataError(f"{path}: not an Arrow stream, or damaged ({error})") from None


def _batches(batches: Iterable[Any], path: Path) -> Iterator[Row]:
    """The rows of Arrow record batches."""
    for i, value in enumerate(value for batch in batches for value in batch.to_pylist()):
        yield Row(f"{path}[{i}]", value, path, str(i))


def _row(where: str, value: object, path: Path, key: str) -> Row | DataError:
    if isinstance(value, dict):
        return Row(where, value, path, key)
    return DataError(f"{where}: a row must be a JSON object, not {value!r:.40}")


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise DataError(
            f"{where}: not valid JSON ({line}column {error.colno}: {error.msg})"
        ) from None
    except RecursionError:
        raise DataError(f"{where}: not valid JSON (nested too deeply)") from None
