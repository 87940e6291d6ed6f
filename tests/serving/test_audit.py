"""The audit log: what is in it stays, and what is changed shows."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from psa_vlm.errors import AuditError
from psa_vlm.serving.audit import START, Audit, Entry


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
def database(tmp_path: Path) -> Path:
    return tmp_path / "audit.db"


@pytest.fixture()
def audit(database: Path) -> Iterator[Audit]:
    log = Audit(f"sqlite:///{database}")
    yield log
    log.close()


def change(database: Path, statement: str) -> None:
    connection = sqlite3.connect(database)
    with connection:
        connection.execute(statement)
    connection.close()


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
    audit: Audit, database: Path
) -> None:
    assert audit.verify().records == 0
    first = audit.append(entry())
    again = Audit(f"sqlite:///{database}")
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
def test_a_changed_chain_is_noticed(
    audit: Audit, database: Path, statement: str, told: str
) -> None:
    for name in "abc":
        audit.append(entry(name))
    change(database, statement)
    with pytest.raises(AuditError, match=told):
        audit.verify()


def test_a_cut_end_is_noticed_against_a_head_kept_elsewhere(audit: Audit, database: Path) -> None:
    heads = [audit.append(entry(name)) for name in "abc"]
    change(database, "DELETE FROM records WHERE id = 3")
    assert audit.verify(heads[1]).records == 2
    with pytest.raises(AuditError, match="no record has the hash"):
        audit.verify(heads[2])


def test_writers_in_threads_and_processes_keep_one_chain(audit: Audit, database: Path) -> None:
    other = Audit(f"sqlite:///{database}")  # what a second process would hold

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


def test_a_commit_is_on_the_disk(audit: Audit) -> None:
    with audit._engine.connect() as connection:
        assert connection.exec_driver_sql("PRAGMA journal_mode").scalar() == "wal"
        assert connection.exec_driver_sql("PRAGMA synchronous").scalar() == 2  # FULL


def test_a_record_that_cannot_be_written_is_an_error(audit: Audit, database: Path) -> None:
    change(database, "DROP TABLE records")
    for use in (lambda: audit.append(entry()), audit.check, audit.verify):
        with pytest.raises(AuditError, match="no such table"):
            use()


@pytest.mark.parametrize(
    ("url", "told"),
    [
        ("sqlite:////no/such/folder/audit.db", "unable to open"),
        ("audit.db", "not a database URL"),
        ("nosql://user:secret@host/x", r"nosql://user:\*\*\*@host"),
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
