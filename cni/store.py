"""The durable store of addresses: a log that every process of the node may append to, under one lock.

    line := CRC-32 of the JSON text (8 hex digits) SPACE JSON text LF

The last line of a serial number holds. A line is one write, and what is written survives the death of its
writer; `sync` makes it survive that of the machine as well, for all who wait at the price of one flush. A
damaged line (power failed while it was written) was never acknowledged, and is passed over. The log is
rewritten by a temporary file, flushed, renamed, its directory flushed, when most of it is history.

Lock first, then clock: the time of a change is read under the lock, so later changes have later times.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from crossedge.cni.ipam import Entry, Ledger
from crossedge.cni.spec import IO_FAILURE, CniError
from crossedge.host.files import sync_directory, write_atomic

LOG: Final = "attachments.log"
LOCK: Final = "lock"
STRIPES: Final = 64
"""Locks of attachments; two attachments rarely share one, and wait for each other if they do."""
REWRITE: Final = 256
"""Lines of history, beside as many as there are entries, after which the log is rewritten."""


class Store:
    """The ledger of a node and its file; for many threads and processes."""

    def __init__(self, directory: Path, boot: str, clock: Callable[[], float]) -> None:
        """Nothing is opened before the first use.

        Args:
            directory: where it is kept; made if missing.
            boot: id of this boot.
            clock: seconds since boot.
        """
        self._directory = directory
        self._boot = boot
        self._clock = clock
        self._mutex = threading.RLock()
        self._syncing = threading.Lock()
        self._lock = -1
        self._log = -1
        self._inode = 0
        self._offset = 0
        self._lines = 0
        self._damaged = False
        self._synced = (0, 0)
        self._directory_dirty = True
        self.ledger = Ledger(boot)

    def close(self) -> None:
        """Close the files."""
        with self._mutex:
            for descriptor in (self._lock, self._log):
                if descriptor >= 0:
                    os.close(descriptor)
            self._lock = self._log = -1
            self._inode = 0

    @contextmanager
    def transaction(self) -> Iterator[Transaction]:
        """Hold the lock; `ledger` is as the disk has it, and what is put is appended at the end by one write.

        Raises:
            CniError: code 5, the store cannot be used; then nothing has changed.
        """
        with self._mutex:
            try:
                self._open()
                fcntl.flock(self._lock, fcntl.LOCK_EX)
            except OSError as error:
                raise self._failure(error) from error
            try:
                try:
                    self._refresh()
                except OSError as error:
                    raise self._failure(error) from error
                change = Transaction(self.ledger, self._clock())
                yield change
                if change.put_entries:
                    self._append(change.put_entries)
            finally:
                fcntl.flock(self._lock, fcntl.LOCK_UN)

    def look(self) -> Ledger:
        """Return the ledger as the disk has it now, not to be changed; code 5 as `transaction`."""
        with self.transaction() as change:
            return change.ledger

    def check(self) -> None:
        """See that it can be written, as far as that can be told without writing; code 5 as `transaction`."""
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            space = os.statvfs(self._directory)
        except OSError as error:
            raise self._failure(error) from error
        number = errno.EROFS if space.f_flag & os.ST_RDONLY else 0
        if space.f_blocks and not space.f_bfree:
            number = errno.ENOSPC
        if number:
            raise self._failure(OSError(number, os.strerror(number)))

    def sync(self) -> None:
        """Make all that was put so far durable; those who wait together are served by one flush."""
        with self._mutex:
            wanted = self._inode, self._offset
        with self._syncing:
            inode, offset = self._synced
            if inode == wanted[0] and offset >= wanted[1]:
                return
            with self._mutex:
                if self._log < 0:
                    return
                reached = self._inode, self._offset
                descriptor = os.dup(self._log)
            try:
                os.fdatasync(descriptor)
                if self._directory_dirty:
                    sync_directory(self._directory)
                    self._directory_dirty = False
            except OSError as error:
                raise self._failure(error) from error
            finally:
                os.close(descriptor)
            self._synced = reached

    @contextmanager
    def attachment(self, key: tuple[str, str], *, wait: bool = True) -> Iterator[bool]:
        """Hold an attachment, against every other process and thread; False if not `wait` and it is held."""
        number = zlib.crc32("\0".join(key).encode()) % STRIPES
        try:
            descriptor = _opened(self._directory / f"{LOCK}.{number}")
        except FileNotFoundError:
            with self._mutex:
                try:
                    self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                except OSError as error:
                    raise self._failure(error) from error
            with self.attachment(key, wait=wait) as held:
                yield held
            return
        except OSError as error:
            raise self._failure(error) from error
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = True
            except BlockingIOError:
                held = False
            yield held
        finally:
            os.close(descriptor)

    def _failure(self, error: OSError) -> CniError:
        return CniError(
            IO_FAILURE, f"cannot use the address store {self._directory}: {error.strerror or error}"
        )

    def _open(self) -> None:
        """Open the lock, or another that took its place when somebody removed the directory."""
        path = self._directory / LOCK
        if self._lock >= 0:
            try:
                if os.stat(path).st_ino == os.fstat(self._lock).st_ino:
                    return
            except FileNotFoundError:
                pass
            os.close(self._lock)
            self._lock = -1
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._lock = _opened(path)

    def _refresh(self) -> None:
        """Read what others have appended, or all of a log that was replaced."""
        path = self._directory / LOG
        try:
            inode = os.stat(path).st_ino if self._log >= 0 else 0
        except FileNotFoundError:
            inode = 0
        if self._log < 0 or inode != self._inode:
            if self._log >= 0:
                os.close(self._log)
                self._log = -1
            self._log = _opened(path, os.O_APPEND)
            self._inode = os.fstat(self._log).st_ino
            self._directory_dirty = True
            self._offset = self._lines = 0
            self._damaged = False
            self.ledger = Ledger(self._boot)
        size = os.fstat(self._log).st_size
        if size < self._offset:  # somebody took back a write that failed half-way
            self._offset = self._lines = 0
            self.ledger = Ledger(self._boot)
        if size > self._offset:
            data = b""
            while len(data) < size - self._offset:
                part = os.pread(self._log, size - self._offset - len(data), self._offset + len(data))
                if not part:
                    break
                data += part
            self._take(data)
            self._offset += len(data)
            self._damaged = self._damaged or not data.endswith(b"\n")
        if self._damaged or self._lines > REWRITE + 2 * len(self.ledger.entries):
            self.ledger.expire(self._clock())
            if self._damaged or self._lines > REWRITE + 2 * len(self.ledger.entries):
                try:
                    self._rewrite()
                except OSError as error:
                    if error.errno not in (errno.EROFS, errno.ENOSPC):
                        raise  # else the log stays as long as it is

    def _take(self, data: bytes) -> None:
        for line in data.split(b"\n"):
            if not line:
                continue
            self._lines += 1
            try:
                if int(line[:8], 16) != zlib.crc32(line[9:]):
                    raise ValueError("checksum")
                self.ledger.apply(Entry.from_json(json.loads(line[9:])))
            except (ValueError, TypeError, KeyError):
                self._damaged = True

    def _rewrite(self) -> None:
        kept = [entry for _, entry in sorted(self.ledger.entries.items())]
        data = b"".join(map(_line, kept))
        write_atomic(self._directory / LOG, data, 0o600)
        os.close(self._log)
        self._log = -1
        self._log = os.open(self._directory / LOG, os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
        self._inode = os.fstat(self._log).st_ino
        self._offset, self._lines, self._damaged = len(data), len(kept), False

    def _append(self, entries: list[Entry]) -> None:
        data = b"".join(map(_line, entries))
        try:
            if not fcntl.fcntl(self._log, fcntl.F_GETFL) & os.O_RDWR:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            written = os.write(self._log, data)
            if written != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):  # a read-only file has nothing to be taken back
                os.ftruncate(self._log, self._offset)
            raise self._failure(error) from error
        self._offset += len(data)
        self._lines += len(entries)
        for entry in entries:
            self.ledger.apply(entry)


class Transaction:
    """A change of the store, made as a whole."""

    def __init__(self, ledger: Ledger, now: float) -> None:
        self.ledger = ledger
        self.now = now
        """Seconds since boot, read under the lock."""
        self.put_entries: list[Entry] = []

    def put(self, entry: Entry) -> Entry:
        """Store an entry in place of the one with its serial number."""
        self.put_entries.append(entry)
        return entry


def _opened(path: Path, flags: int = 0) -> int:
    """Open a file to be locked, read and written, and made if missing; only to be read where it must be."""
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)
    except OSError as error:
        if error.errno != errno.EROFS:
            raise
        with suppress(FileNotFoundError):
            return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        raise


def _line(entry: Entry) -> bytes:
    text = json.dumps(entry.to_json(), separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)
