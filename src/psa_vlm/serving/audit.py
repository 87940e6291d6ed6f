"""The audit log: one record for each request, chained by hash, durable before the reply leaves.

The hash of a record covers all of it and the hash of the one before, so a record that is changed,
taken out or put in breaks the chain. Who can write the database could compute the whole chain
anew, or cut off its end. A service that runs notices that its own last record is gone; beyond that,
keep a head (as `verify` gives it, or the `record` of a reply) elsewhere, and verify against it.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    URL,
    Column,
    Connection,
    Engine,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    create_engine,
    event,
    insert,
    make_url,
    select,
)
from sqlalchemy.exc import ArgumentError, SQLAlchemyError

from psa_vlm.errors import AuditError, MissingExtra

START = "0" * 64
"""What stands for the hash before the first record's."""
WAIT = 30
"""Seconds that a record waits for the other processes that write."""
_ALONE = {
    "sqlite": ("BEGIN IMMEDIATE",),
    "postgresql": (
        "SET LOCAL synchronous_commit = on",
        f"SET LOCAL lock_timeout = '{WAIT}s'",
        "LOCK TABLE records IN SHARE ROW EXCLUSIVE MODE",
    ),
}
"""What a transaction begins with, so that nobody else writes meanwhile; readers need not wait."""

_RECORDS = Table(
    "records",
    MetaData(),
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("content", Text, nullable=False),
    Column("previous", String(64), nullable=False, unique=True),
    Column("hash", String(64), nullable=False),
)


@dataclass(frozen=True)
class Entry:
    """What is recorded of one request; JSON-ready. Neither images nor words are among it.

    A request that fails before its decision has a record without one; an answer that breaks off
    after it has a second record of the same id.

    Attributes:
        request: its id, which the reply carries.
        endpoint: chat, moderation or page.
        tenant: None where no key is asked for.
        images: SHA-256 of each encoded image.
        scores: risk type -> score; empty without images or after an error.
        verdict: without evidence; None without images.
        decision: action, rule, type, level and reason; None for a failure.
        policy: name and hash.
        model: name and hash.
        error: code, HTTP status and reason of a failure.
    """

    request: str
    endpoint: str
    tenant: str | None
    images: tuple[str, ...]
    scores: Mapping[str, float]
    verdict: Mapping[str, Any] | None
    decision: Mapping[str, Any] | None
    policy: Mapping[str, str]
    model: Mapping[str, str]
    error: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Head:
    """The end of a chain: how many records it has, and the hash of the last."""

    records: int
    hash: str


class Audit:
    """An audit log in a database; several processes may write to one.

    Args:
        url: of SQLAlchemy, as in `sqlite:///audit.db` or `postgresql://user@host/name`.

    Raises:
        AuditError: the database can't be opened, or is of another kind.
        MissingExtra: the driver of PostgreSQL is not installed.
    """

    def __init__(self, url: str) -> None:
        self._lock = threading.Lock()
        self._last = Head(0, START)
        try:
            place = make_url(url)
            if place.get_backend_name() not in _ALONE:
                raise AuditError(f"audit log {_shown(url)}: use sqlite:/// or postgresql://")
            self._alone = _ALONE[place.get_backend_name()]
            self._engine = _connected(place)
            try:
                _RECORDS.metadata.create_all(self._engine)
            except SQLAlchemyError:  # another process was quicker, or this fails once more
                _RECORDS.metadata.create_all(self._engine)
        except ModuleNotFoundError as error:
            raise MissingExtra(error.name or "psycopg", "postgres") from error
        except SQLAlchemyError as error:
            raise AuditError(f"audit log {_shown(url)}: can't be opened ({_told(error)})") from None

    def close(self) -> None:
        """Close its connections."""
        self._engine.dispose()

    def append(self, entry: Entry) -> str:
        """Write a record; when this returns it is on the disk.

        Returns:
            Its hash.

        Raises:
            AuditError: it can't be written, or the last record that was written here is gone.
        """
        try:
            with self._lock:
                with self._engine.begin() as connection:
                    for statement in self._alone:
                        connection.exec_driver_sql(statement)
                    last = self._append(connection, entry)
                self._last = last
                return last.hash
        except SQLAlchemyError as error:
            raise AuditError(f"audit log: can't be written ({_told(error)})") from error

    def _append(self, connection: Connection, entry: Entry) -> Head:
        """Write a record while nobody else does."""
        rows = select(_RECORDS.c.id, _RECORDS.c.hash)
        own = self._last
        if own.records:
            found = connection.execute(rows.where(_RECORDS.c.id == own.records)).first()
            if found is None or found.hash != own.hash:
                raise AuditError(f"audit log: record {own.records} is gone; it was cut or redone")
        last = connection.execute(rows.order_by(_RECORDS.c.id.desc()).limit(1)).first()
        number, previous = (last.id + 1, last.hash) if last else (1, START)
        time = datetime.now(UTC).isoformat(timespec="microseconds")
        content = _canonical({"time": time, **asdict(entry)})
        digest = _hash(number, previous, content)
        row = {"id": number, "content": content, "previous": previous, "hash": digest}
        connection.execute(insert(_RECORDS).values(row))
        return Head(number, digest)

    def check(self) -> None:
        """Make sure that the database answers.

        Raises:
            AuditError: it does not.
        """
        try:
            with self._engine.connect() as connection:
                connection.execute(select(_RECORDS.c.id).limit(1)).first()
        except SQLAlchemyError as error:
            raise AuditError(f"audit log: can't be read ({_told(error)})") from error

    def records(self) -> Iterator[dict[str, Any]]:
        """All records in order, with `id`, `previous` and `hash` beside what `Entry` holds.

        Raises:
            AuditError: the log can't be read, or the chain breaks: which record, and how.
        """
        previous = START
        with closing(self._rows()) as rows:
            for number, row in enumerate(rows, start=1):
                if row.id != number:
                    raise AuditError(f"audit log: record {number} is missing")
                if row.previous != previous:
                    told = f"record {number} does not follow the one before it"
                    raise AuditError(f"audit log: {told}")
                if row.hash != _hash(number, previous, row.content):
                    raise AuditError(f"audit log: record {number} was changed")
                previous = row.hash
                ends = {"id": row.id, "previous": row.previous, "hash": row.hash}
                yield {**json.loads(row.content), **ends}

    def _rows(self) -> Generator[Any, None, None]:
        everything = select(_RECORDS).order_by(_RECORDS.c.id)
        try:
            with (
                self._engine.connect().execution_options(yield_per=1000) as connection,
                connection.execute(everything) as rows,
            ):
                yield from rows
        except SQLAlchemyError as error:
            raise AuditError(f"audit log: can't be read ({_told(error)})") from error

    def verify(self, head: str | None = None) -> Head:
        """Follow the whole chain.

        Args:
            head: a hash that was the last of the chain once; it must still be in it.

        Raises:
            AuditError: the chain breaks, or does not hold `head`.
        """
        count, last, found = 0, START, head in (None, START)
        for record in self.records():
            count, last = count + 1, record["hash"]
            found = found or last == head
        if not found:
            raise AuditError(f"audit log: no record has the hash {head}; its end was cut or redone")
        return Head(count, last)


def _connected(place: URL) -> Engine:
    """Its connections, which neither wait for ever nor outlive a server that restarts."""
    if place.get_backend_name() == "sqlite":
        engine = create_engine(place, connect_args={"timeout": WAIT})
        event.listen(engine, "connect", _durable)
        return engine
    if place.drivername == "postgresql":
        place = place.set(drivername="postgresql+psycopg")
    return create_engine(place, connect_args={"connect_timeout": WAIT}, pool_pre_ping=True)


def _durable(connection: Any, _: object) -> None:
    """Readers do not wait for writers, and a commit is on the disk."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _canonical(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)


def _hash(number: int, previous: str, content: str) -> str:
    return hashlib.sha256(f"{number}\n{previous}\n{content}".encode()).hexdigest()


def _shown(url: str) -> str:
    """A database URL without its password."""
    try:
        return make_url(url).render_as_string(hide_password=True)
    except ArgumentError:
        return "(not a database URL; write sqlite:///audit.db)"


def _told(error: Exception) -> str:
    return str(getattr(error, "orig", None) or error).splitlines()[0]
