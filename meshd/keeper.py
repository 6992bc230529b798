"""Writes what must survive a restart, in a thread: a slow disk must not hold up packets.

One write at a time, in order. A change of the members is written soon, but while they keep changing only now
and then, because edge hosts keep their state in flash that wears. What is as it was is not written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

from crossedge.meshd.state import Active, Pair, StateStore

SOON: Final = 1.0  # seconds between a change worth keeping and its write
PACE: Final = 20_000  # bytes of members per second that are written at most, in the long run
TIME_AGAIN: Final = 600.0  # seconds between two writes of the time

log = logging.getLogger("meshd")


class Keeper:
    """The writing side of a state directory."""

    def __init__(self, store: StateStore) -> None:
        self._store = store
        self._worker = ThreadPoolExecutor(1, "state")
        self._written: tuple[frozenset[Pair], frozenset[Active]] | None = None
        self._members_at = float("-inf")
        self._size = 0
        self._time_at = float("-inf")
        self._bound = 0
        self._problem = ""

    def close(self) -> None:
        """Wait for what is being written."""
        self._worker.shutdown()

    def wait(self) -> None:
        """Wait for what is to be written until now."""
        self._worker.submit(int).result()

    def delay(self, now: float) -> float:
        """Return in how many seconds a change of the members should be written."""
        return max(SOON, self._members_at + self._size / PACE - now)

    def has_active(self, active: Sequence[Active]) -> bool:
        """Tell whether these are the members with traffic that are kept."""
        return self._written is not None and self._written[1] == frozenset(active)

    def members(self, records: Sequence[Pair], active: Sequence[Active], now: float) -> None:
        """Keep the members, if they are others than those that are kept."""
        picture = (frozenset(records), frozenset(active))
        if picture == self._written:
            return
        self._written, self._members_at = picture, now
        self._size = sum(len(record) + len(certificate) for record, certificate in records)
        self._submit(lambda: self._store.save_members(records, active), self._forget)

    def _forget(self) -> None:
        self._written = None

    def time(self, unix: float, now: float, *, last: bool = False) -> None:
        """Keep a time that has surely passed: now and then, and when the daemon ends (`last`)."""
        if last or now - self._time_at >= TIME_AGAIN:
            self._time_at = now
            self._submit(lambda: self._store.save_time(unix))

    def reserve(self, bound: int, done: Callable[[int], object]) -> None:
        """Keep a bound of sequence numbers; `done(bound)` is called, in another thread, once it is durable.

        0 is for a bound that was in vain before, if there is one.
        """
        bound = max(bound, self._bound)
        if bound <= self._store.sequence:
            return

        def work() -> None:
            self._store.reserve(bound)
            done(bound)

        self._submit(work)

    def reserve_now(self, bound: int) -> None:
        """Keep a bound of sequence numbers before this returns; where the disk takes none, the mesh goes on.

        The next start then has the clock alone to stay above the numbers of this life.
        """
        self._bound = bound
        self._try(lambda: self._store.reserve(bound))

    def blocklist(self, encoded: bytes) -> None:
        """Keep a blocklist."""
        self._submit(lambda: self._store.save_blocklist(encoded))

    def _submit(self, work: Callable[[], None], failed: Callable[[], None] | None = None) -> None:
        self._worker.submit(self._try, work, failed)

    def _try(self, work: Callable[[], None], failed: Callable[[], None] | None = None) -> None:
        """Say what cannot be written, once until something can be again; nothing here is worth an end."""
        try:
            work()
        except OSError as error:
            if str(error) != self._problem:
                log.error("state cannot be written: %s", error)
            self._problem = str(error)
            if failed is not None:
                failed()
        else:
            self._problem = ""
