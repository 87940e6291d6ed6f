"""The audit log: what is in it stays, and what is changed shows; on SQLite and on PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from psa_vlm.errors import AuditError, MissingExtra
from psa_vlm.serving.audit import START, Audit, Entry

from .conftest import execute


def entry(request: str = "r") -> Entry:
    decision = {"action": "allow", "rule": "clean", "type": None, "level": None, "reason": None}
    return Entry(
        request,
        "chat",
        "school",
        ("ab" * 32,),
        {"privacy": 0.25},
        {"images": []},
        decision,
        {"name": "strict", "hash": "1"},
        {"name": "run", "hash": "2"},
    )


@pytest.fixture()
def audit(database: str) -> Iterator[Audit]:
    log = Audit(database)
    yield log
    log.close()


def test_records_come_back_in_order_with_all_they_hold(audit: Audit) -> None:
    hashes = [audit.append(entry(name)) for name in "abc"]
    records = list(audit.records())
    assert [one["request"] for one in records] == ["a", "b", "c"]
    assert [one["hash"] for one in records] == hashes
    assert [one["previous"] for one in records] == [START, *hashes[:2]]
    assert records[0]["tenant"] == "school"
    assert records[0]["scores"] == {"privacy": 0.25}
    assert records[0]["time"] <= records[1]["time"] <= records[2]["time"]
    assert records[0]["time"].endswith("+00:00")


def test_an_untouched_chain_verifies_and_goes_on_after_a_restart(
    audit: Audit, database: str
) -> None:
    assert audit.verify().records == 0
    first = audit.append(entry())
    again = Audit(database)
    last = again.append(entry())
    head = again.verify()
    again.close()
    assert (head.records, head.hash) == (2, last)
    assert audit.verify(first) == head


@pytest.mark.parametrize(
    ("statement", "told"),
    [
        (
            "UPDATE records SET content = replace(content, 'allow', 'refuse') WHERE id = 2",
            "changed",
        ),
        ("UPDATE records SET hash = previous WHERE id = 2", "record 2 was changed"),
        ("UPDATE records SET previous = 'x' WHERE id = 2", "does not follow"),
        ("DELETE FROM records WHERE id = 2", "record 2 is missing"),
        ("DELETE FROM records WHERE id = 1", "record 1 is missing"),
        ("UPDATE records SET id = 9 WHERE id = 3", "record 3 is missing"),
    ],
)
def test_a_changed_chain_is_noticed(audit: Audit, database: str, statement: str, told: str) -> None:
    for name in "abc":
        audit.append(entry(name))
    execute(database, statement)
    with pytest.raises(AuditError, match=told):
        audit.verify()


def test_a_cut_end_is_noticed_against_a_head_kept_elsewhere(audit: Audit, database: str) -> None:
    heads = [audit.append(entry(name)) for name in "abc"]
    execute(database, "DELETE FROM records WHERE id = 3")
    assert audit.verify(heads[1]).records == 2
    with pytest.raises(AuditError, match="no record has the hash"):
        audit.verify(heads[2])


def test_writers_in_threads_and_processes_keep_one_chain(audit: Audit, database: str) -> None:
    other = Audit(database)  # what a second process would hold

    def write(log: Audit) -> None:
        for _ in range(10):
            log.append(entry())

    threads = [threading.Thread(target=write, args=(log,)) for log in (audit, other, audit, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    other.close()
    assert audit.verify().records == 40


WRITER = """
import sys
from psa_vlm.serving.audit import Audit, Entry
named = {"name": "n", "hash": "0"}
log = Audit(sys.argv[1])
for number in range(40):
    log.append(Entry(f"{sys.argv[2]}-{number}", "chat", None, (), {}, None, None, named, named))
log.close()
"""


def test_processes_that_begin_at_once_write_one_chain(database: str) -> None:
    """Neither makes the table under the other's feet, none is turned away, and none forks off."""
    command = [sys.executable, "-c", WRITER, database]
    writers = [subprocess.Popen([*command, name]) for name in "abc"]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    audit = Audit(database)
    requests = [one["request"] for one in audit.records()]
    audit.close()
    assert sorted(requests) == sorted(f"{name}-{i}" for name in "abc" for i in range(40))
    for name in "abc":  # each in its own order
        own = [one for one in requests if one.startswith(name)]
        assert own == [f"{name}-{i}" for i in range(40)]


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM records WHERE id = 3",
        "DELETE FROM records",
        "UPDATE records SET hash = previous WHERE id = 3",
    ],
)
def test_a_service_notices_that_its_last_record_is_gone(
    audit: Audit, database: str, statement: str
) -> None:
    other = Audit(database)
    for log in (audit, other, audit):
        log.append(entry())
    execute(database, statement)
    for _ in range(2):  # it does not go on over the gap
        with pytest.raises(AuditError, match="record 3 is gone"):
            audit.append(entry())
    other.close()


def test_a_server_that_restarts_is_found_again(postgres: str) -> None:
    audit = Audit(postgres)
    try:
        audit.append(entry())
        own = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        execute(postgres, f"{own} AND datname = 'postgres'")
        audit.append(entry())
        assert audit.verify().records == 2
    finally:
        audit.close()
        execute(postgres, "DROP TABLE records")


def test_a_missing_driver_names_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtra, match=r"psycopg is not installed.*'psa-vlm\[postgres\]'"):
        Audit("postgresql://user@localhost/audit")


def test_a_commit_is_on_the_disk(tmp_path: Path) -> None:
    audit = Audit(f"sqlite:///{tmp_path / 'audit.db'}")
    with audit._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL
    audit.close()


def test_a_record_that_cannot_be_written_is_an_error(audit: Audit, database: str) -> None:
    execute(database, "DROP TABLE records")
    for use in (lambda: audit.append(entry()), audit.check, audit.verify):
        with pytest.raises(AuditError, match=r"no such table|does not exist"):
            use()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sqlite:////no/such/folder/audit.db", "unable to open"),
        ("audit.db", "not a database URL"),
        ("nosql://user:secret@host/x", r"nosql://user:\*\*\*@host/x: use sqlite"),
        ("postgresql://user:secret@127.0.0.1:1/x", r"postgresql://user:\*\*\*@.*refused"),
    ],
)
def test_a_database_that_cannot_be_opened_is_named(url: str, told: str) -> None:
    with pytest.raises(AuditError, match=told) as caught:
        Audit(url)
    assert "secret" not in str(caught.value)


def test_nothing_that_is_no_number_enters(audit: Audit) -> None:
    bad = Entry(**{**vars(entry()), "scores": {"privacy": float("nan")}})
    with pytest.raises(ValueError, match="JSON"):
        audit.append(bad)
    assert json.dumps(audit.verify().records) == "0"
