"""The probes of one path that were not answered yet, and what it means that one is not.

A lost probe speaks of the path only if its far end was there. A peer that restarted says so itself, by a new
handshake, and a little later than the first probes are missed: so no loss counts before its probe is
TIMEOUT_MAX old, nor while the path is in doubt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from crossedge.latency.estimator import TIMEOUT_MAX
from crossedge.meshd.inner import Probe

MAX_OUTSTANDING: Final = 32  # probes that may be unanswered at a time


@dataclass(slots=True)
class Sent:
    """A probe on its way; times in seconds of `now`."""

    at: float
    size: int  # of the UDP payload, in bytes
    full: bool  # whether its answer is to be as large
    rung: bool  # whether it tests a size; its loss says nothing about the path
    burst: bool  # whether it measures a pair without traffic
    counts: bool  # whether it tells how much the path loses
    overdue: float
    missed: bool = False


class Outstanding:
    """The probes without an answer; at most MAX_OUTSTANDING, of which the oldest is forgotten."""

    __slots__ = ("_sent", "_withheld")

    def __init__(self) -> None:
        self._sent: dict[int, Sent] = {}
        self._withheld: list[Sent] = []
        """What was lost while the path was in doubt."""

    def add(self, number: int, sent: Sent) -> None:
        """Remember a probe under its id."""
        if len(self._sent) >= MAX_OUTSTANDING:
            del self._sent[next(iter(self._sent))]
        self._sent[number] = sent

    def answered(self, number: int) -> Sent | None:
        """Forget and return the probe with this id; None where there is none."""
        return self._sent.pop(number, None)

    def leaves(self, probe: Probe, now: float) -> None:
        """Note that a probe leaves only now: its time counts from here."""
        sent = self._sent.get(probe.id)
        if sent is not None:
            sent.overdue += now - sent.at
            sent.at = now

    def overdue(self, now: float) -> list[Sent]:
        """Return the probes whose time is up now, each once."""
        late = [sent for sent in self._sent.values() if not sent.missed and now >= sent.overdue]
        for sent in late:
            sent.missed = True
        return late

    def gone(self, now: float, *, doubt: bool) -> list[Sent]:
        """Forget and return the probes that are lost; in `doubt` they are returned when that has ended."""
        old = [number for number, sent in self._sent.items() if now - sent.at >= TIMEOUT_MAX]
        lost = [*self._withheld, *(self._sent.pop(number) for number in old)]
        self._withheld = lost[-MAX_OUTSTANDING:] if doubt else []
        return [] if doubt else lost

    def forgive(self) -> None:
        """Let no probe count that is not answered yet: the far end was not there, or had no keys."""
        self._withheld.clear()
        for sent in self._sent.values():
            sent.counts = False

    @property
    def bursting(self) -> bool:
        """Whether a probe of a burst may still be answered in time."""
        return any(sent.burst and not sent.missed for sent in self._sent.values())

    def end_burst(self) -> int:
        """Forget the probes of a burst; return how many."""
        numbers = [number for number, sent in self._sent.items() if sent.burst]
        for number in numbers:
            del self._sent[number]
        return len(numbers)

    def deadlines(self) -> list[float]:
        """Return when probes are overdue that are not yet, in seconds of `now`."""
        return [sent.overdue for sent in self._sent.values() if not sent.missed]

    def clear(self) -> None:
        """Forget all of them."""
        self._sent.clear()
        self._withheld.clear()
