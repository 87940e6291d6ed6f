"""The result of a scan: a folder of Parquet files, each of which appears in one piece.

    OUT/part-000017.parquet      a row for each image of one part of the plan
    OUT/_scan/scan.json          what the scan was told
    OUT/_scan/plan.parquet       the parts: which unit of the source belongs to which

A part's name is that of its file. So what is done is what is there, a part that is computed twice
is written twice to the same place, and a scan that was killed goes on with the parts that are
missing.
"""

from __future__ import annotations

import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec.implementations.local import LocalFileSystem

from psa_vlm.errors import ConfigError, PsaVlmError
from psa_vlm.scan.source import Unit, file_system, kind, one_line
from psa_vlm.taxonomy import Taxonomy

RECORD = "_scan/scan.json"
PLAN = "_scan/plan.parquet"
_PLAN_GROUP = 10_000
"""Units in a row group of the plan: a worker reads those that its part lies in."""


def schema(taxonomy: Taxonomy) -> Any:
    """Columns of the result.

    key          the file's path in the source; of an image in a tar or Parquet file `file#member`
    sha256       of the encoded image; null if it could not be read
    type, level  the predicted ones; null after an error
    type_probs, level_probs  probability of each, by name; null after an error
    action       allow, hint or refuse
    rule         of the policy, that said so
    error        why there is no verdict, in one line; null if there is one
    """
    text, number = pa.string(), pa.float64()
    return pa.schema(
        {
            "key": text,
            "sha256": text,
            "type": text,
            "level": text,
            "type_probs": pa.struct([(name, number) for name in taxonomy.types]),
            "level_probs": pa.struct([(name, number) for name in taxonomy.levels]),
            "action": text,
            "rule": text,
            "error": text,
        }
    )


@dataclass(frozen=True)
class Counts:
    """What a result holds: rows in all and with an error, and rows by type, level and action."""

    images: int
    errors: int
    by: Mapping[str, Mapping[str, int]]
    """"type", "level" and "action" -> name -> rows; rows with an error have an action alone."""
    first_error: str | None = None
    """One of the errors, with its key."""


class Output:
    """The folder of a result, on any file system that fsspec knows."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.fs, self.folder = file_system(url)

    def begin(self, record: Mapping[str, Any]) -> None:
        """Make the folder, or see that it holds this very scan.

        Raises:
            ConfigError: it holds another scan, or something else.
        """
        found = self._record()
        if found is None:
            self._put(RECORD, json.dumps(record, indent=1).encode())
        elif differing := [key for key in record if found.get(key) != record[key]]:
            raise ConfigError(
                f"{self.url}: holds a scan with other {', '.join(differing)}; choose another folder"
            )
        for path in self._names("_scan"):
            if path.endswith(".writing"):  # of a process that was killed
                self.fs.rm_file(path)

    def _record(self) -> dict[str, Any] | None:
        """What the scan in the folder was told; None without one."""
        path = f"{self.folder}/{RECORD}"
        if self.fs.exists(path):
            found: dict[str, Any] = json.loads(self.fs.cat_file(path))
            return found
        if [name for name in self._names() if not name.endswith("/_scan")]:
            raise ConfigError(
                f"{self.url}: exists and is no result of a scan; choose another folder"
            )
        return None

    # --- the plan --------------------------------------------------------------------------------

    def plan(self, units: Sequence[Unit], rows: int) -> list[int]:
        """Put units of files that no part has yet into new parts; the parts still to be done.

        Args:
            units: all that there is to read now.
            rows: image files in a part; a tar, and what `Unit` takes of a Parquet file, is one.
        """
        old = self._plan()
        known = {unit.file for unit in old}
        fresh = [unit for unit in units if unit.file not in known]
        new = self._parts(fresh, rows, max(old.values(), default=-1) + 1)
        if new:
            plan = [(part, *unit) for unit, part in [*old.items(), *new.items()]]
            names = ("part", "file", "start", "stop")
            table = pa.table(dict(zip(names, zip(*plan, strict=True), strict=True)))
            self._put(PLAN, _parquet(table, _PLAN_GROUP))
        done = set(self.done())
        return sorted({*old.values(), *new.values()} - done)

    def _plan(self) -> dict[Unit, int]:
        path = f"{self.folder}/{PLAN}"
        if not self.fs.exists(path):
            return {}
        table = pq.read_table(path, filesystem=self.fs).to_pydict()
        units = map(Unit, table["file"], table["start"], table["stop"])
        return dict(zip(units, table["part"], strict=True))

    @staticmethod
    def _parts(units: Iterable[Unit], rows: int, first: int) -> dict[Unit, int]:
        images = sorted(unit for unit in units if kind(unit.file) == "image")
        others = sorted(unit for unit in units if kind(unit.file) != "image")
        parts = {unit: first + index // rows for index, unit in enumerate(images)}
        behind = first + -(-len(images) // rows)
        return parts | {unit: behind + index for index, unit in enumerate(others)}

    def units(self, part: int) -> list[Unit]:
        """What a part is made from."""
        path = f"{self.folder}/{PLAN}"
        table = pq.read_table(path, filesystem=self.fs, filters=[("part", "=", part)]).to_pydict()
        return list(map(Unit, table["file"], table["start"], table["stop"]))

    # --- the rows --------------------------------------------------------------------------------

    def done(self) -> list[int]:
        """The parts that are written, in their order."""
        found = (re.search(r"/part-(\d+)\.parquet$", name) for name in self._names())
        return sorted(int(match[1]) for match in found if match)

    def write(self, part: int, rows: Sequence[Mapping[str, Any]], taxonomy: Taxonomy) -> None:
        """Write the rows of a part, in one piece.

        Raises:
            PsaVlmError: it can't be written.
        """
        table = pa.Table.from_pylist(list(rows), schema(taxonomy))
        self._put(f"part-{part:06d}.parquet", _parquet(table))

    def counts(self) -> Counts:
        """What the parts that are done hold together."""
        paths = [f"{self.folder}/part-{part:06d}.parquet" for part in self.done()]
        by: dict[str, Counter[str]] = {name: Counter() for name in ("type", "level", "action")}
        images, errors, first = 0, 0, None
        result = ds.dataset(paths, filesystem=self.fs, format="parquet")
        for batch in result.to_batches(columns=["key", *by, "error"]):
            images += batch.num_rows
            for name, counter in by.items():
                for one in pc.value_counts(batch.column(name).drop_null()).to_pylist():
                    counter[one["values"]] += one["counts"]
            wrong = batch.filter(pc.is_valid(batch.column("error")))
            errors += wrong.num_rows
            if first is None and wrong.num_rows:
                first = f"{wrong.column('key')[0]}: {wrong.column('error')[0]}"
        return Counts(images, errors, by, first)

    # --- files -----------------------------------------------------------------------------------

    def _names(self, folder: str = "") -> list[str]:
        self.fs.invalidate_cache()  # other processes write here
        try:
            names: list[str] = self.fs.ls(f"{self.folder}/{folder}".rstrip("/"), detail=False)
        except FileNotFoundError:
            return []
        return names

    def _put(self, name: str, content: bytes) -> None:
        """Write a file in one piece, as stores of objects do by themselves."""
        path = f"{self.folder}/{name}"
        try:
            if not isinstance(self.fs, LocalFileSystem):
                self.fs.pipe_file(path, content)
                return
            writing = Path(self.folder, "_scan", f"{Path(name).name}.{os.getpid()}.writing")
            writing.parent.mkdir(parents=True, exist_ok=True)
            with writing.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(writing, path)
        except Exception as error:  # each store raises its own
            raise PsaVlmError(
                f"{path}: can't be written ({one_line(error)}); what was written before is kept:"
                " see to it and run the same command again"
            ) from error


def _parquet(table: Any, row_group: int | None = None) -> bytes:
    stream = io.BytesIO()
    pq.write_table(table, stream, row_group_size=row_group)
    return stream.getvalue()
