"""How many datagrams a record and a train may have, by what the receiver reports of loss and rate.

A record of many datagrams costs one call of the cipher at each end where one-datagram records cost one for
each. But a lost datagram takes its whole record along. So a link begins with records of one datagram; where
reports show that all of some hundreds arrived, records grow to what the path moves in a millisecond; and the
first report of a loss brings them back to one, for a while that doubles with each loss that follows soon.

A train is one packet to its own host's queues, whole until it leaves. At 20 Mbit/s a long one is in the way
of what comes behind it for 25 ms, and what it carried is acknowledged in one lump, from which BBR concludes
that more has to be on its way. So trains take no more than a millisecond of the measured rate either, lossy
or not. Where little is sent little is measured and trains are short; that costs calls, but few of them, and
the first report of bulk, some 10 ms after its beginning, makes them long again.

Receiver: `Tally` in each keypair counts what was opened and says when a report is due.
Sender: `Growth` in each link takes the reports.
"""

from __future__ import annotations

from typing import Final

RECORD_DATAGRAMS: Final = 64  # at most, so that a record is one train
REPORT_INTERVAL: Final = 0.1  # seconds between reports while superframes come
REPORT_DATAGRAMS: Final = 512  # or so many datagrams since the last one,
REPORT_SIZE: Final = 512  # bytes; a shorter packet that comes alone is not bulk and calls for no report
REPORT_LEAST: Final = 0.01  # but not sooner than this, in seconds; a loss is reported as soon

RECORD_TIME: Final = 0.001  # seconds of the measured rate that one record or train may take
RATE_DECAY: Final = 0.25  # of the measured rate is left after REPORT_INTERVAL, while less is found
STEADY: Final = 1.5 * REPORT_INTERVAL  # seconds; before a report that took longer there was a pause
PROVEN_DATAGRAMS: Final = 256  # that must have come without a loss before records grow
PAUSE_FIRST: Final = 1.0  # seconds after a loss without growth,
PAUSE_MOST: Final = 30.0  # at most,
PAUSE_RESET: Final = 10.0  # and at first again after so many seconds without loss behind a pause


class Tally:
    """What was opened under one keypair: in a superframe's direction every datagram has a number."""

    __slots__ = ("_at", "_lost", "_opened", "end", "opened", "quiet")

    def __init__(self) -> None:
        self.end = 0
        """One more than the highest number of a datagram that was opened."""
        self.opened = 0
        """How many datagrams were opened."""
        self.quiet = float("-inf")
        """Until then, in seconds of `now`, no report is due."""
        self._at = float("-inf")
        self._opened = 0
        self._lost = 0

    def add(self, counter: int, count: int) -> None:
        """Count `count` datagrams that were opened, from number `counter` on."""
        self.opened += count
        if counter + count > self.end:
            self.end = counter + count

    def due(self, now: float) -> bool:
        """Tell whether to send a report, asked after datagrams were opened; it then counts as sent."""
        if now < self.quiet:
            return False
        waited = now - self._at
        lost = self.end - self.opened
        if waited < REPORT_INTERVAL and lost <= self._lost and self.opened - self._opened < REPORT_DATAGRAMS:
            return False
        self._at, self._opened, self._lost = now, self.opened, lost
        self.quiet = now + REPORT_LEAST
        return True


class Growth:
    """The length of records towards one peer, in datagrams."""

    __slots__ = (
        "_at",
        "_clean",
        "_datagrams",
        "_end",
        "_opened",
        "_pause",
        "_rate",
        "_receiver",
        "_resume",
        "measures",
        "train",
    )

    def __init__(self) -> None:
        self._datagrams = 1
        self.measures = object()
        """Another object after each change of how long records may be, or of what else decides about it."""
        self.train = RECORD_DATAGRAMS
        """A train of bulk may have so many datagrams now: as many as there can be until a rate is known."""
        self._receiver = -1
        self._end = 0
        self._opened = 0
        self._clean = 0
        self._at = float("-inf")
        self._rate = 0.0
        self._pause = PAUSE_FIRST
        self._resume = float("-inf")

    @property
    def datagrams(self) -> int:
        """A record may fill so many datagrams now."""
        return self._datagrams

    @datagrams.setter
    def datagrams(self, count: int) -> None:
        if count != self._datagrams:
            self._datagrams = count
            self.changed()

    def changed(self) -> None:
        """Let what was worked out by `measures` be worked out again."""
        self.measures = object()

    def report(self, receiver: int, end: int, opened: int, now: float) -> None:
        """Take a report: under the keypair with this receiver index, `opened` datagrams of `end` were opened.

        One that is older than the last one says nothing.
        """
        if receiver != self._receiver:  # another keypair, and it counts from 0
            self._receiver, self._end, self._opened, self._at = receiver, end, opened, now
            return
        came, lost = opened - self._opened, (end - opened) - (self._end - self._opened)
        if came < 0 or end < self._end:
            return
        elapsed = now - self._at
        self._end, self._opened, self._at = end, opened, now
        self._measure(came, elapsed)
        if lost > 0:
            self._lost(now)
            return
        self._clean += came
        if now < self._resume or self._clean < PROVEN_DATAGRAMS or not self._rate:
            return
        if now - self._resume > PAUSE_RESET:
            self._pause = PAUSE_FIRST
        self.datagrams = self.train

    def restart(self) -> None:
        """Begin anew: the path is another one."""
        self.datagrams = 1
        self.train = RECORD_DATAGRAMS
        self._rate = 0.0
        self._clean = 0

    def _measure(self, came: int, elapsed: float) -> None:
        """Follow the rate.

        A pause in the traffic says nothing about the path. Reports that were held up arrive together, but
        were not sent sooner than they may be.
        """
        if elapsed > STEADY:
            return
        kept = RATE_DECAY ** (elapsed / REPORT_INTERVAL)
        self._rate = max(came / max(elapsed, REPORT_LEAST), self._rate * kept)
        self.train = max(1, min(RECORD_DATAGRAMS, int(self._rate * RECORD_TIME)))

    def _lost(self, now: float) -> None:
        self.datagrams = 1
        self._clean = 0
        if now >= self._resume:
            self._resume = now + self._pause
            self._pause = min(PAUSE_MOST, 2 * self._pause)
