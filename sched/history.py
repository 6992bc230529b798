"""What was: rounds, groups, decisions and the age of every node's report, in SQLite; and what must outlive a
restart: services, identities, the map, the highest report number of each node.

A round is one transaction in write-ahead-log mode, so that whatever kills the process leaves whole rounds.
Shell: it blocks; one thread owns it.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from crossedge.sched.config import HistorySettings
from crossedge.wire.errors import ConfigError

VERSION: Final = 1
FILE: Final = "history.sqlite"
TRIM_EVERY: Final = 20
"""Rounds between two looks at the size."""
TRIM_SHARE: Final = 0.1
PAGE_LIMIT: Final = 1000

SCHEMA: Final = """
CREATE TABLE rounds (
    round INTEGER PRIMARY KEY, time REAL NOT NULL, summary TEXT NOT NULL, grouping INTEGER NOT NULL
        REFERENCES groupings (id), ages BLOB NOT NULL);
CREATE INDEX rounds_by_time ON rounds (time);
CREATE TABLE groupings (id INTEGER PRIMARY KEY, labels BLOB NOT NULL);
CREATE TABLE decisions (
    id INTEGER PRIMARY KEY AUTOINCREMENT, round INTEGER NOT NULL REFERENCES rounds (round) ON DELETE CASCADE,
    time REAL NOT NULL, service TEXT NOT NULL, decision TEXT NOT NULL);
CREATE INDEX decisions_by_service ON decisions (service, id);
CREATE INDEX decisions_by_round ON decisions (round);
CREATE TABLE nodes (
    id BLOB PRIMARY KEY, name TEXT NOT NULL, first REAL NOT NULL, last REAL NOT NULL, seq TEXT NOT NULL,
    serial TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE services (
    name TEXT PRIMARY KEY, spec TEXT NOT NULL, created REAL NOT NULL, updated REAL NOT NULL,
    current TEXT NOT NULL, decision TEXT) WITHOUT ROWID;
CREATE TABLE state (key TEXT PRIMARY KEY, value BLOB NOT NULL) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class NodeRow:
    """What is kept of a node: when it was first and last heard (Unix seconds), and its highest numbers."""

    node_id: bytes
    name: str
    first: float
    last: float
    seq: int
    serial: int


@dataclass(frozen=True, slots=True)
class ServiceRow:
    """What is kept of a service: its spec and last decision as JSON, and where its replicas are."""

    name: str
    spec: str
    created: float
    updated: float
    current: tuple[str, ...]
    decision: str | None


@dataclass(frozen=True, slots=True)
class RoundRow:
    """One round to keep: figures, group of each node (None without one), age of each node's report in s."""

    round: int
    time: float
    summary: Mapping[str, Any]
    labels: Mapping[str, int | None]
    ages: Mapping[str, float | None]


def packed(value: object) -> bytes:
    """Return JSON, compressed."""
    return zlib.compress(json.dumps(value, separators=(",", ":")).encode(), 6)


def unpacked(blob: bytes) -> Any:
    """Return what `packed` took."""
    return json.loads(zlib.decompress(blob))


class History:
    """The database."""

    def __init__(
        self, directory: Path, settings: HistorySettings, step: Callable[[str], None] | None = None
    ) -> None:
        """Open it, made where there is none.

        Args:
            directory: where it is, made where there is none.
            settings: how much is kept.
            step: told the name of each step of a write before it is done, so that a test can stop there.

        Raises:
            ConfigError: another process has it, it is of a later version, damaged, or cannot be written.
        """
        self._settings = settings
        self._step = step or (lambda _: None)
        self._grouping: tuple[int, bytes] | None = None
        self._since_trim = 0
        path = directory / FILE
        try:
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._lock = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            wanted = f"a directory that can be written ({error.strerror})"
            raise ConfigError(directory, "state_dir", wanted) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(self._lock)
            wanted = "a directory of its own, and another scheduler runs with this one"
            raise ConfigError(directory, "state_dir", wanted) from None
        try:
            self._open(path)
        except sqlite3.Error as error:
            os.close(self._lock)
            wanted = f"a scheduler's history; move it away to begin anew ({error})"
            raise ConfigError(path, "", wanted) from error
        except ConfigError:
            os.close(self._lock)
            raise

    def _open(self, path: Path) -> None:
        fresh = not path.exists() or path.stat().st_size == 0
        self._db = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        if fresh:
            path.chmod(0o600)
            self._db.execute("PRAGMA auto_vacuum = INCREMENTAL")
        self._db.execute("PRAGMA journal_mode = WAL")
        self._db.execute("PRAGMA synchronous = NORMAL")
        self._db.execute("PRAGMA foreign_keys = ON")
        self._db.execute("PRAGMA busy_timeout = 5000")
        version = int(self._db.execute("PRAGMA user_version").fetchone()[0])
        if version > VERSION:
            self._db.close()
            wanted = f"a history of version {VERSION}, and a later crossedge wrote this one ({version})"
            raise ConfigError(path, "", wanted)
        if version == 0:
            self._step("schema")
            self._db.execute("BEGIN IMMEDIATE")
            for statement in SCHEMA.split(";"):
                if statement.strip():
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {VERSION}")
            self._db.execute("COMMIT")

    def close(self) -> None:
        """Close it and let another process have it."""
        with suppress(sqlite3.Error):
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._db.close()
        os.close(self._lock)

    def _write(self, work: Callable[[], None]) -> None:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            work()
            self._step("commit")
            self._db.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                self._db.execute("ROLLBACK")
            self._grouping = None
            raise

    def _run(self, statement: str, *values: object) -> None:
        self._step("statement")
        self._db.execute(statement, values)

    def save_round(
        self,
        row: RoundRow,
        nodes: Iterable[NodeRow],
        services: Iterable[ServiceRow],
        decisions: Sequence[tuple[str, str]],
        state: Mapping[str, object],
    ) -> None:
        """Keep a round, and everything that changed with it, in one transaction.

        Args:
            row: the round.
            nodes: those that reported since the last time.
            services: those that were decided.
            decisions: (service, JSON) of those that changed something.
            state: by key, what must outlive a restart.

        Raises:
            sqlite3.Error: the disk is full, or broken.
        """

        def work() -> None:
            self._step("groups")
            grouping = self._grouping_id(packed(dict(row.labels)))
            self._step("round")
            self._db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?, ?, ?, ?, ?)",
                (row.round, row.time, json.dumps(dict(row.summary)), grouping, packed(dict(row.ages))),
            )
            self._step("nodes")
            self._db.executemany(
                "INSERT INTO nodes VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO UPDATE SET"
                " name = excluded.name, last = excluded.last, seq = excluded.seq, serial = excluded.serial",
                [
                    (node.node_id, node.name, node.first, node.last, str(node.seq), str(node.serial))
                    for node in nodes
                ],
            )
            self._step("services")
            for service in services:
                self._db.execute(
                    "UPDATE services SET current = ?, decision = ? WHERE name = ?",
                    (json.dumps(service.current), service.decision, service.name),
                )
            self._step("decisions")
            self._db.executemany(
                "INSERT INTO decisions (round, time, service, decision) VALUES (?, ?, ?, ?)",
                [(row.round, row.time, service, decision) for service, decision in decisions],
            )
            self._step("state")
            self._db.executemany(
                "INSERT OR REPLACE INTO state VALUES (?, ?)",
                [(key, packed(value)) for key, value in state.items()],
            )

        self._write(work)
        self._since_trim += 1
        if self._since_trim >= TRIM_EVERY:
            self._since_trim = 0
            self.trim(row.time)

    def _grouping_id(self, labels: bytes) -> int:
        """Return the id of the round's groups: those of the round before where nothing changed."""
        if self._grouping is None:
            found = self._db.execute("SELECT id, labels FROM groupings ORDER BY id DESC LIMIT 1").fetchone()
            self._grouping = found
        if self._grouping is None or self._grouping[1] != labels:
            number = self._db.execute("INSERT INTO groupings (labels) VALUES (?)", (labels,)).lastrowid
            self._grouping = (int(number or 0), labels)
        return self._grouping[0]

    def trim(self, unix: float) -> int:
        """Delete what is too old, then the oldest rounds while it is too large; return how many went."""
        gone = 0

        def work() -> None:
            nonlocal gone
            self._step("trim")
            cut = unix - self._settings.days * 86_400
            gone = self._db.execute("DELETE FROM rounds WHERE time < ?", (cut,)).rowcount
            if self.size > self._settings.megabytes * 1e6:
                count = int(self._db.execute("SELECT count(*) FROM rounds").fetchone()[0])
                most = int(count * TRIM_SHARE) + 1
                gone += self._db.execute(
                    "DELETE FROM rounds WHERE round IN (SELECT round FROM rounds ORDER BY round LIMIT ?)",
                    (most,),
                ).rowcount
            if gone:
                self._step("trim-groups")
                self._db.execute(
                    "DELETE FROM groupings WHERE id NOT IN (SELECT grouping FROM rounds) AND id <"
                    " (SELECT max(id) FROM groupings)"
                )

        self._write(work)
        if gone:
            self._step("vacuum")
            self._db.execute("PRAGMA incremental_vacuum").fetchall()
            self._db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
        return gone

    @property
    def size(self) -> int:
        """Bytes in use, the free pages not counted."""
        pages, free, size = (
            int(self._db.execute(f"PRAGMA {name}").fetchone()[0])
            for name in ("page_count", "freelist_count", "page_size")
        )
        return (pages - free) * size

    def save_service(self, service: ServiceRow) -> None:
        """Keep a service that is new or changed."""

        def work() -> None:
            self._step("service")
            self._db.execute(
                "INSERT OR REPLACE INTO services VALUES (?, ?, ?, ?, ?, ?)",
                (
                    service.name,
                    service.spec,
                    service.created,
                    service.updated,
                    json.dumps(service.current),
                    service.decision,
                ),
            )

        self._write(work)

    def save_decision(self, service: ServiceRow, number: int, decision: str | None) -> None:
        """Keep a service and a decision that was made between two rounds, by the matrix of round `number`."""

        def work() -> None:
            self._step("decision")
            self._db.execute(
                "UPDATE services SET current = ?, decision = ? WHERE name = ?",
                (json.dumps(service.current), service.decision, service.name),
            )
            if decision is not None:
                self._db.execute(
                    "INSERT INTO decisions (round, time, service, decision)"
                    " SELECT round, time, ?, ? FROM rounds WHERE round = ?",
                    (service.name, decision, number),
                )

        self._write(work)

    def drop_service(self, name: str) -> None:
        """Forget a service; its past decisions stay."""
        self._write(lambda: self._run("DELETE FROM services WHERE name = ?", name))

    def drop_nodes(self, before: float) -> None:
        """Forget the nodes that were last heard before this Unix time."""
        self._write(lambda: self._run("DELETE FROM nodes WHERE last < ?", before))

    def nodes(self) -> list[NodeRow]:
        """Return all nodes that are kept."""
        rows = self._db.execute("SELECT id, name, first, last, seq, serial FROM nodes").fetchall()
        return [
            NodeRow(id_, name, first, last, int(seq), int(serial))
            for id_, name, first, last, seq, serial in rows
        ]

    def services(self) -> list[ServiceRow]:
        """Return all services."""
        rows = self._db.execute(
            "SELECT name, spec, created, updated, current, decision FROM services"
        ).fetchall()
        return [
            ServiceRow(name, spec, created, updated, tuple(json.loads(current)), decision)
            for name, spec, created, updated, current, decision in rows
        ]

    def state(self, key: str) -> Any:
        """Return what was kept under a key, None where there is nothing."""
        row = self._db.execute("SELECT value FROM state WHERE key = ?", (key,)).fetchone()
        return None if row is None else unpacked(row[0])

    def last_round(self) -> int:
        """Return the number of the last round, 0 where there is none."""
        return int(self._db.execute("SELECT coalesce(max(round), 0) FROM rounds").fetchone()[0])

    def rounds(self, limit: int, before: int | None = None) -> list[dict[str, Any]]:
        """Return the figures of rounds, newest first."""
        rows = self._db.execute(
            "SELECT round, time, summary FROM rounds WHERE round < ? ORDER BY round DESC LIMIT ?",
            (2**62 if before is None else before, min(limit, PAGE_LIMIT)),
        ).fetchall()
        return [{"round": number, "time": at, **json.loads(summary)} for number, at, summary in rows]

    def round(self, number: int) -> dict[str, Any] | None:
        """Return one round with the group and the report's age of every node, None where there is none."""
        row = self._db.execute(
            "SELECT round, time, summary, labels, ages FROM rounds JOIN groupings ON grouping = groupings.id"
            " WHERE round = ?",
            (number,),
        ).fetchone()
        if row is None:
            return None
        found, at, summary, labels, ages = row
        return {
            "round": found,
            "time": at,
            **json.loads(summary),
            "labels": unpacked(labels),
            "ages_s": unpacked(ages),
        }

    def decisions(self, limit: int, service: str | None, before: int | None) -> list[dict[str, Any]]:
        """Return decisions that changed something, newest first."""
        rows = self._db.execute(
            "SELECT id, round, time, service, decision FROM decisions"
            " WHERE id < ? AND (? IS NULL OR service = ?) ORDER BY id DESC LIMIT ?",
            (2**62 if before is None else before, service, service, min(limit, PAGE_LIMIT)),
        ).fetchall()
        return [
            {"id": id_, "round": number, "time": at, "service": name, **json.loads(decision)}
            for id_, number, at, name, decision in rows
        ]

    def check(self) -> list[str]:
        """Return what is inconsistent, for tests and for `show`: nothing, whatever killed the writer."""
        faults = [row[0] for row in self._db.execute("PRAGMA integrity_check").fetchall() if row[0] != "ok"]
        faults += [f"foreign key: {row}" for row in self._db.execute("PRAGMA foreign_key_check").fetchall()]
        last = self._db.execute("SELECT max(round) FROM rounds").fetchone()[0]
        kept = self.state("round")
        if last is not None and kept != last:
            faults.append(f"the state is of round {kept}, the last round is {last}")
        return faults
