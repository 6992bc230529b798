"""What must survive a restart, in files of the state directory.

    floors.json   the bound above every sequence number in use, and the last time that was surely known
    members       verified (record, certificate) pairs, and the members with traffic with their endpoints
    blocklist     the newest signed blocklist, so that nobody can roll it back
    lock          held while the daemon runs: two that share their numbers would void each other's

Each file is replaced as a whole, flushed, then renamed. A file that cannot be read is put aside as
NAME.damaged and named in `problems`; the daemon starts without it, because everything but the blocklist comes
back from the network, and an older blocklist from the bundle. Shell: it blocks; only `reserve` has to be
called in place, the rest may run in a thread.
"""

from __future__ import annotations

import fcntl
import json
import os
import threading
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from crossedge.host.files import write_atomic
from crossedge.wire.codec import dump, load
from crossedge.wire.endpoint import UdpEndpoint, pack_endpoint, unpack_endpoint
from crossedge.wire.errors import ConfigError, WireError
from crossedge.wire.limits import MAX_BLOCKLIST, MAX_CERTIFICATE, MAX_RECORD

FLOORS: Final = "floors.json"
MEMBERS: Final = "members"
BLOCKLIST: Final = "blocklist"
LOCK: Final = "lock"

FORMAT: Final = 1
MAX_MEMBERS: Final = 16_384
MAX_MEMBERS_SIZE: Final = MAX_MEMBERS * (MAX_RECORD + MAX_CERTIFICATE + 64)
MAX_FLOORS_SIZE: Final = 4096
MODE: Final = 0o600

Pair = tuple[bytes, bytes]
Active = tuple[bytes, UdpEndpoint | None]


@dataclass(frozen=True, slots=True)
class Members:
    """What was known of others; untrusted until the directory has verified it anew."""

    records: tuple[Pair, ...] = ()
    """(record, certificate)."""
    active: tuple[Active, ...] = ()
    """(node id, the endpoint that was proven last) of members with traffic."""


class StateStore:
    """The state directory of one daemon, locked as long as this is open."""

    def __init__(self, directory: Path) -> None:
        """Make the directory where it is missing, lock it, and read the floors.

        `ConfigError` where it cannot be used, or another daemon uses it.
        """
        self.directory = directory
        self._writing = threading.Lock()
        self.problems: list[str] = []
        """What was wrong with files, one line each, for the log."""
        self.sequence = 0
        """The durable bound above all sequence numbers that were ever used."""
        self.known_time = 0.0
        """Unix time that had surely passed when it was saved; 0.0 if never."""
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, MODE)
        except OSError as error:
            raise ConfigError(directory, "", f"a directory to keep state in ({error.strerror})") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise ConfigError(directory, "", "a state directory that no other meshd is using") from error
        self._sweep()
        self._read_floors()

    def close(self) -> None:
        """Give the directory up."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> StateStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- Floors ---------------------------------------------------------------------------------------

    def reserve(self, bound: int) -> None:
        """Make it durable that numbers up to `bound` may be in use; `OSError` where that fails."""
        self._write_floors(bound, 0.0)

    def save_time(self, unix: float) -> None:
        """Make the last known time durable; it never goes back."""
        self._write_floors(0, unix)

    def _write_floors(self, sequence: int, unix: float) -> None:
        with self._writing:
            sequence, unix = max(sequence, self.sequence), max(unix, self.known_time)
            floors = {"format": FORMAT, "sequence": sequence, "unix": unix}
            write_atomic(self.directory / FLOORS, json.dumps(floors).encode() + b"\n", MODE)
            self.sequence, self.known_time = sequence, unix

    def _read_floors(self) -> None:
        data = self._read(FLOORS, MAX_FLOORS_SIZE)
        if data is None:
            return
        try:
            floors = json.loads(data)
            sequence, unix = floors["sequence"], floors["unix"]
            if type(sequence) is not int or not 0 <= sequence < 2**64:
                raise ValueError("sequence")
            if type(unix) not in (int, float) or not 0 <= unix < 2**40:
                raise ValueError("unix")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            self._put_aside(FLOORS, f"not what was written there ({error})")
            return
        self.sequence, self.known_time = sequence, float(unix)

    # --- Members --------------------------------------------------------------------------------------

    def save_members(self, records: Sequence[Pair], active: Iterable[Active]) -> None:
        """Make known members durable; `OSError` where that fails."""
        packed = {
            "format": FORMAT,
            "records": [list(pair) for pair in records[:MAX_MEMBERS]],
            "active": [[node, b"" if at is None else pack_endpoint(at)] for node, at in active],
        }
        write_atomic(self.directory / MEMBERS, dump(packed), MODE)

    def load_members(self) -> Members:
        """Return what was saved; nothing where nothing was, or it is damaged."""
        data = self._read(MEMBERS, MAX_MEMBERS_SIZE)
        if data is None:
            return Members()
        try:
            return _members(load(data, MAX_MEMBERS_SIZE))
        except WireError as error:
            self._put_aside(MEMBERS, str(error))
            return Members()

    # --- Blocklist ------------------------------------------------------------------------------------

    def save_blocklist(self, encoded: bytes) -> None:
        """Make a blocklist durable; `OSError` where that fails. The caller has verified it."""
        write_atomic(self.directory / BLOCKLIST, encoded, MODE)

    def load_blocklist(self) -> bytes | None:
        """Return the saved blocklist, to be verified; None where there is none."""
        return self._read(BLOCKLIST, MAX_BLOCKLIST)

    def refuse_blocklist(self, why: str) -> None:
        """Put a saved blocklist aside that turned out not to hold."""
        self._put_aside(BLOCKLIST, why)

    # --- Inside ---------------------------------------------------------------------------------------

    def _read(self, name: str, limit: int) -> bytes | None:
        try:
            with (self.directory / name).open("rb") as file:
                data = file.read(limit + 1)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._put_aside(name, error.strerror or "unreadable")
            return None
        if len(data) > limit:
            self._put_aside(name, f"larger than {limit} bytes")
            return None
        return data

    def _put_aside(self, name: str, why: str) -> None:
        path = self.directory / name
        self.problems.append(f"{path}: put aside as {name}.damaged: {why}")
        with suppress(OSError):
            path.replace(self.directory / f"{name}.damaged")

    def _sweep(self) -> None:
        """Remove what a crash left of a file that was being written."""
        for name in (FLOORS, MEMBERS, BLOCKLIST):
            for path in self.directory.glob(f".{name}.*"):
                with suppress(OSError):
                    path.unlink()


def _members(values: dict[str, object]) -> Members:
    """Return the members in an untrusted map; raises only `WireError`."""
    records, active = values.get("records"), values.get("active")
    if values.get("format") != FORMAT or type(records) is not tuple or type(active) is not tuple:
        raise WireError("malformed", "members")
    for pair in (*records, *active):
        if type(pair) is not tuple or len(pair) != 2 or not all(type(item) is bytes for item in pair):
            raise WireError("malformed", "members")
    return Members(
        records, tuple((node, unpack_endpoint(packed) if packed else None) for node, packed in active)
    )
