"""Links of the in-memory internet: what one direction of one does to a packet, without I/O."""

from __future__ import annotations

from dataclasses import dataclass

from crossedge.lab.chance import Chance


@dataclass(frozen=True, slots=True, kw_only=True)
class Conditions:
    """How one direction of a link treats packets. Times in seconds, sizes in bytes, shares from 0 to 1."""

    delay: float = 0.0
    jitter: float = 0.0
    """Added to `delay`, uniform from 0 to this; order is kept."""
    loss: float = 0.0
    reorder: float = 0.0
    """Share of packets that are held back by `reorder_delay` and may be overtaken."""
    reorder_delay: float = 0.01
    rate: float | None = None
    """Bits per second; None: no limit."""
    queue: int = 262_144
    """Most that waits for a link of limited rate; what does not fit is dropped."""
    mtu: int = 1500
    """Largest IP packet; a larger one vanishes without a word (a path MTU black hole)."""
    hops: int = 0
    """Routers on the way, each takes one from the TTL."""


class Lane:
    """One direction of a link, with what it carries now."""

    __slots__ = ("_busy_until", "_last_arrival", "conditions")

    def __init__(self, conditions: Conditions) -> None:
        self.conditions = conditions
        self._busy_until = 0.0
        self._last_arrival = 0.0

    def admit(self, size: int, now: float, chance: Chance) -> float | str:
        """Return when an IP packet of `size` bytes that is sent now arrives, or why it is dropped."""
        c = self.conditions
        if size > c.mtu:
            return "mtu"
        if c.loss and chance.uniform() < c.loss:
            return "loss"
        if c.rate is None and not c.jitter and not c.reorder:
            self._last_arrival = arrival = max(now + c.delay, self._last_arrival)
            return arrival
        start = now
        if c.rate is not None:
            start = max(now, self._busy_until)
            if (start - now) * c.rate / 8 + size > c.queue:
                return "queue"
            self._busy_until = start = start + size * 8 / c.rate
        arrival = start + c.delay
        if c.jitter:
            arrival += c.jitter * chance.uniform()
        if c.reorder and chance.uniform() < c.reorder:
            return arrival + c.reorder_delay
        self._last_arrival = max(arrival, self._last_arrival)
        return self._last_arrival


class Link:
    """Both directions of what joins a host or a router to what is above it."""

    __slots__ = ("down", "up")

    def __init__(self, up: Conditions, down: Conditions | None = None) -> None:
        self.up = Lane(up)
        self.down = Lane(down or up)

    def set(self, up: Conditions, down: Conditions | None = None) -> None:
        """Change the conditions; what is under way stays under way."""
        self.up.conditions = up
        self.down.conditions = down or up
