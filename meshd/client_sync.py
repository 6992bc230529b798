"""Keeping up with a rendezvous' directory: what is held, what to ask next.

A version is (epoch, n). Within an epoch the difference is asked for; in a new one (the server restarted, or
we did) digests of what is held go out, range by range of node ids, and only what differs comes back.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

from crossedge.wire.messages import MAX_KNOWN, MAX_WINDOW, Message, Page, Pull, PullDigests

FIRST_ID: Final = bytes(16)
LAST_ID: Final = b"\xff" * 16

Known = Callable[[], list[tuple[bytes, int]]]


class DirectorySync:
    """The state of one pull after the other. Core."""

    def __init__(self, known: Known, window: int = MAX_WINDOW) -> None:
        """`known()` returns (node id, sequence number) of every record that is held, by node id."""
        self.epoch = 0
        self.version = 0
        """What is held of `epoch`; nothing before the first pull has ended."""
        self.seen_epoch = 0
        self.seen_version = 0
        """The newest that the server spoke of."""
        self._known = known
        self._window = window
        self._ranges: list[tuple[bytes, int]] | None = None
        self._cursor = FIRST_ID
        self._last = LAST_ID
        self._since = 0
        self._target = 0
        self._oldest: int | None = None
        self._expected = 0
        self._early: dict[int, Page] = {}

    @property
    def behind(self) -> bool:
        """Whether there is something to pull."""
        return (self.epoch, self.version) != (self.seen_epoch, self.seen_version) and bool(self.seen_epoch)

    def heard(self, epoch: int, version: int) -> None:
        """Take the directory version that a message spoke of."""
        if epoch != self.seen_epoch:
            self.seen_epoch, self.seen_version = epoch, version
        else:
            self.seen_version = max(self.seen_version, version)

    def begin(self) -> None:
        """Start a pull: the difference if there is a common history, everything if nothing is held."""
        self._ranges = None
        self._since = 0
        self._target = self.seen_version
        if self.epoch == self.seen_epoch:
            self._since = self.version
            return
        known = self._known()
        if known:
            self._begin_digests(known)

    def begin_digests(self) -> None:
        """Start over without a common history: the server said that it has none."""
        self._begin_digests(self._known())

    def _begin_digests(self, known: list[tuple[bytes, int]]) -> None:
        self._ranges = known
        self._target = self.seen_version
        self._cursor = FIRST_ID
        self._oldest = None
        self._oldest = None

    def request(self, request_id: int, now: float) -> Message:  # noqa: ARG002 - made as all requests are
        """Return the next question; pages that answered an earlier one count no more."""
        self._expected = 0
        self._early.clear()
        if self._ranges is None:
            return Pull(id=request_id, epoch=self.seen_epoch, since=self._since, window=self._window)
        at = bisect_left(self._ranges, (self._cursor, 0))
        known = self._ranges[at : at + MAX_KNOWN]
        self._last = known[-1][0] if at + MAX_KNOWN < len(self._ranges) else LAST_ID
        return PullDigests(
            id=request_id, first=self._cursor, last=self._last, known=tuple(known), window=self._window
        )

    def take(self, page: Page) -> bool | None:
        """Take a page of the current question (its epoch must be `seen_epoch`), in any order.

        Returns True if the pull has ended, False if the next question is due, None if pages are to come.
        """
        if self._expected <= page.index < self._window:
            self._early[page.index] = page
        while self._expected in self._early:
            page = self._early.pop(self._expected)
            self._expected += 1
            outcome = self._advance(page) if self._ranges is None else self._advance_range(page)
            if outcome is not None:
                return outcome
        return None

    def _advance(self, page: Page) -> bool | None:
        advanced = page.version > self._since
        self._since = page.version
        if not page.more or not advanced:  # an answer that leads nowhere ends the pull
            self._hold(page.version)
            return True
        return False if self._expected == self._window else None

    def _advance_range(self, page: Page) -> bool | None:
        # What changes while the ranges are gone through may be behind us: the oldest version is what is held.
        self._oldest = page.version if self._oldest is None else min(self._oldest, page.version)
        if page.next:
            if page.next <= self._cursor:
                self._hold(self._oldest)  # likewise
                return True
            self._cursor = page.next
            return False
        if page.more:
            return None
        if self._last == LAST_ID:
            self._hold(self._oldest)
            return True
        self._cursor = (int.from_bytes(self._last, "big") + 1).to_bytes(16, "big")
        return False

    def _hold(self, version: int) -> None:
        self.epoch, self.version = self.seen_epoch, version
        if self.seen_version == self._target:  # else there is news from while we pulled
            self.seen_version = version
        self._ranges = None
