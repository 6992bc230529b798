"""Who is told that the directory changed, and when: many changes in one message, paced by what it costs."""

from __future__ import annotations

from collections import deque

from crossedge.rendezvous.registry import Lease, Registry

NOTIFY_INTERVAL = 0.1
"""Seconds between two rounds at least."""
LEASES_PER_SECOND = 2000.0
"""Pace of the rounds: each `Notify` brings a `Pull`, so larger meshes are told less often."""
BATCH = 100
BATCH_INTERVAL = 0.01
"""Seconds between the batches of one round."""


class Notifier:
    """Collects changes and hands out, batch by batch, the leases that have not heard of them."""

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._round: deque[Lease] = deque()
        self._changed = False
        self._due: float | None = None
        self._last = float("-inf")

    def changed(self, now: float) -> None:
        """Take note that some directory changed."""
        self._changed = True
        if self._due is None:
            interval = max(NOTIFY_INTERVAL, len(self._registry.leases) / LEASES_PER_SECOND)
            self._due = max(now, self._last + interval)

    def next_deadline(self) -> float | None:
        """Return when `take` has something."""
        return self._due

    def take(self, now: float) -> list[Lease]:
        """Return the leases to be told now, and take them as told."""
        if self._due is None or now < self._due:
            return []
        if not self._round:
            self._changed = False
            self._last = now
            self._round.extend(self._registry.leases.values())
        batch: list[Lease] = []
        while self._round and len(batch) < BATCH:
            lease = self._round.popleft()
            version = lease.node.directory.version
            if lease.told < version and lease.node.lease is lease:
                lease.told = version
                batch.append(lease)
        self._due = None
        if self._round:
            self._due = now + BATCH_INTERVAL
        elif self._changed:
            self.changed(now)
        return batch
