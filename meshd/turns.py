"""Whose turn it is: the peers that something happened to, and those whose deadline is there."""

from __future__ import annotations

from typing import Final, Generic, Protocol, TypeVar

from crossedge.meshd.deadlines import Deadlines

PUMPS_MAX: Final = 100_000  # turns in a row before the loop counts as endless


class Turn(Protocol):
    """What has turns."""

    def pump(self, now: float) -> None:
        """Send what is due after something happened."""

    def handle_timeout(self, now: float) -> None:
        """Do what is due by the clock, then pump."""

    def deadline(self, now: float) -> float | None:
        """Return when `handle_timeout` has something to do; None: never."""


Item = TypeVar("Item", bound=Turn)


class Turns(Generic[Item]):
    """The turns of many; all times in seconds of the caller's `now`."""

    __slots__ = ("_deadlines", "_touched")

    def __init__(self) -> None:
        self._touched: dict[Item, None] = {}
        self._deadlines: Deadlines[Item] = Deadlines()

    def __bool__(self) -> bool:
        """Tell whether anybody waits to be pumped."""
        return bool(self._touched)

    def touch(self, item: Item) -> None:
        """Pump this one soon."""
        self._touched[item] = None

    def forget(self, item: Item) -> None:
        """Give it no turn any more."""
        self._touched.pop(item, None)
        self._deadlines.set(item, None)

    def pump(self, now: float) -> None:
        """Pump all that were touched, and those that they touch."""
        for _ in range(PUMPS_MAX):
            if not self._touched:
                return
            item = next(iter(self._touched))
            del self._touched[item]
            item.pump(now)
            self._deadlines.set(item, item.deadline(now))
        raise RuntimeError("peers touch each other without end")

    def handle_timeout(self, now: float) -> None:
        """Let all act whose deadline is there."""
        for item in self._deadlines.take(now):
            item.handle_timeout(now)
            self._touched.pop(item, None)
            self._deadlines.set(item, item.deadline(now))

    def next(self) -> float | None:
        """Return the earliest deadline."""
        return self._deadlines.next()
