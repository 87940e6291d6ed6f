"""What a scan reads: image files, tars (WebDataset) and Parquet files, local or remote."""

from __future__ import annotations

import tarfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any, Literal, NamedTuple, Self

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from psa_vlm.errors import InputError

READABLE = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".gif", ".bmp")
OTHERS = (".tif", ".tiff", ".avif", ".heic", ".heif", ".ico", ".svg")
IMAGES = frozenset((*READABLE, *OTHERS))
"""Names that promise an image; those of a format that can't be read become rows with an error."""
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

MAX_BYTES = 100_000_000
"""Of one encoded image; a larger one is a row with an error and is not read."""
AT_ONCE = 16
"""Rows of a Parquet file in memory."""

Kind = Literal["image", "tar", "parquet"]


def kind(name: str) -> Kind | None:
    """What a file is by its name; None if it holds no images."""
    name = name.lower()
    if name.endswith(TARS):
        return "tar"
    if name.endswith(".parquet"):
        return "parquet"
    return "image" if PurePosixPath(name).suffix in IMAGES else None


class Unit(NamedTuple):
    """What is read in one go: an image file, a tar, or some row groups of a Parquet file."""

    file: str
    """Its path in the source."""
    start: int = 0
    """First row group."""
    stop: int = 0
    """Behind the last row group."""


class Read(NamedTuple):
    """One image as it was found, or why there is none."""

    key: str
    """The file's path in the source; of a member of a file, `file#member`."""
    content: bytes | None
    error: str | None = None


@dataclass(frozen=True)
class Source:
    """A folder or a file, on any file system that fsspec knows.

    Attributes:
        url: as in `photos`, `shards/0001.tar` or `s3://bucket/photos`.
        column: of Parquet files, the one that holds encoded images; None finds it.
    """

    url: str
    column: str | None = None

    def place(self) -> tuple[Any, str, list[str] | None]:
        """The file system, the folder in it, and the file's name where the source is one.

        Raises:
            InputError: there is nothing, or it can't be reached.
        """
        fs, path = file_system(self.url)
        try:
            if fs.isfile(path):
                folder, _, name = path.rpartition("/")
                return fs, folder, [name]
            if fs.isdir(path):
                return fs, path, None
        except Exception as error:  # each store raises its own
            raise InputError(f"{self.url}: can't be read ({one_line(error)})") from error
        raise InputError(f"{self.url}: no such file or folder")

    def units(self, rows: int) -> tuple[list[Unit], Counter[str]]:
        """All that there is to read, sorted, and how many files hold no images, by suffix.

        Args:
            rows: of a Parquet file that make a unit, if its row groups are not larger.

        Raises:
            InputError: there is nothing to scan, or no telling which column holds the images.
        """
        fs, folder, files = self.place()
        if files is None:
            try:
                files = [path.removeprefix(f"{folder}/") for path in sorted(fs.find(folder))]
            except Exception as error:
                raise InputError(f"{self.url}: can't be listed ({one_line(error)})") from error
        units: list[Unit] = []
        left_out: Counter[str] = Counter()
        for file in files:
            found = kind(file)
            if found == "parquet":
                found_units = self._row_groups(fs, folder, file, rows)
            else:
                found_units = [] if found is None else [Unit(file)]
            units += found_units
            if not found_units:
                left_out[PurePosixPath(file).suffix.lower() or "no suffix"] += 1
        if not units:
            others = f" among {left_out.total():,} files" if left_out else ""
            raise InputError(
                f"{self.url}: no images{others}; give a folder of image files, tars or Parquet"
                " files, or one of these"
            )
        return units, left_out

    def _row_groups(self, fs: Any, folder: str, file: str, rows: int) -> list[Unit]:
        """Units of a Parquet file; none if it has no column of images."""
        try:
            with fs.open(f"{folder}/{file}", "rb") as stream:
                parquet = pq.ParquetFile(stream)
                schema = parquet.schema_arrow
                sizes = [
                    parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)
                ]
        except Exception:
            return [Unit(file)]  # reading it gives the row that says so
        if self._column(schema, file) is None:
            return []
        units: list[Unit] = []
        start = count = 0
        for index, size in enumerate(sizes):
            count += size
            if count >= rows or index + 1 == len(sizes):
                units.append(Unit(file, start, index + 1))
                start, count = index + 1, 0
        return units

    def _column(self, schema: Any, file: str) -> str | None:
        """The column of encoded images, bytes or Hugging Face's `{bytes, path}`; None without."""
        found = [field.name for field in schema if _holds_bytes(field.type)]
        if self.column is not None:
            if self.column not in found:
                raise InputError(
                    f"{file}: column {self.column!r} holds no encoded images; those of bytes are:"
                    f" {', '.join(found) or 'none'}"
                )
            return self.column
        if len(found) > 1 and "image" not in found:
            raise InputError(f"{file}: several columns of bytes ({', '.join(found)}); name one")
        return "image" if "image" in found else next(iter(found), None)

    # --- reading ---------------------------------------------------------------------------------

    def read(self, units: Iterable[Unit]) -> Iterator[Read]:
        """Every image of the units in their order; what can't be read is told, never left out."""
        fs, folder, _ = self.place()
        for unit in units:
            path = f"{folder}/{unit.file}"
            match kind(unit.file):
                case "tar":
                    reads = _tar(fs, path, unit.file)
                case "parquet":
                    reads = self._parquet(fs, path, unit)
                case _:
                    reads = _file(fs, path, unit.file)
            yield from reads

    def _parquet(self, fs: Any, path: str, unit: Unit) -> Iterator[Read]:
        row = None
        try:
            with fs.open(path, "rb") as stream:
                parquet = pq.ParquetFile(stream)
                column = self._column(parquet.schema_arrow, unit.file)
                groups = range(unit.start, unit.stop)
                row = sum(parquet.metadata.row_group(i).num_rows for i in range(unit.start))
                for batch in parquet.iter_batches(AT_ONCE, list(groups), columns=[column]):
                    for value in batch.column(0).to_pylist():
                        content = value["bytes"] if isinstance(value, dict) else value
                        key, row = f"{unit.file}#{row}", row + 1
                        yield (
                            _checked(key, content)
                            if content
                            else Read(key, None, "no image in this row")
                        )
        except InputError:
            raise
        except Exception as error:  # of Parquet, of the store
            where = "" if row is None else f" from row {row} on"
            yield Read(
                unit.file if row is None else f"{unit.file}#{row}",
                None,
                f"Parquet file can't be read{where} ({one_line(error)})",
            )


def file_system(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path in it.

    Raises:
        InputError: there is no such file system, or its package is not installed.
    """
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise InputError(f"{url}: {one_line(error)}") from error
    return fs, path.rstrip("/")


def absolute(url: str) -> str:
    """The same place as a URL that means the same in every process."""
    fs, path = file_system(url)
    found: str = fs.unstrip_protocol(path)
    return found


def one_line(error: object, most: int = 300) -> str:
    """What an error says, in one line; its kind where it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def _holds_bytes(type_: Any) -> bool:
    if pa.types.is_struct(type_):
        return type_.get_field_index("bytes") >= 0 and _holds_bytes(type_.field("bytes").type)
    return bool(pa.types.is_binary(type_) or pa.types.is_large_binary(type_))


def _checked(key: str, content: bytes | None) -> Read:
    wrong = _too_large(len(content)) if content else "no image in this row"
    return Read(key, None if wrong else content, wrong)


def _too_large(size: int) -> str | None:
    return f"more than {MAX_BYTES:,} bytes; scale it down" if size > MAX_BYTES else None


def _file(fs: Any, path: str, file: str) -> Iterator[Read]:
    try:
        too_large = _too_large(fs.size(path) or 0)
        yield Read(file, None if too_large else fs.cat_file(path), too_large)
    except Exception as error:  # each store raises its own
        yield Read(file, None, f"can't be read ({one_line(error)})")


class _Member(tarfile.TarInfo):
    """A member whose header must be whole: tarfile takes a broken one for the end of the tar."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None


def _tar(fs: Any, path: str, file: str) -> Iterator[Read]:
    """Its images, in one pass; a name that comes again is numbered."""
    names: Counter[str] = Counter()
    try:
        with (
            fs.open(path, "rb") as stream,
            tarfile.open(fileobj=stream, mode="r|*", tarinfo=_Member) as archive,
        ):
            for member in archive:
                if not member.isfile() or kind(member.name) != "image":
                    continue
                names[member.name] += 1
                again = f" ({names[member.name]})" if names[member.name] > 1 else ""
                key, too_large = f"{file}#{member.name}{again}", _too_large(member.size)
                content = archive.extractfile(member)
                yield Read(key, content.read() if content and not too_large else None, too_large)
        if not names:
            yield Read(file, None, "no image in this tar")
    except Exception as error:  # of tarfile, of what it is compressed with, of the store
        what = f"tar can't be read behind its {names.total()} images ({one_line(error)})"
        yield Read(file, None, what)
